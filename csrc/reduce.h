// Sums, and the largest value, over the threads of a block.
#pragma once
#include "cuda_port.h"

namespace fd {
namespace cuda {

constexpr int kWarp = 32;

// Sums over the block of kTerms values, the same bits in every thread. partial has kTerms floats
// for each warp and is written once: a second sum takes another one.
template <int kTerms>
__device__ __forceinline__ void sum_over_block(float* values, float* partial) {
#pragma unroll
  for (int t = 0; t < kTerms; ++t) {
#pragma unroll
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
      values[t] += __shfl_xor_sync(0xffffffffu, values[t], lanes);
    }
  }
  const int warps = blockDim.x / kWarp;
  if (warps == 1) return;
  if (threadIdx.x % kWarp == 0) {
#pragma unroll
    for (int t = 0; t < kTerms; ++t) partial[threadIdx.x / kWarp * kTerms + t] = values[t];
  }
  __syncthreads();
#pragma unroll
  for (int t = 0; t < kTerms; ++t) {
    values[t] = 0.0f;
    for (int w = 0; w < warps; ++w) values[t] += partial[w * kTerms + t];
  }
}

__device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

// The largest of the block's values, in every thread; partial as above.
__device__ __forceinline__ uint32_t largest_of_block(uint32_t value, uint32_t* partial) {
#pragma unroll
  for (int other = kWarp / 2; other > 0; other /= 2) {
    value = larger(value, __shfl_xor_sync(0xffffffffu, value, other));
  }
  const int count = blockDim.x / kWarp;
  if (count == 1) return value;
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = value;
  __syncthreads();
  for (int w = 0; w < count; ++w) value = larger(value, partial[w]);
  return value;
}

}  // namespace cuda
}  // namespace fd
