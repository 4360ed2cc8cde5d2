// What the CUDA runtime can see; answers on a machine without a driver too.
#pragma once
#include <string>

namespace fd {

struct DeviceInfo {
  int devices = 0;
  int runtime = 0;    // cudart, as 1000 * major + 10 * minor
  std::string error;  // the runtime's name for what is wrong; empty when nothing is
};

DeviceInfo device_info();

}  // namespace fd
