// out = r fresh + (1 - r) cached, or x + gate * that, and its gradients; the contract is in
// fastdit/ops/blend.py.
#pragma once
#include "operand.h"

namespace fd {

struct Blend {
  Operand fresh, cached;     // [B, K, D]
  const float* r = nullptr;  // one number
  Operand x;                 // [B, K, D], may be out; null: none
  Operand gate;              // broadcast to [B, K, D]; null: 1
  Operand blended;           // [B, K, D], written; null: none
  Operand out;               // [B, K, D]
  Shape shape;               // B, K, D
  Dtype dtype = Dtype::kFloat32;
  int threads = 1;  // on the CPU
};

// With g = gate * grad: grad_fresh = r g, grad_cached = (1 - r) g, grad_r = sum g (fresh - cached).
// Each of the three is null where it is not wanted.
struct BlendBackward {
  Operand grad;                     // [B, K, D]
  Operand fresh, cached;            // [B, K, D], read for grad_r only
  const float* r = nullptr;         // one number
  Operand gate;                     // broadcast to [B, K, D]; null: 1
  Operand grad_fresh, grad_cached;  // [B, K, D]
  float* grad_r = nullptr;          // one number
  float* partial = nullptr;         // on a GPU: kPartials of them
  Shape shape;                      // B, K, D
  Dtype dtype = Dtype::kFloat32;
  int threads = 1;  // on the CPU
};

// Sums of the first stage, and blocks of its grid, at most.
constexpr int kPartials = 1024;

namespace base {
void blend(const Blend& p);
void blend_backward(const BlendBackward& p);
}  // namespace base
namespace avx2 {
void blend(const Blend& p);
void blend_backward(const BlendBackward& p);
}  // namespace avx2
namespace avx512 {
void blend(const Blend& p);
void blend_backward(const BlendBackward& p);
}  // namespace avx512
namespace cuda {
struct Target;
void blend(const Blend& p, const Target& target);
void blend_backward(const BlendBackward& p, const Target& target);
}  // namespace cuda

}  // namespace fd
