"""The cost model against the published totals of ECAD (spec sections 6.6 and 7), and statistics against hand counts."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel
from typer.testing import CliRunner

import fastdit
import tiny_models
from fastdit import ECAD, ArgumentError, Schedule
from fastdit.account.cost import Cost
from fastdit.cli import commands
from fastdit.cli.statistics import statistics
from fastdit.schedules.plan import RunPlan, lower
from fastdit.spec import BlockKind, ModelSpec
from oracle import random_bits
from snapshot import snapshot

COMPONENTS = ("attn1", "attn2", "ff")
#: of the tiny models, for a row of 64 image and 7 text tokens, written down by reading their layers: MACs of all
#: components, the same where 16 tokens are active, elements of all slots, MACs outside of components, those of the
#: prompt's projection, elements of keys and values of image tokens, of the projected prompt, channels of modulations
HAND_COUNTS = {
    "sd3": (3522752, 1098944, 13184, 113408, 4480, 13632, 224, 1088),
    "sd3.5": (4571328, 1361088, 17280, 119552, 4480, 21824, 224, 1280),
    "flux": (4780288, 1548544, 36352, 113408, 4480, 18176, 224, 1024),
    "flux-dev": (4780288, 1548544, 36352, 122624, 4480, 18176, 224, 1024),
    "pixart-alpha": (2226816, 574848, 13824, 97632, 7392, 9216, 168, 480),
    "pixart-sigma": (2226816, 574848, 13824, 91296, 7392, 9216, 168, 480),
    "dit": (1916928, 479232, 9216, 112128, 0, 9216, 0, 480),
    "lumina": (3441792, 870528, 24576, 121472, 0, 6144, 0, 608),
    "lumina2": (6729920, 1995968, 21824, 325632, 225792, 10912, 672, 992),
    "wan": (2684928, 703488, 18432, 84864, 11648, 12288, 224, 640),
    "hunyuanvideo15": (2712768, 878784, 13632, 261184, 0, 13632, 0, 1216),
}
if tiny_models.HAS_ZIMAGE:  # which pads the text to 32 tokens
    HAND_COUNTS["zimage"] = 7392256, 3172864, 26624, 1334272, 935936, 26624, 3072, 992


@pytest.fixture(scope="module")
def models():
    """The published models without weights."""
    with torch.device("meta"):
        return {
            "alpha-256": PixArtTransformer2DModel(sample_size=32, caption_channels=4096),
            "alpha-1024": PixArtTransformer2DModel(sample_size=128, caption_channels=4096),
            "flux": FluxTransformer2DModel(guidance_embeds=True),
        }


@pytest.mark.parametrize("family", HAND_COUNTS)
def test_what_is_counted_equals_counts_by_hand(family):
    cost = Cost.of(tiny_models.transformer(family), 64, 0 if family == "dit" else 7)
    assert (
        sum(c.macs for c in cost.components),
        sum(cost.sparse_macs(16)),
        sum(c.bytes for c in cost.components) // 4,
        cost.overhead,
        cost.prompt,
        cost.key_bytes() // 4,
        cost.prompt_bytes() // 4,
        cost.modulation_bytes(1) // 4,
    ) == HAND_COUNTS[family]


def test_counting_needs_no_weights_and_touches_none():
    """Weights on the meta device, quantized to bytes or shared with others: the structure says it all."""
    model = tiny_models.transformer("sd3.5")
    before, state = Cost.of(model, 64, 7), snapshot(model)
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.uint8), False)
    assert Cost.of(model, 64, 7).components == before.components
    meta = tiny_models.transformer("sd3.5").to("meta")
    assert Cost.of(meta, 64, 7).components == before.components
    assert snapshot(meta) != state
    model = tiny_models.transformer("sd3.5")
    state = snapshot(model)
    Cost.of(model, 64, 7)
    assert snapshot(model) == state


def test_counting_is_done_once_for_models_of_one_structure(monkeypatch):
    Cost.of(tiny_models.transformer("lumina"), 16, 5)
    monkeypatch.setattr("fastdit.account.counts.Skeleton", None)
    Cost.of(tiny_models.transformer("lumina", torch.float64, seed=3), 36, 8)


def fora(cost, n):
    return cost.linear_macs(Schedule.every(n).bind(cost.spec, 20), 20) / 1e12


def test_pixart_is_counted_as_the_authors_do_to_the_last_digit(models):
    cost = Cost.of(models["alpha-256"], image=256, text=120, transformer_batch=2)
    attn1, attn2, ff = cost.linear[:3]
    assert (attn1, attn2, ff) == (2717908992, 1995964416, 5435817984)
    assert cost.overhead == 1498447872
    assert cost.linear_macs(None, 1) == 285689806848
    assert cost.linear_macs(None, 20) == 5713796136960
    totals = [f"{fora(cost, n):.3f}" for n in (2, 3, 4, 5)]
    assert totals == ["2.872", "2.019", "1.451", "1.167"]
    large = Cost.of(models["alpha-1024"], image=4096, text=120, transformer_batch=2)
    assert f"{large.linear_macs(None, 20) / 1e12:.2f}" == "85.63"


def test_flux_is_counted_as_the_authors_do_to_the_last_digit(models):
    cost = Cost.of(models["flux"], image=256, text=512, transformer_batch=2)
    assert cost.overhead == 19643498496
    assert cost.linear_macs(None, 1) == 9934575501312
    assert cost.linear_macs(None, 20) == 198691510026240
    totals = [f"{fora(cost, n):.2f}" for n in (2, 3, 4, 5)]
    assert totals == ["99.54", "69.80", "49.97", "40.05"]
    large = Cost.of(models["flux"], image=4096, text=512, transformer_batch=2)
    assert large.overhead == 22663397376
    assert f"{large.linear_macs(None, 20) / 1e12:.1f}" == "1190.2"
    assert f"{large.linear_macs(None, 8) / 1e12:.1f}" == "476.1"
    assert f"{fora(large, 3):.1f}" == "416.9"


def test_closed_forms_of_every_component(models):
    """Section 6.6's formulas, component by component, with and without the products of attention."""
    n, text, batch, d = 1024, 300, 2, 1152
    cost = Cost.of(models["alpha-256"], n, text, batch)
    linear = [4 * d * d * n, 2 * d * d * (n + text), 8 * d * d * n]
    assert cost.linear[:3] == [batch * macs for macs in linear]
    products = [2 * n * n * d, 2 * n * text * d, 0]
    for found, macs, extra in zip(cost.components, linear, products, strict=False):
        assert found.macs == batch * (macs + extra)
    d, joint = 3072, n + text
    cost = Cost.of(models["flux"], n, text, batch)
    assert cost.linear[:3] == [
        batch * 4 * d * d * joint,
        batch * 8 * d * d * n,
        batch * 8 * d * d * text,
    ]
    assert cost.linear[-3:] == [batch * k * d * d * joint for k in (3, 4, 5)]
    assert cost.components[-3].macs - cost.linear[-3] == batch * 2 * joint * joint * d


def test_a_recomputed_attention_that_nobody_reads_counts_for_the_authors_only():
    model = tiny_models.transformer("flux")
    cost = Cost.of(model, 16, 5)
    bits, names = random_bits(model, 3, 0, compute=1.1)
    full = Schedule.from_bits(bits, names).bind(cost.spec, 3)
    bits["single_transformer_blocks"][1, :, 2] = False  # proj_out is reused; its inputs compute
    bits["single_transformer_blocks"][2, :, :] = True
    wasteful = Schedule.from_bits(bits, names).bind(cost.spec, 3)
    outputs = sum(cost.linear[-6:][2::3])
    assert cost.linear_macs(full, 3) - cost.linear_macs(wasteful, 3) == outputs
    spared = cost.macs(RunPlan(3, None, ())) - cost.macs(
        RunPlan(3, wasteful, lower(wasteful, cost.spec))
    )
    assert spared == sum(c.macs for c in cost.components[-6:])


# ---- statistics


def test_statistics_of_a_schedule_counted_by_hand():
    bits = np.array(
        [
            [[0, 1], [1, 1]],  # step 0 computes whatever it says
            [[0, 0], [0, 1]],
            [[0, 0], [0, 0]],
            [[1, 0], [0, 0]],
        ],
        dtype=bool,
    )
    found = statistics(Schedule.from_bits(bits, ["a", "b"]))
    assert (found.steps, found.components, found.reused) == (4, 4, 10)
    assert found.reuse_share == 10 / 16
    assert found.idle_steps == (2,)
    assert found.computed == {"a": 3, "b": 3}
    assert found.blocks_per_step == {"a": (2, 0, 0, 1), "b": (2, 1, 0, 0)}
    # ages of the reused: block 0 a: 1 2; b: 1 2 3; block 1 a: 1 2 3; b: 1 2
    assert found.longest_reuse == 3
    assert found.mean_age == 18 / 10
    assert found.never_renewed == (
        ("transformer_blocks", 0, "b"),
        ("transformer_blocks", 1, "a"),
    )
    assert found.whole_blocks == {"transformer_blocks": 6 / 8}
    assert found.runs == 3  # steps 1, 2 and 3 have one run each: a b a, all, b a b
    assert found.traffic == (50, 30, 16)
    assert found.dead == {}


def test_dead_work_and_stale_outputs():
    """`in` computes at 1 unread before it is replaced at 2; `out` at 4 reads what it read at 2."""
    kind = BlockKind("transformer_blocks", 1, ("in", "out"), consumers={"in": "out"})
    bits = np.array([[[1, 1]], [[1, 0]], [[1, 1]], [[0, 0]], [[0, 1]]], dtype=bool)
    found = statistics(Schedule.from_bits(bits, ["in", "out"]), ModelSpec("toy", (kind,)))
    assert found.dead == {"in": 1}
    assert found.stale_outputs == 1


def test_nothing_reused():
    found = statistics(Schedule.from_bits(np.ones((1, 2, 2)) > 0, ["a", "b"]))
    assert (found.reused, found.runs, found.mean_age, found.longest_reuse) == (0, 0, 0.0, 0)
    assert found.never_renewed == ()


def test_stats_and_convert_commands(tmp_path):
    bits = np.random.default_rng(0).random((20, 28, 3)) < 0.4
    schedule = Schedule.from_bits(bits, ["attn1", "attn2", "ff"])
    schedule.save(tmp_path / "a.json")
    runner = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"})
    done = runner.invoke(commands.app, ["schedule", "stats", str(tmp_path / "a.json")])
    assert done.exit_code == 0, done.output
    found = statistics(schedule)
    assert f"{found.reused} ({found.reuse_share:.1%}), in {found.runs} runs" in done.output
    assert "of 5713796136960" in done.output
    out = tmp_path / "b.json"
    done = runner.invoke(commands.app, ["schedule", "convert", str(tmp_path / "a.json"), str(out)])
    assert done.exit_code == 0, done.output
    assert "cache_schedule" in json.loads(out.read_text())
    assert Schedule.load(out) == schedule
    done = runner.invoke(
        commands.app, ["schedule", "convert", str(out), str(tmp_path / "no" / "c")]
    )
    assert done.exit_code == 2


# ---- measured latency


def test_measure_runs_both_ways_in_turns():
    model = tiny_models.transformer("pixart-alpha")
    handle = fastdit.patch(model, ECAD(Schedule.from_bits(np.zeros((2, 3, 3)) > 0, COMPONENTS)))
    reused = []

    def work():
        with torch.no_grad(), handle.run(range(2)):
            for step in range(2):
                model(**tiny_models.call("pixart-alpha", 1, step=step))
            runs = handle.live_runs()
            reused.append(bool(runs) and runs[0].records[1].reused)

    found = handle.measure(work, repeats=3)
    assert reused == [False, 9] * 4  # a warm-up and three turns, stock first
    assert found.seconds > 0
    assert found.stock_seconds > 0
    assert found.range[0] <= found.speedup <= found.range[1]
    assert f"{found.speedup:.2f}x" in str(found)
    with pytest.raises(fastdit.ArgumentError, match=r"run must be a function.*got int"):
        handle.measure(3)
    for repeats in (0, True, 1.5):
        with pytest.raises(ArgumentError, match="repeats must be"):
            handle.measure(work, repeats)
