"""What the documents say of plans that a search composed: the tables of `benchmarks/search_composed.py`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from testbed_tables import SIDES, condition_name, less, ratio

SHARES = (0.2, 0.25, 0.3, 0.35, 0.5, 0.7, 1.0)
SOLVERS = {"own": "Euler", "recommended": "UniPC"}


def tables(result: Mapping[str, Any], machine: str) -> list[str]:
    """All of it: what was searched, the areas, the best plan of each speed-up beside every baseline."""
    search, knobs = result["search"], result["search"]["knobs"]
    counts = f"{', '.join(map(str, knobs['steps'][:-1]))} or {knobs['steps'][-1]}"
    orders = f"{', '.join(map(str, search['orders'][:-1]))} or {search['orders'][-1]}"
    ratios = (
        f"{', '.join(f'{ratio:g}' for ratio in knobs['ratios'][1:-1])} or {knobs['ratios'][-1]:g}"
    )
    return [
        "",
        (
            "Plans searched on the model in the package at 64 x 64 pixels and guidance 2.5: a schedule whose reused "
            f"entries are drawn by order {orders}, RAS by `change` at {ratios} or none, {counts} steps, of Euler or "
            f"UniPC; {search['generations']} generations of {search['population']} by whole steps, begun with "
            f"{search['given']} schedules of evenly spread steps and of an earlier, shorter search, bred "
            f"{search['surrogate']} generations ahead on a surrogate, {search['schedules']} plans judged by the "
            f"geometric mean of the distances to the solution on {search['pictures']} pictures of training prompts, a "
            "third of them full captions and the others open; drawn again from "
            f"held-out prompts, {result['of_areas']} of each captions for the areas and {result['pictures']} for what "
            "is beside baselines. Errors are relative distances of latents to "
            f"Heun's in {result['truth_steps']} steps, their means geometric. Hypervolume is the area between a set "
            f"and its corner, on the share of the arithmetic of {result['steps']} steps and the logarithm of the mean "
            "error; the corner is 1 and the worst error of evenly spread steps. Plain steps are of Euler and AB2 on "
            "the trailing grid and of UniPC, evenly spread ones of Euler and UniPC. The front's schedules are its "
            f"plans of all {result['steps']} steps without RAS, as ECAD evolves them. 95 % bootstrap intervals over "
            "the prompts. (`benchmarks/search_composed.py`)"
        ),
        "",
        "![distance over arithmetic](search-composed.png)",
        *gains(result["areas"]),
        *_fronts(result),
        "",
        *presets(result),
        *_plans(result, machine),
        *_verdicts(result),
    ]


def gain(found: Mapping[str, Any]) -> str:
    """How much more a set covers than another."""
    low, high = found["interval"]
    return f"{found['value']:+.1%} [{low:+.1%}, {high:+.1%}]"


def gains(areas: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Hypervolumes of sets over those of others; captions -> set -> its area."""
    yield from ("", f"| hypervolume of | over that of | {' | '.join(areas)} |")
    yield "|---" * (2 + len(areas)) + "|"
    for name, first in next(iter(areas.values())).items():
        for other in first["gain"]:
            cells = (gain(area[name]["gain"][other]) for area in areas.values())
            yield f"| {name} | {other} | {' | '.join(cells)} |"
    corners = ", ".join(
        f"{captions} {next(iter(area.values()))['corner']:.3f}" for captions, area in areas.items()
    )
    yield from ("", f"The corners' errors: {corners}.")


def _whole(area: Mapping[str, Any]) -> Mapping[str, Any]:
    """The area of the whole front, which is named first."""
    return next(iter(area.values()))


def _within(front: list[list[Any]], share: float) -> str:
    """The best of a front within a share of the arithmetic."""
    within = [row for row in front if row[2] <= share + 1e-9]
    best = min(within, key=lambda row: row[1], default=None)
    return "-" if best is None else f"{best[1]:.4f} ({best[2]:.0%})"


def _fronts(result: Mapping[str, Any]) -> Iterator[str]:
    """The best of each set within a share of the arithmetic."""
    for captions, area in result["areas"].items():
        fronts = _whole(area)["fronts"]
        yield from ("", f"| most arithmetic, {captions} captions | {' | '.join(fronts)} |")
        yield "|---" * (1 + len(fronts)) + "|"
        for share in SHARES:
            cells = (_within(front, share) for front in fronts.values())
            yield f"| {share:.0%} | {' | '.join(cells)} |"


def presets(result: Mapping[str, Any]) -> list[str]:
    """The presets beside what needs no search."""
    areas = {captions: _whole(area)["fronts"] for captions, area in result["areas"].items()}
    _, *others = next(iter(areas.values()))
    columns = [
        f"{what}, {captions} captions" for captions in areas for what in ("distance", *others)
    ]
    lines = [
        (
            f"The presets, the front's best schedules within 1/2, 1/3 and 1/4 of the arithmetic of {result['steps']} "
            "steps on the search's own pictures: their mean distances to the solution from held-out prompts, beside "
            "the best of the others that cost no more."
        ),
        "",
        f"| preset | solver | arithmetic | {' | '.join(columns)} |",
        "|---" * (3 + len(columns)) + "|",
    ]
    for name, preset in result["presets"].items():
        cells = []
        for captions, fronts in areas.items():
            cells.append(f"{preset['errors'][captions]:.4f}")
            cells += [_within(fronts[other], preset["share"]) for other in others]
        solver = SOLVERS[preset["solver"]]
        lines.append(f"| {name} | {solver} | {preset['share']:.0%} | {' | '.join(cells)} |")
    return lines


def _plans(result: Mapping[str, Any], machine: str) -> Iterator[str]:
    """The plan of each speed-up."""
    yield from (
        "",
        (
            f"At each speed-up, of the plans that take no more than that part of the time of {result['steps']} plain "
            f"steps of Euler on the same ops ({result['dense']:.3f} s a picture in batches of {result['timed_batch']}, "
            f"of a pipeline that has drawn before; {machine}), the one that was best on the search's own pictures. Of "
            "its steps, x computes all, a number draws all by that order, p computes a part."
        ),
        "",
        "| | solver | steps | RAS | evaluations | seconds | what the steps do |",
        "|---|---|---|---|---|---|---|",
    )
    for name, plan in result["plans"].items():
        yield (
            f"| {plan['speedup']}x | {SOLVERS[plan['solver']]} | {plan['steps']} | "
            f"{'-' if plan['ratio'] == 1 else format(plan['ratio'], 'g')} | {result['evaluations'][name]:.1f} | "
            f"{result['seconds'][name]:.3f} | `{plan['text']}` |"
        )


def _verdicts(result: Mapping[str, Any]) -> Iterator[str]:
    """Each plan beside each baseline, paired."""
    for condition in result["conditions"]:
        yield from (
            "",
            (
                f"Beside every plain baseline, {condition_name(condition)}: error over its, below 1 the plan is nearer "
                f"to the solution (which is clean in {condition['truth']['clean']:.0%} and scores "
                f"{condition['truth']['score']:.0%}); clean pictures, score and Fréchet distance less its."
            ),
            "",
            "| | beside | equal in | error over its | clean | score | Fréchet distance |",
            "|---|---|---|---|---|---|---|",
        )
        for name, plan in result["plans"].items():
            for other, sides in _baselines(result["beside"][name]).items():
                found = condition["rows"][name]["against"][other]
                yield (
                    f"| {plan['speedup']}x | {'AB2' if 'nodes' in sides else other} | "
                    f"{', '.join(map(SIDES.get, sides))} | {ratio(found['error'])} | {less(found['clean'])} | "
                    f"{less(found['score'])} | {less(found['frechet'], '+.4f')} |"
                )


def _baselines(beside: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Each baseline of a plan, and what they are equal in."""
    found: dict[str, list[str]] = {}
    for side, names in beside.items():
        for name in names:
            found.setdefault(name, []).append(side)
    return found


def beaten(result: Mapping[str, Any], captions: str, speedup: int) -> tuple[list[str], list[str]]:
    """Of the baselines of a speed-up under some captions, (those that a plan beats, those that it does not).

    It beats one where the interval of the errors' ratio is below 1 and neither score nor clean pictures are fewer by
    an interval.
    """
    (condition,) = (c for c in result["conditions"] if c["captions"] == captions)
    (name,) = (n for n, plan in result["plans"].items() if plan["speedup"] == speedup)
    won: list[str] = []
    lost: list[str] = []
    for other, sides in _baselines(result["beside"][name]).items():
        found = condition["rows"][name]["against"][other]
        worse = found["clean"]["high"] < 0 or found["score"]["high"] < 0
        beats = found["error"]["high"] < 1 and not worse
        (won if beats else lost).append("AB2 on its own levels" if "nodes" in sides else other)
    return won, lost


def sentences(result: Mapping[str, Any]) -> list[str]:
    """What a page says of it: which baselines a plan beats, and how much more the front covers."""
    found = []
    for condition in result["conditions"]:
        captions = condition["captions"]
        said = []
        for speedup in sorted(plan["speedup"] for plan in result["plans"].values()):
            won, lost = beaten(result, captions, speedup)
            but = f" (not {', '.join(lost)})" if won and lost else ""
            said.append(f"at {speedup}x {len(won)} of {len(won) + len(lost)}{but}")
        found.append(f"on {captions} captions {' and '.join(said)}")
    covered = (
        f"{gain(over)} over {other} on {captions} captions"
        for captions, area in result["areas"].items()
        for other, over in _whole(area)["gain"].items()
    )
    return [
        (
            "Everything was searched at once, and the best plans drawn again from held-out prompts. Of the plain "
            "baselines of equal time or arithmetic, these are farther from the solution than the plan, beyond "
            "the interval, with clean pictures and score no better: "
            f"{'; '.join(found)}. The hypervolume of the front differs by {'; '.join(covered)} "
            "([the comparison](../results.md#searched-plans))."
        )
    ]
