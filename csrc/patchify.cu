// A thread takes one element of one token: reads it and writes it, or draws it as large as the
// token's level says. Elements are numbered with the column of a patch first and the channel last,
// so that neighbours of a latent image are taken by neighbours; packed tokens are patches of one
// pixel.
#include "cuda_port.h"
#include "launch.h"
#include "patchify.h"

namespace fd {
namespace cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads)
    patchify_kernel(const __grid_constant__ Patchify p, uint32_t elements) {
  const uint32_t element = blockIdx.x * kThreads + threadIdx.x;
  if (element >= elements) return;
  uint32_t rest = element;
  const auto take = [&rest](int64_t size) {
    const uint32_t digit = rest % static_cast<uint32_t>(size);
    rest /= static_cast<uint32_t>(size);
    return static_cast<int64_t>(digit);
  };
  const int64_t x = take(p.patch[1]), y = take(p.patch[0]), c = take(p.channels), i = take(p.count);
  const int64_t b = rest;
  const Place place = p.table.at(b, i);
  T* const token = static_cast<T*>(p.tokens) + b * p.token_stride[0] + i * p.token_stride[1] +
                   y * p.token_stride[2] + x * p.token_stride[3] + c * p.token_stride[4];
  T* const first = static_cast<T*>(p.field) + b * p.field_stride[0] + place.y * p.field_stride[1] +
                   place.x * p.field_stride[2] + c * p.field_stride[5];
  const int64_t side = place.side();
  if (!p.draw) {
    *token = first[p.pixel(y * side, x * side)];
    return;
  }
  const T value = *token;
  for (int64_t r = 0; r < side; ++r) {
    for (int64_t q = 0; q < side; ++q) first[p.pixel(y * side + r, x * side + q)] = value;
  }
}

template <class T>
void launch(const Patchify& p, void* stream) {
  const int64_t elements = p.elements();
  if (elements >= int64_t{1} << 31) {
    throw std::invalid_argument("tokens: got " + std::to_string(elements) +
                                " elements; accepted is fewer than 2147483648");
  }
  const dim3 grid((elements + kThreads - 1) / kThreads), block(kThreads);
  FD_LAUNCH(patchify_kernel<T>, grid, block, stream, p, static_cast<uint32_t>(elements));
}

}  // namespace

void patchify(const Patchify& p, const Target& target) {
  if (p.elements() == 0) return;
  launch_on(target, p.dtype, "patchify",
            [&](auto zero) { launch<decltype(zero)>(p, target.stream); });
}

}  // namespace cuda
}  // namespace fd
