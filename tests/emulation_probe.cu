// Two kernels that need everything the emulator has. probe: each block copies a tile to shared
// memory in the background, waits, meets at a barrier, reads what another thread copied, and adds
// the sum of its warp. count: votes, sums over the lanes below, and a histogram of the block.
// test_emulation.py compiles them with parts left out.
#include <string>

#include "cuda_port.h"

using fd::cuda::copy_async;
using fd::cuda::copy_async_commit;
using fd::cuda::copy_async_wait;
using fd::cuda::store_whole;

namespace {

template <class T>
__device__ T warp_sum(T value) {
#ifdef WRONG_LANE
  for (int lanes = 8; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffffu, value, lanes);
#else
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffffu, value, lanes);
#endif
  return value;
}

// in and out: 4 floats for each thread of the grid.
__global__ void probe(const float* in, float* out) {
  const int threads = blockDim.x;
  FD_SHARED(float, tile, 4 * 1024);
  FD_SHARED(float, sums, 1024);
  const int64_t start = int64_t{4} * blockIdx.x * threads;
#ifdef MISALIGNED
  copy_async(tile + 4 * threadIdx.x, in + start + 4 * threadIdx.x + 1);
#else
  copy_async(tile + 4 * threadIdx.x, in + start + 4 * threadIdx.x);
#endif
  copy_async_commit();
#ifndef NO_WAIT
  copy_async_wait<0>();
#endif
#ifdef PARTIAL_WARP
  if (threadIdx.x == 5) return;
#endif
#ifdef DIVERGENT_BARRIER
  if (threadIdx.x / 32 == 0)
#endif
#ifndef NO_BARRIER
    __syncthreads();
#endif
  const int other = threads - 1 - threadIdx.x;
  sums[threadIdx.x] = warp_sum(tile[4 * other]);
  struct alignas(8) Pair {
    float first, second;
  };
  const float sum = sums[threadIdx.x];
  for (int i = 0; i < 4; i += 2) {
    const Pair pair = {tile[4 * other + i] + sum, tile[4 * other + i + 1] + sum};
#ifdef MISALIGNED_STORE
    store_whole(out + start + 4 * threadIdx.x + i + 1, pair);
#else
    store_whole(out + start + 4 * threadIdx.x + i, pair);
#endif
  }
}

// in: 4 floats for each thread, of which the first is a whole number from 0 to 99. out: yes votes
// of the lanes below, all of the warp's, the sum over the lanes up to this one, and how many of the
// block have the same last digit.
__global__ void count(const float* in, float* out) {
  FD_SHARED(int, digits, 10);
  const int at = 4 * (blockIdx.x * blockDim.x + threadIdx.x), lane = threadIdx.x % 32;
  const int value = static_cast<int>(in[at]);
  if (threadIdx.x < 10) digits[threadIdx.x] = 0;
  __syncthreads();
  atomicAdd(digits + value % 10, 1);
#ifndef NO_COUNT_BARRIER
  __syncthreads();
#endif
#ifdef PARTIAL_VOTE
  if (lane == 7) return;
#endif
#ifdef OTHER_VOTE
  const unsigned votes = __ballot_sync(0xffffffffu, value >= 10);
#else
  const unsigned votes = __ballot_sync(0xffffffffu, value >= 50);
#endif
  int sum = value;
#ifdef SHORT_SCAN
  for (int lanes = 1; lanes < 16; lanes *= 2) {
#else
  for (int lanes = 1; lanes < 32; lanes *= 2) {
#endif
    const int below = __shfl_up_sync(0xffffffffu, sum, lanes);
    if (lane >= lanes) sum += below;
  }
  out[at] = __popc(votes & ((1u << lane) - 1));
  out[at + 1] = __popc(votes);
  out[at + 2] = sum;
  out[at + 3] = digits[value % 10];
}

template <class Kernel>
const char* run(Kernel kernel, const float* in, float* out, int blocks, int threads) {
  static std::string failure;
  try {
    FD_LAUNCH(kernel, dim3(blocks), dim3(threads), nullptr, in, out);
  } catch (const std::exception& error) {
    failure = error.what();
    return failure.c_str();
  }
  return nullptr;
}

}  // namespace

#define FD_EXPORT extern "C" __attribute__((visibility("default"))) const char*

// They return what went wrong, in a buffer that the next call overwrites; null if nothing did.
FD_EXPORT run_probe(const float* in, float* out, int blocks, int threads) {
  return run(probe, in, out, blocks, threads);
}

FD_EXPORT run_count(const float* in, float* out, int blocks, int threads) {
  return run(count, in, out, blocks, threads);
}
