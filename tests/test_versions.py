"""Whether tensors hold what they held: by torch's count of writes, or by content where nobody counts."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastdit
import tiny_models
from contract import distance
from fastdit.versions import Seen, version


class Watched(TorchDispatchMode):
    """Counts the operations on tensors."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


MODES = [torch.no_grad, torch.inference_mode]


def some():
    return [torch.arange(6.0).view(2, 3), torch.ones(4, dtype=torch.int64)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("index", [0, 1])
def test_a_write_is_seen(mode, index):
    with mode():
        tensors = some()
        seen = Seen(tensors)
        for _ in range(2):
            assert seen.unwritten()
            assert seen.equal(tensors)
        tensors[index].view(-1)[-1:] += 1  # through a view
        assert seen.are(tensors)
        assert not seen.unwritten()
        assert not seen.equal(tensors)
        assert Seen(tensors).unwritten()


def test_a_normal_tensor_written_in_inference_mode_is_seen():
    tensors = some()
    seen = Seen(tensors)
    with torch.inference_mode():
        assert seen.unwritten()
        tensors[0].add_(1)
        assert not seen.unwritten()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("before", MODES)
def test_equal_ones_in_new_memory_take_their_places(before, mode):
    with before():
        old = some()
        seen = Seen(old)
    with mode():
        new = some()
        assert not seen.are(new)
        assert seen.equal(new)
        assert seen.are(new)
        new[1].zero_()
        assert not seen.unwritten()
    with before():  # what the old ones hold no longer matters
        seen = Seen(old)
        assert seen.equal(some())
        old[0].add_(1)
        assert seen.unwritten()


@pytest.mark.parametrize("mode", MODES)
def test_old_ones_written_to_are_never_equal(mode):
    """Even to what they hold now: what was made of them is not."""
    with mode():
        tensors = some()
        seen = Seen(tensors)
        tensors[0].add_(1)
        assert not seen.equal([t.clone() for t in tensors])


@pytest.mark.parametrize(
    "other",
    [
        lambda: some()[:1],
        lambda: [*some(), torch.ones(1)],
        lambda: [some()[0].double(), some()[1]],
        lambda: [some()[0].view(3, 2), some()[1]],
        lambda: [some()[0][:1], some()[1]],
        lambda: [some()[0].to("meta"), some()[1]],
        lambda: [some()[0] + 1, some()[1]],
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_others_are_not_equal(mode, other):
    with mode():
        seen = Seen(some())
        assert not seen.equal(other())


def test_nothing_is_read_of_tensors_whose_writes_are_counted():
    """So nothing waits for a device."""
    tensors = some()
    with Watched() as watched:
        seen = Seen(tensors)
        assert seen.unwritten()
        assert seen.equal(tensors)
        assert watched.count == 0
        assert seen.equal(some())
    assert watched.count > 0
    assert Seen([]).equal([])


def test_versions():
    x = torch.zeros(2)
    assert version(x) == 0
    x.add_(1)
    assert version(x) == 1
    with torch.inference_mode():
        assert version(torch.zeros(2)) is None


@pytest.mark.parametrize("mode", MODES)
def test_pixarts_tables_written_between_calls_are_seen(mode):
    """All blocks' modulations are formed at once, of tables that were taken before."""
    with mode():
        model, stock = (tiny_models.transformer("pixart-sigma", torch.float64) for _ in range(2))
        given = tiny_models.call("pixart-sigma", 2, torch.float64)
        fastdit.patch(model)
        for factor in (1, -2):
            for one in (model, stock):
                one.transformer_blocks[1].scale_shift_table.mul_(factor)
            expected = stock(**given)[0]
            for _ in range(2):
                assert distance(model(**given)[0], expected) <= 1e-12
