"""`explain` and `report` tell the truth: against torch's own FLOP counter, measured caches, and counts by hand."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fastdit
import tiny_models
from fastdit import Cached, Dense, Schedule
from oracle import Oracle, random_bits
from tiny_models import generate

STEPS = 5
FAMILIES = list(tiny_models.FAMILIES)


def flops(run):
    """FLOPs of matrix products, attention products included, as torch counts them."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def sizes(family, batch, height, width):
    """`explain` takes pixels, and a bare transformer's autoencoder is taken to shrink by 8."""
    if tiny_models.FAMILIES[family].square:
        height = width = 8
    return {
        "height": 8 * height,
        "width": 8 * width,
        "batch": batch,
        "cfg": False,
        "text_tokens": 0 if family == "dit" else tiny_models.TEXT,
    }


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 8, 16), (3, 12, 8)])
@pytest.mark.parametrize("family", FAMILIES)
def test_predicted_macs_of_a_forward_are_exact(family, batch, height, width):
    model = tiny_models.transformer(family)
    given = tiny_models.of_one_text(tiny_models.call(family, batch, height=height, width=width))
    counted = flops(lambda: model(**given))
    handle = fastdit.patch(model)
    predicted = handle.explain(steps=1, **sizes(family, batch, height, width))
    assert 2 * predicted.macs == counted
    assert 2 * predicted.dense_macs == counted
    assert flops(lambda: model(**given)) == counted


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", FAMILIES)
def test_predicted_macs_and_caches_of_a_run_are_exact(family, seed):
    model = tiny_models.transformer(family)
    bits, names = random_bits(model, STEPS, seed, compute=(0.2, 0.5, 0.8)[seed])
    handle = fastdit.patch(model, Cached(Schedule.from_bits(bits, names)))
    predicted = handle.explain(**sizes(family, 2, 8, 16))
    held = []

    def run():
        with handle.run(range(STEPS)):
            for step in range(STEPS):
                model(**tiny_models.of_one_text(tiny_models.call(family, 2, step=step)))
                held.append(handle.cache_bytes())

    counted = flops(run)
    assert 2 * predicted.macs == counted
    assert predicted.steps == STEPS
    assert predicted.cache_bytes == max(held) == handle.report().peak_cache_bytes > 0
    assert predicted.flop_speedup == predicted.dense_macs / predicted.macs > 1


def test_predicted_macs_count_fused_projections_and_adapters_once():
    for family in ("sd3", "pixart-sigma"):
        model = tiny_models.transformer(family)
        fastdit.patch(model)
        options = {"steps": 1, **sizes(family, 1, 8, 16)}
        before = fastdit.explain(model, **options).macs
        model.fuse_qkv_projections()
        assert fastdit.explain(model, **options).macs == before
        assert flops(lambda: model(**tiny_models.call(family))) == 2 * before  # noqa: B023


@pytest.mark.parametrize("name", tiny_models.one_each(FAMILIES, -1))
@pytest.mark.parametrize("cfg", [True, False])
def test_predicted_size_of_a_pipelines_run(name, cfg):
    """Rows, tokens and steps as the transformer really gets them."""
    pipe = tiny_models.pipeline(name)
    if cfg and tiny_models.FAMILIES[name].reads_masks:
        pytest.skip("its two prompts have unlike lengths, of which a prediction is told one")
    handle = fastdit.patch(pipe, Cached(Schedule.every(2)))
    text = 0 if name == "dit" else tiny_models.TEXT
    size = {} if name == "dit" else tiny_models.asked(name)
    predicted = handle.explain(batch=2, steps=4, cfg=cfg, text_tokens=text, **size)
    generate(pipe, name, batch=2, steps=4, cfg=cfg, prompt_per_image=True)
    report = handle.report()
    assert predicted.image_tokens == report.tokens_per_step[0]
    assert predicted.cache_bytes == report.peak_cache_bytes
    assert predicted.transformer_batch == (4 if cfg else 2)


@pytest.mark.parametrize("size", [8, 512, 16384])
def test_explain_counts_in_the_unit_of_the_model(size):
    model = tiny_models.transformer("pixart-sigma")
    found = fastdit.patch(model).explain(height=size, width=size, steps=100)
    (line,) = (line for line in str(found).splitlines() if "compute " in line)
    count, _, dense, unit = line.split()[1:5]
    scale = {"TMAC:": 1e12, "GMAC:": 1e9, "MMAC:": 1e6}[unit]
    assert float(count) * scale == pytest.approx(found.macs, rel=1e-3)
    assert float(dense) * scale == pytest.approx(found.dense_macs, rel=1e-3)


def test_explain_says_what_is_patched():
    pipe = tiny_models.pipeline("flux-dev")
    handle = fastdit.patch(pipe, Cached(Schedule.every(2)), backend="reference")
    explanation = handle.explain(steps=4)
    assert explanation.family == "flux"
    assert explanation.model == "FluxTransformer2DModel"
    assert explanation.methods == ("Cached",)
    assert set(explanation.backends.values()) == {"reference"}
    assert explanation.blocks["single_transformer_blocks"][0] == 2
    lines = explanation.raster.splitlines()
    assert [line.split()[-1] for line in lines] == ["█·█·"] * 6
    for part in ("FluxTransformer2DModel", "gated_residual on reference", "full_attn", "█·█·"):
        assert part in str(explanation)
    assert fastdit.explain(pipe, steps=4) == explanation


def test_explain_changes_nothing():
    pipe = tiny_models.pipeline("sd3")
    handle = fastdit.patch(pipe, Cached(Schedule.every(2)))
    expected = generate(pipe, "sd3")

    def ask(pipe, step, timestep, tensors):
        handle.explain()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # at the first step nothing was reused yet
            handle.report()
        return tensors

    assert torch.equal(generate(pipe, "sd3", callback_on_step_end=ask), expected)


# ---- reports


@pytest.mark.parametrize(
    "family", [name for name in FAMILIES if not tiny_models.adapter_of(name).consumers]
)
def test_reports_count_what_the_oracle_counts(family):
    """Where outputs have a single reader, the oracle does dead work that fastdit leaves out."""
    model = tiny_models.transformer(family)
    bits, names = random_bits(model, STEPS, 1)
    oracle = Oracle(model, bits)
    inputs = [tiny_models.call(family, 2, step=step) for step in range(STEPS)]
    with torch.no_grad(), oracle.installed():
        for given in inputs:
            model(**given)
    handle = fastdit.patch(model, Cached(Schedule.from_bits(bits, names)))
    with torch.no_grad(), handle.run(range(STEPS)):
        for given in inputs:
            model(**given)
    report = handle.report()
    assert (report.computed, report.reused) == (oracle.computed, oracle.reused)
    tokens = 16 if family == "dit" else 32
    assert report.tokens_per_step == (tokens,) * STEPS
    assert report.steps == STEPS
    assert report.live
    assert report.seconds > 0
    assert report.reuse_share == oracle.reused / (oracle.computed + oracle.reused)


def test_a_report_counts_both_calls_of_sequential_guidance():
    pipe = tiny_models.pipeline("flux")
    fastdit.patch(pipe, Cached(Schedule.every(2)))
    generate(pipe, "flux", steps=4)
    report = fastdit.report(pipe)
    assert report.steps == 4
    assert report.computed == report.reused == 2 * 2 * (2 * 3 + 2 * 3)
    assert "2 x 3" not in str(report)
    assert "4 x 32" in str(report)


def test_a_report_before_any_run_and_of_a_dense_run():
    pipe = tiny_models.pipeline("sd3")
    handle = fastdit.patch(pipe, Dense())
    assert handle.report().steps == 0
    assert "no run" in str(handle.report())
    generate(pipe, "sd3")
    report = handle.report()
    assert (report.computed, report.reused) == (4 * 8, 0)
    assert report.live  # a method that promises nothing is not inert
    text, width = 2 * tiny_models.TEXT, pipe.transformer.inner_dim  # both rows of guidance
    assert report.peak_cache_bytes == 4 * text * width  # the projected prompt alone
    handle = fastdit.patch(pipe, backend="reference")
    generate(pipe, "sd3")
    assert handle.report().peak_cache_bytes == 0


def test_a_run_that_reused_nothing_warns():
    pipe = tiny_models.pipeline("sd3")
    handle = fastdit.patch(pipe, Cached(Schedule.every(9)))
    generate(pipe, "sd3", steps=1)
    with pytest.warns(UserWarning, match="reused nothing"):
        report = handle.report()
    assert not report.live
    assert "INERT" in str(report)
    generate(pipe, "sd3", steps=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert handle.report().live


def test_tokens_that_are_all_active_are_told_with_what_rounds_them():
    pipe = tiny_models.pipeline("sd3")
    handle = fastdit.patch(pipe, fastdit.RAS(0.5, start=1))  # 32 tokens, rounded to 64
    generate(pipe, "sd3", steps=4)
    with pytest.warns(UserWarning, match=r"reused nothing .* 32 image tokens .*align"):
        assert not handle.report().live
