// A block takes a row, or several backward, and a thread vectors of 16 bytes of it: every element
// is read once, blended in fp32 and rounded once. Traffic: 3 B K D elements forward, one more with
// x and one with blended; 4 backward, one more for the gradient of cached.
//
// The sum over all elements has two stages, in an order that depends on the shape alone: each block
// of the first kernel sums the rows it takes, one block of the second sums the blocks'.
//
// out may be x: a thread reads its elements of x before it writes the same elements of out.
#include "blend.h"
#include "launch.h"
#include "reduce.h"
#include "vector.h"

namespace fd {
namespace cuda {
namespace {

constexpr int kThreads = 384;     // at most: 12 warps
constexpr int kSumThreads = 256;  // of the second stage

template <class T, bool kAligned>
__device__ __forceinline__ void floats_at(const Operand& o, int64_t b, int64_t k, int64_t i,
                                          int64_t n, float* values) {
  to_floats<T>(load<kAligned>(o.row<T>(b, k) + i, n), values);
}

template <class T, bool kAligned>
__device__ __forceinline__ void put_at(const Operand& o, int64_t b, int64_t k, int64_t i, int64_t n,
                                       const float* values) {
  store<kAligned>(o.row<T>(b, k) + i, from_floats<T>(values), n);
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads) blend_kernel(const __grid_constant__ Blend p) {
  const float r = *p.r, rest = 1.0f - r;
  const int64_t b = blockIdx.x / static_cast<uint32_t>(p.shape.tokens);
  const int64_t k = blockIdx.x % static_cast<uint32_t>(p.shape.tokens);
  for (int64_t i = threadIdx.x * kElements<T>; i < p.shape.width; i += blockDim.x * kElements<T>) {
    const int64_t n = p.shape.width - i;
    float fresh[kElements<T>], cached[kElements<T>], x[kElements<T>], gate[kElements<T>];
    floats_at<T, kAligned>(p.fresh, b, k, i, n, fresh);
    floats_at<T, kAligned>(p.cached, b, k, i, n, cached);
    if (p.x) floats_at<T, kAligned>(p.x, b, k, i, n, x);
    if (p.gate) floats_at<T, kAligned>(p.gate, b, k, i, n, gate);
    float value[kElements<T>];
#pragma unroll
    for (int e = 0; e < kElements<T>; ++e) {
      // An operand of weight 0 may hold anything.
      const float mixed = fmaf(r, fresh[e], rest * cached[e]);
      value[e] = r == 1.0f ? fresh[e] : r == 0.0f ? cached[e] : mixed;
    }
    if (p.blended) put_at<T, kAligned>(p.blended, b, k, i, n, value);
    if (p.x) {
#pragma unroll
      for (int e = 0; e < kElements<T>; ++e) {
        value[e] = p.gate ? fmaf(gate[e], value[e], x[e]) : x[e] + value[e];
      }
    }
    put_at<T, kAligned>(p.out, b, k, i, n, value);
  }
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    blend_backward_kernel(const __grid_constant__ BlendBackward p, uint32_t rows) {
  FD_SHARED(float, of_warp, kThreads / kWarp);
  const float r = *p.r, rest = 1.0f - r;
  float sum = 0.0f;
  for (uint32_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const int64_t b = row / static_cast<uint32_t>(p.shape.tokens);
    const int64_t k = row % static_cast<uint32_t>(p.shape.tokens);
    for (int64_t i = threadIdx.x * kElements<T>; i < p.shape.width;
         i += blockDim.x * kElements<T>) {
      const int64_t n = p.shape.width - i;
      float g[kElements<T>], gate[kElements<T>], fresh[kElements<T>], cached[kElements<T>];
      floats_at<T, kAligned>(p.grad, b, k, i, n, g);
      if (p.gate) floats_at<T, kAligned>(p.gate, b, k, i, n, gate);
      if (p.grad_r != nullptr) {
        floats_at<T, kAligned>(p.fresh, b, k, i, n, fresh);
        floats_at<T, kAligned>(p.cached, b, k, i, n, cached);
      }
      float of_fresh[kElements<T>], of_cached[kElements<T>];
#pragma unroll
      for (int e = 0; e < kElements<T>; ++e) {
        if (p.gate) g[e] *= gate[e];
        of_fresh[e] = r * g[e];
        of_cached[e] = rest * g[e];
        if (p.grad_r != nullptr) sum = fmaf(g[e], fresh[e] - cached[e], sum);
      }
      if (p.grad_fresh) put_at<T, kAligned>(p.grad_fresh, b, k, i, n, of_fresh);
      if (p.grad_cached) put_at<T, kAligned>(p.grad_cached, b, k, i, n, of_cached);
    }
  }
  if (p.grad_r == nullptr) return;
  sum_over_block<1>(&sum, of_warp);
  if (threadIdx.x == 0) p.partial[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kSumThreads)
    sum_kernel(const float* partial, uint32_t count, float* result) {
  FD_SHARED(float, of_warp, kSumThreads / kWarp);
  float sum = 0.0f;
  for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) sum += partial[i];
  sum_over_block<1>(&sum, of_warp);
  if (threadIdx.x == 0) *result = sum;
}

template <class T>
bool all_aligned(const Blend& p) {
  bool yes = p.shape.width % kElements<T> == 0;
  for (const Operand* o : {&p.fresh, &p.cached, &p.x, &p.gate, &p.blended, &p.out}) {
    yes = yes && aligned<T>(*o);
  }
  return yes;
}

template <class T>
bool all_aligned(const BlendBackward& p) {
  bool yes = p.shape.width % kElements<T> == 0;
  for (const Operand* o : {&p.grad, &p.fresh, &p.cached, &p.gate, &p.grad_fresh, &p.grad_cached}) {
    yes = yes && aligned<T>(*o);
  }
  return yes;
}

// Whole warps for a row.
template <class T>
dim3 block_of(const Shape& shape) {
  const int64_t vectors = (shape.width + kElements<T> - 1) / kElements<T>;
  return dim3(vectors < kThreads ? (vectors + kWarp - 1) / kWarp * kWarp : kThreads);
}

template <class T>
void launch(const Blend& p, void* stream) {
  const dim3 grid(checked_rows(p.shape)), block = block_of<T>(p.shape);
  if (all_aligned<T>(p)) {
    FD_LAUNCH((blend_kernel<T, true>), grid, block, stream, p);
  } else {
    FD_LAUNCH((blend_kernel<T, false>), grid, block, stream, p);
  }
}

template <class T>
void launch(const BlendBackward& p, void* stream) {
  const uint32_t rows = checked_rows(p.shape);
  const uint32_t blocks = rows < kPartials ? rows : kPartials;
  if (rows > 0 && p.shape.width > 0) {
    const dim3 grid(blocks), block = block_of<T>(p.shape);
    if (all_aligned<T>(p)) {
      FD_LAUNCH((blend_backward_kernel<T, true>), grid, block, stream, p, rows);
    } else {
      FD_LAUNCH((blend_backward_kernel<T, false>), grid, block, stream, p, rows);
    }
  }
  if (p.grad_r == nullptr) return;
  const uint32_t count = p.shape.width > 0 ? blocks : 0;
  FD_LAUNCH(sum_kernel, dim3(1), dim3(kSumThreads), stream, p.partial, count, p.grad_r);
}

}  // namespace

void blend(const Blend& p, const Target& target) {
  if (p.shape.batch * p.shape.tokens * p.shape.width == 0) return;
  launch_on(target, p.dtype, "blend", [&](auto zero) { launch<decltype(zero)>(p, target.stream); });
}

void blend_backward(const BlendBackward& p, const Target& target) {
  launch_on(target, p.dtype, "blend_backward",
            [&](auto zero) { launch<decltype(zero)>(p, target.stream); });
}

}  // namespace cuda
}  // namespace fd
