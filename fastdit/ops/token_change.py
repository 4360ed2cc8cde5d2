"""How wrong the velocity kept for each token may be by now: its last change, per unit of noise level, times its age.

A token is a patch of a velocity field [B, gh, gw, ph, pw, C]; token i is the one at (i // gw, i % gw), N = gh gw. For
each there is kept the value that was computed last, the noise level it was computed at, and how fast it changed between
that computation and the one before:

* Where a token was computed in the step that is done, rate = |velocity - last| / |now - level|, with the Euclidean norm
  over its pixels and channels; then last = velocity and level = now. A value computed at the level of the one before
  replaces it and leaves the rate as it is: solvers of higher order compute twice at a level.
* The score of any token is rate * |coming - level|: the distance that its value, held since `level`, would be off at
  the level `coming` if it went on changing as it last did.

Begin with a level of NaN and a rate of infinity. Then a token has a score that is not finite until it was computed at
two levels, and `token_select` keeps it before all that have one.

All is fp32, the difference of fp64 velocities rounded to it. Two launches choose tokens of such scores: this one, then
`token_select` of `score.view(B, gh, gw, 1, 1, 1)` with metric "l2norm", no starvation and high = 0.

Bytes moved: the velocity, and `last` read and written, once; a few times B N words. Nothing waits for a device: the
levels are on it. It has no gradient: velocity is read as a constant.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdit.errors import ArgumentError
from fastdit.ops import checks
from fastdit.ops.registry import checked, define, op, resolve, traced

SCHEMA = (
    "token_change(Tensor velocity, Tensor(a!) last, Tensor(b!) rate, Tensor(c!) level, Tensor levels, "
    "Tensor? inverse, Tensor(d!) score, str? backend) -> ()"
)


@op
def token_change(
    velocity: Tensor,
    last: Tensor,
    rate: Tensor,
    level: Tensor,
    levels: Tensor,
    *,
    inverse: Tensor | None = None,
    score: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Note what the tokens computed in this step are, and score all of them for the next.

    Args:
        velocity: [B, gh, gw, ph, pw, C], floating, with any strides: of all tokens, those not computed as they were.
        last: like velocity, with any strides; written where a token was computed.
        rate: fp32 [B, N], written where a token was computed, unless at the level of its last value.
        level: fp32 [B, N], written where a token was computed.
        levels: fp32 [2], the noise level of the step that is done, and of the one that comes.
        inverse: int32 [B, N], the map of `token_select` for the step that is done: -1 where a token was not computed.
            None where all were.
        score: fp32 [B, N], where to write the scores; a new tensor by default.
        backend: a backend by name; None for FASTDIT_BACKEND or the automatic choice.

    Returns:
        `score`.

    Raises:
        ArgumentError: an argument has the wrong type, dtype, device, shape, stride or memory.
        BackendError: the backend that was named cannot serve this dtype or device.

    Example:
        >>> score = token_change(field, last, rate, level, levels[t : t + 2], inverse=inverse)
        >>> field = score.view(B, gh, gw, 1, 1, 1)
        >>> rows, inverse = token_select(field, drops, keep, starvation=0.0, metric="l2norm")
    """
    if isinstance(velocity, Tensor) and velocity.requires_grad:
        velocity = velocity.detach()
    if traced():
        score = torch.empty_like(rate) if score is None else score
        torch.ops.fastdit.token_change.default(
            velocity, last, rate, level, levels, inverse, score, backend
        )
        return score
    _check(velocity, last, rate, level, levels, inverse, score)
    if score is None:
        score = torch.empty_like(rate, memory_format=torch.contiguous_format)
    function = resolve("token_change", velocity.device, velocity.dtype, backend)
    function(velocity, last, rate, level, levels, inverse, score)
    return score


def _check(velocity, last, rate, level, levels, inverse, score) -> None:
    """`score` is None where it is yet to be allocated."""
    shape = checks.field("velocity", velocity)
    device, whole = velocity.device, (shape[0], shape[1] * shape[2])
    checks.like("last", last, velocity)
    written = [("last", last)]
    for name, t in (("rate", rate), ("level", level), ("score", score)):
        if t is not None or name != "score":
            checks.operand(name, t, whole, torch.float32, device)
            written.append((name, t))
    checks.operand("levels", levels, (2,), torch.float32, device)
    if inverse is not None:
        checks.operand("inverse", inverse, whole, torch.int32, device)
    for name, t in written:
        if t.requires_grad and torch.is_grad_enabled():
            raise ArgumentError(
                f"{name}: got a tensor that requires a gradient; accepted is none (it is written)"
            )
    read = (("velocity", velocity), ("levels", levels), ("inverse", inverse))
    checks.all_disjoint(written, read)


define(SCHEMA, checked("token_change", _check))
