"""A pipeline's transformers take turns in its steps: what is said of each is put together."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from fastdit.account.asked import Asked
from fastdit.account.explain import Explanation, explain_patched, run_speedup
from fastdit.account.report import Report, doubt, report_run

#: a patch and the transformer that it is on
Part = tuple[Any, nn.Module]


def explain_parts(parts: Sequence[Part], pipeline: Any | None, asked: Asked) -> Explanation:
    """This explains the transformers of a pipeline in the run that is asked about, one after the other."""
    explained = [explain_patched(*part, pipeline, asked) for part in parts]
    found = [each for each in explained if each is not None]
    first = found[0]
    if len(found) == 1:
        return first
    summed = (
        "steps",
        "macs",
        "linear_macs",
        "dense_macs",
        "residual_bytes",
        "dense_residual_bytes",
    )
    largest = ("cache_bytes", "modulation_bytes", "packed_bytes", "reusable_share")
    told = ("model", "attention", "waves", "collapse", "graphs")
    values: dict[str, Any] = {name: sum(getattr(each, name) for each in found) for name in summed}
    values |= {name: max(getattr(each, name) for each in found) for name in largest}
    for name in told:
        lines = dict.fromkeys(filter(None, (getattr(each, name) for each in found)))
        values[name] = "; then ".join(lines)
    return replace(
        first,
        turns=tuple(each.steps for each in found),
        reuse_share=sum(each.reuse_share * each.steps for each in found) / values["steps"],
        tokens_per_step=sum((each.tokens_per_step for each in found), ()),
        raster=_side_by_side([each.raster for each in found]),
        exact=all(each.exact for each in found),
        **values,
    )


def _side_by_side(rasters: Sequence[str]) -> str:
    """One raster of all steps, or one below the other where the components differ."""
    lines = [[line.rpartition(" ") for line in raster.splitlines()] for raster in rasters]
    labels = {tuple(label for label, *_ in each) for each in lines}
    if len(labels) > 1:
        return "\n".join(rasters)
    return "\n".join(
        f"{same[0][0]} {''.join(marks for *_, marks in same)}" for same in zip(*lines, strict=True)
    )


def last_runs(parts: Sequence[Part]) -> list[tuple[Part, Any]]:
    """Of each transformer that ran in the last pass its run, in the order of their turns."""
    runs = [(part, run) for part in parts if (run := part[0].runs.last()) is not None]
    newest = max((run.started for _, run in runs), default=0.0)
    # Those of one pass begin together; one of an earlier pass has ended before.
    same = [(part, run) for part, run in runs if _end(run) >= newest]
    return sorted(same, key=lambda pair: pair[1].first or 0)


def _end(run: Any) -> float:
    return math.inf if run.live else run.started + run.seconds


def report_parts(parts: Sequence[Part]) -> Report:
    """This makes the report of the last pass, and warns when no transformer left out anything."""
    runs = last_runs(parts)
    if not runs:
        return report_run(parts[0][0], None, 1.0, True)
    found = [report_run(part[0], run, *run_speedup(part[0], run, part[1])) for part, run in runs]
    report = found[0] if len(found) == 1 else _one_report(found)
    if report.steps and not report.live:
        part, run = runs[0]
        warnings.warn(
            f"fastdit {' + '.join(report.methods)} reused nothing in the last run: the pictures are right, but "
            f"nothing was saved. {doubt(part[0], run)}",
            stacklevel=3,
        )
    return report


def _one_report(found: Sequence[Report]) -> Report:
    """The transformers are taken to be alike, so that a step of one has the arithmetic of a step of the other."""
    steps = sum(each.steps for each in found)
    spent = sum(each.steps / each.flop_speedup for each in found)
    return replace(
        found[0],
        steps=steps,
        tokens_per_step=sum((each.tokens_per_step for each in found), ()),
        computed=sum(each.computed for each in found),
        reused=sum(each.reused for each in found),
        seconds=max(each.seconds for each in found),
        peak_cache_bytes=max(each.peak_cache_bytes for each in found),
        live=any(each.live for each in found),
        active={step: mask for each in found for step, mask in each.active.items()},
        flop_speedup=steps / spent if spent else 1.0,
        packed_bytes=max(each.packed_bytes for each in found),
        graphs="; then ".join(dict.fromkeys(filter(None, (each.graphs for each in found)))),
        exact=all(each.exact for each in found),
        programs=sum(each.programs for each in found),
    )
