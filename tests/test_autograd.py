"""With gradients on, a patched model is differentiable and has stock's gradients, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils._pytree import tree_leaves

import fastdit
import tiny_models
from contract import same_bits
from fastdit.account.skeleton import forms
from fastdit.adapters.arguments import forward_arguments
from fastdit.blocks.forward import Forward
from fastdit.drift import drawn, given_to_blocks
from fastdit.patch import find_adapter
from tiny_models import sample

FAMILIES = list(tiny_models.FAMILIES)


def gradients(model, family):
    """Gradients of a scalar of the output: of the latents, and of every parameter."""
    model.zero_grad()
    torch.manual_seed(9)  # DiT drops labels in training
    given = tiny_models.call(family, 2)
    latents = tree_leaves(given[tiny_models.adapter_of(family).image_argument])
    for one in latents:
        one.requires_grad_(True)
    sample(model(**given)).square().sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {f"latents {n}": one.grad for n, one in enumerate(latents)}


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("family", FAMILIES)
def test_dense_has_the_gradients_of_stock(family, backend):
    model = tiny_models.transformer(family)
    expected = gradients(model, family)
    fastdit.patch(model, backend=backend)
    actual = gradients(model, family)
    assert actual.keys() == expected.keys()
    for name in expected:
        same_bits(actual[name], expected[name])


@pytest.mark.parametrize("family", tiny_models.one_each(FAMILIES, -1))
def test_gradient_checkpointing_in_training(family):
    model = tiny_models.transformer(family).train()
    if not model._supports_gradient_checkpointing:
        pytest.skip("diffusers checkpoints no blocks of it")
    model.enable_gradient_checkpointing()
    expected = gradients(model, family)
    fastdit.patch(model)
    actual = gradients(model, family)
    for name in expected:
        same_bits(actual[name], expected[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_gradcheck_through_every_kind_of_block(family):
    """Without what diffusers computes in fp32 whatever the dtype: RMS norms, Lumina's SiLU, rotary positions."""
    model = tiny_models.transformer(family, torch.float64)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "RMSNorm":
                setattr(module, name, torch.nn.Identity())
            elif type(child).__name__ == "FP32SiLU":
                setattr(module, name, torch.nn.SiLU())
    adapter = find_adapter(model)
    blocks = dict(zip(forms(adapter, model), adapter.blocks(model), strict=True))
    for form, given in given_to_blocks(adapter, model).items():
        kind, block = blocks[form]
        args, kwargs = drawn(given, block)
        arguments = dict(zip(forward_arguments(type(block)), args, strict=False)) | kwargs
        arguments |= dict.fromkeys({"image_rotary_emb", "freqs_cis"} & arguments.keys())
        names = [
            name
            for name, value in arguments.items()
            if isinstance(value, torch.Tensor) and value.is_floating_point()
        ]

        def forward(*values, block=block, kind=kind, arguments=arguments, names=names):
            given = arguments | dict(zip(names, values, strict=True))
            fw = Forward(fastdit.ops.bind("reference"), [block])
            fw.start_block(0)
            output = adapter.forwards[kind](block, fw, **given)
            return tuple(t for t in output if t is not None) if type(output) is tuple else output

        values = [arguments[name].requires_grad_(True) for name in names]
        assert gradcheck(forward, values, fast_mode=True)


def test_a_schedule_refuses_gradient_checkpointing():
    model = tiny_models.transformer("dit").train()
    model.enable_gradient_checkpointing()
    fastdit.patch(model, fastdit.Cached(fastdit.Schedule.every(2)))
    with pytest.raises(fastdit.ArgumentError, match="checkpointing"):
        model(**tiny_models.call("dit", 2))
    with torch.no_grad():
        model(**tiny_models.call("dit", 2))


def test_a_training_step_is_reported():
    model = tiny_models.transformer("sd3.5")
    handle = fastdit.patch(model)
    model(**tiny_models.call("sd3.5", 2))
    with_gradients = handle.report().computed
    handle.reset()
    with torch.no_grad():
        model(**tiny_models.call("sd3.5", 2))
    assert handle.report().computed == with_gradients == 3 * 3 + 2 - 1


def test_a_schedule_is_differentiable_too():
    """A reused output takes part in the graph of the step that made it."""
    model = tiny_models.transformer("dit")
    handle = fastdit.patch(model, fastdit.Cached(fastdit.Schedule.every(2)))
    with handle.run(range(2)):
        model(**tiny_models.call("dit", 1, step=0))
        sample(model(**tiny_models.call("dit", 1, step=1))).sum().backward()
    assert all(p.grad is not None for p in model.transformer_blocks[0].ff.parameters())


def test_grad_mode_and_no_grad_may_follow_each_other():
    model = tiny_models.transformer("pixart-sigma")
    stock = gradients(model, "pixart-sigma")
    fastdit.patch(model)
    with torch.no_grad():
        for step in range(2):
            model(**tiny_models.call("pixart-sigma", 2, step=step))
    for name, value in gradients(model, "pixart-sigma").items():
        same_bits(value, stock[name])
