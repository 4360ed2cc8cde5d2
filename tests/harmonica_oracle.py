"""HarmoniCa's training written down plainly for DiT: wrappers around stock modules, a loop, no sharing.

It knows nothing of fastdit but the numbers it is given. The backbone is stock diffusers; guidance, noise and the order
of components are DiTPipeline's.
"""

from __future__ import annotations

import itertools
from contextlib import contextmanager

import torch


class BlendedDiT:
    """A DiT whose attentions and feed-forwards blend fresh and cached outputs inside `blended`.

    Attributes:
        slots: Component 2 b (attention of block b) or 2 b + 1 (its feed-forward) -> tensor.
    """

    def __init__(self, transformer, tau, keep):
        self.transformer = transformer
        self.tau = tau
        self.keep = keep
        self.slots = {}

    @contextmanager
    def blended(self, r):
        """r [N], or None for "compute all and renew every slot"."""
        modules = []
        for block in self.transformer.transformer_blocks:
            modules += [block.attn1, block.ff]
        for component, module in enumerate(modules):
            module.forward = self.wrap(module.forward, component, r)
        try:
            yield
        finally:
            for module in modules:
                del module.forward

    def wrap(self, forward, component, r):
        def blend(*args, **kwargs):
            fresh = forward(*args, **kwargs)
            out = fresh
            if r is not None:
                weight = r[component].to(fresh.dtype)
                out = weight * fresh + (1 - weight) * self.slots[component]
            if r is None or r[component] > self.tau:
                self.slots[component] = (out if self.keep == "blended" else fresh).detach()
            return out

        return blend

    def predict(self, x, t, labels, guidance):
        """The guided epsilon of both halves, as DiTPipeline makes it."""
        half = x[: len(x) // 2]
        twice = torch.cat([half, half])
        times = torch.full((len(twice),), int(t))
        output = self.transformer(twice, timestep=times, class_labels=labels).sample
        noise, _ = output.split(4, dim=1)
        first, second = noise.chunk(2)
        guided = second + guidance * (first - second)
        return torch.cat([guided, guided])


def sample(model, scheduler, x, labels, guidance, rows):
    """The final latents of a run; `rows` has r for each step, None for steps that compute everything."""
    model.slots.clear()
    scheduler.set_timesteps(len(rows))  # forget the history of the run before
    with torch.no_grad():
        for t, r in zip(scheduler.timesteps, rows, strict=True):
            with model.blended(r):
                noise = model.predict(x, t, labels, guidance)
            x = scheduler.step(noise, t, x).prev_sample
    return x


def released_lambda(model, scheduler, x, labels, guidance, rows):
    """One whole run for each step: T runs of T steps."""
    weights, runs = [0.0], []
    for step in range(len(rows)):
        chain = [None, *rows[1 : step + 1], *[None] * (len(rows) - 1 - step)]
        runs.append(sample(model, scheduler, x, labels, guidance, chain))
    for before, after in itertools.pairwise(runs):
        weights.append(float((after - before).square().mean()))
    return weights, runs


def published_lambda(model, scheduler, x, labels, guidance, rows):
    """Each run computes at one more step, beside one that caches at all; squared norm, mean over the images."""
    base = sample(model, scheduler, x, labels, guidance, [None, *rows[1:]])
    weights = [0.0]
    for step in range(1, len(rows)):
        masked = [None, *rows[1:]]
        masked[step] = None
        final = sample(model, scheduler, x, labels, guidance, masked)
        weights.append(float((final - base).square().sum() / len(base)))
    return weights


def train(model, scheduler, x, labels, guidance, logits, optimizer, weights, beta):
    """One trajectory; moves the logits in place and returns the loss of each step."""
    model.slots.clear()
    losses = [0.0]
    for step, t in enumerate(scheduler.timesteps):
        if step == 0:
            with torch.no_grad(), model.blended(None):
                noise = model.predict(x, t, labels, guidance)
        else:
            with torch.no_grad():
                target = model.predict(x, t, labels, guidance)
            r = torch.sigmoid(logits[step])
            with model.blended(r):
                noise = model.predict(x, t, labels, guidance)
            loss = (target - noise).square().mean()
            optimizer.zero_grad()
            (weights[step] * loss + beta * r.sum()).backward()
            optimizer.step()
            with torch.no_grad():
                logits[step].clamp_(-5, 5)
            losses.append(float(loss.detach()))
        x = scheduler.step(noise.detach(), t, x).prev_sample
    return losses
