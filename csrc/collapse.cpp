// Compiled once per instruction set (FD_ISA). As gated_residual: a row takes its branches a few at
// a time, whole rows of each, so that memory is read in few long streams; the sums wait in fp32 in
// the first-level cache and are rounded once. Traffic: (k + S) B K D elements.
#include "collapse.h"

#include "simd.h"

namespace fd {
namespace FD_ISA {
namespace {

constexpr int kGroup = 4;           // branches at a time
constexpr int64_t kColumns = 2048;  // at a time: 8 KiB of each sum

template <class T, class Weight>
struct Row {
  int count;
  const T* branches[kMaxCollapsed];
  const Weight* weights[kMaxCollapsed];  // null: 1
  const uint8_t* groups;
};

// Add branches j to j + N, n columns of them from column i on, to kSums sums.
template <int N, int kSums, class T, class Weight>
void add(const Row<T, Weight>& row, int j, int64_t i, int64_t n, float (*partial)[kColumns]) {
  const T* branch[N];
  const Weight* weight[N];
  int group[N];
  for (int g = 0; g < N; ++g) {
    branch[g] = row.branches[j + g] + i;
    weight[g] = row.weights[j + g] == nullptr ? nullptr : row.weights[j + g] + i;
    group[g] = row.groups[j + g];
  }
  // by value: through references gcc reads every pointer again for each vector
  const auto vector = [=](int64_t at, int64_t width) FD_INLINE_LAMBDA {
    Vec sum[kSums];
    for (int s = 0; s < kSums; ++s) sum[s] = load(partial[s] + at, width);
    for (int g = 0; g < N; ++g) {
      const Vec value = load(branch[g] + at, width);
      if (weight[g] != nullptr) {
        sum[0] += load(weight[g] + at, width) * value;
      } else {
        sum[0] += value;
      }
      for (int s = 1; s < kSums; ++s) {
        if (group[g] == s) sum[s] += value;
      }
    }
    for (int s = 0; s < kSums; ++s) store(partial[s] + at, sum[s], width);
  };
  int64_t at = 0;
  for (; at + kWidth <= n; at += kWidth) vector(at, kWidth);
  if (at < n) vector(at, n - at);
}

template <int kSums, class T, class Weight>
void add_branches(const Row<T, Weight>& row, int64_t i, int64_t n, float (*partial)[kColumns]) {
  int j = 0;
  for (; j + kGroup <= row.count; j += kGroup) add<kGroup, kSums>(row, j, i, n, partial);
  for (; j < row.count; ++j) add<1, kSums>(row, j, i, n, partial);
}

// n columns of a sum, from where it is kept or to there.
template <class Sum>
void begin(const Sum* sums, int64_t n, float* partial) {
  for (int64_t at = 0; at < n; at += kWidth) {
    const int64_t width = n - at < kWidth ? n - at : kWidth;
    store(partial + at, load(sums + at, width), width);
  }
}

template <class Sum>
void finish(Sum* sums, int64_t n, const float* partial) {
  for (int64_t at = 0; at < n; at += kWidth) {
    const int64_t width = n - at < kWidth ? n - at : kWidth;
    store(sums + at, load(partial + at, width), width);
  }
}

template <class T, class Weight, class Sum>
void one_row(const Collapse& p, int64_t b, int64_t k) {
  Row<T, Weight> row;
  row.count = p.count;
  row.groups = p.groups;
  for (int j = 0; j < p.count; ++j) {
    row.branches[j] = p.branches[j].row<T>(b, k);
    row.weights[j] = p.weights[j] ? p.weights[j].row<Weight>(b, k) : nullptr;
  }
  float partial[kMaxSums][kColumns];
  for (int64_t i = 0; i < p.shape.width; i += kColumns) {
    const int64_t n = p.shape.width - i < kColumns ? p.shape.width - i : kColumns;
    for (int s = 0; s < kMaxSums && s < p.sum_count; ++s) {
      if (p.accumulate) {
        begin(p.sums[s].row<Sum>(b, k) + i, n, partial[s]);
      } else {
        std::memset(partial[s], 0, n * sizeof(float));
      }
    }
    switch (p.sum_count) {
      case 1:
        add_branches<1>(row, i, n, partial);
        break;
      case 2:
        add_branches<2>(row, i, n, partial);
        break;
      case 3:
        add_branches<3>(row, i, n, partial);
        break;
      case 4:
        add_branches<4>(row, i, n, partial);
        break;
    }
    for (int s = 0; s < p.sum_count; ++s) finish(p.sums[s].row<Sum>(b, k) + i, n, partial[s]);
  }
}

template <class T, class Weight, class Sum>
void all_rows(const Collapse& p) {
  const int64_t count = p.shape.batch * p.shape.tokens;
#pragma omp parallel for schedule(static) num_threads(p.threads) if (p.threads > 1)
  for (int64_t r = 0; r < count; ++r) {
    one_row<T, Weight, Sum>(p, r / p.shape.tokens, r % p.shape.tokens);
  }
}

}  // namespace

void collapse(const Collapse& p) {
  by_dtype(p.dtype, [&p](auto zero) {
    using T = decltype(zero);
    if (p.sum_dtype != p.dtype) {
      p.wide ? all_rows<T, float, float>(p) : all_rows<T, T, float>(p);
    } else {
      p.wide ? all_rows<T, float, T>(p) : all_rows<T, T, T>(p);
    }
  });
}

}  // namespace FD_ISA
}  // namespace fd
