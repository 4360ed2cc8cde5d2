// Compiled once per instruction set (FD_ISA). A patch at a time, in parallel over the tokens, which
// write memory of their own as long as they do not overlap. Values are copied, never converted.
#include "patchify.h"

namespace fd {
namespace FD_ISA {
namespace {

// A patch [ph, pw, C]: where it begins and its strides.
template <class T>
struct Patch {
  T* at;
  const int64_t* stride;
};

template <class T>
void copy(const Patchify& p, const Patch<T>& from, const Patch<T>& to) {
  for (int64_t y = 0; y < p.patch[0]; ++y) {
    for (int64_t x = 0; x < p.patch[1]; ++x) {
      const T* source = from.at + y * from.stride[0] + x * from.stride[1];
      T* target = to.at + y * to.stride[0] + x * to.stride[1];
      if (from.stride[2] == 1 && to.stride[2] == 1) {
        std::memcpy(target, source, p.channels * sizeof(T));
        continue;
      }
      for (int64_t c = 0; c < p.channels; ++c)
        target[c * to.stride[2]] = source[c * from.stride[2]];
    }
  }
}

template <class T>
void one_token(const Patchify& p, int64_t b, int64_t i) {
  const Place place = p.table.at(b, i);
  const Patch<T> token = {static_cast<T*>(p.tokens) + b * p.token_stride[0] + i * p.token_stride[1],
                          p.token_stride + 2};
  T* const first = static_cast<T*>(p.field) + b * p.field_stride[0] + place.y * p.field_stride[1] +
                   place.x * p.field_stride[2];
  if (!p.draw) return copy(p, {first, p.field_stride + 3}, token);
  for (int64_t r = 0; r < place.side(); ++r) {
    for (int64_t q = 0; q < place.side(); ++q) {
      T* const cell = first + r * p.field_stride[1] + q * p.field_stride[2];
      copy(p, token, {cell, p.field_stride + 3});
    }
  }
}

template <class T>
void all_tokens(const Patchify& p) {
  const int64_t tokens = p.batch * p.count;
#pragma omp parallel for schedule(static) num_threads(p.threads) if (p.threads > 1)
  for (int64_t i = 0; i < tokens; ++i) one_token<T>(p, i / p.count, i % p.count);
}

}  // namespace

void patchify(const Patchify& p) {
  by_dtype(p.dtype, [&p](auto zero) { all_tokens<decltype(zero)>(p); });
}

}  // namespace FD_ISA
}  // namespace fd
