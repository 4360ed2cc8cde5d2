"""Whether tensors hold what they held: by torch's count of writes, or by content where nobody counts."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastdit
import tiny_models
from contract import distance
from fastdit.versions import same, versions
from tiny_models import sample


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
        before = versions(tensors)
        assert same(tensors, before, tensors)
        tensors[index].view(-1)[-1:] += 1  # through a view
        assert not same(tensors, before, tensors)
        assert same(tensors, versions(tensors), tensors)


def test_a_normal_tensor_written_in_inference_mode_is_seen():
    tensors = some()
    before = versions(tensors)
    with torch.inference_mode():
        assert same(tensors, before, tensors)
        tensors[0].add_(1)
        assert not same(tensors, before, tensors)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("earlier", MODES)
def test_equal_ones_in_new_memory_are_the_same(earlier, mode):
    with earlier():
        old = some()
        before = versions(old)
    with mode():
        assert same(old, before, some())
        assert not same(old, before, [some()[0] + 1, some()[1]])


def test_what_was_written_to_is_no_longer_compared():
    """What it held is gone, so that nothing equals it."""
    old = some()
    before = versions(old)
    old[0].add_(1)
    assert not same(old, before, some())
    assert not same(old, before, [t.clone() for t in old])


@pytest.mark.parametrize(
    "other",
    [
        lambda: some()[:1],
        lambda: [*some(), torch.ones(1)],
        lambda: [some()[0].double(), some()[1]],
        lambda: [some()[0].view(3, 2), some()[1]],
        lambda: [some()[0][:1], some()[1]],
        lambda: [some()[0].to("meta"), some()[1]],
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_tensors_of_another_form_are_others(mode, other):
    with mode():
        old = some()
        assert not same(old, versions(old), other())


def test_nothing_is_read_of_tensors_whose_writes_are_counted():
    """So nothing waits for a device."""
    tensors = some()
    with Watched() as watched:
        assert same(tensors, versions(tensors), tensors)
        assert watched.count == 0
        assert same(tensors, versions(tensors), some())
    assert watched.count > 0


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
            expected = sample(stock(**given))
            for _ in range(2):
                assert distance(sample(model(**given)), expected) <= 1e-12
