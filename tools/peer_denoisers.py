"""diffusers' own tiny models of its transformers: each equals a plain cache of its modules, or is refused by name.

This is what tests/test_denoisers.py says of models and inputs that were made there, repeated with those that diffusers'
tests are made of. A file of pytest, run by tools/peer_tests.py with the folder of those tests in PEER_TESTS. Which
modules are wrapped, and what is refused, stands in tests/denoisers.py alone.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

FOLDER = Path(os.environ["PEER_TESTS"])
sys.path[:0] = [str(FOLDER), str(Path(__file__).resolve().parents[1] / "tests")]

from denoiser_runs import check_refused, check_served, classes  # noqa: E402
from denoisers import ENTRIES, Entry  # noqa: E402
from fastdit.adapters import find_adapter  # noqa: E402
from fastdit.adapters.generic import Generic  # noqa: E402

_PLACE = "tests.models.transformers"


def configurations() -> Iterator[tuple[str, type]]:
    """(class of the transformer, what diffusers' tests build one from)."""
    base = importlib.import_module("tests.models.testing_utils").BaseModelTesterConfig
    for path in sorted((FOLDER / _PLACE.replace(".", "/")).glob("test_*.py")):
        module = importlib.import_module(f"{_PLACE}.{path.stem}")
        for made in vars(module).values():
            own = isinstance(made, type) and made.__module__ == module.__name__
            # Those with tests in them are the same with more.
            if own and issubclass(made, base) and not made.__name__.startswith("Test"):
                cls = made().model_class
                if cls.__name__ in ENTRIES:
                    yield cls.__name__, made


FOUND = list(configurations())


def entry_of(name: str, made: type) -> Entry:
    """The class's entry with diffusers' own configuration, and its inputs with other latents and times at each step."""
    entry, config = ENTRIES[name], made().get_init_dict()
    with torch.device("meta"):
        model = made().model_class(**config)
    adapter = Generic(model) if entry.other else find_adapter(model, "components")
    told = inputs_of(name, made)

    def call(step: int) -> dict[str, Any]:
        draw = torch.Generator().manual_seed(step)

        def noise(t: Tensor) -> Tensor:
            return torch.randn(t.shape, generator=draw).to(t.dtype) if t.is_floating_point() else t

        def earlier(t: Tensor) -> Tensor:
            return (t * (0.9 - 0.1 * step)).to(t.dtype)

        given = dict(told)
        for argument, change in ((adapter.image_argument, noise), (adapter.time_argument, earlier)):
            if argument in given:
                given[argument] = tree_map_only(Tensor, change, given[argument])
        return given

    return dataclasses.replace(entry, config=config, call=call)


def inputs_of(name: str, made: type) -> dict[str, Any]:
    """The inputs of a denoising step; a test without them for the model that it builds is of something else."""
    told, config = made().get_dummy_inputs(), made().get_init_dict()
    try:
        with torch.no_grad():
            made().model_class(**config)(**told)
    except Exception as error:
        pytest.skip(
            f"stock {name} does not run on these inputs here: {' '.join(str(error).split())}"
        )
    if hasattr(
        made, "get_dummy_generation_inputs"
    ):  # that call has filled a cache of keys and values
        told = made().get_dummy_generation_inputs(told["kv_cache"])
    return told


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """Some models compile their attention, or its mask; that is torch's, and takes long."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize(("name", "made"), FOUND, ids=[f"{n}-{c.__name__}" for n, c in FOUND])
def test_it_is_served_as_a_plain_cache_or_refused(
    name: str, made: type, monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    entry = ENTRIES[name]
    if entry.refused:
        check_refused(name, dataclasses.replace(entry, config=made().get_init_dict()))
        record_property("became", f"refused by name: {entry.refused}")
    else:
        check_served(name, monkeypatch, entry_of(name, made))
        record_property("became", "served: reuses, equals the plain cache, and is undone exactly")


@pytest.mark.parametrize("name", sorted(set(classes()) - {name for name, _ in FOUND}))
def test_diffusers_builds_it_in_its_tests(name: str) -> None:
    pytest.skip("the tests that were fetched build none by itself")
