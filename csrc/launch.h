// What every launch shares: the device, the stream, the limits of a grid, and what went wrong.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

#include "operand.h"

namespace fd {
namespace cuda {

struct Target {
  int device = 0;
  void* stream = nullptr;  // a cudaStream_t
};

// Makes a device current for a scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = -1;  // -1: it was current
};

// Throws what the runtime says of the last launch.
void check_launch(const char* op);

// Calls run with a value of the element type while the device is current, and throws what is wrong.
template <class Run>
void launch_on(const Target& target, Dtype dtype, const char* op, Run run) {
  const DeviceGuard guard(target.device);
  by_dtype(dtype, run);
  check_launch(op);
}

// B K, which numbers the rows of a call in 32 bits.
inline uint32_t checked_rows(const Shape& shape) {
  const int64_t rows = shape.batch * shape.tokens;
  if (rows >= int64_t{1} << 31) {
    throw std::invalid_argument("x: got " + std::to_string(rows) +
                                " rows; accepted is fewer than 2147483648");
  }
  return static_cast<uint32_t>(rows);
}

}  // namespace cuda
}  // namespace fd
