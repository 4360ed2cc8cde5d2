"""Settings that were made for one model family are refused on another, and can be lifted off it by name."""

from __future__ import annotations

from dataclasses import replace

import pytest

import fastdit
import tiny_models
from fastdit.methods import ralu, ras
from fastdit.methods.ecad import PRESETS

OTHER = {"sd3": "flux", "flux": "sd3", "lumina": "flux"}
METHODS = {
    **{f"RAS {name}": method for name, method in ras.PRESETS.items()},
    **{f"RALU {name}": method for name, method in ralu.PRESETS.items()},
    **{
        f"ECAD {path.parent.name}/{path.stem}": fastdit.ECAD.preset(path.parent.name, path.stem)
        for path in PRESETS.glob("*/*.json")
    },
}


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].family])
def test_a_preset_is_refused_on_another_family(name):
    method = METHODS[name]
    pipe = tiny_models.pipeline(OTHER[method.family])
    with pytest.raises(fastdit.ScheduleError, match=rf"{method.family} models.*family=None"):
        fastdit.patch(pipe, method)
    if not isinstance(method, fastdit.ECAD):  # whose schedule has the packaged model's blocks
        fastdit.patch(pipe, replace(method, family=None))
        fastdit.patch(tiny_models.pipeline(method.family), method)


def test_a_stage_refuses_the_preset_of_another_family():
    stages = fastdit.PerStage(fastdit.ECAD.preset("tiny", "fast"), None, None)
    with pytest.raises(fastdit.ScheduleError, match="sd3 models"):
        fastdit.patch(tiny_models.pipeline("flux"), fastdit.RALU.preset("flux-4x"), stages)


def test_a_routers_family_can_be_lifted():
    router = fastdit.HarmoniCa.preset("tiny").source
    with pytest.raises(fastdit.ScheduleError, match=r"sd3 model.*family=None"):
        fastdit.patch(tiny_models.pipeline("flux"), fastdit.HarmoniCa(router))
    assert replace(router, family=None).family is None


def test_changed_presets_keep_their_family():
    changed = fastdit.RAS.preset("sd3", ratio=0.25)
    assert changed == replace(fastdit.RAS.preset("sd3"), ratio=0.25)
    assert hash(changed) == hash(fastdit.RAS.preset("sd3", ratio=0.25))
    assert changed.family == "sd3"
    assert fastdit.RAS.preset("flux", family=None) == fastdit.RAS(metric="std")
    assert fastdit.RALU.preset("flux-4x", split=0.1).family == "flux"
    assert fastdit.ECAD.preset("tiny", "fast", resample="sigma").family == "sd3"
    assert fastdit.ECAD.preset("tiny", "fast", family=None).family is None


@pytest.mark.parametrize(
    "schedule", [fastdit.Schedule.every(2), fastdit.Schedule.from_bits([[[1]]], ["ff"])]
)
def test_a_schedule_in_place_of_a_method_is_told_its_method(schedule):
    with pytest.raises(fastdit.ArgumentError, match=r"give fastdit\.Cached\(it\)"):
        fastdit.patch(tiny_models.pipeline("sd3"), schedule)
