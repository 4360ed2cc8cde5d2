// Compiled once per instruction set (FD_ISA). A token's heads are read from memory once; the norm
// and the rotation of a head run on it while it is in L1, in fp32, and round once. v, and what is
// neither normed nor rotated, is copied.
#include "qkv_prologue.h"

#include "moments.h"

namespace fd {
namespace FD_ISA {
namespace {

#if defined(__AVX512F__)
#define FD_SWAPPED 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14
#elif defined(__AVX2__)
#define FD_SWAPPED 1, 0, 3, 2, 5, 4, 7, 6
#else
#define FD_SWAPPED 1, 0, 3, 2
#endif

// cos and sin of one token as its heads use them: (x0, x1) -> (x0 c - x1 s, x1 c + x0 s) takes c
// for both elements of a pair, and -s and s.
struct Turn {
  float cos[kMaxHead];
  float sin[kMaxHead];
};

void expand(const float* cos, const float* sin, int64_t n, Turn& turn) {
  for (int64_t i = 0; i < n; ++i) {
    turn.cos[i] = cos[i / 2];
    turn.sin[i] = i % 2 == 0 ? -sin[i / 2] : sin[i / 2];
  }
}

// 1 / sqrt(mean square + eps) of one head: too short for every lane of moments() to be added alone.
template <class T>
FD_INLINE Moments rms_of(const T* x, int64_t n, double eps) {
  Vec lanes[kUnroll] = {};
  int64_t i = 0;
  for (; i + kUnroll * kWidth <= n; i += kUnroll * kWidth) {
    for (int u = 0; u < kUnroll; ++u) {
      const Vec v = load(x + i + u * kWidth);
      lanes[u] += v * v;
    }
  }
  for (; i < n; i += kWidth) {
    const Vec v = load(x + i, n - i < kWidth ? n - i : kWidth);  // zeros behind the end
    lanes[0] += v * v;
  }
  const Vec all = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
  double sum = 0;
  for (int j = 0; j < kWidth; ++j) sum += all[j];
  Moments m;
  m.scale = float(1.0 / std::sqrt(sum / double(n) + eps));
  return m;
}

// How the heads of q or of k become what is stored; null where not given.
template <class T>
struct Heads {
  const T* x;
  T* out;
  const T* weight;
  const T* bias;
  int count;
};

template <class T>
FD_INLINE void one_head(const Heads<T>& h, int64_t at, int64_t affine_at, const Moments& m,
                        const Turn* turn, int64_t n) {
  each_vector(n, [&, n](int64_t i, auto load, auto store) FD_INLINE_LAMBDA {
    Vec y = (load(h.x + at + i) - m.mean - m.remainder) * m.scale;
    if (h.weight != nullptr) y *= load(h.weight + affine_at + i);
    if (h.bias != nullptr) y += load(h.bias + affine_at + i);
    if (turn != nullptr) {
      const Vec swapped = __builtin_shufflevector(y, y, FD_SWAPPED);
      y = y * load(turn->cos + i) + swapped * load(turn->sin + i);
    }
    store(h.out + at + i, y);
  });
}

template <class T>
void all_heads(const QkvPrologue& p, const Heads<T>& h, const Turn* turn) {
  const int64_t n = p.head;
  if (p.norm == Norm::kNone && turn == nullptr) {
    std::memcpy(h.out, h.x, h.count * n * sizeof(T));
    return;
  }
  Moments m;
  m.scale = 1;
  const bool all = spans_heads(p.norm);
  if (all) m = moments(h.x, h.count * n, p.eps, p.norm == Norm::kRmsAcross);
  for (int i = 0; i < h.count; ++i) {
    if (p.norm == Norm::kRms) m = rms_of(h.x + i * n, n, p.eps);
    one_head(h, i * n, all ? i * n : 0, m, turn, n);
  }
}

template <class T>
void one_token(const QkvPrologue& p, int64_t b, int64_t k) {
  const int64_t stored = p.rows.at(b, k);
  const auto affine = [](const Operand& o) { return static_cast<const T*>(o.data); };
  Turn turn;
  if (p.cos) expand(p.cos.row<float>(b, stored), p.sin.row<float>(b, stored), p.head, turn);
  const Heads<T> q = {p.q.row<T>(b, k), p.q_out.row<T>(b, k), affine(p.q_weight), affine(p.q_bias),
                      p.heads};
  const Heads<T> keys = {p.k.row<T>(b, k), p.k_cache.row<T>(b, stored), affine(p.k_weight),
                         affine(p.k_bias), p.kv_heads};
  all_heads(p, q, p.cos ? &turn : nullptr);
  all_heads(p, keys, p.cos ? &turn : nullptr);
  std::memcpy(p.v_cache.row<T>(b, stored), p.v.row<T>(b, k), p.kv_heads * p.head * sizeof(T));
}

template <class T>
void all_tokens(const QkvPrologue& p) {
  const int64_t count = p.shape.batch * p.shape.tokens;
#pragma omp parallel for schedule(static) num_threads(p.threads) if (p.threads > 1)
  for (int64_t i = 0; i < count; ++i) one_token<T>(p, i / p.shape.tokens, i % p.shape.tokens);
}

}  // namespace

void qkv_prologue(const QkvPrologue& p) {
  by_dtype(p.dtype, [&p](auto zero) { all_tokens<decltype(zero)>(p); });
}

}  // namespace FD_ISA
}  // namespace fd
