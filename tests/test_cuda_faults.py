"""Planted faults in the CUDA kernels: each is wrong source that one named check must find.

A fault is a textual change of a file of csrc that matches exactly once. The changed copy runs in
the emulator, in the check and the dtype that the table names. docs/faults.md lists them all.
"""

from __future__ import annotations

import faulthandler
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import kernel_checks
from emulated import CSRC, Emulated, build, emulated, unavailable
from inputs import Runner, checks_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.kernels,
    pytest.mark.skipif(unavailable() is not None, reason=str(unavailable())),
]

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
BLEND, COLLAPSE, SWIGLU = "blend.cu", "collapse.cu", "swiglu.cu"
GATED, NORM, PROLOGUE = "gated_residual.cu", "norm_modulate.cu", "qkv_prologue.cu"
REDUCE, VECTOR, ELEMENT, OPERAND = "reduce.h", "vector.h", "element.h", "operand.h"
QUANTISED = "norm_modulate.h"
SELECT, KEYS = "token_select.cu", "token_select.h"
CHANGE, NOTES = "token_change.cu", "token_change.h"
PATCHIFY, PLACES = "patchify.cu", "places.h"
TRANSITION, CHILDREN = "resolution_transition.cu", "resolution_transition.h"


@dataclass(frozen=True)
class Fault:
    """Which file, what to replace by what, and the op, check and dtype that find it."""

    file: str
    old: str
    new: str
    check: str
    dtype: torch.dtype = BF16
    op: str = ""

    def found_by(self):
        return check_of(self.op or self.file, self.check)


def check_of(file: str, name: str):
    """The check of that name, of the op whose kernel the file is or of all kernels."""
    return (kernel_checks.CHECKS | checks_of(Path(file).stem))[name]


FAULTS = {
    # gated_residual: addresses
    "a row past the last is written": Fault(
        GATED, "if (row >= rows) return;", "if (row > rows) return;", "check_inputs_and_guards"
    ),
    "the last row is left out": Fault(
        GATED, "if (row >= rows) return;", "if (row + 1 >= rows) return;", "check_sizes"
    ),
    "branches are read one row early": Fault(
        GATED, "j == p.fresh ? k : stored) + i, n)",
        "j == p.fresh ? k : (stored > 0 ? stored - 1 : 0)) + i, n)", "check_rows",
    ),
    "the fresh branch is read at rows": Fault(
        GATED, "j == p.fresh ? k : stored) + i, n)",
        "stored < p.shape.tokens ? stored : k) + i, n)", "check_rows",
    ),
    "the gate is that of the first sample": Fault(
        GATED, "(p.gates[j], kWide, b, k,", "(p.gates[j], kWide, 0, k,", "check_gates"
    ),
    "the gate is that of the first token": Fault(
        GATED, "(p.gates[j], kWide, b, k,", "(p.gates[j], kWide, b, 0,", "check_gates"
    ),
    "the cache is not written": Fault(
        GATED, "if (p.cache) store", "if (false) store", "check_cache"
    ),
    "the cache is written at compact rows": Fault(
        GATED, "p.cache.template row<T>(b, stored)", "p.cache.template row<T>(b, k)", "check_cache"
    ),
    "branches past the first group are left out": Fault(
        GATED, "first < p.count; first += kBranches", "first < kBranches; first += kBranches",
        "check_many_branches",
    ),
    "a part of a group is left out": Fault(
        GATED, "first < p.count; first += kBranches",
        "first + kBranches <= p.count; first += kBranches",
        "check_sizes",
    ),
    "columns past the block are left out": Fault(
        GATED, "i += blockDim.x * kElements<T>", "i += p.shape.width", "check_sizes", FP32
    ),
    "a transposed x is read as contiguous": Fault(
        GATED, "if (p.x_step == 1) {", "if (true) {", "check_strides"
    ),
    "alignment of a branch is not looked at": Fault(
        GATED, "aligned<T>(p.branches[j]) &&", "true &&", "check_strides"
    ),
    "alignment of out is not looked at": Fault(
        GATED, "&& aligned<T>(p.out) &&", "&&", "check_strides"
    ),
    "a weight is that of the first branch": Fault(
        GATED, "p.weights.at(j, row)", "p.weights.at(0, row)", "check_weights"
    ),
    "a token's weight is that of its row in the store": Fault(
        GATED, "p.weights.at(j, row)",
        "p.weights.at(j, row - k + (stored < p.shape.tokens ? stored : k))",
        "check_weights_of_rows",
    ),
    "gates in fp32 are read as 16 bits": Fault(
        GATED, "(p.gates[j], kWide, b,", "(p.gates[j], false, b,", "check_wide_gates"
    ),
    "weights beside gates in fp32 are left out": Fault(
        GATED, "if (!kWide || p.weights)", "if (!kWide)", "check_wide_gates"
    ),
    "one branch with a gate in fp32 is taken for many": Fault(
        GATED, "launch<T, 1, false, true>", "launch<T, 1, false, false>", "check_wide_gates"
    ),
    "the halves of a vector in fp32 are one": Fault(
        VECTOR, "to_floats<Other>(load<kAligned>(from + i, n - i), values + i)",
        "to_floats<Other>(load<kAligned>(from, n - i), values + i)", "check_wide_gates", BF16, GATED,
    ),
    "alignment of a gate in fp32 is not looked at": Fault(
        VECTOR, "wide ? aligned<float>(o) : aligned<T>(o)", "wide || aligned<T>(o)",
        "check_wide_gates_of_every_form", BF16, GATED,
    ),
    "weights are not applied": Fault(
        VECTOR, "if constexpr (kWeighted) value[e] *= weight;", "", "check_weights", BF16, GATED
    ),
    # norm_modulate: addresses, barriers and lanes
    "no barrier between the warps' sums": Fault(
        REDUCE, "  __syncthreads();\n#pragma unroll\n", "#pragma unroll\n", "check_sizes", FP32, NORM
    ),
    "both sums share their memory": Fault(
        NORM, "sum_over_block<2>(about, partial_about)", "sum_over_block<2>(about, partial_mean)",
        "check_model_widths",
    ),
    "the last lanes are not added": Fault(
        REDUCE, "lanes > 0; lanes /= 2", "lanes > 1; lanes /= 2", "check_sizes", BF16, NORM
    ),
    "each lane is added to itself": Fault(
        REDUCE, "values[t], lanes)", "values[t], 0)", "check_sizes", BF16, NORM
    ),
    "the last warp is not added": Fault(
        REDUCE, "w < warps; ++w", "w < warps - 1; ++w", "check_model_widths", BF16, NORM
    ),
    "the block is half a warp short": Fault(
        NORM, "block((threads + kWarp - 1) / kWarp * kWarp)", "block(threads)", "check_sizes"
    ),
    "the tail counts as deviations": Fault(
        NORM, "i + e < width ? value[e] - mean : 0.0f", "value[e] - mean", "check_sizes"
    ),
    "rows of x are not gathered": Fault(
        NORM, "load<kAligned>(p.x.row<T>(b, stored)", "load<kAligned>(p.x.row<T>(b, k)",
        "check_rows",
    ),
    "x is updated at compact rows": Fault(
        NORM, "store<kAligned>(p.x.row<T>(b, stored)", "store<kAligned>(p.x.row<T>(b, k)",
        "check_rows",
    ),
    "a cache row stays unwritten": Fault(
        NORM, "if (p.cache) store", "if (p.cache && k > 0) store", "check_rows"
    ),
    "x is not updated": Fault(
        NORM, "  store<kAligned>(p.x.row<T>(b, stored) + i, x, n);\n", "", "check_branch"
    ),
    # norm_modulate: values
    "scale and shift are swapped": Fault(
        NORM, "affine<T, kAligned, kAnyWide>(p.scale, 1.0f, p.shift,",
        "affine<T, kAligned, kAnyWide>(p.shift, 1.0f, p.scale,", "check_sizes",
    ),
    "the one of 1 + scale is missing": Fault(
        NORM, "affine<T, kAligned, kAnyWide>(p.scale, 1.0f,", "affine<T, kAligned, kAnyWide>(p.scale, 0.0f,",
        "check_sizes",
    ),
    "weight and bias are swapped": Fault(
        NORM, "affine<T, kAligned, kAnyWide>(p.weight, 0.0f, p.bias,",
        "affine<T, kAligned, kAnyWide>(p.bias, 0.0f, p.weight,", "check_optional_parts",
    ),
    "the scale is that of the first sample": Fault(
        NORM, "(factor, factor.wide, b, k,", "(factor, factor.wide, 0, k,", "check_modulations"
    ),
    "a scale in fp32 is read as 16 bits": Fault(
        NORM, "(factor, factor.wide, b,", "(factor, false, b,", "check_wide_vectors"
    ),
    "a shift is as wide as its scale": Fault(
        NORM, "(term, term.wide, b,", "(term, factor.wide, b,", "check_wide_vectors_of_every_form"
    ),
    "a bias that alone is in fp32 is read as 16 bits": Fault(
        QUANTISED, "p.bias.wide ||", "", "check_wide_vectors", BF16, NORM
    ),
    "a gate that alone is in fp32 is read as 16 bits": Fault(
        QUANTISED, " || p.gate.wide", "", "check_a_wide_gate", BF16, NORM
    ),
    "alignment of a vector in fp32 is not looked at": Fault(
        NORM, "aligned<T>(*m, m->wide)", "(m->wide || aligned<T>(*m, m->wide))",
        "check_wide_vectors_of_every_form",
    ),
    "variance is E[x^2] - m^2": Fault(
        NORM, "i + e < width ? value[e] - mean : 0.0f;",
        "value[e];  // rest becomes the mean\n        mean = 0.0f;", "check_offset_rows", FP32,
    ),
    "the rounding of the mean is not corrected": Fault(
        NORM, "rest = about[0] / width;", "rest = 0.0f;", "check_shifted_rows", FP32
    ),
    "eps is left out": Fault(
        NORM, "__frsqrt_rn(variance + static_cast<float>(p.eps))", "__frsqrt_rn(variance)",
        "check_constant_rows",
    ),
    "the branch is not gated": Fault(
        NORM, "add<T>(branch, static_cast<bool>(p.gate), gate, sum);",
        "add<T>(branch, false, gate, sum);", "check_branch",
    ),
    # norm_modulate in fp8
    "the largest is that of a warp": Fault(
        REDUCE, "if (count == 1) return value;", "return value;", "check_fp8", BF16, NORM
    ),
    "the largest is that of a lane": Fault(
        REDUCE, "other > 0; other /= 2", "other > 16; other /= 2", "check_fp8", BF16, NORM
    ),
    "no barrier before the warps' largest": Fault(
        REDUCE, "  __syncthreads();\n  for", "  for", "check_fp8", BF16, NORM
    ),
    "the tail counts as magnitudes": Fault(
        NORM, "if (e < n) largest = larger", "largest = larger", "check_fp8"
    ),
    "negative numbers are the largest": Fault(
        NORM, "as_bits(value[e]) & 0x7fffffffu", "as_bits(value[e])", "check_fp8"
    ),
    "NaN is no magnitude": Fault(
        NORM, "if (e < n) largest =", "if (e < n && value[e] == value[e]) largest =", "check_fp8_values"
    ),
    "the number of a row is that of the first sample's": Fault(
        NORM, "p.row_scale.row(b)[k]", "p.row_scale.row(0)[k]", "check_fp8_rows"
    ),
    "the number of a row is not rounded": Fault(
        QUANTISED, "to_float(from_float<T>(largest / 448.0f))", "largest / 448.0f",
        "check_fp8_values", BF16, NORM,
    ),
    "rows too small to divide are divided": Fault(
        QUANTISED, "scale < 1.17549435e-38f ? 0.0f : scale", "scale", "check_fp8_values", BF16, NORM
    ),
    "a row of zeros is divided by zero": Fault(
        NORM, "number > 0.0f ? 1.0f / number : number", "1.0f / number", "check_fp8_values"
    ),
    "a row is divided by infinity with a remainder": Fault(
        NORM, "number < kInfinity ? number : 0.0f", "number", "check_fp8_values"
    ),
    "ties of quotients are missed": Fault(
        NORM, "return fmaf(fmaf(-near, by, x), inverse, near);", "return near;", "check_fp8_values"
    ),
    "fp8 is rounded half up": Fault(
        ELEMENT, "0x7ffffu + ((a >> 20) & 1u)", "0x80000u", "check_fp8_values", BF16, NORM
    ),
    "fp8 has no subnormals": Fault(
        ELEMENT, "a < (121u << 23) ? tiny :", "a < (121u << 23) ? 0u :", "check_fp8_values", BF16, NORM
    ),
    "fp8 overflows to NaN": Fault(
        ELEMENT, "normal < 126u ? normal : 126u", "normal < 127u ? normal : 127u",
        "check_fp8_values", FP16, NORM,
    ),
    "the largest number becomes NaN's": Fault(
        ELEMENT, "normal < 126u ? normal : 126u", "normal", "check_fp8_values", FP16, NORM
    ),
    "fp8 has no sign": Fault(
        ELEMENT, "(u >> 24 & 0x80u) | finite", "finite", "check_fp8", BF16, NORM
    ),
    "fp8 is stored past the end": Fault(
        VECTOR, "i < kElements<T> && i < n;", "i < kElements<T>;", "check_fp8_rows", BF16, NORM
    ),
    "fp8 is stored in whole pieces anywhere": Fault(
        NORM, "(number | p.out.batch_stride | p.out.token_stride)", "(0 * number)", "check_fp8_rows"
    ),
    # qkv_prologue: addresses, lanes and barriers
    "k is stored at compact rows": Fault(
        PROLOGUE, "is_q ? k : stored", "part == Part::kV ? stored : k", "check_rows"
    ),
    "a row of the cache stays stale": Fault(
        PROLOGUE, "if (!inside) return;", "if (!inside || (is_k && !is_q && blockIdx.x == 0)) return;",
        "check_sizes",
    ),
    "a head is stored past its end": Fault(
        PROLOGUE, "const int n = p.head - i;", "const int n = kElements<T>;",
        "check_odd_head_dims",
    ),
    "v begins behind as many heads as q has": Fault(
        PROLOGUE, "number - p.heads - p.kv_heads;", "number - 2 * p.heads;", "check_sizes"
    ),
    "heads of the last block are left out": Fault(
        PROLOGUE, "grid_of(p.shape, divided(heads, of_block))",
        "grid_of(p.shape, heads < of_block ? 1 : heads / of_block)", "check_model_heads",
    ),
    "every sample is the first": Fault(
        PROLOGUE, "blockIdx.z, blockIdx.x)", "0, blockIdx.x)", "check_sizes"
    ),
    "k and v are as wide as q": Fault(
        PROLOGUE, "part == Part::kQ ? p.heads : p.kv_heads", "p.heads", "check_sizes"
    ),
    "lanes of the next head are added": Fault(
        PROLOGUE, "other = lanes / 2;", "other = kWarp / 2;", "check_sizes"
    ),
    "the last lanes of a head are not added": Fault(
        PROLOGUE, "other > 0; other /= 2", "other > 1; other /= 2", "check_sizes"
    ),
    "a head has fewer vectors than it needs": Fault(
        PROLOGUE, "power_of_two((head_vectors + 2) / 3)", "power_of_two(head_vectors / 3)",
        "check_odd_head_dims",
    ),
    "no barrier in the norm of all heads": Fault(
        REDUCE, "  __syncthreads();\n#pragma unroll\n", "#pragma unroll\n", "check_sizes", BF16, PROLOGUE
    ),
    "queries alone take turns with keys that are not there": Fault(
        PROLOGUE, "alone ? blockIdx.x : blockIdx.x / 3", "blockIdx.x / 3", "check_queries_alone"
    ),
    "queries alone are taken for keys": Fault(
        PROLOGUE, "alone ? 0 : blockIdx.x % 3", "blockIdx.x % 3", "check_queries_alone"
    ),
    "both sums of all heads share their memory": Fault(
        PROLOGUE, "sum_over_block<2>(about, partial_about)",
        "sum_over_block<2>(about, partial_mean)", "check_model_heads",
    ),
    "what is behind a head counts as deviations": Fault(
        PROLOGUE, "there ? value[e] - mean : 0.0f", "value[e] - mean", "check_odd_head_dims"
    ),
    "alignment of cos is not looked at": Fault(
        PROLOGUE, "yes && aligned<float>(p.cos) &&", "yes &&", "check_strides"
    ),
    "alignment of the caches is not looked at": Fault(
        PROLOGUE, "&p.k_cache, &p.v_cache,", "", "check_strides"
    ),
    # qkv_prologue: values
    "pairs are half a vector apart": Fault(
        PROLOGUE, "real = y[2 * j], imaginary = y[2 * j + 1]",
        "real = y[j], imaginary = y[j + kPairs]", "check_sizes",
    ),
    "k is not rotated": Fault(
        PROLOGUE, "t.cos = p.cos ?", "t.cos = p.cos && part != Part::kK ?", "check_sizes"
    ),
    "the position is that of the compact token": Fault(
        PROLOGUE, "p.cos.row<float>(b, stored)", "p.cos.row<float>(b, k)", "check_rows"
    ),
    "the table is that of the first sample": Fault(
        PROLOGUE, "p.sin.row<float>(b, stored)", "p.sin.row<float>(0, stored)", "check_rows"
    ),
    "the rotation goes the other way": Fault(
        PROLOGUE, "-(imaginary * s[j])", "imaginary * s[j]", "check_sizes"
    ),
    "v is normed": Fault(
        PROLOGUE, "t.copied = part == Part::kV ||", "t.copied =", "check_sizes"
    ),
    "k has the weight of q": Fault(
        PROLOGUE, "is_q ? p.q_weight.data : p.k_weight.data", "p.q_weight.data", "check_sizes"
    ),
    "all heads have the weight of the first": Fault(
        PROLOGUE, "load<kAligned>(t.weight + affine, n)", "load<kAligned>(t.weight + i, n)",
        "check_sizes",
    ),
    "eps is left out of a head's norm": Fault(
        PROLOGUE, "sum / p.head + static_cast<float>(p.eps)", "sum / p.head",
        "check_constant_heads",
    ),
    "the mean square of all heads is a variance": Fault(
        PROLOGUE, "if (rms) {", "if (false) {", "check_sizes"
    ),
    "eps is left out of the norm of all heads": Fault(
        PROLOGUE, "__frsqrt_rn(variance + static_cast<float>(p.eps))", "__frsqrt_rn(variance)",
        "check_constant_heads",
    ),
    "the mean of all heads is not corrected": Fault(
        PROLOGUE, "rest = about[0] / width;", "rest = 0.0f;", "check_shifted_heads", FP32
    ),
    "the norm is rounded before the rotation": Fault(
        PROLOGUE, "if (t.cos != nullptr) rotate", "to_floats<T>(from_floats<T>(y), y);\n  if (t.cos != nullptr) rotate",
        "check_one_rounding_of_heads",
    ),
    # what all include
    "sums are kept in fp16": Fault(
        VECTOR, "fmaf(by[e], value[e], sum[e])",
        "to_float(from_float<fp16>(fmaf(by[e], value[e], sum[e])))", "check_sizes", FP32, GATED,
    ),
    "sums are kept in bf16": Fault(
        VECTOR, "fmaf(by[e], value[e], sum[e])",
        "to_float(from_float<bf16>(fmaf(by[e], value[e], sum[e])))", "check_one_rounding_of_sums",
        BF16, GATED,
    ),
    "the tail of a row is written": Fault(
        VECTOR, "if (i < n) p[i] = element<T>(w, i);", "p[i] = element<T>(w, i);",
        "check_inputs_and_guards", BF16, GATED,
    ),
    "the two halves of a word are swapped": Fault(
        VECTOR, "w.at[i / 2] >> (16 * (i % 2))", "w.at[i / 2] >> (16 - 16 * (i % 2))",
        "check_sizes", BF16, GATED,
    ),
    "bf16 is truncated": Fault(
        ELEMENT, "(u + 0x7fffu + ((u >> 16) & 1u)) >> 16", "u >> 16", "check_ties_to_even", BF16,
        GATED,
    ),
    # token_select: addresses, barriers and lanes
    "rows and columns of the grid are swapped": Fault(
        SELECT, "token / p.grid[1] * p.stride[1] + token % p.grid[1] * p.stride[2]",
        "token / p.grid[1] * p.stride[2] + token % p.grid[1] * p.stride[1]", "check_layouts",
    ),
    "channels are taken to be next to each other": Fault(
        SELECT, "mean += to_float(pixel[c * p.stride[5]])", "mean += to_float(pixel[c])",
        "check_layouts",
    ),
    "every sample is cut by the keys of the first": Fault(
        SELECT, "p.keys + b * tokens", "p.keys", "check_samples_are_apart"
    ),
    "tokens past the last are written": Fault(
        SELECT, "    if (i >= tokens) continue;\n", "", "check_inputs_and_guards"
    ),
    "the keys of the last block are left out": Fault(
        SELECT, "grid((count + kThreads - 1) / kThreads)", "grid(count / kThreads + (count < kThreads))",
        "check_ties",
    ),
    "digits are counted on top of the last ones": Fault(
        SELECT, "histogram[d] = 0;", "histogram[d] *= shift != 24;", "check_ties"
    ),
    "no barrier before the digit is searched": Fault(
        SELECT, "    __syncthreads();\n    if (threadIdx.x < kWarp)", "    if (threadIdx.x < kWarp)",
        "check_ties",
    ),
    "no barrier before the digit is read": Fault(
        SELECT, "    __syncthreads();\n    cut.key |=", "    cut.key |=", "check_ties"
    ),
    "no barrier before the votes are read": Fault(
        SELECT, "__popc(votes);\n  __syncthreads();\n", "__popc(votes);\n", "check_ties"
    ),
    "votes are overwritten while they are read": Fault(
        SELECT, "  __syncthreads();  // of_warp is written again by the next call\n", "",
        "check_ties",
    ),
    "the scan of the digits stops half way": Fault(
        SELECT, "lanes < kWarp; lanes *= 2", "lanes < kWarp / 2; lanes *= 2", "check_ties"
    ),
    "the rank starts anew with each part": Fault(
        SELECT, "int rank = seen + __popc", "int rank = __popc", "check_ties"
    ),
    # token_select: the order
    "keys with another beginning are counted": Fault(
        SELECT, "if ((key & known) == cut.key) atomicAdd", "atomicAdd", "check_sizes"
    ),
    "the last eight bits of a key are not looked at": Fault(
        SELECT, "shift >= 0; shift -= 8", "shift > 0; shift -= 8", "check_sizes"
    ),
    "of equals high drops the first ones": Fault(
        SELECT, "rank >= cut.equal - cut.take", "rank < cut.take", "check_all_equal"
    ),
    "of equals low drops all": Fault(
        SELECT, "key == cut.key && rank < cut.take", "key == cut.key", "check_one_side_of_a_tie"
    ),
    "low counts what high has taken": Fault(
        SELECT, "low_keys[i] = kDropped;", "p.inverse.row(b)[i] = -1;", "check_one_side_of_a_tie"
    ),
    "starvation has the published sign": Fault(
        SELECT, "exp(-times)", "exp(times)", "check_starvation"
    ),
    "one channel is divided by none": Fault(
        SELECT, "channels > 1 ? channels - 1.0f : 1.0f", "channels - 1.0f", "check_special_values"
    ),
    "the deviation is E[x^2] - m^2": Fault(
        SELECT, "      sum += sqrtf(",
        "      squares = 0.0f;\n"
        "      for (int c = 0; c < channels; ++c) {\n"
        "        const float v = to_float(pixel[c * p.stride[5]]);\n"
        "        squares = fmaf(v, v, squares);\n"
        "      }\n"
        "      squares -= channels * mean * mean;\n"
        "      sum += sqrtf(", "check_offset_fields", FP32,
    ),
    "tokens of the greatest age are not kept": Fault(
        SELECT, "p.age.row(b)[token] >= p.max_age", "p.age.row(b)[token] > p.max_age",
        "check_a_bounded_age",
    ),
    "age is not set back": Fault(
        SELECT, "dropped ? p.age.row(b)[i] + 1 : 0", "p.age.row(b)[i] + dropped", "check_max_age"
    ),
    "NaN counts as a large metric": Fault(
        KEYS, "  if (as_bits(metric) == kInfinity) key = kNoMetric;\n", "",
        "check_special_values", BF16, SELECT,
    ),
    # token_change
    "rows and columns of a velocity's patch are swapped": Fault(
        CHANGE, "y * p.stride[3] + x * p.stride[4]", "x * p.stride[3] + y * p.stride[4]",
        "check_layouts",
    ),
    "channels of what is kept are taken to be next to each other": Fault(
        CHANGE, "last[c * p.last_stride[5]] = value", "last[c] = value", "check_layouts"
    ),
    "tokens past the last are noted": Fault(
        CHANGE, "  if (i >= count) return;\n", "", "check_inputs_and_guards"
    ),
    "the tokens of the last block are not noted": Fault(
        CHANGE, "grid((count + kThreads - 1) / kThreads)", "grid(count / kThreads + (count < kThreads))",
        "check_sizes",
    ),
    "tokens that were left out are noted": Fault(
        CHANGE, "if (p.computed(b, token)) ", "", "check_tokens_that_were_left_out"
    ),
    "what was computed is not kept": Fault(
        CHANGE, "last[c * p.last_stride[5]] = value;", "", "check_sizes"
    ),
    "changes are added up without a square": Fault(
        CHANGE, "fmaf(change, change, squares)", "squares + fabsf(change)", "check_patches"
    ),
    "of a patch the last pixel counts": Fault(
        CHANGE, "sum += squares", "sum = squares", "check_sizes"
    ),
    "NaN is no change": Fault(
        CHANGE, "squares = fmaf(", "if (change == change) squares = fmaf(", "check_special_values"
    ),
    "a change has been rounded": Fault(
        CHANGE, "float change = to_float(value) - to_float(last[c * p.last_stride[5]])",
        "float change = to_float(from_float<bf16>(to_float(value))) - to_float(last[c * p.last_stride[5]])",
        "check_small_changes", FP32,
    ),
    "a rate is taken over no distance": Fault(
        NOTES, "if (gap > 0.0f) rate", "rate", "check_equal_levels", BF16, CHANGE
    ),
    "a first value has a rate": Fault(
        NOTES, "gap > 0.0f", "!(gap == 0.0f)", "check_first_values", BF16, CHANGE
    ),
    "levels are to fall": Fault(
        NOTES, "fabsf(levels[1] - level.row(b)[token])", "(level.row(b)[token] - levels[1])",
        "check_rising_levels", BF16, CHANGE,
    ),
    "tokens age by the last step alone": Fault(
        NOTES, "levels[1] - level.row(b)[token]", "levels[1] - levels[0]",
        "check_tokens_that_were_left_out", BF16, CHANGE,
    ),
    "every sample has the levels of the first": Fault(
        NOTES, "levels[0] - level.row(b)[token]", "levels[0] - level.row(0)[token]",
        "check_samples_are_apart", BF16, CHANGE,
    ),
    "numbers are taken to be contiguous": Fault(
        OPERAND, "float* row(int64_t batch) const { return data + batch * batch_stride; }",
        "float* row(int64_t batch) const { return data + batch * 28; }",
        "check_strided_tables", BF16, CHANGE,
    ),
    # patchify
    "elements past the last are written": Fault(
        PATCHIFY, "  if (element >= elements) return;\n", "", "check_inputs_and_guards"
    ),
    "the elements of the last block are left out": Fault(
        PATCHIFY, "(elements + kThreads - 1) / kThreads", "elements / kThreads + (elements < kThreads)",
        "check_sizes",
    ),
    "rows and columns of a patch are swapped": Fault(
        PATCHIFY, "y * p.token_stride[2] + x * p.token_stride[3]",
        "x * p.token_stride[2] + y * p.token_stride[3]", "check_orders",
    ),
    "channels of a token are taken to be next to each other": Fault(
        PATCHIFY, "c * p.token_stride[4]", "c", "check_orders"
    ),
    "a token is drawn along a diagonal": Fault(
        PATCHIFY, "p.pixel(y * side + r, x * side + q)", "p.pixel(y * side + r, x * side + r)",
        "check_sizes",
    ),
    "a patch is drawn whole in every cell": Fault(
        PATCHIFY, "p.pixel(y * side + r, x * side + q)",
        "p.pixel(y + r * p.patch[0], x + q * p.patch[1])", "check_sizes",
    ),
    "every image has the table of the first": Fault(
        PATCHIFY, "p.table.at(b, i)", "p.table.at(0, i)", "check_other_cells_stay"
    ),
    "a table is taken to be packed": Fault(
        PLACES, "const int32_t* of = data + batch * batch_stride + token * token_stride;",
        "const int32_t* of = data + batch * batch_stride + token * 3;",
        "check_strided_tokens_and_tables", BF16, PATCHIFY,
    ),
    # resolution_transition
    "tokens that stay leave gaps": Fault(
        TRANSITION, "stay<T>(p, b, i, place, i - before)",
        "stay<T>(p, b, i, place, i - (before > 0))", "check_sizes",
    ),
    "the last channels are left out": Fault(
        TRANSITION, "c += blockDim.x) {\n    out[c]", "c += p.shape.width) {\n    out[c]",
        "check_sizes",
    ),
    "siblings keep their noise to themselves": Fault(
        TRANSITION, "eps[k] + shared", "eps[k] + 0.0f * shared", "check_covariance", FP32
    ),
    "siblings have the noise of the first": Fault(
        TRANSITION, "p.noise.row<float>(b, row[k])[c]", "p.noise.row<float>(b, row[0])[c]",
        "check_sizes",
    ),
    "a child is the pixel of its sibling": Fault(
        TRANSITION, "const int k = c % 4;", "const int k = c % 2;", "check_pixelwise"
    ),
    "all noise has deviation 1": Fault(
        TRANSITION, "p.deviation * p.unsplit", "p.deviation", "check_numbers", FP32
    ),
    "every image has the rows of the first": Fault(
        CHILDREN, "p.rows.at(b, middle) < token", "p.rows.at(0, middle) < token",
        "check_samples_are_apart", BF16, TRANSITION,
    ),
    "columns before rows": Fault(
        CHILDREN, "parent.y + number / 2 * half, parent.x + number % 2 * half",
        "parent.y + number % 2 * half, parent.x + number / 2 * half", "check_a_published_vector",
        BF16, TRANSITION,
    ),
    "children are a cell apart": Fault(
        CHILDREN, "1 << (parent.level - 1)", "1", "check_larger_tokens", BF16, TRANSITION
    ),
    "raster order is left out": Fault(
        CHILDREN, "p.raster > 0 ? place.y * p.raster + place.x : compact", "compact",
        "check_both_transitions", BF16, TRANSITION,
    ),
    # blend
    "an operand of weight 0 is multiplied": Fault(
        BLEND, "value[e] = r == 1.0f ? fresh[e] : r == 0.0f ? cached[e] : mixed;",
        "value[e] = mixed;", "check_one_operand_alone",
    ),
    "alignment of a gradient is not looked at": Fault(
        BLEND, "&p.gate, &p.grad_fresh, &p.grad_cached}", "&p.gate, &p.grad_fresh}",
        "check_strides",
    ),
    "rows past the first of a block have no gradient": Fault(
        BLEND, "row += gridDim.x", "row += rows", "check_backward_sizes"
    ),
    "the second stage adds as many sums as it has threads": Fault(
        BLEND, "i < count; i += blockDim.x", "i < count; i += count", "check_backward_sizes"
    ),
    "the sum of nothing is not written": Fault(
        BLEND, "  if (p.grad_r == nullptr) return;\n  const", "  if (rows == 0) return;\n  const",
        "check_empty",
    ),
    # collapse
    "the last branch of an odd number is left out": Fault(
        COLLAPSE, "first < p.count; first += kGroup",
        "first + kGroup <= p.count; first += kGroup", "check_sizes",
    ),
    "the sum of a group is weighted": Fault(
        COLLAPSE, "add<T>(branch[g], false, weight[g], sums[s])",
        "add<T>(branch[g], static_cast<bool>(p.weights[j]), weight[g], sums[s])", "check_sizes",
    ),
    "a second pass begins anew": Fault(
        COLLAPSE, "if (p.accumulate) {", "if (false) {", "check_accumulate"
    ),
    "weights in fp32 are read as 16 bits": Fault(
        COLLAPSE, "(p.weights[j], kWide, b,", "(p.weights[j], false, b,", "check_wide_weights"
    ),
    "alignment of the sums is not looked at": Fault(
        COLLAPSE, "aligned<Sum>(p.sums[s])", "true", "check_strides"
    ),
    "half of a vector of sums is stored twice": Fault(
        COLLAPSE, "from_floats<Sum>(values + i), n - i)", "from_floats<Sum>(values), n - i)",
        "check_sizes",
    ),
    # swiglu
    "the exponential of a large gate overflows": Fault(
        SWIGLU, "const float e = expf(as_float(as_bits(g) | 0x80000000u));  // of -|g|\n"
        "  return g * (g < 0.0f ? e : 1.0f) / (1.0f + e);",
        "const float e = expf(g);\n  return g * e / (1.0f + e);", "check_special_values",
    ),
    "a negative gate has the SiLU of a positive one": Fault(
        SWIGLU, "(g < 0.0f ? e : 1.0f)", "1.0f", "check_each_gate"
    ),
    "alignment of the value is not looked at": Fault(
        SWIGLU, "aligned<T>(p.value)", "true", "check_strides"
    ),
    "alignment of what is written is not looked at": Fault(
        SWIGLU, "aligned<T>(p.gate) && aligned<T>(p.value) &&\n         aligned<T>(p.out)",
        "aligned<T>(p.gate) && aligned<T>(p.value)", "check_strides",
    ),
    "a width that is no multiple of a vector counts as aligned": Fault(
        SWIGLU, "p.shape.width % kElements<T> == 0 && ", "", "check_halves"
    ),
    "columns past the first of a thread are left out": Fault(
        SWIGLU, "i += blockDim.x * kElements<T>", "i += p.shape.width", "check_wide_rows"
    ),
    "rows past the first of a block are left out": Fault(
        SWIGLU, "(rows - 1) / down + 1", "(rows - 1) / (2 * down) + 1", "check_sizes"
    ),
    "the value is that of the first token": Fault(
        SWIGLU, "p.value.row<T>(b, k)", "p.value.row<T>(b, 0)", "check_sizes"
    ),
    "the value is that of the first sample": Fault(
        SWIGLU, "p.value.row<T>(b, k)", "p.value.row<T>(0, k)", "check_sizes"
    ),
}  # fmt: skip


class OneDtype(Runner):
    """A runner of one dtype."""

    def __init__(self, backend, label: str, dtype: torch.dtype):
        super().__init__(backend, label)
        object.__setattr__(self, "_dtype", dtype)

    def dtypes(self):
        return [self._dtype]


def planted(fault: Fault) -> str:
    source = (CSRC / fault.file).read_text()
    assert source.count(fault.old) == 1, f"matches {source.count(fault.old)} times: {fault.old}"
    return source.replace(fault.old, fault.new)


def refused(fault: Fault, backend: Emulated, name: str) -> bool:
    """Whether the check refuses the backend, in a process of its own: a wrong address may crash."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()  # a crash is an answer here
        status = 1
        try:
            fault.found_by()(OneDtype(backend, name, fault.dtype))
        except (AssertionError, RuntimeError):
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_caught(name):
    fault = FAULTS[name]
    wrong = build({fault.file: planted(fault)})
    assert refused(fault, wrong, name)


@pytest.mark.parametrize(
    ("op", "check", "dtype"),
    sorted({(f.op or f.file, f.check, f.dtype) for f in FAULTS.values()}, key=str),
)
def test_the_same_check_passes_without_the_fault(op, check, dtype):
    check_of(op, check)(OneDtype(emulated(), "emulated", dtype))
