"""The surrogate of the search: what it predicts against closed forms, what it proposes, and what that is worth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("pymoo")

from fastdit.errors import ArgumentError
from fastdit.search import Operators, Settings, seeds
from fastdit.search.evolve import evolve
from fastdit.search.front import hypervolume, non_dominated, on_axes
from fastdit.search.surrogate import Surrogate, propose
from search_fakes import COST, FACTS, GENOME, HARM, STEPS, WORK, FakeWorkers

DENSE = (FACTS["costs"]["macs"],)
OPERATORS = Operators.of("step")


def schedules(count: int, seed: int) -> np.ndarray:
    """Random vectors of all densities, step 0 computing, none the uncached run."""
    rng = np.random.default_rng(seed)
    vectors = rng.random((count, GENOME.size)) < rng.uniform(0.1, 0.95, (count, 1))
    vectors[:, : len(GENOME.components)] = True
    return vectors[[GENOME.reused(vector) > 0 for vector in vectors]]


def worth(vectors: np.ndarray) -> np.ndarray:
    """Mean loss and cost on the axes, by the closed forms of the fake model."""
    reused = ~np.array([GENOME.effective(vector) for vector in vectors])
    loss = (reused @ HARM.T).mean(axis=1)
    return on_axes(np.column_stack([loss, ~reused @ COST]), DENSE, True)


def proposed(measured, children, values, operators, generations) -> np.ndarray:
    seen = {GENOME.key(vector) for vector in measured}
    reference = (values[:, 0].max(), 1.0)
    return propose(GENOME, children, measured, seen, values, reference, operators, generations)


def rows(vectors: np.ndarray) -> np.ndarray:
    return vectors.reshape(len(vectors), STEPS, -1)


def test_it_predicts_costs_and_losses_that_it_never_saw():
    known, unseen = schedules(80, 0), schedules(200, 1)
    surrogate, truth = Surrogate(rows(known), worth(known)), worth(unseen)
    error = np.abs(surrogate(rows(unseen)) - truth)
    assert error[:, 1].max() < 0.02  # of the uncached cost, which is linear in the bits
    assert np.sqrt((error[:, 0] ** 2).mean()) < 0.25 * truth[:, 0].std()


def test_it_knows_that_less_reuse_than_any_measured_loses_less():
    known = schedules(80, 2)
    known = known[(~known).sum(axis=1) > 5]
    one = np.ones((1, GENOME.size), dtype=bool)
    one[0, 7] = False
    found = Surrogate(rows(known), worth(known))(rows(one))
    assert found[0, 0] < worth(known)[:, 0].min()


def test_age_counts_and_not_only_the_bits():
    """Two schedules with as many reused entries: the loss of the one whose reuse is older is predicted higher."""

    def aged(vectors):
        reused = ~rows(vectors)
        ages = np.zeros(reused.shape)
        for step in range(1, STEPS):
            ages[:, step] = np.where(reused[:, step], ages[:, step - 1] + 1, 0)
        return np.column_stack([np.log10((ages**2).sum(axis=(1, 2))), (~reused).mean(axis=(1, 2))])

    known = schedules(120, 3)
    young, old = (np.ones((1, STEPS, len(GENOME.components)), dtype=bool) for _ in range(2))
    young[0, [1, 3]] = False
    old[0, [1, 2]] = False
    found = Surrogate(rows(known), aged(known))(np.concatenate([young, old]))
    assert found[1, 0] > found[0, 0] + 0.1


def test_it_proposes_as_many_as_there_were_children_and_nothing_that_was_measured():
    measured, children = schedules(40, 4), schedules(12, 5)
    values = worth(measured)
    found = proposed(measured, children, values, OPERATORS, 4)
    assert found.shape == children.shape
    assert found.dtype == bool
    keys = [GENOME.key(vector) for vector in found]
    assert len(set(keys)) == len(keys)
    assert not set(keys) & {GENOME.key(vector) for vector in measured}
    assert all(GENOME.reused(vector) > 0 for vector in found)
    assert (found == proposed(measured, children, values, OPERATORS, 4)).all()
    other = proposed(measured, children, values, replace(OPERATORS, seed=1), 4)
    assert not np.array_equal(found, other)


def test_its_proposals_enlarge_the_front_more_than_the_children():
    measured, children = schedules(60, 6), schedules(12, 7)
    values = worth(measured)
    reference = (values[:, 0].max(), 1.0)
    found = proposed(measured, children, values, OPERATORS, 10)
    front = values[non_dominated(values)]
    before, plain, bred = (
        hypervolume(np.concatenate([front, more]), reference)
        for more in (front, worth(children), worth(found))
    )
    assert bred - before > 3 * (plain - before)


def test_a_search_finds_more_with_it_by_as_many_measurements(tmp_path):
    """Medians over seeds, on a model whose losses and costs are closed forms."""

    def volume(surrogate: int, seed: int) -> float:
        settings = Settings(5, 10, operators=Operators.of("step", seed), surrogate=surrogate)
        folder = tmp_path / f"{surrogate}-{seed}"
        found, ledger = evolve(folder, WORK, settings, (), FakeWorkers())
        ledger.close()
        assert len(found.archive.seen) <= 60
        return found.generations[-1]["hypervolume"]

    plain, bred = (np.median([volume(count, seed) for seed in range(3)]) for count in (0, 6))
    assert bred > 1.05 * plain


def test_without_anything_new_the_children_are_measured():
    """Two entries that can reuse: three schedules beside the uncached one, all of them measured."""
    vectors = np.ones((3, GENOME.size), dtype=bool)
    vectors[[0, 2], -1] = False
    vectors[[1, 2], -2] = False
    values = np.array([[-1.0, 0.9], [-0.9, 0.9], [-0.7, 0.8]])
    still = Operators(crossover_share=0.0, mutation_share=0.0)
    assert (proposed(vectors, vectors[:2], values, still, 2) == vectors[:2]).all()


def test_a_negative_number_of_generations_is_refused():
    with pytest.raises(ArgumentError, match="surrogate must not be negative, got -1"):
        Settings(surrogate=-1)


def test_seeds_are_measured_before_anything_is_predicted(tmp_path):
    settings = Settings(0, 8, surrogate=5)
    found, ledger = evolve(tmp_path, WORK, settings, (), FakeWorkers())
    ledger.close()
    first = seeds.first_population(GENOME, 8)
    assert [c.vector.tobytes() for c in found.archive.seen.values()] == [v.tobytes() for v in first]
