// A kernel that needs everything the emulator has: each block copies a tile to shared memory in the
// background, waits, meets at a barrier, reads what another thread copied, and adds the sum of its
// warp. test_emulation.py compiles it with parts left out.
#include <string>

#include "cuda_port.h"

using fd::cuda::copy_async;
using fd::cuda::copy_async_commit;
using fd::cuda::copy_async_wait;

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
  for (int i = 0; i < 4; ++i)
    out[start + 4 * threadIdx.x + i] = tile[4 * other + i] + sums[threadIdx.x];
}

}  // namespace

// Returns what went wrong, in a buffer that the next call overwrites; null if nothing did.
extern "C" __attribute__((visibility("default"))) const char* run_probe(const float* in, float* out,
                                                                        int blocks, int threads) {
  static std::string failure;
  try {
    FD_LAUNCH(probe, dim3(blocks), dim3(threads), nullptr, in, out);
  } catch (const std::exception& error) {
    failure = error.what();
    return failure.c_str();
  }
  return nullptr;
}
