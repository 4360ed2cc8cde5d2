"""HarmoniCa's training written down plainly for DiT and PixArt: wrappers around stock modules, a loop, no sharing.

It knows nothing of fastdit but the numbers it is given. The backbone is stock diffusers; guidance, noise and the order
of components are DiTPipeline's and PixArtSigmaPipeline's.
"""

from __future__ import annotations

import itertools
from contextlib import contextmanager

import torch


class BlendedDiT:
    """A DiT whose attentions and feed-forwards blend fresh and cached outputs inside `blended`.

    Attributes:
        slots: Component 2 b (attention of block b) or 2 b + 1 (its feed-forward) -> tensor.
        noise: What the sampler's noise starts from in each run: for DiT the seed of the global generator.
    """

    parts = ("attn1", "ff")

    def __init__(self, transformer, tau, keep, noise=0):
        self.transformer = transformer
        self.tau = tau
        self.keep = keep
        self.slots = {}
        self.noise = noise

    def start(self):
        """A run begins with empty slots and its noise; the scheduler's step is given what comes back."""
        self.slots.clear()
        torch.manual_seed(self.noise)
        return {}

    @contextmanager
    def blended(self, r):
        """r [N], or None for "compute all and renew every slot"."""
        modules = []
        for block in self.transformer.transformer_blocks:
            modules += [getattr(block, part) for part in self.parts]
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

    def outputs(self, x, t, labels, guidance):
        """All eight channels of both halves: guided epsilon, as DiTPipeline makes it, and what it drops."""
        half = x[: len(x) // 2]
        twice = torch.cat([half, half])
        times = torch.full((len(twice),), int(t))
        output = self.transformer(twice, timestep=times, class_labels=labels).sample
        noise, rest = output.split(4, dim=1)
        first, second = noise.chunk(2)
        guided = second + guidance * (first - second)
        return torch.cat([torch.cat([guided, guided]), rest], dim=1)

    def handed(self, outputs):
        """What the scheduler gets of them."""
        return outputs[:, :4]

    def predict(self, x, t, labels, guidance):
        return self.handed(self.outputs(x, t, labels, guidance))


class BlendedPixArt(BlendedDiT):
    """The same of PixArt-Sigma. A prompt is (embeddings, masks), of the empty one first; `noise` the generators' states
    behind the first latents, which the pipeline hands to schedulers that take generators."""

    parts = ("attn1", "attn2", "ff")
    takes_generators = True

    def start(self):
        self.slots.clear()
        generators = [torch.Generator() for _ in self.noise]
        for generator, state in zip(generators, self.noise, strict=True):
            generator.set_state(state)
        return {"generator": generators} if self.takes_generators else {}

    def outputs(self, x, t, prompt, guidance):
        embeddings, mask = prompt
        output = self.transformer(
            torch.cat([x, x]),
            encoder_hidden_states=embeddings,
            encoder_attention_mask=mask,
            timestep=torch.full((2 * len(x),), int(t)),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample
        noise, rest = output.split(4, dim=1)
        empty, full = noise.chunk(2)
        guided = empty + guidance * (full - empty)
        return torch.cat([torch.cat([guided, guided]), rest], dim=1)

    def handed(self, outputs):
        return outputs[: len(outputs) // 2, :4]


def sample(model, scheduler, x, labels, guidance, rows):
    """The final latents of a run; `rows` has r for each step, None for steps that compute everything."""
    more = model.start()
    scheduler.set_timesteps(len(rows))  # forget the history of the run before
    with torch.no_grad():
        for t, r in zip(scheduler.timesteps, rows, strict=True):
            with model.blended(r):
                noise = model.predict(x, t, labels, guidance)
            x = scheduler.step(noise, t, x, **more).prev_sample
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


def train(model, scheduler, x, labels, guidance, logits, optimizer, weights, beta, released=False):
    """One trajectory; moves the logits in place and returns the loss of each step.

    The loss is of what the scheduler gets, or as `released` of all channels of both halves.
    """
    more = model.start()
    scheduler.set_timesteps(len(logits))
    losses = [0.0]
    for step, t in enumerate(scheduler.timesteps):
        if step == 0:
            with torch.no_grad(), model.blended(None):
                noise = model.predict(x, t, labels, guidance)
        else:
            with torch.no_grad():
                target = model.outputs(x, t, labels, guidance)
            r = torch.sigmoid(logits[step])
            with model.blended(r):
                outputs = model.outputs(x, t, labels, guidance)
            noise = model.handed(outputs)
            loss = (model.handed(target) - noise).square().mean()
            if released:
                loss = (target - outputs).square().mean()
            optimizer.zero_grad()
            (weights[step] * loss + beta * r.sum()).backward()
            optimizer.step()
            with torch.no_grad():
                logits[step].clamp_(-5, 5)
            losses.append(float(loss.detach()))
        x = scheduler.step(noise.detach(), t, x, **more).prev_sample
    return losses
