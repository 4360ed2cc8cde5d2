"""Training of the denoiser and its text encoders on the bank of encoded scenes.

Does the ``transformer`` stage only: rectified flow with logit-normal times, captions with
attributes left out at random, an averaged copy of the weights, a schedule by wall-clock.
Resumable and seeded: step ``n`` sees the same data and noise whenever it runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from . import checkpoint
from .bank import Bank
from .denoiser import Denoiser
from .muon import Muon
from .recipe import Recipe
from .shapes import SHAPES_RECIPE


@dataclass(frozen=True)
class TransformerTraining:
    """The denoiser stage has these settings; ``steps`` overrides the time budget.

    Where a word puts an object is what such a model learns last. Up to ``simple_until`` of the
    budget, ``simple_share`` of the steps therefore show single objects under complete captions.
    With ``bfloat16``, products are taken in it, which doubles the speed of processors that know
    it; weights and attention stay float32.
    """

    minutes: float = 78.0
    steps: int | None = None
    half_share: float = 0.85
    simple_until: float = 0.43
    simple_share: float = 0.85
    half_batch: int = 32
    full_batch: int = 12
    rate: float = 1.5e-3
    matrix_rate: float = 4e-3
    warmup: int = 100
    cooling: float = 0.25
    decay: float = 0.01
    average: float = 0.998
    null_share: float = 0.1
    drop: float = 0.2
    time_mean: float = 1.1
    time_std: float = 1.3
    bfloat16: bool = False
    seed: int = 0
    log_every: int = 50
    save_every: int = 200


def make_batch(
    bank: Bank,
    config: TransformerTraining,
    step: int,
    progress: float = 1.0,
    recipe: Recipe = SHAPES_RECIPE,
) -> tuple[torch.Tensor, list[str]]:
    """A step has latents (float32) and captions, a function of seed, step and progress."""
    rng = np.random.default_rng((config.seed, 5, step))
    half = rng.random() < config.half_share
    size, count = (64, config.half_batch) if half else (128, config.full_batch)
    simple = progress < config.simple_until and rng.random() < config.simple_share
    chosen = rng.choice(bank.single[size] if simple else len(bank.scenes[size]), size=count)
    texts = []
    for index in chosen:
        if rng.random() < config.null_share:
            texts.append("")
            continue
        texts.append(recipe.caption(bank.scenes[size][int(index)], rng, simple, config.drop))
    return bank.latents[size][torch.from_numpy(chosen)].float(), texts


def build_optimizers(model: Denoiser, config: TransformerTraining) -> list[torch.optim.Optimizer]:
    """Muon serves the matrices inside the transformer's blocks, AdamW all else.

    Modulation layers start at zero and are read by every token, so they stay with AdamW.
    """
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        inside = name.startswith("transformer.transformer_blocks") and "norm" not in name
        (matrices if inside and parameter.ndim == 2 else others).append(parameter)
    return [
        Muon(
            matrices,
            lr=config.matrix_rate,
            weight_decay=config.decay,
            dtype=torch.bfloat16 if config.bfloat16 else torch.float32,
        ),
        torch.optim.AdamW(others, lr=config.rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


class _FloatAttention(TorchFunctionMode):
    """Attention stays in float32 under autocast, whose bfloat16 kernel has a slow gradient on CPUs."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        floats = [one.float() if isinstance(one, torch.Tensor) else one for one in args]
        with torch.autocast("cpu", enabled=False):
            return func(
                *floats,
                **{
                    k: v.float() if k in ("query", "key", "value") else v for k, v in kwargs.items()
                },
            )


class Trainer:
    """A run has this state: weights, their average, the optimisers, steps done and seconds spent."""

    def __init__(
        self,
        bank: Bank,
        config: TransformerTraining,
        folder: str | Path,
        recipe: Recipe = SHAPES_RECIPE,
    ) -> None:
        torch.manual_seed(config.seed)
        self.bank, self.config, self.recipe = bank, config, recipe
        self.folder = Path(folder) / "transformer"
        self.model = Denoiser(recipe.sizes)
        self.model.train()
        self.average = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self.optimizers = build_optimizers(self.model, config)
        self.names = {parameter: name for name, parameter in self.model.named_parameters()}
        self.step, self.seconds = 0, 0.0
        self._resume()

    def _resume(self) -> None:
        saved = checkpoint.load(self.folder)
        if saved is None:
            return
        tensors, facts = saved
        with torch.no_grad():
            for parameter, name in self.names.items():
                parameter.copy_(tensors[f"model.{name}"])
                self.average[name].copy_(tensors[f"average.{name}"])
        for optimizer in self.optimizers:
            checkpoint.restore_optimizer(optimizer, tensors, self.names)
        self.step, self.seconds = facts["step"], facts["seconds"]

    def save(self) -> None:
        """This writes a checkpoint from which a new run continues identically."""
        tensors = {f"model.{name}": p for p, name in self.names.items()}
        tensors |= {f"average.{name}": t for name, t in self.average.items()}
        for optimizer in self.optimizers:
            tensors |= checkpoint.optimizer_tensors(optimizer, self.names)
        facts = {"step": self.step, "seconds": self.seconds, "config": asdict(self.config)}
        checkpoint.save(self.folder, tensors, facts)

    @property
    def progress(self) -> float:
        """This share of the budget is used up, 1 at the end."""
        if self.config.steps is not None:
            return self.step / self.config.steps
        return self.seconds / (60.0 * self.config.minutes)

    def _set_rate(self) -> None:
        warm = min(1.0, (self.step + 1) / self.config.warmup)
        cooled = min(1.0, (1.0 - self.progress) / self.config.cooling)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * warm * (0.01 + 0.99 * cooled)

    def _update_average(self) -> None:
        # A short memory at first, so that the average is useful early in a run.
        decay = min(self.config.average, (1.0 + self.step) / (10.0 + self.step))
        names = list(self.average)
        live = dict(self.model.named_parameters())
        torch._foreach_lerp_(
            [self.average[n] for n in names], [live[n].detach() for n in names], 1.0 - decay
        )

    def advance(self) -> float:
        """This does one step and gives its loss."""
        began = time.monotonic()
        latents, texts = make_batch(self.bank, self.config, self.step, self.progress, self.recipe)
        noise = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step)
        self._set_rate()
        attention = _FloatAttention() if self.config.bfloat16 else nullcontext()
        with attention, torch.autocast("cpu", torch.bfloat16, enabled=self.config.bfloat16):
            loss = self.model.loss(
                latents, texts, noise, self.config.time_mean, self.config.time_std
            )
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self._update_average()
        self.step += 1
        self.seconds += time.monotonic() - began
        return float(loss.detach())

    def averaged(self) -> Denoiser:
        """A copy of the model carries the averaged weights, in evaluation mode."""
        copy = Denoiser(self.recipe.sizes)
        copy.load_state_dict(self.average)
        return copy.eval()


def train_transformer(
    bank: Bank,
    config: TransformerTraining,
    folder: str | Path,
    report: Callable[[str], None] = print,
    recipe: Recipe = SHAPES_RECIPE,
) -> Trainer:
    """This trains until the budget is spent, continuing from ``folder`` if a checkpoint is there.

    Parameters
    ----------
    bank : Bank
        Encoded train scenes.
    config : TransformerTraining
        Settings; the learning rate falls in the last ``cooling`` share of ``steps`` or ``minutes``.
    folder : str or Path
        Where checkpoints are written (``transformer`` below it).
    report : callable
        Receives progress lines.
    recipe : Recipe
        Whose denoiser it is.
    """
    trainer = Trainer(bank, config, folder, recipe)
    losses: list[float] = []
    while trainer.progress < 1.0:
        losses.append(trainer.advance())
        if trainer.step % config.log_every == 0:
            spent = trainer.seconds / 60.0
            report(f"transformer step {trainer.step} {spent:.1f} min loss {np.mean(losses):.4f}")
            losses = []
        if trainer.step % config.save_every == 0:
            trainer.save()
    trainer.save()
    return trainer
