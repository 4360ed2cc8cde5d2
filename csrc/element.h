// Element types and their conversions, one definition for every kernel, host and device.
//
// bf16, fp16 and fp8 are payloads without operators: kernels read to float, compute in float and
// round once when they store (to nearest, ties to even; NaN stays NaN; fp16 overflows to infinity,
// fp8, which has none, to its largest number).
// All conversions are branch-free, so that a compiler can vectorise the loops around them. A GPU
// has instructions for them, which round the same way.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FD_HD __host__ __device__ __forceinline__
#else
#define FD_HD inline __attribute__((always_inline))
#endif

namespace fd {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};
struct fp8 {  // e4m3fn, only ever written
  uint8_t bits;
};

FD_HD float as_float(uint32_t u) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(u);
#else
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
#endif
}

FD_HD uint32_t as_bits(float f) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(f);
#else
  uint32_t u;
  std::memcpy(&u, &f, sizeof u);
  return u;
#endif
}

FD_HD float to_float(float x) { return x; }

FD_HD float to_float(bf16 x) { return as_float(uint32_t(x.bits) << 16); }

FD_HD float to_float(fp16 x) {
#if defined(__CUDA_ARCH__)
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x.bits));
  return f;
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t payload = uint32_t(x.bits & 0x7fffu) << 13;
  // Rebias the exponent by 127 - 15; infinity and NaN (payload exponent 31) need it twice.
  const uint32_t normal = payload + (112u << 23);
  const uint32_t special = payload + (224u << 23);
  // A subnormal is mantissa * 2^-24: put the mantissa under the exponent of 2^-14, take 2^-14 off.
  const uint32_t tiny = as_bits(as_float(payload + (113u << 23)) - as_float(113u << 23));
  const uint32_t rest = payload >= (31u << 23) ? special : normal;
  return as_float(sign | (payload < (1u << 23) ? tiny : rest));
#endif
}

// from_float<T>: a template because overloads cannot differ by return type alone.
template <class T>
FD_HD T from_float(float f);

template <>
FD_HD float from_float<float>(float f) {
  return f;
}

template <>
FD_HD bf16 from_float<bf16>(float f) {
#if defined(__CUDA_ARCH__)
  bf16 narrow;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(f));
  return narrow;
#else
  const uint32_t u = as_bits(f);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  // Rounding could carry a NaN payload into infinity, so NaN is answered with the quiet one.
  const bool is_nan = (u & 0x7fffffffu) > 0x7f800000u;
  return bf16{uint16_t(is_nan ? 0x7fc0u : rounded)};
#endif
}

template <>
FD_HD fp16 from_float<fp16>(float f) {
#if defined(__CUDA_ARCH__)
  fp16 narrow;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(f));
  return narrow;
#else
  const uint32_t u = as_bits(f);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t a = u & 0x7fffffffu;
  // From 65520 up the carry of the rounding reaches the exponent of infinity by itself.
  const uint32_t normal = (a - (112u << 23) + 0xfffu + ((a >> 13) & 1u)) >> 13;
  // Under 2^-14, adding 0.5 aligns the value so that the adder itself rounds at 2^-24.
  const uint32_t tiny = as_bits(as_float(a) + 0.5f) - 0x3f000000u;
  const uint32_t special = a > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = a < (113u << 23) ? tiny : normal;
  return fp16{uint16_t(sign | (a >= (143u << 23) ? special : finite))};
#endif
}

template <>
FD_HD fp8 from_float<fp8>(float f) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint16_t pair;  // there is an instruction for two
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(f));
  return fp8{uint8_t(pair)};
#else
  const uint32_t u = as_bits(f);
  const uint32_t a = u & 0x7fffffffu;
  const uint32_t normal = (a - (120u << 23) + 0x7ffffu + ((a >> 20) & 1u)) >> 20;
  // Under 2^-6, adding 2^14 aligns the value so that the adder itself rounds at 2^-9.
  const uint32_t tiny = as_bits(as_float(a) + 16384.0f) - as_bits(16384.0f);
  const uint32_t finite = a < (121u << 23) ? tiny : normal < 126u ? normal : 126u;
  return fp8{uint8_t(a > 0x7f800000u ? 127u : (u >> 24 & 0x80u) | finite)};
#endif
}

}  // namespace fd
