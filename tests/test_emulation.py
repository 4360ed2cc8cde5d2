"""The emulator of CUDA kernels itself: right kernels pass, and each way to be wrong shows."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch

from emulated import CSRC, FLAGS, unavailable

PROBE = Path(__file__).with_name("emulation_probe.cu")
pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))


def compiled(folder: Path, *defines: str):
    """The probe with parts left out: (input, blocks, threads) -> (output, what went wrong)."""
    library = folder / "probe.so"
    options = [f"-I{CSRC}", *(f"-D{name}" for name in defines)]
    command = ["g++", *FLAGS, *options, "-shared", "-x", "c++", str(PROBE), "-o", str(library)]
    subprocess.run(command, check=True)
    function = ctypes.CDLL(str(library)).run_probe
    function.restype = ctypes.c_char_p
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int]

    def run(x: torch.Tensor, blocks: int, threads: int) -> tuple[torch.Tensor, str | None]:
        out = torch.full_like(x, float("nan"))
        failure = function(x.data_ptr(), out.data_ptr(), blocks, threads)
        return out, failure and failure.decode()

    return run


def expected(x: torch.Tensor, blocks: int, threads: int) -> torch.Tensor:
    tiles = x.view(blocks, threads, 4).flip(1)
    sums = tiles[..., 0].view(blocks, -1, 32).sum(2, keepdim=True).expand(-1, -1, 32)
    return (tiles + sums.reshape(blocks, threads, 1)).flatten()


def whole_numbers(count: int) -> torch.Tensor:
    """Sums of these are exact in any order."""
    return torch.randint(0, 100, (count,)).float()


@pytest.mark.parametrize("threads", [32, 96, 1024])
def test_a_right_kernel_is_right(threads, tmp_path):
    x = whole_numbers(3 * threads * 4)
    found, failure = compiled(tmp_path)(x, 3, threads)
    assert failure is None
    assert torch.equal(found, expected(x, 3, threads))


WRONG = ("NO_BARRIER", "NO_WAIT", "WRONG_LANE")
IMPOSSIBLE = {
    "DIVERGENT_BARRIER": "not all threads reach",
    "PARTIAL_WARP": "not all threads reach",
    "MISALIGNED": "misaligned address",
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_kernel_is_wrong(fault, tmp_path):
    x = whole_numbers(4 * 128 * 4)
    found, failure = compiled(tmp_path, fault)(x, 4, 128)
    assert failure is None
    assert not torch.equal(found, expected(x, 4, 128))


@pytest.mark.parametrize("fault", IMPOSSIBLE)
def test_what_a_gpu_would_not_do_is_an_error(fault, tmp_path):
    _, failure = compiled(tmp_path, fault)(whole_numbers(2 * 128 * 4 + 4), 2, 128)
    assert failure is not None
    assert IMPOSSIBLE[fault] in failure


@pytest.mark.parametrize(
    ("threads", "message"), [(48, "without all 32 lanes"), (1025, "more than 1024 threads")]
)
def test_a_block_of_a_wrong_size_is_an_error(threads, message, tmp_path):
    _, failure = compiled(tmp_path)(whole_numbers(threads * 4), 1, threads)
    assert failure is not None
    assert message in failure


FAULTS = {
    test_a_wrong_kernel_is_wrong: WRONG,
    test_what_a_gpu_would_not_do_is_an_error: tuple(IMPOSSIBLE),
}
