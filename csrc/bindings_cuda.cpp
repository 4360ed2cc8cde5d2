// Module fastdit._cuda: what was built for which GPUs, and what the CUDA runtime can see.
#include <pybind11/pybind11.h>

#include "device_info.h"

namespace py = pybind11;

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "fastdit's CUDA side; imports on a machine without a driver.";
  m.def(
      "info",
      [] {
        const fd::DeviceInfo found = fd::device_info();
        py::dict info;
        info["devices"] = found.devices;
        info["cudart"] = found.runtime;
        info["error"] = found.error;
        info["archs"] = FD_CUDA_ARCHS;
        return info;
      },
      "Devices seen, cudart version, the runtime's error if any, the targets of this build.");
}
