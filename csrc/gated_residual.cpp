// Compiled once per instruction set (FD_ISA). A few vectors of the row are held in registers while
// all branches are added to them, then rounded once: every operand is read once and nothing is
// written but out and the cache. Traffic: (k + 2) B K D elements, one more with a cache.
//
// out may be x: each element of x is read before the same element of out is written.
#include "gated_residual.h"

#include "simd.h"

namespace fd {
namespace FD_ISA {
namespace {

constexpr int kUnroll = 4;  // vectors at a time: independent sums, so that additions overlap

// Where the operands of one row begin.
template <class T>
struct Row {
  const T* x;
  int64_t x_step;
  T* out;
  int count;
  const T* branches[kMaxBranches];
  const T* gates[kMaxBranches];  // null: ungated
};

// A step other than 1 reads a transposed x: neighbouring rows share its cache lines.
template <class T>
FD_INLINE Vec load_x(const Row<T>& row, int64_t i, int64_t n) {
  if (row.x_step == 1) return load(row.x + i, n);
  Vec v = {};
  for (int64_t j = 0; j < n; ++j) v[j] = to_float(row.x[(i + j) * row.x_step]);
  return v;
}

template <class T>
void add_branches(const Row<T>& row, int64_t width) {
  int64_t i = 0;
  for (; i + kUnroll * kWidth <= width; i += kUnroll * kWidth) {
    Vec sum[kUnroll];
    for (int u = 0; u < kUnroll; ++u) sum[u] = load_x(row, i + u * kWidth, kWidth);
    for (int j = 0; j < row.count; ++j) {
      const T* branch = row.branches[j] + i;
      if (row.gates[j] != nullptr) {
        const T* gate = row.gates[j] + i;
        for (int u = 0; u < kUnroll; ++u) {
          sum[u] += load(gate + u * kWidth) * load(branch + u * kWidth);
        }
      } else {
        for (int u = 0; u < kUnroll; ++u) sum[u] += load(branch + u * kWidth);
      }
    }
    for (int u = 0; u < kUnroll; ++u) store(row.out + i + u * kWidth, sum[u]);
  }
  for (; i < width; i += kWidth) {
    const int64_t n = width - i < kWidth ? width - i : kWidth;
    Vec sum = load_x(row, i, n);
    for (int j = 0; j < row.count; ++j) {
      const Vec branch = load(row.branches[j] + i, n);
      sum += row.gates[j] != nullptr ? load(row.gates[j] + i, n) * branch : branch;
    }
    store(row.out + i, sum, n);
  }
}

template <class T>
void one_row(const GatedResidual& p, int64_t b, int64_t k) {
  const int64_t stored = p.rows.at(b, k);
  Row<T> row;
  row.x = p.x.row<T>(b, k);
  row.x_step = p.x_step;
  row.out = p.out.row<T>(b, k);
  row.count = p.count;
  for (int j = 0; j < p.count; ++j) {
    row.branches[j] = p.branches[j].row<T>(b, j == p.fresh ? k : stored);
    row.gates[j] = p.gates[j] ? p.gates[j].row<T>(b, k) : nullptr;
  }
  add_branches(row, p.shape.width);
  if (p.cache) {
    std::memcpy(p.cache.row<T>(b, stored), row.branches[p.fresh], p.shape.width * sizeof(T));
  }
}

template <class T>
void all_rows(const GatedResidual& p) {
  const int64_t count = p.shape.batch * p.shape.tokens;
#pragma omp parallel for schedule(static) num_threads(p.threads) if (p.threads > 1)
  for (int64_t r = 0; r < count; ++r) one_row<T>(p, r / p.shape.tokens, r % p.shape.tokens);
}

}  // namespace

void gated_residual(const GatedResidual& p) {
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
