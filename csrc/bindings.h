// How arguments come from Python: plain integers in, nothing back. The callers are the backends of
// fastdit/backends, which took them from tensors that fastdit/ops has checked.
//
// An operand is None, or a tuple (address, batch stride, token stride) with strides in elements, or
// the bare address of the usual case, which is quicker to make and to read: a contiguous tensor
// [B, K, D], or one row for all where it is a modulation. A modulation that is fp32 beside 16 bits
// is a tuple with a fourth integer, 1; of many that are, one argument says so. rows is None or
// (address, batch stride, whether int64). A table is None or (address, batch stride). Places are
// (address, batch stride, token stride). A view is (address, shape, strides).
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <utility>
#include <vector>

#include "blend.h"
#include "collapse.h"
#include "gated_residual.h"
#include "norm_modulate.h"
#include "patchify.h"
#include "qkv_prologue.h"
#include "resolution_transition.h"
#include "swiglu.h"
#include "token_change.h"
#include "token_select.h"

namespace fd {

namespace py = pybind11;

inline int64_t integer(PyObject* number) {
  const long long value = PyLong_AsLongLong(number);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

inline int64_t item(py::handle h, Py_ssize_t i, Py_ssize_t size = 3) {
  if (!PyTuple_Check(h.ptr()) || PyTuple_GET_SIZE(h.ptr()) != size) {
    throw py::type_error("an operand is None, an address or a tuple of three integers");
  }
  return integer(PyTuple_GET_ITEM(h.ptr(), i));
}

// The strides are those of a bare address.
inline Operand operand(py::handle h, int64_t batch_stride, int64_t token_stride) {
  if (h.is_none()) return {};
  if (PyLong_Check(h.ptr())) {
    return {reinterpret_cast<void*>(integer(h.ptr())), batch_stride, token_stride};
  }
  return {reinterpret_cast<void*>(item(h, 0)), item(h, 1), item(h, 2)};
}

inline Operand state(py::handle h, const Shape& shape) {
  return operand(h, shape.tokens * shape.width, shape.width);
}

// One without strides of its own is one row for all.
inline Operand strided(py::handle h) { return operand(h, 0, 0); }

inline Modulation modulation(py::handle h) {
  const bool wide = PyTuple_Check(h.ptr()) && PyTuple_GET_SIZE(h.ptr()) == 4;
  if (!wide) return {strided(h), false};
  return {{reinterpret_cast<void*>(item(h, 0, 4)), item(h, 1, 4), item(h, 2, 4)}, true};
}

inline Rows row_index(py::handle h) {
  if (h.is_none()) return {};
  return {reinterpret_cast<const void*>(item(h, 0)), item(h, 1), item(h, 2) != 0};
}

inline Table table(py::handle h) {
  if (h.is_none()) return {};
  const auto [address, batch_stride] = h.cast<std::pair<int64_t, int64_t>>();
  return {reinterpret_cast<int32_t*>(address), batch_stride};
}

inline Numbers numbers(py::handle h) {
  const auto [address, batch_stride] = h.cast<std::pair<int64_t, int64_t>>();
  return {reinterpret_cast<float*>(address), batch_stride};
}

inline Places places(py::handle h) {
  return {reinterpret_cast<int32_t*>(item(h, 0)), item(h, 1), item(h, 2)};
}

inline float* number(uintptr_t address) { return reinterpret_cast<float*>(address); }

inline Dtype dtype_of(int code) {
  if (code < 0 || code > 2) throw py::value_error("unknown dtype code " + std::to_string(code));
  return static_cast<Dtype>(code);
}

inline GatedResidual gated_residual_of(int dtype, bool wide, int64_t batch, int64_t tokens,
                                       int64_t width, py::handle x, int64_t x_step, py::handle out,
                                       const py::list& branches, const py::list& gates,
                                       uintptr_t weights, bool by_token, int fresh,
                                       py::handle cache, py::handle rows) {
  GatedResidual p;
  p.count = static_cast<int>(branches.size());
  if (p.count < 1 || p.count > kMaxBranches || gates.size() != branches.size()) {
    throw py::value_error("branches and gates must be 1 to " + std::to_string(kMaxBranches) +
                          ", and as many");
  }
  p.dtype = dtype_of(dtype);
  p.wide = wide;
  p.shape = {batch, tokens, width};
  p.x = state(x, p.shape);
  p.x_step = x_step;
  p.out = state(out, p.shape);
  for (int i = 0; i < p.count; ++i) {
    p.branches[i] = state(branches[i], p.shape);
    p.gates[i] = strided(gates[i]);
  }
  p.weights.data = number(weights);
  if (by_token) p.weights = {p.weights.data, batch * tokens, 1};
  p.fresh = fresh;
  p.cache = state(cache, p.shape);
  p.rows = row_index(rows);
  return p;
}

inline NormModulate norm_modulate_of(int dtype, int64_t batch, int64_t tokens, int64_t width,
                                     py::handle x, py::handle out, py::handle scale,
                                     py::handle shift, py::handle weight, py::handle bias,
                                     double eps, bool rms, py::handle branch, py::handle gate,
                                     py::handle cache, py::handle rows, py::handle row_scale) {
  NormModulate p;
  p.dtype = dtype_of(dtype);
  p.shape = {batch, tokens, width};
  p.x = state(x, p.shape);
  p.out = state(out, p.shape);
  p.scale = modulation(scale);
  p.shift = modulation(shift);
  p.weight = modulation(weight);
  p.bias = modulation(bias);
  p.eps = eps;
  p.rms = rms;
  p.branch = state(branch, p.shape);
  p.gate = modulation(gate);
  p.cache = state(cache, p.shape);
  p.rows = row_index(rows);
  if (!row_scale.is_none()) p.row_scale = numbers(row_scale);
  return p;
}

// velocity: (address, shape, strides), of six dimensions.
inline TokenSelect token_select_of(int dtype, const py::tuple& velocity, py::handle drops,
                                   py::handle age, int64_t keep, int64_t high, float starvation,
                                   bool norm, int64_t max_age, py::handle rows, py::handle inverse,
                                   uintptr_t keys) {
  const auto shape = velocity[1].cast<std::array<int64_t, 6>>();
  const auto stride = velocity[2].cast<std::array<int64_t, 6>>();
  TokenSelect p;
  p.dtype = dtype_of(dtype);
  p.velocity = reinterpret_cast<const void*>(integer(velocity[0].ptr()));
  for (int i = 0; i < 6; ++i) p.stride[i] = stride[i];
  p.batch = shape[0];
  p.grid[0] = shape[1];
  p.grid[1] = shape[2];
  p.patch[0] = shape[3];
  p.patch[1] = shape[4];
  p.channels = shape[5];
  p.keep = keep;
  p.high = high;
  p.starvation = starvation;
  p.norm = norm;
  p.max_age = max_age;
  p.drops = table(drops);
  p.age = table(age);
  p.rows = table(rows);
  p.inverse = table(inverse);
  p.keys = reinterpret_cast<uint32_t*>(keys);
  return p;
}

// velocity, last: (address, shape, strides), of six dimensions.
inline TokenChange token_change_of(int dtype, const py::tuple& velocity, const py::tuple& last,
                                   py::handle rate, py::handle level, uintptr_t levels,
                                   py::handle inverse, py::handle score) {
  const auto shape = velocity[1].cast<std::array<int64_t, 6>>();
  const auto stride = velocity[2].cast<std::array<int64_t, 6>>();
  const auto last_stride = last[2].cast<std::array<int64_t, 6>>();
  TokenChange p;
  p.dtype = dtype_of(dtype);
  p.velocity = reinterpret_cast<const void*>(integer(velocity[0].ptr()));
  p.last = reinterpret_cast<void*>(integer(last[0].ptr()));
  for (int i = 0; i < 6; ++i) {
    p.stride[i] = stride[i];
    p.last_stride[i] = last_stride[i];
  }
  p.batch = shape[0];
  p.grid[0] = shape[1];
  p.grid[1] = shape[2];
  p.patch[0] = shape[3];
  p.patch[1] = shape[4];
  p.channels = shape[5];
  p.rate = numbers(rate);
  p.level = numbers(level);
  p.levels = number(levels);
  p.inverse = table(inverse);
  p.score = numbers(score);
  return p;
}

// The offsets are in the addresses: of q_out, and of the caches, cos and sin.
inline QkvPrologue qkv_prologue_of(int dtype, int64_t batch, int64_t tokens, int heads,
                                   int kv_heads, int head, py::handle q, py::handle k, py::handle v,
                                   py::handle q_out, py::handle k_cache, py::handle v_cache,
                                   py::handle rows, int norm, py::handle q_weight,
                                   py::handle q_bias, py::handle k_weight, py::handle k_bias,
                                   double eps, py::handle cos, py::handle sin) {
  if (norm < 0 || norm > 3) throw py::value_error("unknown norm code " + std::to_string(norm));
  QkvPrologue p;
  p.dtype = dtype_of(dtype);
  p.shape = {batch, tokens, int64_t{heads + 2 * kv_heads} * head};
  p.heads = heads;
  p.kv_heads = kv_heads;
  p.head = head;
  p.q = strided(q);
  p.k = strided(k);
  p.v = strided(v);
  p.q_out = strided(q_out);
  p.k_cache = strided(k_cache);
  p.v_cache = strided(v_cache);
  p.rows = row_index(rows);
  p.norm = static_cast<Norm>(norm);
  p.q_weight = strided(q_weight);
  p.q_bias = strided(q_bias);
  p.k_weight = strided(k_weight);
  p.k_bias = strided(k_bias);
  p.eps = eps;
  p.cos = strided(cos);
  p.sin = strided(sin);
  return p;
}

// field and tokens: views of six and five dimensions.
inline Patchify patchify_of(int dtype, const py::tuple& field, const py::tuple& tokens,
                            py::handle table, bool draw) {
  const auto shape = field[1].cast<std::array<int64_t, 6>>();
  const auto field_stride = field[2].cast<std::array<int64_t, 6>>();
  const auto count = tokens[1].cast<std::array<int64_t, 5>>()[1];
  const auto token_stride = tokens[2].cast<std::array<int64_t, 5>>();
  Patchify p;
  p.dtype = dtype_of(dtype);
  p.field = reinterpret_cast<void*>(integer(field[0].ptr()));
  for (int i = 0; i < 6; ++i) p.field_stride[i] = field_stride[i];
  p.tokens = reinterpret_cast<void*>(integer(tokens[0].ptr()));
  for (int i = 0; i < 5; ++i) p.token_stride[i] = token_stride[i];
  p.table = places(table);
  p.batch = shape[0];
  p.count = count;
  p.grid[0] = shape[1];
  p.grid[1] = shape[2];
  p.patch[0] = shape[3];
  p.patch[1] = shape[4];
  p.channels = shape[5];
  p.draw = draw;
  return p;
}

inline ResolutionTransition resolution_transition_of(
    int dtype, int64_t batch, int64_t tokens, int64_t width, py::handle x, py::handle table,
    int64_t split, py::handle rows, py::handle noise, float scale, float deviation, float pull,
    float unsplit, bool pixelwise, int64_t raster, py::handle out, py::handle out_table) {
  ResolutionTransition p;
  p.dtype = dtype_of(dtype);
  p.shape = {batch, tokens, width};
  p.x = strided(x);
  p.table = places(table);
  p.split = split;
  p.rows = row_index(rows);
  p.noise = strided(noise);
  p.scale = scale;
  p.deviation = deviation;
  p.pull = pull;
  p.unsplit = unsplit;
  p.pixelwise = pixelwise;
  p.raster = raster;
  p.out = strided(out);
  p.out_table = places(out_table);
  return p;
}

inline Blend blend_of(int dtype, int64_t batch, int64_t tokens, int64_t width, py::handle fresh,
                      py::handle cached, uintptr_t r, py::handle x, py::handle gate,
                      py::handle blended, py::handle out) {
  Blend p;
  p.dtype = dtype_of(dtype);
  p.shape = {batch, tokens, width};
  p.fresh = state(fresh, p.shape);
  p.cached = state(cached, p.shape);
  p.r = number(r);
  p.x = state(x, p.shape);
  p.gate = strided(gate);
  p.blended = state(blended, p.shape);
  p.out = state(out, p.shape);
  return p;
}

// partial: kPartials floats, on a GPU only.
inline BlendBackward blend_backward_of(int dtype, int64_t batch, int64_t tokens, int64_t width,
                                       py::handle grad, py::handle fresh, py::handle cached,
                                       uintptr_t r, py::handle gate, py::handle grad_fresh,
                                       py::handle grad_cached, uintptr_t grad_r,
                                       uintptr_t partial) {
  BlendBackward p;
  p.dtype = dtype_of(dtype);
  p.shape = {batch, tokens, width};
  p.grad = state(grad, p.shape);
  p.fresh = state(fresh, p.shape);
  p.cached = state(cached, p.shape);
  p.r = number(r);
  p.gate = strided(gate);
  p.grad_fresh = state(grad_fresh, p.shape);
  p.grad_cached = state(grad_cached, p.shape);
  p.grad_r = number(grad_r);
  p.partial = number(partial);
  return p;
}

inline Collapse collapse_of(int dtype, bool wide, int sum_dtype, int64_t batch, int64_t tokens,
                            int64_t width, const py::list& branches, const py::list& weights,
                            const std::vector<int>& groups, bool accumulate, const py::list& sums) {
  Collapse p;
  p.count = static_cast<int>(branches.size());
  p.sum_count = static_cast<int>(sums.size());
  if (p.count < 1 || p.count > kMaxCollapsed || weights.size() != branches.size() ||
      groups.size() != branches.size() || p.sum_count < 1 || p.sum_count > kMaxSums) {
    throw py::value_error("branches, weights and groups must be 1 to 64, and as many; sums 1 to 4");
  }
  p.dtype = dtype_of(dtype);
  p.wide = wide;
  p.sum_dtype = dtype_of(sum_dtype);
  p.shape = {batch, tokens, width};
  for (int i = 0; i < p.count; ++i) {
    p.branches[i] = state(branches[i], p.shape);
    p.weights[i] = strided(weights[i]);
    p.groups[i] = static_cast<uint8_t>(groups[i]);
  }
  for (int s = 0; s < p.sum_count; ++s) p.sums[s] = state(sums[s], p.shape);
  p.accumulate = accumulate;
  return p;
}

inline Swiglu swiglu_of(int dtype, int64_t batch, int64_t tokens, int64_t width, py::handle gate,
                        py::handle value, py::handle out) {
  Swiglu p;
  p.dtype = dtype_of(dtype);
  p.shape = {batch, tokens, width};
  p.gate = state(gate, p.shape);
  p.value = state(value, p.shape);
  p.out = state(out, p.shape);
  return p;
}

}  // namespace fd
