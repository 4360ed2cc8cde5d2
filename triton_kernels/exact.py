"""Division and square root rounded as IEEE 754 says: `/` and `tl.rsqrt` are approximations on a GPU, some ulps off.

Once a row they cost nothing, and a row of equal elements has a mean of just that. And fp8, rounded once.
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


@triton.jit
def divided(x, by):
    """x / by in fp32."""
    return tl.div_rn(x, by)


@triton.jit
def fp8_bits(x):
    """fp32 as the bytes of e4m3fn: to nearest, ties to even, no further than its largest number; NaN stays NaN."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = (magnitude - (120 << 23) + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20
    # Under 2^-6, adding 2^14 aligns the value so that the adder itself rounds at 2^-9.
    aligned = magnitude.to(tl.float32, bitcast=True) + 16384.0
    tiny = aligned.to(tl.int32, bitcast=True) - 0x46800000
    finite = tl.where(magnitude < (121 << 23), tiny, tl.minimum(normal, 126))
    finite = finite | ((bits >> 24) & 0x80)
    return tl.where(magnitude > 0x7F800000, 127, finite).to(tl.uint8)
