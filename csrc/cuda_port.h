// What a kernel file takes from CUDA, under names that nvcc and the emulator (emulation.h) both
// give: the same text is compiled for a GPU and, for tests on a machine without one, for the host.
//
// A kernel uses threadIdx, blockIdx, blockDim, gridDim, __syncthreads, __shfl_xor_sync,
// __shfl_up_sync, __ballot_sync, __popc, atomicAdd, fmaf, expf, sqrtf, what is declared here, and
// no other part of CUDA.
#pragma once
#include "element.h"

#if defined(FD_EMULATE)
#include "emulation.h"
#else
#include <cuda_runtime.h>
// Shared memory of the block.
#define FD_SHARED(type, name, count) __shared__ __align__(16) type name[count]
#define FD_LAUNCH(kernel, grid, block, stream, ...) \
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#endif

namespace fd {
namespace cuda {

// 16 bytes, the widest access there is.
struct alignas(16) Words {
  uint32_t at[4];
};

#if !defined(FD_EMULATE)

__device__ __forceinline__ Words load_words(const void* p) {  // p is a multiple of 16
  const uint4 v = *static_cast<const uint4*>(p);
  return {v.x, v.y, v.z, v.w};
}

__device__ __forceinline__ void store_words(void* p, const Words& w) {
  *static_cast<uint4*>(p) = make_uint4(w.at[0], w.at[1], w.at[2], w.at[3]);
}

// A few bytes that are as aligned as they are many.
template <class Bytes>
__device__ __forceinline__ void store_whole(void* p, const Bytes& bytes) {
  *static_cast<Bytes*>(p) = bytes;
}

// Copies 16 bytes to shared memory in the background; they are there after the wait.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}

// Closes a group of copies.
__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most kPending groups of this thread are under way.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#endif

}  // namespace cuda
}  // namespace fd
