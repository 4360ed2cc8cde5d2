"""A family's forward of its whole model in the place of the model's own, for all families that have one."""

from __future__ import annotations

import functools

import pytest
import torch

import fastdit
import tiny_models
from contract import FORWARD_FP64, distance
from fastdit import Cached, Schedule, drift
from fastdit.errors import DriftError
from tiny_models import sample

pytestmark = pytest.mark.diffusers

NAMES = [n for n in tiny_models.forms() if tiny_models.adapter_of(n).restates_model]


@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_computes_something_else_is_refused(name, monkeypatch):
    model, time = tiny_models.transformer(name), tiny_models.adapter_of(name).time_argument
    stock = type(model).forward
    assert fastdit.patch(model).unpatch() is None

    @functools.wraps(stock)
    def forward(self, *args, **given):
        return stock(self, *args, **given | {time: given[time] + 1})

    monkeypatch.setattr(type(model), "forward", forward)
    monkeypatch.setattr(drift, "restated", {})
    with pytest.raises(DriftError, match=rf"{type(model).__name__}\.forward of"):
        fastdit.patch(model)


@pytest.mark.parametrize("name", NAMES)
def test_the_drift_guard_draws_from_no_generator_of_others(name, monkeypatch):
    model = tiny_models.transformer(name)
    monkeypatch.setattr(drift, "restated", {})
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    fastdit.patch(model)
    assert torch.equal(torch.randn(3), expected)


@pytest.mark.skipif("zimage" not in NAMES, reason="its blocks knew no references before")
@torch.no_grad()
def test_a_list_of_pictures_may_lie_in_one_memory_or_in_several():
    """Pipelines give views of one tensor, which need no copy. Others may be in other places, or in another order."""
    model = tiny_models.transformer("zimage", torch.float64)
    given = [tiny_models.call("zimage", 3, torch.float64, step=step) for step in range(4)]
    forms = {
        "views": lambda x: x,
        "copies": lambda x: [each.clone() for each in x],
        "backwards": lambda x: x[::-1],
        "with gaps": lambda x: list(torch.stack([x[0], *x]).unbind())[1:],
        "one thrice": lambda x: [x[0]] * 3,
    }
    expected = {
        form: [sample(model(**one | {"x": lay(one["x"])})) for one in given]
        for form, lay in forms.items()
    }
    handle = fastdit.patch(model, Cached(Schedule.every(1)))
    for form, lay in forms.items():  # by the programs of those before
        with handle.run(range(4)):
            for one, wanted in zip(given, expected[form], strict=True):
                found = sample(model(**one | {"x": lay(one["x"])}))
                assert distance(found, wanted) <= FORWARD_FP64, form
