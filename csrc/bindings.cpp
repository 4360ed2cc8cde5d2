// Module fastdit._C: the CPU kernels. Row numbers and places are all that is checked here, since
// only their values can be wrong: one out of range raises ArgumentError before anything is written.
#include "bindings.h"

#include "isa.h"
#include "sparse_attention.h"

namespace fd {
namespace {

// Below this many elements a second thread costs more than it brings, and so does handing the
// interpreter's lock to another thread and waiting to have it back.
constexpr int64_t kSmall = 32768;

[[noreturn]] void refuse(const std::string& why) {
  py::set_error(py::module_::import("fastdit.errors").attr("ArgumentError"), why.c_str());
  throw py::error_already_set();
}

void check_rows(const Rows& rows, const Shape& shape, int64_t limit) {
  if (rows.data == nullptr) return;
  for (int64_t b = 0; b < shape.batch; ++b) {
    for (int64_t k = 0; k < shape.tokens; ++k) {
      const int64_t row = rows.at(b, k);
      if (row < 0 || row >= limit) {
        refuse("rows: found " + std::to_string(row) + ", but the store has rows 0 to " +
               std::to_string(limit - 1));
      }
    }
  }
}

int64_t elements(const Shape& shape) { return shape.batch * shape.tokens * shape.width; }

template <class Params>
void launch(void (*kernel)(const Params&), Params& p, int64_t elements, int threads) {
  if (elements < kSmall) {
    p.threads = 1;
    kernel(p);
  } else {
    p.threads = threads;
    py::gil_scoped_release unlocked;
    kernel(p);
  }
}

// stored, here and below: the rows of the shortest store that is read or written at p.rows.
void gated_residual(int dtype, bool wide, int64_t batch, int64_t tokens, int64_t width,
                    py::handle x, int64_t x_step, py::handle out, const py::list& branches,
                    const py::list& gates, uintptr_t weights, bool by_token, int fresh,
                    py::handle cache, py::handle rows, int64_t stored, int threads) {
  GatedResidual p = gated_residual_of(dtype, wide, batch, tokens, width, x, x_step, out, branches,
                                      gates, weights, by_token, fresh, cache, rows);
  check_rows(p.rows, p.shape, stored);
  launch(FD_BY_ISA(gated_residual), p, elements(p.shape), threads);
}

void norm_modulate(int dtype, int64_t batch, int64_t tokens, int64_t width, py::handle x,
                   py::handle out, py::handle scale, py::handle shift, py::handle weight,
                   py::handle bias, double eps, bool rms, py::handle branch, py::handle gate,
                   py::handle cache, py::handle rows, py::handle row_scale, int64_t stored,
                   int threads) {
  NormModulate p = norm_modulate_of(dtype, batch, tokens, width, x, out, scale, shift, weight, bias,
                                    eps, rms, branch, gate, cache, rows, row_scale);
  check_rows(p.rows, p.shape, stored);
  launch(FD_BY_ISA(norm_modulate), p, elements(p.shape), threads);
}

void token_select(int dtype, const py::tuple& velocity, py::handle drops, py::handle age,
                  int64_t keep, int64_t high, float starvation, bool norm, int64_t max_age,
                  py::handle rows, py::handle inverse, uintptr_t keys, int64_t /* stored: none */,
                  int threads) {
  TokenSelect p = token_select_of(dtype, velocity, drops, age, keep, high, starvation, norm,
                                  max_age, rows, inverse, keys);
  const int64_t pixels = p.patch[0] * p.patch[1];
  launch(FD_BY_ISA(token_select), p, p.batch * p.tokens() * pixels * p.channels, threads);
}

void token_change(int dtype, const py::tuple& velocity, const py::tuple& last, py::handle rate,
                  py::handle level, uintptr_t levels, py::handle inverse, py::handle score,
                  int64_t /* stored: none */, int threads) {
  TokenChange p = token_change_of(dtype, velocity, last, rate, level, levels, inverse, score);
  launch(FD_BY_ISA(token_change), p, p.elements(), threads);
}

void qkv_prologue(int dtype, int64_t batch, int64_t tokens, int heads, int kv_heads, int head,
                  py::handle q, py::handle k, py::handle v, py::handle q_out, py::handle k_cache,
                  py::handle v_cache, py::handle rows, int norm, py::handle q_weight,
                  py::handle q_bias, py::handle k_weight, py::handle k_bias, double eps,
                  py::handle cos, py::handle sin, int64_t stored, int threads) {
  QkvPrologue p =
      qkv_prologue_of(dtype, batch, tokens, heads, kv_heads, head, q, k, v, q_out, k_cache, v_cache,
                      rows, norm, q_weight, q_bias, k_weight, k_bias, eps, cos, sin);
  check_rows(p.rows, p.shape, stored);
  launch(FD_BY_ISA(qkv_prologue), p, elements(p.shape), threads);
}

void sparse_attention(int dtype, int64_t batch, int64_t queries, int64_t keys, int64_t heads,
                      int64_t kv_heads, int64_t head, py::handle q, py::handle k, py::handle v,
                      float scale, py::handle out, int64_t /* stored: none */, int threads) {
  SparseAttention p;
  p.dtype = dtype_of(dtype);
  p.batch = batch;
  p.queries = queries;
  p.keys = keys;
  p.heads = heads;
  p.kv_heads = kv_heads;
  p.head = head;
  p.q = strided(q);
  p.k = strided(k);
  p.v = strided(v);
  p.scale = scale;
  p.out = strided(out);
  launch(FD_BY_ISA(sparse_attention), p, batch * heads * queries * keys, threads);
}

std::string in_words(const Place& place) {
  return "[" + std::to_string(place.level) + ", " + std::to_string(place.y) + ", " +
         std::to_string(place.x) + "]";
}

void check_places(const Patchify& p) {
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t i = 0; i < p.count; ++i) {
      const Place place = p.table.at(b, i);
      if (place.level >= 0 && place.level < 31 && place.y >= 0 && place.x >= 0 &&
          place.y + place.side() <= p.grid[0] && place.x + place.side() <= p.grid[1]) {
        continue;
      }
      refuse("table: found the token " + in_words(place) +
             " (level, y, x); accepted are those within the grid of " + std::to_string(p.grid[0]) +
             " x " + std::to_string(p.grid[1]) + " cells");
    }
  }
}

void patchify(int dtype, const py::tuple& field, const py::tuple& tokens, py::handle table,
              bool draw, int64_t /* stored: none */, int threads) {
  Patchify p = patchify_of(dtype, field, tokens, table, draw);
  check_places(p);
  launch(FD_BY_ISA(patchify), p, p.elements(), threads);
}

// Whether a token that comes out in raster order is one cell of the grid.
bool in_raster(const ResolutionTransition& p, const Place& place) {
  return place.level == 0 && place.y >= 0 && place.x >= 0 && place.x < p.raster &&
         place.y * p.raster + place.x < p.out_tokens();
}

void check_split(const ResolutionTransition& p) {
  const Shape split = {p.shape.batch, p.split, p.shape.width};
  check_rows(p.rows, split, p.shape.tokens);
  for (int64_t b = 0; b < p.shape.batch; ++b) {
    for (int64_t k = 0; k < p.split; ++k) {
      if (k > 0 && p.rows.at(b, k) <= p.rows.at(b, k - 1)) {
        refuse("rows: got some that do not ascend; accepted are ascending ones");
      }
      const Place place = p.table.at(b, p.rows.at(b, k));
      if (place.level < 1 || place.level > 30) {
        refuse("rows: found the token " + in_words(place) +
               " (level, y, x); accepted are those of level 1 to 30");
      }
    }
    for (int64_t i = 0, k = 0; p.raster > 0 && i < p.shape.tokens; ++i) {
      const bool is_split = k < p.split && p.rows.at(b, k) == i;
      k += is_split;
      const Place place = p.table.at(b, i);
      const Place last = is_split ? child_of(place, 3) : place;
      if (in_raster(p, is_split ? child_of(place, 0) : place) && in_raster(p, last)) continue;
      refuse("table: found the token " + in_words(place) +
             " (level, y, x); accepted with raster are those that tile its " +
             std::to_string(p.out_tokens() / p.raster) + " x " + std::to_string(p.raster) +
             " cells");
    }
  }
}

void resolution_transition(int dtype, int64_t batch, int64_t tokens, int64_t width, py::handle x,
                           py::handle table, int64_t split, py::handle rows, py::handle noise,
                           float scale, float deviation, float pull, float unsplit, bool pixelwise,
                           int64_t raster, py::handle out, py::handle out_table,
                           int64_t /* stored: none */, int threads) {
  ResolutionTransition p =
      resolution_transition_of(dtype, batch, tokens, width, x, table, split, rows, noise, scale,
                               deviation, pull, unsplit, pixelwise, raster, out, out_table);
  check_split(p);
  launch(FD_BY_ISA(resolution_transition), p, p.shape.batch * p.out_tokens() * width, threads);
}

void blend(int dtype, int64_t batch, int64_t tokens, int64_t width, py::handle fresh,
           py::handle cached, uintptr_t r, py::handle x, py::handle gate, py::handle blended,
           py::handle out, int64_t /* stored: none */, int threads) {
  Blend p = blend_of(dtype, batch, tokens, width, fresh, cached, r, x, gate, blended, out);
  launch(FD_BY_ISA(blend), p, elements(p.shape), threads);
}

void blend_backward(int dtype, int64_t batch, int64_t tokens, int64_t width, py::handle grad,
                    py::handle fresh, py::handle cached, uintptr_t r, py::handle gate,
                    py::handle grad_fresh, py::handle grad_cached, uintptr_t grad_r,
                    uintptr_t partial, int64_t /* stored: none */, int threads) {
  BlendBackward p = blend_backward_of(dtype, batch, tokens, width, grad, fresh, cached, r, gate,
                                      grad_fresh, grad_cached, grad_r, partial);
  launch(FD_BY_ISA(blend_backward), p, elements(p.shape), threads);
}

void collapse(int dtype, bool wide, int sum_dtype, int64_t batch, int64_t tokens, int64_t width,
              const py::list& branches, const py::list& weights, const std::vector<int>& groups,
              bool accumulate, const py::list& sums, int64_t /* stored: none */, int threads) {
  Collapse p = collapse_of(dtype, wide, sum_dtype, batch, tokens, width, branches, weights, groups,
                           accumulate, sums);
  launch(FD_BY_ISA(collapse), p, elements(p.shape), threads);
}

void swiglu(int dtype, int64_t batch, int64_t tokens, int64_t width, py::handle gate,
            py::handle value, py::handle out, int64_t /* stored: none */, int threads) {
  Swiglu p = swiglu_of(dtype, batch, tokens, width, gate, value, out);
  launch(FD_BY_ISA(swiglu), p, elements(p.shape), threads);
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
  m.def("sparse_attention", &fd::sparse_attention);
  m.def("swiglu", &fd::swiglu);
  m.def("set_isa", &fd::set_isa, "Name an instruction set for the whole process, or 'auto'.");
  m.def("build_info", &fd::build_info, "How this module was built, and what it can use here.");
}
