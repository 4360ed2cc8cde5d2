// Mean and deviation of a row, for the kernel files: compiled once per instruction set (FD_ISA).
//
// The mean of the first pass is rounded, so the second pass also sums the deviations themselves and
// takes that remainder off: a row with mean 1e4 and deviation 1e-2 keeps its digits. Never
// E[x^2] - m^2 about zero.
// Sums run in a fixed number of lanes in a fixed order, so the bits depend on neither the thread
// count nor the alignment.
#pragma once
#include <cmath>

#include "simd.h"

namespace fd {
namespace FD_ISA {
namespace {

constexpr int kUnroll = 4;  // vectors at a time: independent sums, so that additions overlap

struct Moments {
  float mean = 0;       // of the first pass, rounded
  float remainder = 0;  // what is left of the mean of x - mean
  float scale = 0;      // 1 / sqrt(variance + eps)
};

// The means over a row of kTerms functions of its elements: term(v, values) fills values for one
// vector. What happens once a row is done in double: it costs nothing there, and leaves the lanes'
// own rounding as the only one.
template <int kTerms, class T, class Term>
FD_INLINE void means_of(const T* x, int64_t n, Term term, double* means) {
  Vec lanes[kUnroll][kTerms] = {};
  Vec values[kTerms];
  int64_t i = 0;
  for (; i + kUnroll * kWidth <= n; i += kUnroll * kWidth) {
    for (int u = 0; u < kUnroll; ++u) {
      term(load(x + i + u * kWidth), values);
      for (int t = 0; t < kTerms; ++t) lanes[u][t] += values[t];
    }
  }
  for (; i < n; i += kWidth) {
    const int64_t left = n - i < kWidth ? n - i : kWidth;
    term(load(x + i, left), values);
    for (int t = 0; t < kTerms; ++t) lanes[0][t] += first(values[t], left);
  }
  for (int t = 0; t < kTerms; ++t) {
    double sum = 0;
    for (int u = 0; u < kUnroll; ++u) {
      for (int j = 0; j < kWidth; ++j) sum += lanes[u][t][j];
    }
    means[t] = sum / double(n);
  }
}

template <class T>
Moments moments(const T* x, int64_t n, double eps, bool rms) {
  Moments m;
  if (rms) {
    double square;
    means_of<1>(x, n, [](Vec v, Vec* values) FD_INLINE_LAMBDA { values[0] = v * v; }, &square);
    m.scale = float(1.0 / std::sqrt(square + eps));
    return m;
  }
  double mean, about[2];  // about the rounded mean: of the deviations and of their squares
  means_of<1>(x, n, [](Vec v, Vec* values) FD_INLINE_LAMBDA { values[0] = v; }, &mean);
  m.mean = float(mean);
  const auto deviations = [rounded = m.mean](Vec v, Vec* values) FD_INLINE_LAMBDA {
    values[0] = v - rounded;
    values[1] = values[0] * values[0];
  };
  means_of<2>(x, n, deviations, about);
  // The remainder is at most the rounding of the mean, so little cancels here.
  const double variance = about[1] - about[0] * about[0];
  m.remainder = float(about[0]);
  m.scale = float(1.0 / std::sqrt((variance < 0 ? 0 : variance) + eps));  // NaN stays
  return m;
}

// Vectors of a row one after the other, whole ones and then what is left: part(i, load, store).
template <class Part>
FD_INLINE void each_vector(int64_t width, Part part) {
  int64_t i = 0;
  for (; i + kWidth <= width; i += kWidth) {
    part(
        i, [](auto* p) FD_INLINE_LAMBDA { return load(p); },
        [](auto* p, Vec v) FD_INLINE_LAMBDA { store(p, v); });
  }
  if (i < width) {
    const int64_t n = width - i;
    part(
        i, [n](auto* p) FD_INLINE_LAMBDA { return load(p, n); },
        [n](auto* p, Vec v) FD_INLINE_LAMBDA { store(p, v, n); });
  }
}

}  // namespace
}  // namespace FD_ISA
}  // namespace fd
