// sums[0] = sum_i weight_i * branch_i; sums[g] = the branches of group g added up. The contract is
// in fastdit/ops/collapse.py.
#pragma once
#include "operand.h"

namespace fd {

constexpr int kMaxCollapsed = 64;
constexpr int kMaxSums = 4;

struct Collapse {
  Operand branches[kMaxCollapsed];    // [B, K, D]
  Operand weights[kMaxCollapsed];     // broadcast to [B, K, D]; null: 1
  uint8_t groups[kMaxCollapsed];      // 0: of none; else below the number of sums
  Operand sums[kMaxSums];             // [B, K, D]
  Shape shape;                        // B, K, D
  int count = 0;                      // of branches, 1 to kMaxCollapsed
  int sum_count = 0;                  // 1 to kMaxSums
  bool accumulate = false;            // onto what the sums hold
  Dtype dtype = Dtype::kFloat32;      // of branches, and of weights
  bool wide = false;                  // weights are fp32 where dtype is of 16 bits
  Dtype sum_dtype = Dtype::kFloat32;  // the same, or fp32
  int threads = 1;                    // on the CPU
};

namespace base {
void collapse(const Collapse& p);
}
namespace avx2 {
void collapse(const Collapse& p);
}
namespace avx512 {
void collapse(const Collapse& p);
}
namespace cuda {
struct Target;
void collapse(const Collapse& p, const Target& target);
}  // namespace cuda

}  // namespace fd
