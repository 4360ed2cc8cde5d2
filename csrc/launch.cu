#include "cuda_port.h"
#include "launch.h"

namespace fd {
namespace cuda {
namespace {

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // the runtime keeps an error for the next caller unless it is taken
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(status) + ", " +
                           cudaGetErrorString(status));
}

}  // namespace

DeviceGuard::DeviceGuard(int device) {
  int current = -1;
  check(cudaGetDevice(&current), "cuda device");
  if (current == device) return;
  check(cudaSetDevice(device), "cuda device");
  before_ = current;
}

DeviceGuard::~DeviceGuard() {
  if (before_ >= 0) cudaSetDevice(before_);
}

void check_launch(const char* op) { check(cudaGetLastError(), op); }

}  // namespace cuda
}  // namespace fd
