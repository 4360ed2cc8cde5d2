"""Bytes that a step moves beside its products, counted by dispatch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import traffic
from fastdit import ops


def test_traffic_is_what_each_launch_reads_and_writes():
    x, weight = torch.randn(8, 16), torch.randn(16, 16)
    size = x.numel() * x.element_size()
    with traffic.Traffic() as found:
        y = x @ weight  # a product
        z = torch.cat([F.gelu(y), x.view(8, 16)], dim=1)[:, :16]  # 2, and 4 with its result
        z.mul_(2)  # read and written
        torch.empty_like(x).copy_(z)
    assert found.bytes["activations"] == 2 * size
    assert found.bytes["copies"] == 4 * size + 2 * size
    assert found.bytes["other"] == 2 * size
    assert found.launches == 5  # with the product


def test_a_gated_activation_is_read_and_written_once():
    gate, value = torch.randn(1, 6, 32), torch.randn(1, 6, 32)
    for out in (None, gate):
        with traffic.Traffic() as found:
            ops.swiglu(gate, value, out=out)
        assert found.bytes == {"activations": 3 * gate.nbytes}


def test_fused_ops_are_counted_by_the_rows_of_their_call():
    new = {"dtype": torch.float32}
    x, branch = torch.randn(1, 6, 32, **new), torch.randn(1, 6, 32, **new)
    gate, scale, shift = torch.randn(3, 1, 32, **new)
    size, small = x.numel() * 4, gate.numel() * 4
    with traffic.Traffic() as found:
        ops.norm_modulate(x, scale, shift, branch=branch, gate=gate)
    # The stream is read and written, the branch read, the result written, and three modulations read.
    assert found.bytes["fused ops"] == 4 * size + 3 * small
    store = torch.empty(1, 9, 2, 16, **new)  # wider than the call: three more rows
    with traffic.Traffic() as found:
        ops.qkv_prologue(x, x, x, store, store.clone(), store.clone(), norm=None)
    assert found.bytes["fused ops"] == 6 * size
