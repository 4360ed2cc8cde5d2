"""Training of the autoencoder on drawn scenes, and measurement of its latents.

Does the ``vae`` stage only: L1 and squared reconstruction error, a term on gradients that keeps
edges crisp, and a light pull of the latents towards a unit normal. Resumable, seeded.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.functional import avg_pool2d

from . import checkpoint
from .recipe import Recipe
from .shapes import SHAPES_RECIPE

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


@dataclass(frozen=True)
class VaeTraining:
    """The autoencoder stage has these settings; ``steps`` overrides the time budget.

    With ``consistency``, where a step shows full size, latents of the same pictures at half size
    are pulled towards the mean of four latents, which lets a sampler change its resolution. With
    ``bfloat16``, products are taken in it; weights stay float32.
    """

    minutes: float = 9.0
    steps: int | None = None
    batch: int = 16
    rate: float = 2e-3
    warmup: int = 50
    kl: float = 2e-4
    gradient: float = 1.0
    consistency: float = 0.0
    bfloat16: bool = False
    seed: int = 0
    log_every: int = 25
    save_every: int = 100


def vae_batch(config: VaeTraining, step: int, recipe: Recipe = SHAPES_RECIPE) -> torch.Tensor:
    """A step has these pictures: float32 ``[n, 3, h, w]`` in [-1, 1], a function of seed and step."""
    rng = np.random.default_rng((config.seed, 1, step))
    pictures = recipe.vae_pictures(rng, step % 8, config.batch)
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous() * 2.0 - 1.0


def gradient_loss(difference: torch.Tensor) -> torch.Tensor:
    """This is the mean absolute slope of the error along rows and columns."""
    across = (difference[..., 1:] - difference[..., :-1]).abs().mean()
    down = (difference[..., 1:, :] - difference[..., :-1, :]).abs().mean()
    return across + down


def vae_loss(
    vae: AutoencoderKL, pictures: torch.Tensor, config: VaeTraining, noise: torch.Generator
) -> tuple[torch.Tensor, float]:
    """This gives the training loss and the plain L1 error (pictures in [-1, 1])."""
    with torch.autocast("cpu", torch.bfloat16, enabled=config.bfloat16):
        return _vae_loss(vae, pictures, config, noise)


def _vae_loss(
    vae: AutoencoderKL, pictures: torch.Tensor, config: VaeTraining, noise: torch.Generator
) -> tuple[torch.Tensor, float]:
    moments = vae.encode(pictures).latent_dist
    sample = moments.mean + moments.std * torch.randn(moments.mean.shape, generator=noise)
    difference = vae.decode(sample).sample - pictures
    pixel = difference.abs().mean() + 2.0 * difference.square().mean()
    divergence = 0.5 * (moments.mean.square() + moments.var - 1.0 - moments.logvar).mean()
    loss = pixel + config.gradient * gradient_loss(difference) + config.kl * divergence
    if config.consistency and pictures.shape[-1] == 128:
        halved = vae.encode(avg_pool2d(pictures, 2)).latent_dist.mean
        apart = (halved - avg_pool2d(moments.mean, 2)).square().mean()
        loss = loss + config.consistency * apart / moments.mean.detach().float().var()
    return loss, float(difference.detach().abs().mean())


def train_vae(
    config: VaeTraining,
    folder: str | Path,
    report: Callable[[str], None] = print,
    recipe: Recipe = SHAPES_RECIPE,
) -> AutoencoderKL:
    """This trains the autoencoder, continuing from ``folder`` if a checkpoint is there.

    Parameters
    ----------
    config : VaeTraining
        Settings; the learning rate follows a cosine over ``steps`` or ``minutes``.
    folder : str or Path
        Where checkpoints are written (``vae`` below it).
    report : callable
        Receives progress lines.
    recipe : Recipe
        Whose autoencoder it is.

    Returns
    -------
    AutoencoderKL
        In evaluation mode, with ``scaling_factor`` and ``shift_factor`` measured.
    """
    torch.manual_seed(config.seed)
    vae = recipe.start_vae()
    names = {parameter: name for name, parameter in vae.named_parameters()}
    optimizer = torch.optim.AdamW(vae.parameters(), lr=config.rate, betas=(0.9, 0.95))
    step, spent = 0, 0.0
    saved = checkpoint.load(Path(folder) / "vae")
    if saved is not None:
        tensors, facts = saved
        vae.load_state_dict({n[6:]: t for n, t in tensors.items() if n.startswith("model.")})
        checkpoint.restore_optimizer(optimizer, tensors, names)
        step, spent = facts["step"], facts["seconds"]
    vae.train()
    mark, pixels = time.monotonic(), []
    while True:
        total = config.minutes * 60.0
        done = step / config.steps if config.steps is not None else spent / total
        if done >= 1.0 or step % config.save_every == 0:
            tensors = {f"model.{n}": t for n, t in vae.state_dict().items()}
            tensors |= checkpoint.optimizer_tensors(optimizer, names)
            facts = {"step": step, "seconds": spent, "config": asdict(config)}
            checkpoint.save(Path(folder) / "vae", tensors, facts)
        if done >= 1.0:
            break
        rate = config.rate * min(1.0, (step + 1) / config.warmup)
        optimizer.param_groups[0]["lr"] = rate * (0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * done)))
        noise = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        loss, pixel = vae_loss(vae, vae_batch(config, step, recipe), config, noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        pixels.append(pixel)
        step += 1
        now = time.monotonic()
        spent, mark = spent + now - mark, now
        if step % config.log_every == 0:
            report(f"vae step {step} {spent / 60:.1f} min L1 {np.mean(pixels):.4f}")
            pixels = []
    measure_latents(vae, recipe)
    facts |= {key: vae.config[key] for key in ("scaling_factor", "shift_factor")}
    checkpoint.save(Path(folder) / "vae", tensors, facts)
    return vae


@torch.no_grad()
def measure_latents(
    vae: AutoencoderKL, recipe: Recipe = SHAPES_RECIPE, count: int = 128, seed: int = 7
) -> None:
    """This sets ``scaling_factor`` and ``shift_factor`` so that latents have mean 0 and std 1."""
    vae.eval()
    rng = np.random.default_rng((seed, 2))
    latents = []
    for index in range(count):
        picture = torch.from_numpy(recipe.measure_picture(rng, index)).permute(2, 0, 1)[None]
        latents.append(vae.encode(picture * 2.0 - 1.0).latent_dist.mean)
    stacked = torch.cat(latents)
    vae.register_to_config(
        scaling_factor=float(1.0 / stacked.std()), shift_factor=float(stacked.mean())
    )
