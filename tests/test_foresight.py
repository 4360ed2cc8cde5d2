"""Plans foreseen from unpatched runs: exact where no output depends on the ones before, and what moves lower."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

import tiny_models
from fastdit.patch import find_adapter
from fastdit.schedules.forecast import last_nodes, weights
from fastdit.search.foresight import Foresight
from fastdit.search.quantiles import Watched, quantile_schedule
from fastdit.search.told import told_of_steps
from tiny_models import generate

STEPS = 8
SIGMAS = [1.0, 0.95, 0.89, 0.81, 0.7, 0.56, 0.38, 0.2, 0.0]


def velocities(pictures=3):
    """[steps, pictures, 5], curved in sigma; no picture is like another."""
    rng = np.random.default_rng(0)
    shapes = rng.normal(size=(4, pictures, 5))
    sigmas = np.array(SIGMAS[:-1])[:, None, None]
    return shapes[0] + shapes[1] * sigmas + shapes[2] * sigmas**2 + shapes[3] * np.cos(5 * sigmas)


def euler(outputs, computed, orders):
    """Where a run ends that draws what it does not compute, from zero."""
    at, made = np.zeros(outputs.shape[1:]), []
    for step in range(STEPS):
        if step in computed:
            made.append(step)
            output = outputs[step]
        else:
            nodes = last_nodes(made, SIGMAS, orders[step])
            own = weights([SIGMAS[node] for node in nodes], SIGMAS[step])
            output = sum(w * outputs[node] for w, node in zip(own, nodes, strict=True))
        at = at + (SIGMAS[step + 1] - SIGMAS[step]) * output
    return at


@pytest.mark.parametrize(
    ("computed", "orders"),
    [
        (tuple(range(STEPS)), 1),
        ((0, 2, 4, 6), 0),
        ((0, 2, 5), 1),
        ((0, 1, 3), (0, 0, 2, 0, 1, 2, 0, 1)),
    ],
)
def test_a_run_whose_outputs_depend_on_nothing_is_foreseen(computed, orders):
    outputs = velocities()
    solution = np.random.default_rng(1).normal(size=outputs.shape[1:])
    off = euler(outputs, range(STEPS), ()) - solution
    foresight = Foresight.of(SIGMAS, outputs, off)
    each = (orders,) * STEPS if isinstance(orders, int) else orders
    expected = np.linalg.norm(euler(outputs, computed, each) - solution, axis=1)
    np.testing.assert_allclose(np.exp(foresight.losses((computed, orders))), expected, rtol=1e-9)


def test_moves_lower_the_error_and_keep_the_number_of_steps():
    outputs = velocities()
    foresight = Foresight.of(SIGMAS, outputs, np.full(outputs.shape[1:], 1e-3))
    start = (0, 1, 2, 3), 1
    line = foresight.improved(start)
    assert line[1] == 1
    assert len(line[0]) == 4
    assert line[0][0] == 0
    repeats = foresight.improved(((0, 2, 5), 0))
    mixed = foresight.improved((repeats[0], (0,) * STEPS), (0, 1, 2))
    assert set(mixed[1]) > {0}
    assert foresight.losses(mixed).mean() < foresight.losses(repeats).mean()
    losses = [foresight.losses(place).mean() for place in (start, line)]
    assert losses[0] > losses[1]
    for index, by in ((i, by) for i in range(1, 4) for by in (-2, -1, 1, 2)):  # the bottom
        moved = line[0][index] + by
        if 0 < moved < STEPS and moved not in line[0]:
            other = tuple(sorted({*line[0], moved} - {line[0][index]})), 1
            assert foresight.losses(other).mean() >= losses[1] - 1e-9


def test_how_far_outputs_move():
    outputs = velocities()
    moved = Foresight.of(SIGMAS, outputs, outputs[0]).moved()
    assert moved[0] == 0
    far = np.linalg.norm(outputs[3] - outputs[2], axis=1) / np.linalg.norm(outputs[2], axis=1)
    assert moved[3] == pytest.approx(far.sum())


# ---- components


def test_the_components_that_change_least_are_reused():
    pipe = tiny_models.pipeline("sd3")
    adapter = find_adapter(pipe.transformer)
    spec = adapter.spec(pipe.transformer)
    watched = Watched(spec, adapter.blocks(pipe.transformer))
    outputs = []
    attention = pipe.transformer.transformer_blocks[1].attn
    hook = attention.register_forward_hook(lambda *given: outputs.append(given[2][0].clone()))
    with watched.running(pipe.scheduler):
        generate(pipe, "sd3", steps=STEPS)
    hook.remove()
    assert "step" not in pipe.scheduler.__dict__
    assert not any(len(module._forward_hooks) for module in pipe.transformer.modules())
    found = watched.changes["transformer_blocks", 1, "attn"]
    far = [0.0] + [float((b - a).norm() / b.norm()) for a, b in itertools.pairwise(outputs)]
    assert found == pytest.approx(far)
    schedule = quantile_schedule(watched.changes, spec, STEPS, 0.5)
    changes = np.array(list(watched.changes.values()))[:, 2:]
    (kind,) = spec.kinds
    layer = schedule.layers[kind.name]
    assert (~layer.bits).sum() == (changes < np.quantile(changes, 0.5)).sum() > 0
    assert layer.bits[:2].all()


def test_a_scheduler_s_own_step_comes_back():
    """Also one that somebody put on the instance, and where the run breaks off."""

    def mine(output, timestep, sample):
        return (sample / output,)

    scheduler, seen = SimpleNamespace(step=mine), []
    with told_of_steps(scheduler, lambda *told: seen.append(told)):
        assert scheduler.step(2, 0, 6) == (3,)
    with pytest.raises(ZeroDivisionError), told_of_steps(scheduler, print):
        scheduler.step(0, 0, 1)
    assert scheduler.step is mine
    assert seen == [(2, 6, 3)]
