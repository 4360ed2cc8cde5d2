// A thread takes one token: its distance from its last value, which becomes the one it has, then
// its rate, level and score. Neighbours of a latent image are taken by neighbours; of packed tokens
// each thread reads a piece of its own, which stays in the cache from one element to the next.
#include "cuda_port.h"
#include "launch.h"
#include "token_change.h"

namespace fd {
namespace cuda {
namespace {

constexpr int kThreads = 128;  // enough blocks for every processor

template <class T>
__device__ __forceinline__ float moved(const TokenChange& p, int64_t b, int64_t token) {
  const T* patch = static_cast<const T*>(p.velocity) + p.start(p.stride, b, token);
  T* last_patch = static_cast<T*>(p.last) + p.start(p.last_stride, b, token);
  const int channels = static_cast<int>(p.channels);
  float sum = 0.0f;
  for (int y = 0; y < static_cast<int>(p.patch[0]); ++y) {
    for (int x = 0; x < static_cast<int>(p.patch[1]); ++x) {
      const T* pixel = patch + y * p.stride[3] + x * p.stride[4];
      T* last = last_patch + y * p.last_stride[3] + x * p.last_stride[4];
      float squares = 0.0f;
      for (int c = 0; c < channels; ++c) {
        const T value = pixel[c * p.stride[5]];
        const float change = to_float(value) - to_float(last[c * p.last_stride[5]]);
        squares = fmaf(change, change, squares);
        last[c * p.last_stride[5]] = value;
      }
      sum += squares;
    }
  }
  return sqrtf(sum);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    token_change_kernel(const __grid_constant__ TokenChange p, uint32_t count) {
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= count) return;
  const uint32_t tokens = static_cast<uint32_t>(p.tokens());
  const int64_t b = i / tokens, token = i % tokens;
  if (p.computed(b, token)) p.note(b, token, moved<T>(p, b, token));
  p.rank(b, token);
}

template <class T>
void launch(const TokenChange& p, void* stream) {
  const int64_t count = p.batch * p.tokens();
  if (count >= int64_t{1} << 31) {
    throw std::invalid_argument("velocity: got " + std::to_string(count) +
                                " tokens; accepted is fewer than 2147483648");
  }
  const dim3 grid((count + kThreads - 1) / kThreads), block(kThreads);
  FD_LAUNCH(token_change_kernel<T>, grid, block, stream, p, static_cast<uint32_t>(count));
}

}  // namespace

void token_change(const TokenChange& p, const Target& target) {
  if (p.batch * p.tokens() == 0) return;
  launch_on(target, p.dtype, "token_change",
            [&](auto zero) { launch<decltype(zero)>(p, target.stream); });
}

}  // namespace cuda
}  // namespace fd
