"""Division and square root rounded as IEEE 754 says: `/` and `tl.rsqrt` are approximations on a GPU, some ulps off.

Once a row they cost nothing, and a row of equal elements has a mean of just that.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mean_of(total, COUNT: tl.constexpr):
    """fp32 `total` over COUNT."""
    return tl.div_rn(total, COUNT * 1.0)


@triton.jit
def inverse_root(x):
    """1 / sqrt(x) in fp32."""
    return tl.div_rn(1.0, tl.sqrt_rn(x))
