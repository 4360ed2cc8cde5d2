"""Which attention is the fastest on a GPU at some sizes: measured once, kept in a file, looked up in a run.

torch takes the first of its attentions that can serve a call, cuDNN's last, which is the fastest of them on some GPUs;
FlashAttention-3 is a package of its own, which diffusers calls. `Handle.tune_attention` measures those that are there
at the sizes of real runs and writes the file; a run only reads it. Without a file, at sizes unlike the measured ones,
and wherever the user has chosen an attention, the choice is torch's or theirs as ever.

The file is `attention-<GPU>.json` in ~/.cache/fastdit; FASTDIT_ATTENTION names another, or says "off".
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import threading
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from fastdit import files
from fastdit.backends.base import attention
from fastdit.checks import is_whole, one_of
from fastdit.errors import ArgumentError
from fastdit.ops.registry import whole

ENVIRONMENT, OFF = "FASTDIT_ATTENTION", "off"
FORMAT = "fastdit attention 1"
MOST_BYTES, MOST_SIZE = 1 << 20, 1 << 40
#: torch's choice, and by what name in torch it can be led to another
TORCH = "torch"
OF_TORCH: Mapping[str, SDPBackend] = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
#: by what name diffusers calls FlashAttention-3
FLASH_3 = "_flash_3"
NAMES = (TORCH, *OF_TORCH, FLASH_3)
#: sizes are like measured ones where the rows of the queries and the keys are within this factor
LIKE = 2.0
#: how torch came: an order that is another now was set by the user
_ORDER = torch._C._get_sdp_priority_order()
_lock = threading.Lock()
_met: ContextVar[set[Shape] | None] = ContextVar("met", default=None)


@dataclass(frozen=True)
class Shape:
    """The sizes of an attention: q [B, Q, H, d], k and v [B, S, G, d], without a mask."""

    dtype: str
    batch: int
    queries: int
    heads: int
    keys: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, query: Tensor, key: Tensor) -> Shape:
        """That of two tensors."""
        batch, queries, heads, head_dim = query.shape
        dtype = str(query.dtype).removeprefix("torch.")
        return cls(dtype, batch, queries, heads, key.shape[1], key.shape[2], head_dim)

    def unlike(self, other: Shape) -> float:
        """How far another is, in octaves of the query rows and the keys; infinite for other heads or dtypes."""
        heads = ("dtype", "heads", "kv_heads", "head_dim")
        if any(getattr(self, name) != getattr(other, name) for name in heads):
            return math.inf
        rows = math.log2(self.batch * self.queries / (other.batch * other.queries))
        keys = math.log2(self.keys / other.keys)
        return abs(rows) + abs(keys) if max(abs(rows), abs(keys)) <= math.log2(LIKE) else math.inf


class Choices:
    """What was measured on a GPU: shape -> microseconds by attention, one that could not run left out."""

    def __init__(self, gpu: str, times: Mapping[Shape, Mapping[str, float]]) -> None:
        self.gpu, self.times = gpu, dict(times)
        self._best: dict[Shape, str] = {}

    def best(self, shape: Shape) -> str:
        """The fastest attention at the measured sizes nearest to `shape`; torch's choice where none is like it."""
        found = self._best.get(shape)
        if found is None:
            near = min(self.times, key=shape.unlike, default=None)
            known = near is not None and shape.unlike(near) < math.inf
            found = self._best[shape] = fastest(self.times[near]) if known else TORCH
        return found

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all.

        Raises:
            ArgumentError: Its folder cannot be made.
        """
        files.make_folder(path.parent, ENVIRONMENT)
        rows = [asdict(shape) | {"us": dict(us)} for shape, us in self.times.items()]
        content = {"format": FORMAT, "gpu": self.gpu, "torch": torch.__version__, "measured": rows}
        made = path.with_name(f"{path.name}.{os.getpid()}")
        made.write_text(json.dumps(content, indent=1))
        os.replace(made, path)

    def __str__(self) -> str:
        counts: dict[str, int] = {}
        for times in self.times.values():
            counts[fastest(times)] = counts.get(fastest(times), 0) + 1
        told = ", ".join(f"{name} for {n}" for name, n in counts.items())
        return (
            f"{told} of {len(self.times)} measured sizes"
            if told
            else "not measured with this torch"
        )

    @classmethod
    def read(cls, path: Path, gpu: str) -> Choices:
        """What a file says; nothing where another GPU or torch was measured.

        Raises:
            ArgumentError: It is no such file, saying why.
        """
        try:
            given = files.parse(files.read_text(path, MOST_BYTES))
            if not isinstance(given, dict) or given.get("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT!r}")
            same = given.get("gpu") == gpu and given.get("torch") == torch.__version__
            times = dict(map(_measured, _list(given.get("measured"))))
        except (OSError, ValueError) as error:
            raise ArgumentError(
                f"the measured attentions in {path} cannot be read: {error}; delete it, or measure again"
            ) from error
        return cls(gpu, times if same else {})


def fastest(times: Mapping[str, float]) -> str:
    """The attention of the least time; torch's choice where no other is faster by more than noise."""
    best = min(times, key=lambda name: (times[name], NAMES.index(name)))
    noise = 1.02  # as a benchmark against itself may show
    return TORCH if TORCH in times and times[TORCH] <= noise * times[best] else best


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError("it has no list of what was measured")
    return value


def _measured(row: Any) -> tuple[Shape, dict[str, float]]:
    fields = Shape.__dataclass_fields__
    if not isinstance(row, dict) or row.keys() != {*fields, "us"}:
        raise ValueError("a measurement has other keys than it should")
    sizes = [row[name] for name in fields if name != "dtype"]
    if not isinstance(row["dtype"], str) or not all(
        is_whole(n) and 0 < n <= MOST_SIZE for n in sizes
    ):
        raise ValueError("the sizes of a measurement are not positive whole numbers")
    us = row["us"]
    if not isinstance(us, dict) or not us or not us.keys() <= set(NAMES):
        raise ValueError(f"times must be of {', '.join(NAMES)}")
    if not all(isinstance(t, (int, float)) and t > 0 for t in us.values()):
        raise ValueError("times are not positive numbers")
    return Shape(*(row[name] for name in fields)), us


# ---- in a run


def gpu_of(device: torch.device) -> str | None:
    """The name of a GPU; None for another device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def place_of(gpu: str) -> Path | None:
    """Where the file of a GPU is; None where it is off."""
    given = os.environ.get(ENVIRONMENT)
    if given:
        return None if given == OFF else Path(given)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "fastdit" / f"attention-{re.sub(r'[^A-Za-z0-9]+', '-', gpu)}.json"


@functools.cache
def choices(device: torch.device) -> Choices | None:
    """What was measured for a device, read once in a process; None without a file."""
    gpu = gpu_of(device)
    path = None if gpu is None else place_of(gpu)
    return None if path is None or not path.exists() else Choices.read(path, gpu)


def is_tuning() -> bool:
    """Whether attentions that are met in this thread or task are noted."""
    return _met.get() is not None


def chosen(query: Tensor, key: Tensor) -> str:
    """The attention that was measured to be the fastest for q [B, Q, H, d] and k [B, S, G, d]."""
    met = _met.get()
    if met is not None:
        met.add(Shape.of(query, key))
    found = choices(query.device)
    return TORCH if found is None else found.best(Shape.of(query, key))


@whole
def attend_by(name: str, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """[B, Q, H, d] over [B, S, G, d] by the attention of that name.

    One of torch's that cannot serve the call gives way to torch's next. So do all where the user has set an order of
    them, or disabled some.
    """
    one_of("attention", name, NAMES)
    if name == FLASH_3:
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        return dispatch_attention_fn(query, key, value, scale=scale, backend=FLASH_3)
    if name == TORCH:
        return attention(query, key, value, scale)
    first = OF_TORCH[name].value  # type: ignore[attr-defined]
    with (
        _lock
    ):  # the order is one for the process; `sdpa_kernel` sets it too, in a tenth of a millisecond
        if torch._C._get_sdp_priority_order() != _ORDER or not _all_enabled():
            return attention(query, key, value, scale)
        torch._C._set_sdp_priority_order([first, *(n for n in _ORDER if n != first)])
        try:
            return attention(query, key, value, scale)
        finally:
            torch._C._set_sdp_priority_order(_ORDER)


def _all_enabled() -> bool:
    of = torch.backends.cuda
    enabled = of.flash_sdp_enabled() and of.mem_efficient_sdp_enabled() and of.math_sdp_enabled()
    return enabled and of.cudnn_sdp_enabled()


# ---- measuring


class Tuning:
    """What `Handle.tune_attention` met, measured and wrote; `print` it when its `with` is over.

    Attributes:
        path: The file.
        times: Shape -> microseconds by attention.
    """

    def __init__(self, device: torch.device) -> None:
        gpu = gpu_of(device)
        if gpu is None:
            raise ArgumentError(f"tune_attention measures a GPU, but the model is on {device.type}")
        path = place_of(gpu)
        if path is None:
            raise ArgumentError(f"tune_attention has no file to write: {ENVIRONMENT} is {OFF!r}")
        self.device, self.gpu, self.path = device, gpu, path
        self.times: dict[Shape, dict[str, float]] = {}
        self._met: set[Shape] = set()

    def listen(self) -> Any:
        """Note the attentions that this thread or task meets, until :meth:`finish`."""
        return _met.set(self._met)

    def finish(self, token: Any, measures: bool) -> None:
        """Measure what was met, if all went well, and add it to the file."""
        _met.reset(token)
        if not measures:
            return
        shapes = sorted(self._met, key=lambda shape: tuple(asdict(shape).values()))
        self.times = {shape: measure(shape, self.device) for shape in shapes}
        before = choices(self.device)
        kept = {} if before is None else before.times
        Choices(self.gpu, {**kept, **self.times}).write(self.path)
        choices.cache_clear()

    def __str__(self) -> str:
        rows = [f"attentions of {self.gpu}, in {self.path}"]
        for shape, times in self.times.items():
            told = ", ".join(f"{name} {us:.0f} us" for name, us in times.items())
            rows.append(f"  {shape}: {fastest(times)} of {told}")
        return "\n".join(rows)


def measure(shape: Shape, device: torch.device, turns: int = 9) -> dict[str, float]:
    """Median microseconds of a call by each attention that runs there and is right."""
    new = {"dtype": getattr(torch, shape.dtype), "device": device}
    query = torch.randn(shape.batch, shape.queries, shape.heads, shape.head_dim, **new)
    kv = (shape.batch, shape.keys, shape.kv_heads, shape.head_dim)
    given = query, torch.randn(kv, **new), torch.randn(kv, **new), None
    able = [name for name in NAMES if _runs(name, given)]
    times: dict[str, list[float]] = {name: [] for name in able}
    for _ in range(turns):
        for name in able:
            times[name].append(microseconds(name, given, device))
    return {name: sorted(found)[turns // 2] for name, found in times.items()}


def _runs(name: str, given: tuple[Any, ...]) -> bool:
    """Whether an attention runs, and errs at most twice as much as torch's, on a part of the heads and queries."""
    query, key, value, _ = given
    part = query[:1, :256, : query.shape[2] // key.shape[2]]
    exact = attention(part.double(), key[:1, :, :1].double(), value[:1, :, :1].double(), None)

    def error(by: str) -> float:
        made = attend_by(by, *given)[:1, :256, : part.shape[2]]
        return float((made.double() - exact).abs().max())

    try:
        return error(name) <= 2 * error(TORCH) + torch.finfo(query.dtype).eps
    except (
        Exception
    ):  # one that is not installed, or not for this shape or device, says so in many ways
        return False


def microseconds(name: str, given: tuple[Any, ...], device: torch.device, calls: int = 10) -> float:
    """Of one call by the attention of that name on a GPU, of several in a row."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        begin.record()
        for _ in range(calls):
            attend_by(name, *given)
        end.record()
    end.synchronize()
    return 1000 * begin.elapsed_time(end) / calls
