// What launch.cu and device_info.cu are on a GPU: there is no device to choose, and nothing fails
// late.
#include "device_info.h"
#include "launch.h"

namespace fd {

DeviceInfo device_info() {
  DeviceInfo info;
  info.error = "emulated";
  return info;
}

namespace cuda {

DeviceGuard::DeviceGuard(int) {}
DeviceGuard::~DeviceGuard() {}
void check_launch(const char*) {}

}  // namespace cuda
}  // namespace fd
