// Compiled once per instruction set (FD_ISA). A token at a time, in parallel over the tokens, each
// of which writes memory of its own.
#include "token_change.h"

namespace fd {
namespace FD_ISA {
namespace {

// The distance of a token from its last value, which becomes the one it has.
template <class T>
float moved(const TokenChange& p, int64_t b, int64_t token) {
  const T* patch = static_cast<const T*>(p.velocity) + p.start(p.stride, b, token);
  T* last_patch = static_cast<T*>(p.last) + p.start(p.last_stride, b, token);
  const int64_t step = p.stride[5], last_step = p.last_stride[5];
  float sum = 0;
  for (int64_t y = 0; y < p.patch[0]; ++y) {
    for (int64_t x = 0; x < p.patch[1]; ++x) {
      const T* pixel = patch + y * p.stride[3] + x * p.stride[4];
      T* last = last_patch + y * p.last_stride[3] + x * p.last_stride[4];
      float squares = 0;
      for (int64_t c = 0; c < p.channels; ++c) {
        const float change = to_float(pixel[c * step]) - to_float(last[c * last_step]);
        squares += change * change;
        last[c * last_step] = pixel[c * step];
      }
      sum += squares;
    }
  }
  return std::sqrt(sum);
}

template <class T>
void all_tokens(const TokenChange& p) {
  const int64_t tokens = p.tokens(), count = p.batch * tokens;
#pragma omp parallel for schedule(static) num_threads(p.threads) if (p.threads > 1)
  for (int64_t i = 0; i < count; ++i) {
    const int64_t b = i / tokens, token = i % tokens;
    if (p.computed(b, token)) p.note(b, token, moved<T>(p, b, token));
    p.rank(b, token);
  }
}

}  // namespace

void token_change(const TokenChange& p) {
  by_dtype(p.dtype, [&p](auto zero) { all_tokens<decltype(zero)>(p); });
}

}  // namespace FD_ISA
}  // namespace fd
