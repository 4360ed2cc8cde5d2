"""Every transformer of the installed diffusers is served as a plain cache of its modules, or refused by name."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
from pathlib import Path

import pytest
import torch
from diffusers.models import transformers

from denoiser_runs import check_refused, check_served, classes, row
from denoisers import ENTRIES
from tiny_models import HAS_QWEN

pytestmark = pytest.mark.diffusers

TABLE = json.loads(
    (Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "supported.json").read_text()
)
INSTALLED = [name for name in ENTRIES if name in classes()]


@pytest.fixture(autouse=True)
def eager():
    """Some models compile their attention, or its mask; that is torch's, and takes long."""
    with torch.compiler.set_stance("force_eager"):
        yield


def test_every_transformer_of_diffusers_has_an_entry():
    missing = set(classes()) - set(ENTRIES)
    assert not missing, f"tests/denoisers.py has no entry for {sorted(missing)}"


@pytest.mark.parametrize("name", INSTALLED)
def test_it_is_served_as_a_plain_cache_or_refused(name, monkeypatch):
    entry, cls = ENTRIES[name], getattr(transformers, name)
    known = inspect.signature(cls.__init__).parameters
    if absent := entry.config.keys() - known.keys():
        pytest.skip(f"this diffusers has an older form of it, without {', '.join(sorted(absent))}")
    if name.startswith("QwenImageT") and not HAS_QWEN:
        pytest.skip("this diffusers has an older form of it, which is told lengths of prompts")
    if entry.refused:
        check_refused(name, entry)
    else:
        check_served(name, monkeypatch, entry)
    if TABLE["diffusers"] == importlib.metadata.version("diffusers"):
        listed = [found for found in TABLE["rows"] if found["class"] == name]
        assert listed == [row(name)], "run tools/supported.py"


def test_most_of_the_arithmetic_of_most_denoisers_can_be_spared():
    found = [listed for listed in TABLE["rows"] if "other" not in listed]
    assert sum("share" in listed for listed in found) >= 62
    assert sum(listed.get("share", 0) >= 0.9 for listed in found) >= 40
