"""Write what the README and the documents say of results, adapters and methods, so that no figure in them is typed.

    PYTHONPATH=. python tools/readme.py [--check]

Everything between a begin marker, which names its section, and the next end marker is replaced. With --check nothing is
written, and the exit status tells whether the files are what results and code say. The code is the fastdit that is
imported.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import itertools
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import comparison_tables
import composed_tables
import gpu_tables
import testbed_tables

import fastdit
from fastdit import ops
from fastdit.adapters import adapters
from fastdit.schedules.plan import check_composition

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
COMPOSED = "search-composed-cpu.json"
TINY = ROOT / "fastdit" / "tiny" / "assets" / "training.json"
EMOJI = TINY.parents[2] / "emoji" / "assets" / "training.json"
#: what stands between a begin marker and an end marker is written here
SECTION = re.compile(
    r"(<!-- begin (\w+): written by tools/readme\.py, do not edit -->\n).*?(<!-- end -->)",
    re.DOTALL,
)

#: how people call the families of models; a family that is not here is called what its adapter calls it
FAMILIES = {
    "sd3": "Stable Diffusion 3, 3.5",
    "flux": "FLUX.1",
    "pixart": "PixArt-alpha, -Sigma",
    "dit": "DiT",
    "lumina": "Lumina-Next",
    "lumina2": "Lumina 2",
    "qwen": "Qwen-Image",
    "hunyuanvideo15": "HunyuanVideo-1.5",
    "wan": "Wan 2.1, 2.2",
    "wan-vace": "Wan VACE",
    "flux2": "FLUX.2, klein",
    "zimage": "Z-Image",
}


def results() -> list[str]:
    """What docs/results.md shows: whole models."""
    lines = ["## Whole runs on a GPU"]
    for result in gpu_tables.gpu_results.results():
        lines += [*gpu_tables.runs(result), ""]
    lines += ["", "## Whole runs on a CPU", "", *_step(_result("step-cpu.json"))]
    for path in RESULTS.glob("host-cpu.json"):
        lines += ["", "## Host time of a call", *_host(json.loads(path.read_text()))]
    lines += ["", "## Schedules like the published ones", *_ecad(_result("ecad-cpu.json"))]
    found = _result(COMPOSED)
    lines += ["", "## Searched plans"]
    lines += composed_tables.tables(found, _machine(found["machine"]))
    lines += ["", "## Sparse steps on a CPU", *_ras(_result("ras-cpu.json"))]
    for path in RESULTS.glob("ralu-cpu.json"):
        lines += [
            "",
            "## Runs in stages on a CPU",
            *_ralu(json.loads(path.read_text())),
        ]
    found = _result("testbed-caches.json")
    lines += ["", "## Distance to the solution"]
    lines += testbed_tables.tables(found, _machine(found["machine"]))
    for path in RESULTS.glob("testbed-caches-emoji.json"):
        found = json.loads(path.read_text())
        lines += ["", "## Distance to the solution, emoji"]
        lines += testbed_tables.tables(found, _machine(found["machine"]))
    for study in ("ras", "ralu"):
        found = _result(f"testbed-{study}.json")
        lines += ["", f"## Pictures by {study.upper()}"]
        lines += testbed_tables.tables(found, _machine(found["machine"]))
    for path in sorted(RESULTS.glob("router-*.json")):
        found = json.loads(path.read_text())
        lines += [
            "",
            f"## Routers for {_sampler(found)}'s sampler",
            *(_solver_routers(found) if "order" in found else _routers(found, path.stem)),
        ]
    for path in RESULTS.glob("hybrid-cpu.json"):
        lines += [
            "",
            "## A search that begins with a router",
            *_hybrid(json.loads(path.read_text())),
        ]
    for path in RESULTS.glob("train-cpu.json"):
        lines += ["", "## Training a router", *_training(json.loads(path.read_text()))]
    lines += ["", "## The models in the package", *_tiny(json.loads(TINY.read_text()))]
    lines += _emoji(json.loads(EMOJI.read_text()))
    return [*lines, *_emoji_steps(_result("emoji-steps.json"))]


def support(folder: str) -> list[str]:
    """Which family runs which method, as the adapters say; the other documents are in `folder`."""
    lines = [
        "| family | transformer | components that can be reused | Dense | Cached, ECAD, HarmoniCa | RAS | RALU |",
        "|---|---|---|---|---|---|---|",
    ]
    known = {adapter.family: adapter for adapter in adapters().values()}
    for family in (*FAMILIES, *sorted(set(known) - set(FAMILIES))):
        adapter = known[family]
        names = dict.fromkeys(name for kind in adapter.components.values() for name in kind)
        can = ("yes", "yes", _yes(adapter.layouts), _yes(adapter.changes_resolution))
        classes = ", ".join(f"`{name}`" for name in adapter.model_classes)
        lines.append(
            f"| {FAMILIES.get(family, family)} | {classes} | {', '.join(names)} | {' | '.join(can)} |"
        )
    wrapped = sum(row.get("adapter") == "generic" for row in _denoisers())
    return [
        *lines,
        (
            f"| any other | [{wrapped} of diffusers' denoisers, each tested]({folder}supported.md) | attentions and "
            "feed-forwards, wrapped as they are | no | Cached, ECAD | no | no |"
        ),
    ]


def transformers() -> list[str]:
    """What becomes of each transformer of diffusers."""
    rows = _denoisers()
    served = [row for row in rows if "share" in row]
    most = sum(row["share"] >= 0.9 for row in served)
    lines = [
        (
            f"Of the {len(rows)} denoisers of diffusers {_result('supported.json')['diffusers']}, {len(served)} are "
            f"served, {most} of them with a share of at least 90%."
        ),
        "",
        "| transformer | adapter | what can be reused | share |",
        "|---|---|---|---|",
    ]
    for row in served:
        adapter = "wrapped" if row["adapter"] == "generic" else row["adapter"]
        lines.append(
            f"| `{row['class']}` | {adapter} | {', '.join(row['components'])} | {row['share']:.1%} |"
        )
    for row in rows:
        if "refused" in row:
            lines.append(f"| `{row['class']}` | refused | {row['refused']} | |")
    others = [
        f"`{row['class']}` ({row['other']})"
        for row in _result("supported.json")["rows"]
        if "other" in row
    ]
    return [
        *lines,
        "",
        f"No denoisers, though they are among its transformers: {', '.join(others)}.",
    ]


def shed() -> list[str]:
    """What leaves models of published sizes."""
    lines = [
        "| model | weights GiB | shed GiB | share | layers | table of a run MiB | steps x rows |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in _result("shed.json"):
        if not row["shed"]:
            lines.append(f"| {row['model']} | {row['bytes'] / 2**30:.2f} | none | | | | |")
            continue
        lines.append(
            f"| {row['model']} | {row['bytes'] / 2**30:.2f} | {row['shed'] / 2**30:.2f} | "
            f"{row['shed'] / row['bytes']:.1%} | {row['layers']} | {row['table'] / 2**20:.1f} | "
            f"{row['steps']} x {row['batch']} |"
        )
    return lines


def _denoisers() -> list[dict[str, Any]]:
    return [row for row in _result("supported.json")["rows"] if "other" not in row]


def _yes(able: Any) -> str:
    return "yes" if able else "no"


def noisy() -> list[str]:
    """What reuse does under a sampler that draws noise."""
    result = _result("noisy-sampler.json")
    shares = ", ".join(
        f"{name} {found['with noise']:.0%} (without noise {found['without']:.0%})"
        for name, found in result["shares"].items()
    )
    return [
        (
            f"Share of the objects drawn that {result['prompts']} prompts ask for, by the model in the package in "
            f"{result['steps']} steps under `stochastic_sampling=True`: {shares}. (`benchmarks/noisy_sampler.py`)"
        )
    ]


def sums() -> list[str]:
    """What forecasts of single components move and keep as sums."""
    result = _result("sums-cpu.json")
    lines = [
        (
            f"PixArt at {result['depth']} blocks, {result['steps']} steps, of which some blocks compute always and the "
            "others at every n-th step: traffic of residuals and sums in a reused step and in the run, and most in "
            "caches, in sizes of one output, as outputs one by one → as sums. (`benchmarks/bench_sums.py`)"
        ),
        "",
        "| n | order | computes always | reused step | launches | run | caches |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        arms = row["one by one"], row["sums"]
        cells = (
            " → ".join(f"{arm[what]:.0f}" for arm in arms)
            for what in ("step_X", "launches", "run_X", "caches_X")
        )
        lines.append(f"| {row['n']} | {row['order']} | {row['always']} | {' | '.join(cells)} |")
    return lines


def routed() -> list[str]:
    """Routers less the intervals that cost as much."""
    lines: list[str] = []
    for path in sorted(RESULTS.glob("router-*.json")):
        result = json.loads(path.read_text())
        if "order" in result:
            lines += ["", *_beside_every(result)]
            continue
        lines += [
            "",
            (
                f"On the model in the package, {result['steps']} steps of {_sampler(result)}'s sampler, held-out "
                "prompts, 95 % bootstrap intervals:"
            ),
            "",
            *_router_differences(result),
        ]
    return lines


def _beside_every(result: dict[str, Any]) -> list[str]:
    """A sentence on routers of forecasts."""
    halves, gains = [], []
    for captions, found in result["captions"].items():
        for name in result["routers"]:
            row = next(row for row in found["rows"] if row["arm"] == name)
            ratio = _ratio(next(iter(row["against"].values())))
            halves.append(f"{name} {ratio} on {captions} captions")
            gain = composed_tables.gain(next(iter(found["areas"][name]["gain"].values())))
            gains.append(f"{name} {gain} on {captions} captions")
    sampler, order = _sampler(result), result["order"]
    return [
        (
            f"For {result['steps']} steps of {sampler} and order {order}, at the arithmetic of "
            f"`Cached(Schedule.every(2), order={order})`, trained routers are so many times as far from the solution "
            f"as that: {', '.join(halves)}. The hypervolume of their sweeps, over that of whole steps evenly spread "
            f"and drawn by order 1: {', '.join(gains)}. None ships "
            f"([the results](../results.md#routers-for-{sampler.lower()}s-sampler))."
        )
    ]


def arguments(name: str) -> list[str]:
    """The arguments of a method, from its docstring."""
    method = getattr(fastdit, name)
    text = inspect.getdoc(method) or ""
    (listed,) = re.findall(r"\n(?:Attributes|Args):\n(.*?)\n\n", text + "\n\n", re.DOTALL)
    said = re.findall(r"^ {4}(\w+): (.*(?:\n {6,}.*)*)", listed, re.MULTILINE)
    defaults = {field.name: field.default for field in dataclasses.fields(method)}
    lines = ["| argument | default | meaning |", "|---|---|---|"]
    for argument, meaning in said:
        default = defaults[argument]
        shown = "" if default is dataclasses.MISSING else f"`{default!r}`"
        if isinstance(default, str):
            shown = f'`"{default}"`'
        lines.append(f"| `{argument}` | {shown} | {_plain(meaning)} |")
    return lines


def _plain(text: str) -> str:
    """A docstring's text as Markdown on one line."""
    text = re.sub(r":class:`~?([\w.]+)`", r"`\1`", " ".join(text.split()))
    return text.replace("``", "`").replace("|", "\\|")


def kernels() -> list[str]:
    """What docs/kernels.md shows: single ops, and what a GPU measured."""
    lines = []
    for op in ops.FILES:
        for path in sorted(RESULTS.glob(f"{op}-cpu-*.json"))[-1:]:
            lines += _op(json.loads(path.read_text()))
    for result in gpu_tables.gpu_results.results():
        lines += gpu_tables.kernels(result)
    return lines


def asked_speeds() -> list[str]:
    """How near the loop came to the speeds that were asked for."""
    result = _result("budget.json")
    guard, turns = result["guard"], f"{result['rounds']} turns"
    rows = ", ".join(
        f"{row['asked']:g}: {row['loop']:.2f} ({row['call']:.2f} of the whole call)"
        for row in result["rows"]
    )
    return [
        (
            f"On the model in the package, {result['steps']} steps, {result['machine']['cpu']}, "
            f"{result['machine']['threads']} threads, by its book made on that machine, the denoising loop was so many "
            f"times as fast as the unpatched one's, asked for {rows}. A budget of its own costs a request "
            f"{result['request_ms']:.3f} ms. A guard that never fired took {guard['ratio']:.3f} of the loop's time at "
            f"a speedup of {guard['speedup']:g} ({guard['lowest']:.3f} to {guard['highest']:.3f} in {turns}). "
            "(`benchmarks/bench_budget.py`)"
        ),
        "",
        (
            f"The errors of its plans on {result['pictures']} held-out prompts, in the same run: over as many evenly "
            "spread steps drawn as lines, and over the unpatched run, with 95 % intervals of the paired ratio. A plan "
            "of components stands beside the evenly spread steps that are as fast."
        ),
        "",
        "| speed-up | plan | over evenly spread | over the unpatched run | evenly spread over the unpatched run |",
        "|---|---|---|---|---|",
        *(
            f"| {row['speedup']:.2f} | {'whole steps' if row['whole'] else 'components'} | "
            f"{_budget_ratio(row['over_even'])} | {_budget_ratio(row['over_unpatched'])} | "
            f"{_budget_ratio(row['even_over_unpatched'])} |"
            for row in result["held_out"]
        ),
    ]


def composition() -> list[str]:
    """Which methods compose in pairs, as they declare it, and what is said of the others."""
    every = fastdit.Cached(fastdit.Schedule.every(2))
    book = fastdit.PlanBook.load(ROOT / "fastdit" / "books" / "tiny.json")
    given = {
        "RAS": fastdit.RAS(),
        "RALU": fastdit.RALU(),
        "Cached": every,
        "ECAD": fastdit.ECAD.preset("tiny", "fast"),
        "HarmoniCa": fastdit.HarmoniCa.preset("tiny"),
        "... `strict=False`": fastdit.HarmoniCa.preset("tiny", strict=False),
        "PerStage": fastdit.PerStage(every),
        "Budget, a speed": fastdit.Budget(speedup=2),
        "... a quality, a time": fastdit.Budget(quality="high", book=book),
        "... `guard=True`": fastdit.Budget(speedup=2, book=book, guard=True),
    }
    said: dict[str, int] = {}
    lines = [f"| | {' | '.join(given)} |", f"|---{'|---' * len(given)}|"]
    for name, method in given.items():
        cells = []
        for other in given.values():
            cells.append("" if other is method else "yes")
            try:
                check_composition((method, other) if other is not method else ())
            except fastdit.CompositionError as error:
                told = re.sub(r"^\S+ and \S+ both", "… and … both", str(error))
                told = re.sub(r"\bRA\w+ (computes|has)\b", r"… \1", told)
                cells[-1] = str(said.setdefault(told, len(said) + 1))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, "", *(f"{number}. `{told}`" for told, number in said.items())]


def _budget_ratio(values: list[float]) -> str:
    ratio, low, high = values
    return "the same plan" if ratio == low == high == 1 else f"{ratio:.2f} [{low:.2f}, {high:.2f}]"


METHOD_PAGES: dict[str, dict[str, Callable[[], list[str]]]] = {
    "dense": {"measured": functools.partial(gpu_tables.measured, "dense")},
    "cached": {
        "arguments": functools.partial(arguments, "Cached"),
        "sums": sums,
        "noisy": noisy,
        "measured": functools.partial(gpu_tables.measured, "every", "random"),
        "forecasts": lambda: testbed_tables.forecasts(_result("testbed-caches.json")),
    },
    "ecad": {
        "arguments": functools.partial(arguments, "ECAD"),
        "composed": lambda: composed_tables.sentences(_result(COMPOSED)),
        "measured": lambda: composed_tables.presets(_result(COMPOSED)),
    },
    "harmonica": {"arguments": functools.partial(arguments, "HarmoniCa"), "measured": routed},
    "ras": {
        "arguments": functools.partial(arguments, "RAS"),
        "measured": functools.partial(gpu_tables.measured, "RAS", "+", including="RAS"),
        "choices": lambda: testbed_tables.choices(_result("testbed-ras.json")),
        "keys": lambda: testbed_tables.stale_keys(_result("ras-keys.json")),
        "noisy": noisy,
    },
    "ralu": {
        "arguments": functools.partial(arguments, "RALU"),
        "measured": functools.partial(gpu_tables.measured, "RALU", "+", including="RALU"),
        "quality": lambda: testbed_tables.beside_fewer_steps(_result("testbed-ralu.json")),
        "mixed": lambda: testbed_tables.mixed_stage(_result("mixed-stage.json")),
        "lifts": lambda: testbed_tables.lifts(_result("lifts.json")),
    },
    "per_stage": {"arguments": functools.partial(arguments, "PerStage")},
    "budget": {"arguments": functools.partial(arguments, "Budget"), "measured": asked_speeds},
    "composition": {"pairs": composition},
}

#: file -> section -> what writes it
FILES: dict[Path, dict[str, Callable[[], list[str]]]] = {
    ROOT / "README.md": {
        "claim": gpu_tables.claim,
        "support": functools.partial(support, "docs/"),
        "measured": gpu_tables.best,
    },
    ROOT / "docs" / "index.md": {
        "claim": gpu_tables.claim,
        "support": functools.partial(support, ""),
    },
    ROOT / "docs" / "supported.md": {"transformers": transformers},
    ROOT / "docs" / "serving.md": {"shed": shed},
    ROOT / "docs" / "results.md": {"tables": results},
    ROOT / "docs" / "kernels.md": {"tables": kernels},
    ROOT / "docs" / "gpu-check.md": {"sections": gpu_tables.sections},
    ROOT / "docs" / "evaluate.md": {
        "solution": lambda: comparison_tables.solution(_result("solution.json")),
        "compared_tiny": lambda: _compared("tiny"),
        "compared_emoji": lambda: _compared("emoji"),
    },
    **{ROOT / "docs" / "methods" / f"{name}.md": made for name, made in METHOD_PAGES.items()},
}


def _compared(model: str) -> list[str]:
    return comparison_tables.verdicts(_result(f"comparison-{model}.json"), model)


def _result(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text())


def _host(result: dict[str, Any]) -> list[str]:
    """The table of `bench_host.py`."""
    lines = [
        "",
        (
            "What a call of the transformer asks of the host: models of real depth, as narrow as can be, "
            f"fp32; {_machine(result['machine'])}; the thread's own time, medians of calls in runs that take turns "
            "(`benchmarks/bench_host.py`). Launches are operators that make or change memory. Sparse is a RAS step "
            "of a quarter of the tokens, reused one that reuses every component."
        ),
        "",
        "| model | call | Python calls | launches | time | of stock |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['model']} | {row['call']} | {row['frames']:,} | {row['launches']:,} | "
            f"{row['microseconds']:,.0f} µs | {row['of_stock']:.2f} |"
        )
    return lines


def _step(result: dict[str, Any]) -> list[str]:
    """The three tables of `bench_step.py`."""
    lines = [
        (
            f"Whole runs: {result['what']}, depth {result['depth']} of {result['full_depth']}, "
            f"{result['steps']} steps; {_machine(result['machine'])}; medians of "
            f"{result['pairs']} interleaved pairs, their range in brackets "
            "(`benchmarks/bench_step.py`)."
        ),
        "",
        "| schedule | reused | unpatched | fastdit | speed-up | arithmetic saved | realised |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["runs"]:
        low, high = row["wall_speedup_range"]
        lines.append(
            f"| {row['schedule']} | {row['reused']:.0%} | {row['unpatched_s']:.2f} s | "
            f"{row['fastdit_s']:.2f} s | {row['wall_speedup']:.2f}x [{low:.2f}, {high:.2f}] | "
            f"{row['flop_speedup']:.2f}x | {row['realised']:.0%} |"
        )
    traffic, timed = result["traffic"], result["reused_step"]
    lines += [
        "",
        (
            f"One fully reused step of that model at depth {result['reused_depth']}, beside the "
            "plain way of caching, wrappers around the components. X is the size of one cached "
            "tensor."
        ),
        "",
        "| | kernels | bytes in token tensors | block stack | whole call |",
        "|---|---|---|---|---|",
    ]
    for name, label in (("hooks", "plain hooks"), ("fastdit", "fastdit")):
        lines.append(
            f"| {label} | {traffic[name]['kernels']} | {traffic[name]['token_X']:.0f} X | "
            f"{1e3 * timed['stack'][name + '_s']:.1f} ms | "
            f"{1e3 * timed['call'][name + '_s']:.1f} ms |"
        )
    lines += [
        "",
        (
            f"The floor is {traffic['floor_X']} X: {traffic['reused_components']} cached tensors, "
            "the stream read once and written once. Of the rest of the call, fastdit projects the "
            "captions once a run, hooks at every step."
        ),
    ]
    return lines


def _ecad(result: dict[str, Any]) -> list[str]:
    """The tables of `bench_ecad.py`; one fully reused step is in `bench_step.py`'s."""
    lines = [
        "",
        (
            "Schedules with the reuse share and the idle steps of ECAD's published ones, the other bits drawn at "
            f"random: {result['what']}, depth {result['depth']} of 28, {result['steps']} steps; "
            f"{_machine(result['machine'])}; medians of {result['pairs']} interleaved turns, their range in brackets. "
            "Plain hooks spare the same arithmetic. (`benchmarks/bench_ecad.py`)"
        ),
        "",
        "| schedule | reused | speed-up | arithmetic saved | realised | over plain hooks | caches, as predicted |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in result["runs"].items():
        held = row["cache_bytes"]
        equal = "yes" if held["counted"] == held["predicted"] else "no"
        lines.append(
            f"| {name} | {row['reused']:.0%} | {_spread(row['wall_speedup'])} | {row['mac_speedup']:.2f}x | "
            f"{row['realised']:.0%} | {_spread(row['over_hooks'])} | {held['counted'] / 2**20:.1f} MiB, {equal} |"
        )
    if "collapsed_step" in result:
        stack, traffic = result["collapsed_step"]["stack"], result["collapsed_traffic"]
        lines += [
            "",
            (
                f"A fully reused step that another follows, at depth {result['reused_depth']}: kept as three sums, the "
                f"outputs of {traffic['reused_components']} components cost {traffic['fastdit']['token_X']:.0f} X, "
                f"{traffic['fastdit']['kernels']} kernels and {1e3 * stack['fastdit_s']:.1f} ms; with plain hooks "
                f"{traffic['hooks']['token_X']:.0f} X, {traffic['hooks']['kernels']} kernels and "
                f"{1e3 * stack['hooks_s']:.1f} ms. X is the size of one output."
            ),
        ]
    lines += [
        "",
        (
            "The same on the model in the package, from embeddings to latents, where overheads weigh. cache-dit has "
            "one bit per step and computes its first block always, so it spares the idle steps only."
        ),
        "",
        "| schedule | unpatched | fastdit | speed-up | arithmetic saved | over plain hooks | over cache-dit |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in result["embedded"].items():
        over = row["over"]
        rival = _spread(over["cache-dit"]) if "cache-dit" in over else "not run"
        lines.append(
            f"| {name} | {1e3 * row['seconds']['unpatched']:.0f} ms | {1e3 * row['seconds']['fastdit']:.0f} ms | "
            f"{_spread(row['wall_speedup'])} | {row['mac_speedup']:.2f}x | {_spread(over['hooks'])} | {rival} |"
        )
    return lines


def _spread(ratio: dict[str, Any]) -> str:
    return f"{ratio['median']:.2f}x {_range(ratio['range'])}"


def _ras(result: dict[str, Any]) -> list[str]:
    """The tables of `bench_ras.py`."""
    lines = [
        "",
        (
            f"One sparse step of RAS: {result['what']}, depth {result['depth']} of {result['full_depth']}; "
            f"{_machine(result['machine'])}; medians of {result['pairs']} interleaved rounds, their range in "
            "brackets. Two rows are one image with guidance, four are two. The last column is over the same step of "
            "the authors' code (microsoft/RAS, its way without CUDA). More than all that the arithmetic promises is "
            "realised where attention of few queries outruns torch's. (`benchmarks/bench_ras.py`)"
        ),
        "",
        (
            "| rows | tokens computed | dense, ms | weights | fastdit, ms | speed-up | arithmetic saved | realised | "
            "over microsoft/RAS |"
        ),
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for batch in result["batches"]:
        for index, ratio in enumerate(row["ratio"] for row in batch["packed"]["steps"]):
            peers = [peer for peer in batch.get("peer", ()) if peer["ratio"] == ratio]
            for weights in ("packed", "as they are"):
                row = batch[weights]["steps"][index]
                over = "not run"
                for peer in peers:
                    found = peer[weights]
                    over = f"{found['speedup']:.2f}x {_range(found['speedup_range'])}"
                lines.append(
                    f"| {batch['rows']} | {row['active']} | {1e3 * batch['dense_s']:.0f} | {weights} | "
                    f"{1e3 * row['seconds']:.0f} | {row['speedup']:.2f}x {_range(row['speedup_range'])} | "
                    f"{row['flop_speedup']:.2f}x | {row['realised']:.0%} | {over} |"
                )
    lines.append("")
    for batch in result["batches"]:
        packed, plain = batch["packed"]["fit"], batch["as they are"]["fit"]
        lines.append(
            f"Fitted over the tokens computed, a step of {batch['rows']} rows without any would take "
            f"{packed['a_s'] / batch['dense_s']:.1%} of a dense one with packed weights: "
            f"{packed['fixed_share']:.1%} is the arithmetic of the text, {packed['overhead_share']:.1%} more than "
            f"that. With weights as they are it is {plain['overhead_share']:.1%} more, since torch lays out all "
            "weights anew for a product of few rows too."
        )
    return lines


def _ralu(result: dict[str, Any]) -> list[str]:
    """The tables of `bench_ralu.py`."""
    side = result["side"]
    lines = [
        "",
        (
            f"Runs of RALU: widths of SD3-medium and FLUX at reduced depth, {side} x {side} pixels, one image, no "
            f"guidance, fp32, random weights, regions by the latents' gradient; {_machine(result['machine'])}; medians "
            f"of {result['pairs']} interleaved rounds, their range in brackets. A run is the sum of its stages' steps "
            "and of all time outside the transformer's forward. (`benchmarks/bench_ralu.py`)"
        ),
        "",
        (
            "| preset | depth | tokens of the stages | dense step | steps of the stages | over as many dense steps | "
            "arithmetic saved | realised | over the usual dense steps |"
        ),
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        tokens = ", ".join(map(str, dict.fromkeys(row["tokens_per_step"])))
        seconds = ", ".join(f"{s:.2f}" for s in row["stage_step_s"])
        lines.append(
            f"| {row['preset']} | {row['depth']} of {row['full_depth']} | {tokens} | {row['dense_step_s']:.2f} s | "
            f"{seconds} s | {row['speedup']:.2f}x {_range(row['speedup_range'])} | {row['flop_speedup']:.2f}x | "
            f"{row['realised']:.0%} | {row['over_dense_steps']:.2f}x of {row['dense_steps']} |"
        )
    lines += [
        "",
        "| preset | outside the forwards | both transitions | the published way | decoding that edges need | a run |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        whole = f", measured whole {row['whole_run_s']:.1f} s" if "whole_run_s" in row else ""
        lines.append(
            f"| {row['preset']} | {row['outside_share']:.2%} | {1e3 * row['between_s']:.0f} ms | "
            f"{row['published_between_s']:.1f} s | {row['decode_s']:.1f} s | {row['run_s']:.1f} s{whole} |"
        )
    return [
        *lines,
        "",
        (
            "At full depth the steps take longer, all else does not. The published way draws its noise by 64 Cholesky "
            "factors of a dense covariance at each transition, of which one was timed."
        ),
    ]


def _ratio(found: dict[str, float]) -> str:
    return f"{found['value']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


def _routers(result: dict[str, Any], stem: str) -> list[str]:
    """The tables of `router_study.py`."""
    sampler = _sampler(result)
    lines = [
        "",
        (
            f"A router trained on the model in the package for {result['steps']} steps of {sampler}'s sampler, "
            f"{result['calls']} calls of the model, in {result['epochs']} trajectories; held-out prompts, columns as "
            "above. Of the rows, `pairs` was trained as Learning-to-Cache is, `components` has a logit a component, "
            "`correctors` is no router but the first call and Heun's corrections (`benchmarks/router_study.py`)."
        ),
        "",
        f"![distance and score over arithmetic](router-{sampler.lower()}.png)",
        "",
        "| | prompts | arithmetic | distance to unpatched | prompt score |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['arm']} | {row['prompts']} | {row['arithmetic']:.0%} | {_interval(row['distance'])} | "
        f"{_interval(row['score'])} |"
        for row in result["rows"]
    ]
    return [*lines, "", *_router_differences(result)]


def _router_differences(result: dict[str, Any]) -> list[str]:
    return [
        "| difference | distance to unpatched | prompt score |",
        "|---|---|---|",
        *(
            f"| {row['arm']} less {row['beside']} | {_interval(row['distance'], '+')} | "
            f"{_interval(row['score'], '+')} |"
            for row in result["differences"]
        ),
    ]


def _solver_routers(result: dict[str, Any]) -> list[str]:
    """The table of `solver_study.py`."""
    told = "; ".join(
        f"{name}: {one['epochs']} trajectories of {one['batch']}"
        for name, one in result["routers"].items()
    )
    lines = [
        "",
        (
            f"Routers trained on the model in the package for {result['steps']} steps of {_sampler(result)} and "
            f"forecasts of order {result['order']}, tau {result['tau']:g}, half of the arithmetic ({told}); "
            f"{result['size']} pixels, guidance {result['guidance']:g}, {result['prompts']} held-out prompts of each "
            "captions. Distance to the solution, and ratios of it to those of fixed intervals and plain solvers: "
            "geometric means with 95 % bootstrap intervals, above 1 where the router is farther off. Hypervolume is as "
            "[above](#searched-plans), of a router at many shares of the arithmetic (`benchmarks/router_study.py`)."
        ),
    ]
    for captions, found in result["captions"].items():
        beside = next(list(row["against"]) for row in found["rows"] if "against" in row)
        lines += [
            "",
            f"On {captions} captions; the solution's own error is {found['truth']:.4f}:",
            "",
            "| | evaluations | median distance | " + " | ".join(f"to {b}" for b in beside) + " |",
            "|---|---|---|" + "---|" * len(beside),
        ]
        for row in found["rows"]:
            cells = [_ratio(row["against"][b]) if "against" in row else "" for b in beside]
            lines.append(
                f"| {row['arm']} | {row['evaluations']:.1f} | {row['median']:.4f} | {' | '.join(cells)} |"
            )
    areas = {captions: found["areas"] for captions, found in result["captions"].items()}
    return [*lines, *composed_tables.gains(areas)]


def _sampler(result: dict[str, Any]) -> str:
    name = result["scheduler"].removeprefix("FlowMatch").removesuffix("Scheduler")
    return name.removesuffix("Discrete").removesuffix("Multistep")


def _hybrid(result: dict[str, Any]) -> list[str]:
    """The table of `search_hybrid.py`."""
    ends = ("after the seeds", "at the end")
    lines = [
        "",
        (
            f"ECAD's search with that router's scheduler: {result['generations']} generations of "
            f"{result['population']} by whole steps, judged on {result['prompts']} training pictures, with the "
            f"hand-made seeds alone and with {len(result['sweep'])} schedules of the router among them. Hypervolume "
            f"of each of {len(result['curves']['hand-made seeds'])} searches (`benchmarks/search_hybrid.py`)."
        ),
        "",
        "![hypervolume over schedules measured](hybrid.png)",
        "",
        "| | after the seeds | at the end |",
        "|---|---|---|",
    ]
    return lines + [
        f"| {name} | "
        + " | ".join(", ".join(f"{volume:.3f}" for volume in result[end][name]) for end in ends)
        + " |"
        for name in result["curves"]
    ]


def _training(result: dict[str, Any]) -> list[str]:
    """The table of `bench_train.py`."""
    lines = [
        "",
        (
            f"What an iteration of `fastdit train-router` costs, in forwards of the model in the package, "
            f"{result['steps']} steps, batch {result['batch']}, guidance on; {_machine(result['machine'])} "
            "(`benchmarks/bench_train.py`)."
        ),
        "",
        "| | arithmetic | time | peak memory beyond the loaded model |",
        "|---|---|---|---|",
    ]
    return lines + [
        f"| {row['contender']} | {row['operations']:.2f} | {row['seconds']:.2f} | {row['peak_bytes'] / 2**20:.0f} MiB |"
        for row in result["rows"]
    ]


def _interval(found: dict[str, float], sign: str = "") -> str:
    value, low, high = (format(found[key], f"{sign}.3f") for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _range(ends: Sequence[float]) -> str:
    return f"[{ends[0]:.2f}, {ends[1]:.2f}]"


def _op(result: dict[str, Any]) -> list[str]:
    """One op on the CPU, against eager and Inductor, both with memory that stays in the process."""
    rows = [row for row in result["rows"] if row["allocator"] == "kept"]
    lines = [
        "",
        (
            f"`{result['op']}` on the CPU ({_machine(result['machine'])}): median of a call, the "
            "share of a plain copy's bandwidth, and times faster than eager and than "
            "`torch.compile`; every contender keeps its memory, no page is faulted in anew; what exceeds "
            "a copy of 128 MiB fits the last-level cache "
            f"(`benchmarks/bench_{result['op']}.py`)."
        ),
        "",
        "| case | fastdit | of copy | over eager | over torch.compile |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        if row["contender"] != "fastdit":
            continue
        rivals = {
            other["contender"]: other["seconds"]["median"] / row["seconds"]["median"]
            for other in rows
            if other["case"] == row["case"]
        }
        named = [
            str(value).removeprefix("torch.") for key, value in row["case"].items() if key != "size"
        ]
        if "branches" in row["case"]:
            named[-1] += " branches" if row["case"]["branches"] > 1 else " branch"
        compiled = f"{rivals['inductor']:.2f}x" if "inductor" in rivals else "not run"
        lines.append(
            f"| {', '.join(named)} | {1e3 * row['seconds']['median']:.2f} ms | "
            f"{row['share_of_copy']:.0%} | {rivals['eager']:.2f}x | {compiled} |"
        )
    return lines


def _tiny(facts: dict[str, Any]) -> list[str]:
    """What the embedded model can do."""
    measured = facts["measured"]
    one, two = measured["objects_1"], measured["objects_2"]
    return [
        "",
        (
            f"The first model, on {one['prompts']} held-out prompts of each kind at its "
            "default settings: share of objects drawn as the prompt says (`fastdit.tiny.score`). The "
            "default guidance was chosen on other draws from the same held-out scenes, so the two "
            "sets overlap in part."
        ),
        "",
        "| scenes | shape and colour | size | place | background | chance |",
        "|---|---|---|---|---|---|",
        *(
            f"| {name} | {row['shape_and_color']:.1%} | {row['size']:.1%} | {row['place']:.1%} | "
            f"{row['background']:.1%} | {row['chance']:.1%} |"
            for name, row in (("one object", one), ("two objects", two))
        ),
    ]


def _emoji(facts: dict[str, Any]) -> list[str]:
    """What the second embedded model can do."""
    rows = [facts["measured"][f"objects_{count}"] for count in (1, 2, 3)]
    return [
        "",
        (
            f"The second model, which `fastdit demo` draws with, on {rows[0]['prompts']} held-out prompts of one, two "
            "and three emoji each at its default settings (`fastdit.emoji.score`); a picture is clean that shows emoji "
            "without doubt and nothing else."
        ),
        "",
        "| scenes | emoji | style | size | place | clean | chance |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {name} | {row['mean']:.1%} | {row['style']:.1%} | {row['size']:.1%} | {row['place']:.1%} | "
            f"{row['clean']:.1%} | {row['chance']:.1%} |"
            for name, row in zip(("one emoji", "two", "three"), rows, strict=True)
        ),
    ]


def _emoji_steps(result: dict[str, Any]) -> list[str]:
    """How many of its pictures stay clean with fewer steps."""
    steps = result["steps"]
    falls = [f"{some} over {fewer}" for some, fewer in itertools.pairwise(steps)]
    return [
        "",
        (
            f"Share of its pictures that are clean, {result['pictures']} held-out prompts of one and two emoji, by the "
            "number of Euler's steps, and how far more steps are above fewer, with 95 % intervals "
            f"({_machine(result['machine'])}; `benchmarks/emoji_steps.py`):"
        ),
        "",
        "| captions, guidance | "
        + " | ".join(f"{n} steps" for n in steps)
        + " | "
        + " | ".join(falls)
        + " |",
        "|---" * (1 + len(steps) + len(falls)) + "|",
        *(
            f"| {row['captions']}, {row['guidance']:g} | "
            + " | ".join(f"{clean:.0%}" for clean in row["clean"])
            + " | "
            + " | ".join(testbed_tables.less(fall) for fall in row["falls"])
            + " |"
            for row in result["rows"]
        ),
    ]


def _machine(machine: dict[str, Any]) -> str:
    place = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
    return f"{place}, torch {machine['torch']}"


def written(path: Path) -> str:
    """The text that a file should have.

    Raises:
        ValueError: It has other sections than `FILES` names.
    """
    text = path.read_text()
    sections = FILES[path]
    if (found := [name for _, name, _ in SECTION.findall(text)]) != [*sections]:
        raise ValueError(f"{path} has the sections {found}, expected {[*sections]}")

    def made(match: re.Match[str]) -> str:
        lines = "\n".join(sections[match[2]]()).strip()
        return f"{match[1]}\n{lines}\n\n{match[3]}"

    return SECTION.sub(made, text)


def main() -> int:
    """Write or check the files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether they are up to date")
    check = parser.parse_args().check
    stale = False
    for path in FILES:
        text = written(path)
        if text != path.read_text():
            stale = True
            print(f"{path.relative_to(ROOT)} is not what results and code say", file=sys.stderr)
        if not check:
            path.write_text(text)
    return int(check and stale)


if __name__ == "__main__":
    sys.exit(main())
