"""The search: its vectors, seeds, operators, races, ledger, and that a search that was killed ends the same."""

from __future__ import annotations

import itertools
import json
import math
import os
import zlib
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pymoo")
from pymoo.core.population import Population

from fastdit.errors import ArgumentError, ScheduleError, SearchError
from fastdit.schedules.schedule import Schedule
from fastdit.search import Operators, Settings, Work, ecad, moves, seeds
from fastdit.search.archive import Archive
from fastdit.search.evolve import LEDGER, evolve
from fastdit.search.front import growth, hypervolume, non_dominated, on_axes
from fastdit.search.genome import Genome
from fastdit.search.ledger import Ledger
from fastdit.search.nsga2 import Nsga2
from fastdit.spec import BlockKind, ModelSpec
from search_fakes import COST, GENOME, HARM, STEPS, WORK, FakeWorkers

SETTINGS = Settings(generations=6, population=10, race=2, operators=Operators(mutation_share=0.5))
WITH_SURROGATE = replace(SETTINGS, generations=4, surrogate=3)
FLUX = ModelSpec(
    "flux",
    (
        BlockKind("transformer_blocks", 2, ("full_attn", "full_ff")),
        BlockKind(
            "single_transformer_blocks",
            2,
            ("single_attn", "single_proj_mlp", "single_proj_out"),
            consumers={"single_attn": "single_proj_out", "single_proj_mlp": "single_proj_out"},
        ),
    ),
)
PIXART = ModelSpec("pixart", (BlockKind("transformer_blocks", 28, ("attn1", "attn2", "ff")),))


def search(folder: Path, settings: Settings = SETTINGS, workers=None, work: Work = WORK, given=()):
    found, ledger = evolve(folder, work, settings, given, workers or FakeWorkers())
    ledger.close()
    return found


def described(found) -> list:
    return [(c.key, c.values, c.vector.tolist()) for c in found.front]


@pytest.fixture(scope="module", params=[SETTINGS, WITH_SURROGATE], ids=["plain", "surrogate"])
def whole(request, tmp_path_factory):
    """A search that nobody disturbed: its front, how many measurements it took, its settings."""
    workers = FakeWorkers()
    found = search(tmp_path_factory.mktemp("whole"), request.param, workers)
    return described(found), len(workers.asked), request.param


# ---- vectors


def test_a_vector_runs_step_by_step_then_block_by_block():
    genome = Genome(FLUX, 3)
    assert genome.components[:5] == (
        ("transformer_blocks", 0, "full_attn"),
        ("transformer_blocks", 0, "full_ff"),
        ("transformer_blocks", 1, "full_attn"),
        ("transformer_blocks", 1, "full_ff"),
        ("single_transformer_blocks", 0, "single_attn"),
    )
    vector = np.ones(genome.size, dtype=bool)
    vector[2 * 10 + 7] = False  # step 2, the eighth entry: the second single block's attention
    schedule = genome.schedule(vector)
    assert (~schedule.layers["single_transformer_blocks"].bits).nonzero() == ([2], [1], [0])
    assert (genome.vector(schedule) == vector).all()
    assert (genome.from_bytes(genome.to_bytes(vector)) == vector).all()


def test_bits_that_change_nothing_do_not_make_another_candidate():
    genome = Genome(FLUX, 4)
    vector = np.random.default_rng(0).random(genome.size) < 0.5
    other = vector.copy()
    other[:10] ^= True  # step 0 computes whatever its bits are
    assert genome.key(vector) == genome.key(other)

    dead = np.ones(genome.size, dtype=bool)
    dead[[2 * 10 + 6, 3 * 10 + 6]] = False  # proj_out of the first single block, the last two steps
    less = dead.copy()
    less[3 * 10 + 4] = False  # its attention, which nobody reads any more
    assert genome.key(dead) == genome.key(less)
    assert (genome.effective(dead) == genome.effective(less)).all()
    more = dead.copy()
    more[3 * 10 + 6] = True  # now proj_out reads it, fresh or stale
    stale = more.copy()
    stale[3 * 10 + 4] = False
    assert genome.key(more) != genome.key(stale)


def test_a_schedule_for_something_else_is_refused():
    schedule = GENOME.schedule(seeds.uncached(GENOME))
    with pytest.raises(ScheduleError):
        Genome(GENOME.spec, STEPS + 1).vector(schedule)
    with pytest.raises(ScheduleError):
        Genome(FLUX, STEPS).vector(schedule)


# ---- seeds


def test_first_population_has_the_papers_families():
    genome = Genome(PIXART, 20)
    population = seeds.first_population(genome, seeds.default_population("pixart"))
    bits = population.reshape(72, 20, 28, 3)
    assert len(np.unique(population, axis=0)) == 72
    assert bits[0].all()
    fora = [vector for vector in bits if (vector == vector[:, :1, :1]).all() and not vector.all()]
    assert sorted(int(v[:, 0, 0].sum()) for v in fora) == [1, 2, 2 + 1, 4, 5, 7, 10]
    for n in seeds.PERIODS:
        assert any((v[:, 0, 0] == (np.arange(20) % n == 0)).all() for v in fora)
    attention = [
        v for v in bits if v[:, :, 2].all() and (v[:, :, :2] == v[:, :1, :1]).all() and not v.all()
    ]
    assert len(attention) == 6
    assert sum(bool((~v[:, :, 1]).any(axis=1).any() and v[:, :, 2].all()) for v in bits) >= 13


def test_tgate_follows_its_rule():
    bits = seeds.tgate(Genome(PIXART, 20), 10, 3).reshape(20, 28, 3)
    computes = [step < 2 or step % 3 == 0 for step in range(10)]
    assert bits[:10, 0, 0].tolist() == computes
    assert bits[10:, :, 0].all()
    assert bits[:10, :, 1].all()
    assert not bits[10:, :, 1].any()
    assert bits[:, :, 2].all()


def test_evenly_spaced_spreads_blocks_and_steps():
    bits = seeds.evenly_spaced(Genome(PIXART, 20), "feed_forward", 3, 3).reshape(20, 28, 3)
    steps, blocks = (~bits[:, :, 2]).nonzero()
    assert set(blocks.tolist()) == {0, 14, 27} or set(blocks.tolist()) == {0, 13, 27}
    assert sorted(set(steps.tolist())) == [math.ceil(x - 1) for x in (5.25, 10.5, 15.75)]
    assert bits[:, :, :2].all()


def test_given_schedules_come_first_and_the_rest_is_filled_up():
    given = GENOME.schedule(np.random.default_rng(1).random(GENOME.size) < 0.5)
    population = seeds.first_population(GENOME, 40, [given])
    assert population.shape == (40, GENOME.size)
    assert len(np.unique(population, axis=0)) == 40
    assert (population[1] == GENOME.vector(given)).all()
    with pytest.raises(ArgumentError, match="population must exceed"):
        seeds.first_population(GENOME, 1, [given])


def test_evenly_spread_steps_hold_the_grids():
    genome = Genome(PIXART, 20)
    vectors = seeds.evenly_spread_steps(genome)
    rows = np.array(vectors).reshape(19, 20, -1)
    assert (rows == rows[:, :, :1]).all()
    assert rows[:, :, 0].sum(axis=1).tolist() == list(range(1, 20))
    for row in rows[:, :, 0]:
        gaps = np.diff([*np.flatnonzero(row), 20])
        assert row[0]
        assert gaps.max() - gaps.min() <= 1
    found = {vector.tobytes() for vector in vectors}
    assert {seeds.fora(genome, n).tobytes() for n in (2, 4, 5, 10, 20)} < found


def test_a_search_may_begin_with_evenly_spread_steps(tmp_path):
    settings = Settings(generations=0, population=12, even_steps=True)
    found = search(tmp_path, settings)
    even = [GENOME.key(vector) for vector in seeds.evenly_spread_steps(GENOME)]
    assert set(even) <= set(found.archive.seen)
    with pytest.raises(SearchError, match="given"):
        search(tmp_path, Settings(generations=0, population=12))


# ---- operators (spec 6.2)


def mating(size: int = 1680, population: int = 72, components=(), **operators):
    """(pymoo's problem, its mating) for independent random rows, and the rows."""
    rows = np.random.default_rng(0).random((population, size)) < 0.5
    algorithm = Nsga2(rows, population, 2, Operators(**operators), components)
    return algorithm.problem, algorithm.algorithm.mating, rows


def test_mutation_flips_a_bit_in_every_twentieth_child():
    """The figures measured with the authors' version of pymoo: 3.5 bits in 2.2 of 72 children."""
    problem, operators, rows = mating()
    many = np.tile(rows, (60, 1))
    mutated = operators.mutation.do(
        problem, Population.new(X=many), inplace=False, random_state=np.random.default_rng(1)
    )
    flipped = (mutated.get("X") != many).sum(axis=1)
    assert math.isclose(72 * flipped.mean(), 3.5, rel_tol=0.2)
    assert math.isclose(72 * (flipped > 0).mean(), 2.2, rel_tol=0.2)


def test_crossover_cuts_two_parents_at_four_points():
    problem, operators, rows = mating()
    rng = np.random.default_rng(2)
    pairs = np.stack([rng.permutation(72)[:2] for _ in range(400)])
    crossed = operators.crossover.do(
        problem, Population.new(X=rows), parents=pairs, random_state=rng
    ).get("X")
    shares, cuts = [], []
    for child, twin, (one, other) in zip(crossed[:400], crossed[400:], pairs, strict=True):
        differ = rows[one] != rows[other]
        from_other = child[differ] == rows[other][differ]
        assert (child[~differ] == rows[one][~differ]).all()
        assert (twin[differ] != child[differ]).all()
        shares.append(from_other.mean())
        cuts.append(int((np.diff(from_other.astype(int)) != 0).sum()))
    crossing = np.array(shares) > 0
    assert math.isclose(crossing.mean(), 0.9, abs_tol=0.05)
    assert max(cuts) == 4
    assert np.mean(np.array(cuts)[crossing]) > 3.8
    assert math.isclose(np.mean(np.array(shares)[crossing]), 0.39, abs_tol=0.03)


def step_moves(count: int = 3000):
    """Rows before and after a child was made by steps, and the masks of a part of a step."""
    components = Genome(FLUX, 9).components
    parts, rng = moves.parts_of(components), np.random.default_rng(6)
    for _ in range(count):
        before = np.repeat(rng.random((9, 1)) < rng.uniform(0.1, 0.9), len(components), axis=1)
        after = before.copy()
        moves.move(after, parts, rng)
        yield before, after, parts


def test_parts_are_blocks_and_components_of_a_kind():
    components = Genome(FLUX, 9).components
    parts = [
        tuple(components[i] for i in np.flatnonzero(mask)) for mask in moves.parts_of(components)
    ]
    assert len(parts) == 4 + 5
    for part in parts:
        kind, block, name = part[0]
        alike = [c for c in components if c[:2] == (kind, block)]
        same = [c for c in components if (c[0], c[2]) == (kind, name)]
        assert list(part) in (alike, same)


def test_moves_add_drop_shift_and_split_steps(monkeypatch):
    monkeypatch.setattr(moves, "ANOTHER", 0.0)
    seen = dict.fromkeys(("added", "dropped", "shifted", "part", "none"), 0)
    for before, after, parts in step_moves():
        changed = (before != after).any(axis=1)
        assert not changed[0]
        if not changed.any():
            seen["none"] += 1  # a shift where all steps are alike
        elif changed.sum() == 2:
            step = int(changed.argmax())
            assert (after[step] == before[step + 1]).all()
            assert (after[step + 1] == before[step]).all()
            seen["shifted"] += 1
        elif (before != after).all(axis=1).sum() == 1:
            seen["added" if after.sum() > before.sum() else "dropped"] += 1
        else:
            (mask,) = (before != after)[changed]
            assert any((mask == part).all() for part in parts)
            seen["part"] += 1
    assert all(seen[name] > 300 for name in ("added", "dropped", "shifted", "part")), seen


def test_steps_are_crossed_whole():
    problem, operators, rows = mating(components=Genome(PIXART, 20).components, unit="step")
    pairs = np.stack([np.random.default_rng(7).permutation(72)[:2] for _ in range(200)])
    pairs[:, 1] = (pairs[:, 0] + 1 + np.arange(200)) % 72
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    crossed = operators.crossover.do(
        problem, Population.new(X=rows), parents=pairs, random_state=np.random.default_rng(8)
    ).get("X")
    count, cuts = len(pairs), []
    for child, twin, (one, other) in zip(crossed[:count], crossed[count:], pairs, strict=True):
        first, second, child, twin = (
            v.reshape(20, -1) for v in (rows[one], rows[other], child, twin)
        )
        from_other = (child == second).all(axis=1)
        assert ((child == first).all(axis=1) != from_other).all()
        assert (np.where(from_other[:, None], first, second) == twin).all()
        cuts.append(int((np.diff(from_other.astype(int)) != 0).sum()))
    assert max(cuts) == 4


def test_a_search_by_steps_ends_the_same_when_it_was_cut_off(tmp_path):
    settings = Settings(generations=5, population=10, race=2, operators=Operators.of("step", 3))
    whole = described(search(tmp_path / "whole", settings))
    search(tmp_path / "cut", Settings(**{**vars(settings), "generations": 2}))
    assert described(search(tmp_path / "cut", settings)) == whole
    with pytest.raises(ArgumentError, match="unit must be one of bit, step"):
        Operators.of("block")


def test_the_uncached_schedule_is_infeasible():
    first = np.ones((4, 30), dtype=bool)
    first[1:, [3, 9, 12]] = np.eye(3, dtype=bool)
    algorithm = Nsga2(first, 4, 2, Operators())
    asked = algorithm.ask()
    reused = (~asked).sum(axis=1)
    algorithm.tell(np.where(reused == 0, 0.0, 1.0)[:, None] * np.ones((1, 2)), reused)
    violation = algorithm.algorithm.pop.get("CV").ravel()
    assert violation[(algorithm.algorithm.pop.get("X").astype(bool)).all(axis=1)] == 1.0
    assert sorted(violation) == [0, 0, 0, 1]


# ---- fronts


def test_front_against_its_definition():
    values = np.random.default_rng(3).integers(0, 6, (60, 2)).astype(float)
    kept = {tuple(values[index]) for index in non_dominated(values)}
    expected = {
        tuple(v) for v in values if not any((w <= v).all() and (w < v).any() for w in values)
    }
    assert kept == expected
    assert len(non_dominated(values)) == len(expected)


def test_hypervolume_against_the_closed_form():
    rng = np.random.default_rng(4)
    values = rng.random((30, 2))
    front = values[non_dominated(values)]
    heights = np.concatenate([[1.1], front[:-1, 1]])
    area = ((1.1 - front[:, 0]) * (heights - front[:, 1])).sum()
    assert math.isclose(hypervolume(values, (1.1, 1.1)), area, rel_tol=1e-12)
    assert hypervolume(values, (0.0, 0.0)) == 0.0
    cube = np.array([[0.5, 0.5, 0.5], [0.25, 0.75, 0.5]])
    assert math.isclose(hypervolume(cube, (1, 1, 1)), 0.125 + 0.25 * 0.25 * 0.5)


def test_growth_is_the_hypervolume_of_every_beginning():
    values = np.random.default_rng(5).random((40, 2))
    expected = [hypervolume(values[: count + 1], (0.9, 0.8)) for count in range(40)]
    np.testing.assert_allclose(growth(values, (0.9, 0.8)), expected)


def test_axes_are_decades_of_a_distance_and_shares_of_the_uncached_cost():
    values = np.array([[0.1, 30.0], [0.0, 120.0]])
    np.testing.assert_allclose(on_axes(values, (60.0,), True), [[-1, 0.5], [-9, 2]])
    np.testing.assert_allclose(on_axes(values, (60.0,), False), [[0.1, 0.5], [0, 2]])
    assert values[0, 0] == 0.1


# ---- candidates


def archive(tmp_path: Path, race: int = 0, costs=("macs",), workers=None):
    ledger = Ledger(tmp_path / LEDGER, {"test": race})
    workers = workers or FakeWorkers()
    return Archive(GENOME, WORK, costs, race, ledger, workers), workers


def test_equal_schedules_are_measured_once(tmp_path):
    found, workers = archive(tmp_path)
    vector = np.random.default_rng(0).random(GENOME.size) < 0.5
    other = vector.copy()
    other[:5] ^= True
    one, two = found.evaluate(np.stack([vector, other]))
    assert one is two
    assert found.evaluate(other[None])[0] is one
    assert len(workers.asked) == 1
    reused = ~GENOME.effective(vector)
    np.testing.assert_allclose(one.values, [(HARM @ reused).mean(), COST @ ~reused])


def test_a_race_is_lost_to_who_is_no_dearer_and_better_on_every_first_item(tmp_path):
    found, _ = archive(tmp_path, race=2)
    harmless = 5 + np.argsort(HARM[:2, 5:].max(axis=0))[:3]
    harmful = 5 + int(np.argmax(HARM[:2, 5:].min(axis=0)))
    assert (HARM[:2, harmless].sum(axis=1) < HARM[:2, harmful]).all()
    rival, slower, cheaper = (seeds.uncached(GENOME) for _ in range(3))
    rival[harmless[:2]] = False
    slower[harmful] = False  # one entry saved, and more harm than the rival's two
    cheaper[[*harmless, harmful]] = False
    (best,) = found.evaluate(rival[None])
    lost, kept = found.evaluate(np.stack([slower, cheaper]))
    assert not lost.complete
    assert lost.losses == tuple(HARM[:2, harmful])
    behind = HARM[:2, harmful] - np.array(best.losses[:2])
    assert math.isclose(lost.values[0], best.values[0] + behind.mean())
    assert kept.complete
    assert {c.key for c in found.front()} == {best.key, kept.key}


def test_races_only_stop_candidates_that_a_front_would_not_hold(tmp_path):
    found, _ = archive(tmp_path, race=2)
    rng = np.random.default_rng(2)
    for _ in range(6):
        found.evaluate(rng.random((12, GENOME.size)) < rng.uniform(0.2, 0.9, (12, 1)))
    lost = [c for c in found.seen.values() if not c.complete]
    assert lost
    complete = [c for c in found.seen.values() if c.complete]
    for candidate in lost:
        assert len(candidate.losses) == 2
        rivals = [
            c
            for c in complete
            if c.values[1] <= candidate.values[1]
            and all(r < own for r, own in zip(c.losses, candidate.losses, strict=False))
        ]
        assert any(rival.values[0] < candidate.values[0] for rival in rivals)
    assert all(c.complete for c in found.front())
    again = found.evaluate(np.stack([c.vector for c in lost]), racing=False)
    assert all(c.complete and len(c.losses) == WORK.items for c in again)


# ---- the loop


def test_search_beats_its_seeds(tmp_path):
    found = search(tmp_path, Settings(generations=25, population=16))
    assert found.gain > 0.02
    assert len(found.generations) == 26
    volumes = [generation["hypervolume"] for generation in found.generations]
    assert volumes == sorted(volumes)
    assert all(found.genome.reused(c.vector) > 0 for c in found.front)


def killed_search(folder: Path, settings: Settings, after: int) -> None:
    """A search in a process of its own that is killed after so many measurements."""
    child = os.fork()
    if child == 0:
        try:
            search(folder, settings, FakeWorkers(dies_after=after))
        finally:
            os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_killed_at_any_point_it_ends_with_the_same_front(tmp_path, whole):
    expected, measurements, settings = whole
    points = np.random.default_rng(11).choice(measurements, 5, replace=False)
    for after in points.tolist():
        folder = tmp_path / str(after)
        killed_search(folder, settings, after)
        workers = FakeWorkers()
        assert described(search(folder, settings, workers)) == expected
        assert len(workers.asked) == measurements - after  # nothing was measured twice
    folder = tmp_path / "again and again"
    for part in sorted(points.tolist())[:2]:
        killed_search(folder, settings, max(1, part // 4))
    assert described(search(folder, settings)) == expected


def test_the_order_of_answers_does_not_matter(tmp_path, whole):
    expected, _, settings = whole
    assert described(search(tmp_path, settings, FakeWorkers(backwards=True))) == expected


def test_more_generations_continue_a_search(tmp_path, whole):
    expected, measurements, settings = whole
    search(tmp_path, replace(settings, generations=3))
    workers = FakeWorkers()
    assert described(search(tmp_path, settings, workers)) == expected
    assert 0 < len(workers.asked) < measurements


def test_measured_latency_is_resumed_from_the_ledger(tmp_path):
    settings = Settings(generations=4, population=8, costs=("latency", "macs"))
    first = described(search(tmp_path, settings))
    workers = FakeWorkers()
    assert described(search(tmp_path, settings, workers)) == first
    assert not workers.asked
    assert all(len(values) == 3 for _, values, _ in first)


# ---- the ledger


def sealed(body: bytes) -> bytes:
    """A line with its checksum."""
    return body[:-1] + b',"crc":"%08x"}' % zlib.crc32(body)


def unsealed(ledger: bytes) -> bytes:
    """A ledger as version 1 wrote it."""
    lines = [line[:-18] + b"}" for line in ledger.splitlines()]
    lines[0] = lines[0].replace(b'"version":2', b'"version":1')
    return b"".join(line + b"\n" for line in lines)


def test_a_ledger_without_checksums_is_continued(tmp_path):
    workers = FakeWorkers()
    expected = described(search(tmp_path, workers=workers))
    path = tmp_path / LEDGER
    old = unsealed(path.read_bytes()).splitlines(keepends=True)
    path.write_bytes(b"".join(old[:60]))
    again = FakeWorkers()
    assert described(search(tmp_path, workers=again)) == expected
    assert 0 < len(again.asked) < len(workers.asked)
    assert path.read_bytes().startswith(b"".join(old[:60]))
    assert b'"crc":' in path.read_bytes().splitlines()[-1]
    assert described(search(tmp_path, workers=FakeWorkers())) == expected


def test_a_changed_byte_is_refused_by_line(tmp_path):
    search(tmp_path)
    path = tmp_path / LEDGER
    content = path.read_bytes()
    header = content.index(b"\n")
    identity = json.loads(content[:header])["identity"]
    random = np.random.default_rng(0)
    places = [*range(header - 30, header + 40), *random.integers(0, len(content) - 1, 300)]
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << random.integers(8)
        path.write_bytes(damaged)
        with pytest.raises(
            SearchError, match=rf"line {content.count(10, 0, place) + 1} is damaged"
        ):
            Ledger(path, identity)


@pytest.mark.parametrize(
    "body",
    [
        b'{"key":"a","first":0,"last":1,"losses":[NaN]}',
        b'{"key":"a","first":0,"last":1,"losses":[Infinity]}',
        b'{"key":"a","first":0,"last":1,"losses":[1e999]}',
        b'{"key":"a","first":0,"last":1,"losses":[true]}',
        b'{"key":"a","first":0,"last":1,"losses":["1"]}',
        b'{"key":"a","first":0,"last":1,"losses":{"0":1}}',
        b'{"key":"a","first":0,"last":1e400,"losses":[1]}',
        b'{"key":"a","first":0,"last":1,"losses":[' + b"9" * 5000 + b"]}",
        b'{"key":3,"costs":{}}',
        b'{"key":"a","costs":{"macs":NaN}}',
        b'{"key":"a","costs":{"macs":[]}}',
        b'{"key":"a","costs":[]}',
        b'{"generation":1e999,"candidates":""}',
        b'{"generation":1}',
        b"[" * 100_000 + b"}",
        b'{"key":' * 100_000 + b"}",
    ],
    ids=lambda body: body[:60].decode(),
)
def test_a_line_that_says_something_else_is_refused(tmp_path, body):
    path = tmp_path / LEDGER
    with closing(Ledger(path, {})):
        whole = path.read_bytes()
    for ledger in (whole + sealed(body), unsealed(whole) + body):
        path.write_bytes(ledger + b"\n")
        with pytest.raises(SearchError, match="line 2 is damaged") as caught:
            Ledger(path, {})
        assert len(str(caught.value)) <= 800


def test_what_is_no_ledger_is_refused(tmp_path):
    for identity in ("[]", "null", '"a"'):
        path = tmp_path / "other"
        body = f'{{"format":"fastdit.search-ledger","version":2,"identity":{identity}}}'
        path.write_bytes(sealed(body.encode()) + b"\n")
        with pytest.raises(SearchError, match="identity"):
            Ledger(path, {})
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", "/dev/zero", tmp_path / "missing" / LEDGER):
        with pytest.raises(SearchError, match="cannot be opened"):
            Ledger(path, {})


def test_a_refused_ledger_stays_as_it_is(tmp_path):
    path = tmp_path / LEDGER
    path.write_bytes(b"notes of mine\nand the last line")
    with pytest.raises(SearchError, match="line 1 is damaged"):
        Ledger(path, {})
    assert path.read_bytes() == b"notes of mine\nand the last line"


def test_a_loss_that_is_not_finite_is_not_written(tmp_path):
    with closing(Ledger(tmp_path / LEDGER, {})) as ledger:
        for value in (math.nan, math.inf):
            with pytest.raises(SearchError, match="must be finite"):
                ledger.add_losses("a", 0, 1, [value])
    assert len((tmp_path / LEDGER).read_bytes().splitlines()) == 1


def test_a_result_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        workers = FakeWorkers()
        with pytest.raises(ArgumentError, match="out must be a folder"):
            ecad(lambda: None, out, WORK, SETTINGS, workers=workers)
        assert not workers.asked
    with pytest.raises(ArgumentError, match=r"out .* cannot be made"):
        ecad(lambda: None, tmp_path / ("a" * 300), WORK, SETTINGS, workers=FakeWorkers())


def test_a_cut_last_line_is_dropped_wherever_it_is_cut(tmp_path):
    expected = described(search(tmp_path))
    content = (tmp_path / LEDGER).read_bytes()
    starts = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    for cut in (starts[0] - 5, starts[0] + 3, starts[40] - 1, starts[40] + 1, len(content) - 1):
        (tmp_path / LEDGER).write_bytes(content[:cut])
        with pytest.warns(UserWarning, match="last line was cut off"):
            assert described(search(tmp_path)) == expected
        for line in (tmp_path / LEDGER).read_text().splitlines():
            json.loads(line)


@pytest.mark.parametrize(
    "damage",
    [b"not json\n", b"{}\n", b"[]\n", b'{"key":"a","first":0,"last":2,"losses":[1]}\n', b"\xff\n"],
)
def test_a_damaged_line_is_refused_by_number(tmp_path, damage):
    search(tmp_path)
    path = tmp_path / LEDGER
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:7], damage, *lines[8:]]))
    with pytest.raises(SearchError, match="line 8 is damaged"):
        search(tmp_path)
    assert path.read_bytes().splitlines(keepends=True)[7] == damage


def test_a_ledger_of_another_search_is_refused(tmp_path):
    search(tmp_path)
    before = (tmp_path / LEDGER).read_bytes()
    others = [
        {"settings": Settings(generations=6, population=10, race=3)},
        {"settings": Settings(generations=6, population=12, race=2)},
        {"work": Work(("one", "two"), steps=STEPS)},
        {"given": [GENOME.schedule(seeds.fora(GENOME, 2))]},
    ]
    for other in others:
        with pytest.raises(SearchError, match="belongs to another search"):
            search(tmp_path, **{"settings": SETTINGS, **other})
    assert (tmp_path / LEDGER).read_bytes() == before


def test_a_ledger_in_use_is_refused(tmp_path):
    with (
        closing(Ledger(tmp_path / LEDGER, {})),
        pytest.raises(SearchError, match="in use"),
    ):
        Ledger(tmp_path / LEDGER, {})


def test_a_replay_that_draws_other_candidates_is_refused(tmp_path):
    search(tmp_path)
    path = tmp_path / LEDGER
    lines = path.read_text().splitlines()
    index = next(i for i, line in enumerate(lines) if '"generation":2' in line)
    entry = {**json.loads(lines[index]), "candidates": "0" * 16}
    del entry["crc"]
    lines[index] = sealed(json.dumps(entry).encode()).decode()
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(SearchError, match="generation 2 has other candidates"):
        search(tmp_path)


# ---- the result


def test_result_folder(tmp_path):
    found = ecad(lambda: None, tmp_path, WORK, SETTINGS, workers=FakeWorkers())
    files = sorted(path.name for path in (tmp_path / "front").glob("*.json"))
    assert files == [f"{index + 1:02d}.json" for index in range(len(found.front))]
    summary = json.loads((tmp_path / "search.json").read_text())
    for name, candidate, point in zip(files, found.front, summary["front"], strict=True):
        schedule = Schedule.load(tmp_path / "front" / name)
        vector = GENOME.vector(schedule)
        assert GENOME.key(vector) == candidate.key == point["key"]
        assert schedule.provenance["objectives"]["loss"] == point["loss"] == candidate.values[0]
        assert (tmp_path / "front" / name).with_suffix(".png").stat().st_size > 1000
        assert Schedule.load(tmp_path / "front" / "ecad" / name) == schedule
    groups = [baseline["group"] for baseline in summary["baselines"]]
    assert set(groups) == {"FORA", "fewer steps", "uncached"}  # a model without cross-attention
    losses = [point["loss"] for point in summary["front"]]
    assert losses == sorted(losses)
    measured = np.array(summary["measured"])
    assert len(measured) == summary["schedules"] == summary["progress"][-1]["schedules"]
    drawn = measured[measured[:, 2] == 1]
    front = {tuple(drawn[index][:2]) for index in non_dominated(drawn[1:, :2]) + 1}  # not uncached
    assert front == {(point["loss"], point["macs"]) for point in summary["front"]}
    assert (tmp_path / "pareto.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"costs": ("macs", "time")}, "costs must be of"),
        ({"costs": ()}, "at least one"),
        ({"population": 1}, "population must be at least 2"),
        ({"generations": -1}, "generations"),
    ],
)
def test_settings_refuse_what_makes_no_sense(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        Settings(**arguments)


def test_work_refuses_what_makes_no_sense():
    for arguments in ({"prompts": ()}, {"prompts": "a circle"}, {"prompts": ("a",), "steps": 0}):
        with pytest.raises(ArgumentError):
            Work(**arguments)
    for arguments in itertools.product((-0.1, 1.1)):
        with pytest.raises(ArgumentError):
            Operators(mutation_share=arguments[0])
