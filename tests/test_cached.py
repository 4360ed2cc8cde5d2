"""Random schedules equal a plain cache of module outputs: bits on `reference`, the contract elsewhere."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler, HeunDiscreteScheduler

import fastdit
import tiny_models
from contract import FORWARD_FP64, distance, same_bits, within_contract
from fastdit import Cached, Schedule
from fastdit.blocks.nodes import HeldSums
from oracle import Oracle, random_bits
from tiny_models import generate, sample

pytestmark = pytest.mark.diffusers

STEPS = 5
FAMILIES = list(tiny_models.FAMILIES)


def both_ways(family, bits, names, batch, dtype, backend, steps=STEPS):
    """The outputs of each step's call: (patched, oracle)."""
    model = tiny_models.transformer(family, dtype)
    inputs = [tiny_models.call(family, batch, dtype, step=step) for step in range(steps)]
    with torch.no_grad(), Oracle(model, bits).installed():
        expected = [sample(model(**given)) for given in inputs]
    handle = fastdit.patch(model, Cached(Schedule.from_bits(bits, names)), backend=backend)
    with torch.no_grad(), handle.run(range(steps)):
        actual = [sample(model(**given)) for given in inputs]
    return actual, expected


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("family", FAMILIES)
def test_random_schedules_are_bit_equal_on_reference(family, seed):
    model = tiny_models.FAMILIES[family].build()
    bits, names = random_bits(model, STEPS, seed, compute=(0.2, 0.4, 0.6, 0.8)[seed])
    dtype = (torch.float32, torch.bfloat16)[seed % 2]
    for actual, expected in zip(
        *both_ways(family, bits, names, 2, dtype, "reference"), strict=True
    ):
        same_bits(actual, expected)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("family", FAMILIES)
def test_random_schedules_are_exact_in_fp64(family, seed):
    model = tiny_models.FAMILIES[family].build()
    bits, names = random_bits(
        model, STEPS, 10 + seed, compute=(0.05, 0.2, 0.4, 0.6, 0.8, 0.95)[seed]
    )
    for actual, expected in zip(
        *both_ways(family, bits, names, 1 + seed % 3, torch.float64, None), strict=True
    ):
        within_contract(actual, expected, bound=FORWARD_FP64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_random_schedules_err_at_most_twice_as_much_as_the_oracle(family, dtype):
    bits, names = random_bits(tiny_models.FAMILIES[family].build(), STEPS, 20, compute=0.3)
    actual, expected = both_ways(family, bits, names, 3, dtype, None)
    truth_model = tiny_models.transformer(family, dtype).double()
    with torch.no_grad(), Oracle(truth_model, bits).installed():
        truth = [
            sample(truth_model(**as_double(tiny_models.call(family, 3, dtype, step=step))))
            for step in range(STEPS)
        ]
    within_contract(torch.cat(actual), torch.cat(expected), torch.cat(truth))


def as_double(value):
    """The same call arguments with every floating tensor in fp64."""
    if isinstance(value, dict):
        return {name: as_double(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return list(map(as_double, value))
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.double() if floating else value


#: blocks where two components are read by a third alone: (family, block list, the three)
CONSUMING = [
    ("flux", "single_transformer_blocks", ("single_attn", "single_proj_mlp", "single_proj_out")),
    ("lumina", "layers", ("attn1", "attn2", "to_out")),
]


@pytest.mark.parametrize(
    ("family", "kind", "component"),
    [(family, kind, component) for family, kind, parts in CONSUMING for component in parts],
)
@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "stale"])
def test_bits_of_consumed_components_are_independent(family, kind, component, fresh):
    """One component alone fresh, or alone stale: what is fresh but not consumed now is consumed later."""
    steps = 6
    bits, names = random_bits(tiny_models.FAMILIES[family].build(), steps, 0, compute=1.1)
    index = names[kind].index(component)
    bits[kind][:] = not fresh
    bits[kind][..., index] = fresh
    bits[kind][4] = True
    bits[kind][4, :, :2] = [fresh, False]  # the projection runs on what the other bits left behind
    for actual, expected in zip(
        *both_ways(family, bits, names, 2, torch.float64, None, steps), strict=True
    ):
        within_contract(actual, expected, bound=FORWARD_FP64)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "kind"), [entry[:2] for entry in CONSUMING])
def test_every_pattern_of_consumed_components(family, kind):
    """All 64 ways to set the three bits of a block in two later steps, each after a step that computes all of it and
    before one that consumes, in one run."""
    model = tiny_models.transformer(family, torch.float64)
    inputs = [tiny_models.call(family, 1, torch.float64, step=step) for step in range(4)]
    bits, names = random_bits(model, 4 * 64, 0, compute=1.1)
    patterns = list(itertools.product([False, True], repeat=6))
    for number, flags in enumerate(patterns):
        _, second, third, last = bits[kind][4 * number : 4 * number + 4]
        second[:, :3], third[:, :3], last[:, :3] = flags[:3], flags[3:], [0, 0, 1]
    with torch.no_grad(), Oracle(model, bits).installed():
        expected = [sample(model(**given)) for _ in patterns for given in inputs]
    handle = fastdit.patch(model, Cached(Schedule.from_bits(bits, names)))
    with torch.no_grad(), handle.run(range(4 * 64)):
        for step, wanted in enumerate(expected):
            actual = sample(model(**inputs[step % 4]))
            assert distance(actual, wanted) <= FORWARD_FP64, patterns[step // 4]


# ---- whole pipelines

RUNS = [(name, cfg) for name in tiny_models.PIPELINES for cfg in (True, False)]


@pytest.mark.parametrize(("name", "cfg"), RUNS)
def test_pipelines_run_random_schedules_like_the_oracle(name, cfg):
    pipe = tiny_models.pipeline(name)
    options = {"steps": STEPS, "batch": 2, "cfg": cfg}
    bits, names = random_bits(pipe.transformer, STEPS, 3)
    calls, first = rhythm(pipe, name, options)
    assert first == (2 if "img2img" in name else 0)  # strength 0.6 enters late
    with Oracle(pipe.transformer, bits, calls, first).installed():
        expected = generate(pipe, name, **options)
    fastdit.patch(pipe, Cached(Schedule.from_bits(bits, names)), backend="reference")
    same_bits(generate(pipe, name, **options), expected)
    assert fastdit.report(pipe).reused > 0


def rhythm(pipe, name, options):
    """(transformer calls per step, first step) of a stock run; FLUX calls twice where it guides."""
    calls = []
    hook = pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    generate(pipe, name, **options)
    hook.remove()
    first = getattr(pipe.scheduler, "begin_index", None) or 0
    per_step, rest = divmod(len(calls), len(pipe.scheduler.timesteps) - first)
    assert rest == 0
    return per_step, first


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [("sd3", FlowMatchHeunDiscreteScheduler), ("pixart-sigma", HeunDiscreteScheduler)],
)
def test_every_transformer_call_of_heun_is_a_step(name, scheduler):
    pipe = tiny_models.pipeline(name, scheduler=scheduler())
    pipe.scheduler.set_timesteps(3)
    steps = len(pipe.scheduler.timesteps)
    assert steps > 3
    bits, names = random_bits(pipe.transformer, steps, 4)
    with Oracle(pipe.transformer, bits).installed():
        expected = generate(pipe, name, steps=3)
    fastdit.patch(pipe, Cached(Schedule.from_bits(bits, names)), backend="reference")
    same_bits(generate(pipe, name, steps=3), expected)


def test_skip_layer_guidance_has_caches_of_its_own():
    """The guiding call comes after the main call of a step and starts late, so the oracle runs it
    as a second branch.
    """
    pipe = tiny_models.pipeline("sd3")
    bits, names = random_bits(pipe.transformer, STEPS, 5)
    options = {
        "steps": STEPS,
        "skip_guidance_layers": [1],
        "skip_layer_guidance_start": -0.01,
        "skip_layer_guidance_stop": 1.01,
    }
    with Oracle(pipe.transformer, bits, calls_per_step=2).installed():
        expected = generate(pipe, "sd3", **options)
    fastdit.patch(pipe, Cached(Schedule.from_bits(bits, names)), backend="reference")
    same_bits(generate(pipe, "sd3", **options), expected)


# ---- what is cached, and when


# Their last component is a feed-forward whose gate can be computed beside the model.
@pytest.mark.parametrize("family", ["sd3", "pixart-sigma", "dit", "lumina"])
@pytest.mark.parametrize("backend", ["reference", None])
def test_a_cached_output_is_gated_by_the_new_step(family, backend):
    """Two steps, one block, only the feed-forward reused: the stream ends as ``h + gate(t2) *
    cached``, gate of step two.
    """
    model = tiny_models.transformer(family, torch.float64)
    kind, part = ("layers", "feed_forward") if family == "lumina" else ("transformer_blocks", "ff")
    del getattr(model, kind)[1:]
    block = getattr(model, kind)[0]
    ff = getattr(block, part)
    bits, names = random_bits(model, 2, 0, compute=1.1)
    bits[kind][1, :, names[kind].index(part)] = False
    first, second = (tiny_models.call(family, 2, torch.float64, step=step) for step in range(2))

    record = {}
    hooks = [
        ff.register_forward_hook(lambda m, a, out: record.setdefault("cached", out)),
        block.register_forward_hook(
            lambda m, a, kw, out: record.update(
                out=out[1] if isinstance(out, tuple) else out,
                emb=kw.get("temb", kw.get("timestep", a[-1] if a else None)),
                labels=kw.get("class_labels"),
            ),
            with_kwargs=True,
        ),
    ]
    with torch.no_grad():
        model(**first)
        cached = record["cached"]
        if family == "lumina":  # which norms the output too, in the same way at every step
            cached = block.ffn_norm2(cached)
        # The stream before the feed-forward, at the second step: the block with a feed-forward that
        # gives zero.
        zero = ff.register_forward_hook(lambda m, a, out: torch.zeros_like(out))
        model(**second)
        zero.remove()
        before, gate = record["out"], feed_forward_gate(block, record)
        for hook in hooks:
            hook.remove()
        outputs = []
        block.register_forward_hook(
            lambda m, a, out: outputs.append(out[1] if isinstance(out, tuple) else out)
        )
        handle = fastdit.patch(model, Cached(Schedule.from_bits(bits, names)), backend=backend)
        with handle.run(range(2)):
            model(**first)
            model(**second)
    assert distance(outputs[1], before + gate * cached) <= FORWARD_FP64


def feed_forward_gate(block, record):
    """gate_mlp [B, 1, D] of a block at the embedding its hook saw, by the block's own layers."""
    if hasattr(block, "scale_shift_table") and block.scale_shift_table is not None:
        table = block.scale_shift_table + record["emb"].reshape(len(record["emb"]), 6, -1)
        return table[:, 5:6]
    if record["labels"] is not None:
        emb = block.norm1.emb(record["emb"], record["labels"], hidden_dtype=torch.float64)
    else:
        emb = record["emb"]
    modulation = block.norm1.linear(block.norm1.silu(emb))
    if hasattr(block, "ffn_norm2"):
        return modulation.chunk(4, dim=1)[3].unsqueeze(1).tanh()
    return modulation.chunk(6, dim=1)[5].unsqueeze(1)


def test_a_false_bit_at_step_0_computes():
    family = "pixart-alpha"
    bits, names = random_bits(tiny_models.FAMILIES[family].build(), 1, 0, compute=-1)
    actual, expected = both_ways(family, bits, names, 1, torch.float32, "reference", steps=1)
    stock = tiny_models.transformer(family)
    with torch.no_grad():
        same_bits(actual[0], sample(stock(**tiny_models.call(family, 1))))
    same_bits(expected[0], actual[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_writes_into_a_slot(family):
    """Cached outputs keep their bits through a whole run of the fast path, which adds residuals in place."""
    model = tiny_models.transformer(family)
    handle = fastdit.patch(model, Cached(Schedule.every(4)))
    with torch.no_grad(), handle.run(range(4)):
        model(**tiny_models.call(family, 2, step=0))
        kept = [
            t
            for slot in next(iter(handle.last_run().branches.values())).slots.values()
            for t in tensors(slot)
        ]
        before = [tensor.clone() for tensor in kept]
        for step in range(1, 4):
            model(**tiny_models.call(family, 2, step=step))
    assert kept
    for tensor, copy in zip(kept, before, strict=True):
        same_bits(tensor, copy)


def tensors(output):
    if isinstance(output, HeldSums):
        return [t for t in (*output.sums, output.shared) if t is not None]
    return [t for t in (output if isinstance(output, tuple) else (output,)) if t is not None]


def test_modules_that_are_reused_do_not_run():
    model = tiny_models.transformer("flux")
    calls = []
    for kind in ("transformer_blocks", "single_transformer_blocks"):
        for block in getattr(model, kind):
            for name in ("attn", "ff", "ff_context", "proj_mlp", "act_mlp", "proj_out"):
                if (module := getattr(block, name, None)) is not None:
                    module.register_forward_hook(lambda m, a, out: calls.append(m))
    handle = fastdit.patch(model, Cached(Schedule.every(3)))
    with torch.no_grad(), handle.run(range(3)):
        model(**tiny_models.call("flux", 1, step=0))
        assert len(calls) == 2 * 3 + 2 * 4
        for step in (1, 2):
            model(**tiny_models.call("flux", 1, step=step))
    assert len(calls) == 2 * 3 + 2 * 4  # as after step 0


def test_a_schedule_with_fewer_components_computes_the_others():
    """A file may name only some components of a family; the others always compute."""
    model = tiny_models.transformer("pixart-sigma")
    bits = np.zeros((3, 3, 1), dtype=bool)
    full, _ = random_bits(model, 3, 0, compute=1.1)
    full["transformer_blocks"][:, :, 1] = False
    inputs = [tiny_models.call("pixart-sigma", 1, step=step) for step in range(3)]
    with torch.no_grad(), Oracle(model, full).installed():
        expected = [sample(model(**given)) for given in inputs]
    handle = fastdit.patch(model, Cached(Schedule.from_bits(bits, ["attn2"])), backend="reference")
    with torch.no_grad(), handle.run(range(3)):
        for given, wanted in zip(inputs, expected, strict=True):
            same_bits(sample(model(**given)), wanted)
