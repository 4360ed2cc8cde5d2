"""Who looks at or adds to the residual streams between blocks gets what stock diffusers has there.

The fast path lets residuals wait across blocks and adds them in place, so hooks, ControlNet
residuals and skipped blocks are where a stream could be seen unfinished or change behind somebody's
back.
"""

from __future__ import annotations

import pytest
import torch
from diffusers.models.normalization import RMSNorm

import fastdit
import tiny_models
from contract import FORWARD_FP64, same_bits, within_contract
from fastdit import Cached, Dense, Schedule, ops
from fastdit.blocks.forward import Forward
from oracle import Oracle, random_bits
from tiny_models import sample

STEPS = 4
FAMILIES = tiny_models.one_each(tiny_models.forms(), -1)
KINDS = ("transformer_blocks", "single_transformer_blocks", "layers", "blocks")


def blocks(model):
    return [block for kind in KINDS for block in getattr(model, kind, ())]


def run(model, family, **more):
    with torch.no_grad():
        return [
            sample(model(**tiny_models.call(family, 2, torch.float64, step=step), **more))
            for step in range(STEPS)
        ]


def compare(family, more=None, seed=0, backend=None, observe=None):
    """Oracle and patched model under a random schedule, with extra arguments and hooks: outputs agree.

    Returns:
        What `observe(model)` returned for the oracle and for the patched model.
    """
    model = tiny_models.transformer(family, torch.float64)
    bits, names = random_bits(model, STEPS, seed)
    expected_seen = observe(model) if observe else None
    with Oracle(model, bits).installed():
        expected = run(model, family, **(more or {}))
    model = tiny_models.transformer(family, torch.float64)
    seen = observe(model) if observe else None
    handle = fastdit.patch(model, Cached(Schedule.from_bits(bits, names)), backend=backend)
    with handle.run(range(STEPS)):
        for actual, wanted in zip(run(model, family, **(more or {})), expected, strict=True):
            within_contract(actual, wanted, bound=FORWARD_FP64)
    return expected_seen, seen


def record_outputs(which):
    """Hooks on some blocks that keep the very tensors they see, and copies made at once."""

    def observe(model):
        seen = []

        def hook(module, args, kwargs, output):
            tensors = list(output) if isinstance(output, tuple) else [output]
            tensors += [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
            seen.append([(t, None if t is None else t.clone()) for t in tensors])

        for index, block in enumerate(blocks(model)):
            if index in which:
                block.register_forward_hook(hook, with_kwargs=True)
        return seen

    return observe


@pytest.mark.parametrize("which", [{0, 1, 2, 3}, {1}, {0, 2}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_on_blocks_see_stock_values_that_never_change(family, which):
    for seed in range(2):
        expected, seen = compare(family, seed=seed, observe=record_outputs(which))
        assert len(seen) == len(expected) > 0
        for mine, theirs in zip(seen, expected, strict=True):
            for (tensor, copy), (wanted, _) in zip(mine, theirs, strict=True):
                if wanted is None or not wanted.is_floating_point():
                    assert (tensor is None) == (wanted is None)
                    continue
                within_contract(copy, wanted, bound=FORWARD_FP64)
                same_bits(tensor, copy)


@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_that_come_and_go_inside_a_run_see_stock_values(family):
    """Whether a residual may wait is decided anew at each block, so a hook may appear at any step."""
    model = tiny_models.transformer(family, torch.float64)
    bits, names = random_bits(model, STEPS, 5)
    inputs = [tiny_models.call(family, 2, torch.float64, step=step) for step in range(STEPS)]

    def outputs_seen(model):
        seen = []
        with torch.no_grad():
            for step, given in enumerate(inputs):
                block = blocks(model)[step % len(blocks(model))]
                hook = block.register_forward_hook(
                    lambda m, a, out: seen.append(out[-1] if isinstance(out, tuple) else out)
                )
                model(**given)
                hook.remove()
        return seen

    with Oracle(model, bits).installed():
        expected = outputs_seen(model)
    handle = fastdit.patch(model, Cached(Schedule.from_bits(bits, names)))
    with handle.run(range(STEPS)):
        for actual, wanted in zip(outputs_seen(model), expected, strict=True):
            within_contract(actual, wanted, bound=FORWARD_FP64)


# Of one stream; where there are two, blocks give views of a joint one or tensors of their own.
@pytest.mark.parametrize("family", ["pixart-sigma", "dit", "lumina"])
def test_streams_keep_the_memory_layout_of_stock_on_reference(family):
    """What reads a stream next rounds by its layout, and patch embeddings leave it transposed."""
    model = tiny_models.transformer(family)
    strides = []
    for block in blocks(model):
        block.register_forward_hook(lambda m, a, out: strides.append(out.stride()))
    with torch.no_grad():
        model(**tiny_models.call(family, 2))
        stock, strides[:] = strides[:], []
        fastdit.patch(model, backend="reference")
        model(**tiny_models.call(family, 2))
    assert strides == stock


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hook_may_replace_a_blocks_output(family):
    def halve(model):
        def hook(module, args, output):
            if isinstance(output, tuple):
                return tuple(None if t is None else 0.5 * t for t in output)
            return 0.5 * output

        blocks(model)[1].register_forward_hook(hook)

    compare(family, observe=halve)


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_of_the_transformer_are_never_written(family):
    model = tiny_models.transformer(family)
    fastdit.patch(model, Cached(Schedule.every(2)))
    for step in range(3):
        given = tiny_models.call(family, 2, step=step)
        copies = {k: v.clone() for k, v in given.items() if isinstance(v, torch.Tensor)}
        with torch.no_grad():
            model(**given)
        for name, copy in copies.items():
            same_bits(given[name], copy)


# ---- ControlNet


def residuals(count, tokens, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (2, tokens, width)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("seed", range(2))
def test_controlnet_residuals_of_sd3(count, seed):
    given = residuals(count, 32, 32)
    copies = [tensor.clone() for tensor in given]
    compare("sd3.5", {"block_controlnet_hidden_states": given}, seed)
    for tensor, copy in zip(given, copies, strict=True):
        same_bits(tensor, copy)


@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_controlnet_residuals_of_flux(repeat, seed):
    more = {
        "controlnet_block_samples": residuals(2, 32, 32),
        "controlnet_single_block_samples": residuals(1, 32, 32, 1),
        "controlnet_blocks_repeat": repeat,
    }
    compare("flux-dev", more, seed)


# ---- skipped blocks


@pytest.mark.parametrize("skipped", [[0], [1], [2], [0, 1], [1, 2], [0, 1, 2]], ids=str)
@pytest.mark.parametrize("family", ["sd3", "sd3.5"])  # diffusers skips layers of no other
def test_skipped_layers_of_sd3(family, skipped):
    for seed in range(2):
        compare(family, {"skip_layers": skipped}, seed)


@pytest.mark.parametrize("skipped", [[1], [2], [0, 1]], ids=str)
def test_skipped_layers_are_bit_equal_on_reference(skipped):
    model = tiny_models.transformer("sd3.5")
    given = tiny_models.call("sd3.5", 2) | {"skip_layers": skipped}
    with torch.no_grad():
        stock = sample(model(**given))
        for method in (Dense(), Cached(Schedule.every(1))):
            fastdit.patch(model, method, backend="reference")
            same_bits(sample(model(**given)), stock)


# ---- norms


NORMS = {
    "LayerNorm": lambda: torch.nn.LayerNorm(24, eps=1e-3),
    "torch RMSNorm": lambda: torch.nn.RMSNorm(24, eps=1e-3),
    "torch RMSNorm without eps": lambda: torch.nn.RMSNorm(24),
    "diffusers RMSNorm": lambda: RMSNorm(24, eps=1e-3),
    "diffusers RMSNorm with bias": lambda: RMSNorm(24, eps=1e-3, bias=True),
    "diffusers RMSNorm without weight": lambda: RMSNorm(24, eps=1e-3, elementwise_affine=False),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NORMS)
@torch.no_grad()
def test_norms_of_every_kind_are_those_of_their_modules(name, dtype):
    """With a scale and no shift, on a residual stream and on other tensors; `eager` runs the module itself."""
    norm, rounded = (tiny_models.randomise(NORMS[name]()).to(dtype) for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    h, scale = (torch.randn(2, n, 24, generator=generator).to(dtype) for n in (5, 1))

    def both(immediate, norm, h, scale):
        fw = Forward(ops.bind(), [norm], immediate=immediate)
        plain, stream = fw.normed(norm, h), fw.enter(h, "image").normed(norm, scale, None)
        return torch.cat([plain, stream], dim=1)

    eager, actual = (both(immediate, norm, h, scale) for immediate in (True, False))
    same_bits(eager, torch.cat([norm(h), norm(h) * (1 + scale)], dim=1))
    truth = both(True, rounded.double(), h.double(), scale.double())
    within_contract(actual, eager, truth, bound=FORWARD_FP64 * 1e-4)


@torch.no_grad()
def test_norms_with_a_hook_run_as_modules():
    norm = RMSNorm(24, eps=1e-5)
    norm.register_forward_hook(lambda m, a, out: 2 * out)
    h = torch.randn(1, 3, 24, generator=torch.Generator().manual_seed(1))
    fw = Forward(ops.bind(), [norm], immediate=False)
    same_bits(fw.normed(norm, h), norm(h))
    same_bits(fw.enter(h, "image").normed(norm, None, None), norm(h))
