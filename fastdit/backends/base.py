"""What a backend is: a name, a priority, a statement of what it can serve, and one function an op.

Arguments reach a backend checked (`fastdit/ops/checks.py`) and in the order of the op's schema. It
writes into the tensors it is given, returns nothing and allocates nothing that outlives the call.
Attention alone is here already: torch's own serves it wherever a backend has nothing better.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_BRANCHES = 128  # of one `gated_residual`, as csrc says
FP8 = torch.float8_e4m3fn  # of norm_modulate's quantised output
METRICS = ("std", "l2norm")  # of token_select


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Tensor | None = None
) -> Tensor:
    """[B, Q, H, d] over [B, S, G, d], by torch; `mask` [B, 1 or H, 1 or Q, S] is added to the products."""
    grouped = {"enable_gqa": True} if q.shape[2] != k.shape[2] else {}
    if grouped and mask is not None:  # on a GPU torch has both in its slowest attention alone
        k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for t in (k, v))
        grouped = {}
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, **grouped)
    return out.transpose(1, 2)


class Backend:
    """Base of all backends; the op functions below are the contract, not an implementation."""

    name: str
    priority: int  # the highest that supports an op, device and dtype is picked

    def supports(self, op: str, device: torch.device, dtype: torch.dtype) -> str | None:
        """None if the op can be served there, else the reason why it cannot; any dtype of torch may be asked for."""
        raise TypeError(f"backend {self.name} does not say what it supports")

    def gated_residual(
        self,
        x: Tensor,  # [B, K, D]
        branches: Sequence[Tensor],  # [B, K, D], or row stores [B, N, D] where rows is given
        gates: Sequence[
            Tensor | None
        ],  # [D], [B or 1, D] or [B or 1, K or 1, D], as all modulations; all fp32 beside 16 bits, or none
        fresh: int,  # the branch that is [B, K, D] under rows too; -1 for none
        cache: Tensor | None,  # [B, N, D], written at the active rows
        rows: Tensor | None,  # [B, K]
        out: Tensor,  # [B, K, D], written; may be x
        weights: Tensor | None = None,  # [branches] or [branches, B, K], fp32; None for ones
    ) -> None:
        """out = x + sum_i weights[i] * gates[i] * branches[i]; cache[rows] = branches[fresh]."""
        raise TypeError(f"backend {self.name} has no gated_residual")

    def norm_modulate(
        self,
        x: Tensor,  # [B, N, D], written at the active rows where branch is given
        scale: Tensor
        | None,  # as shift, weight, bias and gate: of x's dtype, or fp32 beside 16 bits
        shift: Tensor | None,
        weight: Tensor | None,  # [D]
        bias: Tensor | None,  # [D]
        eps: float,
        rms: bool,
        branch: Tensor | None,  # [B, K, D]
        gate: Tensor | None,
        cache: Tensor | None,  # [B, N, D], written at the active rows
        rows: Tensor | None,  # [B, K]
        out: Tensor,  # [B, K, D], written; in fp8 where row_scale is given
        row_scale: Tensor | None = None,  # fp32 [B, K], written
    ) -> None:
        """x[rows] += gate * branch; cache[rows] = branch; out = modulated norm of x[rows], over row_scale."""
        raise TypeError(f"backend {self.name} has no norm_modulate")

    def token_select(
        self,
        velocity: Tensor,  # [B, gh, gw, ph, pw, C], of any strides
        drops: Tensor,  # int32 [B, N], written
        age: Tensor | None,  # int32 [B, N], written
        high: int,
        starvation: float,  # rounded to fp32 by the backend
        metric: str,  # one of METRICS
        max_age: int | None,
        rows: Tensor,  # int32 [B, K], written
        inverse: Tensor,  # int32 [B, N], written
    ) -> None:
        """rows = the K tokens that stay active, ascending; the others are counted in drops."""
        raise TypeError(f"backend {self.name} has no token_select")

    def token_change(
        self,
        velocity: Tensor,  # [B, gh, gw, ph, pw, C], of any strides
        last: Tensor,  # like velocity, written where a token was computed
        rate: Tensor,  # fp32 [B, N], written where a token was computed
        level: Tensor,  # fp32 [B, N], written where a token was computed
        levels: Tensor,  # fp32 [2], of the step that is done and of the next
        inverse: Tensor | None,  # int32 [B, N], -1 where a token was not computed
        score: Tensor,  # fp32 [B, N], written
    ) -> None:
        """rate = |velocity - last| / |levels[0] - level|, last = velocity and level = levels[0] where a token was
        computed; score = rate |levels[1] - level|."""
        raise TypeError(f"backend {self.name} has no token_change")

    def qkv_prologue(
        self,
        q: Tensor,  # [B, K, H d]
        k: Tensor,  # [B, K, G d]
        v: Tensor,  # [B, K, G d]
        q_out: Tensor,  # [B, Q, H, d], written from token q_offset on
        k_cache: Tensor,  # [B, S, G, d], written at kv_offset + rows; G may be 0
        v_cache: Tensor,  # [B, S, G, d], written at kv_offset + rows
        rows: Tensor | None,  # [B, K]
        q_offset: int,
        kv_offset: int,
        norm: str | None,  # "rms", "rms_rounded", "rms_across" or "layer"
        q_weight: Tensor | None,  # [d], or [H d] for those across heads
        q_bias: Tensor | None,  # [H d], for "layer" only
        k_weight: Tensor | None,  # [d], or [G d]
        k_bias: Tensor | None,  # [G d], for "layer" only
        eps: float,
        cos: Tensor | None,  # fp32 [P, d / 2] or [B, P, d / 2]
        sin: Tensor | None,  # shaped like cos
    ) -> None:
        """q_out = rotated norm of q; the caches at their rows = rotated norm of k, and v."""
        raise TypeError(f"backend {self.name} has no qkv_prologue")

    def patchify(
        self,
        field: Tensor,  # [B, gh, gw, ph, pw, C], of any strides
        table: Tensor,  # int32 [B, n, 3]: level, y, x
        tokens: Tensor,  # [B, n, ph, pw, C], of any strides, written
    ) -> None:
        """tokens = the patch of the first cell of each."""
        raise TypeError(f"backend {self.name} has no patchify")

    def unpatchify(
        self,
        tokens: Tensor,  # [B, n, ph, pw, C], of any strides
        table: Tensor,  # int32 [B, n, 3]: level, y, x
        field: Tensor,  # [B, gh, gw, ph, pw, C], of any strides, written where a token covers it
    ) -> None:
        """field, at all cells of a token = that token."""
        raise TypeError(f"backend {self.name} has no unpatchify")

    def resolution_transition(
        self,
        x: Tensor,  # [B, n, C]
        table: Tensor,  # int32 [B, n, 3]: level, y, x
        rows: Tensor,  # [B, K], the tokens to split
        noise: Tensor,  # fp32 [B, n + 3 K, C], in the order of out
        scale: float,
        deviation: float,
        pull: float,  # what the mean of four siblings is multiplied by and added to each
        unsplit: float,
        raster: int | None,  # cells in a row; None: compact order
        out: Tensor,  # [B, n + 3 K, C], written
        out_table: Tensor,  # int32 [B, n + 3 K, 3], written
    ) -> None:
        """out = scale * x + deviation * z, with four children in the place of each of rows."""
        raise TypeError(f"backend {self.name} has no resolution_transition")

    def blend(
        self,
        fresh: Tensor,  # [B, K, D]
        cached: Tensor,  # [B, K, D]
        r: Tensor,  # fp32 scalar; may be fp64 where fresh is
        x: Tensor | None,  # [B, K, D]
        gate: Tensor | None,  # only with x
        blended: Tensor | None,  # [B, K, D], written; only with x
        out: Tensor,  # [B, K, D], written; may be x
    ) -> None:
        """blended = r fresh + (1 - r) cached; out = that, or x + gate * that."""
        raise TypeError(f"backend {self.name} has no blend")

    def blend_backward(
        self,
        grad: Tensor,  # [B, K, D], dL/dout
        fresh: Tensor | None,  # [B, K, D], given with grad_r
        cached: Tensor | None,  # [B, K, D], given with grad_r
        r: Tensor,
        gate: Tensor | None,
        grad_fresh: Tensor | None,  # [B, K, D], written
        grad_cached: Tensor | None,  # [B, K, D], written
        grad_r: Tensor | None,  # scalar like r, written
    ) -> None:
        """With g = gate * grad: grad_fresh = r g, grad_cached = (1 - r) g, and
        grad_r = sum g (fresh - cached), in an order that depends on the shape alone."""
        raise TypeError(f"backend {self.name} has no blend_backward")

    def collapse(
        self,
        branches: Sequence[Tensor],  # 1 to 64 of [B, K, D]
        weights: Sequence[Tensor | None],  # as the gates of gated_residual
        groups: Sequence[int],  # of each branch, below S
        accumulate: bool,  # onto what sums holds
        sums: Tensor,  # [S, B, K, D], written; in the branches' dtype or fp32
    ) -> None:
        """sums[0] = sum_i weights[i] * branches[i]; sums[g] = sum of the branches of group g."""
        raise TypeError(f"backend {self.name} has no collapse")

    def swiglu(
        self,
        gate: Tensor,  # [B, N, D]
        value: Tensor,  # [B, N, D]
        out: Tensor,  # [B, N, D], written; may be gate or value
    ) -> None:
        """out = silu(gate) * value."""
        raise TypeError(f"backend {self.name} has no swiglu")

    #: whether sparse_attention is a kernel of its own, and not torch's attention
    attends = False

    def outruns_torch(self, q: Tensor, k: Tensor) -> bool:
        """Whether that kernel was measured to be faster than torch's attention at these sizes, on this machine."""
        return False

    def sparse_attention(
        self,
        q: Tensor,  # [B, Q, H, d]
        k: Tensor,  # [B, S, G, d]
        v: Tensor,  # [B, S, G, d]
        scale: float,
        out: Tensor,  # [B, Q, H, d], written
    ) -> None:
        """out = softmax(scale q k^T) v."""
        out.copy_(attention(q, k, v, scale))
