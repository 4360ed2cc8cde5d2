"""Skipping nothing changes nothing: every family's transformer under Dense and under schedules that reuse nothing."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from diffusers import PixArtTransformer2DModel

import fastdit
import tiny_models
from contract import FORWARD_FP64, distance, same_bits, within_contract
from fastdit import ArgumentError, Cached, Dense, Schedule
from fastdit.adapters import adapters
from fastdit.adapters.base import NEEDS, Adapter
from oracle import random_bits
from tiny_models import sample

pytestmark = pytest.mark.diffusers

FAMILIES = list(tiny_models.FAMILIES)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 8, 16), (3, 12, 8)]  # batch, height, width


def test_every_family_has_a_tiny_model():
    """Which the tests of all families find. With an old diffusers some have none; VACE is Wan, but for its control."""
    tested = {tiny_models.adapter_of(form).family for form in FAMILIES}
    assert set(adapters()) - tested == {*tiny_models.TOO_NEW, "wan_vace"}  # see test_wan_vace.py
    assert set(FAMILIES) <= set(tiny_models.PIPELINES)


def nothing_reused(model: torch.nn.Module) -> list[fastdit.methods.base.Method]:
    """Every way to say: compute everything."""
    bits, names = random_bits(model, steps=1, seed=0)
    ones = {kind: np.ones_like(value) for kind, value in bits.items()}
    return [
        Dense(),
        Cached(Schedule.from_bits(ones, names)),
        Cached(Schedule.every(1)),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_reference_is_bit_equal_to_stock(family, shape, dtype):
    model = tiny_models.transformer(family, dtype)
    batch, height, width = shape
    inputs = tiny_models.call(family, batch, dtype, height, width)
    stock = sample(model(**inputs))
    for method in nothing_reused(model):
        fastdit.patch(model, method, backend="reference")
        same_bits(sample(model(**inputs)), stock)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_fast_path_is_exact_in_fp64(family, shape):
    model = tiny_models.transformer(family, torch.float64)
    batch, height, width = shape
    inputs = tiny_models.call(family, batch, torch.float64, height, width)
    stock = sample(model(**inputs))
    for method in nothing_reused(model):
        fastdit.patch(model, method)
        for _ in range(2):  # some rewrites begin with the second call
            within_contract(sample(model(**inputs)), stock, bound=FORWARD_FP64)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_fast_path_errs_at_most_twice_as_much_as_stock(family, dtype):
    """Over several inputs together, so that one lucky stock rounding does not decide."""
    model = tiny_models.transformer(family, dtype)
    truth_model = tiny_models.transformer(family, dtype).double()  # the same rounded weights
    actual, stock, truth = [], [], []
    for step in range(4):
        inputs = tiny_models.call(family, 3, dtype, step=step)
        truth.append(sample(truth_model(**as_double(inputs))))
        stock.append(sample(model(**inputs)))
    fastdit.patch(model)
    for step in range(4):
        actual.append(sample(model(**tiny_models.call(family, 3, dtype, step=step))))
    within_contract(torch.cat(actual), torch.cat(stock), torch.cat(truth))


@pytest.mark.parametrize("backend", ["reference", None])
@torch.no_grad()
def test_flux_clips_overflowing_streams_in_fp16(backend):
    """Gates so large that streams pass 65504: stock clips after each block, so must both paths."""
    model = tiny_models.transformer("flux", torch.float16)
    for block in model.transformer_blocks:
        block.norm1_context.linear.bias.chunk(6)[5].fill_(6e4)  # the last gate before the clip
    for block in model.single_transformer_blocks:
        block.norm.linear.bias.chunk(3)[2].fill_(6e4)
    seen = []
    block = model.single_transformer_blocks[0]
    hook = block.register_forward_hook(lambda m, a, out: seen.extend(out))
    inputs = tiny_models.call("flux", 2, torch.float16)
    model(**inputs)
    hook.remove()
    assert all(tensor.abs().max() == 65504 for tensor in seen)
    fastdit.patch(model, backend=backend)
    hook = block.register_forward_hook(lambda m, a, out: seen.extend(out))
    model(**inputs)
    hook.remove()
    for actual, expected in zip(seen[2:], seen[:2], strict=True):
        assert actual.abs().max() == 65504
        if (
            backend == "reference"
        ):  # the fast path's sums do not overflow on the way, only at the end
            same_bits(actual, expected)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_batch_equals_single_runs(family):
    model = tiny_models.transformer(family, torch.float64)
    fastdit.patch(model)
    inputs = tiny_models.call(family, 3, torch.float64)
    together = sample(model(**inputs))
    for index in range(3):
        alone = sample(model(**row(inputs, index)))
        assert distance(together[index : index + 1], alone) <= FORWARD_FP64


#: families whose last block makes text that nobody reads, by this feed-forward
TEXT_ENDS = {"qwen": "txt_mlp", "hunyuanvideo15": "ff_context"}


@pytest.mark.parametrize("family", FAMILIES)
def test_no_parameter_can_hide_a_mistake(family):
    """The models under test have no zero weights, and every parameter reaches the output."""
    model = tiny_models.transformer(family, torch.float64)
    sample(model(**tiny_models.call(family, 2, torch.float64))).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.abs().min() == 0] == []
    unused = {"pad_token"}  # diffusers' Lumina has it and reads it nowhere
    if family in TEXT_ENDS:
        last = model.transformer_blocks[2]
        ends = getattr(last, TEXT_ENDS[family]), last.attn.to_add_out
        for name, parameter in model.named_parameters():
            unused |= {name for end in ends if any(parameter is p for p in end.parameters())}
    assert {name for name, p in model.named_parameters() if p.grad is None} <= unused


def test_the_base_says_which_member_is_for_what():
    shared = {
        *("spec", "blocks", "block_list", "wrapped", "known_arguments", "check_tokens"),
        *("has_stock_processor", "has_stock_attention", "refuse_residuals"),
        *("gather_inputs", "reduce_inputs"),
        *("prompt_projections_of", "prompt_keys_of", "prompt_key_layers_of"),
        *("condition_embeddings_of", "output_norms_of", "modulated_output_of"),
        "shared_modulations_of",
        *("position_embeddings_of", "table_embeddings_of"),
    }
    said = [name for names in NEEDS.values() for name in names.split()]
    bases = Adapter.__mro__[:-1]
    members = {name for cls in bases for name in (*vars(cls), *inspect.get_annotations(cls))}
    members = {name for name in members if name[0] != "_"}
    assert sorted(said) == sorted(members - shared)


def test_an_argument_that_an_adapter_does_not_name_is_refused():
    model = tiny_models.transformer("dit")

    class Told(type(model)):
        def forward(self, *args, mood=None, **kwargs):
            return super().forward(*args, **kwargs)

    model.__class__ = Told
    fastdit.patch(model)
    with torch.no_grad():
        model(**tiny_models.call("dit"), mood=None)
        refused = r"mood: the dit adapter does not know .* Told .* got str, accepted are .*timestep"
        with pytest.raises(ArgumentError, match=refused):
            model(**tiny_models.call("dit"), mood="calm")
        model(**tiny_models.call("dit"))


def as_double(inputs: dict) -> dict:
    """The same inputs in fp64."""

    def convert(value):
        if isinstance(value, dict):
            return as_double(value)
        if isinstance(value, list):
            return list(map(convert, value))
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.double() if floating else value

    return {name: convert(value) for name, value in inputs.items()}


def row(inputs: dict, index: int) -> dict:
    """One batch row of the inputs."""

    def pick(name, value):
        if isinstance(value, dict):
            return row(value, index)
        if isinstance(value, list) and isinstance(value[0], torch.Tensor):
            return value[index : index + 1]
        if not isinstance(value, torch.Tensor) or name.endswith(("_ids", "rotary_emb")):
            return value
        return value[index : index + 1]

    return {name: pick(name, value) for name, value in inputs.items()}


def test_a_model_without_a_projection_of_the_prompt():
    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        use_additional_conditions=False,
    ).eval()
    given = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 16),
        "timestep": torch.tensor([5, 5]),
    }
    with torch.no_grad():
        expected = sample(model(**given))
        handle = fastdit.patch(model, backend="reference")
        same_bits(sample(model(**given)), expected)
    assert handle.explain(height=64, width=64).macs > 0
