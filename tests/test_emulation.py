"""The emulator of CUDA kernels itself: right kernels pass, and each way to be wrong shows."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch

from emulated import CSRC, FLAGS, unavailable

PROBE = Path(__file__).with_name("emulation_probe.cu")
pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(unavailable() is not None, reason=str(unavailable())),
]


def compiled(folder: Path, *defines: str, kernel: str = "probe"):
    """A kernel with parts left out: (input, blocks, threads) -> (output, what went wrong)."""
    library = folder / "probe.so"
    options = [f"-I{CSRC}", *(f"-D{name}" for name in defines)]
    command = ["g++", *FLAGS, *options, "-shared", "-x", "c++", str(PROBE), "-o", str(library)]
    subprocess.run(command, check=True)
    function = getattr(ctypes.CDLL(str(library)), f"run_{kernel}")
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


def expected_counts(x: torch.Tensor, blocks: int, threads: int) -> torch.Tensor:
    values = x.view(blocks, threads, 4)[..., 0]
    warps = values.view(blocks, -1, 32)
    votes = (warps >= 50).float()
    below = votes.cumsum(2) - votes
    digits = values % 10
    same = (digits[:, :, None] == digits[:, None, :]).sum(2)
    lanes = (below, votes.sum(2, keepdim=True).expand_as(warps), warps.cumsum(2))
    return torch.stack([*(t.reshape(blocks, threads) for t in lanes), same], 2).flatten()


@pytest.mark.parametrize("threads", [32, 96, 1024])
def test_a_right_count_is_right(threads, tmp_path):
    x = whole_numbers(3 * threads * 4)
    found, failure = compiled(tmp_path, kernel="count")(x, 3, threads)
    assert failure is None
    assert torch.equal(found, expected_counts(x, 3, threads))


WRONG_COUNT = ("NO_COUNT_BARRIER", "OTHER_VOTE", "SHORT_SCAN")


@pytest.mark.parametrize("fault", WRONG_COUNT)
def test_a_wrong_count_is_wrong(fault, tmp_path):
    x = whole_numbers(4 * 128 * 4)
    found, failure = compiled(tmp_path, fault, kernel="count")(x, 4, 128)
    assert failure is None
    assert not torch.equal(found, expected_counts(x, 4, 128))


def test_a_vote_of_part_of_a_warp_is_an_error(tmp_path):
    _, failure = compiled(tmp_path, "PARTIAL_VOTE", kernel="count")(whole_numbers(512), 1, 128)
    assert failure is not None
    assert "not all threads reach" in failure


WRONG = ("NO_BARRIER", "NO_WAIT", "WRONG_LANE")
IMPOSSIBLE = {
    "DIVERGENT_BARRIER": "not all threads reach",
    "PARTIAL_WARP": "not all threads reach",
    "MISALIGNED": "misaligned address",
    "MISALIGNED_STORE": "misaligned address",
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
    test_a_wrong_count_is_wrong: WRONG_COUNT,
    test_a_vote_of_part_of_a_warp_is_an_error: ("PARTIAL_VOTE",),
}
