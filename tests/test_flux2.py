"""FLUX.2's and klein's own forms: references behind or before the picture, inpainting, and what is kept as one sum."""

from __future__ import annotations

import functools

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import fastdit
import tiny_models
from bench_ecad import reachable_bytes
from contract import FORWARD_FP64, RUN_FP64, distance, same_bits, within_contract
from fastdit import RALU, RAS, ArgumentError, Cached, Schedule
from fastdit.schedules.collapse import find_sums, passes
from oracle import Oracle, random_bits
from ras_oracle import RowOracle, published
from test_cached import as_double
from tiny_models import arguments, generate

pytestmark = [
    pytest.mark.diffusers,
    pytest.mark.skipif(not tiny_models.HAS_FLUX2, reason="this diffusers has an older form"),
]
STEPS = 6
SIZE = {"height": 16, "width": 24}
TOKENS = 8 * 12
KINDS = ("transformer_blocks", "single_transformer_blocks")
NAMES = dict(zip(KINDS, (("attn", "ff", "ff_context"), ("single_attn",)), strict=True))


def picture(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def pipe_of(cls, name, dtype):
    parts = tiny_models.pipeline(name, dtype).components
    pipe = getattr(diffusers, cls)(**parts)
    pipe.set_progress_bar_config(disable=True)
    pipe.image_processor.check_image_input = lambda image: image  # which wants 64 pixels a side
    return pipe


def edit(name, seed=0):
    """A pipeline's arguments with two references of unlike sizes; klein's other prompt is longer."""

    def given(dtype):
        some = arguments(name, 1, STEPS, dtype=dtype, prompt_per_image=True, **SIZE)
        some["image"] = [picture(16, 12, seed), picture(8, 20, seed + 1)]
        if name == "flux2-klein":
            longer = torch.randn(1, tiny_models.TEXT + 2, 20, generator=torch.manual_seed(4))
            some["negative_prompt_embeds"] = longer.to(dtype)
        return some

    return given


def inpaint(name):
    """From the third step on."""

    def given(dtype):
        some = arguments(name, 1, STEPS + 2, dtype=dtype, **SIZE)
        mask = Image.fromarray(np.uint8(255 * (np.arange(24) > 9)) * np.ones((16, 1), np.uint8))
        return some | {
            "image": picture(24, 16),
            "mask_image": mask,
            "strength": STEPS / (STEPS + 2),
        }

    return given


#: pipeline, form, arguments by dtype, calls of a step, first step
EDITS = {
    "edit": ("Flux2Pipeline", "flux2", edit("flux2"), 1, 0),
    "klein's edit": ("Flux2KleinPipeline", "flux2-klein", edit("flux2-klein"), 2, 0),
    "klein's inpainting": (
        "Flux2KleinInpaintPipeline",
        "flux2-klein",
        inpaint("flux2-klein"),
        2,
        2,
    ),
}


@pytest.mark.parametrize("what", EDITS)
def test_edits_dense_and_cached(what):
    cls, name, given, calls, first = EDITS[what]
    for dtype, backend in ((torch.float32, "reference"), (torch.float64, None)):
        pipe = pipe_of(cls, name, dtype)
        plain = pipe(**given(dtype)).images
        bits, names = random_bits(pipe.transformer, STEPS + first, 2)
        with Oracle(pipe.transformer, bits, calls, first).installed():
            cached = pipe(**given(dtype)).images
        for methods, expected in (
            ((), plain),
            ((Cached(Schedule.from_bits(bits, names)),), cached),
        ):
            handle = fastdit.patch(pipe, *methods, backend=backend)
            for _ in range(1 if backend else 2):  # by programs, too
                found = pipe(**given(dtype)).images
                if backend:
                    same_bits(found, expected)
                assert distance(found, expected) <= RUN_FP64
            if methods:
                assert handle.report().reused > 0
            handle.unpatch()


@pytest.mark.parametrize("what", ["edit", "klein's edit"])
def test_ras_on_edits_chooses_among_the_pictures_tokens(what):
    cls, name, given, calls, _ = EDITS[what]
    pipe = pipe_of(cls, name, torch.float64)
    bits, names = random_bits(pipe.transformer, STEPS, seed=1, compute=0.5)
    truth = RowOracle(pipe, published(0.5, STEPS, 2, (4,), 0.3, packed=True), bits, calls)
    with truth.installed():
        expected = pipe(**given(torch.float64)).images
    assert truth.tokens > TOKENS
    ras = RAS(start=2, resets=(4,), high_ratio=0.3, mode="parity")
    for backend in ("reference", None):
        handle = fastdit.patch(pipe, ras, Cached(Schedule.from_bits(bits, names)), backend=backend)
        found = pipe(**given(torch.float64)).images
        assert distance(found, expected) <= 1e-9
        active = handle.report().active
        assert {step: mask.shape[1:] for step, mask in active.items()} == dict.fromkeys(
            truth.history, (8, 12)
        )
        for step, rows in truth.history.items():
            chosen = active[step].reshape(1, -1).nonzero()[1]
            assert chosen.tolist() == rows[0].sort().values.tolist()
        handle.unpatch()


def test_ralu_refuses_references():
    cls, name, given, *_ = EDITS["edit"]
    pipe = pipe_of(cls, name, torch.float32)
    fastdit.patch(pipe, RALU((2, 2, 2), (0.3, 0.45, 1.0), (5.0, 2.6, 2.2), 0.05, 0.3, "gradient"))
    with pytest.raises(ArgumentError, match="img_ids must be the rows and columns of one picture"):
        pipe(**given(torch.float32))


# ---- references whose keys are kept


def with_keys(dtype):
    return pipe_of("Flux2KleinKVPipeline", "flux2-klein", dtype)


def with_references(dtype, seed=0):
    some = edit("flux2-klein", seed)(dtype)
    del some["negative_prompt_embeds"], some["guidance_scale"]
    return some


@pytest.mark.parametrize("backend", ["reference", None])
def test_kept_keys_of_references(backend):
    """Two pictures after another reference: nothing of that one's keys stays."""
    dtype = torch.float32 if backend else torch.float64
    pipe = with_keys(dtype)
    bits, names = random_bits(pipe.transformer, STEPS, 2)
    for each in bits.values():
        each[1] = True  # at the second step the tokens are others
    schedule = Schedule.from_bits(bits, names)
    expected = {}
    for seed in (0, 7):
        expected[seed, 0] = pipe(**with_references(dtype, seed)).images
        with Oracle(pipe.transformer, bits).installed():
            expected[seed, 1] = pipe(**with_references(dtype, seed)).images
    assert distance(expected[0, 0], expected[7, 0]) > 1e-3
    for number, methods in enumerate([(), (Cached(schedule),)]):
        fastdit.patch(pipe, *methods, backend=backend)
        for seed in (0, 7, 0, 7):
            found = pipe(**with_references(dtype, seed)).images
            if backend:
                same_bits(found, expected[seed, number])
            assert distance(found, expected[seed, number]) <= RUN_FP64


def test_kept_keys_in_low_precision_err_at_most_twice_as_much_as_stock():
    pipe, truth = with_keys(torch.bfloat16), with_keys(torch.bfloat16)
    truth.transformer.double(), truth.vae.double()
    runs = []
    for seed in range(3):
        given = with_references(torch.bfloat16, seed)
        runs.append([pipe(**given).images, truth(**as_double(given)).images, given])
    fastdit.patch(pipe)
    found = [pipe(**given | {"generator": torch.manual_seed(0)}).images for *_, given in runs]
    stock, exact, _ = zip(*runs, strict=True)
    within_contract(*map(torch.cat, (found, stock, exact)))


def test_methods_that_stand_in_for_the_attention_refuse_kept_keys():
    pipe = with_keys(torch.float32)
    expected = pipe(**with_references(torch.float32) | {"image": None}).images
    ralu = RALU((2, 2, 2), (0.3, 0.45, 1.0), (5.0, 2.6, 2.2), 0.05, 0.3, "gradient")
    for method, name in ((RAS(align=1, start=1), "RAS"), (ralu, "RALU")):
        fastdit.patch(pipe, method)
        with pytest.raises(ArgumentError, match=f"attention arguments kv_cache_mode .* {name}"):
            pipe(**with_references(torch.float32))
    fastdit.patch(pipe, RAS(align=1, ratio=1.0), backend="reference")  # without references
    same_bits(pipe(**with_references(torch.float32) | {"image": None}).images, expected)


def test_other_kept_keys_make_caches_anew():
    """In one run: the keys that a call is given are a part of what its cached outputs depend on."""
    pipe, calls = with_keys(torch.float64), []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(dict(kwargs)), with_kwargs=True
    )
    for seed in (0, 7):
        pipe(**with_references(torch.float64, seed) | {"num_inference_steps": 2})
    hook.remove()
    model, given = pipe.transformer, [calls[1], calls[3]]
    with torch.no_grad():
        for one, first in zip(
            given, (calls[0], calls[2]), strict=True
        ):  # the pipeline cleared them
            one["kv_cache"] = model(**first)[1]
            one["hidden_states"] = calls[1]["hidden_states"]
        given[1]["timestep"] = calls[1]["timestep"] / 2
        expected = [model(**one)[0] for one in given]
        first = model(**given[1] | {"kv_cache": given[0]["kv_cache"]})[0]
        assert distance(first, expected[1]) > 1e-3
        handle = fastdit.patch(model, Cached(Schedule.every(2)))
        with handle.run(range(2)):
            for one, wanted in zip(given, expected, strict=True):
                assert distance(model(**one)[0], wanted) <= FORWARD_FP64


@torch.no_grad()
def test_a_single_block_takes_text_and_image_joined():
    model = tiny_models.transformer("flux2")
    handle = fastdit.patch(model, backend="reference")
    block = model.single_transformer_blocks[0]
    first = functools.partial(
        block.forward,
        torch.zeros(1, 4, 32),
        torch.zeros(1, 2, 32),
        torch.zeros(1, 96),
    )
    seen = []
    hook = model.norm_out.register_forward_pre_hook(lambda *_: (seen.append(1), first())[1])
    with pytest.raises(ArgumentError, match="the flux2 adapter takes text and image joined"):
        model(**tiny_models.call("flux2"))
    assert seen
    hook.remove()
    handle.unpatch()


# ---- one sum


def banded(seed, steps, blocks):
    """Random bits that often agree from block to block and step to step, as searched schedules do."""
    draw = np.random.default_rng(seed)
    bits = {
        kind: np.zeros((steps, count, len(NAMES[kind])), dtype=bool)
        for kind, count in zip(KINDS, blocks, strict=True)
    }
    for step in range(1, steps):
        first, last = sorted(draw.integers(0, sum(blocks) + 1, 2))
        kind = draw.random()
        double, single = (bits[name][step] for name in KINDS)
        if kind < 0.6:
            double[first:last] = draw.random((len(double[first:last]), 3)) < 0.8
            single[max(0, first - blocks[0]) : max(0, last - blocks[0])] = True
        elif kind < 0.7:
            double[draw.integers(0, blocks[0])] = True
    for array in bits.values():
        array[0] = True
    return bits


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 16), st.integers(1, 9), st.integers(1, 12))
def test_sums_are_of_one_component_and_pay(seed, steps, doubles, singles):
    bits = banded(seed, steps, (doubles, singles))
    slots = [(i, name) for i in range(doubles) for name in NAMES[KINDS[0]]]
    slots += [(doubles + i, "single_attn") for i in range(singles)]
    flat = np.concatenate([bits[kind].reshape(steps, -1) for kind in KINDS], axis=1)
    plan = find_sums(flat, slots, alike=[name for _, name in slots])
    found = {s for step in plan for s in step.made.values()}
    for s in found:
        places = [slots.index(slot) for slot in s.slots]
        assert s.count == 1
        assert len({name for _, name in s.slots}) == 1
        assert not flat[list(s.uses), places[0] : places[-1] + 1].any()
        assert len(s.uses) * (len(places) - 1) > passes(len(places), 1)
    whole = np.zeros_like(flat)
    whole[0] = True
    kept = {
        s.slots for step in find_sums(whole, slots, alike=[n for _, n in slots]) for s in step.kept
    }
    many = [n for n in NAMES[KINDS[0]] if steps > 3 and doubles > 3]
    assert {slots[0][1] for slots in kept} >= set(many)


def model_of(blocks, dtype):
    return tiny_models.randomise(tiny_models.flux2(False, *blocks)).to(dtype)


def calls_of(steps, batch, dtype):
    return [tiny_models.call("flux2", batch, dtype, step=step) for step in range(steps)]


def expected_of(model, bits, inputs, **drawn):
    with torch.no_grad(), Oracle(model, bits, **drawn).installed():
        return [model(**given)[0] for given in inputs]


def ran(handle, model, inputs, seen=None, sigmas=None):
    with torch.no_grad(), handle.run(range(len(inputs)) if sigmas is None else sigmas):
        for given in inputs:
            yield model(**given)[0]
            if seen is not None:
                seen.append(reachable_bytes(handle))


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    steps=st.integers(4, 8),
    blocks=st.sampled_from([(2, 3), (4, 4), (1, 9)]),
    batch=st.integers(1, 3),
)
def test_sums_equal_the_cache_and_their_bytes_are_as_predicted(seed, steps, blocks, batch):
    bits = banded(seed, steps, blocks)
    model = model_of(blocks, torch.float64)
    inputs = calls_of(steps, batch, torch.float64)
    expected = expected_of(model, bits, inputs)
    handle = fastdit.patch(model, Cached(Schedule.from_bits(bits, NAMES)))
    seen = []
    for actual, wanted in zip(ran(handle, model, inputs, seen), expected, strict=True):
        assert distance(actual, wanted) <= FORWARD_FP64
    said = handle.explain(
        steps=steps, batch=batch, cfg=False, height=64, width=128, text_tokens=tiny_models.TEXT
    )
    assert max(seen) == said.cache_bytes == handle.report().peak_cache_bytes


@pytest.mark.parametrize("order", [0, 1, 2])
def test_sums_beside_what_computes_and_what_is_drawn(order):
    """Blocks between which one computes; forecasts of what is summed at each of the steps they are drawn through."""
    steps, blocks = 9, (4, 34)
    bits = banded(0, steps, blocks)
    for array in bits.values():
        array[:] = False
        array[::3] = True
    bits[KINDS[0]][:, 1] = True
    orders = {kind: np.full(array.shape, order) for kind, array in bits.items()}
    sigmas = list(np.linspace(1.0, 0.05, steps) ** 1.5)
    model, inputs = model_of(blocks, torch.float64), calls_of(steps, 2, torch.float64)
    expected = expected_of(model, bits, inputs, orders=orders, sigmas=sigmas)
    handle = fastdit.patch(model, Cached(Schedule.from_bits(bits, NAMES), order=order))
    assert "34 outputs are kept as 1 sum" in handle.explain(steps=steps, cfg=False).collapse
    for actual, wanted in zip(ran(handle, model, inputs, sigmas=sigmas), expected, strict=True):
        assert distance(actual, wanted) <= FORWARD_FP64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_err_at_most_twice_as_much_as_the_cache(dtype):
    blocks = (2, 34)
    bits = banded(3, 8, blocks)
    for array in bits.values():
        array[3:6] = False
    model, inputs = model_of(blocks, dtype), calls_of(8, 2, dtype)
    expected = expected_of(model, bits, inputs)
    truth = expected_of(model_of(blocks, dtype).double(), bits, [as_double(g) for g in inputs])
    handle = fastdit.patch(model, Cached(Schedule.from_bits(bits, NAMES)))
    assert "1 sum" in handle.explain(text_tokens=5).collapse
    within_contract(*map(torch.cat, (list(ran(handle, model, inputs)), expected, truth)))


@pytest.mark.parametrize("cache", [None, "float16"])
def test_there_are_no_sums_in_fp16_whose_range_they_may_leave(cache):
    dtype = torch.float16 if cache is None else torch.float32
    model, inputs = model_of((2, 30), dtype), calls_of(4, 1, dtype)
    with torch.no_grad():
        for block in model.single_transformer_blocks:  # outputs of thousands, each in range
            block.attn.to_out.weight *= 2000
        model.single_stream_modulation.linear.weight[64:] *= 1e-3
    handle = fastdit.patch(model, fastdit.ECAD(Schedule.every(4), cache_dtype=cache))
    assert handle.explain(steps=4).collapse == "off: sums may leave the range of fp16"
    found = list(ran(handle, model, inputs))
    assert all(each.isfinite().all() for each in found)


@pytest.mark.parametrize("change", ["batch", "text", "grad", "hook", "timestep"])
@pytest.mark.parametrize("at", [1, 2])
def test_changes_within_a_run(change, at):
    """The step computes, or sums go where somebody looks at blocks; another timestep has other gates."""
    model, inputs = model_of((3, 6), torch.float64), calls_of(5, 2, torch.float64)
    for step in range(at, 5):
        if change == "batch":
            inputs[step] = tiny_models.call("flux2", 1, torch.float64, step=step)
        elif change == "text":
            inputs[step]["encoder_hidden_states"] = inputs[0]["encoder_hidden_states"] + 1
        elif change == "timestep":
            inputs[step]["timestep"] = inputs[step]["timestep"] * 0.3
    if change == "text":
        for step in range(at + 1, 5):
            inputs[step]["encoder_hidden_states"] = inputs[at]["encoder_hidden_states"]
    bits = banded(0, 5, (3, 6))
    for array in bits.values():
        array[:] = False
    anew = {kind: array.copy() for kind, array in bits.items()}
    for array in anew.values():
        array[at] = change != "timestep"
    expected = expected_of(model, anew, inputs)
    handle = fastdit.patch(model, Cached(Schedule.from_bits(bits, NAMES)))
    with torch.no_grad(), handle.run(range(5)):
        for step, (one, wanted) in enumerate(zip(inputs, expected, strict=True)):
            if change == "hook" and step == at:
                model.single_transformer_blocks[1].register_forward_hook(lambda *_: None)
            with torch.set_grad_enabled(change == "grad" and step >= at):
                assert distance(model(**one)[0].detach(), wanted) <= FORWARD_FP64, step


# ---- fp16, and the joint stream


@pytest.mark.parametrize("backend", ["reference", None])
@torch.no_grad()
def test_overflowing_streams_are_clipped_in_fp16(backend):
    """Text of the double blocks and all of the single ones; the image of the double blocks is not."""
    model, inputs = tiny_models.transformer("flux2", torch.float16), tiny_models.call("flux2", 2)
    inputs = {
        k: v.half() if v is not False and v.is_floating_point() else v for k, v in inputs.items()
    }
    blocks, seen = (model.transformer_blocks[0], model.single_transformer_blocks[0]), []
    model.double_stream_modulation_txt.linear.weight[5 * 32 :].mul_(6e3)
    model.single_stream_modulation.linear.weight[2 * 32 :].mul_(6e3)
    for layer in (blocks[0].ff_context.linear_out, blocks[1].attn.to_out):
        layer.weight.mul_(40)

    def outputs():
        hooks = [b.register_forward_hook(lambda m, a, out: seen.append(out)) for b in blocks]
        model(**inputs)
        for hook in hooks:
            hook.remove()
        (text, _), joint = seen
        seen.clear()
        return text, joint

    stock = outputs()
    assert all(tensor.abs().max() == 65504 for tensor in stock)
    fastdit.patch(model, backend=backend)
    for actual, expected in zip(outputs(), stock, strict=True):
        assert actual.abs().max() == 65504
        if backend:
            same_bits(actual, expected)


@torch.no_grad()
def test_nobody_sees_the_joint_stream_change():
    """A hook holds on to what blocks are given and give."""
    model, inputs = tiny_models.transformer("flux2", torch.float64), calls_of(2, 2, torch.float64)
    kept = []

    def keep(module, args, kwargs, output):
        for tensor in (kwargs["hidden_states"], output):
            kept.append((tensor, tensor.clone()))

    expected = [model(**one)[0] for one in inputs]
    for place in (0, 1, 2):
        kept.clear()
        block = model.single_transformer_blocks[place]
        hook = block.register_forward_hook(keep, with_kwargs=True)
        handle = fastdit.patch(model)
        for one, wanted in zip(inputs, expected, strict=True):
            assert distance(model(**one)[0], wanted) <= FORWARD_FP64
        assert len(kept) == 4
        assert all(torch.equal(tensor, before) for tensor, before in kept)
        handle.unpatch()
        hook.remove()


def test_an_interrupted_run_leaves_nothing():
    pipe = tiny_models.pipeline("flux2-klein", torch.float64)

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = step == 1
        return tensors

    bits, names = random_bits(pipe.transformer, STEPS, 3)
    schedule = Cached(Schedule.from_bits(bits, names))
    with Oracle(pipe.transformer, bits, 2).installed():
        expected = generate(pipe, "flux2-klein", steps=STEPS)
    fastdit.patch(pipe, schedule)
    for callback, wanted in ((stop, None), (None, expected), (stop, None), (None, expected)):
        found = generate(pipe, "flux2-klein", steps=STEPS, callback_on_step_end=callback)
        assert wanted is None or distance(found, wanted) <= RUN_FP64


def test_a_second_run_records_nothing_again():
    """The pipeline gives the transformer an empty registry of hooks when it first ends."""
    pipe = tiny_models.pipeline("flux2")
    handle = fastdit.patch(pipe)
    generate(pipe, "flux2", steps=STEPS)
    programs = handle.last_run().patched.programs
    before = dict(programs.found)
    generate(pipe, "flux2", steps=STEPS)
    assert programs.found == before
    assert handle.last_run().programs == STEPS - 1
