"""What the documents say of the results of `benchmarks/gpu_check.py`."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
import gpu_results
from gpu_sections.sections import SECTIONS

UNPATCHED, COMPILED, REPLAYED = "unpatched", "compiled, best attention", "dense, graphs"
#: what stands behind a model's name where it was measured more than once
TITLES = {"rows": ", measured again", "arms": ", other methods"}
COLUMNS = ("steps", "seconds", "speed-up [range]", "of the arithmetic", "realised")


def models() -> Iterator[tuple[dict[str, Any], str, dict[str, Any]]]:
    """(machine, model, runs) of every model that was run on a GPU: the newest result first, of it the largest model."""
    for result in gpu_results.results():
        for model, found in gpu_results.runs(result):
            yield result["machine"], model, found


def own(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of a model's runs that are fastdit's."""
    return [
        row
        for row in found["rows"]
        if row.get("kind", "fastdit") == "fastdit" and row["method"] != UNPATCHED
    ]


def sections() -> list[str]:
    """The sections of a check, for docs/gpu-check.md."""
    lines = ["| section | call | seconds | what it measures |", "|---|---|---|---|"]
    for section in SECTIONS:
        call = section.call or "both"
        lines.append(f"| `{section.name}` | {call} | {section.seconds:.0f} | {section.what} |")
    return lines


def claim() -> list[str]:
    """The README's first figures: the largest model's, and the least gain of all."""
    machine, model, found = next(
        (machine, model, found)
        for machine, model, found in models()
        if any(row["method"] == "dense" for row in own(found))
    )
    gains = {row["method"]: row["speedup"] for row in own(found)}
    skipping = [gain for name, gain in gains.items() if way(name) != "dense"]
    least, where = min(
        (row["speedup"], f"`{row['method']}` on {other}")
        for _, other, runs in models()
        for row in own(runs)
    )
    over = [
        row["over"][COMPILED] for row in own(found) if row["method"] == "dense" and row.get("over")
    ]
    beside = (
        f" ({over[0]:.2f} times as fast as compiled with its best attention)" if any(over) else ""
    )
    return [
        (
            f"On one {machine['gpu']}, in bf16 at 1024 x 1024 with random weights, {model.removesuffix(' 1024')} draws "
            f"{gains['dense']:.1f} times as fast as stock diffusers with nothing skipped{beside}, and "
            f"{min(skipping):.1f} to {max(skipping):.1f} times as fast with tokens, components or "
            f"resolution left out. The least of all measured is {least:.2f}, {where}."
        )
    ]


def best() -> list[str]:
    """The best row of each way to skip work, and the worst row of all, of each model that was run on a GPU."""
    chosen: list[tuple[str, dict[str, Any]]] = []
    machine, rounds, seen = None, 0, set()
    for where, model, found in models():
        # one machine's table, and of a model what was measured together; the rest is among the results
        if machine not in (None, where) or model in seen or not own(found):
            continue
        seen.add(model)
        machine, rounds, rows = where, found["rounds"], own(found)
        names = [row["method"] for row in found["rows"] if row["method"] in (UNPATCHED, COMPILED)]
        names.append(min(rows, key=lambda row: row["speedup"])["method"])
        for skipped in ("dense", "every", "random", "RAS", "RALU", "+"):
            fitting = [row for row in rows if way(row["method"]) == skipped]
            names += [row["method"] for row in sorted(fitting, key=lambda row: row["speedup"])[-1:]]
        chosen += [(model, row) for row in found["rows"] if row["method"] in names]
    return [
        (
            f"{machine['gpu']}, bf16, 1024 x 1024, one picture, random weights of the published sizes, medians "
            f"of {rounds} rounds; speed-up over stock diffusers at its usual steps. Of each model the "
            "best row of each way to skip work, and the worst of all."
        ),
        "",
        *_table(chosen),
    ]


def measured(*ways: str, including: str = "") -> list[str]:
    """The rows of a method in the tables of a GPU."""
    lines: list[str] = []
    machines: list[dict[str, Any]] = []
    for machine, _, _ in models():
        machines += [machine] * (machine not in machines)
    for machine in machines:
        chosen = [
            (model, row)
            for where, model, found in models()
            for row in own(found)
            if where == machine and way(row["method"]) in ways and including in row["method"]
        ]
        if chosen:
            lines += [
                "",
                f"Whole runs on {machine['gpu']}, as in [the results](../results.md#whole-runs-on-a-gpu):",
                "",
                *_table(chosen),
            ]
    return lines[1:]


def way(method: str) -> str:
    """What a row of a GPU's table skips; "+" where two methods are composed."""
    if "+" in method:
        return "+"
    return next(
        way
        for way in (UNPATCHED, "compiled", "dense", "every", "random", "RAS", "RALU")
        if way in method
    )


def _table(chosen: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """Rows with their models; columns that no row has a figure for are left out."""
    rows = [row for _, row in chosen]
    more = _more(rows)
    head = ["model", "", *COLUMNS, *more]
    return [
        f"| model | | {' | '.join(head[2:])} |",
        "|---" * len(head) + "|",
        *(
            f"| {model} | {row['method']} | {' | '.join(_cells(row, more))} |"
            for model, row in chosen
        ),
    ]


def _more(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What only newer results have."""
    figures = (
        ("over compiled", lambda row: row.get("over", {}).get(COMPILED)),
        ("realised over dense with graphs", lambda row: row.get("realised_over_graphs")),
        ("idle", lambda row: row.get("idle")),
    )
    return [name for name, figure in figures if any(figure(row) is not None for row in rows)]


def _cells(row: dict[str, Any], more: Sequence[str]) -> list[str]:
    low, high = row["speedup_range"]
    found = {
        "over compiled": _shown(row.get("over", {}).get(COMPILED), ".2f", "x"),
        "realised over dense with graphs": _shown(row.get("realised_over_graphs"), ".0%"),
        "idle": _shown(row.get("idle"), ".1%"),
    }
    return [
        f"{row['steps']}",
        f"{row['seconds']:.2f}",
        f"{row['speedup']:.2f}x [{low:.2f}, {high:.2f}]",
        _shown(row["flop_speedup"], ".2f", "x"),
        _shown(row["realised"], ".0%"),
        *(found[name] for name in more),
    ]


def _shown(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def runs(result: gpu_results.Result) -> list[str]:
    """Whole runs on a GPU, for docs/results.md."""
    machine, lines, rounds = result["machine"], [], 1
    for model, found in gpu_results.runs(result):
        rounds = max(rounds, found["rounds"])
        more = _more(found["rows"])
        head = ["", *COLUMNS, *more]
        lines += [
            "",
            f"**{model}**, {found['steps']} steps{TITLES.get(found.get('section'), '')}:",
            "",
            "| | " + " | ".join(head[1:]) + " |",
            "|---" * len(head) + "|",
            *(f"| {row['method']} | {' | '.join(_cells(row, more))} |" for row in found["rows"]),
        ]
    if not lines:
        return []
    return [
        "",
        (
            f"Whole runs of stock pipelines on {machine['gpu']}, bf16, 1024 x 1024, one picture, random weights of the "
            f"published sizes, embeddings in and latents out (`make gpu-check`, torch {machine['torch']}, driver "
            f"{machine['driver']}). Methods take turns; medians and ranges of {rounds} round{'s' * (rounds > 1)} after "
            "one to warm up. `dense` skips nothing; `random n %` reuses so many single components, drawn at random, as "
            "irregular as any searched schedule; speed-ups are over the unpatched pipeline at its usual steps."
        ),
        *_said_of_baselines(result),
        *lines,
        *_not_measured(result),
        *_host(result),
    ]


def _said_of_baselines(result: gpu_results.Result) -> list[str]:
    """Of results that have more than the unpatched pipeline to compare with."""
    rows = [row for _, found in gpu_results.runs(result) for row in found["rows"]]
    if not any(row["method"] == COMPILED for row in rows):
        return []
    launch = statistics.median(row["launch_us"] for row in rows)
    facts = [f for name in gpu_results.RUNS for f in result["sections"].get(name, {}).items()]
    chosen = ", ".join(
        f"{found['best']} for {name.removeprefix('attention of ')}"
        for name, found in dict(f for f in facts if f[0].startswith("attention of ")).items()
    )
    return [
        "",
        (
            f"`{COMPILED}` is what two lines of diffusers give: compiled blocks, and the fastest of torch's attentions "
            f"({chosen}). `{REPLAYED}` is the dense run replayed; *realised over dense with graphs* is the speed-up "
            "over it divided by what the arithmetic gives. *idle* is the share of the time of transformer calls in "
            f"which the GPU had nothing to do. One launch costs this host {launch:.1f} us."
        ),
    ]


def _not_measured(result: gpu_results.Result) -> list[str]:
    said = [entry for name in gpu_results.RUNS for entry in gpu_results.absent(result, name)]
    return (
        ["", "Not measured: " + "; ".join(f"{name}: {why}" for name, why in said)] if said else []
    )


def _host(result: gpu_results.Result) -> list[str]:
    """What a call takes of the host where the device has next to nothing to do."""
    rows = gpu_results.rows(result, "host")
    if not rows:
        return []
    lines = [
        "",
        "Host time of a call of the transformer, of models of real depth and no width, milliseconds:",
        "",
        "| model | | all calls, median | fewest | most |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        ms = row["host_ms"]
        shown = " | ".join(f"{value:.2f}" for value in (statistics.median(ms), min(ms), max(ms)))
        lines.append(f"| {row['model'].partition(',')[0]} | {row['method']} | {shown} |")
    return lines


def kernels(result: gpu_results.Result) -> list[str]:
    """Single ops, products and attention, for docs/kernels.md; sections that were not run are left out."""
    machine, ceilings = result["machine"], gpu_results.ceilings(result)
    said = f"On {machine['gpu']}, driver {machine['driver']}, torch {machine['torch']}, commit {machine['commit']}"
    if ceilings is not None:
        said += (
            f" (`make gpu-check`): copy {ceilings['copy_tb_s']:.2f} TB/s, matmul "
            f"{ceilings['matmul_tflop_s']:.0f} TFLOP/s. bf16, graph replay with cold caches, medians."
        )
    lines = ["", said]
    tests = gpu_results.tests(result)
    if tests.get("outcomes"):
        failed = ", ".join(f"`{name.partition('::')[2]}`" for name in tests["failures"])
        stopped = "" if tests.get("finished", True) else " before the time was up"
        lines += [
            "",
            f"Kernel tests there: {tests['outcomes']['PASSED']} passed{stopped}"
            + (f"; failed: {failed}." if failed else ", none failed."),
        ]
    for section, keys, unit in (
        ("ops", ("op", "case", "shape"), "microseconds"),
        ("fusions", ("name",), "microseconds"),
        ("attention", ("model", "share"), "microseconds"),
    ):
        if rows := gpu_results.rows(result, section):
            lines += _contenders(rows, keys, unit)
    return lines


def _contenders(rows: list[dict[str, Any]], keys: tuple[str, ...], unit: str) -> list[str]:
    """A table with a column for every contender; rows that share none have tables of their own."""
    groups: list[tuple[set[str], list[dict[str, Any]]]] = []
    for row in rows:
        for names, group in groups:
            if names & set(row["us"]):
                names |= set(row["us"])
                group.append(row)
                break
        else:
            groups.append((set(row["us"]), [row]))
    lines = []
    for _, group in groups:
        names = list(dict.fromkeys(name for row in group for name in row["us"]))
        head = [*keys, *(f"{name}, {unit}" for name in names)]
        lines += ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for row in group:
            cells = [f"{row['us'][name]:.1f}" if name in row["us"] else "-" for name in names]
            lines.append(f"| {' | '.join([*(str(row[key]) for key in keys), *cells])} |")
    return lines
