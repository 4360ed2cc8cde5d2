"""Training checkpoints as one safetensors file of tensors and one JSON file of numbers.

Saves and loads named tensors, an optimiser's moments and plain scalars. It never pickles,
so reading a checkpoint cannot execute code; it does not know what is being trained.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialize

from fastdit import files
from fastdit.errors import ArgumentError

MAX_FILE_BYTES = 1 << 30


def save(folder: str | Path, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    """This writes a checkpoint, replacing an earlier one only when the new one is complete.

    Parameters
    ----------
    folder : str or Path
        Created if missing; holds ``state.safetensors`` and ``state.json``.
    tensors : dict
        Named tensors of any dtype.
    facts : dict
        Whatever JSON can hold: counters, times, settings.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plain = {name: value.detach().contiguous().clone() for name, value in tensors.items()}
    # Not `save_file`, whose files nobody but their owner may read.
    (folder / "state.safetensors.new").write_bytes(serialize(plain))
    (folder / "state.json.new").write_text(json.dumps(facts, indent=1))
    os.replace(folder / "state.safetensors.new", folder / "state.safetensors")
    os.replace(folder / "state.json.new", folder / "state.json")


def load(folder: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """This reads what :func:`save` wrote, or gives ``None`` if there is no checkpoint.

    Raises
    ------
    ArgumentError
        If there is one that cannot be read.
    """
    folder = Path(folder)
    if not (folder / "state.safetensors").exists() or not (folder / "state.json").exists():
        return None
    try:
        facts = files.parse(files.read_text(folder / "state.json", MAX_FILE_BYTES))
        if not isinstance(facts, dict):
            raise ValueError(f"state.json must be an object, got {type(facts).__name__}")
        files.check_regular(folder / "state.safetensors", MAX_FILE_BYTES)
        return load_file(str(folder / "state.safetensors")), facts
    except (OSError, ValueError, SafetensorError) as error:
        raise ArgumentError(f"{folder} holds no checkpoint that can be read: {error}") from error


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: dict[torch.nn.Parameter, str]
) -> dict[str, torch.Tensor]:
    """This names an optimiser's per-parameter state ``optimizer.<state>.<parameter>``."""
    found: dict[str, torch.Tensor] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            found[f"optimizer.{key}.{names[parameter]}"] = torch.as_tensor(value)
    return found


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, torch.Tensor],
    names: dict[torch.nn.Parameter, str],
) -> None:
    """This puts the state named by :func:`optimizer_tensors` back into ``optimizer``."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    parameters = {name: parameter for parameter, name in names.items() if id(parameter) in held}
    for full_name, value in tensors.items():
        if full_name.startswith("optimizer."):
            _, key, name = full_name.split(".", 2)
            if name in parameters:
                optimizer.state[parameters[name]][key] = value.clone()
