"""Modular pipelines: patched whole they draw what they drew, and a schedule is a plain cache of their transformer.

Their blocks are given the pipeline as an argument, and a guider may call the transformer any number of times at one
place in the code.
"""

from __future__ import annotations

import importlib

import diffusers
import pytest
import torch

import fastdit
import oracle
import tiny_models
from contract import RUN_FP64, distance, same_bits
from denoiser_runs import every_second
from denoisers import ENTRIES
from fastdit import RAS, Cached, Schedule
from oracle import Oracle, random_bits
from ras_oracle import RowOracle, random_rows
from test_ras import Chosen, chosen  # noqa: F401
from tiny_models import TEXT

pytestmark = pytest.mark.diffusers
STEPS = 6
SIZE = {"height": 8, "width": 16}


def told(*shape, seed=7, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)


class Modular:
    """A modular pipeline without what encodes and decodes.

    Args:
        family: The module that has its blocks, and their class.
        parts: Its components.
        given: Arguments of its call.
        calls: Transformer calls of a step.
    """

    def __init__(self, family, parts, given, calls=1):
        try:
            module = importlib.import_module(f"diffusers.modular_pipelines.{family[0]}")
            blocks = getattr(module, family[1])()
        except (ImportError, AttributeError):
            pytest.skip(f"this diffusers has no {family[1]}")
        for name in list(blocks.sub_blocks):
            if "encoder" in name or name in ("decode", "prompt_upsampler"):
                blocks.sub_blocks.pop(name)
        self.pipe = blocks.init_pipeline()
        self.pipe.update_components(**parts)
        # What an autoencoder would say, which is not there: a latent pixel is a pixel.
        self.pipe.__class__ = type(
            type(self.pipe).__name__, (type(self.pipe),), {"vae_scale_factor": 1}
        )
        self.given, self.calls, self.model = given, calls, parts["transformer"]

    def draw(self, seed=0, **more):
        noise = torch.Generator().manual_seed(seed)
        given = {"num_inference_steps": STEPS, "generator": noise, "output": "latents"}
        return self.pipe(**given | self.given | more)


def flux(dtype=torch.float32):
    parts = tiny_models.pipeline("flux-dev", dtype)
    given = {
        "prompt_embeds": told(1, TEXT, 20, dtype=dtype),
        "pooled_prompt_embeds": told(1, 12, dtype=dtype),
        "guidance_scale": 3.5,
        **SIZE,
    }
    family = "flux", "FluxAutoBlocks"
    return Modular(family, {"transformer": parts.transformer, "scheduler": parts.scheduler}, given)


def qwen(dtype=torch.float32):
    if not tiny_models.HAS_QWEN:
        pytest.skip("its attention was another before")
    parts = tiny_models.pipeline("qwen", dtype)
    mask = torch.ones(2, TEXT, dtype=torch.int64)
    mask[0, -1] = 0
    given = {
        "prompt_embeds": told(2, TEXT, 20, dtype=dtype),
        "prompt_embeds_mask": mask,
        "negative_prompt_embeds": told(2, TEXT + 2, 20, seed=8, dtype=dtype),
        "negative_prompt_embeds_mask": torch.ones(2, TEXT + 2, dtype=torch.int64),
        **SIZE,
    }
    family = "qwenimage", "QwenImageAutoBlocks"
    return Modular(
        family, {"transformer": parts.transformer, "scheduler": parts.scheduler}, given, 2
    )


def flux3(dtype=torch.float32):
    """Of which there is no other pipeline."""
    if not hasattr(diffusers, "Flux3Transformer2DModel"):
        pytest.skip("this diffusers has no FLUX.3")
    model = diffusers.Flux3Transformer2DModel(**ENTRIES["Flux3Transformer2DModel"].config)
    parts = {
        "transformer": tiny_models.randomise(model).to(dtype),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(),
    }
    given = {
        "prompt_embeds": told(1, TEXT, 20, dtype=dtype),
        "negative_prompt_embeds": told(1, TEXT, 20, seed=8, dtype=dtype),
        **SIZE,
    }
    return Modular(("flux3", "Flux3AutoBlocks"), parts, given, 2)


MADE = {"flux": flux, "qwen": qwen, "flux3": flux3}


@pytest.fixture(autouse=True)
def wrapped(monkeypatch):
    """FLUX.3 has no adapter; its modules are wrapped."""
    entry = ENTRIES["Flux3Transformer2DModel"]
    parts = {kind: {part: part for part in said.split()} for kind, said in entry.parts.items()}
    monkeypatch.setitem(oracle.MODULES, "Flux3Transformer2DModel", parts)


def bits_of(made):
    """A random schedule; the blocks of FLUX.3 lie in lists inside of others, of which every second step is reused."""
    if type(made.model).__name__ != "Flux3Transformer2DModel":
        bits, names = random_bits(made.model, STEPS, 2)
        return bits, Schedule.from_bits(bits, names)
    return every_second(
        made.model, oracle.MODULES["Flux3Transformer2DModel"], STEPS
    ), Schedule.every(2)


@pytest.mark.filterwarnings("ignore:.*has no adapter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["reference", "fast"])
@pytest.mark.parametrize("name", MADE)
def test_it_draws_what_it_drew(name, dtype):
    made = MADE[name](dtype)
    stock = made.draw()
    bits, schedule = bits_of(made)
    with Oracle(made.model, bits, made.calls).installed() as plain:
        cached = made.draw()
    assert plain.reused
    assert distance(cached, stock) > 1e-3
    backend = "reference" if dtype is torch.float32 else None
    for methods, expected in (([], stock), ([Cached(schedule)], cached)):
        if name == "flux3" and not methods:
            continue  # without an adapter there is nothing that computes all otherwise
        handle = fastdit.patch(made.pipe, *methods, backend=backend)
        for _ in range(2):
            if backend == "reference":
                same_bits(made.draw(), expected)
            else:
                assert distance(made.draw(), expected) <= RUN_FP64
        report = handle.report()
        assert len(report.tokens_per_step) == STEPS
        assert bool(report.reused) is bool(methods)
        handle.unpatch()
    same_bits(made.draw(), stock)


@pytest.mark.parametrize("name", ["flux", "qwen"])
def test_a_part_of_the_tokens(name, chosen):  # noqa: F811
    made = MADE[name](torch.float64)
    counts = {2: 16, 3: 20, 5: 8}
    rows = random_rows(counts, 32, 2 if name == "qwen" else 1)
    with RowOracle(made.pipe, rows, calls_per_step=made.calls).installed() as truth:
        expected = made.draw()
    assert truth.history.keys() == counts.keys()
    for backend in ("reference", None):
        handle = fastdit.patch(made.pipe, Chosen(rows, counts), backend=backend)
        assert distance(made.draw(), expected) <= RUN_FP64
        handle.unpatch()


def test_a_run_is_over_with_its_call():
    made = qwen()
    handle = fastdit.patch(made.pipe, Cached(Schedule.every(2)), RAS(start=2, resets=(), align=1))
    made.draw()
    run = handle.last_run()
    assert not run.live
    assert not run.cache_bytes()


def test_a_guider_that_leaves_off():
    """Guidance ends in the middle of a run: fewer calls a step from then on."""
    made = qwen(torch.float64)
    guider = type(made.pipe.guider)(guidance_scale=4.0, stop=0.5)
    made.pipe.update_components(guider=guider)
    seen = []
    hook = made.model.register_forward_hook(lambda *_: seen.append(1))
    stock = made.draw()
    hook.remove()
    assert STEPS < len(seen) < 2 * STEPS
    for backend in ("reference", None):
        handle = fastdit.patch(made.pipe, backend=backend)
        assert distance(made.draw(), stock) <= RUN_FP64
        handle.unpatch()
