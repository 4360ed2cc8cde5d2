// One thread takes 16 bytes of a row of the branches, adds all of them to up to four sums in fp32
// and rounds once: every branch is read once, and a warp reads 512 contiguous bytes of it. Traffic:
// (k + S) B K D elements; weights stay in L2.
#include "collapse.h"
#include "launch.h"
#include "vector.h"

namespace fd {
namespace cuda {
namespace {

constexpr int kGroup = 2;      // branches whose loads are under way at once: sums take registers
constexpr int kThreads = 384;  // about: whole rows of the models' widths fit 2 or 1 times

// The first n of as many values as a vector of T has, to another type.
template <class T, class Sum, bool kAligned>
__device__ __forceinline__ void store_sum(Sum* to, int64_t n, const float* values) {
#pragma unroll
  for (int i = 0; i < kElements<T>; i += kElements<Sum>) {
    store<kAligned>(to + i, from_floats<Sum>(values + i), n - i);
  }
}

// kWide: weights are fp32 beside 16 bits.
template <class T, class Sum, bool kAligned, bool kWide>
__global__ void __launch_bounds__(kThreads, 2)
    collapse_kernel(const __grid_constant__ Collapse p, uint32_t rows) {
  const uint32_t row = blockIdx.x * blockDim.y + threadIdx.y;
  if (row >= rows) return;
  const int64_t b = row / static_cast<uint32_t>(p.shape.tokens);
  const int64_t k = row % static_cast<uint32_t>(p.shape.tokens);
  for (int64_t i = threadIdx.x * kElements<T>; i < p.shape.width; i += blockDim.x * kElements<T>) {
    const int64_t n = p.shape.width - i;
    float sums[kMaxSums][kElements<T>] = {};
    if (p.accumulate) {
#pragma unroll
      for (int s = 0; s < kMaxSums; ++s) {
        if (s < p.sum_count) load_other<T, kAligned>(p.sums[s].row<Sum>(b, k) + i, n, sums[s]);
      }
    }
    for (int first = 0; first < p.count; first += kGroup) {
      Words branch[kGroup];
      Held<T, kWide> weight[kGroup];
#pragma unroll
      for (int g = 0; g < kGroup; ++g) {
        const int j = first + g;
        branch[g] = {};
        weight[g] = {};
        if (j < p.count) {
          branch[g] = load<kAligned>(p.branches[j].row<T>(b, k) + i, n);
          if (p.weights[j]) weight[g] = held<T, kAligned, kWide>(p.weights[j], kWide, b, k, i, n);
        }
      }
#pragma unroll
      for (int g = 0; g < kGroup; ++g) {
        const int j = first + g;
        if (j >= p.count) break;
        add<T>(branch[g], static_cast<bool>(p.weights[j]), weight[g], sums[0]);
#pragma unroll
        for (int s = 1; s < kMaxSums; ++s) {
          if (p.groups[j] == s) add<T>(branch[g], false, weight[g], sums[s]);
        }
      }
    }
#pragma unroll
    for (int s = 0; s < kMaxSums; ++s) {
      if (s < p.sum_count) store_sum<T, Sum, kAligned>(p.sums[s].row<Sum>(b, k) + i, n, sums[s]);
    }
  }
}

template <class T, class Sum>
bool all_aligned(const Collapse& p) {
  bool yes = p.shape.width % kElements<T> == 0;
  for (int j = 0; j < p.count; ++j) {
    yes = yes && aligned<T>(p.branches[j]) && aligned<T>(p.weights[j], p.wide);
  }
  for (int s = 0; s < p.sum_count; ++s) yes = yes && aligned<Sum>(p.sums[s]);
  return yes;
}

template <class T, class Sum, bool kWide>
void launch(const Collapse& p, void* stream) {
  const uint32_t rows = checked_rows(p.shape);
  const int64_t vectors = (p.shape.width + kElements<T> - 1) / kElements<T>;
  const uint32_t across = static_cast<uint32_t>(vectors < kThreads ? vectors : kThreads);
  const uint32_t down = kThreads / across;
  const dim3 grid((rows - 1) / down + 1), block(across, down);
  if (all_aligned<T, Sum>(p)) {
    FD_LAUNCH((collapse_kernel<T, Sum, true, kWide>), grid, block, stream, p, rows);
  } else {
    FD_LAUNCH((collapse_kernel<T, Sum, false, kWide>), grid, block, stream, p, rows);
  }
}

template <class T, class Sum>
void launch(const Collapse& p, void* stream) {
  if constexpr (sizeof(T) < sizeof(float)) {
    if (p.wide) return launch<T, Sum, true>(p, stream);
  }
  launch<T, Sum, false>(p, stream);
}

}  // namespace

void collapse(const Collapse& p, const Target& target) {
  if (p.shape.batch * p.shape.tokens * p.shape.width == 0) return;
  launch_on(target, p.dtype, "collapse", [&](auto zero) {
    using T = decltype(zero);
    p.sum_dtype == p.dtype ? launch<T, T>(p, target.stream) : launch<T, float>(p, target.stream);
  });
}

}  // namespace cuda
}  // namespace fd
