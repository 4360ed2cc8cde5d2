#include <cuda_runtime.h>

#include "device_info.h"

namespace fd {

DeviceInfo device_info() {
  DeviceInfo info;
  cudaRuntimeGetVersion(&info.runtime);
  const cudaError_t status = cudaGetDeviceCount(&info.devices);
  if (status != cudaSuccess) {
    info.devices = 0;
    info.error = cudaGetErrorName(status);
    cudaGetLastError();  // the runtime keeps an error for the next caller unless it is taken
  }
  return info;
}

}  // namespace fd
