// Compiled once per instruction set (FD_ISA). A row is read from memory once and from L1
// afterwards: add the branch and store the row, sum, sum again about the mean (moments.h), write y.
// For fp8, y is written in T first, where L1 keeps it: the result of quantising what this op gives
// without.
#include "norm_modulate.h"

#include <vector>

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

// out = y over what is returned.
template <class T>
float quantise(const T* y, int64_t width, fp8* out) {
  Ints largest =
      {};  // magnitudes are in order as integers, infinity and then NaN above all numbers
  each_vector(width, [&](int64_t i, auto load, auto) FD_INLINE_LAMBDA {
    const Ints magnitude = reinterpret_cast<Ints>(load(y + i)) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  });
  int32_t most = 0;
  for (int j = 0; j < kWidth; ++j) most = largest[j] > most ? largest[j] : most;
  const float by = row_scale_of<T>(as_float(uint32_t(most)));
  each_vector(width, [=](int64_t i, auto load, auto store) FD_INLINE_LAMBDA {
    store(out + i, by == 0.0f ? Vec{} : load(y + i) / by);
  });
  return by;
}

template <class T>
void one_row(const NormModulate& p, int64_t b, int64_t k, T* scratch) {
  const auto at = [b, k](const Operand& o) { return o ? o.row<T>(b, k) : nullptr; };
  const int64_t stored = p.rows.at(b, k);
  const Row<T> row = {p.x.row<T>(b, stored), p.row_scale ? scratch : at(p.out),
                      at(p.scale),           at(p.shift),
                      at(p.weight),          at(p.bias),
                      at(p.branch),          at(p.gate)};
  if (row.branch != nullptr) {
    add_branch(row, p.shape.width);
    if (p.cache) {
      std::memcpy(p.cache.row<T>(b, stored), row.branch, p.shape.width * sizeof(T));
    }
  }
  write(row, moments(row.x, p.shape.width, p.eps, p.rms), p.shape.width);
  if (p.row_scale) p.row_scale.row(b)[k] = quantise(row.out, p.shape.width, p.out.row<fp8>(b, k));
}

template <class T>
void all_rows(const NormModulate& p) {
  const int64_t count = p.shape.batch * p.shape.tokens;
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  {
    std::vector<T> scratch(p.row_scale ? p.shape.width : 0);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < count; ++r) {
      one_row<T>(p, r / p.shape.tokens, r % p.shape.tokens, scratch.data());
    }
  }
}

}  // namespace

void norm_modulate(const NormModulate& p) {
  by_dtype(p.dtype, [&p](auto zero) { all_rows<decltype(zero)>(p); });
}

}  // namespace FD_ISA
}  // namespace fd
