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

// A row of a modulation, null where there is none; in a call without wide ones nothing asks.
template <class T, bool kAnyWide>
struct Vector {
  const void* data;
  bool wide;

  FD_INLINE explicit operator bool() const { return data != nullptr; }

  template <class Load>
  FD_INLINE Vec at(int64_t i, Load load) const {
    if (kAnyWide && wide) return load(static_cast<const float*>(data) + i);
    return load(static_cast<const T*>(data) + i);
  }
};

// Where the operands of one row begin; null where one was not given.
template <class T, bool kAnyWide>
struct Row {
  T* x;
  T* out;
  Vector<T, kAnyWide> scale;
  Vector<T, kAnyWide> shift;
  Vector<T, kAnyWide> weight;
  Vector<T, kAnyWide> bias;
  const T* branch;
  Vector<T, kAnyWide> gate;
};

// x = x + gate * branch, rounded as it is stored
template <class T, bool kAnyWide>
void add_branch(const Row<T, kAnyWide>& row, int64_t width) {
  each_vector(width, [&row](int64_t i, auto load, auto store) FD_INLINE_LAMBDA {
    const Vec branch = load(row.branch + i);
    Vec sum = load(row.x + i);
    if (row.gate) {
      sum += row.gate.at(i, load) * branch;  // one fma, as in gated_residual
    } else {
      sum += branch;
    }
    store(row.x + i, sum);
  });
}

template <class T, bool kAnyWide>
void write(const Row<T, kAnyWide>& row, const Moments& m, int64_t width) {
  each_vector(width, [&row, m](int64_t i, auto load, auto store) FD_INLINE_LAMBDA {
    Vec y = (load(row.x + i) - m.mean - m.remainder) * m.scale;
    if (row.weight) y *= row.weight.at(i, load);
    if (row.bias) y += row.bias.at(i, load);
    if (row.scale) y *= 1.0f + row.scale.at(i, load);
    if (row.shift) y += row.shift.at(i, load);
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

template <class T, bool kAnyWide>
void one_row(const NormModulate& p, int64_t b, int64_t k, T* scratch) {
  const auto at = [b, k](const Operand& o) { return o ? o.row<T>(b, k) : nullptr; };
  const auto vector = [b, k](const Modulation& m) {
    const void* data = nullptr;
    if (m) data = m.wide ? static_cast<void*>(m.row<float>(b, k)) : m.row<T>(b, k);
    return Vector<T, kAnyWide>{data, m.wide};
  };
  const int64_t stored = p.rows.at(b, k);
  const Row<T, kAnyWide> row = {p.x.row<T>(b, stored), p.row_scale ? scratch : at(p.out),
                                vector(p.scale),       vector(p.shift),
                                vector(p.weight),      vector(p.bias),
                                at(p.branch),          vector(p.gate)};
  if (row.branch != nullptr) {
    add_branch(row, p.shape.width);
    if (p.cache) {
      std::memcpy(p.cache.row<T>(b, stored), row.branch, p.shape.width * sizeof(T));
    }
  }
  write(row, moments(row.x, p.shape.width, p.eps, p.rms), p.shape.width);
  if (p.row_scale) p.row_scale.row(b)[k] = quantise(row.out, p.shape.width, p.out.row<fp8>(b, k));
}

template <class T, bool kAnyWide>
void all_rows(const NormModulate& p) {
  const int64_t count = p.shape.batch * p.shape.tokens;
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  {
    std::vector<T> scratch(p.row_scale ? p.shape.width : 0);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < count; ++r) {
      one_row<T, kAnyWide>(p, r / p.shape.tokens, r % p.shape.tokens, scratch.data());
    }
  }
}

}  // namespace

void norm_modulate(const NormModulate& p) {
  by_dtype(p.dtype, [&p](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) < sizeof(float)) {
      if (any_wide(p)) return all_rows<T, true>(p);
    }
    all_rows<T, false>(p);
  });
}

}  // namespace FD_ISA
}  // namespace fd
