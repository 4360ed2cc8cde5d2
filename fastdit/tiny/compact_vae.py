"""Training of the small autoencoder that is shipped, from the larger one of the ``vae`` stage.

Its encoder learns the larger encoder's latents, so the denoiser may train on those in the
meantime; its decoder learns to draw scenes from slightly disturbed latents, as a denoiser's
are never exact. Does the ``compact`` stage only. Resumable, seeded.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from . import checkpoint
from .models import VaeConfig, build_vae
from .recipe import Recipe
from .shapes import SHAPES_RECIPE
from .train_vae import gradient_loss

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


@dataclass(frozen=True)
class CompactTraining:
    """The compact stage has these settings; ``steps`` overrides the time budget.

    With ``bfloat16``, products are taken in it; weights stay float32.
    """

    minutes: float = 28.0
    steps: int | None = None
    batch: int = 16
    rate: float = 2e-3
    warmup: int = 50
    disturbance: float = 0.06
    bfloat16: bool = False
    seed: int = 0
    log_every: int = 50
    save_every: int = 100


def compact_batch(
    config: CompactTraining, step: int, recipe: Recipe = SHAPES_RECIPE
) -> torch.Tensor:
    """A step has these pictures: float32 ``[n, 3, h, w]`` in [-1, 1], a function of seed and step."""
    rng = np.random.default_rng((config.seed, 6, step))
    pictures = recipe.compact_pictures(rng, step % 8, config.batch)
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous() * 2.0 - 1.0


def start_compact(teacher: AutoencoderKL, config: VaeConfig) -> AutoencoderKL:
    """A small autoencoder begins with the teacher's weights where the shapes agree."""
    compact = build_vae(config)
    own, given = compact.state_dict(), teacher.state_dict()
    own |= {n: t for n, t in given.items() if n in own and own[n].shape == t.shape}
    compact.load_state_dict(own)
    compact.register_to_config(
        scaling_factor=teacher.config.scaling_factor, shift_factor=teacher.config.shift_factor
    )
    return compact


def compact_loss(
    compact: AutoencoderKL,
    teacher: AutoencoderKL,
    pictures: torch.Tensor,
    config: CompactTraining,
    noise: torch.Generator,
) -> tuple[torch.Tensor, float, float]:
    """This gives the training loss, the error of the latents (in their std) and the L1 error of pictures."""
    scale = teacher.config.scaling_factor
    with torch.no_grad():
        latents = teacher.encode(pictures).latent_dist.mean
    moments = compact.encode(pictures).latent_dist
    latent_error = ((moments.mean - latents) * scale).square().mean()
    # What the teacher says of its own spread is kept out: nothing reads it.
    spread = (moments.logvar + 8.0).square().mean()
    disturbed = latents + torch.randn(latents.shape, generator=noise) * config.disturbance / scale
    difference = compact.decode(disturbed).sample - pictures
    pixel = difference.abs().mean()
    drawn = pixel + 2.0 * difference.square().mean() + gradient_loss(difference)
    loss = drawn + latent_error + 1e-4 * spread
    return loss, float(latent_error.detach().sqrt()), float(pixel.detach())


def train_compact(
    teacher: AutoencoderKL,
    config: CompactTraining,
    folder: str | Path,
    report: Callable[[str], None] = print,
    recipe: Recipe = SHAPES_RECIPE,
) -> AutoencoderKL:
    """This trains the shipped autoencoder, continuing from ``folder`` if a checkpoint is there.

    Parameters
    ----------
    teacher : AutoencoderKL
        The finished autoencoder of the ``vae`` stage.
    config : CompactTraining
        Settings; the learning rate follows a cosine over ``steps`` or ``minutes``.
    folder : str or Path
        Where checkpoints are written (``compact`` below it).
    report : callable
        Receives progress lines.
    recipe : Recipe
        Whose autoencoder it is.
    """
    torch.manual_seed(config.seed)
    compact = start_compact(teacher, recipe.sizes.vae)
    names = {parameter: name for name, parameter in compact.named_parameters()}
    optimizer = torch.optim.AdamW(compact.parameters(), lr=config.rate, betas=(0.9, 0.95))
    step, spent = 0, 0.0
    saved = checkpoint.load(Path(folder) / "compact")
    if saved is not None:
        tensors, facts = saved
        compact.load_state_dict({n[6:]: t for n, t in tensors.items() if n.startswith("model.")})
        checkpoint.restore_optimizer(optimizer, tensors, names)
        step, spent = facts["step"], facts["seconds"]
    mark, lines = time.monotonic(), []
    while True:
        done = step / config.steps if config.steps is not None else spent / config.minutes / 60.0
        if done >= 1.0 or step % config.save_every == 0:
            tensors = {f"model.{n}": t for n, t in compact.state_dict().items()}
            tensors |= checkpoint.optimizer_tensors(optimizer, names)
            facts = {"step": step, "seconds": spent, "config": asdict(config)}
            facts |= {key: compact.config[key] for key in ("scaling_factor", "shift_factor")}
            checkpoint.save(Path(folder) / "compact", tensors, facts)
        if done >= 1.0:
            return compact.eval()
        warm = min(1.0, (step + 1) / config.warmup)
        cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
        optimizer.param_groups[0]["lr"] = config.rate * warm * (0.01 + 0.99 * cosine)
        noise = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        pictures = compact_batch(config, step, recipe)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bfloat16):
            loss, latent, pixel = compact_loss(compact, teacher, pictures, config, noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(compact.parameters(), 1.0)
        optimizer.step()
        lines.append((latent, pixel))
        step += 1
        now = time.monotonic()
        spent, mark = spent + now - mark, now
        if step % config.log_every == 0:
            latent, pixel = np.mean(lines, axis=0)
            report(f"compact step {step} {spent / 60:.1f} min latent {latent:.3f} L1 {pixel:.4f}")
            lines = []
