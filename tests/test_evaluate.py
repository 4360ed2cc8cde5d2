"""Metrics against closed forms and loops, judges of sets against what is known of Gaussians, studies by fakes."""

from __future__ import annotations

import functools
import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d

import fastdit
from fastdit import tiny
from fastdit.cli import evaluation
from fastdit.cli.distance import psnr
from fastdit.errors import ArgumentError
from fastdit.evaluate import contenders, judges, metrics, page, peers, plot, study
from fastdit.evaluate.arms import Arm, check_solver, prepared
from fastdit.evaluate.studio import UNPATCHED, Drawn, Spent, Studio
from fastdit.search import solution


def noise(seed: int, side: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).uniform(size=(side, side, 3)).astype(np.float32)


# ---- metrics


def test_unrelated_noise_has_its_closed_form():
    """(a - b)^2 of two uniform pixels is 1/6 in the mean: 7.78 dB. Equal pictures have no error at all."""
    a, b = noise(0, 256), noise(1, 256)
    assert metrics.METRICS["psnr"](a, b) == pytest.approx(10 * np.log10(6), abs=0.03)
    assert metrics.METRICS["psnr"](a, a) == np.inf
    assert metrics.ssim(a, a) == metrics.ms_ssim(a, a) == pytest.approx(1.0, abs=1e-12)
    assert abs(metrics.ssim(a, b)) < 0.02


def test_differences_of_bytes_wrap():
    """Subtracted and squared as bytes, as some tools do, unrelated noise passes for a likeness of 28 dB."""
    a, b = (np.round(255 * noise(seed, 256)).astype(np.uint8) for seed in (0, 1))
    wrapped = 10 * np.log10(255**2 / np.mean((a - b) ** 2))
    assert wrapped > 27
    assert psnr(a / 255, b / 255) == pytest.approx(7.75, abs=0.05)
    with pytest.raises(ArgumentError, match="got uint8"):
        metrics.ssim(a, b)


def looped(image, reference, sides):
    """MS-SSIM by scipy, scale by scale; with one scale it is SSIM."""
    window = np.exp(-((np.arange(11) - 5.0) ** 2) / 2 / 1.5**2)
    window /= window.sum()

    def blurred(x):
        for axis in (0, 1):
            x = correlate1d(x, window, axis)
        return x[5:-5, 5:-5]

    found, exponents = 1.0, np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333])[:sides]
    for scale, power in enumerate(exponents / exponents.sum()):
        m, n = blurred(image), blurred(reference)
        v, w = blurred(image**2) - m * m, blurred(reference**2) - n * n
        part = (2 * (blurred(image * reference) - m * n) + 9e-4) / (v + w + 9e-4)
        if scale == sides - 1:
            part = part * (2 * m * n + 1e-4) / (m * m + n * n + 1e-4)
        found *= part.mean() ** power
        image, reference = (
            x.reshape(len(x) // 2, 2, len(x) // 2, 2, 3).mean((1, 3)) for x in (image, reference)
        )
    return found


def textured(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture and a noisy one of it."""
    a = np.random.default_rng(seed).uniform(size=(192, 192, 3))
    a = sum(np.roll(a, (i, j), (0, 1)) for i in range(4) for j in range(4)) / 16
    return a, np.clip(a + 0.1 * noise(4, 192), 0, 1)


def test_similarities_are_what_scipy_finds():
    a, b = textured(3)
    assert metrics.scales((192, 192)) == 5
    assert metrics.scales((64, 80)) == 3
    assert metrics.ssim(a, b) == pytest.approx(looped(a, b, 1), abs=1e-12)
    assert metrics.ms_ssim(a, b) == pytest.approx(looped(a, b, 5), abs=1e-12)
    small = a[:64, :64], b[:64, :64]
    assert metrics.ms_ssim(*small) == pytest.approx(looped(*small, 3), abs=1e-12)
    with pytest.raises(ArgumentError, match="at least 11 pixels"):
        metrics.ms_ssim(a[:8], b[:8])


def test_similarities_are_torchmetrics():
    a, b = textured(5)
    image = pytest.importorskip("torchmetrics.functional.image")
    pair = [torch.from_numpy(each).permute(2, 0, 1)[None] for each in (b, a)]
    full = image.structural_similarity_index_measure(*pair, data_range=1.0, return_full_image=True)[
        1
    ]
    # It also counts a border of 5 pixels, which the window reaches by reflection; so it does for the last scale.
    assert metrics.ssim(b, a) == pytest.approx(float(full[..., 5:-5, 5:-5].mean()), abs=1e-9)
    several = image.multiscale_structural_similarity_index_measure(*pair, data_range=1.0)
    assert metrics.ms_ssim(b, a) == pytest.approx(float(several), abs=2e-3)


def test_distances_of_sets():
    """Gaussians that lie 3 apart in one of 4 directions: FID is the square; the discrepancies vanish by themselves."""
    rng = np.random.default_rng(0)
    rows, others = rng.normal(size=(2, 1500, 4))
    moved = others + np.array([3, 0, 0, 0])
    assert judges.fid(rows, moved) == pytest.approx(9, abs=0.6)
    assert judges.fid(rows, rows) == pytest.approx(0, abs=1e-6)
    assert abs(judges.kid(rows, others)) < 0.1 < judges.kid(rows, moved)
    kernel = [(x @ y / 4 + 1) ** 3 for x in rows[:3] for y in rows[:3] if x is not y]
    assert judges.kid(rows[:3], rows[:3]) == pytest.approx(
        2 * np.mean([k for i, k in enumerate(kernel) if i % 4])
        - 2 * np.mean([(x @ y / 4 + 1) ** 3 for x in rows[:3] for y in rows[:3]])
    )
    apart = np.eye(2)
    assert judges.cmmd(apart[:1], apart[1:]) == pytest.approx(2000 * (1 - np.exp(-2 / 200)))


def test_judges_read_the_disk_alone(tmp_path):
    with pytest.raises(ArgumentError, match=r"has no alexnet.pth, alex.pth; nothing is downloaded"):
        judges.make_judge("lpips", tmp_path)
    with pytest.raises(ArgumentError, match="--judge must be NAME=FOLDER"):
        evaluation.check_judges(["lpips=/nowhere"])
    generator = torch.Generator().manual_seed(0)
    sizes = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
    net = {}
    for at, (out, into, side) in sizes.items():
        net[f"features.{at}.weight"] = 0.1 * torch.randn(out, into, side, side, generator=generator)
        net[f"features.{at}.bias"] = torch.zeros(out)
    heads = {
        f"lin{i}.model.1.weight": torch.rand(1, out, 1, 1, generator=generator)
        for i, (out, _, _) in enumerate(sizes.values())
    }
    torch.save(net, tmp_path / "alexnet.pth")
    torch.save(heads, tmp_path / "alex.pth")
    a, b = noise(0)[None], noise(1)[None]
    judge = judges.make_judge("lpips", tmp_path)
    assert judge(a, [""], a)["value"] == 0
    assert judge(a, [""], b)["value"] > 0.1
    assert judge(a, [""], b)["value"] == pytest.approx(judge(b, [""], a)["value"], rel=1e-5)
    assert set(judges.hashes(tmp_path)) == {"alexnet.pth", "alex.pth"}


# ---- verdicts, of made-up times and errors


def made_up(asked=4.0):
    """Composed plans are twice as near as plain steps in the same time, and as near as one peer."""
    rng = np.random.default_rng(0)
    own = rng.uniform(0.1, 0.2, size=12)
    rows = {
        "unpatched": (UNPATCHED, 8.0, own),
        "stock 2": (contenders.FEWER, 2.0, 4 * own * rng.uniform(0.9, 1.1, 12)),
        "unipc 2": (contenders.FEWER, 2.0, 3 * own * rng.uniform(0.9, 1.1, 12)),
        "fast": (contenders.COMPOSED, 2.0, 1.5 * own * rng.uniform(0.9, 1.1, 12)),
        "slow peer": ("slow", 5.0, own),
        "peer": ("peer", 2.05, 1.5 * own * rng.uniform(0.8, 1.25, 12)),
        "best": ("best", 1.0, 0.5 * own),
    }
    field = contenders.Field(judged={"fast": asked})
    for name, (group, _, _) in rows.items():
        field.add(group, name, Arm("stock", 8))
    spent = {n: Spent((s,), (s + 1,), int(s * 10), 0, None) for n, (_, s, _) in rows.items()}
    # A noisy time of one solver does not count: the others make as many steps.
    spent["unipc 2"] = Spent((1.9, 2.0, 3.0), (3.0,), 20, 0, None)
    picture = Drawn(np.full((12, 32, 32, 3), 0.5, np.float32), np.ones((12, 4), np.float32))
    studio = SimpleNamespace(prompts=[f"prompt {i} </script> @ROWS@" for i in range(12)])
    errors = {n: errors for n, (_, _, errors) in rows.items()}
    return study.Study(
        field, studio, dict.fromkeys(rows, picture), picture, spent, errors, "unipc", 0.01
    )


def test_a_verdict_takes_the_best_of_a_group_that_is_as_fast():
    found = study.verdict(made_up(), "fast", 4.0)
    assert found["met"]
    assert found["speedup"] == 4
    against = found["against"]
    assert against[contenders.FEWER]["arm"] == "unipc 2"
    assert against[contenders.FEWER]["verdict"] == "nearer"
    assert against["slow"] == {"verdict": "too slow", "fastest": 1.6}
    assert against["peer"]["verdict"] == "alike"
    assert against["best"]["verdict"] == "farther"
    told = study.sentences(made_up(), study.verdicts(made_up(6.0)))
    assert told[0] == "fast: 6x was asked for, 4.00x was reached."
    assert [
        group for group in ("peer", "best", "slow") if any(f"({group})" in t for t in told)
    ] == [
        "peer",
        "best",
    ]


def test_a_front_covers_a_rectangle():
    """One point at a quarter of the time: its volume is 0.75 times the logarithm of the corner's error over its."""
    some = made_up()
    found = study.volumes(some)
    high = np.log10(some.error("stock 2") / some.error("fast"))
    assert found[contenders.COMPOSED]["value"] == pytest.approx(0.75 * high)
    gain = found["best"]["composed_over_it"]
    assert gain["low"] <= gain["value"] <= gain["high"] < 0
    assert found[contenders.FEWER]["front"] == ["unipc 2"]
    assert study.realised(2.0, 0.4) == pytest.approx(0.5 / 0.6)


class Page(HTMLParser):
    """What a page refers to, and its data."""

    def __init__(self, text):
        super().__init__()
        self.addresses, self.ids, self.scripts, self._script = [], set(), [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.addresses += [v for k, v in given.items() if k in ("src", "href", "action")]
        self.ids.add(given.get("id"))
        self._script = tag == "script"

    def handle_data(self, data):
        if self._script:
            self.scripts.append(data)

    def handle_endtag(self, tag):
        self._script = False


def test_the_page_needs_nothing_else_and_holds_every_picture(tmp_path):
    some = made_up()
    rows = study.rows(some)
    told = study.verdicts(some)
    result = {
        "pictures": 12,
        "prompts": some.studio.prompts,
        "solution": {"steps": 100, "solver": "unipc", "error": 0.01},
        "provenance": dict.fromkeys(
            ("pipeline", "model", "scheduler", "machine", "threads", "made"), "<b>"
        ),
        "rows": rows,
        "verdicts": told,
        "where_not": study.sentences(some, told),
        "refused": {"<i>": "why & how"},
    }
    json.dumps(result, allow_nan=False)
    page.write(result, {n: d.pictures for n, d in some.drawn.items()}, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    found = Page(text)
    assert not found.addresses
    assert not re.search(r"https?://|url\(|@import|<b>|<i>", text)
    data, code = found.scripts
    data = json.loads(data)
    assert data["prompts"] == some.studio.prompts
    assert [arm["name"] for arm in data["arms"]] == list(some.drawn)
    assert all(len(arm["pictures"]) == 12 for arm in data["arms"])
    assert data["arms"][0]["pictures"][0].startswith("data:image/webp;base64,")
    assert set(re.findall(r'by\("(\w+)"\)', code)) <= found.ids
    plot.plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    evaluation.show(evaluation.Console(quiet=True), {**result, "hypervolume": {}})


# ---- a small model


@pytest.fixture(scope="module")
def pipe():
    found = tiny.load_pipeline()
    found.set_progress_bar_config(disable=True)
    return found


def small(pipe, folder, **more):
    arguments = {"height": 32, "width": 32}
    return Studio(pipe, tiny.prompts(2, "test", 1, seed=7), folder, arguments=arguments, **more)


def test_a_studio_draws_what_the_pipeline_does_and_goes_on(pipe, tmp_path):
    studio = small(pipe, tmp_path, batch=1, seed=5, identity={"of": "one"})
    own = pipe.scheduler
    drawn = studio.drawn("a", Arm("stock", 2))
    for index, text in enumerate(studio.prompts):
        for kind, found in (("latent", drawn.latents), ("np", drawn.pictures)):
            wanted = pipe(
                text,
                num_inference_steps=2,
                height=32,
                width=32,
                generator=torch.Generator().manual_seed(5 + index),
                output_type=kind,
            ).images[0]
            np.testing.assert_allclose(found[index], wanted, atol=1 / 65535)
    seen = []
    hook = pipe.transformer.register_forward_pre_hook(lambda *_: seen.append(1))
    again = studio.drawn("a", Arm("stock", 2))
    hook.remove()
    assert not seen
    np.testing.assert_array_equal(again.latents, drawn.latents)
    forecast = Arm("unipc", 4, lambda p, n: fastdit.Cached(fastdit.Schedule.every(2), order=1))
    spent = studio.spent({UNPATCHED: Arm("stock", 4), "half": forecast}, rounds=1)
    assert spent["half"].flop_speedup == pytest.approx(2, rel=0.05)
    assert spent[UNPATCHED].work > 0
    assert all(0 < each.loop[0] < each.call[0] for each in spent.values())
    assert pipe.scheduler is own
    assert not hasattr(pipe, "stock_scheduler")
    assert "prepare_latents" not in vars(pipe)
    with pytest.raises(ArgumentError, match="another study, which differs in of"):
        small(pipe, tmp_path, seed=5, identity={"of": "another"})


def test_solvers_of_few_steps_follow_the_flow(pipe):
    for solver in ("euler", "unipc", "ab2", "dpm++"):
        check_solver(pipe, solver)
        with prepared(pipe, Arm(solver, 4)) as arguments:
            scheduler = pipe.scheduler
            given = {k: v for k, v in arguments.items() if k == "sigmas"} or {
                "num_inference_steps": 4
            }
            scheduler.set_timesteps(**given)
            assert len(scheduler.timesteps) == 4
            assert float(scheduler.sigmas[-1]) == 0
            config = scheduler.config
            assert config.get("shift", config.get("flow_shift")) == pipe.scheduler.config.get(
                "shift", config.get("flow_shift")
            )


def test_caches_of_diffusers_run_and_leave_nothing(pipe, tmp_path):
    """TaylorSeer computes fewer linear layers at its steps; one that fails on the model is told."""
    studio = small(pipe, tmp_path)
    modules = list(pipe.transformer.modules())
    before = [dict(vars(module)) for module in modules]
    plain = studio.drawn("plain", Arm("stock", 6))
    field = contenders.Field()
    contenders.unpatched(field, 6)
    contenders.others(field, studio, 6)
    assert "Cosmos" not in field.refused["diffusers SeaCache"]
    assert "SD3Transformer2DModel" in field.refused["diffusers SeaCache"]
    some = {n: a for n, a in field.arms.items() if n in (UNPATCHED, "diffusers TaylorSeer every 3")}
    spent = studio.spent(some, rounds=1)
    taylor = spent["diffusers TaylorSeer every 3"]
    assert taylor.work < spent[UNPATCHED].work
    assert taylor.held > spent[UNPATCHED].held
    assert [dict(vars(module)) for module in modules] == before
    np.testing.assert_array_equal(
        studio.drawn("plain again", Arm("stock", 6)).latents, plain.latents
    )
    broken = Arm("stock", 6, around=functools.partial(peers.hooked, pipe, object()))
    field.groups = {UNPATCHED: field.groups[UNPATCHED], "peer": {"broken": broken}}
    field.peers = {"peer"}
    found = study.conduct(studio, field, rounds=1)
    assert set(found.errors) == {UNPATCHED}
    assert field.refused["broken"].startswith("ValueError: Cache config")


def test_a_study_of_the_command_line(pipe, tmp_path, monkeypatch):
    """A budget beside plain steps of all solvers: the result is JSON with its provenance."""
    monkeypatch.setattr(solution, "STEPS", 8)
    monkeypatch.setattr(contenders, "BUDGETS", (2.0,))
    from fastdit.cli.loading import Model

    loaded = Model(pipe, "embedded model", tiny, "cpu", "float32")
    given = {"--height": 32, "--width": 32, "--guidance": None}
    prompts = evaluation.prompts_of(None, loaded, 3)
    assert len(set(prompts)) == 3
    studio = evaluation.studio_of(loaded, prompts, tmp_path, given, batch=3)
    console = evaluation.Console(quiet=True)
    every = fastdit.Cached(fastdit.Schedule.every(2))
    field = functools.partial(evaluation.chosen, studio, 4, {"every": every}, [2.0], None)
    evaluation.run(console, loaded, studio, field, tmp_path, 1)
    found = json.loads((tmp_path / evaluation.RESULT).read_text())
    assert {row["group"] for row in found["rows"]} == {
        UNPATCHED,
        contenders.FEWER,
        contenders.COMPOSED,
        contenders.ADVISED,
        "every",
    }
    assert [each["arm"] for each in found["verdicts"]] == ["every", "speedup 2"]
    assert all(contenders.FEWER in each["against"] for each in found["verdicts"])
    by = {row["arm"]: row for row in found["rows"]}
    assert by["unpatched"]["over_unpatched"]["value"] == 1
    assert by["unpatched"]["to_unpatched"]["psnr"] is None
    assert by["speedup 2"]["arithmetic"] == pytest.approx(0.5, abs=0.03)
    assert by["unipc 3"]["arithmetic"] == pytest.approx(0.75)
    assert "SD3Transformer2DModel" in found["provenance"]["model"]
    assert found["prompts"] == prompts
    assert (tmp_path / evaluation.PAGE).exists()
    with pytest.raises(ArgumentError, match=r"--budgets must be numbers of at least 1"):
        evaluation.speeds_of("2,0.5")
    with pytest.raises(ArgumentError, match="speedup must be at most"):
        evaluation.chosen(studio, 4, {}, [50.0], None)
