// Compiled once per instruction set (FD_ISA). One head of one sample is the work of one thread: its
// keys are taken kBlock at a time, laid out anew in fp32 (k with its keys side by side, v by rows)
// and kept in the second cache while all queries pass them, a tile of kRows at once. The softmax is
// taken as the blocks go by: the largest score so far and the sum of exponentials are kept, and
// what was added before is scaled down when the largest grows. Products are sums in registers,
// kRows times kColumns vectors of them.
#include "sparse_attention.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "simd.h"

namespace fd {
namespace FD_ISA {
namespace {

#if defined(__AVX512F__)
#define FD_LOWER 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define FD_UPPER 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX2__)
#define FD_LOWER 0, 8, 1, 9, 2, 10, 3, 11
#define FD_UPPER 4, 12, 5, 13, 6, 14, 7, 15
#else
#define FD_LOWER 0, 4, 1, 5
#define FD_UPPER 2, 6, 3, 7
#endif

#if defined(__AVX512F__)
constexpr int kRows = 12, kColumns = 2;  // 24 sums and 2 operands of 32 registers
#else
constexpr int kRows = 4, kColumns = 2;  // 8 and 2 of 16
#endif
constexpr int kTile = kColumns * kWidth;
constexpr int kBlock = 256;  // keys; with d = 128 both layouts take 256 KiB
constexpr int kAhead = 16;   // rows of keys and values that are asked for before they are read

// In every lane; adding 0 instead would turn a -0, so compilers do not leave it out.
FD_INLINE Vec every(float x) { return x - Vec{}; }

FD_INLINE Ints numbered_lanes() {
  Ints lanes;
  for (int i = 0; i < kWidth; ++i) lanes[i] = i;
  return lanes;
}

// a where the lane is marked, else b.
FD_INLINE Vec chosen(Ints marked, Vec a, Vec b) {
  return reinterpret_cast<Vec>((marked & reinterpret_cast<Ints>(a)) |
                               (~marked & reinterpret_cast<Ints>(b)));
}

// Rows become columns: as often as 2 divides the width, the first half of the rows is shuffled into
// the second like cards.
FD_INLINE void transpose(Vec (&rows)[kWidth]) {
  for (int round = 1; round < kWidth; round *= 2) {
    Vec next[kWidth];
    for (int i = 0; i < kWidth / 2; ++i) {
      next[2 * i] = __builtin_shufflevector(rows[i], rows[i + kWidth / 2], FD_LOWER);
      next[2 * i + 1] = __builtin_shufflevector(rows[i], rows[i + kWidth / 2], FD_UPPER);
    }
    for (int i = 0; i < kWidth; ++i) rows[i] = next[i];
  }
}

// Of each row its lanes, folded; lane r is of row r.
template <class F>
FD_INLINE Vec across(const Vec (&rows)[kRows], F fold) {
  static_assert(kRows <= kWidth);
  Vec square[kWidth] = {};
  for (int r = 0; r < kRows; ++r) square[r] = rows[r];
  transpose(square);
  Vec folded = square[0];
  for (int i = 1; i < kWidth; ++i) folded = fold(folded, square[i]);
  return folded;
}

// sums[r][c] = sum_i left[r][i] right[i][c], rows of the tile of queries times one tile of columns.
template <int kCount>
FD_INLINE void multiply(const float* left, int64_t left_stride, const float* right,
                        int64_t right_stride, int64_t n, Vec (&sums)[kRows][kCount]) {
  for (int64_t i = 0; i < n; ++i) {
    // The other loads wait for nothing; these come from the second cache.
    for (int c = 0; c < kCount; ++c)
      __builtin_prefetch(right + (i + 4) * right_stride + c * kWidth);
    Vec columns[kCount];
    for (int c = 0; c < kCount; ++c) columns[c] = load(right + i * right_stride + c * kWidth);
    for (int r = 0; r < kRows; ++r) {
      const Vec one = every(left[r * left_stride + i]);
      for (int c = 0; c < kCount; ++c) sums[r][c] += one * columns[c];
    }
  }
}

// What one thread works in.
struct Scratch {
  int64_t wide;                 // d, up to a whole vector
  std::vector<float> k, v;      // [blocks of kTile keys][d][kTile] and [kBlock][wide]
  std::vector<float> q;         // [Q, up to a whole tile][d]
  std::vector<float> out;       // [the same][wide], not yet divided by the sums
  std::vector<float> top, sum;  // [the same]
  std::vector<float> weights;   // [kRows][kBlock]
};

// A head's row of `width`: rows lie pages apart, where processors do not look ahead.
template <class T>
FD_INLINE void prefetch(const T* row, int64_t width) {
  const char* const at = reinterpret_cast<const char*>(row);
  for (int64_t i = 0; i < width * int64_t{sizeof(T)}; i += 64) __builtin_prefetch(at + i);
}

template <class T>
void lay_out(const SparseAttention& p, int64_t b, int64_t g, int64_t first, int64_t count,
             Scratch& s) {
  for (int64_t j = 0; j < (count + kTile - 1) / kTile * kTile; j += kWidth) {
    float* at = s.k.data() + j / kTile * p.head * kTile + j % kTile;
    for (int64_t r = j + kAhead; r < std::min<int64_t>(j + kAhead + kWidth, count); ++r) {
      prefetch(p.k.row<T>(b, first + r) + g * p.head, p.head);
    }
    for (int64_t i = 0; i < p.head; i += kWidth) {
      const int64_t inside = std::min<int64_t>(kWidth, p.head - i);
      Vec square[kWidth];
#pragma GCC unroll 16
      for (int r = 0; r < kWidth; ++r) {
        square[r] = Vec{};
        if (r < count - j) square[r] = load(p.k.row<T>(b, first + j + r) + g * p.head + i, inside);
      }
      transpose(square);
#pragma GCC unroll 16
      for (int r = 0; r < kWidth; ++r) {
        if (r < inside) store(at + (i + r) * kTile, square[r]);
      }
    }
  }
  for (int64_t j = 0; j < count; ++j) {
    if (j + kAhead < count) prefetch(p.v.row<T>(b, first + j + kAhead) + g * p.head, p.head);
    const T* row = p.v.row<T>(b, first + j) + g * p.head;
    float* at = s.v.data() + j * s.wide;
    for (int64_t i = 0; i < p.head; i += kWidth) {
      store(at + i, load(row + i, std::min<int64_t>(kWidth, p.head - i)));
    }
  }
}

// The weighted values of `count` keys, kCount vectors of their columns, onto a tile of queries.
template <int kCount>
FD_INLINE void add_values(Scratch& s, int64_t row, int64_t at, int64_t count) {
  Vec sums[kRows][kCount] = {};
  multiply(s.weights.data(), kBlock, s.v.data() + at, s.wide, count, sums);
  for (int r = 0; r < kRows; ++r) {
    float* out = s.out.data() + (row + r) * s.wide + at;
    for (int c = 0; c < kCount; ++c) store(out + c * kWidth, load(out + c * kWidth) + sums[r][c]);
  }
}

// A tile of queries and a block of `count` keys.
FD_INLINE void one_tile(const SparseAttention& p, Scratch& s, int64_t row, int64_t count) {
  float* weights = s.weights.data();
  const int64_t tiles = (count + kTile - 1) / kTile;
  Vec top[kRows];
  for (int r = 0; r < kRows; ++r) top[r] = every(s.top[row + r]);
  for (int64_t t = 0; t < tiles; ++t) {
    Vec sums[kRows][kColumns] = {};
    multiply(s.q.data() + row * p.head, p.head, s.k.data() + t * p.head * kTile, kTile, p.head,
             sums);
    const Vec scale = every(p.scale), lowest = every(-std::numeric_limits<float>::max());
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) {
      const int64_t at = t * kTile + c * kWidth;
      const Ints inside =
          numbered_lanes() < static_cast<int32_t>(count - at);  // others weigh nothing
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const Vec score = chosen(inside, sums[r][c] * scale, lowest);
        store(weights + r * kBlock + at, score);
        top[r] = chosen(top[r] > score, top[r], score);
      }
    }
  }
  const Vec before = load(s.top.data() + row, kRows);
  const Vec most = across(top, [](Vec a, Vec b) FD_INLINE_LAMBDA { return chosen(a > b, a, b); });
  const Vec shrink = exp_of(before - most);
  Vec sum[kRows];
  for (int r = 0; r < kRows; ++r) {
    sum[r] = Vec{};
    for (int64_t i = 0; i < tiles * kTile; i += kWidth) {
      const Vec weight = exp_of(load(weights + r * kBlock + i) - most[r]);
      store(weights + r * kBlock + i, weight);
      sum[r] += i + kWidth <= count ? weight : first(weight, std::max<int64_t>(count - i, 0));
    }
    if (shrink[r] == 1.0f) continue;
    float* out = s.out.data() + (row + r) * s.wide;
    for (int64_t i = 0; i < s.wide; i += kWidth) store(out + i, load(out + i) * shrink[r]);
  }
  store(s.top.data() + row, most, kRows);
  const Vec added = across(sum, [](Vec a, Vec b) FD_INLINE_LAMBDA { return a + b; });
  store(s.sum.data() + row, load(s.sum.data() + row, kRows) * shrink + added, kRows);
  int64_t at = 0;
  for (; at + kTile <= s.wide; at += kTile) add_values<kColumns>(s, row, at, count);
  for (; at < s.wide; at += kWidth) add_values<1>(s, row, at, count);
}

template <class T>
void one_head(const SparseAttention& p, int64_t b, int64_t h, Scratch& s) {
  const int64_t g = h / (p.heads / p.kv_heads);
  const int64_t rows = (p.queries + kRows - 1) / kRows * kRows;
  for (int64_t row = 0; row < rows; ++row) {
    const T* q = row < p.queries ? p.q.row<T>(b, row) + h * p.head : nullptr;
    for (int64_t i = 0; i < p.head; ++i) {
      s.q[row * p.head + i] = q ? to_float(q[i]) : 0.0f;
    }
  }
  std::fill(s.out.begin(), s.out.end(), 0.0f);
  std::fill(s.sum.begin(), s.sum.end(), 0.0f);
  std::fill(s.top.begin(), s.top.end(), -std::numeric_limits<float>::max());
  for (int64_t first = 0; first < p.keys; first += kBlock) {
    const int64_t count = std::min<int64_t>(kBlock, p.keys - first);
    lay_out<T>(p, b, g, first, count, s);
    for (int64_t row = 0; row < rows; row += kRows) one_tile(p, s, row, count);
  }
  for (int64_t row = 0; row < p.queries; ++row) {
    T* out = p.out.row<T>(b, row) + h * p.head;
    const float* sums = s.out.data() + row * s.wide;
    for (int64_t i = 0; i < p.head; i += kWidth) {
      store(out + i, load(sums + i) / s.sum[row], std::min<int64_t>(kWidth, p.head - i));
    }
  }
}

template <class T>
void all_heads(const SparseAttention& p) {
  const int64_t count = p.batch * p.heads;
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  {
    const int64_t rows = (p.queries + kRows - 1) / kRows * kRows;
    Scratch s;
    s.wide = (p.head + kWidth - 1) / kWidth * kWidth;
    s.k.resize(kBlock * p.head);
    s.v.resize(kBlock * s.wide);  // zeros beyond d
    s.q.resize(rows * p.head);
    s.out.resize(rows * s.wide);
    s.top.resize(rows);
    s.sum.resize(rows);
    s.weights.resize(kRows * kBlock);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; ++i) one_head<T>(p, i / p.heads, i % p.heads, s);
  }
}

}  // namespace

void sparse_attention(const SparseAttention& p) {
  by_dtype(p.dtype, [&p](auto zero) { all_heads<decltype(zero)>(p); });
}

}  // namespace FD_ISA
}  // namespace fd
