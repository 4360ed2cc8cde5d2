// Attention of some queries over all keys on the CPU; the contract is in
// fastdit/ops/sparse_attention.py.
#pragma once
#include "operand.h"

namespace fd {

struct SparseAttention {
  Operand q, out;  // [B, Q, H d]
  Operand k, v;    // [B, S, G d]
  int64_t batch = 0, queries = 0, keys = 0;
  int64_t heads = 0, kv_heads = 0, head = 0;  // H, G, d
  float scale = 1;
  Dtype dtype = Dtype::kFloat32;
  int threads = 1;
};

namespace base {
void sparse_attention(const SparseAttention& p);
}
namespace avx2 {
void sparse_attention(const SparseAttention& p);
}
namespace avx512 {
void sparse_attention(const SparseAttention& p);
}

}  // namespace fd
