"""What a transformer call costs the host, counted: Python frames against stock's, and launches of a reused step."""

from __future__ import annotations

import functools

import pytest

import fastdit
import host
from fastdit import RALU, RAS, Cached, Dense, Schedule
from oracle import random_bits

METHODS = {
    "dense": lambda: Dense(),
    "reused": lambda: Cached(Schedule.every(2)),
    "sparse": lambda: RAS(ratio=0.25, start=2, resets=(), align=1),
}
STEPS = 6
#: frames of a call, as a share of stock's
SHARES = {"dense": 0.4, "sparse": 0.5}
#: launches of a fully reused step: patch embedding, residuals, norm, projection and unpatching
LAUNCHES = 5


@functools.cache
def frames(name, method):
    """Of each call of a second run."""
    pipe = host.pipeline(name)
    if method != "stock":
        fastdit.patch(pipe, METHODS[method](), backend="cpu")
    return [sum(call.values()) for call in host.frames(name, pipe, STEPS)]


@functools.cache
def launches(name, method):
    """Of each call of a second run."""
    pipe = host.pipeline(name)
    fastdit.patch(pipe, METHODS[method](), backend="cpu")
    return host.launches(name, pipe, STEPS)


@pytest.mark.parametrize("method", SHARES)
@pytest.mark.parametrize("name", host.MODELS)
def test_frames_of_a_call(name, method):
    """The first calls of a run may prepare what the others use."""
    stock, found = frames(name, "stock")[-1], frames(name, method)
    assert max(found[2:]) <= SHARES[method] * stock, (found, stock)


@pytest.mark.parametrize("name", host.MODELS)
def test_a_reused_step(name):
    found = frames(name, "reused")[3::2]
    assert max(found) <= 350, found
    for call in launches(name, "reused")[3::2]:
        launched = sum(call.kernels.values())
        assert launched <= LAUNCHES, call.kernels


@pytest.mark.parametrize(
    ("name", "layers"), [("PixArt", 28 * 8 + 1), ("Lumina", 24 * 8 + 1), ("Wan", 40 * 8 + 1)]
)
def test_keys_of_the_prompt_are_made_once_a_run(name, layers):
    """Products of a block: four of its self-attention, two of the other without keys and values, the feed-forward's.

    Lumina's attentions share the last, and its feed-forward has three. Outside of the blocks is the projection of the
    output.
    """
    for call in launches(name, "dense")[1:]:
        assert call.kernels["aten::addmm"] + call.kernels["aten::mm"] == layers


class Still:
    """Captures nothing: what is left is the host's part of a replay."""

    nbytes = 0

    @staticmethod
    def serves(device):
        return True

    def most_bytes(self, device):
        return 1

    def warm(self, compute, device):
        return compute()

    def __call__(self, compute, device):
        return (lambda: None), compute()


def parts(pipe):
    """Attentions compute at each step, what follows them at every third, and is drawn through three values between."""
    layers = random_bits(pipe.transformer, 12, 0)
    for kind, bits in layers[0].items():
        bits[:] = [
            [["att" in name or step % 3 == 0 for name in layers[1][kind]]] for step in range(12)
        ]
    return Cached(Schedule.from_bits(*layers), order=2)


REPLAYED = {
    "dense": lambda pipe: Dense(),
    "every(2)": lambda pipe: Cached(Schedule.every(2)),
    "parts, order 2": parts,
    "RAS": lambda pipe: RAS(ratio=0.25, start=2, resets=(), align=1),
    "RALU": lambda pipe: RALU((4, 4, 4), (0.3, 0.45, 1.0), (5.0, 2.6, 2.2), 0.05, 0.3, "gradient"),
}


@pytest.mark.parametrize("method", REPLAYED)
@pytest.mark.parametrize("name", host.MODELS)
def test_a_replayed_call(name, method, monkeypatch):
    pipe = host.pipeline(name)
    resized = ("SD3", "SD3.5", "FLUX", "Qwen-Image", "FLUX.2", "Z-Image")
    if method == "RALU" and name not in resized:
        pytest.skip("its tokens have one size")
    monkeypatch.setattr("fastdit.runtime.capture.CudaCapture", Still)
    handle = fastdit.patch(pipe, REPLAYED[method](pipe), backend="cpu", graphs=True)
    host.draw(name, pipe, 12)
    found = [sum(call.values()) for call in host.frames(name, pipe, 12)]
    trace = handle.last_run().trace
    assert trace.replayed >= 12 - 3, str(trace)
    replays = sorted(found)[: trace.replayed]
    assert max(replays) <= 250, found


@pytest.mark.parametrize(
    ("name", "spared"),
    [("SD3", 24 * 4), ("FLUX", 19 * 4 + 38 * 2), ("PixArt", 28 * 2), ("Wan", 40 * 2)],
)
def test_fused_projections_are_one_product(name, spared):
    """`fuse_qkv_projections` makes one of three, of image and of text; PixArt's of the prompt are made once a run."""

    def products(fuses):
        pipe = host.pipeline(name)
        if fuses:
            pipe.transformer.fuse_qkv_projections()
        fastdit.patch(pipe, Dense(), backend="cpu")
        kernels = host.launches(name, pipe, 4)[-1].kernels
        return kernels["aten::addmm"] + kernels["aten::mm"]

    assert products(False) - products(True) == spared


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", host.MODELS)
def test_no_step_reads_a_value(name, method):
    """Beyond a run's first call nothing waits for a device."""
    for call in launches(name, method)[1:]:
        assert not call.seen["aten::_local_scalar_dense"], call.seen
