"""A part of the tokens under autocast, whose norms may be of another dtype than its products."""

from __future__ import annotations

import pytest
import torch

import fastdit
import tiny_models
from contract import distance
from fastdit import RAS
from tiny_models import sample

pytestmark = pytest.mark.diffusers


class Wide(torch.nn.Module):
    """A norm that gives fp32, as those of torch do under a GPU's autocast."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm
        self.__dict__ |= {"normalized_shape": getattr(norm, "normalized_shape", ())}

    def forward(self, x):
        return self.norm(x.float()).float()


@pytest.mark.parametrize("wide", [False, True], ids=["as they are", "fp32 norms"])
@pytest.mark.parametrize("family", tiny_models.forms("layouts"))
def test_ras_equals_the_stock_model_given_the_same_latents(family, wide):
    model = tiny_models.transformer(family)
    if wide:
        for module in list(model.modules()):
            for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
                if getattr(module, name, None) is not None:
                    setattr(module, name, Wide(getattr(module, name)))
    given = tiny_models.call(family, 2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = sample(model(**given))
        for backend in ("reference", None):
            handle = fastdit.patch(model, RAS(start=1, resets=(), align=1), backend=backend)
            with handle.run(range(3)):
                for _ in range(3):
                    assert distance(sample(model(**given)), expected) <= 1e-2
                    handle.advance()
            assert max(handle.report().tokens_per_step[1:]) < 32
            handle.unpatch()
