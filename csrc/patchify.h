// Patches of a field to tokens of several levels, and back; the contract is in
// fastdit/ops/patchify.py.
#pragma once
#include "operand.h"
#include "places.h"

namespace fd {

struct Patchify {
  void* field = nullptr;         // [B, gh, gw, ph, pw, C]; written where `draw`
  int64_t field_stride[6] = {};  // in elements, as are all strides
  void* tokens = nullptr;        // [B, n, ph, pw, C]; written otherwise
  int64_t token_stride[5] = {};
  Places table;           // [B, n]
  int64_t batch = 0;      // B
  int64_t count = 0;      // n
  int64_t grid[2] = {};   // gh, gw
  int64_t patch[2] = {};  // ph, pw
  int64_t channels = 0;   // C
  bool draw = false;      // tokens into the field, each pixel as large as its level says
  Dtype dtype = Dtype::kFloat32;
  int threads = 1;  // on the CPU

  FD_HD int64_t elements() const { return batch * count * patch[0] * patch[1] * channels; }

  // From the first pixel of a cell to the one `line` below and `column` right of it, in elements.
  FD_HD int64_t pixel(int64_t line, int64_t column) const {
    return line / patch[0] * field_stride[1] + column / patch[1] * field_stride[2] +
           line % patch[0] * field_stride[3] + column % patch[1] * field_stride[4];
  }
};

namespace base {
void patchify(const Patchify& p);
}
namespace avx2 {
void patchify(const Patchify& p);
}
namespace avx512 {
void patchify(const Patchify& p);
}
namespace cuda {
struct Target;
void patchify(const Patchify& p, const Target& target);
}  // namespace cuda

}  // namespace fd
