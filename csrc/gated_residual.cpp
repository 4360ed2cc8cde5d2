// Compiled once per instruction set (FD_ISA). A row takes its branches a few at a time, whole rows
// of each, so that memory is read in few long streams; the sums wait in fp32 in the first-level
// cache and are rounded once. Every operand is read once and nothing is written but out and the
// cache. Traffic: (k + 2) B K D elements, one more with a cache.
//
// out may be x: each element of x is read before the same element of out is written.
#include "gated_residual.h"

#include "simd.h"

namespace fd {
namespace FD_ISA {
namespace {

constexpr int kGroup = 4;  // branches at a time: few enough for the processor to read ahead in each
constexpr int kChunk = 4096;  // columns at a time: 16 KiB of sums
constexpr int kUnroll = 2;    // vectors at a time: independent sums, so that additions overlap

// Where the operands of one row begin; gates are of T, or of fp32.
template <class T, class Gate>
struct Row {
  const T* x;
  int64_t x_step;
  T* out;
  int count;
  const T* branches[kMaxBranches];
  const Gate* gates[kMaxBranches];  // null: ungated
  float weights[kMaxBranches];
};

// A step other than 1 reads a transposed x: neighbouring rows share its cache lines.
template <class T>
FD_INLINE Vec load_x(const T* x, int64_t step, int64_t n) {
  if (step == 1) return load(x, n);
  Vec v = {};
  for (int64_t j = 0; j < n; ++j) v[j] = to_float(x[j * step]);
  return v;
}

// The sums of n columns from column i on; they begin as x and end as out.
template <class T, class Gate, bool kWeighted>
struct Sums {
  const Row<T, Gate>& row;
  float* partial;
  int64_t i, n;

  // Add branches j to j + N.
  template <int N>
  void add(int j) const {
    const T* branch[N];
    const Gate* gate[N];
    float weight[N];
    for (int g = 0; g < N; ++g) {
      branch[g] = row.branches[j + g] + i;
      gate[g] = row.gates[j + g] == nullptr ? nullptr : row.gates[j + g] + i;
      weight[g] = kWeighted ? row.weights[j + g] : 1.0f;
    }
    const T* x = row.x + i * row.x_step;
    T* out = row.out + i;
    const bool first = j == 0, last = j + N == row.count;
    const int64_t step = row.x_step;
    float* kept = partial;
    // by value: through references gcc reads every pointer again for each vector
    const auto vector = [=](int64_t at, int64_t width) FD_INLINE_LAMBDA {
      Vec sum = first ? load_x(x + at * step, step, width) : load(kept + at, width);
      for (int g = 0; g < N; ++g) {
        Vec value = load(branch[g] + at, width);
        if (kWeighted) value *= weight[g];
        if (gate[g] != nullptr) {
          sum += load(gate[g] + at, width) * value;  // one fma, as in norm_modulate
        } else {
          sum += value;
        }
      }
      if (last) {
        store(out + at, sum, width);
      } else {
        store(kept + at, sum, width);
      }
    };
    int64_t at = 0;
    for (; at + kUnroll * kWidth <= n; at += kUnroll * kWidth) {
      for (int u = 0; u < kUnroll; ++u) vector(at + u * kWidth, kWidth);
    }
    for (; at < n; at += kWidth) vector(at, n - at < kWidth ? n - at : kWidth);
  }
};

template <class T, class Gate, bool kWeighted>
void add_branches(const Row<T, Gate>& row, int64_t width) {
  float partial[kChunk];
  for (int64_t i = 0; i < width; i += kChunk) {
    const int64_t n = width - i < kChunk ? width - i : kChunk;
    const Sums<T, Gate, kWeighted> sums = {row, partial, i, n};
    int j = 0;
    for (; j + kGroup <= row.count; j += kGroup) sums.template add<kGroup>(j);
    switch (row.count - j) {
      case 3:
        sums.template add<3>(j);
        break;
      case 2:
        sums.template add<2>(j);
        break;
      case 1:
        sums.template add<1>(j);
        break;
    }
  }
}

template <class T, class Gate, bool kWeighted>
void one_row(const GatedResidual& p, int64_t b, int64_t k) {
  const int64_t stored = p.rows.at(b, k);
  Row<T, Gate> row;
  row.x = p.x.row<T>(b, k);
  row.x_step = p.x_step;
  row.out = p.out.row<T>(b, k);
  row.count = p.count;
  for (int j = 0; j < p.count; ++j) {
    row.branches[j] = p.branches[j].row<T>(b, j == p.fresh ? k : stored);
    row.gates[j] = p.gates[j] ? p.gates[j].row<Gate>(b, k) : nullptr;
    if (kWeighted) row.weights[j] = p.weights ? p.weights.at(j, b * p.shape.tokens + k) : 1.0f;
  }
  add_branches<T, Gate, kWeighted>(row, p.shape.width);
  if (p.cache) {
    std::memcpy(p.cache.row<T>(b, stored), row.branches[p.fresh], p.shape.width * sizeof(T));
  }
}

template <class T, class Gate, bool kWeighted>
void all_rows(const GatedResidual& p) {
  const int64_t count = p.shape.batch * p.shape.tokens;
#pragma omp parallel for schedule(static) num_threads(p.threads) if (p.threads > 1)
  for (int64_t r = 0; r < count; ++r)
    one_row<T, Gate, kWeighted>(p, r / p.shape.tokens, r % p.shape.tokens);
}

}  // namespace

void gated_residual(const GatedResidual& p) {
  by_dtype(p.dtype, [&p](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) < sizeof(float)) {
      if (p.wide) return all_rows<T, float, true>(p);  // one form of it, with weights of 1
    }
    p.weights ? all_rows<T, T, true>(p) : all_rows<T, T, false>(p);
  });
}

}  // namespace FD_ISA
}  // namespace fd
