// How tensors reach a kernel: an address and two strides; the last dimension always has stride 1.
#pragma once
#include "element.h"

namespace fd {

enum class Dtype : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

// Calls run with a value of the element type, from which it takes the type.
template <class Run>
void by_dtype(Dtype dtype, Run run) {
  switch (dtype) {
    case Dtype::kFloat32:
      return run(float{});
    case Dtype::kBfloat16:
      return run(bf16{});
    case Dtype::kFloat16:
      return run(fp16{});
  }
}

// A [B, K, D] tensor. Strides are in elements and 0 where the tensor is broadcast. data is null for
// an operand that was not given.
struct Operand {
  void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t token_stride = 0;

  FD_HD explicit operator bool() const { return data != nullptr; }

  template <class T>
  FD_HD T* row(int64_t batch, int64_t token) const {
    return static_cast<T*>(data) + batch * batch_stride + token * token_stride;
  }
};

// A gate, scale, shift or weight, broadcast to [B, K, D]: of the element type, or `wide`, of fp32
// beside one of 16 bits.
struct Modulation : Operand {
  bool wide = false;
};

// The [B, K] index of active rows, int32 or int64. Without one, token k is row k.
struct Rows {
  const void* data = nullptr;
  int64_t batch_stride = 0;
  bool wide = false;  // int64

  FD_HD int64_t at(int64_t batch, int64_t token) const {
    if (data == nullptr) return token;
    const int64_t i = batch * batch_stride + token;
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

// An fp32 [B, N]; the last stride is 1.
struct Numbers {
  float* data = nullptr;
  int64_t batch_stride = 0;

  FD_HD explicit operator bool() const { return data != nullptr; }

  FD_HD float* row(int64_t batch) const { return data + batch * batch_stride; }
};

struct Shape {
  int64_t batch = 0;   // B
  int64_t tokens = 0;  // K, the active ones
  int64_t width = 0;   // D
};

}  // namespace fd
