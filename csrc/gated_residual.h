// out = x + sum_i gate_i * branch_i; the contract is in fastdit/ops/gated_residual.py.
#pragma once
#include "operand.h"

namespace fd {

constexpr int kMaxBranches = 64;

struct GatedResidual {
  Operand x;                       // [B, K, D], may be out
  int64_t x_step = 1;              // between x's elements along D; 1 where x is out
  Operand out;                     // [B, K, D]
  Operand branches[kMaxBranches];  // [B, K, D], or [B, N, D] read at rows
  Operand gates[kMaxBranches];     // broadcast to [B, K, D]; null: ungated
  Operand cache;                   // [B, N, D] written at rows; null: none
  Rows rows;                       // applies to the cache and to all branches but the fresh one
  Shape shape;                     // B, K, D
  int count = 0;                   // of branches, 1 to kMaxBranches
  int fresh = -1;                  // the branch computed in this step; -1: none
  Dtype dtype = Dtype::kFloat32;
  int threads = 1;  // on the CPU
};

namespace base {
void gated_residual(const GatedResidual& p);
}
namespace avx2 {
void gated_residual(const GatedResidual& p);
}
namespace avx512 {
void gated_residual(const GatedResidual& p);
}
namespace cuda {
struct Target;
void gated_residual(const GatedResidual& p, const Target& target);
}  // namespace cuda

}  // namespace fd
