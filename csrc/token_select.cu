// Two launches. token_keys takes one token a thread: its metric, and the two keys that say when it
// is dropped. token_select takes one sample a block: radix selects over the keys, eight bits at a
// time, find where each side is cut, and a scan over the tokens in raster order writes the tables.
//
// Nothing is sorted and nothing waits. Counts are integers and equals are ranked by a scan, so the
// order in which threads run is nowhere in the result. A token's keys are read and written by the
// same thread throughout.
#include "cuda_port.h"
#include "launch.h"
#include "token_select.h"

namespace fd {
namespace cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 128;      // of token_keys: enough blocks for every processor
constexpr int kMaxThreads = 1024;  // of token_select
constexpr int kDigits = 256;
constexpr unsigned kAll = 0xffffffffu;  // lanes

// The metric of one token, +infinity where it is not finite.
template <class T>
__device__ __forceinline__ float metric_of(const TokenSelect& p, int64_t b, int64_t token) {
  const T* patch = static_cast<const T*>(p.velocity) + b * p.stride[0] +
                   token / p.grid[1] * p.stride[1] + token % p.grid[1] * p.stride[2];
  const int channels = static_cast<int>(p.channels);
  const float divisor = channels > 1 ? channels - 1.0f : 1.0f;
  float sum = 0.0f;
  for (int64_t y = 0; y < p.patch[0]; ++y) {
    for (int64_t x = 0; x < p.patch[1]; ++x) {
      const T* pixel = patch + y * p.stride[3] + x * p.stride[4];
      float mean = 0.0f, squares = 0.0f;
      if (!p.norm) {
        for (int c = 0; c < channels; ++c) mean += to_float(pixel[c * p.stride[5]]);
        mean /= channels;
      }
      for (int c = 0; c < channels; ++c) {
        const float deviation = to_float(pixel[c * p.stride[5]]) - mean;
        squares = fmaf(deviation, deviation, squares);
      }
      sum += sqrtf(p.norm ? squares : squares / divisor);
    }
  }
  return finite_or_infinity(sum / static_cast<float>(p.patch[0] * p.patch[1]));
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    token_keys_kernel(const __grid_constant__ TokenSelect p, uint32_t count) {
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const uint32_t tokens = static_cast<uint32_t>(p.tokens());
  const int64_t b = i / tokens, token = i % tokens;
  const float metric = metric_of<T>(p, b, token);
  const bool forced = p.max_age > 0 && p.age.row(b)[token] >= p.max_age;
  const double times = static_cast<double>(p.starvation) * p.drops.row(b)[token];
  if (p.high > 0) p.keys[i] = drop_key(metric, exp(-times), forced, true);
  p.keys[count + i] = drop_key(metric, exp(times), forced, false);
}

// Dropped are the keys below `key`, and `take` of the `equal` ones that have it.
struct Cut {
  uint32_t key = 0;
  int take = 0;
  int equal = 0;
};

// One warp: the digit with which the running sum of the histogram reaches `left`. Each lane owns
// kDigits / kWarp digits next to each other.
__device__ __forceinline__ void find_digit(const int* histogram, int left, int* found) {
  constexpr int kOwn = kDigits / kWarp;
  const int lane = threadIdx.x, first = lane * kOwn;
  int own = 0;
#pragma unroll
  for (int d = 0; d < kOwn; ++d) own += histogram[first + d];
  int upto = own;
#pragma unroll
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    const int before = __shfl_up_sync(kAll, upto, lanes);
    if (lane >= lanes) upto += before;
  }
  int before = upto - own;
  if (before >= left || upto < left) return;  // true of all lanes but one
  int digit = first;
  while (before + histogram[digit] < left) before += histogram[digit++];
  found[0] = digit;
  found[1] = left - before;
  found[2] = histogram[digit];
}

// Where to cut so that `count` keys, at least one, are dropped.
__device__ __forceinline__ Cut find_cut(const uint32_t* keys, int tokens, int count, int* histogram,
                                        int* found) {
  Cut cut;
  cut.take = count;
  for (int shift = 24; shift >= 0; shift -= 8) {
    const uint32_t known = shift == 24 ? 0 : ~0u << (shift + 8);
    for (int d = threadIdx.x; d < kDigits; d += blockDim.x) histogram[d] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < tokens; i += blockDim.x) {
      const uint32_t key = keys[i];
      if ((key & known) == cut.key) atomicAdd(histogram + (key >> shift) % kDigits, 1);
    }
    __syncthreads();
    if (threadIdx.x < kWarp) find_digit(histogram, cut.take, found);
    __syncthreads();
    cut.key |= static_cast<uint32_t>(found[0]) << shift;
    cut.take = found[1];
    cut.equal = found[2];
  }
  return cut;
}

// How many threads before this one say yes; `seen` grows by all that do.
__device__ __forceinline__ int rank_in_block(bool yes, int* of_warp, int& seen) {
  const unsigned votes = __ballot_sync(kAll, yes);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  if (lane == 0) of_warp[warp] = __popc(votes);
  __syncthreads();
  int rank = seen + __popc(votes & ((1u << lane) - 1));
  for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w) {
    if (w < warp) rank += of_warp[w];
    seen += of_warp[w];
  }
  __syncthreads();  // of_warp is written again by the next call
  return rank;
}

__global__ void __launch_bounds__(kMaxThreads)
    token_select_kernel(const __grid_constant__ TokenSelect p) {
  FD_SHARED(int, histogram, kDigits);
  FD_SHARED(int, found, 3);
  FD_SHARED(int, of_warp, kMaxThreads / kWarp);
  const int tokens = static_cast<int>(p.tokens());
  const int64_t b = blockIdx.x;
  const uint32_t* high_keys = p.keys + b * tokens;
  uint32_t* low_keys = p.keys + (p.batch + b) * tokens;

  if (p.high > 0) {
    const Cut cut = find_cut(high_keys, tokens, static_cast<int>(p.high), histogram, found);
    int seen = 0;
    for (int start = 0; start < tokens; start += blockDim.x) {
      const int i = start + threadIdx.x;
      const uint32_t key = i < tokens ? high_keys[i] : kDropped;
      const int rank = rank_in_block(key == cut.key, of_warp, seen);
      const bool last_ones = key == cut.key && rank >= cut.equal - cut.take;
      if (key < cut.key || last_ones) low_keys[i] = kDropped;
    }
  }
  Cut cut;
  if (p.low() > 0) cut = find_cut(low_keys, tokens, static_cast<int>(p.low()), histogram, found);
  int seen = 0, kept = 0;
  for (int start = 0; start < tokens; start += blockDim.x) {
    const int i = start + threadIdx.x;
    const uint32_t key = i < tokens ? low_keys[i] : kDropped;
    const int rank = rank_in_block(key == cut.key, of_warp, seen);
    const bool first_ones = key == cut.key && rank < cut.take;
    const bool dropped = key < cut.key || first_ones || key == kDropped;
    const int position = rank_in_block(!dropped, of_warp, kept);
    if (i >= tokens) continue;
    if (dropped) {
      p.drops.row(b)[i] += 1;
    } else {
      p.rows.row(b)[position] = i;
    }
    p.inverse.row(b)[i] = dropped ? -1 : position;
    if (p.age) p.age.row(b)[i] = dropped ? p.age.row(b)[i] + 1 : 0;
  }
}

template <class T>
void launch(const TokenSelect& p, void* stream) {
  const int64_t count = p.batch * p.tokens();
  if (count >= int64_t{1} << 31) {
    throw std::invalid_argument("velocity: got " + std::to_string(count) +
                                " tokens; accepted is fewer than 2147483648");
  }
  const dim3 grid((count + kThreads - 1) / kThreads), block(kThreads);
  FD_LAUNCH(token_keys_kernel<T>, grid, block, stream, p, static_cast<uint32_t>(count));
  const int64_t whole = (p.tokens() + kWarp - 1) / kWarp * kWarp;
  const dim3 threads(whole < kMaxThreads ? whole : kMaxThreads);
  FD_LAUNCH(token_select_kernel, dim3(p.batch), threads, stream, p);
}

}  // namespace

void token_select(const TokenSelect& p, const Target& target) {
  if (p.batch * p.tokens() == 0) return;
  launch_on(target, p.dtype, "token_select",
            [&](auto zero) { launch<decltype(zero)>(p, target.stream); });
}

}  // namespace cuda
}  // namespace fd
