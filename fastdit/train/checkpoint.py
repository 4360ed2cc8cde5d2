"""A training on disk: one safetensors file with JSON facts in its header, from which the same training goes on."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastdit import files
from fastdit.errors import ArgumentError
from fastdit.schedules.schedule_file import MAX_FILE_BYTES, expect

if TYPE_CHECKING:
    from fastdit.train.harmonica import HarmoniCa

STATE = "state.safetensors"


def save(training: HarmoniCa, folder: Path) -> None:
    """The first process writes the training's state; the file is replaced only when the new one is complete."""
    if training.ranks.rank == 0:
        from safetensors.torch import save

        plain = {name: t.cpu().contiguous().clone() for name, t in _tensors(training).items()}
        files.make_folder(folder, "folder")
        new = folder / f"{STATE}.new"
        # Not `save_file`, whose files nobody but their owner may read.
        new.write_bytes(save(plain, {"fastdit": _facts(training)}))
        os.replace(new, folder / STATE)
    training.ranks.wait()


def resume(training: HarmoniCa, folder: Path) -> None:
    """The training goes on from what the folder holds, if it holds anything.

    Raises:
        ArgumentError: The folder holds a training with other settings, or a damaged one.
    """
    from safetensors import SafetensorError, safe_open

    if not (path := folder / STATE).exists():
        return
    try:
        files.check_regular(path, MAX_FILE_BYTES)
        with safe_open(str(path), framework="pt") as file:
            facts = files.parse((file.metadata() or {}).get("fastdit", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        expect(facts, "its metadata", {"epoch": int, "settings": dict, "conditions": dict})
        _check_same(facts, json.loads(_facts(training)))
        _take(training, facts["epoch"], tensors)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ArgumentError(
            f"folder {str(folder)!r} holds no {STATE} to go on from: {error}"
        ) from error


def _tensors(training: HarmoniCa) -> dict[str, Tensor]:
    tensors = {"weights": training.weights, "generator": training.generator.get_state()}
    tensors["beta"] = torch.tensor(training.beta, dtype=torch.float64)
    for step, logits in enumerate(training.logits):
        tensors[f"logits.{step}"] = logits.detach()
        for name, value in training.optimizer.state.get(logits, {}).items():
            tensors[f"optimizer.{name}.{step}"] = value
    return tensors


def _facts(training: HarmoniCa) -> str:
    facts = {"epoch": training.epoch, "settings": asdict(training.settings)}
    facts["conditions"] = training.conditions.facts
    return json.dumps(facts, sort_keys=True)


def _check_same(facts: dict[str, Any], now: dict[str, Any]) -> None:
    facts["settings"].setdefault("order", 0)  # older files name none
    # More epochs than last time are a longer training, not another one.
    for found in (facts, now):
        found["settings"].pop("epochs", None)
    if different := [
        name
        for part in ("settings", "conditions")
        for name in now[part]
        if now[part][name] != facts[part].get(name)
    ]:
        raise ArgumentError(
            f"it is of a training with other {', '.join(different)}: give these again, or another folder"
        )


def _take(training: HarmoniCa, epoch: int, tensors: dict[str, Tensor]) -> None:
    """The training takes over what a file says, once all of it is seen to be what a training leaves."""
    wanted = {name: tensor.cpu() for name, tensor in _tensors(training).items()}
    for step, logits in enumerate(training.logits):
        if logits.requires_grad:
            moments = {"step": torch.zeros(()), "exp_avg": logits, "exp_avg_sq": logits}
            wanted |= {f"optimizer.{key}.{step}": like for key, like in moments.items()}
    if epoch < 1:
        raise ValueError(f"its epoch must be at least 1, got {epoch}")
    if wrong := sorted(set(tensors) ^ set(wanted)):
        raise ValueError(f"it must have exactly the tensors of a training, not so are {wrong}")
    for name, like in wanted.items():
        found = tensors[name]
        if found.shape != like.shape or found.dtype != like.dtype or not found.isfinite().all():
            raise ValueError(
                f"{name} must be finite, {like.dtype} of shape {tuple(like.shape)}, "
                f"got {found.dtype} of shape {tuple(found.shape)}"
            )
    training.generator.set_state(tensors["generator"])
    training.epoch, training.weights = epoch, tensors["weights"]
    training.beta = float(tensors["beta"])
    with torch.no_grad():
        for step, logits in enumerate(training.logits):
            logits.copy_(tensors[f"logits.{step}"])
    for name in wanted:
        if name.startswith("optimizer."):
            _, key, step = name.split(".")
            logits = training.logits[int(step)]
            place = "cpu" if key == "step" else logits.device
            training.optimizer.state[logits][key] = tensors[name].to(place)
