// One vector register of floats per instruction set, and its loads and stores for every element
// type. Included by the kernel files only, which are compiled once per instruction set: all of it
// is in FD_ISA's namespace and inlined, so that no code for one processor is linked into another's.
//
// Written out and not left to the auto-vectoriser, which gives up on bf16 loops now and then, at a
// quarter of the speed. Arithmetic uses the compilers' vector extensions; widening and narrowing
// use intrinsics where there are some, since gcc 12 takes generic conversions apart.
#pragma once
#include "element.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

#define FD_INLINE inline __attribute__((always_inline))
#define FD_INLINE_LAMBDA __attribute__((always_inline))

namespace fd {
namespace FD_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Vec __attribute__((vector_size(kWidth * 4)));
typedef int32_t Ints __attribute__((vector_size(kWidth * 4)));
typedef uint32_t Words __attribute__((vector_size(kWidth * 4)));
typedef uint16_t Halves __attribute__((vector_size(kWidth * 2)));

FD_INLINE Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

FD_INLINE Vec load(const bf16* p) {
#if defined(__AVX512F__)
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return reinterpret_cast<Vec>(_mm512_slli_epi32(wide, 16));
#elif defined(__AVX2__)
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  return reinterpret_cast<Vec>(_mm256_slli_epi32(wide, 16));
#else
  Halves h;
  std::memcpy(&h, p, sizeof h);
  return reinterpret_cast<Vec>(__builtin_convertvector(h, Words) << 16);
#endif
}

FD_INLINE Vec load(const fp16* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  Vec v;
  for (int i = 0; i < kWidth; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

FD_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

FD_INLINE void store(bf16* p, Vec v) {  // as from_float<bf16>
  const Words u = reinterpret_cast<Words>(v);
  const Words rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const Ints magnitude = reinterpret_cast<Ints>(u & 0x7fffffffu);
  const Words is_nan = reinterpret_cast<Words>(magnitude > 0x7f800000);
  const Words bits = (is_nan & 0x7fc0u) | (~is_nan & rounded);
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)bits));
#elif defined(__AVX2__)
  const __m256i pairs = _mm256_packus_epi32((__m256i)bits, (__m256i)bits);  // each half twice
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0x08)));
#else
  const Halves h = __builtin_convertvector(bits, Halves);
  std::memcpy(p, &h, sizeof h);
#endif
}

FD_INLINE void store(fp16* p, Vec v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, 0));  // 0: to nearest
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, 0));
#else
  for (int i = 0; i < kWidth; ++i) p[i] = from_float<fp16>(v[i]);
#endif
}

FD_INLINE void store(fp8* p, Vec v) {
  for (int i = 0; i < kWidth; ++i) p[i] = from_float<fp8>(v[i]);
}

// The first n <= kWidth elements; the rest reads as zero and is not written.
template <class T>
FD_INLINE Vec load(const T* p, int64_t n) {
  if (n == kWidth) return load(p);
  T whole[kWidth] = {};
  std::memcpy(whole, p, n * sizeof(T));
  return load(whole);
}

template <class T>
FD_INLINE void store(T* p, Vec v, int64_t n) {
  if (n == kWidth) return store(p, v);
  T whole[kWidth];
  store(whole, v);
  std::memcpy(p, whole, n * sizeof(T));
}

// v with zeros from element n on
FD_INLINE Vec first(Vec v, int64_t n) {
  for (int64_t i = n; i < kWidth; ++i) v[i] = 0;
  return v;
}

// exp(x) for x <= 0: 2^n of the nearest n, times a polynomial of the rest (Cephes' coefficients).
// Under -87 it is 0: 1e-38 or less, which no sum of fp32 with a 1 in it can tell from that. A NaN
// stays.
FD_INLINE Vec exp_of(Vec x) {
  const Ints under = x < -87.0f;
  const float magic = 12582912.0f;  // 1.5 2^23: adding it rounds to an integer
  const Vec shifted = x * 1.44269504f + magic;
  const Vec n = shifted - magic;
  const Vec r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Ints exponent = (reinterpret_cast<Ints>(shifted) - 0x4b400000) << 23;
  return reinterpret_cast<Vec>(~under & (reinterpret_cast<Ints>(p) + exponent));
}

}  // namespace
}  // namespace FD_ISA
}  // namespace fd
