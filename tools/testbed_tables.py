"""What the documents say of the studies of `benchmarks/testbed.py`, and of `benchmarks/lifts.py` beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

#: what is equal -> how a table calls it
SIDES = {
    "arithmetic": "equal arithmetic",
    "time": "no more time",
    "more time": "one step more",
    "nodes": "AB2, same levels",
}


#: steps of a run of RAS, as the study has them
SPARSE = 28
#: what is equal -> which plain steps are meant
MEANT = {
    "arithmetic": "of equal arithmetic",
    "time": "with the most steps that take no more time",
    "more time": "with one step more",
    "nodes": "AB2 on the very levels at which the arm computes",
}
#: what judges every arm
JUDGED = ("clean", "score", "Fréchet")


class Verdict(NamedTuple):
    """An arm beside a baseline: a condition's best plain solver of those that are equal in something.

    Attributes:
        best: The baseline's name.
        found: Of "error", "clean", "score" and "frechet".
    """

    best: str
    found: Mapping[str, Mapping[str, float]]


def verdicts(result: Mapping[str, Any], side: str) -> Iterator[tuple[str, list[Verdict]]]:
    """Each arm that has such a baseline, and a verdict for each condition."""
    for arm, beside in result["beside"].items():
        if side in beside:
            yield (
                arm,
                [
                    verdict(condition["rows"], arm, beside[side])
                    for condition in result["conditions"]
                ],
            )


def verdict(rows: Mapping[str, Any], arm: str, names: list[str]) -> Verdict:
    """The best of the baselines is the nearest to the solution, by the median."""
    best = min(names, key=lambda name: rows[name]["median"])
    return Verdict(best, rows[arm]["against"][best])


def condition_name(condition: Mapping[str, Any]) -> str:
    """A condition in words."""
    return f"{condition['captions']} captions, guidance {condition['guidance']:g}"


def _row(*cells: str | None) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def ratio(found: Mapping[str, float]) -> str:
    """A ratio with its interval."""
    return f"{found['value']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


def less(found: Mapping[str, float], form: str = "+.0%") -> str:
    """A difference with its interval."""
    value, low, high = (format(found[end], form) for end in ("less", "low", "high"))
    return f"{value} [{low}, {high}]"


def judges_distance(arm: str) -> bool:
    """RALU and other noise draw other pictures, which a distance to the solution cannot judge."""
    return not arm.startswith("RALU") and "other noise" not in arm


def solvers(result: Mapping[str, Any]) -> str:
    """The plain solvers of a study, in words."""
    known = {"euler": "Euler", "ab2": "AB2", "unipc": "UniPC"}
    names = [known[name] for name in result.get("solvers", known)]
    return f"the best of {', '.join(names[:-1])} and {names[-1]}" if names[1:] else names[0]


def sides_of(result: Mapping[str, Any]) -> list[str]:
    """In what the arms of a study have equal plain steps, as far as distances judge them."""
    judged = [some for arm, some in result["beside"].items() if judges_distance(arm)]
    return [side for side in SIDES if any(side in some for some in judged)]


def _truth_steps(result: Mapping[str, Any]) -> int:
    return result.get("truth_steps", 60)


def _errors(result: Mapping[str, Any]) -> str:
    """What is said of errors in a study whose arms draw the truth's pictures."""
    if not any(map(judges_distance, result["beside"])):
        return ""
    meant = "; ".join(MEANT[side] for side in sides_of(result))
    return (
        "an error is the relative distance of a picture's latents to it. A ratio is the geometric mean of an arm's "
        f"error over that of {solvers(result)}, Euler and AB2 on the trailing grid ({meant}), with its 95 % interval: "
        "below 1 the arm is nearer. "
    )


def tables(result: Mapping[str, Any], machine: str) -> list[str]:
    """All of a study: a table a condition."""
    study, seconds, model = result["study"], result["seconds"], result.get("model", "tiny")
    on, mark = (
        ("the model in the package", "") if model == "tiny" else (f"the {model} model", f"-{model}")
    )
    option = f" --model {model}" if mark else ""
    name = ("Caches" if study == "caches" else study.upper()) + (f", {model}" if mark else "")
    side, told = "arithmetic", ""
    if seconds:
        batch = result.get("timed_batch", 16)
        side, told = "time", f"Seconds are a picture's in batches of {batch}, parity alone. "
    lines = [
        "",
        (
            f"{result['pictures']} held-out prompts at {result['size']} x {result['size']} pixels on {on}, "
            f"equal noise for all. The truth is Heun's method in {_truth_steps(result)} steps, on the levels of few "
            "steps, so it is farther from [finer solutions](evaluate.md#what-is-measured) than is estimated here, and "
            "errors as small say little; "
            f"{_errors(result)}Clean pictures show objects of some shape, the score is the share of "
            "the prompt's objects that are there, the Fréchet distance is to the truth's pictures on features of the "
            f"model's own encoder; each less that of {solvers(result)} {MEANT[side]}. {told}({machine}; "
            f"`benchmarks/testbed.py {study}{option}`)"
        ),
        "",
        f"![distances over evaluations](testbed-{study}{mark}.png)",
    ]
    sides = sides_of(result)
    for condition in result["conditions"]:
        truth, rows = condition["truth"], condition["rows"]
        lines += [
            "",
            f"### {name}: {condition_name(condition)}",
            "",
            (
                f"The truth's own error, estimated from {_truth_steps(result) // 2} steps, has the median "
                f"{truth['median']:.4f}; it is clean in "
                f"{truth['clean']:.0%} and scores {truth['score']:.0%}."
            ),
            "",
            _row(
                "",
                "evaluations",
                *(["seconds"] if seconds else []),
                *(["error"] if sides else []),
                *map(SIDES.get, sides),
                *JUDGED,
            ),
            "|---" * (2 + bool(seconds) + bool(sides) + len(sides) + len(JUDGED)) + "|",
        ]
        for arm, beside in result["beside"].items():
            row, known = rows[arm], judges_distance(arm)
            cells = [f"{row['median']:.4f}" if known else ""] if sides else []
            for equal in sides:
                shown = verdict(rows, arm, beside[equal]) if equal in beside and known else None
                cells.append(
                    f"{ratio(shown.found['error'])} {shown.best.split()[0]}" if shown else ""
                )
            found = verdict(rows, arm, beside[side]).found
            cells += [
                f"{row['clean']:.0%}, {less(found['clean'])}",
                f"{row['score']:.0%}, {less(found['score'])}",
                f"{row['frechet']:.4f}, {less(found['frechet'], '+.4f')}",
            ]
            spent = [f"{result['evaluations'][arm]:.1f}"]
            spent += [f"{seconds[arm]:.2f}"] if seconds else []
            lines.append(_row(arm, *spent, *cells))
    return lines


def forecasts(result: Mapping[str, Any]) -> list[str]:
    """Repeats and forecasts of whole steps under UniPC, beside the best plain solver."""
    lines = [
        (
            "Ratio of errors to those of the best of Euler, UniPC and AB2 with as many evaluations, from "
            "[the table](../results.md#distance-to-the-solution); below 1 the arm is nearer to the solution."
        ),
        "",
        "| | evaluations | " + " | ".join(map(condition_name, result["conditions"])) + " |",
        "|---|---|" + "---|" * len(result["conditions"]),
    ]
    for arm, found in verdicts(result, "arithmetic"):
        if arm.startswith("unipc") and "every 2" in arm:
            cells = " | ".join(ratio(one.found["error"]) for one in found)
            lines.append(f"| {arm} | {result['evaluations'][arm]:.0f} | {cells} |")
    return lines


def beside_fewer_steps(result: Mapping[str, Any]) -> list[str]:
    """A method less fewer plain steps of the best solver in the same time, and of the same arithmetic."""
    lines = [
        (
            f"On the model in the package, {result['pictures']} held-out prompts of each kind, 95 % bootstrap "
            f"intervals, beside {solvers(result)}; what each column means is said in "
            f"[the results](../results.md#pictures-by-{result['study']}):"
        ),
    ]
    error_head = ["error over its"] if any(map(judges_distance, result["beside"])) else []
    for condition in result["conditions"]:
        lines += [
            "",
            _row(
                condition_name(condition),
                "beside",
                *error_head,
                "clean",
                "score",
                "Fréchet distance",
            ),
            "|---" * (5 + len(error_head)) + "|",
        ]
        for side in ("time", "arithmetic"):
            for arm, beside in result["beside"].items():
                found = verdict(condition["rows"], arm, beside[side])
                error = ratio(found.found["error"]) if judges_distance(arm) else ""
                lines.append(
                    _row(
                        arm,
                        f"{found.best}, {SIDES[side]}",
                        *([error] if error_head else []),
                        less(found.found["clean"]),
                        less(found.found["score"]),
                        less(found.found["frechet"], "+.4f"),
                    )
                )
    return lines


def choices(result: Mapping[str, Any]) -> list[str]:
    """What each choice of RAS's tokens does to the error, beside fewer plain steps."""
    conditions = result["conditions"]
    heads = [
        f"{condition['captions']} captions: {what}"
        for condition in conditions
        for what in ("error", "over that of plain steps", "clean")
    ]
    lines = [
        (
            f"On the model in the package, {result['pictures']} held-out prompts of each kind, {SPARSE} steps, guidance"
            f" {conditions[0]['guidance']:g}: the median error, its ratio to that of {solvers(result)} of equal "
            "arithmetic, and the share of clean pictures less theirs, with 95 % intervals "
            "([the results](../results.md#pictures-by-ras)):"
        ),
        "",
        _row("", "evaluations", *heads),
        "|---" * (2 + 3 * len(conditions)) + "|",
    ]
    for arm, found in verdicts(result, "arithmetic"):
        cells = []
        for condition, one in zip(conditions, found, strict=True):
            error = f"{condition['rows'][arm]['median']:.4f}"
            cells += [error, f"{ratio(one.found['error'])} {one.best}", less(one.found["clean"])]
        lines.append(_row(arm, f"{result['evaluations'][arm]:.1f}", *cells))
    return lines


def stale_keys(result: Mapping[str, Any]) -> list[str]:
    """How much of RAS's error is that of the keys and values that waiting tokens keep."""
    median = result["median"]
    found = "; ".join(
        f"at {share} the median error is {median[f'RAS {share}']:.4f}, with fresh ones "
        f"{median[f'RAS {share}, fresh keys']:.4f} (their ratio is {ratio(gain)})"
        for share, gain in result["fresh over kept"].items()
    )
    return [
        (
            f"On the model in the package, {result['pictures']} pictures of {result['size']} pixels, full captions: "
            f"{found}. {result['steps']} plain steps have {median['plain']:.4f}. (`benchmarks/ras_keys.py`)"
        )
    ]


def mixed_stage(result: Mapping[str, Any]) -> list[str]:
    """Pictures at the end of RALU's mixed stage and of the run, less the published arithmetic's."""
    lines = [
        (
            f"Pictures with which the mixed stage ends, and the run; {result['pictures']} held-out prompts, shares less"
            " those of parity with 95 % intervals (`benchmarks/mixed_stage.py`):"
        ),
        "",
        "| | clean at the stage's end | objects there | clean at the run's end | objects there |",
        "|---|---|---|---|---|",
    ]
    for name, ends in result["rows"].items():
        shares = [ends[end][what] for end in ("stage", "run") for what in ("clean", "score")]
        cells = [f"{found['value']:.0%}, {less(found)}" for found in shares]
        lines.append(_row(name, *cells))
    return lines


def lifts(result: Mapping[str, Any]) -> list[str]:
    """How near enlarged latents come to those of the picture at full size."""
    return [
        (
            f"Latents of {result['scenes']} scenes at half the size, enlarged, beside those of the same scenes at full "
            "size; relative distances (`benchmarks/lifts.py`). `RALU.latest_end` gives "
            f"{result['latest_end']:.2f} for them:"
        ),
        "",
        "| lift | latents | low half of their cosine transform | decoded pictures, from those drawn |",
        "|---|---|---|---|",
        *(
            _row(name, f"{way['latents']:.0%}", f"{way['low']:.0%}", f"{way['pictures']:.0%}")
            for name, way in result["ways"].items()
        ),
    ]
