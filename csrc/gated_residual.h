// out = x + sum_i weight_i * gate_i * branch_i; the contract is in fastdit/ops/gated_residual.py.
#pragma once
#include "operand.h"

namespace fd {

// PixArt's 84 outputs and its positions, Wan's 120 outputs
constexpr int kMaxBranches = 128;

// A number for each branch, or for each branch and token; read where the kernel runs.
struct Weights {
  const float* data = nullptr;  // null: ones
  int64_t branch_stride = 1;
  int64_t token_stride = 0;  // 1 where tokens have their own: then [branches, B K]

  FD_HD explicit operator bool() const { return data != nullptr; }
  FD_HD float at(int64_t branch, int64_t token) const {
    return data[branch * branch_stride + token * token_stride];
  }
};

// All but the branches.
struct Residual {
  Operand x;           // [B, K, D], may be out
  int64_t x_step = 1;  // between x's elements along D; 1 where x is out
  Operand out;         // [B, K, D]
  Weights weights;
  Operand cache;   // [B, N, D] written at rows; null: none
  Rows rows;       // applies to the cache and to all branches but the fresh one
  Shape shape;     // B, K, D
  int count = 0;   // of branches, 1 to kMaxBranches
  int fresh = -1;  // the branch computed in this step; -1: none
  Dtype dtype = Dtype::kFloat32;
  bool wide = false;  // gates are fp32 where dtype is of 16 bits
  int threads = 1;    // on the CPU
};

// A kernel of at most kMost branches is given no more: a launch copies its arguments.
template <int kMost>
struct Branches : Residual {
  Operand branches[kMost];  // [B, K, D], or [B, N, D] read at rows
  Operand gates[kMost];     // broadcast to [B, K, D]; null: ungated
};

using GatedResidual = Branches<kMaxBranches>;

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
