"""A condition that is another one from some step on: nothing that was made of the old one is reused.

With latents and timestep the same at every step, whatever is reused or left out changes nothing, so each step must
equal the stock model under that step's conditions.
"""

from __future__ import annotations

import pytest
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
from torch.utils._pytree import tree_leaves, tree_map_only

import fastdit
import tiny_models
from contract import distance
from fastdit import RAS, Cached, Schedule
from tiny_models import sample

pytestmark = pytest.mark.diffusers

STEPS, CHANGE = 6, 3
MODES = {"no grad": torch.no_grad, "inference mode": torch.inference_mode}
METHODS = {
    "cached": lambda: Cached(Schedule.every(STEPS)),
    "ras": lambda: RAS(start=1, resets=(), align=1),
}


def changed(family, given):
    """Another value of one condition."""
    if family == "lumina":  # as the pipeline's `scaling_watershed` does
        return {"image_rotary_emb": get_2d_rotary_pos_embed_lumina(8, 16, 16, ntk_factor=1.5)}
    if family == "flux":
        return {"img_ids": given["img_ids"] * 2}
    return {"encoder_attention_mask": given["encoder_attention_mask"].flip(-1)}


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["lumina", "flux", "pixart-sigma"])  # see `changed`
def test_what_a_changed_condition_made_is_not_reused(family, method, backend):
    model = tiny_models.transformer(family, torch.float64)
    before = tiny_models.call(family, 2, torch.float64)
    after = before | changed(family, before)
    given = [before] * CHANGE + [after] * (STEPS - CHANGE)
    with torch.no_grad():
        expected = [sample(model(**arguments)) for arguments in given]
        assert distance(expected[0], expected[-1]) > 1e-4
        handle = fastdit.patch(model, METHODS[method](), backend=backend)
        with handle.run(range(STEPS)):
            for arguments, wanted in zip(given, expected, strict=True):
                assert distance(sample(model(**arguments)), wanted) <= 1e-6
                handle.advance()
    spared = [
        record.reused > 0 or record.tokens < 32 for record in handle.last_run().records.values()
    ]
    assert spared == [step not in (0, CHANGE) for step in range(STEPS)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", tiny_models.one_each(tiny_models.forms("layouts"), -1))
def test_a_prompt_written_in_a_run_is_seen(family, method, mode):
    """As by a callback; nobody counts the writes to tensors made in inference mode."""
    stock, model = (tiny_models.transformer(family, torch.float64) for _ in range(2))
    with MODES[mode]():
        given = {
            name: tree_map_only(torch.Tensor, torch.clone, value)
            for name, value in tiny_models.call(family, 2, torch.float64).items()
        }
        prompt = given[tiny_models.adapter_of(family).embeddings_arguments[0]]
        handle = fastdit.patch(model, METHODS[method]())
        with handle.run(range(STEPS)):
            for step in range(STEPS):
                if step == CHANGE:
                    for tensor in tree_leaves(prompt):
                        tensor.mul_(-1)
                assert distance(sample(model(**given)), sample(stock(**given))) <= 1e-6
                handle.advance()
    assert handle.report().reused > 0 or min(handle.report().tokens_per_step) < 32
