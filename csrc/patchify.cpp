// Compiled once per instruction set (FD_ISA). A token at a time, in parallel over the tokens, which
// write memory of their own as long as they do not overlap. Values are copied, never converted.
#include "patchify.h"

namespace fd {
namespace FD_ISA {
namespace {

template <class T>
void copy(int64_t channels, const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  if (from_stride == 1 && to_stride == 1) {
    std::memcpy(to, from, channels * sizeof(T));
    return;
  }
  for (int64_t c = 0; c < channels; ++c) to[c * to_stride] = from[c * from_stride];
}

template <class T>
void one_token(const Patchify& p, int64_t b, int64_t i) {
  const Place place = p.table.at(b, i);
  const int64_t side = place.side();
  T* const token = static_cast<T*>(p.tokens) + b * p.token_stride[0] + i * p.token_stride[1];
  T* const first = static_cast<T*>(p.field) + b * p.field_stride[0] + place.y * p.field_stride[1] +
                   place.x * p.field_stride[2];
  for (int64_t y = 0; y < p.patch[0]; ++y) {
    for (int64_t x = 0; x < p.patch[1]; ++x) {
      T* const own = token + y * p.token_stride[2] + x * p.token_stride[3];
      if (!p.draw) {
        const T* const from = first + p.pixel(y * side, x * side);
        copy(p.channels, from, p.field_stride[5], own, p.token_stride[4]);
        continue;
      }
      for (int64_t r = 0; r < side; ++r) {
        for (int64_t q = 0; q < side; ++q) {
          T* const to = first + p.pixel(y * side + r, x * side + q);
          copy(p.channels, own, p.token_stride[4], to, p.field_stride[5]);
        }
      }
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
