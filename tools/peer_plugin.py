"""The pytest plugin of tools/peer_tests.py: what a test of diffusers constructs is patched, and outcomes are recorded.

PEER_MODE names the methods (or "stock"), PEER_TARGET what is patched ("pipelines" or "models"), PEER_RESULT the file
that is written. A refusal by `patch` is raised where the test constructs, so that the test fails with it.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import json
import os
import random
import sys
import textwrap
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Before the conftest of the tests puts the source of their own checkout in front.
import diffusers
import numpy as np
import pytest
import torch

MODE = os.environ["PEER_MODE"]
TARGET = os.environ["PEER_TARGET"]

TRANSFORMERS = (
    "DiTTransformer2DModel",
    "Flux2Transformer2DModel",
    "FluxTransformer2DModel",
    "HunyuanVideo15Transformer3DModel",
    "Lumina2Transformer2DModel",
    "LuminaNextDiT2DModel",
    "PixArtTransformer2DModel",
    "QwenImageTransformer2DModel",
    "SD3Transformer2DModel",
    "WanTransformer3DModel",
    "WanVACETransformer3DModel",
    "ZImageTransformer2DModel",
)
PIPELINES = (
    "DiT",
    "Flux",
    "HunyuanVideo15",
    "Lumina",
    "PixArt",
    "QwenImage",
    "StableDiffusion3",
    "Wan",
    "ZImage",
)
OTHER_PIPELINES = ("FluxPriorRedux",)
#: elements of every output that are kept to be compared with another mode's
SAMPLES = 16

_results: dict[str, dict[str, Any]] = {}
_record: dict[str, Any] = {}
_patched: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
#: how many calls deep in what constructs models that are not to be patched, or not yet
_quiet = 0


def methods() -> tuple[Any, ...]:
    """What PEER_MODE names."""
    import fastdit

    if MODE == "dense":
        return ()
    if MODE == "every2":
        return (fastdit.Cached(fastdit.Schedule.every(2)),)
    if MODE == "ras":
        return (fastdit.RAS(ratio=0.5, start=1, resets=(), align=1),)
    raise ValueError(f"no mode {MODE!r}")


def pytest_configure(config: pytest.Config) -> None:
    sys.path.insert(0, str(config.rootpath))
    helpers = importlib.import_module("tests.testing_utils")
    if helpers.torch_device == "cpu":
        # Most of what they mark passes on a CPU; the rest fails there stock, and so proves nothing.
        for name in ("require_accelerator", "require_torch_accelerator"):
            setattr(helpers, name, lambda test: test)
    if TARGET == "models":
        for name in TRANSFORMERS:
            _watch_model(getattr(diffusers, name))
    else:
        for name in dir(diffusers):
            ours = name.startswith(PIPELINES) and not name.startswith(OTHER_PIPELINES)
            if ours and name.endswith("Pipeline"):
                _watch_pipeline(getattr(diffusers, name))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    global _record
    _record = {"patched": 0, "outputs": []}
    item.user_properties.append(("peer", _record))
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[Any]:
    report = yield
    if report.failed and call.excinfo is not None and "error" not in _record:
        error = call.excinfo.value
        _record["error"] = type(error).__name__
        _record["assertion"] = isinstance(error, AssertionError)
        frames = [entry for entry in call.excinfo.traceback if "tests" in Path(entry.path).parts]
        _record["numbers"] = any(holds_numbers(entry.frame.code.raw) for entry in frames)
        _record["refusal"] = is_refusal(error)
        _record["message"] = " ".join(str(error).split())[:300]
        _record["traceback"] = str(report.longrepr)[-4000:]
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    result = _results.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0})
    result["seconds"] += report.duration
    # What its authors expect to fail may pass, and proves nothing either way.
    outcome = "skipped" if hasattr(report, "wasxfail") else report.outcome
    if outcome == "failed" or (outcome == "skipped" and result["outcome"] == "passed"):
        result["outcome"] = outcome
    result.update(dict(report.user_properties).get("peer", {}))
    if report.skipped and isinstance(report.longrepr, tuple):
        result["message"] = str(report.longrepr[-1])


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):
        Path(os.environ["PEER_RESULT"]).write_text(json.dumps(_results, indent=1))


def holds_numbers(function: Any) -> bool:
    """Whether a function has a list of three floats or more, as what a stock model computed once."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):  # code that was compiled from no file, or a part of a line
        return False
    lists = [node for node in ast.walk(tree) if isinstance(node, (ast.List, ast.Tuple))]
    return any(sum(map(_is_float, node.elts)) >= 3 for node in lists)


def is_refusal(error: BaseException | None) -> bool:
    """Whether fastdit refused, here or in what this was raised from. What an op says of its arguments is no refusal:
    whoever called it should have refused, in words that its user knows."""
    if MODE == "stock" or error is None:
        return False
    import fastdit

    if isinstance(error, fastdit.ArgumentError):
        module = _raised_in(error)
        return not module.startswith(("fastdit.ops", "fastdit.backends"))
    return isinstance(error, fastdit.FastDiTError) or is_refusal(error.__cause__)


def _is_of(made: Any, cls: type) -> bool:
    """Whether an object is of the very class, also while fastdit has put a subclass of its name in its place."""
    own = type(made)
    return own is cls or (own.__mro__[1] is cls and own.__name__ == cls.__name__)


def _raised_in(error: BaseException) -> str:
    """The module that raised an error."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else trace.tb_frame.f_globals.get("__name__", "")


def _is_float(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp):
        node = node.operand
    return isinstance(node, ast.Constant) and isinstance(node.value, float)


@contextmanager
def _quietly() -> Iterator[None]:
    global _quiet
    _quiet += 1
    try:
        yield
    finally:
        _quiet -= 1


def _patch(target: Any, transformer: torch.nn.Module) -> None:
    """Patch once: a second pipeline around the same transformer is a sibling, as `from_pipe` makes them."""
    if MODE == "stock" or transformer in _patched:
        return
    import fastdit

    with _quietly():
        fastdit.patch(target, *methods())
    _patched.add(transformer)
    _record["patched"] = _record.get("patched", 0) + 1


def _watch_pipeline(cls: type) -> None:
    construct, call = cls.__init__, cls.__call__

    @functools.wraps(construct)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        transformer = getattr(self, "transformer", None)
        if _is_of(self, cls) and type(transformer).__name__ in TRANSFORMERS:
            _patch(self, transformer)

    @functools.wraps(call)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = call(self, *args, **kwargs)
        if _is_of(self, cls):
            _keep(output, getattr(self, "transformer", None))
        return output

    cls.__init__, cls.__call__ = __init__, __call__


def _watch_model(cls: type) -> None:
    construct, call, load = cls.__init__, cls.__call__, cls.from_pretrained.__func__

    @functools.wraps(construct)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        if _is_of(self, cls) and not _quiet:
            _patch(self, self)

    @functools.wraps(load)
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        with _quietly():
            loaded = load(cls, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        _patch(model, model)
        return loaded

    @functools.wraps(call)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = call(self, *args, **kwargs)
        _keep(output, self)
        return output

    cls.__init__, cls.__call__ = __init__, __call__
    cls.from_pretrained = classmethod(from_pretrained)


def _keep(output: Any, model: Any) -> None:
    """Keep a few evenly spread elements of what a pipeline or a model returned."""
    while isinstance(output, (list, tuple, dict)) and len(output):
        output = output[0] if isinstance(output, (list, tuple)) else next(iter(output.values()))
    if isinstance(output, torch.Tensor):
        if output.device.type == "meta":
            return
        output = output.detach().double().cpu().numpy()
    flat = np.asarray(output, dtype=np.float64).ravel()
    picked = flat[np.linspace(0, flat.size - 1, SAMPLES).astype(int)] if flat.size else flat
    parameters = model.parameters() if isinstance(model, torch.nn.Module) else ()
    half = any(p.is_floating_point() and p.element_size() < 4 for p in parameters)
    kept = {"shape": np.shape(output), "half": half, "samples": picked.tolist()}
    _record.setdefault("outputs", []).append(kept)
