// Two kernels. Where the norm is that of one head, or none, a group of 1 to 32 lanes takes one head
// of q, k or v: 16 lanes of one vector at d = 128, 8 at 64, 4 of three at 72 and 96 (bf16). Lanes
// of a group are neighbours within a warp, so a norm is a few shuffles and needs no barrier, and
// the heads of a block are one token's: its rows, cos and sin come from L1 for all but the first.
// Its block (x, y, z) is of token x of sample z, so that no thread divides to find out where it is.
// Where the norm spans all heads, a block takes one token's q, k or v.
//
// Everything is read once and kept in registers. A vector never crosses a head, and holds whole
// pairs, so the rotation needs no other lane. Variance takes two passes, as in norm_modulate.
// Traffic: 2 B K (H + 2 G) d elements.
#include "launch.h"
#include "qkv_prologue.h"
#include "reduce.h"
#include "vector.h"

namespace fd {
namespace cuda {
namespace {

// Of a block that takes heads, at most: 24 heads with as many keys and values fill whole blocks.
constexpr int kThreads = 288;
// Blocks of it on a processor: near its 1536 or 2048 threads, but on sm_100, which would spill.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1000)
constexpr int kResident = 5;
#else
constexpr int kResident = 7;
#endif
constexpr int kMaxSamples = 65535;  // of a grid
constexpr int kMaxThreads = 512;    // of one that takes a token
constexpr int kMaxVectors = 4;      // of a thread of it

enum class Part : int { kQ = 0, kK = 1, kV = 2 };

// What becomes of a token's q, k or v: rows that begin at its first head.
template <class T>
struct Task {
  const T* from;
  T* to;
  const T* weight;   // null: 1
  const T* bias;     // null: 0
  const float* cos;  // null: no rotation
  const float* sin;
  bool copied;  // as it is
};

template <class T>
__device__ __forceinline__ Task<T> task_of(const QkvPrologue& p, Part part, int64_t b, int64_t k) {
  const int64_t stored = p.rows.at(b, k);
  const bool is_q = part == Part::kQ;
  const Operand from = is_q ? p.q : part == Part::kK ? p.k : p.v;
  const Operand to = is_q ? p.q_out : part == Part::kK ? p.k_cache : p.v_cache;
  Task<T> t;
  t.from = from.row<T>(b, k);
  t.to = to.row<T>(b, is_q ? k : stored);
  t.weight = static_cast<const T*>(is_q ? p.q_weight.data : p.k_weight.data);
  t.bias = static_cast<const T*>(is_q ? p.q_bias.data : p.k_bias.data);
  t.cos = p.cos ? p.cos.row<float>(b, stored) : nullptr;
  t.sin = p.cos ? p.sin.row<float>(b, stored) : nullptr;
  t.copied = part == Part::kV || (p.norm == Norm::kNone && !p.cos);
  return t;
}

// (x0, x1) -> (x0 c - x1 s, x1 c + x0 s) for the pairs of a vector, of which n elements are there.
template <class T, bool kAligned>
__device__ __forceinline__ void rotate(const float* cos, const float* sin, int n, float* y) {
  constexpr int kPairs = kElements<T> / 2;
  float c[kPairs], s[kPairs];
  if constexpr (kPairs == kElements<float>) {
    to_floats<float>(load<kAligned>(cos, n / 2), c);
    to_floats<float>(load<kAligned>(sin, n / 2), s);
  } else {
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      c[j] = 2 * j < n ? cos[j] : 0.0f;
      s[j] = 2 * j < n ? sin[j] : 0.0f;
    }
  }
#pragma unroll
  for (int j = 0; j < kPairs; ++j) {
    const float real = y[2 * j], imaginary = y[2 * j + 1];
    y[2 * j] = fmaf(real, c[j], -(imaginary * s[j]));
    y[2 * j + 1] = fmaf(imaginary, c[j], real * s[j]);
  }
}

// (x - mean - rest) * scale, by weight and bias from `affine` on; then the rotation by the pairs of
// element i of a head on. n elements of the vector are there.
template <class T, bool kAligned>
__device__ __forceinline__ Words finished(const Task<T>& t, const Words& x, float mean, float rest,
                                          float scale, int affine, int i, int n) {
  if (t.copied) return x;
  float y[kElements<T>], by[kElements<T>], plus[kElements<T>];
  to_floats<T>(x, y);
  if (t.weight != nullptr) to_floats<T>(load<kAligned>(t.weight + affine, n), by);
  if (t.bias != nullptr) to_floats<T>(load<kAligned>(t.bias + affine, n), plus);
#pragma unroll
  for (int e = 0; e < kElements<T>; ++e) {
    y[e] = (y[e] - mean - rest) * scale;
    if (t.weight != nullptr && t.bias != nullptr) {
      y[e] = fmaf(y[e], by[e], plus[e]);
    } else if (t.weight != nullptr) {
      y[e] *= by[e];
    } else if (t.bias != nullptr) {
      y[e] += plus[e];
    }
  }
  if (t.cos != nullptr) rotate<T, kAligned>(t.cos + i / 2, t.sin + i / 2, n, y);
  return from_floats<T>(y);
}

// Vector v of lane l of a group is number v * lanes + l of its head. With one vector a thread has
// little under way, so many threads are to be resident.
template <class T, int kVectors, bool kAligned>
__global__ void __launch_bounds__(kThreads, kVectors == 1 ? kResident : 4)
    qkv_prologue_heads_kernel(const __grid_constant__ QkvPrologue p) {
  const int lanes = blockDim.x, lane = threadIdx.x;
  const int number = blockIdx.y * blockDim.y + threadIdx.y;  // of the heads of q, then k, then v
  const bool inside = number < p.heads + 2 * p.kv_heads;
  const bool is_q = number < p.heads;
  const bool is_k = number < p.heads + p.kv_heads;
  const int head = is_q ? number : is_k ? number - p.heads : number - p.heads - p.kv_heads;
  Task<T> t = {};
  if (inside) {
    t = task_of<T>(p, is_q ? Part::kQ : is_k ? Part::kK : Part::kV, blockIdx.z, blockIdx.x);
    t.from += head * p.head;
    t.to += head * p.head;
    t.bias = nullptr;
  }

  Words x[kVectors];
  float sum = 0.0f;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int i = (v * lanes + lane) * kElements<T>;
    x[v] = {};
    if (inside && i < p.head) x[v] = load<kAligned>(t.from + i, p.head - i);
  }
  if (p.norm == Norm::kRms) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      float value[kElements<T>];
      to_floats<T>(x[v], value);
#pragma unroll
      for (int e = 0; e < kElements<T>; ++e) sum = fmaf(value[e], value[e], sum);
    }
    for (int other = lanes / 2; other > 0; other /= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, other);
    }
  }
  if (!inside) return;
  const float scale =
      p.norm == Norm::kRms ? __frsqrt_rn(sum / p.head + static_cast<float>(p.eps)) : 1.0f;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int i = (v * lanes + lane) * kElements<T>;
    if (i >= p.head) break;
    const int n = p.head - i;
    store<kAligned>(t.to + i, finished<T, kAligned>(t, x[v], 0.0f, 0.0f, scale, i, i, n), n);
  }
}

// Block 3 r + part takes that part of row r of all samples; of queries alone, block r takes row r.
// Vector v of a thread is number v * blockDim.x + threadIdx.x of the row, where each head begins a
// vector of its own.
template <class T, int kVectors, bool kAligned>
__global__ void __launch_bounds__(kMaxThreads)
    qkv_prologue_tokens_kernel(const __grid_constant__ QkvPrologue p, int head_vectors) {
  FD_SHARED(float, partial_mean, kMaxThreads / kWarp);
  FD_SHARED(float, partial_about, 2 * (kMaxThreads / kWarp));
  const bool alone = p.kv_heads == 0;
  const Part part = static_cast<Part>(alone ? 0 : blockIdx.x % 3);
  const uint32_t row = alone ? blockIdx.x : blockIdx.x / 3;
  const uint32_t tokens = static_cast<uint32_t>(p.shape.tokens);
  const Task<T> t = task_of<T>(p, part, row / tokens, row % tokens);
  const int heads = part == Part::kQ ? p.heads : p.kv_heads;
  const float width = static_cast<float>(heads * p.head);

  Words x[kVectors];
  int head[kVectors], start[kVectors];
  float mean = 0.0f;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int number = v * blockDim.x + threadIdx.x;
    head[v] = number / head_vectors;
    start[v] = number % head_vectors * kElements<T>;
    x[v] = {};
    if (head[v] < heads) {
      x[v] = load<kAligned>(t.from + head[v] * p.head + start[v], p.head - start[v]);
    }
  }
  float rest = 0.0f, scale = 1.0f;
  if (part != Part::kV) {  // the same for all threads of the block
    const bool rms = p.norm == Norm::kRmsAcross;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      float value[kElements<T>];
      to_floats<T>(x[v], value);
#pragma unroll
      for (int e = 0; e < kElements<T>; ++e) mean += rms ? value[e] * value[e] : value[e];
    }
    sum_over_block<1>(&mean, partial_mean);
    mean /= width;
    float variance = mean;
    if (rms) {
      mean = 0.0f;
    } else {
      float about[2] = {0.0f, 0.0f};  // of the deviations from the rounded mean, and their squares
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        float value[kElements<T>];
        to_floats<T>(x[v], value);
#pragma unroll
        for (int e = 0; e < kElements<T>; ++e) {
          const bool there = head[v] < heads && start[v] + e < p.head;
          const float deviation = there ? value[e] - mean : 0.0f;
          about[0] += deviation;
          about[1] = fmaf(deviation, deviation, about[1]);
        }
      }
      sum_over_block<2>(about, partial_about);
      rest = about[0] / width;
      variance = about[1] / width - rest * rest;
      variance = variance < 0.0f ? 0.0f : variance;  // NaN stays
    }
    scale = __frsqrt_rn(variance + static_cast<float>(p.eps));
  }
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (head[v] >= heads) break;
    const int at = head[v] * p.head + start[v], n = p.head - start[v];
    const Words y = finished<T, kAligned>(t, x[v], mean, rest, scale, at, start[v], n);
    store<kAligned>(t.to + at, y, n);
  }
}

template <class T>
bool all_aligned(const QkvPrologue& p) {
  bool yes = p.head % kElements<T> == 0;
  for (const Operand* o : {&p.q, &p.k, &p.v, &p.q_out, &p.k_cache, &p.v_cache, &p.q_weight,
                           &p.q_bias, &p.k_weight, &p.k_bias}) {
    yes = yes && aligned<T>(*o);
  }
  return yes && aligned<float>(p.cos) && aligned<float>(p.sin);
}

// So many blocks for each token of each sample.
dim3 grid_of(const Shape& shape, int blocks) {
  if (shape.batch > kMaxSamples || shape.tokens >= int64_t{1} << 31) {
    throw std::invalid_argument("q: got " + std::to_string(shape.batch) + " times " +
                                std::to_string(shape.tokens) + " tokens; accepted is up to " +
                                std::to_string(kMaxSamples) + " times 2147483647");
  }
  return dim3(static_cast<unsigned>(shape.tokens), blocks, static_cast<unsigned>(shape.batch));
}

int divided(int n, int by) { return (n + by - 1) / by; }  // rounded up

// How many heads a block takes, in whole warps: all, or what leaves the fewest lanes of a token
// without one, in the largest blocks that do.
int heads_of_block(int heads, int lanes) {
  const int of_warp = kWarp / lanes, most = kThreads / kWarp;
  int best = most * of_warp;
  if (heads <= best) return divided(heads, of_warp) * of_warp;
  for (int n = best - of_warp; n >= most / 2 * of_warp; n -= of_warp) {
    if (divided(heads, n) * n < divided(heads, best) * best) best = n;
  }
  return best;
}

template <class T, int kVectors>
void launch_heads(const QkvPrologue& p, int lanes, void* stream) {
  const int heads = p.heads + 2 * p.kv_heads, of_block = heads_of_block(heads, lanes);
  const dim3 grid = grid_of(p.shape, divided(heads, of_block)), block(lanes, of_block);
  if (all_aligned<T>(p)) {
    FD_LAUNCH((qkv_prologue_heads_kernel<T, kVectors, true>), grid, block, stream, p);
  } else {
    FD_LAUNCH((qkv_prologue_heads_kernel<T, kVectors, false>), grid, block, stream, p);
  }
}

template <class T, int kVectors>
void launch_tokens(const QkvPrologue& p, int vectors, int head_vectors, void* stream) {
  const int threads = divided(vectors, kVectors);
  const int64_t rows = p.shape.batch * p.shape.tokens, limit = (int64_t{1} << 31) / 3;
  if (rows >= limit) {
    throw std::invalid_argument("q: got " + std::to_string(rows) +
                                " tokens; accepted for a norm of all heads is fewer than " +
                                std::to_string(limit));
  }
  const dim3 grid(p.kv_heads == 0 ? rows : 3 * rows), block(divided(threads, kWarp) * kWarp);
  if (all_aligned<T>(p)) {
    FD_LAUNCH((qkv_prologue_tokens_kernel<T, kVectors, true>), grid, block, stream, p,
              head_vectors);
  } else {
    FD_LAUNCH((qkv_prologue_tokens_kernel<T, kVectors, false>), grid, block, stream, p,
              head_vectors);
  }
}

int power_of_two(int n) {  // the next one
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

template <class T>
void launch(const QkvPrologue& p, void* stream) {
  const int head_vectors = (p.head + kElements<T> - 1) / kElements<T>;
  if (spans_heads(p.norm)) {
    const int vectors = p.heads * head_vectors;
    if (vectors <= kMaxThreads) return launch_tokens<T, 1>(p, vectors, head_vectors, stream);
    if (vectors <= kMaxVectors * kMaxThreads) {
      return launch_tokens<T, kMaxVectors>(p, vectors, head_vectors, stream);
    }
    throw std::invalid_argument("q: got " + std::to_string(p.heads) + " heads of " +
                                std::to_string(p.head) + "; accepted for a norm of all is up to " +
                                std::to_string(kMaxVectors * kMaxThreads * kElements<T>) +
                                " elements");
  }
  // One vector a lane, or three where that idles fewer lanes.
  const int one = power_of_two(head_vectors), three = power_of_two((head_vectors + 2) / 3);
  if (one <= 3 * three && one <= kWarp) return launch_heads<T, 1>(p, one, stream);
  launch_heads<T, 3>(p, three, stream);
}

}  // namespace

void qkv_prologue(const QkvPrologue& p, const Target& target) {
  if (p.shape.batch * p.shape.tokens == 0) return;
  launch_on(target, p.dtype, "qkv_prologue",
            [&](auto zero) { launch<decltype(zero)>(p, target.stream); });
}

}  // namespace cuda
}  // namespace fd
