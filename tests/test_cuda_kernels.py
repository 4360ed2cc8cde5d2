"""The CUDA kernels in the emulator: what they promise beyond the checks of all backends, and limits.

The tests of the ops run on them too, as `cuda-emulated`.
"""

from __future__ import annotations

import pytest
import torch

import kernel_checks
import test_token_select
from emulated import emulated, unavailable
from fastdit.backends.cuda import BACKEND, runs_on
from fastdit.errors import BackendError
from fastdit.ops import BACKENDS, bind
from inputs import Runner, poisoned
from tolerance import assert_equal

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))


@pytest.fixture
def run() -> Runner:
    return Runner(emulated(), "cuda emulated")


@pytest.mark.parametrize("name", kernel_checks.CHECKS)
def test_check(name, run):
    kernel_checks.CHECKS[name](run)


def test_offsets_beyond_int32(run):
    """A stride and a row that fit int32, and their product that does not."""
    stride, tokens = 1 << 20, (1 << 11) + 2
    store = torch.empty((tokens - 1) * stride + 8, dtype=torch.float16)  # mostly never touched
    store = store.as_strided((1, tokens, 8), (tokens * stride, stride, 1))
    last = tokens - 1
    store[0, 0], store[0, last] = -1, torch.arange(8)
    rows = torch.tensor([[0, last]])
    x = torch.zeros(1, 2, 8, dtype=torch.float16)
    out = run.gated_residual(x, [store], [None], rows=rows)
    assert_equal("gated_residual, far rows", out, torch.stack([store[:, 0], store[:, last]], 1))
    run.norm_modulate(store, branch=torch.ones_like(x), rows=rows)
    assert_equal("norm_modulate, far rows of x", store[0, last], torch.arange(1, 9).half())


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 8192), (torch.bfloat16, 16384)])
def test_the_widest_row(dtype, limit, run):
    x = torch.randn(1, 1, limit).to(dtype)
    y = run.norm_modulate(x)
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (limit,), eps=1e-6))
    with pytest.raises(ValueError, match=f"last dimension of {limit + 1}; accepted is up to"):
        run.norm_modulate(torch.zeros(1, 1, limit + 1, dtype=dtype))
    out = run.gated_residual(
        torch.zeros(1, 1, limit + 1, dtype=dtype), [x.new_ones(1, 1, limit + 1)], [None]
    )
    assert bool((out == 1).all())


def test_the_widest_norm_of_all_heads(run):
    for heads, accepted in ((64, True), (65, False)):
        q, k = torch.randn(1, 1, heads * 128), torch.randn(1, 1, 128)
        q_out, k_cache, v_cache = (poisoned((1, 1, n, 128), q.dtype) for n in (heads, 1, 1))
        if accepted:
            run.qkv_prologue(q, k, k, q_out, k_cache, v_cache, norm="layer")
            expected = torch.nn.functional.layer_norm(q, q.shape[-1:], eps=1e-6)
            torch.testing.assert_close(q_out.flatten(2), expected)
        else:
            with pytest.raises(ValueError, match=r"65 heads of 128; accepted .* up to 8192"):
                run.qkv_prologue(q, k, k, q_out, k_cache, v_cache, norm="layer")


def test_more_rows_than_a_grid_has(run):
    x = torch.zeros(1, 1, 8).expand(1 << 16, 1 << 15, 8)
    with pytest.raises(ValueError, match="2147483648 rows; accepted is fewer"):
        run.backend.norm_modulate(x, None, None, None, None, 1e-6, False, *[None] * 4, x)
    with pytest.raises(ValueError, match="2147483648 rows; accepted is fewer"):
        run.backend.gated_residual(x, [x], [None], -1, None, None, x)
    heads = x.unsqueeze(2)
    most = {None: "65536 times 32768 tokens; accepted is up to 65535", "layer": "than 715827882"}
    for norm, words in most.items():
        plain = (None, 0, 0, norm, None, None, None, None, 1e-6, None, None)
        with pytest.raises(ValueError, match=words):
            run.backend.qkv_prologue(x, x, x, heads, heads, heads, *plain)


def test_a_selection_of_as_many_tokens_as_a_large_picture_has(run):
    test_token_select.check_many_tokens(run, 256, 257)


def test_more_tokens_than_are_numbered(run):
    x = torch.zeros(1)
    table = (x.data_ptr(), 0)
    field = (x.data_ptr(), (1 << 16, 1 << 15, 1, 1, 1, 1), (0,) * 6)
    options = (1, 0, 0.1, False, 0, table, table, 0)
    with pytest.raises(ValueError, match="2147483648 tokens; accepted is fewer"):
        run.backend.module.token_select(0, field, table, None, *options, 0, 0)
    noted = (table, table, x.data_ptr(), None, table)
    with pytest.raises(ValueError, match="2147483648 tokens; accepted is fewer"):
        run.backend.module.token_change(0, field, field, *noted, 0, 0)


# --- the backend's words, which need no GPU

CUDA = torch.device("cuda", 0)


def test_it_ranks_above_triton():
    assert BACKENDS["cuda"] is BACKEND
    assert BACKENDS["triton"].priority < BACKEND.priority


def test_naming_it_on_a_cpu_is_an_error_and_never_a_fallback():
    x = torch.zeros(1, 2, 8)
    with pytest.raises(BackendError, match="'cuda' cannot run gated_residual"):
        bind("cuda").gated_residual(x, [x], [None])


def test_reasons(monkeypatch):
    assert "not float64" in BACKEND.supports("norm_modulate", CUDA, torch.float64)
    pytest.importorskip("fastdit._cuda", reason="built without CUDA")
    assert "CUDA devices" in BACKEND.supports("norm_modulate", torch.device("cpu"), torch.float32)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "has 7.5" in BACKEND.supports("gated_residual", CUDA, torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert BACKEND.supports("gated_residual", CUDA, torch.float32) is None


@pytest.mark.parametrize(
    ("built", "capability", "answer"),
    [
        ("80-real", (8, 0), True),
        ("80-real", (8, 9), True),
        ("80-real", (9, 0), False),
        ("89-real", (8, 0), False),
        ("90a-real", (9, 0), True),
        ("100a-real", (10, 3), False),
        ("100f-real", (10, 3), True),
        ("80-real;90-virtual", (12, 0), True),
        ("90-virtual", (8, 9), False),
        ("120", (12, 1), True),
        ("90", (10, 0), True),
    ],
)
def test_which_devices_a_build_serves(built, capability, answer):
    assert runs_on(built, capability) is answer
