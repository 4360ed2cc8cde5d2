// One block takes one row and keeps it in registers, a few vectors of 16 bytes in each thread: x is
// read once. Traffic: 2 B K D elements, 4 with a branch, one more with a cache; scale, shift and
// gate stay in L2. In fp8 the row as it would be stored in T stays there for its largest magnitude,
// and what is written is a byte an element: the result of quantising what the op gives without.
//
// Variance takes two passes over the registers, never E[x^2] - m^2 about zero. The mean of the
// first is rounded, so the second also sums the deviations themselves: that remainder corrects mean
// and variance, and a row with mean 1e4 and deviation 1e-2 keeps its digits. The residual is the
// same fma and the same rounding as in gated_residual: both give the same bits.
#include <limits>

#include "launch.h"
#include "norm_modulate.h"
#include "reduce.h"
#include "vector.h"

namespace fd {
namespace cuda {
namespace {

constexpr int kMaxThreads = 512;
constexpr int kMaxVectors = 4;  // of a thread

// x + gate * branch, rounded to T as it is stored; the branch goes to the cache as it is.
template <class T, bool kAligned, bool kAnyWide>
__device__ __forceinline__ Words add_branch(const NormModulate& p, Words x, int64_t b, int64_t k,
                                            int64_t stored, int64_t i, int64_t n) {
  const Words branch = load<kAligned>(p.branch.row<T>(b, k) + i, n);
  Held<T, kAnyWide> gate = {};
  if (p.gate) gate = held<T, kAligned, kAnyWide>(p.gate, p.gate.wide, b, k, i, n);
  float sum[kElements<T>];
  to_floats<T>(x, sum);
  add<T>(branch, static_cast<bool>(p.gate), gate, sum);
  x = from_floats<T>(sum);
  store<kAligned>(p.x.row<T>(b, stored) + i, x, n);
  if (p.cache) store<kAligned>(p.cache.row<T>(b, stored) + i, branch, n);
  return x;
}

// y = y * (one + factor) + term, each where given.
template <class T, bool kAligned, bool kAnyWide>
__device__ __forceinline__ void affine(const Modulation& factor, float one, const Modulation& term,
                                       int64_t b, int64_t k, int64_t i, int64_t n, float* y) {
  float by[kElements<T>], plus[kElements<T>];
  if (factor) held<T, kAligned, kAnyWide>(factor, factor.wide, b, k, i, n).to(by);
  if (term) held<T, kAligned, kAnyWide>(term, term.wide, b, k, i, n).to(plus);
#pragma unroll
  for (int e = 0; e < kElements<T>; ++e) {
    if (factor && term) {
      y[e] = fmaf(y[e], one + by[e], plus[e]);
    } else if (factor) {
      y[e] *= one + by[e];
    } else if (term) {
      y[e] += plus[e];
    }
  }
}

// The largest magnitude among the first n elements, as an integer: infinity, and then NaN, are
// above all numbers.
template <class T>
__device__ __forceinline__ uint32_t largest_of(const Words& w, int n) {
  float value[kElements<T>];
  to_floats<T>(w, value);
  uint32_t largest = 0;
#pragma unroll
  for (int e = 0; e < kElements<T>; ++e) {
    if (e < n) largest = larger(largest, as_bits(value[e]) & 0x7fffffffu);
  }
  return largest;
}

// Division by one number, rounded like one to every fp8: a product with its inverse may miss a tie,
// which the remainder then corrects. By infinity it is 0 or NaN, by 0 it is 0.
struct Divisor {
  float by, inverse;

  __device__ __forceinline__ explicit Divisor(float number)
      : by(number < kInfinity ? number : 0.0f), inverse(number > 0.0f ? 1.0f / number : number) {}

  __device__ __forceinline__ float quotient(float x) const {
    const float near = x * inverse;
    return fmaf(fmaf(-near, by, x), inverse, near);
  }

  static constexpr float kInfinity = std::numeric_limits<float>::infinity();
};

// Vector v of a thread is number v * blockDim.x + threadIdx.x of the row. In fp8, and with
// modulations in fp32, a row takes all registers that there are for a block: with fewer some spill.
template <class T, int kVectors, bool kAligned, bool kFp8, bool kAnyWide>
__global__ void __launch_bounds__(kMaxThreads, kFp8 || kAnyWide ? 1 : 0)
    norm_modulate_kernel(const __grid_constant__ NormModulate p) {
  FD_SHARED(float, partial_mean, kMaxThreads / kWarp);
  FD_SHARED(float, partial_about, 2 * (kMaxThreads / kWarp));
  const int64_t b = blockIdx.x / static_cast<uint32_t>(p.shape.tokens);
  const int64_t k = blockIdx.x % static_cast<uint32_t>(p.shape.tokens);
  const int64_t stored = p.rows.at(b, k);
  const int width = static_cast<int>(p.shape.width);

  Words row[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int i = (v * blockDim.x + threadIdx.x) * kElements<T>;
    row[v] = {};
    if (i < width) row[v] = load<kAligned>(p.x.row<T>(b, stored) + i, width - i);
  }
  float mean = 0.0f;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int i = (v * blockDim.x + threadIdx.x) * kElements<T>;
    if (p.branch && i < width) {
      row[v] = add_branch<T, kAligned, kAnyWide>(p, row[v], b, k, stored, i, width - i);
    }
    float value[kElements<T>];
    to_floats<T>(row[v], value);
#pragma unroll
    for (int e = 0; e < kElements<T>; ++e) mean += p.rms ? value[e] * value[e] : value[e];
  }
  sum_over_block<1>(&mean, partial_mean);
  mean /= width;

  float rest = 0.0f, variance = mean;
  if (p.rms) {
    mean = 0.0f;
  } else {
    float about[2] = {0.0f, 0.0f};  // of the deviations from the rounded mean, and their squares
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int i = (v * blockDim.x + threadIdx.x) * kElements<T>;
      float value[kElements<T>];
      to_floats<T>(row[v], value);
#pragma unroll
      for (int e = 0; e < kElements<T>; ++e) {
        const float deviation = i + e < width ? value[e] - mean : 0.0f;
        about[0] += deviation;
        about[1] = fmaf(deviation, deviation, about[1]);
      }
    }
    sum_over_block<2>(about, partial_about);
    rest = about[0] / width;
    variance = about[1] / width - rest * rest;
    variance = variance < 0.0f ? 0.0f : variance;  // NaN stays
  }
  const float scale = __frsqrt_rn(variance + static_cast<float>(p.eps));
  uint32_t largest = 0;

#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int i = (v * blockDim.x + threadIdx.x) * kElements<T>;
    if (i >= width) break;
    float y[kElements<T>];
    to_floats<T>(row[v], y);
#pragma unroll
    for (int e = 0; e < kElements<T>; ++e) y[e] = (y[e] - mean - rest) * scale;
    affine<T, kAligned, kAnyWide>(p.weight, 0.0f, p.bias, b, k, i, width - i, y);
    affine<T, kAligned, kAnyWide>(p.scale, 1.0f, p.shift, b, k, i, width - i, y);
    const Words made = from_floats<T>(y);
    if constexpr (kFp8) {
      row[v] = made;
      largest = larger(largest, largest_of<T>(made, width - i));
    } else {
      store<kAligned>(p.out.row<T>(b, k) + i, made, width - i);
    }
  }
  if constexpr (kFp8) {
    FD_SHARED(uint32_t, partial_largest, kMaxThreads / kWarp);
    const float by = row_scale_of<T>(as_float(largest_of_block(largest, partial_largest)));
    if (threadIdx.x == 0) p.row_scale.row(b)[k] = by;
    const Divisor divisor(by);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int i = (v * blockDim.x + threadIdx.x) * kElements<T>;
      if (i >= width) break;
      float y[kElements<T>];
      to_floats<T>(row[v], y);
#pragma unroll
      for (int e = 0; e < kElements<T>; ++e) y[e] = divisor.quotient(y[e]);
      store_fp8<T, kAligned>(p.out.row<fp8>(b, k) + i, y, width - i);
    }
  }
}

template <class T>
bool all_aligned(const NormModulate& p) {
  bool yes = p.shape.width % kElements<T> == 0;
  for (const Operand* o : {&p.x, &p.out, &p.branch, &p.cache}) {
    yes = yes && (aligned<T>(*o) || (p.row_scale && o == &p.out));
  }
  for (const Modulation* m : {&p.scale, &p.shift, &p.weight, &p.bias, &p.gate}) {
    yes = yes && aligned<T>(*m, m->wide);
  }
  if (p.row_scale) {  // as many bytes as a vector has elements
    const int64_t number = reinterpret_cast<intptr_t>(p.out.data);
    yes = yes && (number | p.out.batch_stride | p.out.token_stride) % kElements<T> == 0;
  }
  return yes;
}

template <class T, int kVectors, bool kFp8, bool kAnyWide>
void launch(const NormModulate& p, int64_t vectors, void* stream) {
  const int64_t threads = (vectors + kVectors - 1) / kVectors;
  const dim3 grid(checked_rows(p.shape)), block((threads + kWarp - 1) / kWarp * kWarp);
  if (all_aligned<T>(p)) {
    FD_LAUNCH((norm_modulate_kernel<T, kVectors, true, kFp8, kAnyWide>), grid, block, stream, p);
  } else {
    FD_LAUNCH((norm_modulate_kernel<T, kVectors, false, kFp8, kAnyWide>), grid, block, stream, p);
  }
}

template <class T, int kVectors>
void launch(const NormModulate& p, int64_t vectors, void* stream) {
  if constexpr (sizeof(T) < sizeof(float)) {
    if (any_wide(p) && p.row_scale) return launch<T, kVectors, true, true>(p, vectors, stream);
    if (any_wide(p)) return launch<T, kVectors, false, true>(p, vectors, stream);
  }
  if (p.row_scale) return launch<T, kVectors, true, false>(p, vectors, stream);
  launch<T, kVectors, false, false>(p, vectors, stream);
}

// As few vectors a thread as it takes: many rows are in flight.
template <class T>
void launch(const NormModulate& p, void* stream) {
  const int64_t vectors = (p.shape.width + kElements<T> - 1) / kElements<T>;
  if (vectors <= kMaxThreads) return launch<T, 1>(p, vectors, stream);
  if (vectors <= 2 * kMaxThreads) return launch<T, 2>(p, vectors, stream);
  if (vectors <= kMaxVectors * kMaxThreads) return launch<T, kMaxVectors>(p, vectors, stream);
  throw std::invalid_argument("x: got a last dimension of " + std::to_string(p.shape.width) +
                              "; accepted is up to " +
                              std::to_string(kMaxVectors * kMaxThreads * kElements<T>));
}

}  // namespace

void norm_modulate(const NormModulate& p, const Target& target) {
  if (p.shape.batch * p.shape.tokens * p.shape.width == 0) return;
  launch_on(target, p.dtype, "norm_modulate",
            [&](auto zero) { launch<decltype(zero)>(p, target.stream); });
}

}  // namespace cuda
}  // namespace fd
