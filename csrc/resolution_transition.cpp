// Compiled once per instruction set (FD_ISA). A token at a time: it finds its own place in the
// output by a search in rows, so tokens are independent. Computed in fp32, rounded once.
#include "resolution_transition.h"

#include "moments.h"

namespace fd {
namespace FD_ISA {
namespace {

template <class T>
void stay(const ResolutionTransition& p, const T* x, const float* noise, T* out) {
  const float by = p.deviation * p.unsplit, scale = p.scale;
  each_vector(p.shape.width, [=](int64_t i, auto load, auto store) FD_INLINE_LAMBDA {
    store(out + i, scale * load(x + i) + by * load(noise + i));
  });
}

template <class T>
void split(const ResolutionTransition& p, const T* x, const float* const* noise, T* const* out) {
  const float scale = p.scale, deviation = p.deviation, pull = 0.25f * p.pull;
  each_vector(p.shape.width, [=](int64_t i, auto load, auto store) FD_INLINE_LAMBDA {
    const Vec value = scale * load(x + i);
    Vec eps[4];
    for (int k = 0; k < 4; ++k) eps[k] = load(noise[k] + i);
    const Vec shared = pull * ((eps[0] + eps[1]) + (eps[2] + eps[3]));
    for (int k = 0; k < 4; ++k) store(out[k] + i, value + deviation * (eps[k] + shared));
  });
}

// Child k of a channel (four pixels) is pixel k, four times.
template <class T>
void split_pixels(const ResolutionTransition& p, const T* x, const float* const* noise,
                  T* const* out) {
  const float pull = 0.25f * p.pull;
  for (int k = 0; k < 4; ++k) {
    for (int64_t i = 0; i < p.shape.width; i += 4) {
      const float value = p.scale * to_float(x[i + k]);
      const float* eps = noise[k] + i;
      const float shared = pull * ((eps[0] + eps[1]) + (eps[2] + eps[3]));
      for (int j = 0; j < 4; ++j) {
        out[k][i + j] = from_float<T>(value + p.deviation * (eps[j] + shared));
      }
    }
  }
}

template <class T>
void one_token(const ResolutionTransition& p, int64_t b, int64_t i) {
  const int64_t before = split_before(p, b, i);
  const Place place = p.table.at(b, i);
  const T* x = p.x.row<T>(b, i);
  if (before == p.split || p.rows.at(b, before) != i) {
    const int64_t row = out_row(p, place, i - before);
    stay(p, x, p.noise.row<float>(b, row), p.out.row<T>(b, row));
    p.out_table.set(b, row, place);
    return;
  }
  const float* noise[4];
  T* out[4];
  for (int k = 0; k < 4; ++k) {
    const Place child = child_of(place, k);
    const int64_t row = out_row(p, child, p.shape.tokens - p.split + 4 * before + k);
    noise[k] = p.noise.row<float>(b, row);
    out[k] = p.out.row<T>(b, row);
    p.out_table.set(b, row, child);
  }
  p.pixelwise ? split_pixels(p, x, noise, out) : split(p, x, noise, out);
}

template <class T>
void all_tokens(const ResolutionTransition& p) {
  const int64_t count = p.shape.batch * p.shape.tokens;
#pragma omp parallel for schedule(static) num_threads(p.threads) if (p.threads > 1)
  for (int64_t i = 0; i < count; ++i) one_token<T>(p, i / p.shape.tokens, i % p.shape.tokens);
}

}  // namespace

void resolution_transition(const ResolutionTransition& p) {
  by_dtype(p.dtype, [&p](auto zero) { all_tokens<decltype(zero)>(p); });
}

}  // namespace FD_ISA
}  // namespace fd
