"""The Triton and CUDA kernels on a device: all checks of the ops, graph capture, streams, no waits.

The checks make CPU tensors. `Mirrored` copies the storages behind a call's arguments to a device,
so strides, offsets, guard bands and shared memory stay as they are, calls there, and copies all of
it back.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

import kernel_checks
from fastdit import ops
from fastdit.backends.base import Backend
from fastdit.blocks import products
from fastdit.ops import BACKENDS
from inputs import Runner, checks_of, some_rows
from test_resolution_transition import coarse
from tolerance import assert_close

SHARED = {
    f"{name}-{check}": function
    for name, checks in (
        *((op_file, checks_of(op_file)) for op_file in ops.FILES),
        ("kernels", kernel_checks.CHECKS),
    )
    for check, function in checks.items()
}


class Mirrored:
    """A backend whose ops work on copies of their arguments' storages."""

    name = "mirrored"

    def __init__(self, backend: Backend, device: torch.device):
        self.backend, self.device = backend, device

    def supports(self, op, device, dtype):
        return self.backend.supports(op, self.device, dtype)

    def __getattr__(self, op: str):
        return functools.partial(self._run, op)

    def _run(self, op: str, *arguments) -> None:
        storages: dict[int, tuple[Tensor, Tensor]] = {}

        def there(value):
            if isinstance(value, (list, tuple)):
                return [there(item) for item in value]
            if not isinstance(value, Tensor):
                return value
            storage = value.untyped_storage()
            if storage.data_ptr() not in storages:
                here = torch.empty(0, dtype=torch.uint8).set_(storage)
                storages[storage.data_ptr()] = here, here.to(self.device, copy=True)
            copy = storages[storage.data_ptr()][1].untyped_storage()
            view = torch.empty(0, dtype=value.dtype, device=self.device)
            return view.set_(copy, value.storage_offset(), value.shape, value.stride())

        getattr(self.backend, op)(*there(arguments))
        for here, copy in storages.values():
            here.copy_(copy)


#: where tensors share memory, lie apart in it, or have guards around them
MIRRORED = [name for name in SHARED if name.endswith(("strides", "guards", "cache", "empty"))]


@pytest.mark.parametrize("name", MIRRORED)
def test_a_mirrored_backend_passes_what_the_backend_passes(name):
    """The mirror itself, on the CPU."""
    mirror = Mirrored(BACKENDS["reference"], torch.device("cpu"))
    SHARED[name](Runner(mirror, "mirrored reference"))


def test_all_ops_repeat_themselves():
    """What the tests below compare: a second call on the same inputs writes the same."""
    tensors, call = all_ops(BACKENDS["reference"], torch.device("cpu"))
    start = [t.clone() for t in tensors]
    assert_all_equal(*(results(tensors, call, start) for _ in range(2)))


@pytest.fixture
def device():
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(params=["triton", "cuda"])
def backend(request, device):
    """Each backend of devices; a build for other devices is skipped with its reason."""
    found = BACKENDS[request.param]
    reason = found.supports("gated_residual", device, torch.bfloat16)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHARED)
def test_check(name, backend, device):
    if name.startswith("sparse_attention") and backend.name != "triton":
        pytest.skip("attention is torch's own there")
    SHARED[name](Runner(Mirrored(backend, device), f"{backend.name} on a device"))


def all_ops(backend: Backend, device: torch.device, dtype: torch.dtype = torch.bfloat16):
    """Tensors that a call of each op reads or writes, and a function that makes the calls."""
    x, store, cache = (torch.randn(2, 300, 1152, device=device).to(dtype) for _ in range(3))
    h, branch, out = (torch.randn(2, 120, 1152, device=device).to(dtype) for _ in range(3))
    gate = torch.randn(2, 1152, device=device).to(dtype)
    table = torch.randn(300, 36, device=device)
    # 100 squares over 20 x 20 cells, of which 40 become four: 220 tokens of packed latents.
    generator = torch.Generator().manual_seed(0)
    rows, split = (
        some_rows(2, count, of, generator, torch.int32).to(device)
        for count, of in ((120, 300), (40, 100))
    )
    squares = coarse(2, 10, 10).to(device)
    places = squares.new_empty(2, 220, 3)
    state, eps = (
        torch.randn(2, 400, 64, device=device).to(dtype),
        torch.randn(2, 220, 64).to(device),
    )
    field = state.view(2, 20, 20, 1, 1, 64)
    tokens, finer = (state.new_empty(2, count, 1, 1, 64) for count in (100, 220))
    sums = torch.zeros(2, *x.shape, device=device)
    r = torch.rand((), device=device)
    kept, noted = torch.randn_like(state), torch.rand(4, 2, 400, device=device)
    rate, level, score, levels = *noted[:3], noted[3, 0, :2]
    computed = torch.arange(400, device=device, dtype=torch.int32).expand(2, -1) % 2 - 1

    def call() -> None:
        last = kept.view_as(field)
        backend.token_change(field, last, rate, level, levels, computed, score)
        backend.gated_residual(h, [branch, store], [gate, None], 0, cache, rows, h)
        affine = (gate, gate, None, None, 1e-6, False)
        backend.norm_modulate(x, *affine, h, gate, cache, rows, out)
        # Into out, and into x and cache at the active rows.
        prologue = ("rms", None, None, None, None, 1e-6, table, table)
        heads = [t.unflatten(-1, (16, 72)) for t in (out, x, cache)]
        backend.qkv_prologue(h, h, branch, *heads, rows, 0, 0, *prologue)
        backend.patchify(field, squares, tokens)
        moved = (finer.flatten(2), places)
        numbers = (0.2, 0.9, -0.1, 1.0, True, None)
        backend.resolution_transition(tokens.flatten(2), squares, split, eps, *numbers, *moved)
        backend.unpatchify(finer, places, field)
        backend.collapse([x, store], [gate, None], [1, 0], False, sums)
        backend.blend(h, branch, r, out, gate, None, out)
        backend.swiglu(out, branch, out)

    return (x, store, cache, h, branch, out, state, sums, r, kept, noted), call


def results(tensors, call, start) -> list[Tensor]:
    for t, value in zip(tensors, start, strict=True):
        t.copy_(value)
    call()
    if tensors[0].is_cuda:
        torch.cuda.synchronize()
    return [t.clone() for t in tensors]


def assert_all_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(a, b), f"tensor {index}"


@pytest.mark.gpu
def test_a_captured_graph_replays_with_new_inputs(backend, device):
    tensors, call = all_ops(backend, device)
    call()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for _ in range(3):
        start = [torch.randn_like(t) for t in tensors]
        assert_all_equal(results(tensors, graph.replay, start), results(tensors, call, start))


@pytest.mark.gpu
def test_launches_go_to_the_current_stream(backend, device):
    """Behind a long wait on a side stream, a launch on the default one would read old inputs."""
    tensors, call = all_ops(backend, device)
    start = [torch.randn_like(t) for t in tensors]
    expected = results(tensors, call, start)
    for t in tensors:
        t.zero_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        for t, value in zip(tensors, start, strict=True):
            t.copy_(value)
        call()
    side.synchronize()
    assert_all_equal(list(tensors), expected)


@pytest.mark.gpu
def test_nothing_waits_and_nothing_is_allocated(backend, device):
    _, call = all_ops(backend, device)
    call()  # compiles
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats(device)["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats(device)["allocation.all.allocated"] == before


@pytest.mark.gpu
def test_a_captured_selection_replays_with_new_inputs(backend, device):
    """Steps of a run: the tables go on from replay to replay. Its keys come from the graph's pool."""
    field = torch.randn(2, 64, 64, 2, 2, 16, device=device).to(torch.bfloat16)
    tables = [torch.zeros(2, 4096, dtype=torch.int32, device=device) for _ in range(3)]
    rows = torch.zeros(2, 2048, dtype=torch.int32, device=device)

    def call(drops, age, inverse) -> None:
        backend.token_select(field, drops, age, 600, 0.1, "std", 5, rows, inverse)

    plain = [t.clone() for t in tables]
    call(*plain)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(*tables)
    for t in plain:
        t.zero_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(8):
            field.normal_()
            rows.fill_(-7)
            graph.replay()
            replayed = rows.clone()
            call(*plain)
            found = [replayed, *tables], [rows, *plain]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_all_equal(*found)


@pytest.mark.gpu
def test_captured_gradients_replay_with_new_inputs(backend, device):
    """Their partial sums come from the graph's pool."""
    tensors = [torch.randn(2, 700, 1152, device=device).to(torch.bfloat16) for _ in range(5)]
    grad, fresh, cached, of_fresh, of_cached = tensors
    r, of_r = torch.rand((), device=device), torch.zeros((), device=device)

    def call() -> None:
        backend.blend_backward(grad, fresh, cached, r, None, of_fresh, of_cached, of_r)

    call()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    tensors += [r, of_r]
    for _ in range(3):
        start = [torch.randn_like(t) for t in tensors]
        assert_all_equal(results(tensors, graph.replay, start), results(tensors, call, start))


@pytest.mark.gpu
def test_tensors_of_a_device_that_is_not_current(backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device only")
    tensors, call = all_ops(backend, torch.device("cuda", 1))
    start = [torch.randn_like(t) for t in tensors]
    with torch.cuda.device(1):
        expected = results(tensors, call, start)
    with torch.cuda.device(0):
        assert_all_equal(results(tensors, call, start), expected)
        assert torch.cuda.current_device() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_the_gelu_of_a_product_is_the_one_by_tanh(dtype, device):
    """What `fastdit/blocks/products.py` trusts torch to do there."""
    assert products.gelu_of_products(device) == "tanh"
    module, gelu = torch.nn.Linear(256, 1024).to(dtype), torch.nn.GELU(approximate="tanh")
    x = torch.randn(2, 700, 256).to(dtype)
    exact = gelu(module.double()(x.double()))
    module.to(device, dtype)
    stock = gelu(module(x.to(device))).cpu()
    actual = products.activated(module, gelu, x.to(device)).cpu()
    assert_close("activated", actual, exact, stock)
