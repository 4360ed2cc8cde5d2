// Compiled once per instruction set (FD_ISA). A row is worked off in blocks that stay in L1: the sum
// of a block is kept in fp32 and rounded once, so every branch is read once and nothing is written
// but out and the cache. Traffic: (k + 2) B K D elements, one more with a cache.
//
// out may be x: each block of x is read in full before the same block of out is written.
#include "gated_residual.h"

#include "element.h"

namespace fd {
namespace FD_ISA {
namespace {

constexpr int64_t kBlock = 2048;  // 8 KiB of fp32 sums: inside any L1, long enough to prefetch

// sum += gate * branch. sum is the caller's local block, so it shares memory with neither.
template <class T>
void add(float* __restrict__ sum, const T* __restrict__ branch, const T* __restrict__ gate,
         int64_t n) {
  if (gate != nullptr) {
    for (int64_t i = 0; i < n; ++i) sum[i] += to_float(gate[i]) * to_float(branch[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) sum[i] += to_float(branch[i]);
  }
}

// sum = x. A step other than 1 reads a transposed x: neighbouring rows share its cache lines.
template <class T>
void load(float* __restrict__ sum, const T* __restrict__ x, int64_t step, int64_t n) {
  if (step == 1) {
    for (int64_t i = 0; i < n; ++i) sum[i] = to_float(x[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) sum[i] = to_float(x[i * step]);
  }
}

template <class T>
void row(const GatedResidual& p, int64_t b, int64_t k) {
  const int64_t stored = p.rows.at(b, k);
  const T* x = p.x.row<T>(b, k);
  T* out = p.out.row<T>(b, k);
  for (int64_t d = 0; d < p.shape.width; d += kBlock) {
    const int64_t n = p.shape.width - d < kBlock ? p.shape.width - d : kBlock;
    float sum[kBlock];
    load(sum, x + d * p.x_step, p.x_step, n);
    for (int j = 0; j < p.count; ++j) {
      const T* branch = p.branches[j].row<T>(b, j == p.fresh ? k : stored) + d;
      const T* gate = p.gates[j] ? p.gates[j].row<T>(b, k) + d : nullptr;
      add(sum, branch, gate, n);
      if (j == p.fresh && p.cache) {
        std::memcpy(p.cache.row<T>(b, stored) + d, branch, n * sizeof(T));
      }
    }
    for (int64_t i = 0; i < n; ++i) out[d + i] = from_float<T>(sum[i]);
  }
}

template <class T>
void all_rows(const GatedResidual& p) {
  const int64_t count = p.shape.batch * p.shape.tokens;
#pragma omp parallel for schedule(static) num_threads(p.threads) if (p.threads > 1)
  for (int64_t r = 0; r < count; ++r) row<T>(p, r / p.shape.tokens, r % p.shape.tokens);
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
