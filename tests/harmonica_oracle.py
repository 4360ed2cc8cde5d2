"""HarmoniCa's training written down plainly for DiT, PixArt and SD3: wrappers around stock modules, a loop, no sharing.

It knows nothing of fastdit but the numbers it is given. The backbone is stock diffusers; guidance, noise and the order
of components are those of diffusers' pipelines.
"""

from __future__ import annotations

import itertools
from contextlib import contextmanager

import torch


class BlendedDiT:
    """A DiT whose attentions and feed-forwards blend fresh and cached outputs inside `blended`.

    Attributes:
        slots: Component 2 b (attention of block b) or 2 b + 1 (its feed-forward), or "whole" -> sigma -> what was
            stored there, the last one last.
        noise: What the sampler's noise starts from in each run: for DiT the seed of the global generator.
        order: What is not fresh is the polynomial of this degree through what was stored last.
        whole: The model's output is blended, by the first of the ratios, and nothing inside.
        sigma: Of the step in progress.
    """

    parts = ("attn1", "ff")

    def __init__(self, transformer, tau, keep, noise=0, order=0, whole=False):
        self.transformer = transformer
        self.tau = tau
        self.keep = keep
        self.slots = {}
        self.noise = noise
        self.order = order
        self.whole = whole
        self.sigma = 0.0
        self.mixes = None

    def start(self):
        """A run begins with empty slots and its noise; the scheduler's step is given what comes back."""
        self.slots.clear()
        torch.manual_seed(self.noise)
        return {}

    @contextmanager
    def blended(self, r):
        """r [N], or None for "compute all and renew every slot"."""
        modules = []
        if self.whole:
            self.mixes = lambda output: self.mixed("whole", output, None if r is None else r[0])
        else:
            for block in self.transformer.transformer_blocks:
                modules += [getattr(block, part, None) for part in self.parts]
            modules = [module for module in modules if module is not None]
        for component, module in enumerate(modules):
            module.forward = self.wrap(module.forward, component, r)
        try:
            yield
        finally:
            self.mixes = None
            for module in modules:
                del module.forward

    def wrap(self, forward, component, r):
        def blend(*args, **kwargs):
            fresh = forward(*args, **kwargs)
            return self.mixed(component, fresh, None if r is None else r[component])

        return blend

    def mixed(self, component, fresh, weight):
        """What goes on in the place of a fresh output; weight None computes."""
        if isinstance(fresh, tuple):
            return tuple(self.mixed((component, i), one, weight) for i, one in enumerate(fresh))
        out = fresh
        if weight is not None:
            out = weight.to(fresh.dtype) * fresh
            out = out + (1 - weight.to(fresh.dtype)) * self.drawn(component)
        if weight is None or weight > self.tau:
            stored = self.slots.setdefault(component, {})
            stored.pop(self.sigma, None)
            stored[self.sigma] = (out if self.keep == "blended" else fresh).detach().clone()
        return out

    def drawn(self, component):
        last = list(self.slots[component].items())[-1 - self.order :]
        total = 0
        for own, value in last:
            for other, _ in last:
                if other != own:
                    value = value * ((self.sigma - other) / (own - other))
            total = total + value
        return total

    def model(self, *args, **kwargs):
        """The transformer's output, blended where that is what `blended` blends."""
        output = self.transformer(*args, **kwargs).sample
        return output if self.mixes is None else self.mixes(output)

    def outputs(self, x, t, labels, guidance):
        """All eight channels of both halves: guided epsilon, as DiTPipeline makes it, and what it drops."""
        half = x[: len(x) // 2]
        twice = torch.cat([half, half])
        times = torch.full((len(twice),), int(t))
        output = self.model(twice, timestep=times, class_labels=labels)
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
        output = self.model(
            torch.cat([x, x]),
            encoder_hidden_states=embeddings,
            encoder_attention_mask=mask,
            timestep=torch.full((2 * len(x),), int(t)),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        )
        noise, rest = output.split(4, dim=1)
        empty, full = noise.chunk(2)
        guided = empty + guidance * (full - empty)
        return torch.cat([torch.cat([guided, guided]), rest], dim=1)

    def handed(self, outputs):
        return outputs[: len(outputs) // 2, :4]


class BlendedSD3(BlendedDiT):
    """The same of SD3. A prompt is (embeddings, pooled ones), of the empty one first."""

    parts = ("attn", "ff", "ff_context")

    def start(self):
        self.slots.clear()
        return {}

    def outputs(self, x, t, prompt, guidance):
        embeddings, pooled = prompt
        output = self.model(
            torch.cat([x, x]),
            timestep=t.expand(2 * len(x)),
            encoder_hidden_states=embeddings,
            pooled_projections=pooled,
        )
        empty, full = output.chunk(2)
        return empty + guidance * (full - empty)

    def handed(self, outputs):
        return outputs


def sigmas_of(scheduler):
    """Where each call of the model is; without sigmas those of the cumulative alphas."""
    if hasattr(scheduler, "sigmas"):
        return [float(sigma) for sigma in scheduler.sigmas[: len(scheduler.timesteps)]]
    alphas = [float(scheduler.alphas_cumprod[int(t)]) for t in scheduler.timesteps]
    return [((1 - alpha) / alpha) ** 0.5 for alpha in alphas]


def sample(model, scheduler, x, labels, guidance, rows):
    """The final latents of a run; `rows` has r for each step, None for steps that compute everything."""
    more = model.start()
    begin(scheduler, len(rows))
    with torch.no_grad():
        for t, sigma, r in zip(scheduler.timesteps, sigmas_of(scheduler), rows, strict=True):
            model.sigma = sigma
            with model.blended(r):
                noise = model.predict(x, t, labels, guidance)
            x = scheduler.step(noise, t, x, **more).prev_sample
    return x


def begin(scheduler, calls):
    """The scheduler forgets the run before; Heun's calls the model twice a step, but for the last."""
    heun = "Heun" in type(scheduler).__name__
    scheduler.set_timesteps((calls + 1) // 2 if heun else calls)


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
    begin(scheduler, len(logits))
    losses = [0.0]
    sigmas = sigmas_of(scheduler)
    for step, t in enumerate(scheduler.timesteps):
        model.sigma = sigmas[step]
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
