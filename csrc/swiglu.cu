// One thread takes 16 bytes of a row of the gate and of the value, multiplies in fp32 and rounds
// once: every element is read once, and a warp reads 512 contiguous bytes of each. Traffic: 3 B K D
// elements.
//
// silu(g) is g e / (1 + e) under 0 and g / (1 + e) from there, with e = exp(-|g|): nothing
// overflows.
//
// out may be gate or value: a thread reads its elements of both before it writes the same elements.
#include "launch.h"
#include "swiglu.h"
#include "vector.h"

namespace fd {
namespace cuda {
namespace {

constexpr int kThreads = 384;  // about: whole rows of the models' widths fit 2 or 1 times

__device__ __forceinline__ float silu(float g) {
  const float e = expf(as_float(as_bits(g) | 0x80000000u));  // of -|g|
  return g * (g < 0.0f ? e : 1.0f) / (1.0f + e);
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    swiglu_kernel(const __grid_constant__ Swiglu p, uint32_t rows) {
  const uint32_t row = blockIdx.x * blockDim.y + threadIdx.y;
  if (row >= rows) return;
  const int64_t b = row / static_cast<uint32_t>(p.shape.tokens);
  const int64_t k = row % static_cast<uint32_t>(p.shape.tokens);
  const T *gates = p.gate.row<T>(b, k), *values = p.value.row<T>(b, k);
  T* out = p.out.row<T>(b, k);
  for (int64_t i = threadIdx.x * kElements<T>; i < p.shape.width; i += blockDim.x * kElements<T>) {
    const int64_t n = p.shape.width - i;
    const Words gate_words = load<kAligned>(gates + i, n);
    const Words value_words = load<kAligned>(values + i, n);
    float gate[kElements<T>], value[kElements<T>];
    to_floats<T>(gate_words, gate);
    to_floats<T>(value_words, value);
#pragma unroll
    for (int e = 0; e < kElements<T>; ++e) value[e] *= silu(gate[e]);
    store<kAligned>(out + i, from_floats<T>(value), n);
  }
}

template <class T>
bool all_aligned(const Swiglu& p) {
  return p.shape.width % kElements<T> == 0 && aligned<T>(p.gate) && aligned<T>(p.value) &&
         aligned<T>(p.out);
}

template <class T>
void launch(const Swiglu& p, void* stream) {
  const uint32_t rows = checked_rows(p.shape);
  const int64_t vectors = (p.shape.width + kElements<T> - 1) / kElements<T>;
  const uint32_t across = static_cast<uint32_t>(vectors < kThreads ? vectors : kThreads);
  const uint32_t down = kThreads / across;
  const dim3 grid((rows - 1) / down + 1), block(across, down);
  if (all_aligned<T>(p)) {
    FD_LAUNCH((swiglu_kernel<T, true>), grid, block, stream, p, rows);
  } else {
    FD_LAUNCH((swiglu_kernel<T, false>), grid, block, stream, p, rows);
  }
}

}  // namespace

void swiglu(const Swiglu& p, const Target& target) {
  if (p.shape.batch * p.shape.tokens * p.shape.width == 0) return;
  launch_on(target, p.dtype, "swiglu",
            [&](auto zero) { launch<decltype(zero)>(p, target.stream); });
}

}  // namespace cuda
}  // namespace fd
