"""What the ops promise whatever the backend: checks, choice of backend, gradients, compilation."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import truth
from fastdit import ops
from fastdit.backends.base import Backend
from fastdit.errors import ArgumentError, BackendError, FastDiTError
from fastdit.methods import methods
from fastdit.ops.registry import BACKENDS
from fastdit.schedules import plan
from inputs import SERVING, generator, normal, poisoned, some_rows

B, K, N, D = 2, 3, 7, 40
FLOAT = torch.float32
FP8 = torch.float8_e4m3fn


def some(*shape, dtype=FLOAT, key=0):
    return normal(shape, dtype, generator(key, *shape))


def rows_of(active=K):
    return some_rows(B, active, N, generator(1))


# --- checks: the argument is named, with what was given and what is accepted

X = some(B, K, D)
TRANSPOSED = some(B, D, K).transpose(1, 2)
STORE = some(B, N, D)
WRONG_RESIDUAL = {
    "x of rank 2": ({"x": some(B, D)}, "x", "rank 3"),
    "x not a tensor": ({"x": 1.0}, "x", "tensor"),
    "x of integers": ({"x": X.int()}, "x", "float64"),
    "x in place with a last stride": ({"x": TRANSPOSED, "out": TRANSPOSED}, "x", "last stride"),
    "branch dtype": ({"branches": [X.half()]}, "branches[0]", "torch.float32"),
    "branch device": ({"branches": [X.to("meta")]}, "branches[0]", "cpu"),
    "branch size": ({"branches": [some(B, K + 1, D)]}, "branches[0]", f"[{B}, {K}, {D}]"),
    "branch stride": (
        {"branches": [TRANSPOSED]},
        "branches[0]",
        "last stride",
    ),
    "branch not a tensor": ({"branches": [None]}, "branches[0]", "tensor"),
    "no branch": ({"branches": [], "gates": []}, "branches", "1 to 128"),
    "129 branches": ({"branches": [X] * 129, "gates": [None] * 129}, "branches", "1 to 128"),
    "fewer gates": ({"branches": [X, X]}, "gates", "equal counts"),
    "gate width": ({"gates": [some(B, D + 1)]}, "gates[0]", str(D)),
    "gate batch": ({"gates": [some(B + 1, D)]}, "gates[0]", f"[{B} or 1"),
    "gate dtype": ({"gates": [some(B, D).double()]}, "gates[0]", "torch.float32"),
    "gate narrower than x": ({"gates": [some(B, D).half()]}, "gates[0]", "torch.float32"),
    "gate stride": ({"gates": [some(B, 1).expand(B, D)]}, "gates[0]", "last stride"),
    "fresh": ({"fresh": 1}, "fresh", "-1 to 0"),
    "rows dtype": ({"rows": rows_of().float(), "fresh": 0}, "rows", "int64 or int32"),
    "rows shape": ({"rows": rows_of(2), "fresh": 0}, "rows", f"[{B}, {K}]"),
    "rows device": ({"rows": rows_of().to("meta"), "fresh": 0}, "rows", "cpu"),
    "rows out of range": ({"rows": rows_of() + N, "branches": [STORE]}, "rows", "0 to 6"),
    "rows negative": ({"rows": rows_of() - N, "branches": [STORE]}, "rows", "0 to 6"),
    "store width": (
        {"rows": rows_of(), "branches": [some(B, N, D + 1)]},
        "branches[0]",
        f"{D}]",
    ),
    "weights not a tensor": ({"weights": 1.0}, "weights", "tensor or None"),
    "weights dtype": ({"weights": torch.ones(1).half()}, "weights", "torch.float32 [1]"),
    "weights of fewer branches": (
        {"branches": [X, X], "gates": [None, None], "weights": torch.ones(1)},
        "weights",
        f"[2], or [2, {B}, {K}]",
    ),
    "weights device": ({"weights": torch.ones(1, device="meta")}, "weights", "on cpu"),
    "weights stride": ({"weights": torch.ones(1, K, B).mT}, "weights", "contiguous"),
    "weights with a gradient": (
        {"weights": torch.ones(1, requires_grad=True)},
        "weights",
        "without a gradient",
    ),
    "cache without fresh": ({"cache": some(B, K, D)}, "cache", "fresh"),
    "cache size": ({"cache": some(B, N, D), "fresh": 0}, "cache", f"[{B}, {K}, {D}]"),
    "cache expanded": (
        {"cache": some(1, K, D).expand(B, K, D), "fresh": 0},
        "cache",
        "without expanded",
    ),
    "out size": ({"out": some(B, K, D + 1)}, "out", f"[{B}, {K}, {D}]"),
    "out dtype": ({"out": X.double()}, "out", "torch.float32"),
}


@pytest.mark.parametrize("case", WRONG_RESIDUAL)
@pytest.mark.parametrize("backend", SERVING)
def test_gated_residual_names_what_is_wrong(case, backend):
    changes, name, accepted = WRONG_RESIDUAL[case]
    arguments = {"x": X, "branches": [some(B, K, D, key=1)], "gates": [some(B, D)], **changes}
    with pytest.raises(ArgumentError) as error:
        ops.gated_residual(**arguments, backend=backend)
    assert name in str(error.value)
    assert accepted in str(error.value)


WRONG_NORM = {
    "x of rank 2": ({"x": some(B, D)}, "x", "rank 3"),
    "scale width": ({"scale": some(B, D + 1)}, "scale", str(D)),
    "shift dtype": ({"shift": some(B, D).half()}, "shift", "torch.float32"),
    "weight dtype": ({"weight": some(D).half()}, "weight", "torch.float32"),
    "weight shape": ({"weight": some(1, D)}, "weight", f"[{D}]"),
    "bias stride": ({"bias": some(2 * D)[::2]}, "bias", "last stride"),
    "branch size": ({"branch": some(B, N, D)}, "branch", f"[{B}, {K}, {D}]"),
    "gate without branch": ({"gate": some(B, D)}, "gate", "without branch"),
    "cache without branch": ({"cache": some(B, K, D)}, "cache", "without branch"),
    "cache size": ({"branch": X, "cache": STORE}, "cache", f"[{B}, {K}, {D}]"),
    "rows rank": ({"rows": rows_of()[0]}, "rows", f"[{B}, K]"),
    "rows out of range": ({"rows": rows_of() + N}, "rows", "0 to 2"),
    "out size": ({"out": some(B, K + 1, D)}, "out", f"[{B}, {K}, {D}]"),
    "out in fp8 alone": ({"out": X.to(FP8)}, "out", "torch.float32"),
    "out with row_scale": ({"out": X, "row_scale": some(B, K)}, "out", "torch.float8_e4m3fn"),
    "row_scale shape": ({"row_scale": some(B, K, 1)}, "row_scale", f"[{B}, {K}]"),
    "row_scale of all rows": (
        {"rows": rows_of(), "x": STORE, "row_scale": some(B, N)},
        "row_scale",
        f"[{B}, {K}]",
    ),
    "row_scale dtype": ({"row_scale": some(B, K).double()}, "row_scale", "torch.float32"),
    "row_scale stride": ({"row_scale": some(K, B).T}, "row_scale", "last stride"),
    "row_scale expanded": (
        {"row_scale": some(1, K).expand(B, K)},
        "row_scale",
        "without expanded",
    ),
    "x expanded": (
        {"x": some(1, K, D).expand(B, K, D), "branch": X},
        "x",
        "without expanded",
    ),
}


@pytest.mark.parametrize("case", WRONG_NORM)
@pytest.mark.parametrize("backend", SERVING)
def test_norm_modulate_names_what_is_wrong(case, backend):
    changes, name, accepted = WRONG_NORM[case]
    arguments = {"x": some(B, K, D, key=2), **changes}
    with pytest.raises(ArgumentError) as error:
        ops.norm_modulate(**arguments, backend=backend)
    assert name in str(error.value)
    assert accepted in str(error.value)


FIELD = some(B, 2, 4, 2, 2, 3)  # 8 tokens


def table(*shape):
    return torch.zeros(shape, dtype=torch.int32)


WRONG_SELECT = {
    "velocity of rank 5": ({"velocity": FIELD[0]}, "velocity", "rank 6"),
    "velocity without channels": ({"velocity": FIELD[..., :0]}, "velocity", "none of it empty"),
    "velocity not a tensor": ({"velocity": None}, "velocity", "[B, gh, gw, ph, pw, C]"),
    "velocity of integers": ({"velocity": FIELD.int()}, "velocity", "float64"),
    "drops dtype": ({"drops": table(B, 8).long()}, "drops", "int32"),
    "drops shape": ({"drops": table(B, 7)}, "drops", f"[{B}, 8]"),
    "drops device": ({"drops": table(B, 8).to("meta")}, "drops", "cpu"),
    "drops not a tensor": ({"drops": None}, "drops", f"[{B}, 8]"),
    "drops transposed": ({"drops": table(8, B).T}, "drops", "last stride"),
    "drops expanded": ({"drops": table(1, 8).expand(B, 8)}, "drops", "without expanded"),
    "keep none": ({"keep": 0}, "keep", "1 to 8"),
    "keep more": ({"keep": 9}, "keep", "1 to 8"),
    "keep a ratio": ({"keep": 0.5}, "keep", "an int"),
    "keep a bool": ({"keep": True}, "keep", "an int"),
    "high negative": ({"high": -1}, "high", "0 to 5"),
    "high too many": ({"high": 6}, "high", "0 to 5"),
    "metric": ({"metric": "var"}, "metric", "std or l2norm"),
    "starvation NaN": ({"starvation": float("nan")}, "starvation", "finite in fp32"),
    "starvation huge": ({"starvation": 1e39}, "starvation", "finite in fp32"),
    "starvation text": ({"starvation": "0.1"}, "starvation", "finite in fp32"),
    "max_age without age": ({"max_age": 3}, "age", "a tensor"),
    "max_age zero": ({"max_age": 0, "age": table(B, 8)}, "max_age", "1 to"),
    "age shape": ({"age": table(B, 3)}, "age", f"[{B}, 8]"),
    "rows shape": ({"rows": table(B, 4)}, "rows", f"[{B}, 3]"),
    "rows dtype": ({"rows": table(B, 3).long()}, "rows", "int32"),
    "inverse shape": ({"inverse": table(B, 3)}, "inverse", f"[{B}, 8]"),
}


@pytest.mark.parametrize("case", WRONG_SELECT)
@pytest.mark.parametrize("backend", SERVING)
def test_token_select_names_what_is_wrong(case, backend):
    changes, name, accepted = WRONG_SELECT[case]
    arguments = {"velocity": FIELD, "drops": table(B, 8), "keep": 3, **changes}
    with pytest.raises(ArgumentError) as error:
        ops.token_select(**arguments, backend=backend)
    assert str(error.value).startswith(f"{name}: got")
    assert accepted in str(error.value)


@pytest.mark.parametrize("backend", SERVING)
def test_tables_are_not_shared(backend):
    drops, buffer = table(B, 8), table(2, B, 8)
    for shared in (
        {"drops": drops, "age": drops},
        {"drops": drops, "inverse": drops},
        {"drops": drops, "rows": drops.flatten()[: 3 * B].view(B, 3)},
        {"drops": drops, "age": buffer[0], "inverse": buffer[0]},
    ):
        with pytest.raises(ArgumentError, match="shares with"):
            ops.token_select(FIELD, keep=3, **shared, backend=backend)
    side_by_side = table(B, 16)
    tables = {"drops": side_by_side[:, :8], "age": side_by_side[:, 8:]}
    ops.token_select(FIELD, keep=3, **tables, backend=backend)
    assert int(side_by_side.sum()) == 2 * B * 5


def change(**changes):
    """Arguments of token_change by name, with changes."""
    numbers = torch.ones(2, B, 8)
    given = {"velocity": FIELD, "last": some(*FIELD.shape, key=1), "rate": numbers[0]}
    return given | {"level": numbers[1], "levels": torch.tensor([0.5, 0.25])} | changes


WRONG_CHANGE = {
    "velocity of rank 5": ({"velocity": FIELD[0]}, "velocity", "rank 6"),
    "velocity of integers": ({"velocity": FIELD.int()}, "velocity", "float64"),
    "last not a tensor": ({"last": None}, "last", "a tensor"),
    "last dtype": ({"last": FIELD.half()}, "last", "torch.float32"),
    "last device": ({"last": FIELD.to("meta")}, "last", "cpu"),
    "last shape": ({"last": FIELD[:, :1].clone()}, "last", str(list(FIELD.shape))),
    "last expanded": (
        {"last": some(*FIELD[:1].shape).expand_as(FIELD)},
        "last",
        "without expanded",
    ),
    "last is the velocity": ({"last": FIELD}, "last", "of its own"),
    "last wants a gradient": ({"last": FIELD.clone().requires_grad_()}, "last", "it is written"),
    "rate missing": ({"rate": None}, "rate", f"[{B}, 8]"),
    "rate dtype": ({"rate": torch.ones(B, 8).double()}, "rate", "torch.float32"),
    "rate shape": ({"rate": torch.ones(B, 7)}, "rate", f"[{B}, 8]"),
    "level dtype": ({"level": torch.ones(B, 8).half()}, "level", "torch.float32"),
    "level device": ({"level": torch.ones(B, 8, device="meta")}, "level", "cpu"),
    "level transposed": ({"level": torch.ones(8, B).T}, "level", "last stride"),
    "levels numbers": ({"levels": (0.5, 0.25)}, "levels", "a tensor [2]"),
    "levels of all steps": ({"levels": torch.ones(8)}, "levels", "[2]"),
    "levels dtype": ({"levels": torch.ones(2).double()}, "levels", "torch.float32"),
    "inverse dtype": ({"inverse": table(B, 8).long()}, "inverse", "int32"),
    "inverse shape": ({"inverse": table(B, 3)}, "inverse", f"[{B}, 8]"),
    "score shape": ({"score": torch.ones(B, 7)}, "score", f"[{B}, 8]"),
    "score expanded": ({"score": torch.ones(1, 8).expand(B, 8)}, "score", "without expanded"),
}


@pytest.mark.parametrize("case", WRONG_CHANGE)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_token_change_names_what_is_wrong(case, backend):
    changes, name, accepted = WRONG_CHANGE[case]
    with pytest.raises(ArgumentError) as error:
        ops.token_change(**change(**changes), backend=backend)
    assert str(error.value).startswith(f"{name}: got")
    assert accepted in str(error.value)


def test_what_is_noted_is_not_shared():
    numbers = torch.ones(B, 8)
    for names in (("rate", "level"), ("level", "score")):
        with pytest.raises(ArgumentError, match="shares with"):
            ops.token_change(**change(**dict.fromkeys(names, numbers)))
    levels = torch.ones(B, 8)
    with pytest.raises(ArgumentError, match="level: got memory it shares with levels"):
        ops.token_change(**change(level=levels, levels=levels[0, :2]))


def test_noting_a_change_has_no_gradient():
    velocity = FIELD.clone().requires_grad_()
    score = ops.token_change(**change(velocity=velocity))
    assert not score.requires_grad
    assert torch.equal(score, ops.token_change(**change()))


def squares(batch=B):
    """The tokens of level 1 over the 2 x 4 cells of FIELD."""
    places = torch.tensor([[1, 0, 0], [1, 0, 2]], dtype=torch.int32)
    return places.expand(batch, -1, -1)


def place(*token):
    return torch.tensor(token, dtype=torch.int32).expand(B, 1, 3)


PATCHES = some(B, 2, 12)
WRONG_PLACES = {
    "table not a tensor": ({"table": None}, "table", f"[{B}, n, 3]"),
    "table of rank 2": ({"table": table(B, 3)}, "table", f"[{B}, n, 3]"),
    "table dtype": ({"table": squares().long()}, "table", "int32"),
    "table columns": ({"table": table(B, 2, 2)}, "table", f"[{B}, 2, 3]"),
    "table batch": ({"table": squares(B + 1)}, "table", f"[{B}, 2, 3]"),
    "table device": ({"table": squares().to("meta")}, "table", "cpu"),
    "table transposed": ({"table": table(B, 3, 2).transpose(1, 2)}, "table", "last stride"),
    "a token below": ({"table": place(1, 1, 0)}, "table", "the grid of 2 x 4"),
    "a token to the right": ({"table": place(0, 0, 4)}, "table", "the grid of 2 x 4"),
    "a token above": ({"table": place(0, -1, 0)}, "table", "the grid of 2 x 4"),
    "a token to the left": ({"table": place(1, 0, -1)}, "table", "the grid of 2 x 4"),
    "a token too large": ({"table": place(2, 0, 0)}, "table", "the grid of 2 x 4"),
    "a level below": ({"table": place(-1, 0, 0)}, "table", "the grid of 2 x 4"),
    "a level beyond": ({"table": place(40, 0, 0)}, "table", "the grid of 2 x 4"),
}
WRONG_PATCHIFY = WRONG_PLACES | {
    "field of rank 5": ({"field": FIELD[0]}, "field", "rank 6"),
    "field not a tensor": ({"field": 1.0}, "field", "[B, gh, gw, ph, pw, C]"),
    "field of integers": ({"field": FIELD.int()}, "field", "float64"),
    "out size": ({"out": some(B, 2, 11)}, "out", f"[{B}, 2, 12]"),
    "out dtype": ({"out": PATCHES.half()}, "out", "torch.float32"),
    "out expanded": ({"out": some(1, 2, 12).expand(B, 2, 12)}, "out", "without expanded"),
    "out a part of field": ({"out": FIELD.flatten()[: 24 * B].view(B, 2, 12)}, "out", "of its own"),
    "a gradient": ({"field": FIELD.clone().requires_grad_()}, "field", "no_grad"),
}
WRONG_UNPATCHIFY = WRONG_PLACES | {
    "out of rank 5": ({"out": FIELD[0].clone()}, "out", "rank 6"),
    "out not a tensor": ({"out": None}, "out", "[B, gh, gw, ph, pw, C]"),
    "out expanded": ({"out": FIELD[:1].expand_as(FIELD)}, "out", "without expanded"),
    "tokens size": ({"tokens": some(B, 2, 11)}, "tokens", f"[{B}, 2, 12]"),
    "tokens count": ({"tokens": some(B, 3, 12)}, "tokens", f"[{B}, 2, 12]"),
    "tokens dtype": ({"tokens": PATCHES.half()}, "tokens", "torch.float32"),
    "tokens stride": ({"tokens": some(B, 12, 2).transpose(1, 2)}, "tokens", "last stride"),
    "a gradient": ({"tokens": PATCHES.clone().requires_grad_()}, "tokens", "no_grad"),
}


def placed(tokens, places):
    """The tensor with as many tokens as a wrong table has places."""
    count = places.shape[1] if isinstance(places, torch.Tensor) and places.dim() == 3 else 2
    return tokens if count == 2 else tokens[:, :count].contiguous()


@pytest.mark.parametrize("case", WRONG_PATCHIFY)
@pytest.mark.parametrize("backend", SERVING)
def test_patchify_names_what_is_wrong(case, backend):
    changes, name, accepted = WRONG_PATCHIFY[case]
    arguments = {"field": FIELD, "table": squares(), **changes}
    with pytest.raises(ArgumentError) as error:
        ops.patchify(**arguments, backend=backend)
    assert str(error.value).startswith(name)
    assert accepted in str(error.value)


@pytest.mark.parametrize("case", WRONG_UNPATCHIFY)
@pytest.mark.parametrize("backend", SERVING)
def test_unpatchify_names_what_is_wrong(case, backend):
    changes, name, accepted = WRONG_UNPATCHIFY[case]
    arguments = {"tokens": PATCHES, "table": squares(), "out": FIELD.clone(), **changes}
    if "tokens" not in changes:
        arguments["tokens"] = placed(PATCHES, arguments["table"])
    before = arguments["out"].clone() if isinstance(arguments["out"], torch.Tensor) else None
    with pytest.raises(ArgumentError) as error:
        ops.unpatchify(**arguments, backend=backend)
    assert str(error.value).startswith(name)
    assert accepted in str(error.value)
    assert before is None or torch.equal(arguments["out"], before)


def transition(**changes):
    """Arguments of resolution_transition by name, with changes: one of two tokens is split."""
    arguments = {"x": PATCHES, "table": squares(), "rows": torch.tensor([[1]] * B)}
    arguments |= {"noise": some(B, 5, 12, key=3), "scale": 0.2, "deviation": 0.9}
    return arguments | {"correlation": 0.02} | changes


WRONG_TRANSITION = {
    "x of rank 2": ({"x": PATCHES[0]}, "x", "rank 3"),
    "x of integers": ({"x": PATCHES.int()}, "x", "float64"),
    "x stride": ({"x": some(B, 12, 2).transpose(1, 2)}, "x", "last stride"),
    "x without channels": ({"x": PATCHES[..., :0]}, "x", f"[{B}, 2, 1]"),
    "table count": ({"table": table(B, 3, 3)}, "table", f"[{B}, 2, 3]"),
    "table dtype": ({"table": squares().long()}, "table", "int32"),
    "table not a tensor": ({"table": None}, "table", f"[{B}, 2, 3]"),
    "rows dtype": ({"rows": torch.ones(B, 1)}, "rows", "int64 or int32"),
    "rows batch": ({"rows": torch.tensor([[1]])}, "rows", f"[{B}, K]"),
    "rows not a tensor": ({"rows": [1]}, "rows", "[B, K]"),
    "too many rows": ({"rows": torch.zeros(B, 3, dtype=torch.int64)}, "rows", "at most the 2"),
    "rows out of range": ({"rows": torch.tensor([[1], [2]])}, "rows", "0 to 1"),
    "rows negative": ({"rows": torch.tensor([[-1], [1]])}, "rows", "0 to 1"),
    "rows that fall": (
        {"rows": torch.tensor([[0, 1], [1, 0]]), "noise": some(B, 8, 12)},
        "rows",
        "ascending",
    ),
    "rows twice": (
        {"rows": torch.tensor([[0, 1], [1, 1]]), "noise": some(B, 8, 12)},
        "rows",
        "ascending",
    ),
    "one cell split": ({"table": table(B, 2, 3)}, "rows", "level 1 to 30"),
    "noise rows": ({"noise": some(B, 2, 12)}, "noise", f"[{B}, 5, 12]"),
    "noise dtype": ({"noise": some(B, 5, 12).half()}, "noise", "torch.float32"),
    "correlation": ({"correlation": 0.3}, "correlation", "0 to 1/4"),
    "correlation below": ({"correlation": -0.1}, "correlation", "0 to 1/4"),
    "pixels of a token": (
        {"x": some(B, 2, 6), "noise": some(B, 5, 6), "pixelwise": True},
        "pixelwise",
        "of 4",
    ),
    "correlation NaN": ({"correlation": float("nan")}, "correlation", "0 to 1/4"),
    "scale": ({"scale": float("inf")}, "scale", "finite"),
    "deviation": ({"deviation": None}, "deviation", "finite"),
    "unsplit": ({"unsplit": "1"}, "unsplit", "finite"),
    "raster": ({"raster": 0}, "raster", "1 to 5"),
    "raster a bool": ({"raster": True}, "raster", "an int"),
    "a square left in raster order": ({"raster": 4}, "table", "tile its 1 x 4"),
    "out size": ({"out": some(B, 4, 12)}, "out", f"[{B}, 5, 12]"),
    "out dtype": ({"out": some(B, 5, 12).half()}, "out", "torch.float32"),
    "out_table size": ({"out_table": table(B, 2, 3)}, "out_table", f"[{B}, 5, 3]"),
    "out_table dtype": ({"out_table": table(B, 5, 3).long()}, "out_table", "int32"),
    "out_table expanded": (
        {"out_table": table(1, 5, 3).expand(B, 5, 3)},
        "out_table",
        "without expanded",
    ),
    "a gradient": ({"x": PATCHES.clone().requires_grad_()}, "x, noise", "no_grad"),
}


@pytest.mark.parametrize("case", WRONG_TRANSITION)
@pytest.mark.parametrize("backend", SERVING)
def test_resolution_transition_names_what_is_wrong(case, backend):
    changes, name, accepted = WRONG_TRANSITION[case]
    with pytest.raises(ArgumentError) as error:
        ops.resolution_transition(**transition(**changes), backend=backend)
    assert str(error.value).startswith(f"{name}: ")
    assert accepted in str(error.value)


def test_a_transition_does_not_write_what_it_reads():
    noise, places = some(B, 5, 12), table(B, 5, 3)
    for shared in (
        {"noise": noise, "out": noise},
        {"x": noise[:, :2], "out": noise},
        {"table": places[:, :2], "out_table": places},
    ):
        with pytest.raises(ArgumentError, match="shares with"):
            ops.resolution_transition(**transition(**shared))


HEADS, KV_HEADS, DIM = 4, 2, 10  # H d = D


def prologue(**changes):
    """Arguments of qkv_prologue by name, with changes."""
    k, v = some(2, B, K, KV_HEADS * DIM)
    k_cache, v_cache = some(2, B, N, KV_HEADS, DIM)
    arguments = {"q": some(B, K, D), "k": k, "v": v, "q_out": some(B, K, HEADS, DIM)}
    arguments |= {"k_cache": k_cache, "v_cache": v_cache, "rows": rows_of()}
    return arguments | {"cos": some(N, DIM // 2), "sin": some(N, DIM // 2)} | changes


WRONG_PROLOGUE = {
    "q of rank 2": ({"q": some(B, D)}, "q", "rank 3"),
    "q of integers": ({"q": some(B, K, D).int()}, "q", "float64"),
    "q stride": ({"q": TRANSPOSED}, "q", "last stride"),
    "q width": ({"q": some(B, K, D + DIM)}, "q", "the 4 heads of 10"),
    "k width": ({"k": some(B, K, D)}, "k", f"[{B}, {K}, {KV_HEADS * DIM}]"),
    "k dtype": ({"k": some(B, K, KV_HEADS * DIM).half()}, "k", "torch.float32"),
    "v tokens": ({"v": some(B, N, KV_HEADS * DIM)}, "v", f"[{B}, {K}, {KV_HEADS * DIM}]"),
    "q_out of rank 3": ({"q_out": some(B, K, D)}, "q_out", "tokens, heads, d"),
    "q_out batch": ({"q_out": some(B + 1, K, HEADS, DIM)}, "q_out", f"[{B}, tokens"),
    "q_out odd d": ({"q_out": some(B, K, 1, 9)}, "q_out", "even, 8 to 256"),
    "q_out large d": ({"q_out": some(B, K, 1, 258)}, "q_out", "even, 8 to 256"),
    "q_out heads apart": (
        {"q_out": some(B, K, 2 * HEADS, DIM)[:, :, ::2]},
        "q_out",
        "between heads",
    ),
    "q_out short": ({"q_out": some(B, K - 1, HEADS, DIM)}, "q_offset", "0 to -1"),
    "q_out expanded": (
        {"q_out": some(1, K, HEADS, DIM).expand(B, K, HEADS, DIM)},
        "q_out",
        "without expanded",
    ),
    "q_offset": ({"q_offset": 1}, "q_offset", "0 to 0"),
    "q_offset negative": ({"q_offset": -1}, "q_offset", "0 to 0"),
    "k_cache d": ({"k_cache": some(B, N, KV_HEADS, DIM + 2)}, "k_cache", f"G, {DIM}]"),
    "k_cache heads": ({"k_cache": some(B, N, 3, DIM)}, "k_cache", "divisor of the 4"),
    "v_cache rows": ({"v_cache": some(B, N + 1, KV_HEADS, DIM)}, "v_cache", f"[{B}, {N},"),
    "v_cache dtype": ({"v_cache": some(B, N, KV_HEADS, DIM).half()}, "v_cache", "torch.float32"),
    "rows dtype": ({"rows": rows_of().float()}, "rows", "int64 or int32"),
    "rows shape": ({"rows": rows_of(2)}, "rows", f"[{B}, {K}]"),
    "rows out of range": ({"rows": rows_of() + N}, "rows", "0 to 6"),
    "rows negative": ({"rows": rows_of() - N}, "rows", "0 to 6"),
    "rows behind the offset": ({"rows": rows_of() + 5, "kv_offset": 1}, "rows", "0 to 5"),
    "rows behind the table": (
        {"rows": rows_of() + 4, "cos": some(4, DIM // 2), "sin": some(4, DIM // 2)},
        "rows",
        "0 to 3",
    ),
    "kv_offset": ({"kv_offset": N}, "kv_offset", "0 to 6"),
    "kv_offset without rows": ({"rows": None, "kv_offset": 5}, "kv_offset", "0 to 4"),
    "norm": ({"norm": "group"}, "norm", "'rms_rounded'"),
    "weight without norm": ({"q_weight": some(DIM)}, "q_weight", "None"),
    "bias of rms of all heads": (
        {"norm": "rms_across", "q_bias": some(KV_HEADS * DIM)},
        "q_bias",
        "None",
    ),
    "weight of rms of all heads": (
        {"norm": "rms_across", "k_weight": some(DIM)},
        "k_weight",
        f"[{KV_HEADS * DIM}]",
    ),
    "bias of rms": ({"norm": "rms", "k_bias": some(KV_HEADS * DIM)}, "k_bias", "None"),
    "weight of rms": ({"norm": "rms", "q_weight": some(D)}, "q_weight", f"[{DIM}]"),
    "weight of layer": (
        {"norm": "layer", "k_weight": some(DIM)},
        "k_weight",
        f"[{KV_HEADS * DIM}]",
    ),
    "cos alone": ({"sin": None}, "cos, sin", "both or none"),
    "cos dtype": ({"cos": some(N, DIM // 2).half()}, "cos", "torch.float32"),
    "cos width": ({"cos": some(N, DIM)}, "cos", f"[{N}, {DIM // 2}]"),
    "cos stride": ({"cos": some(N, DIM)[:, ::2]}, "cos", "last stride"),
    "sin rank": ({"sin": some(DIM // 2)}, "sin", f"[P, {DIM // 2}]"),
    "sin rows": ({"sin": some(N + 1, DIM // 2)}, "sin", f"[{N}, {DIM // 2}]"),
    "cos batch": ({"cos": some(B + 1, N, DIM // 2)}, "cos", f"[{B}, {N}, {DIM // 2}]"),
    "a gradient": ({"q": some(B, K, D).requires_grad_()}, "gradient", "no_grad"),
}


@pytest.mark.parametrize("case", WRONG_PROLOGUE)
@pytest.mark.parametrize("backend", SERVING)
def test_qkv_prologue_names_what_is_wrong(case, backend):
    changes, name, accepted = WRONG_PROLOGUE[case]
    with pytest.raises(ArgumentError) as error:
        ops.qkv_prologue(**prologue(**changes), backend=backend)
    assert name in str(error.value)
    assert accepted in str(error.value)


def test_qkv_prologue_refuses_shared_memory():
    buffer = some(B, 2 * N, KV_HEADS, DIM)
    q = some(B, K, HEADS, DIM)
    flat = some(B * N * KV_HEADS * DIM)
    table = flat[: N * DIM // 2].view(N, DIM // 2)
    for changes in (
        {"k_cache": buffer[:, :N], "v_cache": buffer[:, 1 : N + 1]},
        {"q": q.flatten(2), "q_out": q},
        {"k": buffer[:, :K].flatten(2), "k_cache": buffer[:, 2 : N + 2], "v_cache": buffer[:, :N]},
        {"norm": "layer", "q_weight": q[0, 0].flatten(), "q_out": q},
        {"cos": table, "k_cache": flat.view(B, N, KV_HEADS, DIM)},
    ):
        with pytest.raises(ArgumentError, match="shares with"):
            ops.qkv_prologue(**prologue(**changes))


def blending(**changes):
    """Arguments of blend by name, with changes."""
    fresh, cached, x = some(3, B, K, D)
    arguments = {"fresh": fresh, "cached": cached, "r": torch.tensor(0.4)}
    return arguments | {"x": x, "gate": some(B, D)} | changes


WRONG_BLEND = {
    "fresh of rank 2": ({"fresh": some(B, D)}, "fresh", "rank 3"),
    "cached size": ({"cached": some(B, N, D)}, "cached", f"[{B}, {K}, {D}]"),
    "cached dtype": ({"cached": X.half()}, "cached", "torch.float32"),
    "r a number": ({"r": 0.4}, "r", "no dimensions"),
    "r of one element": ({"r": torch.tensor([0.4])}, "r", "no dimensions"),
    "r of 16 bits": ({"r": torch.tensor(0.4).half()}, "r", "torch.float32"),
    "r in fp64": ({"r": torch.tensor(0.4).double()}, "r", "torch.float32"),
    "r device": ({"r": torch.tensor(0.4, device="meta")}, "r", "cpu"),
    "x size": ({"x": STORE}, "x", f"[{B}, {K}, {D}]"),
    "gate without x": ({"x": None}, "gate", "None"),
    "gate width": ({"gate": some(B, D + 1)}, "gate", str(D)),
    "blended without x": ({"x": None, "gate": None, "blended": some(B, K, D)}, "blended", "None"),
    "blended dtype": ({"blended": X.half()}, "blended", "torch.float32"),
    "blended expanded": (
        {"blended": some(1, K, D).expand(B, K, D)},
        "blended",
        "without expanded",
    ),
    "out size": ({"out": some(B, K, D + 1)}, "out", f"[{B}, {K}, {D}]"),
    "out stride": ({"out": TRANSPOSED}, "out", "last stride"),
}


@pytest.mark.parametrize("case", WRONG_BLEND)
@pytest.mark.parametrize("backend", SERVING)
def test_blend_names_what_is_wrong(case, backend):
    changes, name, accepted = WRONG_BLEND[case]
    with pytest.raises(ArgumentError) as error:
        ops.blend(**blending(**changes), backend=backend)
    assert str(error.value).startswith(f"{name}: got")
    assert accepted in str(error.value)


def test_blend_refuses_shared_memory():
    given = blending()
    for changes in (
        {"out": given["fresh"]},
        {"out": given["cached"]},
        {"blended": given["x"]},
        {"blended": given["cached"]},
        {"blended": X, "out": X},
    ):
        with pytest.raises(ArgumentError, match="shares with"):
            ops.blend(**given | changes)


def collapsing(**changes):
    """Arguments of collapse by name, with changes."""
    branches = list(some(2, B, K, D))
    return {"branches": branches, "weights": [some(D), None], "groups": [1, 0]} | changes


WRONG_COLLAPSE = {
    "no branch": ({"branches": []}, "branches", "from 1 up"),
    "fewer weights": ({"weights": [None]}, "branches, weights", "equal counts"),
    "more groups": ({"groups": [0, 1, 0]}, "branches, weights, groups", "equal counts"),
    "a branch of rank 2": ({"branches": [some(B, D)] * 2}, "branches[0]", "rank 3"),
    "a branch of another size": ({"branches": [X, STORE]}, "branches[1]", f"[{B}, {K}, {D}]"),
    "a branch of another dtype": ({"branches": [X, X.half()]}, "branches[1]", "torch.float32"),
    "weight width": ({"weights": [None, some(B, D + 1)]}, "weights[1]", str(D)),
    "a group too many": ({"groups": [0, 4]}, "groups[1]", "0 to 3"),
    "a group below none": ({"groups": [-1, 0]}, "groups[0]", "0 to 3"),
    "a group of another type": ({"groups": [1.0, 0]}, "groups[0]", "an int"),
    "dtype": ({"dtype": torch.float16}, "dtype", "torch.float32"),
    "out rank": ({"out": X}, "out", f"[2 to 4, {B}, {K}, {D}]"),
    "out of fewer sums": ({"out": some(1, B, K, D)}, "out", f"[2 to 4, {B}, {K}, {D}]"),
    "out of more sums": ({"out": some(5, B, K, D)}, "out", f"[2 to 4, {B}, {K}, {D}]"),
    "out dtype": ({"out": some(2, B, K, D).half()}, "out", "torch.float32"),
    "out expanded": ({"out": X.expand(2, B, K, D)}, "out", "without expanded"),
}


@pytest.mark.parametrize("case", WRONG_COLLAPSE)
@pytest.mark.parametrize("backend", SERVING)
def test_collapse_names_what_is_wrong(case, backend):
    changes, name, accepted = WRONG_COLLAPSE[case]
    with pytest.raises(ArgumentError) as error:
        ops.collapse(**collapsing(**changes), backend=backend)
    assert str(error.value).startswith(name)
    assert accepted in str(error.value)


@pytest.mark.parametrize("backend", SERVING)
def test_vectors_are_of_the_dtype_beside_them_or_fp32(backend):
    """Those of one call of gated_residual or collapse are alike."""
    half, wide, brain = (some(B, D, dtype=d) for d in (torch.float16, FLOAT, torch.bfloat16))
    x = X.half()
    two, three = [x, x.clone()], [x, x.clone(), x.clone()]
    accepted = {
        "scale: got torch.bfloat16; accepted is torch.float16 or torch.float32": lambda: (
            ops.norm_modulate(x, brain, backend=backend)
        ),
        "gate: got torch.float64; accepted is torch.float16 or torch.float32": lambda: (
            ops.norm_modulate(x.clone(), branch=x, gate=wide.double(), backend=backend)
        ),
        "bias: got torch.float32; accepted is torch.float64": lambda: ops.norm_modulate(
            X.double(), bias=wide[0], backend="reference"
        ),
        "branch: got torch.float32; accepted is torch.float16": lambda: ops.norm_modulate(
            x.clone(), branch=X, gate=wide, backend=backend
        ),
        "gates[2]: got torch.float16; accepted is torch.float32": lambda: ops.gated_residual(
            x, three, [None, wide, half], backend=backend
        ),
        "gates[1]: got torch.float32; accepted is torch.float16": lambda: ops.gated_residual(
            x, two, [half, wide], backend=backend
        ),
        "gates[0]: got torch.bfloat16; accepted is torch.float16 or torch.float32": lambda: (
            ops.gated_residual(x, two, [brain, wide], backend=backend)
        ),
        "weights[1]: got torch.float16; accepted is torch.float32": lambda: ops.collapse(
            two, [wide, half], [0, 1], backend=backend
        ),
    }
    for message, call in accepted.items():
        with pytest.raises(ArgumentError) as error:
            call()
        assert str(error.value) == message


def test_gradients_of_vectors_in_fp32():
    x, branch, gate = (
        leaf(B, K, D, dtype=torch.bfloat16),
        leaf(B, K, D, dtype=torch.bfloat16),
        leaf(B, D, dtype=FLOAT),
    )
    (ops.gated_residual(x, [branch], [gate]) + ops.norm_modulate(x, gate, gate)).sum().backward()
    assert (x.grad.dtype, gate.grad.dtype) == (torch.bfloat16, FLOAT)
    normed = torch.nn.functional.layer_norm(x.detach().double(), (D,), eps=1e-6)
    expected = (branch.detach().double() + normed + 1).sum(1)
    torch.testing.assert_close(gate.grad.double(), expected, rtol=0.02, atol=0.02)


def test_collapse_refuses_shared_memory():
    sums = some(2, B, K, D)
    for changes in ({"branches": [X, sums[1]]}, {"weights": [None, sums[0, :, 0]]}):
        with pytest.raises(ArgumentError, match="shares with"):
            ops.collapse(**collapsing(**changes), out=sums)


def test_caches_may_lie_side_by_side():
    """In each sample and in each token of one buffer."""
    expected = prologue()
    ops.qkv_prologue(**expected)
    for buffer, pick in (
        (torch.zeros(B, 2 * N, KV_HEADS, DIM), lambda t: (t[:, :N], t[:, N:])),
        (torch.zeros(B, N, 2, KV_HEADS, DIM), lambda t: t.unbind(2)),
    ):
        k_cache, v_cache = pick(buffer)
        ops.qkv_prologue(**prologue(k_cache=k_cache, v_cache=v_cache))
        for name, found in (("k_cache", k_cache), ("v_cache", v_cache)):
            for b in range(B):
                rows = rows_of()[b]
                assert torch.equal(found[b, rows], expected[name][b, rows])


@pytest.mark.parametrize("backend", SERVING)
def test_written_memory_is_not_shared(backend):
    x, branch = some(B, K, D), some(B, K, D, key=1)
    buffer = some(2 * B * K * D)
    shifted = (buffer[: B * K * D].view(B, K, D), buffer[D : D + B * K * D].view(B, K, D))
    residual = [
        {"x": x, "branches": [branch], "out": branch},
        {"x": x, "branches": [shifted[0]], "out": shifted[1]},
        {"x": shifted[0], "branches": [branch], "out": shifted[1]},
        {"x": x, "branches": [branch], "fresh": 0, "cache": branch},
        {"x": x, "branches": [branch], "fresh": 0, "cache": x},
        {"x": x, "branches": [branch, STORE[:, :K]], "fresh": 0, "cache": STORE[:, 1 : K + 1]},
    ]
    for arguments in residual:
        gates = [None] * len(arguments["branches"])
        with pytest.raises(ArgumentError, match="shares with"):
            ops.gated_residual(**arguments, gates=gates, backend=backend)
    norm = [
        {"x": shifted[0], "out": shifted[1]},
        {"x": x, "branch": x},
        {"x": x, "branch": branch, "out": x},
        {"x": x, "branch": branch, "out": branch},
        {"x": x, "branch": branch, "cache": x},
        {"x": x, "branch": branch, "cache": branch},
        {"x": x, "scale": branch, "out": branch},
        {"x": x, "branch": branch, "gate": x},
        {"x": x, "row_scale": x.view(-1)[: B * K].view(B, K)},
        {"x": x, "out": x.view(FP8)[..., :D], "row_scale": some(B, K)},
    ]
    for arguments in norm:
        with pytest.raises(ArgumentError, match="shares with"):
            ops.norm_modulate(**arguments, backend=backend)


def test_neighbours_in_one_buffer_are_not_shared_memory():
    buffer = some(B, 2 * K, D)
    x, branch = buffer[:, :K], buffer[:, K:]
    expected = x + branch
    ops.gated_residual(x, [branch], [None], out=x)
    assert torch.equal(x, expected)
    layers = some(3, B, K, D)
    ops.gated_residual(layers[0], [layers[1]], [None], fresh=0, cache=layers[2], out=layers[0])
    assert torch.equal(layers[2], layers[1])


# --- which ops there are


def test_every_file_of_the_folder_is_imported():
    helpers = {"__init__", "checks", "registry"}
    assert {path.stem for path in Path(ops.__path__[0]).glob("*.py")} - helpers == set(ops.FILES)


def test_bound_ops_are_those_of_the_folder():
    bound = ops.bind()
    assert {name for name in vars(bound) if name != "backend"} == set(ops.OPS) <= set(ops.__all__)
    assert all(hasattr(Backend, op) for op in ops.OPS)
    with pytest.raises(AttributeError, match=r"op: got 'nonesuch'; there are blend, collapse"):
        bound.nonesuch  # noqa: B018


def test_what_a_method_needs_are_ops():
    assert {*plan.OPS, *itertools.chain(*plan.OPS_OF_FIELD.values())} <= set(ops.OPS)
    written = {field for method in methods().values() for field in method.writes}
    assert set(plan.OPS_OF_FIELD) <= written


# --- which backend


def test_automatic_choice_follows_dtype():
    bound = ops.bind()
    assert bound.backend is None
    for op in ops.OPS:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert bound.backend_for(op, "cpu", dtype) == "cpu"
        assert bound.backend_for(op, "cpu", torch.float64) == "reference"


def test_a_named_backend_is_not_replaced():
    bound = ops.bind("cpu")
    double = some(B, K, D).double()
    with pytest.raises(BackendError, match=r"'cpu' cannot run .*float64.*available.*reference"):
        bound.gated_residual(double, [double.clone()], [None])
    with pytest.raises(BackendError, match="float64"):
        bound.backend_for("norm_modulate", "cpu", torch.float64)
    with pytest.raises(BackendError, match=r"'nonesuch' does not exist.*reference"):
        ops.bind("nonesuch")
    with pytest.raises(BackendError, match="nonesuch"):
        ops.norm_modulate(some(B, K, D), backend="nonesuch")


def test_bound_ops_run_where_they_say():
    x, branch = (some(B, K, D, dtype=torch.bfloat16, key=i) for i in range(2))
    eager = truth.eager_gated_residual(x, [branch, branch], [None, None])
    assert torch.equal(ops.bind("reference").gated_residual(x, [branch] * 2, [None] * 2), eager)
    once = (x.float() + branch.float() + branch.float()).bfloat16()
    assert torch.equal(ops.bind("cpu").gated_residual(x, [branch] * 2, [None] * 2), once)


@pytest.mark.parametrize("name", SERVING)
def test_environment_names_a_backend(name, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDIT_BACKEND", name)
    assert ops.bind().backend == name
    assert ops.bind("reference").backend == "reference"
    code = (
        "import torch; from fastdit import ops; from fastdit.ops.registry import choose; "
        "print(choose('gated_residual', torch.device('cpu'), torch.float32).name)"
    )
    command = [sys.executable, "-I", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == name


def test_backends_state_their_reasons():
    assert {"reference", "cpu"} <= set(BACKENDS)
    for name, backend in BACKENDS.items():
        assert backend.name == name
        for op in ("gated_residual", "norm_modulate", "token_select"):
            reason = backend.supports(op, torch.device("cpu"), torch.int64)
            assert isinstance(reason, str), f"{name} says that it serves {op} in int64"
            assert reason


def test_errors_are_of_the_family():
    assert issubclass(ArgumentError, (FastDiTError, ValueError))
    assert issubclass(BackendError, (FastDiTError, RuntimeError))


# --- gradients


def leaf(*shape, key=0, dtype=torch.float64):
    return some(*shape, dtype=dtype, key=key).requires_grad_()


def test_gated_residual_gradients():
    rows = rows_of()
    x, store, fresh = leaf(B, K, D), leaf(B, N, D, key=1), leaf(B, K, D, key=2)
    gates = [leaf(B, D, key=3), leaf(B, 1, D, key=4)]

    def f(x, store, fresh, a, b):
        return ops.gated_residual(x, [store, fresh], [a, b], fresh=1, rows=rows)

    assert gradcheck(f, (x, store, fresh, *gates), fast_mode=True)


def test_norm_modulate_gradients():
    inputs = (leaf(B, N, D), leaf(B, D, key=1), leaf(B, 1, D, key=2), leaf(D, key=3))

    def f(x, scale, shift, weight):
        return ops.norm_modulate(x, scale, shift, weight=weight, rows=rows_of(), eps=1e-3)

    assert gradcheck(f, inputs, fast_mode=True)


def test_rms_gradients_are_stock():
    """diffusers takes the mean square in fp32, too coarse for gradcheck: compare with its own."""
    ours, stock = leaf(B, K, D), leaf(B, K, D)
    scale = some(B, D, dtype=torch.float64)
    ops.norm_modulate(ours, scale, rms=True).square().sum().backward()
    truth.eager_norm_modulate(stock, scale, rms=True)[0].square().sum().backward()
    assert torch.equal(ours.grad, stock.grad)


def test_in_place_forms_have_no_gradient():
    x, branch = leaf(B, K, D), some(B, K, D).double()
    with pytest.raises(ArgumentError, match="gradient"):
        ops.gated_residual(x, [branch], [None], out=branch.clone())
    with pytest.raises(ArgumentError, match="gradient"):
        ops.gated_residual(x, [branch], [None], fresh=0, cache=branch.clone())
    with pytest.raises(ArgumentError, match="gradient"):
        ops.norm_modulate(x, branch=branch)
    with pytest.raises(ArgumentError, match="gradient"):
        ops.norm_modulate(x, out=branch.clone())
    with pytest.raises(ArgumentError, match="gradient"):
        ops.norm_modulate(x, row_scale=torch.empty(B, K))
    with torch.no_grad():
        ops.gated_residual(x, [branch], [None], out=branch.clone())


def test_the_dispatched_op_refuses_gradients():
    x, out = leaf(B, K, D), some(B, K, D).double()
    call = torch.ops.fastdit.gated_residual
    with pytest.raises(ArgumentError, match="no gradient"):
        call(x, [out.clone()], [None], -1, None, None, out, None, None)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_leaves_may_be_read_without_grad(mode):
    with mode():
        x, weight = some(B, K, D), torch.nn.Parameter(some(D))
        y = ops.norm_modulate(x, weight=weight)
        assert not y.requires_grad


# --- tracing


def residual_step(x, store, fresh, gate, cache, rows):
    x = ops.gated_residual(x, [store, fresh], [gate, None], fresh=1, cache=cache, rows=rows)
    return ops.gated_residual(x, [fresh], [gate], out=x) * 2


def norm_step(x, branch, scale, gate, cache, rows):
    x = x * 2
    y = ops.norm_modulate(x, scale, branch=branch, gate=gate, cache=cache, rows=rows)
    return x + 1, ops.norm_modulate(y, None, scale, rms=True)


def quantised_step(x, scale, row_scale):
    y = ops.norm_modulate(x * 2, scale, row_scale=row_scale)
    return y.float() * row_scale[..., None], row_scale * 2


def prologue_step(q, k, v, q_out, k_cache, v_cache, rows, cos, sin):
    table = {"cos": cos, "sin": sin, "norm": "rms"}
    ops.qkv_prologue(q + 1, k, v, q_out, k_cache, v_cache, rows=rows, **table)
    return q_out + k_cache.amax(), v_cache * 2  # a sum would depend on its order


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_as_one_graph(backend):
    rows, cache, gate = rows_of(), some(B, N, D), some(B, 6, D).chunk(6, 1)[2]
    compact, store = some(B, K, D), some(B, N, D, key=1)
    cases = [
        (residual_step, (compact, store, some(B, K, D, key=2), gate, cache, rows)),
        (norm_step, (store, compact, gate, gate, cache, rows)),
        (quantised_step, (compact, gate, some(B, K))),
        (prologue_step, tuple(prologue().values())),
    ]
    for step, arguments in cases:
        plain, traced = ([a.clone() for a in arguments] for _ in range(2))
        with torch.no_grad():
            expected = step(*plain)
            found = torch.compile(step, fullgraph=True, backend=backend)(*traced)
        for a, b in zip([*plain, *_tuple(expected)], [*traced, *_tuple(found)], strict=True):
            assert torch.equal(a, b)


def _tuple(value):
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.slow
def test_blends_and_collapses_compile_as_one_graph():
    def step(fresh, cached, r, x, gate, blended):
        h = ops.blend(fresh * 2, cached, r, x=x, gate=gate, blended=blended)
        sums = ops.collapse([h, cached, h], [gate, None, gate], [1, 0, 0])
        return ops.blend(h, cached, r, x=x, out=x) + sums[1], blended + sums[0]

    arguments = (*blending().values(), some(B, K, D))
    plain, traced = ([t.clone() for t in arguments] for _ in range(2))
    expected = step(*plain)
    found = torch.compile(step, fullgraph=True, backend="aot_eager")(*traced)
    for a, b in zip([*plain, *expected], [*traced, *found], strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_selection_compiles_as_one_graph():
    def step(velocity, drops, age):
        options = {"age": age, "high": 2, "max_age": 3}
        rows, inverse = ops.token_select(velocity * 2, drops, 3, **options)
        return ops.token_select(velocity, drops, 3, inverse=inverse)[0] + rows, inverse + drops

    plain, traced = ([FIELD, table(B, 8), table(B, 8)] for _ in range(2))
    expected = step(*plain)
    found = torch.compile(step, fullgraph=True, backend="aot_eager")(*traced)
    for a, b in zip([*plain, *expected], [*traced, *found], strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_a_change_of_resolution_compiles_as_one_graph():
    def step(field, places, rows, noise):
        tokens = ops.patchify(field * 2, places)
        numbers = {"scale": 0.2, "deviation": 0.9, "correlation": 0.02}
        tokens, places = ops.resolution_transition(tokens, places, rows, noise, **numbers)
        return ops.unpatchify(tokens, places, field, channels_last=True) + 1, places

    inputs = transition()
    given = (FIELD, squares().clone(), inputs["rows"], inputs["noise"])
    plain, traced = ([t.clone() for t in given] for _ in range(2))
    expected = step(*plain)
    found = torch.compile(step, fullgraph=True, backend="aot_eager")(*traced)
    for a, b in zip([*plain, *expected], [*traced, *found], strict=True):
        assert torch.equal(a, b)


def test_a_selection_has_no_gradient():
    velocity = FIELD.clone().requires_grad_()
    rows = ops.token_select(velocity, table(B, 8), 3)[0]
    assert not rows.requires_grad
    assert torch.equal(rows, ops.token_select(FIELD, table(B, 8), 3)[0])


def test_compiles_with_gradients():
    scale = some(B, D)

    def f(x):
        return ops.gated_residual(ops.norm_modulate(x, scale), [x], [scale])

    ours, plain = leaf(B, K, D, dtype=FLOAT), leaf(B, K, D, dtype=FLOAT)
    torch.compile(f, fullgraph=True, backend="aot_eager")(ours).sum().backward()
    f(plain).sum().backward()
    assert torch.equal(ours.grad, plain.grad)


def opcheck_samples():
    x, store, gate = some(B, K, D), some(B, N, D, key=1), some(B, 6, D).chunk(6, 1)[1]
    rows, out, cache = rows_of(), poisoned((B, K, D), FLOAT).nan_to_num(), some(B, N, D)
    fresh = some(B, K, D, key=2)
    yield "gated_residual", (x, [fresh], [gate], -1, None, None, out, None, None)
    stores = ([store, fresh], [gate, None], 1, cache, rows, out)
    yield "gated_residual", (x, *stores, torch.ones(2), "reference")
    yield "norm_modulate", (x, gate, gate, None, None, 1e-6, False, None, out, None, None)
    yield "norm_modulate", (store, gate, None, some(D), None, 1e-6, True, rows, out, None, None)
    tail = (cache, rows, out, None, None)
    options = (None, None, 1e-6, False)
    yield "residual_norm_modulate", (store, gate, gate, *options, fresh, gate, *tail)
    tables = (table(B, 3), table(B, 8), None)
    yield "token_select", (FIELD, table(B, 8), None, 2, 0.1, "std", None, *tables)
    yield "token_select", (FIELD, table(B, 8), table(B, 8), 0, 0.1, "l2norm", 4, *tables)
    yield "token_change", (*change().values(), None, torch.ones(B, 8), None)
    yield "token_change", (*change().values(), table(B, 8) - 1, torch.ones(B, 8), "reference")
    yield "patchify", (FIELD, squares(), False, some(B, 2, 12, key=4), None)
    yield "unpatchify", (PATCHES, squares(), True, some(*FIELD.shape, key=4), None)
    given = transition()
    given = [given[name] for name in ("x", "table", "rows", "noise", "scale", "deviation")]
    written = (some(B, 5, 12, key=5), table(B, 5, 3))
    yield "resolution_transition", (*given, -0.1, 1.0, False, None, *written, None)
    *stream, rows, cos, sin = prologue().values()
    affine = ("rms", some(DIM), None, None, None, 1e-6)
    yield "qkv_prologue", (*stream, rows, 0, 0, *affine, cos, sin, None)
    heads = [some(B, n, 2, DIM, key=n) for n in (K, N, N, K)]
    yield "sparse_attention", (*heads[:3], 0.3, heads[3], "reference")

    blend = (fresh, out, torch.tensor(0.4))
    yield "blend", (*blend, x, gate, cache[:, :K].clone(), out.clone(), None)
    yield "blend_backward", (x, *blend, gate, out.clone(), out.clone(), torch.tensor(0.0), None)
    yield "collapse", ([x, fresh], [gate, None], [0, 2], True, some(3, B, K, D), "reference")
    yield "swiglu", (x, fresh, out.clone(), None)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "arguments"), opcheck_samples())
def test_opcheck(name, arguments):
    torch.library.opcheck(getattr(torch.ops.fastdit, name).default, arguments)


def test_meta_tensors_give_shapes():
    x, store = torch.empty(B, K, D, device="meta"), torch.empty(B, N, D, device="meta")
    rows = torch.empty(B, K, dtype=torch.int64, device="meta")
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert ops.gated_residual(x, [store], [None], rows=rows).shape == (B, K, D)
        assert ops.norm_modulate(store, rows=rows).shape == (B, K, D)
        quantised = ops.norm_modulate(store, rows=rows, row_scale=x[:, :, 0].clone())
        assert (quantised.shape, quantised.dtype) == ((B, K, D), FP8)
        assert ops.blend(x, x, torch.empty((), device="meta"), x=x).shape == (B, K, D)
        assert ops.collapse([x] * 2, [None] * 2, [0, 2]).shape == (3, B, K, D)
        field, drops = (t.to("meta") for t in (FIELD, table(B, 8)))
        rows, inverse = ops.token_select(field, drops, 3)
        assert (rows.shape, inverse.shape) == ((B, 3), (B, 8))
        assert rows.dtype is inverse.dtype is torch.int32
        noted = {name: t.to("meta") for name, t in change().items()}
        assert ops.token_change(**noted).shape == (B, 8)
        assert ops.patchify(field, squares().to("meta")).shape == (B, 2, 12)
        given = {
            name: value.to("meta") if isinstance(value, torch.Tensor) else value
            for name, value in transition().items()
        }
        out, places = ops.resolution_transition(**given)
        assert (out.shape, places.shape) == ((B, 5, 12), (B, 5, 3))
        assert places.dtype is torch.int32


def test_dispatch_modes_see_the_ops():
    class Seen(TorchDispatchMode):
        names: list = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(func.name())
            return func(*args, **(kwargs or {}))

    x, branch = some(B, K, D), some(B, K, D, key=1)
    with Seen() as seen:
        inside = ops.gated_residual(x, [branch], [None])
        ops.norm_modulate(x)
        ops.token_select(FIELD, table(B, 8), 3)
        ops.token_change(**change())
        tokens = ops.patchify(FIELD, squares())
        ops.unpatchify(tokens, squares(), FIELD.clone())
        ops.resolution_transition(**transition())
    assert {"fastdit::patchify", "fastdit::unpatchify"} <= set(seen.names)
    assert "fastdit::resolution_transition" in seen.names
    assert "fastdit::gated_residual" in seen.names
    assert {"fastdit::token_change", "fastdit::token_select"} <= set(seen.names)
    assert "fastdit::norm_modulate" in seen.names
    assert torch.equal(inside, ops.gated_residual(x, [branch], [None]))


# --- stock diffusers


@pytest.mark.diffusers
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_reference_is_bit_equal_to_diffusers(dtype):
    from diffusers.models.normalization import AdaLayerNormZero, RMSNorm

    x = some(B, K, D, dtype=dtype)
    rms = RMSNorm(D, eps=1e-6).to(dtype)
    torch.nn.init.normal_(rms.weight)
    with torch.no_grad():
        ours = ops.norm_modulate(x, weight=rms.weight, rms=True, backend="reference")
        assert torch.equal(ours, rms(x))
        plain = RMSNorm(D, eps=1e-6, elementwise_affine=False)
        assert torch.equal(ops.norm_modulate(x, rms=True, backend="reference"), plain(x))
        ada = AdaLayerNormZero(D).to(dtype)
        stock, gate, *_ = ada(x, emb=some(B, D, dtype=dtype, key=1))
        shift, scale, *_ = ada.linear(ada.silu(some(B, D, dtype=dtype, key=1))).chunk(6, dim=1)
        ours = ops.norm_modulate(x, scale, shift, eps=ada.norm.eps, backend="reference")
        assert torch.equal(ours, stock)
        stock = x + gate.unsqueeze(1) * stock
        assert torch.equal(ops.gated_residual(x, [ours], [gate], backend="reference"), stock)
