// Norm and rotation of queries and keys, and the scatter of keys and values; the contract is in
// fastdit/ops/qkv_prologue.py.
#pragma once
#include "operand.h"

namespace fd {

constexpr int kMaxHead = 256;  // the largest d

enum class Norm : int { kNone = 0, kRms = 1, kLayer = 2, kRmsAcross = 3 };

// Whether it takes all heads of a token together.
FD_HD bool spans_heads(Norm norm) { return norm == Norm::kLayer || norm == Norm::kRmsAcross; }

struct QkvPrologue {
  Operand q;                 // [B, K, H d]
  Operand k, v;              // [B, K, G d]
  Operand q_out;             // [B, K, H d]: from the first token that is written
  Operand k_cache, v_cache;  // [B, S, G d] written at rows
  Operand q_weight, q_bias;  // [d], or [H d] where the norm spans all heads; null: 1, 0
  Operand k_weight, k_bias;  // [d], or [G d]
  Operand cos, sin;          // fp32 [B, S, d / 2] read at rows; null: no rotation
  Rows rows;                 // applies to the caches, cos and sin
  Shape shape;               // B, K, (H + 2 G) d
  int heads = 0, kv_heads = 0, head = 0;  // H, G, d; G may be 0
  Norm norm = Norm::kNone;
  double eps = 0;
  Dtype dtype = Dtype::kFloat32;
  int threads = 1;  // on the CPU
};

namespace base {
void qkv_prologue(const QkvPrologue& p);
}
namespace avx2 {
void qkv_prologue(const QkvPrologue& p);
}
namespace avx512 {
void qkv_prologue(const QkvPrologue& p);
}
namespace cuda {
struct Target;
void qkv_prologue(const QkvPrologue& p, const Target& target);
}  // namespace cuda

}  // namespace fd
