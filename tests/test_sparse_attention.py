"""sparse_attention by torch and by the kernel of `triton`, against a softmax in fp64.

Each `check_*` takes a Runner and raises where the backend is wrong; the fault tests run the same
functions on kernels with planted faults.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from conftest import backend_labels, runner_of
from fastdit import _C, ops
from fastdit.backends.cpu import BACKEND as CPU
from fastdit.backends.triton import BACKEND as TRITON
from fastdit.errors import ArgumentError, BackendError
from inputs import Guarded, Runner, Untouched, generator, misaligned, normal, poisoned
from tolerance import assert_close, assert_equal
from triton_kernels import launch as table
from triton_kernels.launch import Launch, attention_key, waves
from truth import eager_attention, exact_attention

# Batch, queries, keys, query heads, key heads, d. From 5 blocks of 64 keys on a tile is shared.
SIZES = (
    (1, 1, 1, 1, 1, 8),
    (2, 3, 7, 2, 1, 64),
    (1, 17, 65, 1, 1, 72),
    (1, 1, 577, 4, 1, 96),
    (1, 5, 300, 1, 1, 128),
    (2, 2, 64, 2, 2, 72),
)


@pytest.fixture(params=[label for label in backend_labels() if label != "cuda-emulated"])
def runner(request):
    """The backends with a kernel, and the reference for those where torch's attention serves."""
    yield from runner_of(request.param, "sparse_attention")


def tensors(dtype, batch, queries, keys, heads, kv_heads, dim) -> tuple[Tensor, Tensor, Tensor]:
    g = generator(batch, queries, keys, heads, kv_heads, dim)
    kv = (batch, keys, kv_heads, dim)
    return tuple(normal(size, dtype, g) for size in ((batch, queries, heads, dim), kv, kv))


def compare(run: Runner, what: str, q, k, v, scale=None, out=None) -> Tensor:
    """The output, once it is as it must be; `out` is where to write it."""
    found = run.sparse_attention(q, k, v, scale=scale, out=out)
    eager = eager_attention(q, k, v, scale)
    what = f"sparse_attention on {run.label}, {what}"
    more = normal((q.shape[0], 64, *q.shape[2:]), q.dtype, generator(64))
    errors = eager_attention(more, k, v, scale).double() - exact_attention(more, k, v, scale)
    stock = errors.abs().nan_to_num(0, 0, 0).max().item() if errors.numel() else 0.0
    assert_close(what, found, exact_attention(q, k, v, scale), eager, stock)
    if run.backend.name == "reference":
        assert_equal(f"{what} against stock", found, eager)
    return found


def check_sizes(run: Runner) -> None:
    for dtype in run.dtypes():
        for sizes in SIZES:
            compare(run, f"sizes {sizes}", *tensors(dtype, *sizes))


def check_head_dims(run: Runner) -> None:
    """In fp32 not above 128: more products summed one after the other lose digits beyond the rule."""
    for dtype in run.dtypes():
        for dim in (1, 16, 20, 65, 80, 112, 128, *((160, 256) if dtype.itemsize == 2 else ())):
            compare(run, f"d {dim}", *tensors(dtype, 1, 2, 33, 1, 1, dim))


def check_groups(run: Runner) -> None:
    """Query heads 0 to 3 share the first key head."""
    for dtype in run.dtypes():
        for heads, kv_heads in ((8, 2), (8, 1), (6, 3)):
            compare(
                run, f"{heads} heads over {kv_heads}", *tensors(dtype, 2, 9, 9, heads, kv_heads, 16)
            )


def check_scale(run: Runner) -> None:
    for dtype in run.dtypes():
        q, k, v = tensors(dtype, 1, 3, 70, 2, 1, 32)
        for scale in (0.0, 1.0, 0.17, -0.3):
            compare(run, f"scale {scale}", q, k, v, scale)


def check_huge_logits(run: Runner) -> None:
    """Scores of thousands in one row, the largest of them among the last keys and among the first."""
    for dtype in run.dtypes():
        for keys in (70, 270):
            q, k, v = tensors(dtype, 1, 3, keys, 1, 1, 64)
            q[0, 1] *= 1000
            compare(run, "huge logits", q, k, v)
            for last in (0, keys - 1):
                peaked = k.clone()
                peaked[0, last] = q[0, 1].sign() * 3
                compare(run, f"a peak at key {last}", q, peaked, v)


def check_all_keys_alike(run: Runner) -> None:
    """The mean of v: every key counts, and once."""
    for dtype in run.dtypes():
        for keys in (63, 65, 270):
            q, k, v = tensors(dtype, 1, 2, keys, 1, 1, 72)
            k[:] = k[:, :1]
            compare(run, f"{keys} keys alike", q, k, v)


def check_every_key_is_read(run: Runner) -> None:
    """A NaN in any row of k or v is in every output of that sample and key head, and in no other."""
    for dtype in run.dtypes():
        for keys in (5, 270):
            q, k, v = tensors(dtype, 2, 2, keys, 2, 2, 16)
            plain = compare(run, "no NaN", q, k, v)
            for row in (0, keys - 1):
                for name in "kv":
                    given = {"k": k.clone(), "v": v.clone()}
                    given[name][1, row, 0] = float("nan")
                    found = run.sparse_attention(q, given["k"], given["v"])
                    assert found[1, :, 0].isnan().all(), f"{run.label}: {name} row {row} unread"
                    found[1, :, 0] = plain[1, :, 0]
                    assert_equal(f"sparse_attention on {run.label}, beside NaN", found, plain)


def check_special_queries(run: Runner) -> None:
    """A query with a NaN or an infinity poisons its own row."""
    for dtype in run.dtypes():
        q, k, v = tensors(dtype, 1, 5, 70, 2, 1, 72)
        plain = run.sparse_attention(q, k, v)
        for value in (float("nan"), float("inf")):
            one = q.clone()
            one[0, 2, 1, 70] = value
            found = run.sparse_attention(one, k, v)
            assert found[0, 2, 1].isnan().all(), f"{run.label}: {value} is lost"
            found[0, 2, 1] = plain[0, 2, 1]
            assert_equal(f"sparse_attention on {run.label}, beside {value}", found, plain)


def check_impossible_keys(run: Runner) -> None:
    """Scores of -inf, those of whole blocks and whole parts too, weigh nothing."""
    for dtype in run.dtypes():
        q, k, v = tensors(dtype, 1, 2, 270, 1, 1, 16)
        q = q.abs() + 0.1
        for low, high in ((0, 130), (200, 270), (269, 270)):
            some = k.clone()
            some[:, low:high] = float("-inf")
            found = run.sparse_attention(q, some, v)
            kept = torch.cat([k[:, :low], k[:, high:]], 1), torch.cat([v[:, :low], v[:, high:]], 1)
            what = f"sparse_attention on {run.label}, keys {low} to {high} impossible"
            assert_close(what, found, exact_attention(q, *kept), eager_attention(q, *kept))


def check_strides(run: Runner) -> None:
    """Slices of fused projections and of one buffer, and misaligned views."""
    for dtype in run.dtypes():
        q, k, v = tensors(dtype, 2, 3, 65, 2, 1, 72)
        wide = poisoned((2, 3, 3, 2, 72), dtype)
        wide[:, :, 1] = q
        both = poisoned((2, 68, 2, 1, 72), dtype)
        both[:, 1:66, 0], both[:, 1:66, 1] = k, v
        compare(run, "views", wide[:, :, 1], both[:, 1:66, 0], both[:, 1:66, 1])
        compare(run, "misaligned", *(misaligned(t) for t in (q, k, v)))


def check_inputs_and_guards(run: Runner) -> None:
    """Nothing behind the last key is read, nothing outside of the output written."""
    for dtype in run.dtypes():
        for queries, keys, dim in ((17, 65, 72), (1, 270, 96), (33, 270, 20)):
            q, k, v = tensors(dtype, 1, queries, keys, 2, 1, dim)
            store = [poisoned((1, keys + 70, 1, dim), dtype) for _ in range(2)]
            k, v = (to[:, :keys].copy_(t) for to, t in zip(store, (k, v), strict=True))
            guarded = Guarded(poisoned(q.shape, dtype))
            inputs = Untouched(q=q, k=store[0], v=store[1])
            compare(run, "guarded", q, k, v, out=guarded.tensor)
            guarded.assert_intact(f"sparse_attention on {run.label}")
            inputs.check(f"sparse_attention on {run.label}")


def check_samples_are_apart(run: Runner) -> None:
    for dtype in run.dtypes():
        given = tensors(dtype, 3, 6, 70, 2, 1, 72)
        compare(run, "three samples", *given)
        for b in range(3):
            compare(run, f"sample {b}", *(t[b : b + 1] for t in given))


def check_repeats(run: Runner) -> None:
    for dtype in run.dtypes():
        q, k, v = tensors(dtype, 1, 3, 270, 1, 1, 72)
        first = run.sparse_attention(q, k, v)
        for i in range(3):
            again = run.sparse_attention(q, k, v)
            assert_equal(f"sparse_attention on {run.label}, repeat {i}", again, first)


CHECKS = {name: f for name, f in list(globals().items()) if name.startswith("check_")}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
def test_sparse_attention(check, runner):
    check(runner)


@pytest.mark.parametrize(("batch", "queries"), [(0, 3), (2, 0)])
def test_nobody_asks(batch, queries, runner):
    q, k, v = tensors(torch.bfloat16, batch, queries, 4, 2, 1, 16)
    assert runner.sparse_attention(q, k, v).shape == q.shape


# --- what is refused


Q, K = torch.zeros(2, 3, 4, 8), torch.zeros(2, 5, 2, 8)
WRONG = {
    "q of rank 3": ({"q": Q[0]}, "q", "[B, Q, H, d]"),
    "q of integers": ({"q": Q.int()}, "q", "floating"),
    "q not a tensor": ({"q": None}, "q", "[B, Q, H, d]"),
    "q heads apart": ({"q": torch.zeros(2, 3, 8, 8)[:, :, ::2]}, "q", "a stride of 8"),
    "q transposed": ({"q": torch.zeros(2, 3, 8, 4).mT}, "q", "last stride"),
    "q too wide": ({"q": torch.zeros(1, 1, 1, 257)}, "q", "1 to 256"),
    "k dtype": ({"k": K.half()}, "k", "torch.float32"),
    "k device": ({"k": K.to("meta")}, "k", "cpu"),
    "k batch": ({"k": K[:1]}, "k", "shape [2,"),
    "k width": ({"k": torch.zeros(2, 5, 2, 9)}, "k", "[2, S, G, 8]"),
    "k heads": ({"k": torch.zeros(2, 5, 3, 8)}, "k", "divisor of the 4 heads"),
    "no keys": ({"k": K[:, :0], "v": K[:, :0]}, "k", "S at least 1"),
    "v shape": ({"v": K[:, :4]}, "v", "[2, 5, 2, 8]"),
    "scale NaN": ({"scale": float("nan")}, "scale", "finite"),
    "scale a text": ({"scale": "0.1"}, "scale", "finite"),
}


@pytest.mark.parametrize("case", WRONG)
def test_it_names_what_is_wrong(case):
    changes, name, accepted = WRONG[case]
    with pytest.raises(ArgumentError) as error:
        ops.sparse_attention(**{"q": Q, "k": K, "v": K} | changes)
    assert str(error.value).startswith(f"{name}: got")
    assert accepted in str(error.value)


# --- who serves it


def test_it_is_torch_unless_another_is_named(monkeypatch):
    """To the bit."""
    q, k, v = tensors(torch.bfloat16, 2, 3, 9, 4, 2, 64)
    for backend in (None, "reference"):
        assert_equal(
            f"{backend}", ops.sparse_attention(q, k, v, backend=backend), eager_attention(q, k, v)
        )
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendError, match="'triton' cannot run sparse_attention"):
        ops.sparse_attention(q, k, v, backend="triton")


def test_the_kernel_refuses_heads_too_wide_for_fp32():
    q, k = torch.zeros(1, 1, 1, 129), torch.zeros(1, 2, 1, 129)
    with pytest.raises(BackendError, match=r"d of 129: .* up to 128"):
        TRITON.sparse_attention(q, k, k, 1.0, torch.empty_like(q))


class Told:
    """A tensor's attributes, on a device that is not here."""

    def __init__(self, t: Tensor):
        self.shape, self.dtype, self.itemsize = t.shape, t.dtype, t.itemsize
        self.device = torch.device("cuda", 0)


def test_the_kernel_runs_unasked_only_at_sizes_where_it_was_measured(monkeypatch):
    q, k, _ = (Told(t) for t in tensors(torch.bfloat16, 1, 3, 9, 4, 2, 64))
    monkeypatch.setattr(TRITON, "supports", lambda *question: None, raising=False)
    monkeypatch.setattr(table, "arch", lambda device: 90)
    assert not TRITON.outruns_torch(q, k)
    entry = {attention_key(q.shape, k.shape, 90): Launch(64, 64, 4)}
    monkeypatch.setattr(table, "TABLE", entry)
    assert TRITON.outruns_torch(q, k)
    monkeypatch.setattr(TRITON, "supports", lambda *question: "not installed", raising=False)
    assert not TRITON.outruns_torch(q, k)
    monkeypatch.setattr(TRITON, "supports", lambda *question: None, raising=False)
    for shape in ((1, 4, 4, 64), (2, 3, 4, 64), (1, 3, 8, 64), (1, 3, 4, 72)):
        other = Told(torch.empty(shape, dtype=torch.bfloat16))
        assert not TRITON.outruns_torch(other, k)
    assert not TRITON.outruns_torch(q, Told(torch.empty(1, 8, 2, 64)))
    assert not TRITON.outruns_torch(Told(torch.empty(q.shape)), k)
    monkeypatch.setattr(table, "arch", lambda device: 80)
    assert not TRITON.outruns_torch(q, k)


def test_the_processors_kernel_runs_unasked_only_where_it_was_measured(monkeypatch):
    q, k, v = tensors(torch.float32, 2, 40, 200, 4, 2, 64)
    usable = "avx512" in _C.build_info()["isas"]
    assert CPU.outruns_torch(q, k) == usable
    stock = eager_attention(q, k, v)
    found = ops.sparse_attention(q, k, v)
    assert torch.equal(found, ops.sparse_attention(q, k, v, backend="cpu")) == usable
    assert torch.equal(found, stock) != usable
    for other in (q.bfloat16(), q.double(), q[:, :9]):
        assert not CPU.outruns_torch(other, k)
    assert not CPU.outruns_torch(q, k[:, :9])
    assert not CPU.outruns_torch(*(t.repeat(1, 1, 1, 3) for t in (q, k)))
    _C.set_isa("base")
    assert not CPU.outruns_torch(q, k)
    assert torch.equal(ops.sparse_attention(q, k, v), stock)
    _C.set_isa("auto")


def test_gradients_are_those_of_torch():
    ours, stock = (
        [t.requires_grad_() for t in tensors(torch.float64, 1, 3, 5, 2, 1, 8)] for _ in range(2)
    )
    ops.sparse_attention(*ours, scale=0.3).square().sum().backward()
    eager_attention(*stock, scale=0.3).square().sum().backward()
    for a, b in zip(ours, stock, strict=True):
        assert torch.equal(a.grad, b.grad)


# --- how the work is shared


@pytest.mark.parametrize("slots", [1, 2, 7, 132, 264])
def test_shared_work_is_done_once_and_no_later(slots):
    """Lower bound: all work spread evenly. Upper: one program for each tile."""
    for tiles in (1, 3, 24, 131, 132, 133, 288, 608):
        for blocks in (1, 2, 9, 72):
            whole, parts = waves(tiles, blocks, slots)
            assert 0 <= whole <= tiles
            assert 1 <= parts <= blocks
            assert whole % slots == 0 or whole == tiles
            assert (parts == 1) == (whole == tiles)
            shared = -(-(tiles - whole) * parts // slots) * -(-blocks // parts)
            found = -(-whole // slots) * blocks + shared
            assert tiles * blocks / slots <= found <= -(-tiles // slots) * blocks


def test_the_last_wave_is_nearly_full_where_it_was_nearly_empty():
    """FLUX with a quarter of the image tokens: 288 tiles of 72 blocks on 132 processors."""
    assert waves(288, 72, 132) == (264, 5)
    assert waves(264, 72, 132) == (264, 1)
    assert waves(1, 72, 132)[1] > 20  # a single tile goes to many
