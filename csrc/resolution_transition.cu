// A block takes one token. All of its threads search `rows` for it, with the same loads, and so
// know where it goes; then a thread takes an element, and all four that share noise: the siblings
// of a channel, or the pixels of the child that the element becomes. Their mean needs no other
// thread. x, the noise and the output are touched once. Nothing is counted beforehand and no block
// waits for another, so compaction is one launch.
#include "cuda_port.h"
#include "launch.h"
#include "resolution_transition.h"

namespace fd {
namespace cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 256;

template <class T>
__device__ __forceinline__ void stay(const ResolutionTransition& p, int64_t b, int64_t i,
                                     const Place& place, int64_t compact) {
  const int64_t row = out_row(p, place, compact);
  const T* x = p.x.row<T>(b, i);
  const float* noise = p.noise.row<float>(b, row);
  T* out = p.out.row<T>(b, row);
  const float by = p.deviation * p.unsplit;
  for (int c = threadIdx.x; c < p.shape.width; c += blockDim.x) {
    out[c] = from_float<T>(fmaf(p.scale, to_float(x[c]), by * noise[c]));
  }
  if (threadIdx.x == 0) p.out_table.set(b, row, place);
}

template <class T>
__device__ __forceinline__ void split(const ResolutionTransition& p, int64_t b, int64_t i,
                                      const Place& place, int64_t compact) {
  int64_t row[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const Place child = child_of(place, k);
    row[k] = out_row(p, child, compact + k);
    if (threadIdx.x == 0) p.out_table.set(b, row[k], child);
  }
  const T* x = p.x.row<T>(b, i);
  for (int c = threadIdx.x; c < p.shape.width; c += blockDim.x) {
    const float value = p.scale * to_float(x[c]);
    float eps[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) eps[k] = p.noise.row<float>(b, row[k])[c];
    const float shared = 0.25f * p.pull * ((eps[0] + eps[1]) + (eps[2] + eps[3]));
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      p.out.row<T>(b, row[k])[c] = from_float<T>(fmaf(p.deviation, eps[k] + shared, value));
    }
  }
}

template <class T>
__device__ __forceinline__ void split_pixels(const ResolutionTransition& p, int64_t b, int64_t i,
                                             const Place& place, int64_t compact) {
  const T* x = p.x.row<T>(b, i);
  for (int c = threadIdx.x; c < p.shape.width; c += blockDim.x) {
    const int k = c % 4;  // the pixel, and the child that it becomes
    const Place child = child_of(place, k);
    const int64_t row = out_row(p, child, compact + k);
    const float* eps = p.noise.row<float>(b, row) + c - k;
    T* out = p.out.row<T>(b, row) + c - k;
    const float value = p.scale * to_float(x[c]);
    const float shared = 0.25f * p.pull * ((eps[0] + eps[1]) + (eps[2] + eps[3]));
#pragma unroll
    for (int j = 0; j < 4; ++j) out[j] = from_float<T>(fmaf(p.deviation, eps[j] + shared, value));
    if (c == k) p.out_table.set(b, row, child);
  }
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    resolution_transition_kernel(const __grid_constant__ ResolutionTransition p) {
  const uint32_t tokens = static_cast<uint32_t>(p.shape.tokens);
  const int64_t b = blockIdx.x / tokens, i = blockIdx.x % tokens;
  const int64_t before = split_before(p, b, i);
  const Place place = p.table.at(b, i);
  if (before < p.split && p.rows.at(b, before) == i) {
    const int64_t compact = tokens - p.split + 4 * before;
    p.pixelwise ? split_pixels<T>(p, b, i, place, compact) : split<T>(p, b, i, place, compact);
  } else {
    stay<T>(p, b, i, place, i - before);
  }
}

template <class T>
void launch(const ResolutionTransition& p, void* stream) {
  const int64_t whole = (p.shape.width + kWarp - 1) / kWarp * kWarp;
  const dim3 grid(checked_rows(p.shape)), block(whole < kMaxThreads ? whole : kMaxThreads);
  FD_LAUNCH(resolution_transition_kernel<T>, grid, block, stream, p);
}

}  // namespace

void resolution_transition(const ResolutionTransition& p, const Target& target) {
  if (p.shape.batch * p.shape.tokens == 0) return;
  launch_on(target, p.dtype, "resolution_transition",
            [&](auto zero) { launch<decltype(zero)>(p, target.stream); });
}

}  // namespace cuda
}  // namespace fd
