"""What all tests share: no network, one seed, few threads, and the backends to run on."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Iterator

# Before any import of transformers or diffusers: a test that would download fails instead.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# Processes that tests start run side by side: more threads than cores would spin waiting for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Interpreters that tests start do not import this checkout in place of the installed package.
os.environ.setdefault("PYTHONSAFEPATH", "1")

import pytest
import torch

import emulated
from fastdit import ops
from fastdit.ops import BACKENDS
from inputs import Runner


def backend_labels() -> list[str]:
    """Every backend that serves an op on this machine's CPU, each instruction set of the C++ one, and the
    CUDA kernels in the emulator."""
    labels = []
    for name, backend in BACKENDS.items():
        if not any(Runner(backend, name, op).dtypes() for op in ops.OPS):
            continue
        if name == "cpu":
            from fastdit import _C

            labels += [f"cpu-{isa}" for isa in _C.build_info()["isas"]]
        else:
            labels.append(name)
    return labels if emulated.unavailable() else [*labels, "cuda-emulated"]


def runner_of(label: str, op: str) -> Iterator[Runner]:
    """A Runner for one of :func:`backend_labels` and an op, while the generator waits.

    The test is skipped where the backend does not serve that op.
    """
    name, _, variant = label.partition("-")
    backend = emulated.emulated() if variant == "emulated" else BACKENDS[name]
    made = Runner(backend, label, op)
    if not made.dtypes():
        pytest.skip(str(backend.supports(op, torch.device("cpu"), torch.float32)))
    if variant in ("", "emulated"):
        yield made
    else:
        from fastdit import _C

        _C.set_isa(variant)
        yield made
        _C.set_isa("auto")


@pytest.fixture(params=backend_labels())
def runner(request):
    """A Runner for each backend and instruction set, in the tests of the ops that it serves."""
    op = request.module.__name__.rpartition(".")[2].removeprefix("test_")
    yield from runner_of(request.param, op)


@pytest.fixture(autouse=True)
def _reproducible():
    """The same seed for every test, and one thread: the machines that run this are small."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)  # which training sets
    left = torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    assert left, "the test left gradients switched off"


@pytest.fixture(autouse=True)
def _fp64_throughout(request):
    """Where a family casts parts of its model to fp32, tests of it lift that in fp64, which is then exact.

    Not where they say `casts`: those ask for its own bits.
    """
    tiny_models = sys.modules.get("tiny_models")  # of tests that draw
    named = getattr(request.node, "callspec", None)
    if tiny_models is None or named is None or request.node.get_closest_marker("casts"):
        yield
        return
    forms = (value for value in named.params.values() if isinstance(value, str))
    casts = any(form in tiny_models.FAMILIES and tiny_models.FAMILIES[form].casts for form in forms)
    with tiny_models.fp64_throughout() if casts else contextlib.nullcontext():
        yield


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What is imported stays: it is not looked through for garbage, here or in any test."""
    gc.disable()
    found = yield
    gc.freeze()
    gc.set_threshold(700, 10, 50)  # all of the rest seldom, since it grows little
    gc.enable()
    return found


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def unprogrammed(monkeypatch):
    """Every call runs the model's own forward: what stands in for a function is seen by all of them."""
    monkeypatch.setattr("fastdit.runtime.programmed.model_of", lambda call: None)
