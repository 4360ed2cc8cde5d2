// Which K of N tokens stay active; the contract, and the order of the tokens, is in
// fastdit/ops/token_select.py.
#pragma once
#include "operand.h"

namespace fd {

// An int32 [B, N] or [B, K]; the last stride is 1.
struct Table {
  int32_t* data = nullptr;
  int64_t batch_stride = 0;

  FD_HD explicit operator bool() const { return data != nullptr; }
  FD_HD int32_t* row(int64_t batch) const { return data + batch * batch_stride; }
};

struct TokenSelect {
  const void* velocity = nullptr;  // [B, gh, gw, ph, pw, C]
  int64_t stride[6] = {};          // of velocity, in elements
  int64_t batch = 0;               // B
  int64_t grid[2] = {};            // gh, gw
  int64_t patch[2] = {};           // ph, pw
  int64_t channels = 0;            // C
  int64_t keep = 0;                // K
  int64_t high = 0;
  float starvation = 0;
  int64_t max_age = 0;       // 0: none
  bool norm = false;         // the norm over the channels and not their deviation
  Table drops;               // [B, N]
  Table age;                 // [B, N]; null: none
  Table rows;                // [B, K]
  Table inverse;             // [B, N]
  uint32_t* keys = nullptr;  // [2, B, N], scratch on a GPU: those of the high side come first
  Dtype dtype = Dtype::kFloat32;
  int threads = 1;  // on the CPU

  FD_HD int64_t tokens() const { return grid[0] * grid[1]; }
  FD_HD int64_t low() const { return tokens() - keep - high; }
};

// A key orders tokens by when they are dropped, the smallest first: those with a score from 0 to
// infinity, then those without a metric, and all of this again for those that are too old.
constexpr uint32_t kInfinity = 0x7f800000u;  // its bits; without a sign, bits order as scores do
constexpr uint32_t kNoMetric = kInfinity + 1;
constexpr uint32_t kForced = 0x80000000u;
constexpr uint32_t kDropped = 0xffffffffu;  // above all keys

FD_HD float finite_or_infinity(float x) {
  return as_bits(x) < kInfinity ? x : as_float(kInfinity);  // x is not negative, unless a NaN is
}

// factor: e^(-starvation drops) on the high side, e^(starvation drops) on the low one.
FD_HD uint32_t drop_key(float metric, double factor, bool forced, bool high) {
  const uint32_t score = as_bits(finite_or_infinity(metric * static_cast<float>(factor)));
  uint32_t key = high ? kInfinity - score : score;
  if (as_bits(metric) == kInfinity) key = kNoMetric;
  return forced ? key | kForced : key;
}

namespace base {
void token_select(const TokenSelect& p);
}
namespace avx2 {
void token_select(const TokenSelect& p);
}
namespace avx512 {
void token_select(const TokenSelect& p);
}
namespace cuda {
struct Target;
void token_select(const TokenSelect& p, const Target& target);
}  // namespace cuda

}  // namespace fd
