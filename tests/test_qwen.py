"""Qwen-Image's own forms: reference pictures behind the picture, a condition beside the timestep, layers."""

from __future__ import annotations

import pytest
import torch

import fastdit
import tiny_models
from contract import same_bits
from fastdit import RALU, RAS, ArgumentError, Cached, Schedule
from oracle import Oracle, random_bits

pytestmark = [
    pytest.mark.diffusers,
    pytest.mark.skipif(not tiny_models.HAS_QWEN, reason="its attention was another before"),
]
STEPS = 4


def calls(**more):
    """Two pictures with a reference of half the size each."""
    shapes = [[(1, 4, 8), (1, 4, 4)]] * 2
    for step in range(STEPS):
        given = tiny_models.call("qwen", 2, step=step, width=24)
        yield given | {"img_shapes": shapes} | more


def form(**more):
    model = tiny_models.FAMILIES["qwen"].build()
    given = {name: value for name, value in model.config.items() if name[0] != "_"}
    return tiny_models.randomise(type(model)(**given | more))


@torch.no_grad()
def run(model, given):
    return [model(**one)[0] for one in given]


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({}, {}),
        ({"use_additional_t_cond": True}, {"additional_t_cond": torch.tensor([0, 1])}),
        ({"use_layer3d_rope": True}, {}),
    ],
    ids=["references", "told", "layers"],
)
def test_dense_and_cached_runs_are_bit_equal(config, told):
    model = form(**config)
    given = list(calls(**told))
    dense = run(model, given)
    bits, names = random_bits(model, STEPS, 2)
    with Oracle(model, bits).installed():
        cached = run(model, given)
    for methods, expected in (((), dense), ((Cached(Schedule.from_bits(bits, names)),), cached)):
        handle = fastdit.patch(model, *methods, backend="reference")
        with handle.run(range(STEPS)):
            for found, wanted in zip(run(model, given), expected, strict=True):
                same_bits(found, wanted)
        handle.unpatch()


def reuses_nothing(model, given):
    """A second call that would reuse the first one's outputs has caches of its own."""
    expected = run(model, given)
    handle = fastdit.patch(model, Cached(Schedule.every(2)), backend="reference")
    with handle.run(range(2)):
        for found, wanted in zip(run(model, given), expected, strict=True):
            same_bits(found, wanted)


def test_another_condition_beside_the_timestep_makes_caches_anew():
    model = form(use_additional_t_cond=True)
    told = [torch.tensor([0, 1]), torch.tensor([1, 0])]
    given = [one | {"additional_t_cond": now} for one, now in zip(calls(), told, strict=False)]
    reuses_nothing(model, given)


def test_other_shapes_of_as_many_tokens_make_caches_anew():
    model = form()
    shapes = [[[(1, 4, 8)]] * 2, [[(1, 8, 4)]] * 2]
    given = [
        tiny_models.call("qwen", 2, step=step) | {"img_shapes": one}
        for step, one in enumerate(shapes)
    ]
    reuses_nothing(model, given)


def test_ras_leaves_out_tokens_of_the_picture_alone():
    model = form()
    handle = fastdit.patch(model, RAS(start=1, ratio=0.5, align=1, resets=()))
    with torch.no_grad(), handle.run(range(STEPS)):
        for one in calls():
            handle.advance(model(**one)[0][:, :32])
    report = handle.report()
    assert report.tokens_per_step == (48, 16, 16, 16)
    assert {mask.shape for mask in report.active.values()} == {(2, 4, 8)}


def test_ralu_refuses_references():
    pipe = tiny_models.pipeline("qwen")
    method = RALU((2, 2, 3), (0.2, 0.3, 1.0), (8.0, 2.8, 2.2), 0.0255, 0.3, selector="gradient")
    fastdit.patch(pipe, method)
    given = tiny_models.arguments("qwen", steps=7, height=16, width=24)
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"img_shapes": [[(1, 8, 6), (1, 8, 6)]]}),
        with_kwargs=True,
        prepend=True,
    )
    with pytest.raises(ArgumentError, match="img_shapes must be those of one picture for RALU"):
        pipe(**given)
