// Module fastdit._cuda: the CUDA kernels, what was built for which GPUs, and what the CUDA runtime
// can see. Row numbers are on the device and are not looked at. Tests compile this file a second
// time, as _emulated, with kernels for the host.
#include "bindings.h"
#include "device_info.h"
#include "launch.h"

namespace fd {
namespace {

void gated_residual(int dtype, bool wide, int64_t batch, int64_t tokens, int64_t width,
                    py::handle x, int64_t x_step, py::handle out, const py::list& branches,
                    const py::list& gates, uintptr_t weights, bool by_token, int fresh,
                    py::handle cache, py::handle rows, int device, uintptr_t stream) {
  const GatedResidual p = gated_residual_of(dtype, wide, batch, tokens, width, x, x_step, out,
                                            branches, gates, weights, by_token, fresh, cache, rows);
  cuda::gated_residual(p, {device, reinterpret_cast<void*>(stream)});
}

void norm_modulate(int dtype, int64_t batch, int64_t tokens, int64_t width, py::handle x,
                   py::handle out, py::handle scale, py::handle shift, py::handle weight,
                   py::handle bias, double eps, bool rms, py::handle branch, py::handle gate,
                   py::handle cache, py::handle rows, py::handle row_scale, int device,
                   uintptr_t stream) {
  const NormModulate p = norm_modulate_of(dtype, batch, tokens, width, x, out, scale, shift, weight,
                                          bias, eps, rms, branch, gate, cache, rows, row_scale);
  cuda::norm_modulate(p, {device, reinterpret_cast<void*>(stream)});
}

void token_select(int dtype, const py::tuple& velocity, py::handle drops, py::handle age,
                  int64_t keep, int64_t high, float starvation, bool norm, int64_t max_age,
                  py::handle rows, py::handle inverse, uintptr_t keys, int device,
                  uintptr_t stream) {
  const TokenSelect p = token_select_of(dtype, velocity, drops, age, keep, high, starvation, norm,
                                        max_age, rows, inverse, keys);
  cuda::token_select(p, {device, reinterpret_cast<void*>(stream)});
}

void token_change(int dtype, const py::tuple& velocity, const py::tuple& last, py::handle rate,
                  py::handle level, uintptr_t levels, py::handle inverse, py::handle score,
                  int device, uintptr_t stream) {
  const TokenChange p = token_change_of(dtype, velocity, last, rate, level, levels, inverse, score);
  cuda::token_change(p, {device, reinterpret_cast<void*>(stream)});
}

void qkv_prologue(int dtype, int64_t batch, int64_t tokens, int heads, int kv_heads, int head,
                  py::handle q, py::handle k, py::handle v, py::handle q_out, py::handle k_cache,
                  py::handle v_cache, py::handle rows, int norm, py::handle q_weight,
                  py::handle q_bias, py::handle k_weight, py::handle k_bias, double eps,
                  py::handle cos, py::handle sin, int device, uintptr_t stream) {
  const QkvPrologue p =
      qkv_prologue_of(dtype, batch, tokens, heads, kv_heads, head, q, k, v, q_out, k_cache, v_cache,
                      rows, norm, q_weight, q_bias, k_weight, k_bias, eps, cos, sin);
  cuda::qkv_prologue(p, {device, reinterpret_cast<void*>(stream)});
}

void patchify(int dtype, const py::tuple& field, const py::tuple& tokens, py::handle table,
              bool draw, int device, uintptr_t stream) {
  const Patchify p = patchify_of(dtype, field, tokens, table, draw);
  cuda::patchify(p, {device, reinterpret_cast<void*>(stream)});
}

void resolution_transition(int dtype, int64_t batch, int64_t tokens, int64_t width, py::handle x,
                           py::handle table, int64_t split, py::handle rows, py::handle noise,
                           float scale, float deviation, float pull, float unsplit, bool pixelwise,
                           int64_t raster, py::handle out, py::handle out_table, int device,
                           uintptr_t stream) {
  const ResolutionTransition p =
      resolution_transition_of(dtype, batch, tokens, width, x, table, split, rows, noise, scale,
                               deviation, pull, unsplit, pixelwise, raster, out, out_table);
  cuda::resolution_transition(p, {device, reinterpret_cast<void*>(stream)});
}

void blend(int dtype, int64_t batch, int64_t tokens, int64_t width, py::handle fresh,
           py::handle cached, uintptr_t r, py::handle x, py::handle gate, py::handle blended,
           py::handle out, int device, uintptr_t stream) {
  const Blend p = blend_of(dtype, batch, tokens, width, fresh, cached, r, x, gate, blended, out);
  cuda::blend(p, {device, reinterpret_cast<void*>(stream)});
}

void blend_backward(int dtype, int64_t batch, int64_t tokens, int64_t width, py::handle grad,
                    py::handle fresh, py::handle cached, uintptr_t r, py::handle gate,
                    py::handle grad_fresh, py::handle grad_cached, uintptr_t grad_r,
                    uintptr_t partial, int device, uintptr_t stream) {
  const BlendBackward p = blend_backward_of(dtype, batch, tokens, width, grad, fresh, cached, r,
                                            gate, grad_fresh, grad_cached, grad_r, partial);
  cuda::blend_backward(p, {device, reinterpret_cast<void*>(stream)});
}

void collapse(int dtype, bool wide, int sum_dtype, int64_t batch, int64_t tokens, int64_t width,
              const py::list& branches, const py::list& weights, const std::vector<int>& groups,
              bool accumulate, const py::list& sums, int device, uintptr_t stream) {
  const Collapse p = collapse_of(dtype, wide, sum_dtype, batch, tokens, width, branches, weights,
                                 groups, accumulate, sums);
  cuda::collapse(p, {device, reinterpret_cast<void*>(stream)});
}

void swiglu(int dtype, int64_t batch, int64_t tokens, int64_t width, py::handle gate,
            py::handle value, py::handle out, int device, uintptr_t stream) {
  const Swiglu p = swiglu_of(dtype, batch, tokens, width, gate, value, out);
  cuda::swiglu(p, {device, reinterpret_cast<void*>(stream)});
}

py::dict info() {
  const DeviceInfo found = device_info();
  py::dict info;
  info["devices"] = found.devices;
  info["cudart"] = found.runtime;
  info["error"] = found.error;
  info["archs"] = FD_CUDA_ARCHS;
  return info;
}

}  // namespace
}  // namespace fd

#if defined(FD_EMULATE)
PYBIND11_MODULE(_emulated, m) {
#else
PYBIND11_MODULE(_cuda, m) {
#endif
  m.doc() = "fastdit's CUDA side; imports on a machine without a driver.";
  m.def("blend", &fd::blend);
  m.def("blend_backward", &fd::blend_backward);
  m.def("collapse", &fd::collapse);
  m.def("gated_residual", &fd::gated_residual);
  m.def("norm_modulate", &fd::norm_modulate);
  m.def("token_change", &fd::token_change);
  m.def("token_select", &fd::token_select);
  m.def("qkv_prologue", &fd::qkv_prologue);
  m.def("patchify", &fd::patchify);
  m.def("resolution_transition", &fd::resolution_transition);
  m.def("swiglu", &fd::swiglu);
  m.def("info", &fd::info,
        "Devices seen, cudart version, the runtime's error if any, the targets of this build.");
}
