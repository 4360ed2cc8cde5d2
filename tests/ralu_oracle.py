"""RALU restated on stock models, without fastdit: one image after the other, its tokens in lists, noise by matrices.

What else leaves work out, a schedule of reused outputs or sparse steps at full size, is restated by `oracle.py` and
`ras_oracle.py`, begun anew in each stage.

Only what says where the detail is comes from the library (`fastdit/tokens/edges.py`, which has its own tests), and the
numbers of the stages, which are compared with the published ones elsewhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import scipy.fft
import torch
from torch import Tensor, nn

from fastdit import RALU
from fastdit.tokens import edges
from oracle import Bits, Oracle
from ras_oracle import RowOracle

P = 2  # latent pixels along a side of a token; tests of other models set another


def run(
    pipe: Any,
    method: RALU,
    latents: Tensor,
    given: dict[str, Any],
    bits: Bits | None = None,
    choose: Callable[..., Any] | None = None,
    orders: Bits | None = None,
    whole: dict[int, int] | None = None,
) -> Tensor:
    """The latents [B, C, H, W] at the end, from initial ones, for the arguments of `tiny_models.arguments`.

    Of a video the picture is all frames below each other.

    Args:
        bits: Schedule of reused outputs over the whole run, block list -> bool [step, block, component].
        choose: ``choose(b, step, velocity, sigmas)`` says which tokens of image b the step after `step` computes, both
            counted from the first at full size, or None for all.
        orders: Like `bits`: of the forecasts of what is reused.
        whole: Step -> order of the forecast of the model's output there, at which it does not run.
    """
    images = [
        _image(pipe, method, latents, given, b, bits, choose, orders, whole or {})
        for b in range(len(latents))
    ]
    return torch.stack(images)


def _image(
    pipe: Any,
    method: RALU,
    latents: Tensor,
    given: dict[str, Any],
    b: int,
    bits: Bits | None,
    choose: Callable[..., Any] | None,
    orders: Bits | None,
    whole: dict[int, int],
) -> Tensor:
    model = CALLS[type(pipe.transformer).__name__](pipe, given, b)
    model.centred = method.mode == "corrected"
    model.weighs = method.weighs_keys
    noise = latents[b]
    content = pack(noise) if _packs(pipe) else noise
    digest = hashlib.blake2b(
        content.contiguous().view(torch.uint8).numpy().tobytes(), digest_size=7
    )
    generator = torch.Generator().manual_seed(int.from_bytes(digest.digest(), "little"))
    multistep = hasattr(pipe.scheduler, "lower_order_nums")
    if model.frames > 1 and not multistep:  # Euler's step from Wan's fp32 gives the model's dtype
        noise = noise.to(pipe.transformer.dtype)
    gh, gw, frames = noise.shape[1] // P, noise.shape[2] // P, model.frames

    # A token is (size in cells, row, column of its first cell, content [C, P, P]).
    if method.stages()[0].layout == "full":
        tokens = cut(noise, 1)
    else:
        tokens = cut(noise[:, ::2, ::2], 2)
    clean, velocities = None, []
    for index, stage in enumerate(method.stages()):
        if index and method.lift != "pixels":
            state = paste([(1, y // 2, x // 2, t) for _, y, x, t in tokens], (gh // 2, gw // 2))
            tokens = cut(_lifted(pipe, method, stage, state, clean, generator, frames), 1)
        elif index:
            scale, deviation, c = stage.scale, stage.deviation, method.noise
            if stage.layout == "full":
                chosen = {i for i, token in enumerate(tokens) if token[0] == 2}
            else:
                if method.selector == "change":
                    energy = [
                        float((now - before).square().sum())
                        for before, now in zip(*velocities[-2:], strict=True)
                    ]
                else:
                    energy = _energy(pipe, method, clean, frames)
                count = method.split_count(len(tokens), len(given["prompt_embeds"][0]), frames)
                own = len(tokens) // frames
                chosen = set()
                for first in range(0, len(tokens), own):
                    order = sorted(range(first, first + own), key=lambda i: -energy[i])
                    chosen |= set(order[: count // frames])
            kept = [token for i, token in enumerate(tokens) if i not in chosen]
            split = [token for i, token in enumerate(tokens) if i in chosen]
            children = [
                (
                    1,
                    y + dy,
                    x + dx,
                    content
                    if method.mode == "parity" or P == 1
                    else content[:, dy, dx, None, None].expand_as(content),
                )
                for _, y, x, content in split
                for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1))
            ]
            tokens = kept + children
            eps = torch.randn(len(tokens), noise.shape[0] * P * P, generator=generator)
            if stage.layout == "full":  # noise was drawn for the picture row by row
                eps = torch.stack([eps[y * gw + x] for _, y, x, _ in tokens])
            eps = eps.double()
            unsplit = 1.0 if method.mode == "parity" else (1 - c) ** 0.5
            z = [unsplit * row for row in eps[: len(kept)]]
            covariance = torch.eye(4, dtype=torch.float64) - c
            values, vectors = torch.linalg.eigh(covariance)
            root = vectors @ values.clamp(min=0).sqrt().diag() @ vectors.T
            for group in eps[len(kept) :].split(4):
                if method.mode == "parity" or P == 1:
                    z += list(root @ group)  # of siblings
                else:  # of the pixels of a child, which are next to each other
                    z += [torch.cat([root @ own for own in child.split(P * P)]) for child in group]
            tokens = [
                (size, y, x, (scale * t.double() + deviation * n.view(t.shape)).to(t.dtype))
                for (size, y, x, t), n in zip(tokens, z, strict=True)
            ]
            if stage.layout == "full":
                tokens.sort(key=lambda token: (token[1], token[2]))
        sigmas = torch.tensor(stage.sigmas, dtype=torch.float32)
        ahead = _multistep(pipe, sigmas, stage.sigmas[-1] == 0)
        sparse = choose if stage.layout == "full" else None
        part = stage, sigmas, bits, sparse, b, orders, whole
        with _leaving_out(pipe, *part) as merged:
            for now, then in itertools.pairwise(sigmas):
                velocity = merged(model(tokens, stage.layout, now, (gh, gw)))
                velocities.append(velocity)
                if ahead is not None:
                    state = torch.stack([t for *_, t in tokens])
                    moved = ahead.step(torch.stack(velocity), 0, state).prev_sample
                    tokens = [(*place, t) for (*place, _), t in zip(tokens, moved, strict=True)]
                    continue
                tokens = [
                    (size, y, x, (t.float() + (then - now) * v).to(t.dtype))
                    for (size, y, x, t), v in zip(tokens, velocity, strict=True)
                ]
        end = stage.sigmas[-1]
        if stage.layout == "coarse":
            clean = paste(
                [
                    (1, y // 2, x // 2, t - end * v)
                    for (_, y, x, t), v in zip(tokens, velocity, strict=True)
                ],
                (gh // 2, gw // 2),
            )
    if tokens[0][0] == 2:  # it never became finer
        small = paste([(1, y // 2, x // 2, t) for _, y, x, t in tokens], (gh // 2, gw // 2))
        return small.repeat_interleave(2, 1).repeat_interleave(2, 2)
    return paste(tokens, (gh, gw))


def _multistep(pipe: Any, sigmas: Tensor, last: bool) -> Any:
    """A stock solver that does a stage's steps and nothing else, where the pipeline's looks back; else None."""
    if not hasattr(pipe.scheduler, "lower_order_nums"):
        return None
    made = type(pipe.scheduler)(**pipe.scheduler.config)
    sigmas[0] = min(float(sigmas[0]), 1 - 1e-6)
    made.set_timesteps(len(sigmas) - 1)
    made.sigmas = sigmas
    made.timesteps = torch.zeros(
        len(sigmas) - 1 + 9 * (not last)
    )  # the order falls at the run's end
    made.set_begin_index(0)
    return made


@contextlib.contextmanager
def _leaving_out(
    pipe: Any,
    stage: Any,
    sigmas: Tensor,
    bits: Bits | None,
    choose: Any,
    b: int,
    orders: Bits | None,
    whole: dict[int, int],
) -> Iterator[Callable[[list[Tensor]], list[Tensor]]]:
    """Run a stage's part of the schedule and its sparse steps; yields what completes the velocities of a step."""
    if bits is not None:
        last = stage.first + stage.steps
        bits = {kind: some[stage.first : last] for kind, some in bits.items()}
        orders = orders and {kind: some[stage.first : last] for kind, some in orders.items()}
    # What was computed of other tokens is drawn through no more.
    whole = {step - stage.first: n for step, n in whole.items() if step > stage.first}
    if choose is None:
        given = {"orders": orders, "sigmas": sigmas.tolist(), "whole": whole}
        cache = Oracle(pipe.transformer, bits, 2, **given).installed() if bits else None
        with cache or contextlib.nullcontext():
            yield lambda velocity: velocity
        return
    led = SimpleNamespace(transformer=pipe.transformer, scheduler=Unchanged(sigmas))
    rows = RowOracle(led, lambda *seen: choose(b, *seen), bits, 2, orders, whole)
    packed = _packs(pipe)

    def whole(velocity: list[Tensor]) -> list[Tensor]:
        joined = torch.stack(velocity).flatten(1) if packed else torch.cat(velocity, dim=-1)
        joined = led.scheduler.step(joined[None])[0]
        return [v.view(-1, P, P) for v in joined] if packed else list(joined.split(P, dim=-1))

    with rows.installed():
        yield whole


class Unchanged:
    """A scheduler that does nothing with a velocity."""

    def __init__(self, sigmas: Tensor) -> None:
        self.sigmas = sigmas

    def step(self, velocity: Tensor) -> Tensor:
        return velocity


def _lifted(
    pipe: Any,
    method: RALU,
    stage: Any,
    state: Tensor,
    clean: Tensor,
    generator: torch.Generator,
    frames: int,
) -> Tensor:
    """The state [C, 2 h, 2 w] of the full stage from the coarse one's [C, h, w], by scipy's cosine transform."""
    channels, height, width = state.shape
    cells = 2 * height // P, 2 * width // P  # of the full stage
    width = cells[1]
    eps = torch.randn(cells[0] * cells[1], channels * P * P, generator=generator)
    tokens = [
        (1, i // width, i % width, row.view(channels, P, P)) for i, row in enumerate(eps.double())
    ]
    if method.lift == "picture":
        drawn = _redrawn(pipe, clean, frames).chunk(frames, dim=1)
    parts = zip(
        *(t.double().chunk(frames, dim=1) for t in (state, paste(tokens, cells), clean)),
        drawn if method.lift == "picture" else [None] * frames,
        strict=True,
    )
    found = torch.cat([_enlarged(method, stage, *part) for part in parts], dim=1)
    return found.to(state.dtype)


def _enlarged(
    method: RALU, stage: Any, state: Tensor, noise: Tensor, clean: Tensor, drawn: Tensor | None
) -> Tensor:
    """A picture, or a frame of a video."""
    z, (channels, height, width) = noise.numpy(), state.shape

    def low(coefficients: np.ndarray) -> np.ndarray:
        """The picture [C, 2 h, 2 w] of a low half alone."""
        padded = np.zeros((channels, 2 * height, 2 * width))
        padded[:, :height, :width] = coefficients
        return scipy.fft.idctn(padded, axes=(1, 2), norm="ortho")

    def waves(picture: np.ndarray) -> np.ndarray:
        return scipy.fft.dctn(picture, axes=(1, 2), norm="ortho")

    told = low(waves(z)[:, :height, :width])
    z = z + ((1 - 4 * method.noise) ** 0.5 - 1) * told
    found = stage.scale * 2 * low(waves(state.double().numpy())) + stage.deviation * z
    if drawn is not None:
        found = found + stage.scale * method.ends[0] * (
            drawn.double().numpy() - 2 * low(waves(clean.numpy()))
        )
    return torch.from_numpy(found)


def _redrawn(pipe: Any, clean: Tensor, frames: int) -> Tensor:
    """The latents [C, 2 h, 2 w] of the picture of `clean` [C, h, w], enlarged."""
    parts = _decoded(pipe, clean, frames).float().chunk(frames, dim=2)
    enlarged = [nn.functional.interpolate(one, scale_factor=2, mode="bicubic") for one in parts]
    image = torch.cat(enlarged, dim=2).clamp(-1, 1)
    if pipe.vae.config.get("spatial_compression_ratio") is None:
        return _encoded(pipe, image)[0]
    video = image[0].unflatten(1, (frames, -1)).to(pipe.vae.dtype)  # of one scale
    found = pipe.vae.encode(video[None]).latent_dist.mode() * pipe.vae.config.scaling_factor
    return found[0].flatten(1, 2)


def _energy(pipe: Any, method: RALU, clean: Tensor, frames: int) -> list[float]:
    """Of the tokens, frame by frame."""
    cells = clean.shape[1] // P // frames, clean.shape[2] // P
    if method.selector == "edges":
        parts, more = _decoded(pipe, clean, frames).chunk(frames, dim=2), [method.mode == "parity"]
    else:
        parts, more = clean[None].chunk(frames, dim=2), []
    energy = getattr(edges, {"edges": "edge"}.get(method.selector, method.selector) + "_energy")
    return [value for part in parts for value in energy(part, cells, *more)[0].tolist()]


def _decoded(pipe: Any, latents: Tensor, frames: int) -> Tensor:
    """The picture [1, 3, H, W] of latents [C, h, w]; a video's is one of each frame's."""
    vae = pipe.vae
    if frames > 1 and hasattr(vae.config, "latents_mean"):  # Wan's
        mean, std = (
            torch.tensor(t).view(-1, 1, 1)
            for t in (vae.config.latents_mean, vae.config.latents_std)
        )
        latents = latents * std + mean
        video = latents.unflatten(1, (frames, -1))[None].to(vae.dtype)
        return vae.decode(video).sample.flatten(2, 3)
    if vae.config.get("spatial_compression_ratio") is not None:  # HunyuanVideo-1.5's
        video = (latents / vae.config.scaling_factor).unflatten(1, (frames, -1))[None]
        return vae.decode(video.to(vae.dtype)).sample.flatten(2, 3)
    scale, shift = _scale_and_shift(pipe, latents)
    return vae.decode((latents / scale + shift)[None].to(vae.dtype)).sample


def _encoded(pipe: Any, image: Tensor) -> Tensor:
    """The latents [1, C, h, w] of a picture [1, 3, H, W]."""
    found = pipe.vae.encode(image.to(pipe.vae.dtype)).latent_dist.mode()
    scale, shift = _scale_and_shift(pipe, found[0])
    return (found - shift) * scale


def _scale_and_shift(pipe: Any, latents: Tensor) -> tuple[Any, Any]:
    """Numbers, or of FLUX.2 one for each place [C, h, w]: those of a token, again and again."""
    vae = pipe.vae
    if not hasattr(vae, "bn"):
        return vae.config.scaling_factor, vae.config.shift_factor or 0
    scale, shift = (vae.bn.running_var + vae.config.batch_norm_eps) ** -0.5, vae.bn.running_mean
    times = [side // P for side in latents.shape[1:]]
    return tuple(t.view(-1, P, P).repeat(1, *times).to(latents.dtype) for t in (scale, shift))


def cut(image: Tensor, size: int) -> list[tuple[int, int, int, Tensor]]:
    """Tokens of an image [C, H, W], each of `size` cells a side."""
    return [
        (size, y * size, x * size, image[:, P * y : P * y + P, P * x : P * x + P])
        for y in range(image.shape[1] // P)
        for x in range(image.shape[2] // P)
    ]


def paste(tokens: list[Any], cells: tuple[int, int]) -> Tensor:
    """The image [C, H, W] of tokens of one cell each."""
    image = tokens[0][3].new_zeros(tokens[0][3].shape[0], P * cells[0], P * cells[1])
    for _, y, x, content in tokens:
        image[:, P * y : P * y + P, P * x : P * x + P] = content
    return image


def pack(image: Tensor) -> Tensor:
    """[..., C, H, W] as FLUX packs it, [..., N, 4 C]."""
    grid = image.unflatten(-1, (-1, P)).unflatten(-3, (-1, P))  # [..., C, gh, P, gw, P]
    return grid.movedim((-4, -2), (-5, -4)).flatten(-3).flatten(-3, -2)


def unpack(tokens: Tensor, cells: tuple[int, int]) -> Tensor:
    """The inverse of :func:`pack`."""
    grid = tokens.unflatten(-1, (-1, P, P)).unflatten(-4, cells)  # [..., gh, gw, C, P, P]
    return grid.movedim((-5, -4), (-4, -2)).flatten(-2).flatten(-3, -2)


def _packs(pipe: Any) -> bool:
    return type(pipe.transformer).__name__.startswith(("Flux", "Qwen"))


@contextlib.contextmanager
def standing(often: list[int], texts: Sequence[int], text_first: bool) -> Iterator[None]:
    """Attention in plain arithmetic, in which the key of each image token stands so often; prompts are so long."""
    image = torch.arange(len(often)).repeat_interleave(torch.tensor(often))
    places = {len(often): image}
    for text in texts:
        beside = torch.arange(text)
        joint = [beside, image + text] if text_first else [image, beside + len(often)]
        places[len(often) + text] = torch.cat(joint)
    stock = nn.functional.scaled_dot_product_attention

    def attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **given: Any
    ) -> Tensor:
        rows = places.get(key.shape[2])
        if rows is None:  # of another stage
            return stock(query, key, value, attn_mask=attn_mask, **given)
        assert not any(given.get(name) for name in ("is_causal", "scale", "enable_gqa"))
        products = query @ key[:, :, rows].transpose(-1, -2) / query.shape[-1] ** 0.5
        if attn_mask is not None:
            products = products.masked_fill(~attn_mask[..., rows], -torch.inf)
        # Where nothing is read, as by padding, torch gives 0.
        return products.softmax(-1).nan_to_num(0) @ value[:, :, rows]

    with mock.patch.object(nn.functional, "scaled_dot_product_attention", attend):
        yield


class Calls:
    """A stock model on a list of tokens."""

    centred: bool
    weighs: bool
    text_first: bool
    frames = 1

    def attention(
        self, tokens: list[Any], layout: str, text: int
    ) -> contextlib.AbstractContextManager:
        """That in which a coarse token among others stands for its four cells, if it does; else the model's own."""
        if layout != "mixed" or not self.weighs:
            return contextlib.nullcontext()
        return standing([size**2 for size, *_ in tokens], [text], self.text_first)

    def places(self, tokens: list[Any], layout: str) -> list[tuple[float, float]]:
        """Row and column of each token, in cells: a coarse one among others may lie in the middle of its four."""
        off = 0.5 if layout == "mixed" and self.centred else 0.0
        return [(y + off * (size - 1), x + off * (size - 1)) for size, y, x, _ in tokens]


class FluxCalls(Calls):
    """Stock FLUX on a list of tokens, true guidance by a second call."""

    text_first = True

    def __init__(self, pipe: Any, given: dict[str, Any], b: int) -> None:
        self.model, self.given = pipe.transformer, given

    def __call__(
        self, tokens: list[Any], layout: str, sigma: Tensor, cells: tuple[int, int]
    ) -> list[Tensor]:
        given, unit = self.given, 1.0 if layout == "full" else 0.5
        ids = torch.tensor([[0.0, y * unit, x * unit] for y, x in self.places(tokens, layout)])
        x = torch.stack([content.flatten() for *_, content in tokens])[None]
        if "condition" in given:  # of Fill and Control, [C, H, W]
            extra = [
                given["condition"][:, P * y : P * (y + size) : size, P * x : P * (x + size) : size]
                for size, y, x, _ in tokens
            ]
            x = torch.cat([x, torch.stack([content.flatten() for content in extra])[None]], dim=2)

        def call(*prompts: Tensor) -> Tensor:
            with self.attention(tokens, layout, prompts[0].shape[1]):
                time = (1000 * sigma).expand(1).to(x.dtype) / 1000
                told = self.told(ids, *prompts)
                return self.model(hidden_states=x, timestep=time, **told).sample[0]

        return [v.view(-1, P, P) for v in self.guided(call)]

    def guided(self, call: Callable[..., Tensor]) -> Tensor:
        """The velocity, by one call or two."""
        given = self.given
        velocity = call(given["prompt_embeds"], given["pooled_prompt_embeds"])
        if given["true_cfg_scale"] > 1:
            other = call(given["negative_prompt_embeds"], given["negative_pooled_prompt_embeds"])
            velocity = other + given["true_cfg_scale"] * (velocity - other)
        return velocity

    def told(self, ids: Tensor, prompt: Tensor, *pooled: Tensor) -> dict[str, Any]:
        """What the model is given beside latents and time; `ids` are a picture's number, row and column."""
        return {
            "encoder_hidden_states": prompt,
            "pooled_projections": pooled[0],
            "guidance": self.guidance,
            "img_ids": ids,
            "txt_ids": torch.zeros(prompt.shape[1], 3),
        }

    @property
    def guidance(self) -> Tensor | None:
        """For a distilled model."""
        distilled = self.model.config.guidance_embeds
        return torch.tensor([self.given["guidance_scale"]]) if distilled else None


class Flux2Calls(FluxCalls):
    """Stock FLUX.2 or klein on a list of tokens; klein's true guidance by a second call."""

    def guided(self, call: Callable[..., Tensor]) -> Tensor:
        given = self.given
        velocity = call(given["prompt_embeds"])
        if "negative_prompt_embeds" in given:
            other = call(given["negative_prompt_embeds"])
            velocity = other + given["guidance_scale"] * (velocity - other)
        return velocity

    def told(self, ids: Tensor, prompt: Tensor, *pooled: Tensor) -> dict[str, Any]:
        words = torch.zeros(prompt.shape[1], 4)
        words[:, 3] = torch.arange(len(words))
        return {
            "encoder_hidden_states": prompt,
            "guidance": self.guidance,
            "img_ids": nn.functional.pad(ids, (0, 1)),
            "txt_ids": words,
        }


class QwenCalls(Calls):
    """Stock Qwen-Image on a list of tokens, guidance by two calls; positions by their formula, from the middle."""

    text_first = True

    def __init__(self, pipe: Any, given: dict[str, Any], b: int) -> None:
        self.model, self.given = pipe.transformer, given

    def __call__(
        self, tokens: list[Any], layout: str, sigma: Tensor, cells: tuple[int, int]
    ) -> list[Tensor]:
        given, scale = self.given, 1 if layout == "full" else 2
        sides = [side // scale for side in cells]
        x = torch.stack([content.flatten() for *_, content in tokens])[None]
        middle = [side - side // 2 for side in sides]
        image = [
            (given.get("frame", 0.0), y / scale - middle[0], x / scale - middle[1])
            for y, x in self.places(tokens, layout)
        ]

        def call(prompt: Tensor, mask: Tensor) -> Tensor:
            length = prompt.shape[1]
            text = [(float(max(sides) // 2 + i),) * 3 for i in range(length)]
            turns = tuple(self._turns(torch.tensor(part)) for part in (image, text))
            self.model.pos_embed.forward = lambda *args, **kwargs: turns
            try:
                with self.attention(tokens, layout, length):
                    return self.model(
                        hidden_states=x,
                        encoder_hidden_states=prompt,
                        encoder_hidden_states_mask=mask,
                        timestep=(1000 * sigma).expand(1).to(x.dtype) / 1000,
                        img_shapes=[[(1, 1, len(tokens))]],
                    ).sample[0]
            finally:
                del self.model.pos_embed.forward

        velocity = call(given["prompt_embeds"], given["prompt_embeds_mask"])
        if given["true_cfg_scale"] <= 1:
            return [v.view(-1, P, P) for v in velocity]
        other = call(given["negative_prompt_embeds"], given["negative_prompt_embeds_mask"])
        guided = other + given["true_cfg_scale"] * (velocity - other)
        pairs = zip(tokens, velocity, guided, strict=True)
        return [_as_long(token[0], a.view(-1, P, P), g.view(-1, P, P)) for token, a, g in pairs]

    def _turns(self, places: Tensor) -> Tensor:
        """Complex numbers [n, d / 2] of places [n, 3], in fp32 as the model's own."""
        parts = []
        for place, width in zip(places.unbind(1), self.model.config.axes_dims_rope, strict=True):
            angles = place[:, None] * 10000.0 ** (-torch.arange(0, width, 2) / width)
            parts.append(torch.polar(torch.ones_like(angles), angles))
        return torch.cat(parts, dim=1)


def _as_long(size: int, wanted: Tensor, guided: Tensor) -> Tensor:
    """A guided velocity [C, P, P] as long as that of the prompt, in each token at full size: a cell, or a pixel of a
    coarse token, which is drawn as large as a cell."""
    sides = (0,) if size > 1 else (0, 1, 2)
    lengths = (x.square().sum(dim=sides, keepdim=True).sqrt() for x in (wanted, guided))
    return guided * next(lengths) / next(lengths)


class SD3Calls(Calls):
    """Stock SD3 on a list of tokens, guidance by two calls; positions by their formula."""

    text_first = False

    def __init__(self, pipe: Any, given: dict[str, Any], b: int) -> None:
        self.model, self.given, self.b = pipe.transformer, given, slice(b, b + 1)

    def __call__(
        self, tokens: list[Any], layout: str, sigma: Tensor, cells: tuple[int, int]
    ) -> list[Tensor]:
        given, b, model = self.given, self.b, self.model
        scale = 1 if layout == "full" else 2
        height, width = (side // scale for side in cells)
        patches = torch.cat([content for *_, content in tokens], dim=-1)[None]  # side by side
        embed = model.pos_embed
        projected = embed.proj(patches).flatten(2).transpose(1, 2)
        size = embed.pos_embed_max_size
        top, left = ((size - side) // 2 for side in (height, width))
        unit = embed.base_size / size / embed.interpolation_scale
        positions = torch.stack(
            [
                sincos((left + x / scale) * unit, (top + y / scale) * unit, projected.shape[-1])
                for y, x in self.places(tokens, layout)
            ]
        )

        def call(prompt: Tensor, pooled: Tensor) -> Tensor:
            embedded = _embedding(model, (projected + positions).to(projected.dtype))
            with embedded, self.attention(tokens, layout, prompt.shape[1]):
                return model(
                    hidden_states=patches,
                    encoder_hidden_states=prompt,
                    pooled_projections=pooled,
                    timestep=(1000 * sigma).expand(1),
                ).sample

        velocity = call(given["prompt_embeds"][b], given["pooled_prompt_embeds"][b])
        if given["guidance_scale"] > 1:
            other = call(
                given["negative_prompt_embeds"][b], given["negative_pooled_prompt_embeds"][b]
            )
            velocity = other + given["guidance_scale"] * (velocity - other)
        return list(velocity[0].split(P, dim=-1))


class ZImageCalls(Calls):
    """Stock Z-Image on a list of tokens, guidance by two calls; the angles of image tokens by their formula.

    Its pipeline hands on latents in fp32 whatever the model's dtype, and it pads to multiples of 32.
    """

    text_first = False

    def __init__(self, pipe: Any, given: dict[str, Any], b: int) -> None:
        self.model, self.given, self.b = pipe.transformer, given, b

    def __call__(
        self, tokens: list[Any], layout: str, sigma: Tensor, cells: tuple[int, int]
    ) -> list[Tensor]:
        given, model = self.given, self.model
        unit = 1.0 if layout == "full" else 0.5
        patches = torch.cat([content for *_, content in tokens], dim=-1).to(model.dtype)
        padding = -len(tokens) % 32
        places = [(unit * y, unit * x) for y, x in self.places(tokens, layout)]

        def call(prompt: Tensor) -> Tensor:
            text = len(prompt) + -len(prompt) % 32
            ids = [(text + 1, *place) for place in places] + [(0, 0, 0)] * padding
            stock, model.rope_embedder = model.rope_embedder, None
            first = [turns(stock, ids)]
            model.rope_embedder = lambda ids: first.pop() if first else stock(ids)
            often = [size**2 for size, *_ in tokens]
            weighs = layout == "mixed" and self.weighs
            try:
                with (
                    standing(often, (padding, padding + text), False)
                    if weighs
                    else contextlib.nullcontext()
                ):
                    time = (1000 - (1000 * sigma).expand(1)) / 1000
                    return model([patches.unsqueeze(1)], time, [prompt]).sample[0].squeeze(1)
            finally:
                model.rope_embedder = stock

        prompts, others = given["prompt_embeds"], given.get("negative_prompt_embeds")
        velocity = call(prompts[self.b % len(prompts)]).float()
        if others:
            other = call(others[self.b % len(others)]).float()
            velocity = velocity + given["guidance_scale"] * (velocity - other)
        return list((-velocity).split(P, dim=-1))


class WanCalls(Calls):
    """Stock Wan on a list of tokens of two frames, guidance by two calls; angles by their formula."""

    frames = 2
    text_first = False

    def __init__(self, pipe: Any, given: dict[str, Any], b: int) -> None:
        self.pipe, self.model, self.given, self.b = pipe, pipe.transformer, given, slice(b, b + 1)

    def __call__(
        self, tokens: list[Any], layout: str, sigma: Tensor, cells: tuple[int, int]
    ) -> list[Tensor]:
        unit, rows = 1.0 if layout == "full" else 0.5, cells[0] // self.frames
        places = [
            (float(y // rows), unit * (y % rows), unit * x) for y, x in self.places(tokens, layout)
        ]
        # One frame of patches side by side.
        x = torch.cat([content for *_, content in tokens], dim=-1)[None, :, None]
        self.model.rope.forward = lambda latents: self.turns(places)
        try:
            time = 1000 * sigma.expand(1)
            if hasattr(self.pipe.scheduler, "lower_order_nums"):  # UniPC's timesteps are whole
                time = time.long()
            velocity = self.guided(tokens, layout, x.to(self.model.dtype), time)
        finally:
            del self.model.rope.forward
        return list(velocity[0, :, 0].split(P, dim=-1))

    def guided(self, tokens: list[Any], layout: str, x: Tensor, time: Tensor) -> Tensor:
        """The velocity by a call for each prompt; text is read by another attention."""
        found = []
        for kind in ("", "negative_"):
            prompt = self.given.get(f"{kind}prompt_embeds")
            if prompt is not None:
                with self.attention(tokens, layout, 0):
                    found.append(self.model(x, time, prompt[self.b]).sample)
        if len(found) == 1:
            return found[0]
        return found[1] + self.given["guidance_scale"] * (found[0] - found[1])

    def turns(self, places: list[Any]) -> tuple[Tensor, Tensor]:
        """cos and sin [1, n, 1, d]."""
        rope = self.model.rope
        angles = angles_of(places, (rope.t_dim, rope.h_dim, rope.w_dim), 10000.0)
        return angles.cos()[None, :, None], angles.sin()[None, :, None]


class HunyuanCalls(WanCalls):
    """Stock HunyuanVideo-1.5, whose text, of three kinds, is in the same attention, behind the video."""

    def guided(self, tokens: list[Any], layout: str, x: Tensor, time: Tensor) -> Tensor:
        beside = self.model.config.in_channels - x.shape[1]
        x = torch.cat([x, x.new_zeros(1, beside, *x.shape[2:])], dim=1)
        found = []
        for kind in ("", "negative_"):
            prompt = self.given.get(f"{kind}prompt_embeds")
            if prompt is None:
                continue
            glyphs = self.given[f"{kind}prompt_embeds_2"][self.b]
            image = x.new_zeros(
                1, self.pipe.vision_num_semantic_tokens, self.model.config.image_embed_dim
            )
            with self.attention(tokens, layout, prompt.shape[1] + glyphs.shape[1] + image.shape[1]):
                found.append(
                    self.model(
                        hidden_states=x,
                        timestep=time.to(x.dtype),
                        encoder_hidden_states=prompt[self.b],
                        encoder_attention_mask=self.given[f"{kind}prompt_embeds_mask"][self.b],
                        encoder_hidden_states_2=glyphs,
                        encoder_attention_mask_2=self.given[f"{kind}prompt_embeds_mask_2"][self.b],
                        image_embeds=image,
                    ).sample
                )
        if len(found) == 1:
            return found[0]
        return found[1] + self.given["guidance_scale"] * (found[0] - found[1])

    def turns(self, places: list[Any]) -> tuple[Tensor, Tensor]:
        """cos and sin [n, d]; the model makes them in fp32."""
        rope = self.model.rope
        angles = angles_of(places, rope.rope_dim, rope.theta, torch.float32)
        return angles.cos(), angles.sin()


def angles_of(
    places: list[Any], dims: Sequence[int], theta: float, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Angles [n, d], each twice, axis by axis."""
    found = []
    for axis, dim in enumerate(dims):
        rates = 1 / theta ** (torch.arange(0, dim, 2, dtype=dtype) / dim)
        place = torch.tensor([place[axis] for place in places], dtype=dtype)
        found.append((place[:, None] * rates).repeat_interleave(2, dim=1))
    return torch.cat(found, dim=1)


def turns(embedder: Any, ids: list[Any]) -> Tensor:
    """Complex numbers of length one, by place, for each axis one after the other."""
    found = []
    for axis, dim in enumerate(embedder.axes_dims):
        rates = [embedder.theta ** (-2 * i / dim) for i in range(dim // 2)]
        found.append(torch.tensor([[place[axis] * rate for rate in rates] for place in ids]))
    angles = torch.cat(found, dim=1)
    return torch.complex(angles.cos(), angles.sin())


def sincos(x: float, y: float, width: int) -> Tensor:
    """A position's embedding [D]: sines and cosines of x, then of y."""
    frequency = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    parts = [torch.cat([(v * frequency).sin(), (v * frequency).cos()]) for v in (x, y)]
    return torch.cat(parts).float().double()  # the model's own table is of fp32


@contextlib.contextmanager
def _embedding(model: nn.Module, tokens: Tensor) -> Iterator[None]:
    """Give the blocks these embedded tokens; hooks see them."""
    model.pos_embed.forward = lambda latents: tokens
    try:
        yield
    finally:
        del model.pos_embed.forward


CALLS = {
    "FluxTransformer2DModel": FluxCalls,
    "Flux2Transformer2DModel": Flux2Calls,
    "QwenImageTransformer2DModel": QwenCalls,
    "HunyuanVideo15Transformer3DModel": HunyuanCalls,
    "SD3Transformer2DModel": SD3Calls,
    "WanTransformer3DModel": WanCalls,
    "ZImageTransformer2DModel": ZImageCalls,
}
