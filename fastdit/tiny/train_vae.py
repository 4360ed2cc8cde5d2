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

from . import checkpoint, scenes
from .models import TEACHER, build_vae

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


@dataclass(frozen=True)
class VaeTraining:
    """The autoencoder stage has these settings; ``steps`` overrides the time budget."""

    minutes: float = 9.0
    steps: int | None = None
    batch: int = 16
    rate: float = 2e-3
    warmup: int = 50
    kl: float = 2e-4
    gradient: float = 1.0
    seed: int = 0
    log_every: int = 25
    save_every: int = 100


def confetti(rng: np.random.Generator, size: int = 64) -> np.ndarray:
    """A square picture is crowded with shapes in random places, float32 ``[size, size, 3]``.

    Scenes are mostly background; an autoencoder that sees only scenes is slow to care for
    the colours of what little is on them.
    """
    names = list(scenes.COLORS.values())
    grounds = list(scenes.BACKGROUNDS.values())
    axis = np.arange(size, dtype=np.float32) + 0.5
    picture = np.empty((size, size, 3), dtype=np.float32)
    picture[:] = rng.random(3) if rng.random() < 0.3 else grounds[int(rng.integers(4))]
    for _ in range(int(rng.integers(3, 9))):
        shape = scenes.SHAPES[int(rng.integers(len(scenes.SHAPES)))]
        color = rng.random(3) if rng.random() < 0.2 else names[int(rng.integers(len(names)))]
        x, y = rng.uniform(0, size, size=2).astype(np.float32)
        radius = float(rng.uniform(5.0, 20.0))
        distance = scenes.shape_distance(shape, axis[None, :] - x, axis[:, None] - y, radius)
        cover = np.clip(0.5 - distance, 0.0, 1.0)[..., None].astype(np.float32)
        picture = picture * (1.0 - cover) + cover * np.asarray(color, np.float32)
    return picture


def vae_batch(config: VaeTraining, step: int) -> torch.Tensor:
    """A step has these pictures: float32 ``[n, 3, h, w]`` in [-1, 1], a function of seed and step.

    Of eight steps, five show confetti, two whole scenes at half size, and one whole scenes
    at full size (a quarter as many).
    """
    rng = np.random.default_rng((config.seed, 1, step))
    turn = step % 8
    count = max(1, config.batch // 4) if turn == 7 else config.batch
    pictures = []
    for _ in range(count):
        if turn < 5:
            pictures.append(confetti(rng))
            continue
        scene = scenes.sample_scene(rng, objects=int(rng.integers(1, 3)))
        pictures.append(scenes.render(scene, 128 if turn == 7 else 64, rng))
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
    moments = vae.encode(pictures).latent_dist
    sample = moments.mean + moments.std * torch.randn(moments.mean.shape, generator=noise)
    difference = vae.decode(sample).sample - pictures
    pixel = difference.abs().mean() + 2.0 * difference.square().mean()
    divergence = 0.5 * (moments.mean.square() + moments.var - 1.0 - moments.logvar).mean()
    loss = pixel + config.gradient * gradient_loss(difference) + config.kl * divergence
    return loss, float(difference.detach().abs().mean())


def train_vae(
    config: VaeTraining, folder: str | Path, report: Callable[[str], None] = print
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

    Returns
    -------
    AutoencoderKL
        In evaluation mode, with ``scaling_factor`` and ``shift_factor`` measured.
    """
    torch.manual_seed(config.seed)
    vae = build_vae(TEACHER)
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
        loss, pixel = vae_loss(vae, vae_batch(config, step), config, noise)
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
    measure_latents(vae)
    facts |= {key: vae.config[key] for key in ("scaling_factor", "shift_factor")}
    checkpoint.save(Path(folder) / "vae", tensors, facts)
    return vae


@torch.no_grad()
def measure_latents(vae: AutoencoderKL, count: int = 128, seed: int = 7) -> None:
    """This sets ``scaling_factor`` and ``shift_factor`` so that latents have mean 0 and std 1."""
    vae.eval()
    rng = np.random.default_rng((seed, 2))
    latents = []
    for index in range(count):
        scene = scenes.sample_scene(rng, objects=1 + index % 2)
        picture = torch.from_numpy(scenes.render(scene, 64, rng)).permute(2, 0, 1)[None]
        latents.append(vae.encode(picture * 2.0 - 1.0).latent_dist.mean)
    stacked = torch.cat(latents)
    vae.register_to_config(
        scaling_factor=float(1.0 / stacked.std()), shift_factor=float(stacked.mean())
    )
