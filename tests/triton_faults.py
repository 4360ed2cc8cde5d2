"""Faults to plant in the Triton kernels, each with the check that finds it.

test_triton_faults.py plants them; docs/faults.md lists them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
BLEND, COLLAPSE = "blend", "collapse"
GATED, NORM = "gated_residual", "norm_modulate"
PROLOGUE, SELECT = "qkv_prologue", "token_select"
CHANGE = "token_change"
PATCHIFY, TRANSITION = "patchify", "resolution_transition"
ATTENTION = "sparse_attention"
SWIGLU = "swiglu"


@dataclass(frozen=True)
class Fault:
    """Which file, what to replace by what, and the check and dtype that find it."""

    op: str
    changes: tuple[tuple[str, str], ...]
    check: str
    dtype: torch.dtype = BF16


def one(op: str, old: str, new: str, check: str, dtype: torch.dtype = BF16) -> Fault:
    return Fault(op, ((old, new),), check, dtype)


FAULTS = {
    # gated_residual: addresses
    "columns past D are stored": one(
        GATED, "element_ty), mask=inside)", "element_ty), mask=active[:, None])",
        "check_inputs_and_guards",
    ),
    "a row past the last is stored": one(
        GATED, "element_ty), mask=inside)",
        "element_ty), mask=(row <= total)[:, None] & (col < WIDTH)[None, :])",
        "check_inputs_and_guards",
    ),
    "the last piece of D is left out": one(
        GATED, "triton.cdiv(width, launch.cols)", "max(1, width // launch.cols)", "check_sizes"
    ),
    "a branch is read one row early": one(
        GATED, "pointers(branches[i], b, at, col)",
        "pointers(branches[i], b, tl.maximum(at - 1, 0), col)", "check_rows",
    ),
    "the fresh branch is read at rows": one(
        GATED, "pointers(branches[i], b, k, col)",
        "pointers(branches[i], b, tl.minimum(at, tokens - 1), col)", "check_rows",
    ),
    "the gate is that of the first sample": one(
        GATED, "pointers(gates[i], b, k, col)", "pointers(gates[i], b * 0, k, col)", "check_gates"
    ),
    "the gate is that of the first token": one(
        GATED, "pointers(gates[i], b, k, col)", "pointers(gates[i], b, k * 0, col)", "check_gates"
    ),
    "a cache row stays unwritten": one(
        GATED, "branch, mask=inside)", "branch, mask=inside & (k > 0)[:, None])", "check_cache"
    ),
    "the cache is written one row early": one(
        GATED, "pointers(cache, b, at, col)", "pointers(cache, b, tl.maximum(at - 1, 0), col)",
        "check_cache",
    ),
    "the cache is written at compact rows": one(
        GATED, "pointers(cache, b, at, col)", "pointers(cache, b, k, col)", "check_cache"
    ),
    "row offsets are int32": one(
        GATED, "b, at, col), mask=inside, other=0.0)",
        "b.to(tl.int32), at.to(tl.int32), col), mask=inside, other=0.0)",
        "check_offsets_beyond_int32", FP16,
    ),
    # gated_residual: values
    "a gate of None drops its branch": one(
        GATED, "acc += value", "acc += 0.0 * value", "check_rows"
    ),
    "the sum is kept in bf16": one(
        GATED, "value, acc)", "value, acc).to(tl.bfloat16).to(tl.float32)",
        "check_one_rounding_of_sums",
    ),
    "the sum is kept in fp16": one(
        GATED, "value, acc)", "value, acc).to(tl.float16).to(tl.float32)", "check_sizes", FP32,
    ),
    "out is truncated instead of rounded": one(
        GATED, "acc.to(out.start.dtype.element_ty)",
        "(acc.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)",
        "check_ties_to_even",
    ),
    "a weight is that of the first branch": one(
        GATED, "tl.load(weights + i)", "tl.load(weights)", "check_weights"
    ),
    "a token's weight is that of the first branch": one(
        GATED, "weights + i * total.to(tl.int64) + row", "weights + row", "check_weights"
    ),
    "a token's weight is that of its row in the store": one(
        GATED, "weights + i * total.to(tl.int64) + row",
        "weights + i * total.to(tl.int64) + row - k + tl.minimum(at, tokens - 1)",
        "check_weights_of_rows",
    ),
    "a gate in fp32 is rounded": one(
        GATED, "gate.to(tl.float32)", "gate.to(branch.dtype).to(tl.float32)", "check_wide_gates"
    ),
    # norm_modulate: addresses
    "y is stored past D": one(
        NORM, "y.to(out.start.dtype.element_ty), mask=inside",
        "y.to(out.start.dtype.element_ty), mask=active[:, None]",
        "check_inputs_and_guards",
    ),
    "y of a row past the last is stored": one(
        NORM, "y.to(out.start.dtype.element_ty), mask=inside",
        "y.to(out.start.dtype.element_ty), mask=(row <= total)[:, None] & wide",
        "check_inputs_and_guards",
    ),
    "columns past D are summed as ones": one(
        NORM, "pointers(x, b, at, col), mask=inside, other=0.0",
        "pointers(x, b, at, col), mask=inside, other=1.0", "check_sizes",
    ),
    "deviations past D are summed": one(
        NORM, "tl.where((col < WIDTH)[None, :], values[c] - mean[:, None], 0.0)",
        "values[c] - mean[:, None]", "check_offset_rows", FP32,
    ),
    "the last piece of D is left out, norm": one(
        NORM, "CHUNKS=triton.cdiv(width, launch.cols)",
        "CHUNKS=max(1, width // launch.cols)", "check_sizes",
    ),
    "x is read at compact rows": one(
        NORM, "tl.load(pointers(x, b, at, col)", "tl.load(pointers(x, b, k, col)", "check_rows"
    ),
    "x is written at compact rows": one(
        NORM, "pointers(x, b, at, col), value", "pointers(x, b, k, col), value", "check_rows"
    ),
    "x keeps its value before the branch": one(
        NORM, "tl.store(pointers(x, b, at, col), value, mask=inside)", "pass", "check_branch"
    ),
    "a cache row stays unwritten, norm": one(
        NORM, "update, mask=inside)", "update, mask=inside & (k > 0)[:, None])",
        "check_cache_without_rows",
    ),
    "scale is that of the first sample": one(
        NORM, "pointers(scale, b, k, col)", "pointers(scale, b * 0, k, col)", "check_modulations"
    ),
    "gate is that of the first token": one(
        NORM, "pointers(gate, b, k, col)", "pointers(gate, b, k * 0, col)", "check_branch"
    ),
    # norm_modulate: values
    "scale and shift are swapped": one(
        NORM, "modulation(scale),\n            modulation(shift)",
        "modulation(shift),\n            modulation(scale)", "check_modulations",
    ),
    "scale in place of 1 + scale": one(
        NORM, "y *= 1.0 + tl.load(pointers(scale", "y *= tl.load(pointers(scale", "check_sizes"
    ),
    "a bias displaces the weight": one(
        NORM, "if weight is not None:", "if weight is not None and bias is None:",
        "check_optional_parts",
    ),
    "variance as E[x^2] - m^2": Fault(
        NORM,
        (("values[c] - mean[:, None], 0.0)", "values[c], 0.0)"),
         ("values[c] - mean[:, None] - rest[:, None]", "values[c] - mean[:, None]")),
        "check_offset_rows", FP32,
    ),
    "the rounding of the mean is not corrected": one(
        NORM, "values[c] - mean[:, None] - rest[:, None]", "values[c] - mean[:, None]",
        "check_shifted_rows", FP32,
    ),
    "RMSNorm divides by the deviation": one(
        NORM, "acc += value * value", "acc += value", "check_sizes"
    ),
    "eps is left out": one(
        NORM, "inverse_root(variance + eps)", "inverse_root(variance)", "check_constant_rows"
    ),
    "the norm sees x before it is rounded": one(
        NORM, "value = value.to(tl.float32)\n        values",
        "value = (value if branch is None else added).to(tl.float32)\n        values",
        "check_fused_equals_two_ops",
    ),
    "y is modulated in bf16": one(
        NORM, "if scale is not None:",
        "y = y.to(tl.bfloat16).to(tl.float32)\n        if scale is not None:",
        "check_one_rounding_of_norms",
    ),
    "rows of one tile share a mean": one(
        NORM, "mean = mean_of(tl.sum(acc, axis=1), WIDTH)",
        "mean = tl.zeros([ROWS], tl.float32) + mean_of(tl.sum(tl.sum(acc, axis=1), axis=0), WIDTH)",
        "check_special_values",
    ),
    # norm_modulate in fp8
    "the largest magnitude is that of the last piece": one(
        NORM, "tl.maximum(largest, tl.where(inside, magnitude, 0))",
        "tl.where(inside, magnitude, 0)", "check_fp8",
    ),
    "columns past D are magnitudes": one(
        NORM, "tl.where(inside, magnitude, 0)", "magnitude", "check_fp8"
    ),
    "negative numbers are the largest": one(
        NORM, "bitcast=True) & 0x7FFFFFFF", "bitcast=True)", "check_fp8"
    ),
    "y is quantised before it is rounded": one(
        NORM, "y = y.to(x.start.dtype.element_ty).to(tl.float32)\n            made",
        "y = y.to(tl.float32)\n            made", "check_fp8",
    ),
    "the number of a row is not rounded": one(
        NORM, "by = by.to(x.start.dtype.element_ty).to(tl.float32)", "by = by.to(tl.float32)",
        "check_fp8_values",
    ),
    "rows too small to divide are divided": one(
        NORM, "tl.where(by < 1.17549435e-38, 0.0, by)", "by", "check_fp8_values"
    ),
    "a row of zeros is divided by zero": one(
        NORM, "tl.where((by == 0.0)[:, None], 0.0, divided(made[c], by[:, None]))",
        "divided(made[c], by[:, None])", "check_fp8_values",
    ),
    "the number of a row is that of the first sample's": one(
        NORM, "b * row_scale.batch", "b * 0", "check_fp8_rows"
    ),
    "fp8 is stored past D": one(
        NORM, "fp8_bits(quotient), mask=inside", "fp8_bits(quotient), mask=active[:, None]",
        "check_fp8_rows",
    ),
    # token_select: addresses
    "rows and columns of the grid are swapped": one(
        SELECT, "row * strides[1] + column * strides[2]", "row * strides[2] + column * strides[1]",
        "check_layouts",
    ),
    "deviations past C are summed": one(
        SELECT, "tl.where(inside, value - mean[:, None], 0.0)", "value - mean[:, None]",
        "check_sizes",
    ),
    "every sample is cut by the keys of the first": one(
        SELECT, "high_keys = keys + b * tokens", "high_keys = keys", "check_samples_are_apart"
    ),
    "the inverse is written past N": one(
        SELECT, "tl.where(kept, at, -1), mask=inside", "tl.where(kept, at, -1), mask=i <= tokens",
        "check_inputs_and_guards",
    ),
    "positions start anew with each block": one(
        SELECT, "at = position + ranks(kept)", "at = ranks(kept)", "check_many_tokens"
    ),
    "the rank starts anew with each block": one(
        SELECT, "same & (seen + ranks(same) < take)", "same & (ranks(same) < take)",
        "check_many_tokens",
    ),
    # token_select: the order
    "keys with another beginning are counted": one(
        SELECT, "if part > 0:", "if part > 4:", "check_sizes"
    ),
    "of equals high drops the first ones": one(
        SELECT, "seen + ranks(same) >= equal - take", "seen + ranks(same) < take",
        "check_all_equal",
    ),
    "of equals low drops all": one(
        SELECT, "same & (seen + ranks(same) < take)", "same", "check_one_side_of_a_tie"
    ),
    "low counts what high has taken": one(
        SELECT, "tl.store(low_keys + i, -1, mask=(key < cut) | last_ones)", "pass",
        "check_one_side_of_a_tie",
    ),
    "starvation has the published sign": one(
        SELECT, "-times if HIGH else times", "times", "check_starvation"
    ),
    "zero times infinity is no score": one(
        SELECT, "finite_or_infinity(metric * factor)", "(metric * factor)", "check_starvation"
    ),
    "NaN counts as a large metric": one(
        SELECT, "tl.where(metric == float(\"inf\"), INFINITY_BITS + 1, key)", "key",
        "check_special_values",
    ),
    "tokens of the greatest age are not kept": one(
        SELECT, "forced = old >= max_age", "forced = old > max_age", "check_a_bounded_age"
    ),
    "age is not set back": one(
        SELECT, "tl.where(kept, 0, old + 1)", "tl.where(kept, old, old + 1)", "check_max_age"
    ),
    # token_change
    "rows and columns of a kept patch are swapped": one(
        CHANGE, "y * last_strides[3] + x * last_strides[4]",
        "x * last_strides[3] + y * last_strides[4]", "check_layouts",
    ),
    "rows and columns of a velocity's patch are swapped": one(
        CHANGE, "y * strides[3] + x * strides[4]", "x * strides[3] + y * strides[4]",
        "check_layouts",
    ),
    "channels past C are kept": one(
        CHANGE, "tl.store(own, value, mask=inside)", "tl.store(own, value, mask=computed[:, None])",
        "check_inputs_and_guards",
    ),
    "tokens past the last are scored": one(
        CHANGE, "off, mask=active)", "off, mask=at <= total)", "check_inputs_and_guards"
    ),
    "tokens that were left out are noted": one(
        CHANGE, "computed = active & (place >= 0)", "computed = active",
        "check_tokens_that_were_left_out",
    ),
    "what was computed is not kept": one(
        CHANGE, "tl.store(own, value, mask=inside)", "pass", "check_sizes"
    ),
    "of a patch the last pixel counts": one(
        CHANGE, "squares += tl.sum(change", "squares = tl.sum(change", "check_sizes"
    ),
    "a rate is taken over no distance": one(
        CHANGE, "computed & (gap > 0.0)", "computed & (gap >= 0.0)", "check_equal_levels"
    ),
    "a first value has a rate": one(
        CHANGE, "computed & (gap > 0.0)", "computed & (gap != 0.0)", "check_first_values"
    ),
    "levels are to fall": one(
        CHANGE, "tl.abs(tl.load(levels + 1) - before)", "(before - tl.load(levels + 1))",
        "check_rising_levels",
    ),
    "tokens age by the last step alone": one(
        CHANGE, "tl.load(levels + 1) - before", "tl.load(levels + 1) - now",
        "check_tokens_that_were_left_out",
    ),
    "NaN is no change": one(
        CHANGE, "tl.sum(change * change, axis=1)",
        "tl.sum(tl.where(change == change, change * change, 0.0), axis=1)", "check_special_values",
    ),
    "every sample has the levels of the first": one(
        CHANGE, "tl.load(level.start + b * level.batch + token", "tl.load(level.start + token",
        "check_samples_are_apart",
    ),
    "a table of numbers is taken to be contiguous": one(
        CHANGE, "tl.store(score.start + b * score.batch", "tl.store(score.start + b * tokens",
        "check_strided_tables",
    ),
    # qkv_prologue
    "k is stored one row early": one(
        PROLOGUE, "k, k_cache, b, i, row,", "k, k_cache, b, i, tl.maximum(row - 1, 0),",
        "check_rows",
    ),
    "k is stored at compact rows": one(
        PROLOGUE, "k, k_cache, b, i, row,", "k, k_cache, b, i, kv_offset + i,", "check_rows"
    ),
    "columns past d are stored": one(
        PROLOGUE, "+ offset, value, mask=inside)",
        "+ offset, value, mask=(head < COUNT)[:, None] & (col < DIM + 8)[None, :])",
        "check_other_rows",
    ),
    "the last heads are left out": one(
        PROLOGUE, "(Q_HEADS + HEADS - 1) // HEADS", "max(1, Q_HEADS // HEADS)",
        "check_model_heads",
    ),
    "pairs are halves apart": one(
        PROLOGUE, "tl.split(tl.reshape(y, [HEADS, COLS // 2, 2]))",
        "tl.split(tl.permute(tl.reshape(y, [HEADS, 2, COLS // 2]), (0, 2, 1)))", "check_rows",
    ),
    "k is not rotated": one(
        PROLOGUE, "k_weight, k_bias, cos, sin,\n", "k_weight, k_bias, None, None,\n",
        "check_rows",
    ),
    "the position is that of the compact token": one(
        PROLOGUE, "cos_batch + row * COS_ROW", "cos_batch + i * COS_ROW", "check_rows"
    ),
    "the table is that of the first sample": one(
        PROLOGUE, "sin += b * sin_batch +", "sin += 0 * b * sin_batch +", "check_rows"
    ),
    "the rotation goes the other way": one(
        PROLOGUE, "real * c - imaginary * s", "real * c + imaginary * s", "check_rows"
    ),
    "v is rotated": one(
        PROLOGUE, "HEADS, None, None, None, None,\n", "HEADS, None, None, cos, sin,\n",
        "check_rows",
    ),
    "k has the weight of q": one(
        PROLOGUE, "k_weight, k_bias, cos, sin,\n", "q_weight, k_bias, cos, sin,\n", "check_rows"
    ),
    "all heads have the weight of the first": one(
        PROLOGUE, "tl.load(weight + offset,", "tl.load(weight + every + col[None, :],",
        "check_rows",
    ),
    "heads of one tile share a mean square": one(
        PROLOGUE, "inverse_root(mean_of(tl.sum(y * y, axis=1), DIM) + eps)[:, None]",
        "inverse_root(mean_of(tl.sum(tl.sum(y * y, axis=1), axis=0), COUNT * DIM) + eps)",
        "check_special_values",
    ),
    "the norm is rounded before the rotation": one(
        PROLOGUE, "if cos is not None:\n            pair",
        "if cos is not None:\n            y = y.to(tl.bfloat16).to(tl.float32)\n            pair",
        "check_one_rounding_of_heads",
    ),
    "all heads are normed as if one were": one(
        PROLOGUE, "inverse_root(mean_of(squares, COUNT * DIM) + eps)",
        "inverse_root(mean_of(squares, DIM) + eps)", "check_model_heads",
    ),
    "eps is left out of the mean square of all heads": one(
        PROLOGUE, "inverse_root(mean_of(squares, COUNT * DIM) + eps)",
        "inverse_root(mean_of(squares, COUNT * DIM))", "check_constant_heads",
    ),
    "the rounding of the mean of all heads is not corrected": one(
        PROLOGUE, "y - mean - rest", "y - mean", "check_shifted_heads", FP32
    ),
    # patchify
    "an element past the last is written": one(
        PATCHIFY, "tl.store(from_token, value, mask=active)",
        "tl.store(from_token, value, mask=at <= total)", "check_inputs_and_guards",
    ),
    "rows and columns of a patch are swapped": one(
        PATCHIFY, "line * token_strides[2] + column * token_strides[3]",
        "column * token_strides[2] + line * token_strides[3]", "check_layouts",
    ),
    "channels are numbered first": one(
        PATCHIFY, "channel * token_strides[4]", "channel", "check_orders"
    ),
    "every image has the table of the first": one(
        PATCHIFY, "b * table.batch + i", "0 * b * table.batch + i", "check_other_cells_stay"
    ),
    "a corner of a token is left out": one(
        PATCHIFY, "(r < side) & (q < side)", "(r < side) & (q <= r)", "check_other_cells_stay"
    ),
    "tokens are drawn into their first row": one(
        PATCHIFY, "line + r, column + q", "line, column + q", "check_other_cells_stay"
    ),
    "a patch is drawn whole in every cell": one(
        PATCHIFY, "line *= side", "line *= 1", "check_sizes"
    ),
    # resolution_transition
    "tokens that stay leave gaps": one(
        TRANSITION, "i - before)", "i)", "check_larger_tokens"
    ),
    "channels past C are stored": one(
        TRANSITION, "inside = live[:, None] & (col < WIDTH)[None, :]",
        "inside = live[:, None] & (col < WIDTH + 1)[None, :]", "check_inputs_and_guards",
    ),
    "siblings keep their noise to themselves": one(
        TRANSITION, "eps + pull * (mean * 0.25)", "eps", "check_covariance", FP32
    ),
    "a child is the pixel of its sibling": one(
        TRANSITION, "first + number[:, None]", "first + 3 - number[:, None]",
        "check_a_picture_twice_as_large",
    ),
    "pixels have the noise of the first": one(
        TRANSITION, "tl.load(row + first + j,", "tl.load(row + first,", "check_pixelwise", FP32
    ),
    "all noise has deviation 1": one(
        TRANSITION, "unsplit * eps", "eps", "check_numbers", FP32
    ),
    "every image has the rows of the first": one(
        TRANSITION, "rows.start + b * rows.batch + k", "rows.start + k", "check_samples_are_apart"
    ),
    "columns before rows": one(
        TRANSITION, "tl.load(place + 1) + number // 2 * half",
        "tl.load(place + 1) + number % 2 * half", "check_a_published_vector",
    ),
    "children are a cell apart": one(
        TRANSITION, "1 << tl.maximum(level, 0)", "1", "check_larger_tokens"
    ),
    "raster order is by columns": one(
        TRANSITION, "y.to(tl.int64) * raster + x_cell", "x_cell.to(tl.int64) * raster + y",
        "check_a_published_vector",
    ),
    "the level stays": one(
        TRANSITION, "tl.store(place, level +", "tl.store(place, level + here.to(tl.int32) +",
        "check_a_published_vector",
    ),
    # sparse_attention: addresses
    "keys past the last are weighed": one(
        ATTENTION, "scores = tl.where(inside[None, :], scores, float(\"-inf\"))", "pass",
        "check_all_keys_alike",
    ),
    "a key behind the last is read": one(
        ATTENTION, "inside = key < keys", "inside = key <= keys", "check_inputs_and_guards"
    ),
    "the key head is that of another group": one(
        ATTENTION, "head // GROUP", "head % (HEADS // GROUP)", "check_groups"
    ),
    "keys are those of the first sample": one(
        ATTENTION, "(b * of.batch + head * DIM)", "(b * 0 + head * DIM)", "check_samples_are_apart"
    ),
    "columns past d are stored, attention": one(
        ATTENTION, "    mask = inside[:, None] & (col < DIM)[None, :]",
        "    mask = inside[:, None] & (col < DIM + 8)[None, :]", "check_inputs_and_guards",
    ),
    "the last columns of d are left out": one(
        ATTENTION, "scores = tl.dot(q_rest, tl.trans(part), scores, input_precision=\"ieee\")",
        "pass", "check_sizes",
    ),
    # sparse_attention: parts of a tile
    "parts overlap": one(
        ATTENTION, "start = blocks * part // count * N", "start = blocks * part // parts * 0",
        "check_all_keys_alike",
    ),
    "there is one part too few": one(
        ATTENTION, "count = tl.where(split, parts, 1)", "count = tl.where(split, parts + 1, 1)",
        "check_sizes",
    ),
    "blocks that do not divide by the parts are left out": one(
        ATTENTION, "end = blocks * (part + 1) // count * N",
        "end = tl.minimum(start + blocks // count * N, blocks * N)", "check_sizes",
    ),
    "all tiles add the parts of the first": one(
        ATTENTION, "first = tl.program_id(0).to(tl.int64) * parts * M",
        "first = tl.program_id(0).to(tl.int64) * 0", "check_sizes",
    ),
    "parts are added as they are": one(
        ATTENTION, "weight = tl.exp2(tl.load(peaks + at) - base)", "weight = base * 0.0 + 1.0",
        "check_huge_logits",
    ),
    "the sum of exponentials is that of the first part": one(
        ATTENTION, "tl.load(peaks + beyond + at)", "tl.load(peaks + beyond + first + lane)",
        "check_sizes",
    ),
    # sparse_attention: values
    "the scale is left out": one(
        ATTENTION, "scores *= scale", "scores *= 1.4426950408889634", "check_scale"
    ),
    "exponents are of base e": one(ATTENTION, "scale * LOG2_E,", "scale,", "check_sizes"),
    "the sum is not scaled down": one(ATTENTION, "total * shrink +", "total +", "check_sizes"),
    "the output is not scaled down": one(
        ATTENTION, "acc * shrink[:, None]", "acc", "check_sizes"
    ),
    "the output's last columns are not scaled down": one(
        ATTENTION, "acc_rest * shrink[:, None]", "acc_rest", "check_sizes"
    ),
    "exponents are taken from the last block's largest": one(
        ATTENTION, "higher = tl.maximum(top, tl.max(scores, axis=1))",
        "higher = tl.max(scores, axis=1)", "check_huge_logits",
    ),
    "-inf minus -inf": one(
        ATTENTION, "tl.where(top == float(\"-inf\"), 0.0, top)", "top", "check_impossible_keys"
    ),
    # blend
    "the weights of a blend are swapped": one(
        BLEND, "tl.fma(weight, new, (1.0 - weight) * old)",
        "tl.fma(1.0 - weight, new, weight * old)", "check_sizes",
    ),
    "an operand of weight 0 is multiplied": one(
        BLEND, "tl.where(weight == 1.0, new, tl.where(weight == 0.0, old, mixed))", "mixed",
        "check_one_operand_alone",
    ),
    "the blend's gate is that of the first sample": one(
        BLEND, "by = tl.load(pointers(gate, b, k, col)",
        "by = tl.load(pointers(gate, b * 0, k, col)", "check_gates",
    ),
    "the last piece of a blend is left out": one(
        BLEND, "triton.cdiv(width, launch.cols))", "max(1, width // launch.cols))", "check_sizes"
    ),
    "the gradients know no gate": one(
        BLEND, "        if gate is not None:\n                g *=",
        "        if gate is not None:\n                g *= 1.0 + 0.0 *", "check_gates",
    ),
    "queries without keys are left out": one(
        PROLOGUE, "triton.cdiv(heads, launch.rows) + 2", "min(heads, kv_heads) + 2",
        "check_queries_alone",
    ),
    "the last pieces of a row have no gradient": one(
        BLEND, "range(0, WIDTH, COLS)", "range(0, COLS, COLS)", "check_backward_sizes"
    ),
    "tiles past the first of a program have no gradient": one(
        BLEND, "range(steps)", "range(1)", "check_more_tiles_than_partial_sums"
    ),
    "the gradient of cached has the weight of fresh": one(
        BLEND, "other = (1.0 - weight) * g", "other = weight * g", "check_backward_sizes"
    ),
    "the sum of nothing is not written": one(BLEND, "grad_r.zero_()", "pass", "check_empty"),
    # collapse
    "the weight is that of the first sample": one(
        COLLAPSE, "pointers(weights[i], b, k, col)", "pointers(weights[i], b * 0, k, col)",
        "check_weights",
    ),
    "the weight is that of the first token": one(
        COLLAPSE, "pointers(weights[i], b, k, col)", "pointers(weights[i], b, k * 0, col)",
        "check_weights",
    ),
    "the third group is the second": one(
        COLLAPSE, "(third >> i)", "(second >> i)", "check_groups"
    ),
    "groups past the last sum count in none": one(
        COLLAPSE, "for group in (1, 2, 3)", "for group in (1, 2, 0)", "check_groups"
    ),
    "a second pass begins anew": one(
        COLLAPSE, "if ACCUMULATE and len(sums) > S:", "if False:", "check_accumulate"
    ),
    "the last piece of the sums is left out": one(
        COLLAPSE, "triton.cdiv(width, launch.cols))", "max(1, width // launch.cols))",
        "check_sizes",
    ),
    "sums are kept in bf16": one(
        COLLAPSE, "branch, sum0)", "branch, sum0).to(tl.bfloat16).to(tl.float32)",
        "check_one_rounding_of_sums_by_group",
    ),
    "a gate in fp32 is rounded before the norm": one(
        NORM, "by.to(tl.float32)", "by.to(update.dtype).to(tl.float32)", "check_a_wide_gate"
    ),
    "a scale in fp32 is rounded": one(
        NORM, "tl.load(pointers(scale, b, k, col), mask=inside, other=0.0).to(tl.float32)",
        "tl.load(pointers(scale, b, k, col), mask=inside, other=0.0).to(x.start.dtype.element_ty).to(tl.float32)",
        "check_wide_vectors",
    ),
    "a weight in fp32 is rounded": one(
        COLLAPSE, "weight.to(tl.float32)",
        "weight.to(branches[0].start.dtype.element_ty).to(tl.float32)", "check_wide_weights",
    ),
    # swiglu
    "the exponential of a large gate overflows": Fault(
        SWIGLU, (("tl.exp(-tl.abs(g))", "tl.exp(g)"), ("tl.where(g < 0.0, e, 1.0)", "e")),
        "check_special_values",
    ),
    "a negative gate has the SiLU of a positive one": one(
        SWIGLU, "tl.where(g < 0.0, e, 1.0)", "1.0", "check_each_gate"
    ),
    "the SiLU is rounded before it multiplies": one(
        SWIGLU, "(silu * v).to(dtype)", "(silu.to(dtype).to(tl.float32) * v).to(dtype)",
        "check_one_rounding_of_gated_values",
    ),
    "the value is that of the first sample": one(
        SWIGLU, "pointers(value, b, k, col)", "pointers(value, b * 0, k, col)", "check_sizes"
    ),
    "the value has the strides of the gate": one(
        SWIGLU, "tl.load(pointers(value, b, k, col)",
        "tl.load(value.start + (b * gate.batch + k * gate.token)[:, None] + col[None, :]",
        "check_strides",
    ),
    "the last piece of a gated row is left out": one(
        SWIGLU, "triton.cdiv(width, launch.cols))", "max(1, width // launch.cols))", "check_sizes"
    ),
    "columns past D of a gated row are stored": one(
        SWIGLU, "(silu * v).to(dtype), mask=inside)",
        "(silu * v).to(dtype), mask=(row < total)[:, None])", "check_inputs_and_guards",
    ),
    "a gated row past the last is stored": one(
        SWIGLU, "(silu * v).to(dtype), mask=inside)",
        "(silu * v).to(dtype), mask=(row <= total)[:, None] & (col < WIDTH)[None, :])",
        "check_inputs_and_guards",
    ),
}  # fmt: skip
