"""The processes of one training, as torchrun or accelerate start them; alone where nobody started several.

The learned table is small and every process holds all of it, so averaging its gradients is the whole of data
parallelism here.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastdit.cli import launch
from fastdit.errors import ArgumentError


class Ranks:
    """This is one process among its peers.

    Attributes:
        rank, count: Which one this is, and of how many.
    """

    def __init__(self) -> None:
        several = launch.number("WORLD_SIZE", 1) > 1
        if several and dist.is_available() and not dist.is_initialized():
            launch.join("nccl" if torch.cuda.is_available() else "gloo")
        self._together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self._together else 0
        self.count = dist.get_world_size() if self._together else 1

    def mean(self, tensor: Tensor, device: Any) -> Tensor:
        """All processes get their mean, the same bits in each; `device` is one that they can talk through."""
        if self.count == 1:
            return tensor
        shared = tensor.to(device, copy=True)
        dist.all_reduce(shared)
        return (shared / self.count).to(tensor.device)

    def share(self, values: list[Any]) -> list[Any]:
        """This process takes its part of a batch."""
        size = len(values) // self.count
        return values[self.rank * size : (self.rank + 1) * size]

    def wait(self) -> None:
        """This waits until all are here."""
        if self.count > 1:
            dist.barrier()


def take_device() -> None:
    """This makes the GPU that the launcher gave the process the one that "cuda" means.

    Raises:
        ArgumentError: There is no such GPU.
    """
    index = launch.number("LOCAL_RANK", 0)
    if torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        if index >= (count := torch.cuda.device_count()):
            raise ArgumentError(
                f"the environment variable LOCAL_RANK must be below the {count} GPUs there are, got {index}"
            )
        torch.cuda.set_device(index)
