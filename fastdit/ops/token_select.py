"""Which K of N tokens stay active for the next step: sorted rows, and the inverse map.

A token is a patch of a velocity field [B, gh, gw, ph, pw, C], a view of any strides; token i is the
one at (i // gw, i % gw), N = gh gw. Its metric, in fp32, is the mean over its pixels of the sample
deviation over the channels (`std`, in two passes, 0 for a single channel) or of their Euclidean
norm (`l2norm`).

N - K tokens are dropped: first the `high` ones with the largest metric * exp(-starvation * drops),
then from the rest those with the smallest metric * exp(starvation * drops), where drops counts how
often a token was dropped before. So whoever was dropped is the less likely to be dropped again.

The order is total, hence K is exact and every backend finds the same rows from the same metrics:

* The metric, the factor (an exponential of fp64) and their product are fp32 values; starvation is
  rounded to fp32. A product that overflows, or is 0 * inf, is +inf.
* A token with a metric that is not finite (a NaN or infinity in it) is dropped after all that have
  one. With `max_age`, a token of that age or older is dropped after all younger ones, so only
  where there are more than K of them.
* Equals are dropped by index: from the last one down on the high side, from the first one up on
  the low side. That is a stable ascending sort, with the dropped ones taken off its two ends.

Source: the selection of RAS (arXiv 2502.10389), with the sign of the high side turned around: the
published one makes a dropped token more likely to be dropped again.

Bytes moved: the velocity once, and a few times B N words. Nothing waits for a device. It has no
gradient: velocity is read as a constant.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdit.backends.base import METRICS
from fastdit.errors import ArgumentError
from fastdit.ops import checks
from fastdit.ops.registry import checked, define, op, resolve, traced

LARGEST = torch.finfo(torch.float32).max
SCHEMA = (
    "token_select(Tensor velocity, Tensor(a!) drops, Tensor(b!)? age, int high, float starvation, "
    "str metric, int? max_age, Tensor(c!) rows, Tensor(d!) inverse, str? backend) -> ()"
)


@op
def token_select(
    velocity: Tensor,
    drops: Tensor,
    keep: int,
    *,
    age: Tensor | None = None,
    high: int = 0,
    starvation: float = 0.1,
    metric: str = "std",
    max_age: int | None = None,
    rows: Tensor | None = None,
    inverse: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Select the tokens that stay active, and count the others in `drops` and `age`.

    Args:
        velocity: [B, gh, gw, ph, pw, C], floating, with any strides.
        drops: int32 [B, N], how often each token was dropped; the dropped ones gain 1.
        keep: K, from 1 to N.
        age: int32 [B, N], steps since a token was active; 0 for the kept ones, 1 more for others.
        high: how many of the N - K are dropped for a large metric.
        starvation: how much each drop counts; any sign, finite in fp32.
        metric: "std" or "l2norm".
        max_age: tokens of this age are kept, from 1 up; needs `age`.
        rows: int32 [B, K], where to write the rows; a new tensor by default.
        inverse: int32 [B, N], where to write the inverse map; a new tensor by default.
        backend: a backend by name; None for FASTDIT_BACKEND or the automatic choice.

    Returns:
        `rows`, ascending in each sample, and `inverse`: the position in rows, -1 where dropped.

    Raises:
        ArgumentError: an argument has the wrong type, dtype, device, shape, stride, memory or value.
        BackendError: the backend that was named cannot serve this dtype or device.

    Example:
        >>> latents.shape  # [B, C, H, W]; N = (H // 2) (W // 2)
        >>> field = latents.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).permute(0, 2, 4, 3, 5, 1)
        >>> rows, inverse = token_select(field, drops, keep=2048)
        >>> packed.shape  # [B, N, 4 C], channels first in each token
        >>> field = packed.unflatten(2, (C, 2, 2)).unflatten(1, (gh, gw)).permute(0, 1, 2, 4, 5, 3)
    """
    if isinstance(velocity, Tensor) and velocity.requires_grad:
        velocity = velocity.detach()
    if traced():
        if rows is None:
            rows = _new(velocity, keep)
        else:  # the dispatched op takes K from them
            size = (velocity.shape[0], keep)
            checks.operand("rows", rows, size, torch.int32, velocity.device)
        inverse = _new(velocity, drops.shape[-1]) if inverse is None else inverse
        torch.ops.fastdit.token_select.default(
            velocity, drops, age, high, starvation, metric, max_age, rows, inverse, backend
        )
        return rows, inverse
    tokens = _check(velocity, drops, age, high, starvation, metric, max_age, rows, inverse, keep)
    if rows is None:
        rows = _new(velocity, keep)
    if inverse is None:
        inverse = _new(velocity, tokens)
    function = resolve("token_select", velocity.device, velocity.dtype, backend)
    function(velocity, drops, age, high, starvation, metric, max_age, rows, inverse)
    return rows, inverse


def _new(velocity: Tensor, width: int) -> Tensor:
    return velocity.new_empty((velocity.shape[0], width), dtype=torch.int32)


def _check(velocity, drops, age, high, starvation, metric, max_age, rows, inverse, keep) -> int:
    """N. `rows` and `inverse` are None where they are yet to be allocated."""
    shape = checks.field("velocity", velocity)
    batch, tokens, device = shape[0], shape[1] * shape[2], velocity.device
    checks.integer("keep", keep, 1, tokens)
    checks.integer("high", high, 0, tokens - keep)
    if metric not in METRICS:
        raise ArgumentError(f"metric: got {metric!r}; accepted is {' or '.join(METRICS)}")
    if not isinstance(starvation, (int, float)) or not abs(starvation) <= LARGEST:
        raise ArgumentError(f"starvation: got {starvation!r}; accepted is a number finite in fp32")
    if max_age is not None:
        checks.integer("max_age", max_age, 1, 2**31 - 1)
        if age is None:
            raise ArgumentError("age: got None with max_age; accepted is a tensor [B, N]")
    whole = (batch, tokens)
    given = {"drops": (drops, whole), "age": (age, whole)}
    given |= {"rows": (rows, (batch, keep)), "inverse": (inverse, whole)}
    before = [("velocity", velocity)]
    for name, (t, size) in given.items():
        if t is None and name != "drops":
            continue
        checks.operand(name, t, size, torch.int32, device)
        checks.alone(name, t, before)
        before.append((name, t))
    return tokens


def _check_dispatched(*given) -> None:
    *_, rows, _ = given  # which say K
    _check(*given, rows.shape[-1])


define(SCHEMA, checked("token_select", _check_dispatched))
