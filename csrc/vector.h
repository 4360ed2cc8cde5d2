// 16 bytes of a row at a time, converted to and from fp32.
//
// A thread always owns the same elements of a row, aligned or not: where kAligned is false they are
// read and written one by one, so the order of every sum, and with it every bit of a result, is the
// same.
#pragma once
#include "cuda_port.h"
#include "operand.h"

namespace fd {
namespace cuda {

template <class T>
constexpr int kElements = 16 / sizeof(T);  // of a vector

template <class T>
__device__ __forceinline__ T element(const Words& w, int i) {
  if constexpr (sizeof(T) == 4) {
    return as_float(w.at[i]);
  } else {
    return T{static_cast<uint16_t>(w.at[i / 2] >> (16 * (i % 2)))};
  }
}

template <class T>
__device__ __forceinline__ void set_element(Words& w, int i, T value) {
  if constexpr (sizeof(T) == 4) {
    w.at[i] = as_bits(value);
  } else if (i % 2 == 0) {
    w.at[i / 2] = value.bits;
  } else {
    w.at[i / 2] |= static_cast<uint32_t>(value.bits) << 16;
  }
}

// The first n elements at p, at most a vector of them; the rest reads as zero.
template <bool kAligned, class T>
__device__ __forceinline__ Words load(const T* p, int64_t n) {
  if constexpr (kAligned) return load_words(p);
  Words w = {};
#pragma unroll
  for (int i = 0; i < kElements<T>; ++i) {
    if (i < n) set_element(w, i, p[i]);
  }
  return w;
}

template <bool kAligned, class T>
__device__ __forceinline__ void store(T* p, const Words& w, int64_t n) {
  if constexpr (kAligned) {
    store_words(p, w);
  } else {
#pragma unroll
    for (int i = 0; i < kElements<T>; ++i) {
      if (i < n) p[i] = element<T>(w, i);
    }
  }
}

// As many floats as a vector of T has, in fp8: 8 bytes at a time, or 4.
template <class T, bool kAligned>
__device__ __forceinline__ void store_fp8(fp8* p, const float* values, int64_t n) {
  uint64_t packed = 0;
#pragma unroll
  for (int i = 0; i < kElements<T>; ++i) {
    packed |= static_cast<uint64_t>(from_float<fp8>(values[i]).bits) << (8 * i);
  }
  if constexpr (!kAligned) {
#pragma unroll 1  // unrolled, it takes more registers than there are
    for (int i = 0; i < kElements<T> && i < n; ++i, packed >>= 8) {
      p[i] = fp8{static_cast<uint8_t>(packed)};
    }
  } else if constexpr (kElements<T> == 8) {
    store_whole(p, packed);
  } else {
    store_whole(p, static_cast<uint32_t>(packed));
  }
}

template <class T>
__device__ __forceinline__ void to_floats(const Words& w, float* values) {
#pragma unroll
  for (int i = 0; i < kElements<T>; ++i) values[i] = to_float(element<T>(w, i));
}

template <class T>
__device__ __forceinline__ Words from_floats(const float* values) {
  Words w = {};
#pragma unroll
  for (int i = 0; i < kElements<T>; ++i) set_element(w, i, from_float<T>(values[i]));
  return w;
}

// As many values as a vector of T has, of another type; the first n are there.
template <class T, bool kAligned, class Other>
__device__ __forceinline__ void load_other(const Other* from, int64_t n, float* values) {
#pragma unroll
  for (int i = 0; i < kElements<T>; i += kElements<Other>) {
    to_floats<Other>(load<kAligned>(from + i, n - i), values + i);
  }
}

// A vector of a modulation on its way: as it is stored until it is used, which takes half the
// registers, or where one may be wide, in fp32.
template <class T, bool kAnyWide>
struct Held {
  Words words;

  __device__ __forceinline__ void to(float* values) const { to_floats<T>(words, values); }
};

template <class T>
struct Held<T, true> {
  float at[kElements<T>];

  __device__ __forceinline__ void to(float* values) const {
#pragma unroll
    for (int e = 0; e < kElements<T>; ++e) values[e] = at[e];
  }
};

template <class T, bool kAligned, bool kAnyWide>
__device__ __forceinline__ Held<T, kAnyWide> held(const Operand& m, bool wide, int64_t b, int64_t k,
                                                  int64_t i, int64_t n) {
  Held<T, kAnyWide> vector;
  if constexpr (!kAnyWide) {
    vector.words = load<kAligned>(m.row<T>(b, k) + i, n);
  } else if (wide) {
    load_other<T, kAligned>(m.row<float>(b, k) + i, n, vector.at);
  } else {
    to_floats<T>(load<kAligned>(m.row<T>(b, k) + i, n), vector.at);
  }
  return vector;
}

// sum += gate * branch, or sum += branch where it is not gated; the branch times a weight.
template <class T, bool kWeighted = false, bool kAnyWide = false>
__device__ __forceinline__ void add(const Words& branch, bool gated, const Held<T, kAnyWide>& gate,
                                    float* sum, float weight = 1.0f) {
  float value[kElements<T>], by[kElements<T>];
  to_floats<T>(branch, value);
  gate.to(by);
#pragma unroll
  for (int e = 0; e < kElements<T>; ++e) {
    if constexpr (kWeighted) value[e] *= weight;
    sum[e] = gated ? fmaf(by[e], value[e], sum[e]) : sum[e] + value[e];
  }
}

// Host: whether every row of an operand can be read in vectors. An operand not given can.
template <class T>
bool aligned(const Operand& o) {
  return reinterpret_cast<uintptr_t>(o.data) % 16 == 0 && o.batch_stride % kElements<T> == 0 &&
         o.token_stride % kElements<T> == 0;
}

template <class T>
bool aligned(const Operand& o, bool wide) {
  return wide ? aligned<float>(o) : aligned<T>(o);
}

}  // namespace cuda
}  // namespace fd
