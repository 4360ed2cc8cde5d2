// Module fastdit._C: addresses, strides and sizes in, nothing back. The callers are
// fastdit/backends/cpu.py, which took them from tensors that fastdit/ops has checked.
//
// An operand is None, or a tuple (address, batch stride, token stride) with strides in elements, or
// the bare address of the usual case, which is quicker to make and to read: a contiguous tensor
// [B, K, D], or one row for all where it is a modulation. rows is None or (address, batch stride,
// whether int64). Row numbers are the one thing checked here, since only their values can be wrong:
// one out of range raises IndexError before anything is written.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "gated_residual.h"
#include "isa.h"
#include "norm_modulate.h"

namespace py = pybind11;

namespace fd {
namespace {

// Below this many elements a second thread costs more than it brings, and so does handing the
// interpreter's lock to another thread and waiting to have it back.
constexpr int64_t kSmall = 32768;

int64_t integer(PyObject* number) {
  const long long value = PyLong_AsLongLong(number);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

int64_t item(py::handle h, Py_ssize_t i) {
  if (!PyTuple_Check(h.ptr()) || PyTuple_GET_SIZE(h.ptr()) != 3) {
    throw py::type_error("an operand is None, an address or a tuple of three integers");
  }
  return integer(PyTuple_GET_ITEM(h.ptr(), i));
}

// The strides are those of a bare address.
Operand operand(py::handle h, int64_t batch_stride, int64_t token_stride) {
  if (h.is_none()) return {};
  if (PyLong_Check(h.ptr())) {
    return {reinterpret_cast<void*>(integer(h.ptr())), batch_stride, token_stride};
  }
  return {reinterpret_cast<void*>(item(h, 0)), item(h, 1), item(h, 2)};
}

Operand state(py::handle h, const Shape& shape) {
  return operand(h, shape.tokens * shape.width, shape.width);
}

Operand modulation(py::handle h) { return operand(h, 0, 0); }

Rows row_index(py::handle h) {
  if (h.is_none()) return {};
  return {reinterpret_cast<const void*>(item(h, 0)), item(h, 1), item(h, 2) != 0};
}

Dtype dtype_of(int code) {
  if (code < 0 || code > 2) throw py::value_error("unknown dtype code " + std::to_string(code));
  return static_cast<Dtype>(code);
}

void check_rows(const Rows& rows, const Shape& shape, int64_t limit) {
  if (rows.data == nullptr) return;
  for (int64_t b = 0; b < shape.batch; ++b) {
    for (int64_t k = 0; k < shape.tokens; ++k) {
      const int64_t row = rows.at(b, k);
      if (row < 0 || row >= limit) {
        throw py::index_error("rows: found " + std::to_string(row) +
                              ", but the store has rows 0 to " + std::to_string(limit - 1));
      }
    }
  }
}

template <class Params>
void launch(void (*kernel)(const Params&), Params& p) {
  const int64_t elements = p.shape.batch * p.shape.tokens * p.shape.width;
  if (elements < kSmall) {
    p.threads = 1;
    kernel(p);
  } else {
    py::gil_scoped_release unlocked;
    kernel(p);
  }
}

void gated_residual(int dtype, int64_t batch, int64_t tokens, int64_t width, int64_t stored,
                    py::handle x, int64_t x_step, py::handle out, const py::list& branches,
                    const py::list& gates, int fresh, py::handle cache, py::handle rows,
                    int threads) {
  GatedResidual p;
  p.count = static_cast<int>(branches.size());
  if (p.count < 1 || p.count > kMaxBranches || gates.size() != branches.size()) {
    throw py::value_error("branches and gates must be 1 to 64, and as many");
  }
  p.dtype = dtype_of(dtype);
  p.shape = {batch, tokens, width};
  p.x = state(x, p.shape);
  p.x_step = x_step;
  p.out = state(out, p.shape);
  for (int i = 0; i < p.count; ++i) {
    p.branches[i] = state(branches[i], p.shape);
    p.gates[i] = modulation(gates[i]);
  }
  p.fresh = fresh;
  p.cache = state(cache, p.shape);
  p.rows = row_index(rows);
  p.threads = threads;
  check_rows(p.rows, p.shape, stored);
  launch(FD_BY_ISA(gated_residual), p);
}

void norm_modulate(int dtype, int64_t batch, int64_t tokens, int64_t width, int64_t stored,
                   py::handle x, py::handle out, py::handle scale, py::handle shift,
                   py::handle weight, py::handle bias, double eps, bool rms, py::handle branch,
                   py::handle gate, py::handle cache, py::handle rows, int threads) {
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
  p.threads = threads;
  check_rows(p.rows, p.shape, stored);
  launch(FD_BY_ISA(norm_modulate), p);
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
#ifdef _OPENMP
  info["openmp"] = _OPENMP;
#else
  info["openmp"] = 0;
#endif
  info["isas"] = usable_isas();
  info["isa"] = isa_name(current_isa());
  return info;
}

}  // namespace
}  // namespace fd

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastdit's CPU kernels; called through fastdit.ops.";
  m.def("gated_residual", &fd::gated_residual);
  m.def("norm_modulate", &fd::norm_modulate);
  m.def("set_isa", &fd::set_isa, "Name an instruction set for the whole process, or 'auto'.");
  m.def("build_info", &fd::build_info, "How this module was built, and what it can use here.");
}
