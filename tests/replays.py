"""Runs under CUDA graphs, which tapes stand for: what they draw with, and what they leave."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_map

import fastdit
import tiny_models
from fastdit import RALU, RAS, Cached, Dense, Schedule
from fastdit.patch import handle_of
from oracle import random_bits
from tape import Tapes, ops_seen

STEPS = 6
MODES = ["warming up", "captured", "replayed", "replayed"]
#: families whose programs are known, and those that compute some of the tokens, or fewer, larger ones
NAMES = list(tiny_models.FAMILIES)
SPARSE = [name for name in tiny_models.forms("layouts") if name in NAMES]
RESIZED = tiny_models.forms("changes_resolution")
#: calls of a step
CALLS = {"flux": 2, "flux-dev": 2, "lumina2": 2, "qwen": 2, "wan": 2, "flux2-klein": 2}
CALLS["hunyuanvideo15"] = 2


@pytest.fixture
def tapes(monkeypatch):
    """What captures in place of CUDA."""
    made = Tapes()
    members = {"__new__": lambda cls: made, "serves": staticmethod(lambda device: True)}
    monkeypatch.setattr("fastdit.runtime.capture.CudaCapture", type("Stand", (), members))
    with ops_seen():
        yield made


def ras(**more):
    return RAS(**{"ratio": 0.5, "start": 2, "resets": (), "align": 1} | more)


def random_schedule(pipe, seed=0, **more):
    return Cached(Schedule.from_bits(*random_bits(pipe.transformer, STEPS, seed)), **more)


def ralu(pipe):
    return RALU((2, 2, 2), (0.3, 0.45, 1.0), (5.0, 2.6, 2.2), 0.05, 0.3, "gradient")


METHODS = {
    "dense": lambda pipe: [Dense()],
    "cached": lambda pipe: [random_schedule(pipe)],
    "forecast": lambda pipe: [random_schedule(pipe, 3, order=2)],
    "ras": lambda pipe: [ras()],
    "ras + cached": lambda pipe: [ras(), random_schedule(pipe, 1)],
    "ralu": lambda pipe: [ralu(pipe)],
    "ralu + cached": lambda pipe: [ralu(pipe), random_schedule(pipe, 1)],
}
CASES = [
    (name, method)
    for name, pipe in tiny_models.PIPELINES.items()
    for method in METHODS
    if pipe.family in NAMES
    and not ("ras" in method and pipe.family not in SPARSE)
    and not ("ralu" in method and pipe.family not in RESIZED)
    and not ("img2img" in name and method != "cached")
]


def draw(name, pipe, seed, **kwargs):
    """Latents of a run, each seed with other noise and another prompt."""
    size = {}
    if tiny_models.PIPELINES[name].family in RESIZED and "img2img" not in name:
        size = {"height": 16, "width": 24}
    given = tiny_models.arguments(name, seed=seed, **{"steps": STEPS} | size | kwargs)
    for key, value in given.items():
        if key.endswith("embeds"):
            given[key] = tree_map(lambda each: each + 0.1 * seed, value)
    return tiny_models.latents_of(pipe, given).clone()


def graphs_of(pipe):
    """(branch, program, ...) -> graph, of all sessions."""
    sessions = handle_of(pipe).last_run().patched.graphs.sessions.values()
    return {key: graph for session in sessions for key, graph in session.graphs.items()}


def mode_of(handle):
    return handle.report().graphs.partition(",")[0]


@pytest.fixture
def replayed(tapes):
    """A pipeline whose next run is a replay, its handle, and the same eager one's latents by seed."""

    def made(method="ras + cached", name="sd3", **kwargs):
        pipe = tiny_models.pipeline(name)
        fastdit.patch(pipe, *METHODS[method](pipe))
        eager = {seed: draw(name, pipe, seed, **kwargs) for seed in range(3)}
        handle = fastdit.patch(pipe, *METHODS[method](pipe), graphs=True)
        for seed in range(3):
            draw(name, pipe, seed, **kwargs)
        return pipe, handle, eager

    return made


def reference_of(pipe):
    """The same pipeline with the same methods, eager."""
    other = tiny_models.pipeline("sd3")
    fastdit.patch(other, *handle_of(pipe).last_run().patched.methods)
    return other


def loop(model, handle, seed, autocast_from=STEPS):
    """The velocities of a run."""
    timesteps, velocities = torch.linspace(1000, 100, STEPS), []
    given = {
        name: value + 0.1 * seed
        for name, value in tiny_models.call("sd3", 2).items()
        if isinstance(value, torch.Tensor)
    }
    latents = given["hidden_states"]
    with torch.no_grad(), handle.run(timesteps):
        for step, t in enumerate(timesteps):
            now = {"hidden_states": latents, "timestep": t.expand(2)}
            with torch.autocast("cpu", torch.bfloat16, enabled=step >= autocast_from):
                velocities.append(model(**given | now).sample)
            latents = latents - velocities[-1] / STEPS
            handle.advance()
    return velocities
