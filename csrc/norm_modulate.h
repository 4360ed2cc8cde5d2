// y = norm(x + gate * branch) * (1 + scale) + shift; the contract is in
// fastdit/ops/norm_modulate.py.
#pragma once
#include "operand.h"

namespace fd {

struct NormModulate {
  Operand x;          // [B, N, D] at rows; written where branch is given
  Operand out;        // [B, K, D]; in fp8 where row_scale is given
  Modulation scale;   // null: 0
  Modulation shift;   // null: 0
  Modulation weight;  // null: 1
  Modulation bias;    // null: 0
  Operand branch;     // [B, K, D]; null: none
  Modulation gate;    // null: 1
  Operand cache;      // [B, N, D] written at rows; null: none
  Rows rows;          // applies to x and the cache
  Numbers row_scale;  // [B, K], written; null: out is as it comes
  Shape shape;        // B, K, D
  double eps = 0;
  bool rms = false;
  Dtype dtype = Dtype::kFloat32;
  int threads = 1;  // on the CPU
};

// Whether a modulation is fp32 beside 16 bits. Such calls have kernels of their own, so that others
// pay nothing.
inline bool any_wide(const NormModulate& p) {
  return p.scale.wide || p.shift.wide || p.weight.wide || p.bias.wide || p.gate.wide;
}

// What a row in fp8 is to be multiplied by, so that its largest magnitude becomes fp8's: rounded to
// T, as torchao's is. Rows for which that is below the normal numbers of fp32 are zeros.
template <class T>
FD_HD float row_scale_of(float largest) {
  const float scale = to_float(from_float<T>(largest / 448.0f));
  return scale < 1.17549435e-38f ? 0.0f : scale;  // NaN stays
}

namespace base {
void norm_modulate(const NormModulate& p);
}
namespace avx2 {
void norm_modulate(const NormModulate& p);
}
namespace avx512 {
void norm_modulate(const NormModulate& p);
}
namespace cuda {
struct Target;
void norm_modulate(const NormModulate& p, const Target& target);
}  // namespace cuda

}  // namespace fd
