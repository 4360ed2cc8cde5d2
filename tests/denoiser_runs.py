"""What becomes of each transformer of diffusers when it is patched, as a row of the support table."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models import transformers
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fastdit
import oracle
from contract import distance, same_bits
from denoisers import ENTRIES, Entry
from fastdit import Cached, Schedule
from fastdit.account.cost import Cost
from fastdit.adapters import find_adapter
from fastdit.adapters.base import Size
from fastdit.adapters.generic import Generic
from snapshot import snapshot
from tiny_models import randomise

STEPS = 4
#: image tokens of the model of usual size whose share is estimated
TOKENS = 1024

Parts = Mapping[str, Mapping[str, str]]


def classes() -> list[str]:
    """The transformers of the installed diffusers."""
    found = vars(transformers).items()
    return sorted(
        name for name, value in found if isinstance(value, type) and issubclass(value, nn.Module)
    )


def parts_of(name: str, model: nn.Module, entry: Entry) -> Parts:
    """Block list -> component -> the module whose output it is, as the oracle reads it."""
    if find_adapter(model, "components").restates:
        return oracle.MODULES[name]
    return {kind: {part: part for part in parts.split()} for kind, parts in entry.parts.items()}


def row(name: str) -> dict[str, Any]:
    """The table's row of a class; nothing is run."""
    entry = ENTRIES[name]
    found: dict[str, Any] = {"class": name}
    if entry.other:
        found["other"] = entry.other
    if entry.refused:
        return found | {"refused": entry.refused}
    with torch.device("meta"):
        tiny = getattr(transformers, name)(**entry.config)
    names = dict.fromkeys(part for parts in parts_of(name, tiny, entry).values() for part in parts)
    found |= {"adapter": find_adapter(tiny, "components").family, "components": [*names]}
    return found if entry.other else found | {"share": round(share(name), 3)}


def share(name: str) -> float:
    """The share of the arithmetic of a model of usual size that is in modules which can be reused.

    Its layers stand for it, those of modulations for none of it, as `fastdit.patch` says of a model without an adapter.
    """
    with torch.device("meta"):
        model = getattr(transformers, name)(**ENTRIES[name].published)
    return Cost(Generic(model), model, Size(TOKENS, 0)).reusable_share


def check_refused(name: str, entry: Entry) -> None:
    """It is refused by name, with the reason that its entry says."""
    with torch.device("meta"):
        model = getattr(transformers, name)(**entry.config)
    with pytest.raises(fastdit.UnsupportedModelError, match=entry.refused) as refused:
        fastdit.patch(model, Cached(Schedule.every(2)))
    assert name in str(refused.value)


def check_served(name: str, monkeypatch: Any, entry: Entry) -> None:
    """Every second step of it equals a plain cache of its modules, reuses something, and nothing stays behind.

    No part of it has the stream in its output.
    """
    model = randomise(getattr(transformers, name)(**entry.config))
    parts = parts_of(name, model, entry)
    monkeypatch.setitem(oracle.MODULES, name, parts)
    calls = [entry.call(step) for step in range(STEPS)]
    with torch.no_grad():
        stock = [tensors(model(**given)) for given in calls]
        before = snapshot(model)
        same(tensors(model(**calls[-1])), stock[-1])
        own = changes(before, snapshot(model))
        before = snapshot(model)
        with oracle.Oracle(model, every_second(model, parts)).installed() as plain:
            expected = [tensors(model(**given)) for given in calls]
    for step in range(1, STEPS, 2):
        for mine, theirs in zip(expected[step], stock[step], strict=True):
            assert distance(mine, theirs) > 1e-4
    handle = patched(model)
    for _ in range(2):  # a second run starts with empty caches
        with torch.no_grad(), handle.run(range(STEPS)):
            for given, wanted in zip(calls, expected, strict=True):
                same(tensors(model(**given)), wanted)
                handle.advance()
        report = handle.report()
        assert plain.reused == plain.computed > 0
        assert (report.computed, report.reused) == (plain.computed, plain.reused)
    str(report)  # with costs, which are counted on a copy
    handle.unpatch()
    assert changes(before, snapshot(model)) <= own
    with torch.no_grad():
        for given, wanted in zip(calls, stock, strict=True):
            same(tensors(model(**given)), wanted)
        check_branches(model, parts, calls[0])


def check_branches(model: nn.Module, parts: Parts, given: dict[str, Any]) -> None:
    """Without weights the parts give zeros: one that added its input to its output would keep an old stream."""
    seen = []
    for kind, names in parts.items():
        for block in operator.attrgetter(kind)(model):
            for path in names.values():
                part = operator.attrgetter(path)(block)
                if part is None:
                    continue
                for parameter in part.parameters():
                    parameter.zero_()
                part.register_forward_hook(lambda *args: seen.extend(tensors(args[-1])))
    model(**given)
    assert seen
    for found in seen:
        assert not found.any()


def patched(model: nn.Module) -> fastdit.Handle:
    """The reference backend has equal bits in families with an adapter too."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*has no adapter")
        return fastdit.patch(model, Cached(Schedule.every(2)), backend="reference")


def every_second(model: nn.Module, parts: Parts, steps: int = STEPS) -> dict[str, np.ndarray]:
    """Block list -> bits [step, block, component] of a schedule that computes all at even steps, and nothing else."""
    found = {}
    for kind, names in parts.items():
        shape = steps, len(operator.attrgetter(kind)(model)), len(names)
        found[kind] = np.broadcast_to((np.arange(steps) % 2 == 0)[:, None, None], shape)
    return found


def tensors(output: Any) -> list[Tensor]:
    """All that a model gives; some give several pictures, or sound too."""
    output = output.to_tuple() if hasattr(output, "to_tuple") else output
    return [part for part in tree_leaves(output) if isinstance(part, Tensor)]


def same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for mine, theirs in zip(actual, expected, strict=True):
        same_bits(mine, theirs)


def changes(before: dict[str, Any], after: dict[str, Any]) -> set[tuple[str, str]]:
    """Where two snapshots of a model differ: (module, attribute). Some models set an attribute in every call."""
    assert before.keys() == after.keys()
    found = {
        (name, key)
        for name in before
        if name != "state"
        for key in before[name]
        if key != "attributes" and before[name][key] != after[name][key]
    }
    for name in before.keys() - {"state"}:
        old, new = (one[name]["attributes"] for one in (before, after))
        found |= {
            (name, key) for key in old.keys() | new.keys() if old.get(key, old) != new.get(key, new)
        }
    return found | {
        ("state", key) for key in before["state"] if before["state"][key] != after["state"][key]
    }
