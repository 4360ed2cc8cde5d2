// out = silu(gate) * value; the contract is in fastdit/ops/swiglu.py.
#pragma once
#include "operand.h"

namespace fd {

struct Swiglu {
  Operand gate, value;  // [B, K, D]
  Operand out;          // [B, K, D], may be gate or value
  Shape shape;          // B, K, D
  Dtype dtype = Dtype::kFloat32;
  int threads = 1;  // on the CPU
};

namespace base {
void swiglu(const Swiglu& p);
}
namespace avx2 {
void swiglu(const Swiglu& p);
}
namespace avx512 {
void swiglu(const Swiglu& p);
}
namespace cuda {
struct Target;
void swiglu(const Swiglu& p, const Target& target);
}  // namespace cuda

}  // namespace fd
