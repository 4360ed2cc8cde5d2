"""Training a HarmoniCa router (arXiv 2410.01723): step-wise denoising with an image error proxy, on a stock pipeline.

One epoch is one trajectory of the student from pure noise; no pictures are needed. At each step but the first, which
always computes, the teacher (the model as it is) and the student (outputs blended with what slots give, `blending.py`)
see the student's latents; the loss of step i is

    lambda_i mean((teacher - student)^2) + beta sum_k r_ik,    r = sigmoid(logit),

of what the scheduler gets, guidance applied, or of all that the transformer gives (`trajectory.py`). Its
gradient reaches the logits of step i alone, AdamW moves them, they are clamped, and the scheduler, the deployment's
own, steps on the student's prediction.

Where the released code and the spec's section 15 part, this follows the spec: the backbone is frozen, the teacher has
no graph, all draws belong to the seed (`noise.py`), and lambda is shared by all processes.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdit import files
from fastdit.account.cost import Cost
from fastdit.checks import one_of, real, whole
from fastdit.errors import ArgumentError
from fastdit.methods.base import check_no_noise
from fastdit.schedules.forecast import MAX_ORDER
from fastdit.schedules.router import LIMIT, TAU, Router, check_tau
from fastdit.train import checkpoint, proxy
from fastdit.train.blending import Blending
from fastdit.train.prompts import arguments_of, check_prompts
from fastdit.train.ranks import Ranks
from fastdit.train.settings import Progress, Settings
from fastdit.train.student import Trainee
from fastdit.train.trajectory import LOSSES, Trajectory

KEEPS = ("blended", "fresh")


class HarmoniCa:
    """This trains a router; :meth:`fit` does it.

    Args:
        pipeline: A stock pipeline of a supported family, unpatched, on its device.
        steps: Its `num_inference_steps`.
        prompts: What to draw: texts, class numbers (DiT), or mappings with the pipeline arguments of one image
            (embeddings), whose tensors are joined along the batch.
        beta: Weight of the compute penalty; what it buys depends on the loss's scale (`lambda_form`, `normalise`).
        target: Share of the components' arithmetic to spare, in (0, 1); not of the paper. Beta is then where training
            begins, and after each epoch it grows or falls by e^(difference of 1 - r to the target), both weighted by
            multiply-accumulates; so are the terms of the penalty, to a mean of one.
        lr: Of AdamW (0.9, 0.999), eps 1e-8, no decay. A logit moves by at most about `lr` each epoch.
        epochs: Trajectories; each moves every step's logits once.
        batch: Images of an epoch, over all processes.
        loss: What teacher and student are compared by: "guided", the prediction that the scheduler gets, or "released",
            all output channels of both guidance halves, as the authors' code does, see :mod:`fastdit.train.trajectory`.
        lambda_form: "released", "published" or "sensitivity", see :mod:`fastdit.train.proxy`; None for lambda = 1.
        lambda_every: Epochs between two estimates of lambda.
        normalise: Divide lambda by its mean over the steps, so that beta does not depend on its scale.
        pairs: Train as Learning-to-Cache does (arXiv 2406.01733), but without pictures: every second step computes
            everything, the one after it is trained against it, and the latents are the teacher's. With
            `lambda_form=None` the loss is that paper's too.
        whole_steps: One logit for all components of a step; not of the paper. For models whose components are so
            coupled that a step which mixes fresh and stale ones is worse than one that reuses them all. With `order`
            the model's output is blended, as it is extrapolated at inference; an epoch then costs one forward a step.
        tau: Threshold: a slot is renewed where r > tau.
        keep: What a slot is renewed with, the "blended" output (as released) or the "fresh" one (as at inference).
        spread: Standard deviation of the first logits; 0 starts every component at r = 1/2.
        seed: Of the private generator behind logits, prompts and noise.
        order: What is reused is drawn from so many more stored outputs than one, at the sampler's sigmas, see
            :class:`fastdit.Cached`: 0 repeats, 1 is a line, 2 a parabola. The router runs with it.
        checkpointing: Run each block again in the backward pass instead of keeping its activations.
        arguments: Further arguments of the pipeline's call: guidance_scale, height, width and so on.
        folder: Where checkpoints go; a training found there is taken up where it was left, to the same result.
        save_every: Epochs between two checkpoints.
        report: Called with the :class:`Progress` of each epoch, in the first process.

    Raises:
        ArgumentError: An argument is not as described, or the pipeline is patched.

    Example:
        >>> training = fastdit.train.HarmoniCa(pipe, steps=20, prompts=texts, beta=1e-6, epochs=500, report=print)
        >>> training.fit().save("router.safetensors")
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        steps: int,
        prompts: Sequence[Any],
        beta: float = 7e-8,
        target: float | None = None,
        lr: float = 0.01,
        epochs: int = 2000,
        batch: int = 8,
        loss: str = "guided",
        lambda_form: str | None = "released",
        lambda_every: int = 50,
        normalise: bool = False,
        pairs: bool = False,
        whole_steps: bool = False,
        tau: float = TAU,
        keep: str = "blended",
        spread: float = 1.0,
        seed: int = 0,
        order: int = 0,
        checkpointing: bool = False,
        arguments: Mapping[str, Any] | None = None,
        folder: str | os.PathLike[str] | None = None,
        save_every: int = 10,
        report: Callable[[Progress], None] | None = None,
    ) -> None:
        self.ranks = Ranks()
        self.settings = Settings(
            whole("steps", steps, 2),
            _at_least_0("beta", beta),
            None if target is None else real("target", target, "in (0, 1)", lambda x: 0 < x < 1),
            _at_least_0("lr", lr),
            whole("epochs", epochs),
            whole("batch", batch),
            one_of("loss", loss, LOSSES),
            one_of("lambda_form", lambda_form, (*proxy.FORMS, None)),
            whole("lambda_every", lambda_every),
            bool(normalise),
            bool(pairs),
            bool(whole_steps),
            check_tau(tau),
            one_of("keep", keep, KEEPS),
            _at_least_0("spread", spread),
            whole("seed", seed, 0),
            one_of("order", whole("order", order, 0), range(MAX_ORDER + 1)),
        )
        if batch % self.ranks.count:
            raise ArgumentError(
                f"batch must be a multiple of the {self.ranks.count} processes, got {batch}"
            )
        self.prompts = check_prompts(prompts)
        self.arguments = dict(arguments or {})
        if decided := sorted({"num_inference_steps", "generator"} & set(self.arguments)):
            raise ArgumentError(
                f"arguments must not hold what training decides by steps and seed, got {', '.join(decided)}"
            )
        for name, value in self.arguments.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ArgumentError(f"arguments must be finite, got {name}={value}")
        if folder is not None:
            files.check_folder(folder, "folder")
        self.folder = None if folder is None else Path(folder)
        self.save_every = whole("save_every", save_every)
        self.report = report
        blending = Blending(self.settings.tau, keep, order, whole=bool(whole_steps) and order > 0)
        self.trainee = Trainee(pipeline, checkpointing, blending)
        self.generator = torch.Generator().manual_seed(seed)
        self._start()

    # ---- the whole

    def fit(self) -> Router:
        """This trains to the last epoch, from the last checkpoint if there is one.

        Raises:
            ArgumentError: The folder holds a training with other settings, or a damaged one.
        """
        self.resume()
        while self.epoch < self.settings.epochs:
            began = time.perf_counter()
            losses, weighted = self.train_epoch()
            self.epoch += 1
            done = self.epoch == self.settings.epochs
            if self.folder is not None and (done or self.epoch % self.save_every == 0):
                checkpoint.save(self, self.folder)
            if self.report is not None and self.ranks.rank == 0:
                self.report(self._progress(losses, weighted, time.perf_counter() - began))
        return self.router()

    def resume(self) -> None:
        """The training goes on from its folder's last checkpoint, if there is one."""
        if self.folder is not None:
            checkpoint.resume(self, self.folder)

    def router(self) -> Router:
        """This is the router as it is now."""
        table = torch.stack([logits.detach() for logits in self.logits]).cpu().numpy()
        found = {
            kind.name: np.full((len(table), kind.count, len(kind.components)), np.inf, np.float32)
            for kind in self.trainee.spec.kinds
        }
        for k, (kind, block, component) in enumerate(self.trainee.spec.components()):
            found[kind.name][:, block, kind.components.index(component)] = table[:, k]
        origin = {"training": asdict(self.settings), "epochs": self.epoch}
        components = {kind.name: kind.components for kind in self.trainee.spec.kinds}
        return Router(
            found,
            components,
            self.trainee.spec.family,
            self.conditions,
            self.settings.tau,
            {"method": "HarmoniCa", "model": type(self.trainee.transformer).__name__, **origin},
            self.settings.order,
        )

    # ---- one epoch

    def train_epoch(self) -> tuple[Tensor, Tensor]:
        """One trajectory gives (mean squared error, minimised loss) of each step, [T] each, the first step's 0."""
        arguments = self.draw()
        with self.trainee:
            form = self.settings.lambda_form
            if form is not None and self.epoch % self.settings.lambda_every == 0:
                with torch.no_grad():
                    ratios = [torch.sigmoid(logits) for logits in self.logits]
                self.weights = proxy.estimate(
                    form,
                    self.trainee,
                    ratios,
                    arguments,
                    lambda values: self.ranks.mean(values, self._device),
                )
            trajectory = Trajectory(self)
            self.trainee.run(trajectory, arguments())
        if self.settings.target is not None:
            self.beta *= math.exp(self.settings.target - self.spared())
        losses = torch.tensor([trajectory.losses, trajectory.weighted])
        return tuple(self.ranks.mean(losses, self._device))

    def weight(self, step: int) -> float:
        """The loss has this lambda at a step."""
        mean = float(self.weights[1:].mean()) if self.settings.normalise else 1.0
        return float(self.weights[step]) / (mean or 1.0)

    def spared(self) -> float:
        """1 - r leaves out this share of the components' arithmetic, the first step included."""
        with torch.no_grad():
            kept = torch.stack([torch.sigmoid(logits) @ self._prices for logits in self.logits[1:]])
        return 1 - (1 + float(kept.sum()) / float(self._prices.sum())) / len(self.logits)

    def update(self, step: int, loss: Tensor, ratios: Tensor) -> float:
        """This moves the logits of one step down the gradient of its loss, and gives what was minimised."""
        minimised = self.weight(step) * loss + self.beta * (self._prices * ratios).sum()
        self.optimizer.zero_grad(set_to_none=True)
        minimised.backward()
        logits = self.logits[step]
        logits.grad = self.ranks.mean(logits.grad, self._device)
        if self.settings.whole_steps:
            logits.grad.fill_(logits.grad.sum())  # of the one logit that all entries hold
        self.optimizer.step()
        with torch.no_grad():
            logits.clamp_(-LIMIT, LIMIT)
        return float(minimised.detach())

    # ---- what to draw

    def draw(self) -> Callable[[], dict[str, Any]]:
        """An epoch draws prompts and noise; the result makes the pipeline's arguments, always from the same seeds."""
        count = self.settings.batch
        chosen = torch.randint(len(self.prompts), (count,), generator=self.generator).tolist()
        seeds = torch.randint(2**62, (count,), generator=self.generator).tolist()
        prompts = self.ranks.share([self.prompts[i] for i in chosen])
        seeds = self.ranks.share(seeds)

        steps = self.settings.steps
        return lambda: arguments_of(prompts, steps, seeds) | self.arguments

    # ---- state

    def _start(self) -> None:
        """Before the first epoch the training looks at a run, then draws the logits."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        with self.trainee:
            call = arguments_of(self.prompts[:1], self.settings.steps, [0])
            found, text = self.trainee.look(call | self.arguments)
        if found.guidance is None and "guidance_scale" in self.arguments:
            found = replace(found, guidance=float(self.arguments["guidance_scale"]))
        if self.settings.order:
            check_no_noise(found.noise)
        self.conditions = found
        self._device = next(self.trainee.transformer.parameters()).device
        cost = Cost.of(self.trainee.transformer, found.image_tokens, text)
        self._macs = cost.component_macs()
        steps, count = len(found.timesteps), len(self.trainee.places)
        drawn = torch.randn(steps, count, generator=generator)
        if self.settings.whole_steps:
            drawn = drawn[:, :1].expand(-1, count).clone()
        first = self.settings.spread * drawn
        first = first.clamp(-LIMIT, LIMIT)
        fixed = slice(0, None, 2) if self.settings.pairs else slice(0, 1)
        first[fixed] = LIMIT
        self.logits = [torch.nn.Parameter(own.to(self._device)) for own in first]
        for logits in self.logits[fixed]:
            logits.requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            [logits for logits in self.logits if logits.requires_grad],
            lr=self.settings.lr,
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=0.0,
        )
        self.weights = torch.ones(steps)
        self.beta = self.settings.beta
        self._prices = torch.ones(count, device=self._device)
        if self.settings.target is not None:
            macs = torch.tensor([float(c.macs) for c in cost.components], device=self._device)
            self._prices = macs / macs.mean()
        self.epoch = 0

    def _progress(self, losses: Tensor, weighted: Tensor, seconds: float) -> Progress:
        router = self.router()
        bits = {kind: layer.bits for kind, layer in router.schedule().layers.items()}
        trained = [step for step, logits in enumerate(self.logits) if logits.requires_grad]
        total = len(self.logits) * sum(float(macs.sum()) for macs in self._macs.values())
        spared = sum(float(((~bits[kind]) * macs).sum()) for kind, macs in self._macs.items())
        return Progress(
            self.epoch,
            *(float(some[trained].mean()) for some in (losses, weighted)),
            router.cache_utilisation(router.schedule()),
            spared / total,
            seconds,
        )


def _at_least_0(name: str, value: Any) -> float:
    return real(name, value, "of at least 0", lambda x: x >= 0)
