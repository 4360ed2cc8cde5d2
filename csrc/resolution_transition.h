// Tokens that become four, and noise for all; the contract is in
// fastdit/ops/resolution_transition.py.
#pragma once
#include "operand.h"
#include "places.h"

namespace fd {

struct ResolutionTransition {
  Operand x;          // [B, n, C]
  Operand noise;      // fp32 [B, n + 3 K, C]
  Operand out;        // [B, n + 3 K, C]
  Places table;       // [B, n]
  Places out_table;   // [B, n + 3 K]
  Rows rows;          // [B, K], the tokens that are split, ascending
  Shape shape;        // B, n, C
  int64_t split = 0;  // K
  float scale = 0;
  float deviation = 0;
  float pull = 0;     // what the mean of four that share noise is multiplied by and added to each
  float unsplit = 0;  // the deviation of the noise of others
  bool pixelwise = false;  // a child is four times a pixel of its parent, not its parent
  int64_t raster = 0;      // cells in a row; 0: compact order
  Dtype dtype = Dtype::kFloat32;
  int threads = 1;  // on the CPU

  FD_HD int64_t out_tokens() const { return shape.tokens + 3 * split; }
};

// How many of the tokens before this one are split: the first place in rows that is not below it.
FD_HD int64_t split_before(const ResolutionTransition& p, int64_t b, int64_t token) {
  int64_t low = 0, high = p.split;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (p.rows.at(b, middle) < token) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

FD_HD Place child_of(const Place& parent, int number) {
  const int32_t half = 1 << (parent.level - 1);
  return {parent.level - 1, parent.y + number / 2 * half, parent.x + number % 2 * half};
}

// The row of `out` for a token at `place` which is number `compact` in compact order.
FD_HD int64_t out_row(const ResolutionTransition& p, const Place& place, int64_t compact) {
  return p.raster > 0 ? place.y * p.raster + place.x : compact;
}

namespace base {
void resolution_transition(const ResolutionTransition& p);
}
namespace avx2 {
void resolution_transition(const ResolutionTransition& p);
}
namespace avx512 {
void resolution_transition(const ResolutionTransition& p);
}
namespace cuda {
struct Target;
void resolution_transition(const ResolutionTransition& p, const Target& target);
}  // namespace cuda

}  // namespace fd
