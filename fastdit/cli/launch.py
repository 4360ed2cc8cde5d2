"""A launcher such as torchrun says in the environment how its processes find each other."""

from __future__ import annotations

import os
from typing import Any

from fastdit.errors import ArgumentError

#: most threads of a process, and most processes, that may be asked for
MAX_WORKERS = 1024


def number(name: str, default: int) -> int:
    """This reads a whole number of the environment; it is `default` where it is not set.

    Raises:
        ArgumentError: It is something else.
    """
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ArgumentError(f"the environment variable {name} must be a whole number, got {text!r}")
    return int(text)


def join(backend: str, **options: Any) -> None:
    """This process meets the others of the launch.

    Raises:
        ArgumentError: The environment does not say where, or nobody is there.
    """
    import torch.distributed as dist

    try:
        dist.init_process_group(backend, **options)
    except (ValueError, RuntimeError) as error:
        raise ArgumentError(
            f"the processes of the launch could not meet, as the environment variables WORLD_SIZE, RANK, MASTER_ADDR "
            f"and MASTER_PORT say they should: {error}"
        ) from error
