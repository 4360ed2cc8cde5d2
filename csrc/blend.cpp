// Compiled once per instruction set (FD_ISA). Rows one after the other, every operand read once.
// The sum over all elements has two stages: fp32 lanes within a row, then the rows in their order
// in double, so that its bits do not depend on the thread count.
//
// out may be x: each vector of x is read before the same vector of out is written.
#include "blend.h"

#include <vector>

#include "moments.h"

namespace fd {
namespace FD_ISA {
namespace {

template <class T>
T* row_or_null(const Operand& o, int64_t b, int64_t k) {
  return o ? o.row<T>(b, k) : nullptr;
}

template <class T>
void blend_row(const Blend& p, int64_t b, int64_t k) {
  const T *fresh = p.fresh.row<T>(b, k), *cached = p.cached.row<T>(b, k);
  const T *x = row_or_null<T>(p.x, b, k), *gate = row_or_null<T>(p.gate, b, k);
  T *blended = row_or_null<T>(p.blended, b, k), *out = p.out.row<T>(b, k);
  const float r = *p.r, rest = 1.0f - r;
  each_vector(p.shape.width, [=](int64_t i, auto load, auto store) FD_INLINE_LAMBDA {
    // An operand of weight 0 may hold anything.
    Vec value;
    if (r == 1.0f) {
      value = load(fresh + i);
    } else if (r == 0.0f) {
      value = load(cached + i);
    } else {
      value = r * load(fresh + i) + rest * load(cached + i);
    }
    if (blended != nullptr) store(blended + i, value);
    if (x != nullptr) {
      Vec sum = load(x + i);
      if (gate != nullptr) {
        sum += load(gate + i) * value;  // one fma, as in gated_residual
      } else {
        sum += value;
      }
      value = sum;
    }
    store(out + i, value);
  });
}

// The row's part of grad_r.
template <class T>
double backward_row(const BlendBackward& p, int64_t b, int64_t k) {
  const T *grad = p.grad.row<T>(b, k), *gate = row_or_null<T>(p.gate, b, k);
  const T *fresh = row_or_null<T>(p.fresh, b, k), *cached = row_or_null<T>(p.cached, b, k);
  T* grad_fresh = row_or_null<T>(p.grad_fresh, b, k);
  T* grad_cached = row_or_null<T>(p.grad_cached, b, k);
  const float r = *p.r, rest = 1.0f - r;
  const bool summed = p.grad_r != nullptr;
  Vec lanes = {};
  each_vector(p.shape.width, [=, &lanes](int64_t i, auto load, auto store) FD_INLINE_LAMBDA {
    Vec g = load(grad + i);
    if (gate != nullptr) g *= load(gate + i);
    if (grad_fresh != nullptr) store(grad_fresh + i, r * g);
    if (grad_cached != nullptr) store(grad_cached + i, rest * g);
    if (summed) lanes += g * (load(fresh + i) - load(cached + i));
  });
  double sum = 0;
  for (int j = 0; j < kWidth; ++j) sum += lanes[j];
  return sum;
}

template <class T>
void all_rows(const Blend& p) {
  const int64_t count = p.shape.batch * p.shape.tokens;
#pragma omp parallel for schedule(static) num_threads(p.threads) if (p.threads > 1)
  for (int64_t r = 0; r < count; ++r) blend_row<T>(p, r / p.shape.tokens, r % p.shape.tokens);
}

template <class T>
void all_rows(const BlendBackward& p) {
  const int64_t count = p.shape.batch * p.shape.tokens;
  std::vector<double> sums(count);
#pragma omp parallel for schedule(static) num_threads(p.threads) if (p.threads > 1)
  for (int64_t r = 0; r < count; ++r) {
    sums[r] = backward_row<T>(p, r / p.shape.tokens, r % p.shape.tokens);
  }
  if (p.grad_r == nullptr) return;
  double sum = 0;
  for (const double part : sums) sum += part;
  *p.grad_r = static_cast<float>(sum);
}

}  // namespace

void blend(const Blend& p) {
  by_dtype(p.dtype, [&p](auto zero) { all_rows<decltype(zero)>(p); });
}

void blend_backward(const BlendBackward& p) {
  by_dtype(p.dtype, [&p](auto zero) { all_rows<decltype(zero)>(p); });
}

}  // namespace FD_ISA
}  // namespace fd
