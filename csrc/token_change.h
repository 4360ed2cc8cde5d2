// How wrong the velocity kept for each token may be by now; the contract is in
// fastdit/ops/token_change.py.
#pragma once
#include <cmath>

#include "token_select.h"

namespace fd {

struct TokenChange {
  const void* velocity = nullptr;  // [B, gh, gw, ph, pw, C]
  int64_t stride[6] = {};          // of velocity, in elements
  void* last = nullptr;            // like velocity
  int64_t last_stride[6] = {};
  int64_t batch = 0;              // B
  int64_t grid[2] = {};           // gh, gw
  int64_t patch[2] = {};          // ph, pw
  int64_t channels = 0;           // C
  Numbers rate;                   // [B, N]
  Numbers level;                  // [B, N]
  Numbers score;                  // [B, N]
  Table inverse;                  // [B, N]; null: every token was computed
  const float* levels = nullptr;  // of the step that is done, and of the next
  Dtype dtype = Dtype::kFloat32;
  int threads = 1;  // on the CPU

  FD_HD int64_t tokens() const { return grid[0] * grid[1]; }
  FD_HD int64_t elements() const { return batch * tokens() * patch[0] * patch[1] * channels; }

  FD_HD bool computed(int64_t b, int64_t token) const {
    return !inverse || inverse.row(b)[token] >= 0;
  }

  // From the first element to the first of a token.
  FD_HD int64_t start(const int64_t (&of)[6], int64_t b, int64_t token) const {
    const uint32_t columns = static_cast<uint32_t>(grid[1]), i = static_cast<uint32_t>(token);
    return b * of[0] + i / columns * of[1] + i % columns * of[2];
  }

  // Notes that a token was computed, so far from its last value. At the same level, or without a
  // level (NaN), that says nothing of its rate.
  FD_HD void note(int64_t b, int64_t token, float distance) const {
    const float gap = fabsf(levels[0] - level.row(b)[token]);
    if (gap > 0.0f) rate.row(b)[token] = distance / gap;
    level.row(b)[token] = levels[0];
  }

  FD_HD void rank(int64_t b, int64_t token) const {
    score.row(b)[token] = rate.row(b)[token] * fabsf(levels[1] - level.row(b)[token]);
  }
};

namespace base {
void token_change(const TokenChange& p);
}
namespace avx2 {
void token_change(const TokenChange& p);
}
namespace avx512 {
void token_change(const TokenChange& p);
}
namespace cuda {
struct Target;
void token_change(const TokenChange& p, const Target& target);
}  // namespace cuda

}  // namespace fd
