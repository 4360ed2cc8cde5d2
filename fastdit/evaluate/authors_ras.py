"""RAS as its authors publish it (microsoft/RAS), as a context manager that a pipeline draws inside.

It runs through their own function, which puts a scheduler, a forward and attention processors into a pipeline, with the
settings of their scripts. It keeps all its state in one object of the module, and draws one square picture at a time.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from fastdit.evaluate.peers import Opened, Refused, as_it_was

NAME = "microsoft RAS"
#: shares of tokens that a step computes
SAMPLED = (0.5, 0.25)


@dataclass(frozen=True)
class Published:
    """How the authors of RAS run it on a family.

    Attributes:
        module, update: Where the function is that puts it into a pipeline.
        resets: Steps that compute all tokens, as in their scripts; so do the first four.
        high: Of the tokens left out, the share whose metric is high.
    """

    module: str
    update: str
    resets: tuple[int, ...]
    high: float


RAS = {
    "StableDiffusion3Pipeline": Published(
        "ras.utils.stable_diffusion_3.update_pipeline_sd3", "update_sd3_pipeline", (12, 20), 0.3
    ),
    "LuminaPipeline": Published(
        "ras.utils.lumina_next_t2i.update_pipeline_lumina", "update_lumina_pipeline", (12, 22), 1.0
    ),
}


def arms_of(pipe: Any, steps: int, sides: tuple[int, int]) -> dict[str, Opened]:
    """RAS as its authors publish it (microsoft/RAS), which draws one square picture at a time.

    Args:
        sides: Of the picture, in pixels.

    Raises:
        Refused: It is not installed, or does not run on the model.
    """
    if importlib.util.find_spec("ras") is None:
        raise Refused("microsoft/RAS is not installed")
    how = next((RAS[cls.__name__] for cls in type(pipe).__mro__ if cls.__name__ in RAS), None)
    if how is None:
        raise Refused(f"it patches {' and '.join(RAS)}, not {type(pipe).__name__}")
    if sides[0] != sides[1]:
        raise Refused(f"it numbers the tokens of square pictures, got {sides[0]} x {sides[1]}")
    blocks = getattr(pipe.transformer, "transformer_blocks", ())
    if any(block.attn.norm_q is not None for block in blocks):
        raise Refused(
            "it norms queries and keys before their heads are parted, and this model norms each head"
        )
    return {
        f"microsoft RAS {ratio:g}": functools.partial(
            running, how=how, steps=steps, sides=sides, ratio=ratio
        )
        for ratio in SAMPLED
    }


@contextmanager
def running(
    pipe: Any, how: Published, steps: int, sides: tuple[int, int], ratio: float
) -> Iterator[None]:
    """Inside, a pipeline has it."""
    from ras.utils.ras_manager import MANAGER

    settings = SimpleNamespace(
        patch_size=pipe.transformer.config.patch_size,
        height=sides[0],
        width=sides[1],
        num_inference_steps=steps,
        sample_ratio=ratio,
        scheduler_start_step=4,
        scheduler_end_step=steps,
        error_reset_steps=",".join(str(step) for step in how.resets if step < steps) or "0",
        metric="std",
        high_ratio=how.high,
        skip_num_step=0,
        skip_num_step_length=0,
        replace_with_flash_attn=False,
        enable_index_fusion=False,
    )
    before = dict(vars(MANAGER))
    with as_it_was(pipe):
        try:
            MANAGER.vae_size = pipe.vae_scale_factor
            with contextlib.redirect_stdout(io.StringIO()):
                MANAGER.set_parameters(settings)
            getattr(importlib.import_module(how.module), how.update)(pipe)
            pipe.stock_scheduler = pipe.scheduler  # of which an arm puts one in
            yield
        finally:
            vars(MANAGER).clear()
            vars(MANAGER).update(before)
