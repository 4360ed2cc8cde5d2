// Compiled once per instruction set (FD_ISA). A row is read from memory once and from L1 afterwards:
// add the branch and store the row, sum, sum again about the mean, write y.
//
// The mean of the first pass is rounded, so the second pass also sums the deviations themselves and
// takes that remainder off: a row with mean 1e4 and deviation 1e-2 keeps its digits. Never
// E[x^2] - m^2. Sums run in 16 lanes in a fixed order, so the bits depend on neither the thread
// count nor the alignment.
#include "norm_modulate.h"

#include <cmath>

#include "element.h"

namespace fd {
namespace FD_ISA {
namespace {

constexpr int64_t kBlock = 512;
constexpr int kLanes = 16;

struct Moments {
  float mean = 0;       // of the first pass, rounded
  float remainder = 0;  // what is left of the mean of x - mean
  float scale = 0;      // 1 / sqrt(variance + eps)
};

// sum over i of term(x[i]), divided by n. What happens once a row is done in double: it costs nothing
// there, and leaves the lanes' own rounding as the only one.
template <class T, class Term>
double mean_of(const T* x, int64_t n, Term term) {
  float lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) lane[j] += term(to_float(x[i + j]));
  }
  for (int j = 0; i + j < n; ++j) lane[j] += term(to_float(x[i + j]));
  double sum = 0;
  for (int j = 0; j < kLanes; ++j) sum += lane[j];
  return sum / double(n);
}

template <class T>
Moments moments(const T* x, int64_t n, double eps, bool rms) {
  Moments m;
  if (rms) {
    const double square = mean_of(x, n, [](float v) { return v * v; });
    m.scale = float(1.0 / std::sqrt(square + eps));
    return m;
  }
  const float mean = float(mean_of(x, n, [](float v) { return v; }));
  const float rest = float(mean_of(x, n, [mean](float v) { return v - mean; }));
  const double variance =
      mean_of(x, n, [=](float v) { return (v - mean - rest) * (v - mean - rest); });
  m.mean = mean;
  m.remainder = rest;
  m.scale = float(1.0 / std::sqrt(variance + eps));
  return m;
}

// x = x + gate * branch, rounded as it is stored. x shares memory with neither.
template <class T>
void add_branch(T* __restrict__ x, const T* __restrict__ branch, const T* __restrict__ gate,
                int64_t n) {
  if (gate != nullptr) {
    for (int64_t i = 0; i < n; ++i) {
      x[i] = from_float<T>(to_float(x[i]) + to_float(gate[i]) * to_float(branch[i]));
    }
  } else {
    for (int64_t i = 0; i < n; ++i) x[i] = from_float<T>(to_float(x[i]) + to_float(branch[i]));
  }
}

template <class T>
void multiply(float* __restrict__ y, const T* __restrict__ by, float plus, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] *= plus + to_float(by[i]);
}

template <class T>
void add(float* __restrict__ y, const T* __restrict__ by, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] += to_float(by[i]);
}

template <class T>
void scale_and_shift(float* __restrict__ y, const T* __restrict__ scale,
                     const T* __restrict__ shift, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = y[i] * (1.0f + to_float(scale[i])) + to_float(shift[i]);
}

template <class T>
void write_row(const NormModulate& p, int64_t b, int64_t k, const T* x, const Moments& m) {
  T* out = p.out.row<T>(b, k);
  for (int64_t d = 0; d < p.shape.width; d += kBlock) {
    const int64_t n = p.shape.width - d < kBlock ? p.shape.width - d : kBlock;
    float y[kBlock];
    for (int64_t i = 0; i < n; ++i) {
      y[i] = (to_float(x[d + i]) - m.mean - m.remainder) * m.scale;
    }
    if (p.weight) multiply(y, p.weight.row<T>(b, k) + d, 0.0f, n);
    if (p.bias) add(y, p.bias.row<T>(b, k) + d, n);
    if (p.scale && p.shift) {
      scale_and_shift(y, p.scale.row<T>(b, k) + d, p.shift.row<T>(b, k) + d, n);
    } else if (p.scale) {
      multiply(y, p.scale.row<T>(b, k) + d, 1.0f, n);
    } else if (p.shift) {
      add(y, p.shift.row<T>(b, k) + d, n);
    }
    for (int64_t i = 0; i < n; ++i) out[d + i] = from_float<T>(y[i]);
  }
}

template <class T>
void all_rows(const NormModulate& p) {
  const int64_t count = p.shape.batch * p.shape.tokens;
  const int64_t width = p.shape.width;
#pragma omp parallel for schedule(static) num_threads(p.threads) if (p.threads > 1)
  for (int64_t r = 0; r < count; ++r) {
    const int64_t b = r / p.shape.tokens, k = r % p.shape.tokens;
    const int64_t stored = p.rows.at(b, k);
    T* x = p.x.row<T>(b, stored);
    if (p.branch) {
      const T* branch = p.branch.row<T>(b, k);
      add_branch(x, branch, p.gate ? p.gate.row<T>(b, k) : nullptr, width);
      if (p.cache) std::memcpy(p.cache.row<T>(b, stored), branch, width * sizeof(T));
    }
    write_row(p, b, k, x, moments(x, width, p.eps, p.rms));
  }
}

}  // namespace

void norm_modulate(const NormModulate& p) {
  switch (p.dtype) {
    case Dtype::kFloat32:
      return all_rows<float>(p);
    case Dtype::kBfloat16:
      return all_rows<bf16>(p);
    case Dtype::kFloat16:
      return all_rows<fp16>(p);
  }
}

}  // namespace FD_ISA
}  // namespace fd
