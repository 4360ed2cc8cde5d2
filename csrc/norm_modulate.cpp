// Compiled once per instruction set (FD_ISA). A row is read from memory once and from L1
// afterwards: add the branch and store the row, sum, sum again about the mean (moments.h), write y.
#include "norm_modulate.h"

#include "moments.h"

namespace fd {
namespace FD_ISA {
namespace {

// Where the operands of one row begin; null where one was not given.
template <class T>
struct Row {
  T* x;
  T* out;
  const T* scale;
  const T* shift;
  const T* weight;
  const T* bias;
  const T* branch;
  const T* gate;
};

// x = x + gate * branch, rounded as it is stored
template <class T>
void add_branch(const Row<T>& row, int64_t width) {
  each_vector(width, [&row](int64_t i, auto load, auto store) FD_INLINE_LAMBDA {
    const Vec branch = load(row.branch + i);
    Vec sum = load(row.x + i);
    if (row.gate != nullptr) {
      sum += load(row.gate + i) * branch;  // one fma, as in gated_residual
    } else {
      sum += branch;
    }
    store(row.x + i, sum);
  });
}

template <class T>
void write(const Row<T>& row, const Moments& m, int64_t width) {
  each_vector(width, [&row, m](int64_t i, auto load, auto store) FD_INLINE_LAMBDA {
    Vec y = (load(row.x + i) - m.mean - m.remainder) * m.scale;
    if (row.weight != nullptr) y *= load(row.weight + i);
    if (row.bias != nullptr) y += load(row.bias + i);
    if (row.scale != nullptr) y *= 1.0f + load(row.scale + i);
    if (row.shift != nullptr) y += load(row.shift + i);
    store(row.out + i, y);
  });
}

template <class T>
void one_row(const NormModulate& p, int64_t b, int64_t k) {
  const auto at = [b, k](const Operand& o) { return o ? o.row<T>(b, k) : nullptr; };
  const int64_t stored = p.rows.at(b, k);
  const Row<T> row = {p.x.row<T>(b, stored), at(p.out),  at(p.scale),  at(p.shift),
                      at(p.weight),          at(p.bias), at(p.branch), at(p.gate)};
  if (row.branch != nullptr) {
    add_branch(row, p.shape.width);
    if (p.cache) {
      std::memcpy(p.cache.row<T>(b, stored), row.branch, p.shape.width * sizeof(T));
    }
  }
  write(row, moments(row.x, p.shape.width, p.eps, p.rms), p.shape.width);
}

template <class T>
void all_rows(const NormModulate& p) {
  const int64_t count = p.shape.batch * p.shape.tokens;
#pragma omp parallel for schedule(static) num_threads(p.threads) if (p.threads > 1)
  for (int64_t r = 0; r < count; ++r) one_row<T>(p, r / p.shape.tokens, r % p.shape.tokens);
}

}  // namespace

void norm_modulate(const NormModulate& p) {
  by_dtype(p.dtype, [&p](auto zero) { all_rows<decltype(zero)>(p); });
}

}  // namespace FD_ISA
}  // namespace fd
