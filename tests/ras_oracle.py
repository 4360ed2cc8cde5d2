"""RAS restated on stock models, without fastdit: the independent truth for computing a part of the tokens.

Everything the transformer does outside its blocks stays whole: all tokens are embedded and then gathered, and the
active tokens' outputs are put into zeros; the velocity of the others is filled in where the scheduler is given it,
after guidance, as the published implementation does. Attention processors are replaced by one that keeps the keys and
values of all image tokens, before they are joined with the text's, and concatenates. A schedule of reused outputs, if
any, is kept per token; with orders, a polynomial through each token's own last values. Lumina 2 and Z-Image run whole,
since their texts are unlike long: what their inactive tokens give is not kept.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oracle import MODULES, NORMS, Given

#: step, velocity that the scheduler is given, its sigmas -> rows [B, K] of the next step, or None
Choose = Callable[[int, Tensor, Any], Tensor | None]


class RowOracle:
    """A stock pipeline that computes chosen rows.

    Args:
        pipe: Not patched; SD3, FLUX or PixArt.
        choose: Says, at the end of each step, what the next computes.
        bits: Schedule of reused outputs, block list -> bool [step, block, component]; None computes all.
        calls_per_step: Transformer calls within a step.
        orders: Like `bits`: of the forecasts of what is reused; None for repeats.
        whole: Step -> order of the forecast of the model's output there, at which it does not run.
    """

    def __init__(
        self,
        pipe: Any,
        choose: Choose,
        bits: Any = None,
        calls_per_step: int = 1,
        orders: Any = None,
        whole: dict[int, int] | None = None,
    ) -> None:
        self.orders = orders
        self.forecasts = whole or {}
        self.computed: dict[Any, list[tuple[float, Tensor, Tensor]]] = {}
        self.pipe = pipe
        self.model = pipe.transformer
        self.choose = choose
        self.bits = bits
        self.calls_per_step = calls_per_step
        self.qwen = "Qwen" in type(self.model).__name__
        self.flux = self.qwen or "Flux" in type(self.model).__name__  # packs, and puts text first
        self.lumina = "LuminaNext" in type(self.model).__name__
        # a picture each, which come before their texts
        self.listed = "ZImage" in type(self.model).__name__
        self.whole = self.listed or "Lumina2" in type(self.model).__name__
        self.video = "Wan" in type(self.model).__name__
        self.hunyuan = "HunyuanVideo15" in type(self.model).__name__  # whose text has no positions
        self.texts: list[int] = []
        self.step = self.calls = 0
        self.rows: Tensor | None = None
        self.velocity: Tensor | None = None
        self.kept: dict[Any, Any] = {}
        self.slots: dict[Any, Any] = {}
        self.history: dict[int, Tensor] = {}
        self.tokens = 0

    # ---- the run

    @contextmanager
    def installed(self) -> Iterator[RowOracle]:
        """Run the oracle inside the `with`."""
        model, scheduler = self.model, self.pipe.scheduler
        first = getattr(model, "x_embedder", getattr(model, "pos_embed", None))
        first = model.patch_embedder if self.lumina else model.img_in if self.qwen else first
        first = model.patch_embedding if self.video else first
        handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end),
        ]
        if not self.whole:
            last = model.norm_out if self.lumina else model.proj_out
            handles.append(first.register_forward_hook(self._gather))
            if hasattr(model, "vace_blocks"):
                handles.append(model.vace_patch_embedding.register_forward_hook(self._gather))
            handles.append(last.register_forward_hook(self._scatter))
        if self.qwen:
            blocks = model.transformer_blocks
            handles += [b.register_forward_pre_hook(self._pick, with_kwargs=True) for b in blocks]
        changed: list[tuple[Any, str]] = [(scheduler, "step"), (model, "forward")]
        another = scheduler.__dict__.get("step")  # oracle's, of another of the pipeline's models
        model.forward = self._skipping(model.forward)
        scheduler.step = self._stepping(scheduler.step)
        before = [
            (module, module.processor)
            for name, module in model.named_modules()
            if getattr(module, "processor", None) is not None and "context_" not in name
        ]
        for module, processor in before:
            cross = isinstance(module, nn.Module) and getattr(module, "is_cross_attention", False)
            if self.lumina or not cross:  # of that family both turn their queries
                module.processor = Processor(self, processor)
        for module, place, drawn in self._components():
            module.forward = self._reusing(module.forward, place, drawn)
            changed.append((module, "forward"))
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()
            for owner, name in changed:
                del owner.__dict__[name]
            if another is not None:
                scheduler.step = another
            for module, processor in before:
                module.processor = processor

    def _components(self) -> Iterator[tuple[nn.Module, tuple[str, int, int], bool]]:
        """Each module whose output may be reused, its place in the schedule, and whether that is drawn as it is."""
        name = type(self.model).__name__
        for kind, parts in MODULES[name].items() if self.bits is not None else ():
            behind = NORMS.get(name, {}).get(kind, {})
            for index, block in enumerate(getattr(self.model, kind)):
                for position, (part, attribute) in enumerate(parts.items()):
                    norm = behind.get(part) if self.orders is not None else None
                    for path in (attribute, norm):
                        module = None if path is None else operator.attrgetter(path)(block)
                        if module is not None:
                            yield module, (kind, index, position), path is norm or norm is None

    @property
    def side(self) -> int:
        """Of a token, in latent pixels."""
        return 2 if self.flux or self.listed or self.video else self.model.config.patch_size

    def rows_of(self, batch: int) -> Tensor | None:
        """The step's rows for a call of `batch` rows."""
        return None if self.rows is None else self.rows.repeat(batch // self.rows.shape[0], 1)

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        latents = kwargs.get("hidden_states", args[0] if args else None)
        if self.video:
            self.tokens = math.prod(latents.shape[2:]) // math.prod(self.model.config.patch_size)
        else:
            sizes = latents[0].shape if self.listed else latents.shape
            area = math.prod(sizes[2:] if self.hunyuan else sizes[-2:])
            self.tokens = latents.shape[1] if self.flux else area // self.side**2
        if self.listed:
            self.texts = [0] * len(latents)
        elif self.whole:
            self.texts = kwargs["encoder_attention_mask"].sum(dim=1).tolist()

    def active(self, x: Tensor) -> Tensor:
        """Which tokens of a stream [B, n, ...] of Lumina 2 count, [B, n, 1 ...]; text does, and padding."""
        joint = x.shape[1] != self.tokens
        found = torch.ones(x.shape[:2], dtype=torch.bool)
        for b, rows in enumerate(self.rows_of(x.shape[0])):
            first = self.texts[b] if joint else 0
            found[b, first : first + self.tokens] = False
            found[b, first + rows] = True
        return found.view(*found.shape, *[1] * (x.ndim - 2))

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self.calls += 1

    def _gather(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self.lumina:
            tokens, mask, size, angles = output
            rows = self.rows_of(tokens.shape[0])
            if rows is None:
                return output
            angles = angles.expand(rows.shape[0], -1, -1)
            return take(tokens, rows), take(mask, rows), size, take(angles, rows)
        rows = self.rows_of(output.shape[0])
        if self.video and rows is not None:  # [B, D, F, H, W]
            return take(output.flatten(2).mT, rows).mT[..., None, None]
        return output if rows is None else take(output, rows)

    def _pick(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Which of two modulations the rows have, where Qwen-Image has two."""
        index = kwargs["modulate_index"]
        if self.rows is None or index is None:
            return None
        rows = self.rows_of(kwargs["hidden_states"].shape[0])
        return args, kwargs | {"modulate_index": take(index.expand(len(rows), -1), rows)}

    def _scatter(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        rows = self.rows_of(output.shape[0])
        if rows is None:
            return output
        return put(output.new_zeros(output.shape[0], self.tokens, output.shape[2]), rows, output)

    def _stepping(self, step: Callable) -> Callable:
        def merged(velocity: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.step not in self.forecasts:
                if self.rows is not None:
                    mask = self._on_latents(self._active(velocity.shape[0]), velocity)
                    velocity = torch.where(mask, velocity, self.velocity)
                self.velocity = velocity  # as it was last computed
            sigmas = getattr(self.pipe.scheduler, "sigmas", None)
            result = step(velocity, *args, **kwargs)
            self.rows = self.choose(self.step, velocity, sigmas)
            self.step += 1
            if self.rows is not None:
                self.history[self.step] = self.rows
            return result

        return merged

    def _on_latents(self, mask: Tensor, velocity: Tensor) -> Tensor:
        """[B, N] as a mask over latents of this shape."""
        if self.flux:  # Kontext's reference tokens have no velocity
            return mask[:, : velocity.shape[1], None]
        side = self.side
        if (
            self.video or self.hunyuan
        ) and velocity.ndim == 5:  # else its frames lie below each other
            sides = self.model.config.patch_size if self.video else (1, side, side)
            sizes = [n // p for n, p in zip(velocity.shape[2:], sides, strict=True)]
            mask = mask.unflatten(1, sizes)
            for axis, p in enumerate(sides):
                mask = mask.repeat_interleave(p, 1 + axis)
            return mask[:, None]
        grid = mask.unflatten(1, (velocity.shape[-2] // side, -1))
        return grid.repeat_interleave(side, 1).repeat_interleave(side, 2)[:, None]

    def _skipping(self, forward: Callable) -> Callable:
        @functools.wraps(forward)  # some look at its arguments
        def skipped(*args: Any, **kwargs: Any) -> Any:
            key = "output", self.calls % self.calls_per_step
            if self.step in self.forecasts:
                drawn = self._drawn(key, self.forecasts[self.step], self.output)
                return Given((list(drawn.unsqueeze(2).unbind()) if self.listed else drawn,))
            found = forward(*args, **kwargs)
            self.output = torch.stack(found[0]).squeeze(2) if self.listed else found[0]
            mask = self._on_latents(self._active(len(self.output)), self.output)
            self._note(key, self.output, mask.expand_as(self.output))
            return found

        return skipped

    def _active(self, batch: int) -> Tensor:
        """Which image tokens the step computes, [B, N]."""
        rows = self.rows_of(batch)
        if rows is None:
            return torch.ones(batch, self.tokens, dtype=torch.bool)
        return torch.zeros(batch, self.tokens, dtype=torch.bool).scatter(1, rows, True)

    # ---- forecasts

    @property
    def sigma(self) -> float:
        """Of the step."""
        scheduler = self.pipe.scheduler
        if getattr(scheduler, "sigmas", None) is not None:
            return float(scheduler.sigmas[self.step])
        alpha = float(scheduler.alphas_cumprod[int(scheduler.timesteps[self.step])])
        return ((1 - alpha) / alpha) ** 0.5

    def _note(self, key: Any, value: Tensor, mask: Tensor) -> None:
        """A step computed the elements of a mask."""
        self.computed.setdefault(key, []).append((self.sigma, value.clone(), mask.clone()))

    def _drawn(self, key: Any, order: int, like: Tensor) -> Tensor:
        """Each element on the polynomial through its own last values, one for each sigma."""
        at, out = self.sigma, torch.empty_like(like).flatten()
        seen = [(s, value.flatten(), mask.flatten()) for s, value, mask in self.computed[key]]
        for pattern in torch.stack([mask for *_, mask in seen]).unique(dim=1).T:
            same = (torch.stack([mask for *_, mask in seen]) == pattern[:, None]).all(dim=0)
            nodes: dict[float, Tensor] = {}
            for (sigma, value, _), there in zip(seen, pattern, strict=True):
                if there:
                    nodes.pop(sigma, None)
                    nodes[sigma] = value[same]
            used = list(nodes.items())[-1 - order :]
            total = torch.zeros_like(out[same])
            for i, (sigma, value) in enumerate(used):
                others = [other for j, (other, _) in enumerate(used) if j != i]
                total += value * math.prod((at - other) / (sigma - other) for other in others)
            out[same] = total
        return out.view_as(like)

    # ---- a schedule beside it

    def _reusing(self, forward: Callable, place: tuple[str, int, int], drawn: bool) -> Callable:
        kind, block, position = place

        def cached(*args: Any, **kwargs: Any) -> Any:
            key = (*place, drawn, self.calls % self.calls_per_step)
            computes = self.bits[kind][self.step, block, position] or key not in self.slots
            value = forward(*args, **kwargs) if computes else None
            held = self.slots.get(key)
            if self.orders is not None and drawn and not computes:
                order = int(self.orders[kind][self.step, block, position])
                parts = enumerate(held) if isinstance(held, tuple) else [(0, held)]
                found = [
                    None if part is None else self._drawn((*key, i), order, part)
                    for i, part in parts
                ]
                held = tuple(found) if isinstance(held, tuple) else found[0]
            if isinstance(value if computes else held, tuple):
                pairs = zip(value or held, held or value, strict=True)
                found = [
                    self._keep((*key, i), v if computes else None, h)
                    for i, (v, h) in enumerate(pairs)
                ]
                self.slots[key] = tuple(h for _, h in found)
                return tuple(v for v, _ in found)
            value, self.slots[key] = self._keep((*key, 0), value, held)
            return value

        return cached

    def _keep(self, key: Any, value: Tensor | None, held: Tensor | None) -> tuple[Any, Any]:
        """(what the block gets, what is kept) of one tensor; `value` None where it is reused."""
        some = value if value is not None else held
        if some is None:
            return None, None
        rows = self.rows_of(some.shape[0])
        if rows is None:
            if value is not None:
                self._note(key, value, torch.ones_like(value, dtype=torch.bool))
            return some, some
        if self.whole:
            if value is None:
                return held, held
            self._note(key, value, self.active(value).expand_as(value))
            return value, torch.where(self.active(value), value, held)
        whole = held.shape[1]
        if whole == self.tokens:
            index = rows
        elif whole > self.tokens:  # [text, image]
            text = torch.arange(whole - self.tokens).expand(rows.shape[0], -1)
            index = torch.cat([text, whole - self.tokens + rows], 1)
        else:
            if value is not None:
                self._note(key, value, torch.ones_like(value, dtype=torch.bool))
            return some, some
        if value is None:
            return take(held, index), held
        kept = put(held, index, value)
        mask = put(torch.zeros_like(kept), index, torch.ones_like(value)) > 0
        self._note(key, kept, mask)
        return value, kept


class Processor:
    """Attention with kept image keys, spelled out for all three families."""

    def __init__(self, oracle: RowOracle, stock: Any) -> None:
        self.oracle, self.stock = oracle, stock

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        query_rotary_emb: Any = None,
        key_rotary_emb: Any = None,
        base_sequence_length: int | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
        freqs_cis: Any = None,
        **kwargs: Any,
    ) -> Any:
        oracle = self.oracle
        parallel = hasattr(attn, "to_qkv_mlp_proj")  # FLUX.2's single blocks, which pass on less
        if parallel:
            attention_mask, image_rotary_emb = None, attention_mask
        if oracle.whole:
            angles = freqs_cis if oracle.listed else image_rotary_emb
            return self._whole(attn, hidden_states, attention_mask, angles)
        if oracle.lumina:
            given = hidden_states, encoder_hidden_states, attention_mask, query_rotary_emb
            return self._lumina(attn, *given, key_rotary_emb, base_sequence_length)
        batch = hidden_states.shape[0]
        joint = encoder_hidden_states is not None
        if (joint and not hasattr(attn, "add_q_proj")) or (
            getattr(attn, "add_q_proj", 1) is None and joint
        ):
            return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        heads = attn.heads
        if parallel:
            widths = [attn.inner_dim] * 3 + [2 * attn.mlp_hidden_dim]
            *made, mlp = attn.to_qkv_mlp_proj(hidden_states).split(widths, dim=-1)
        else:
            made = [layer(hidden_states) for layer in (attn.to_q, attn.to_k, attn.to_v)]
        q, k, v = (t.unflatten(-1, (heads, -1)) for t in made)
        q, k = self._normed(attn.norm_q, q), self._normed(attn.norm_k, k)
        text = 0
        if oracle.flux and not joint:  # a single-stream block: [text, image]
            text = hidden_states.shape[1] - (
                oracle.tokens if oracle.rows is None else oracle.rows.shape[1]
            )
        parts = [(t[:, :text], t[:, text:]) for t in (q, k, v)]
        if joint:
            added = [
                layer(encoder_hidden_states).unflatten(-1, (heads, -1))
                for layer in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            ]
            added[0] = self._normed(attn.norm_added_q, added[0])
            added[1] = self._normed(attn.norm_added_k, added[1])
            parts = list(zip(added, (q, k, v), strict=True))
            text = encoder_hidden_states.shape[1]
        rows = oracle.rows_of(batch)
        if image_rotary_emb is not None:
            place = "rotation", oracle.calls % oracle.calls_per_step
            if rows is None:
                if oracle.qwen:  # complex, of the image and of the text
                    turns = torch.cat(image_rotary_emb[::-1])
                    image_rotary_emb = [t.repeat_interleave(2, -1) for t in _parts(turns)]
                if oracle.video:  # [1, N, 1, d]
                    image_rotary_emb = [t[0, :, 0] for t in image_rotary_emb]
                oracle.kept[place] = image_rotary_emb
            turn = oracle.kept[place]
            for i in (0, 1):
                first, image = parts[i]
                index = torch.arange(oracle.tokens)[None] if rows is None else rows
                ahead = 0 if oracle.hunyuan else text
                parts[i] = (
                    rotate(first, *(t[None, :text] for t in turn)) if ahead else first,
                    rotate(image, *(t[ahead + index] for t in turn)),
                )
        for i in (1, 2):
            key = (attn, i, oracle.calls % oracle.calls_per_step)
            first, image = parts[i]
            image = image if rows is None else put(oracle.kept[key], rows, image)
            oracle.kept[key] = image
            parts[i] = (first, image)
        order = (lambda a, b: [a, b]) if oracle.flux else (lambda a, b: [b, a])
        q, k, v = (torch.cat(order(*pair), 1).transpose(1, 2) for pair in parts)
        mask = attention_mask if oracle.hunyuan else encoder_hidden_states_mask
        if mask is not None:
            image_mask = mask.new_ones(batch, oracle.tokens)
            mask = torch.cat(order(mask, image_mask), 1)[:, None, None]
        out = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        if not joint:
            if parallel:
                first, second = mlp.chunk(2, dim=-1)
                return attn.to_out(torch.cat([out, F.silu(first) * second], dim=-1))
            if oracle.flux:
                return out
            return attn.to_out[1](attn.to_out[0](out)) / getattr(attn, "rescale_output_factor", 1)
        image = out[:, text:] if oracle.flux else out[:, : out.shape[1] - text]
        first = out[:, :text] if oracle.flux else out[:, out.shape[1] - text :]
        if oracle.flux or not attn.context_pre_only:
            first = attn.to_add_out(first)
        return attn.to_out[1](attn.to_out[0](image)), first

    def _whole(self, attn: nn.Module, x: Tensor, mask: Tensor | None, angles: Tensor) -> Tensor:
        """Queries of all tokens, and the keys of those that count now, or did when they last did."""
        oracle = self.oracle
        width = attn.to_q.weight.shape[0] // attn.heads
        q, k, v = (
            layer(x).unflatten(-1, (-1, width)) for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        turn = [t.repeat_interleave(2, -1) for t in _parts(angles)]
        q, k = (rotate(norm(t), *turn) for norm, t in ((attn.norm_q, q), (attn.norm_k, k)))
        held = []
        for name, new in (("k", k), ("v", v)):
            key = (attn, name, oracle.calls % oracle.calls_per_step)
            if oracle.rows is not None:
                new = torch.where(oracle.active(new), new, oracle.kept[key])
            oracle.kept[key] = new
            held.append(new.repeat_interleave(attn.heads // k.shape[2], 2))
        q, k, v = (t.transpose(1, 2) for t in (q, *held))
        mask = None if mask is None else mask[:, None, None]
        out = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        return attn.to_out[0](out)

    def _lumina(
        self,
        attn: nn.Module,
        x: Tensor,
        context: Tensor,
        mask: Tensor,
        query_rotary_emb: Tensor,
        key_rotary_emb: Tensor | None,
        base_sequence_length: int | None,
    ) -> Tensor:
        oracle, rows = self.oracle, self.oracle.rows_of(x.shape[0])
        width = attn.to_q.weight.shape[0] // attn.heads
        q = attn.norm_q(attn.to_q(x)).unflatten(-1, (-1, width))
        k = attn.norm_k(attn.to_k(context)).unflatten(-1, (-1, width))
        v = attn.to_v(context).unflatten(-1, (-1, width))
        cos, sin = (t.repeat_interleave(2, -1).float() for t in _parts(query_rotary_emb))
        q = rotate(q, cos, sin)
        if key_rotary_emb is None:  # to the text
            held = (t.repeat_interleave(attn.heads // k.shape[2], 2) for t in (k, v))
            q, k, v = (t.transpose(1, 2) for t in (q, *held))
            mask = mask.bool()[:, None, None]
            return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)
        k = rotate(k, cos, sin)
        held = []
        for name, image in (("k", k), ("v", v)):
            key = (attn, name, oracle.calls % oracle.calls_per_step)
            oracle.kept[key] = image if rows is None else put(oracle.kept[key], rows, image)
            held.append(oracle.kept[key].repeat_interleave(attn.heads // k.shape[2], 2))
        scale = width**-0.5
        if base_sequence_length is not None:
            scale *= math.log(oracle.tokens, base_sequence_length) ** 0.5
        q, k, v = (t.transpose(1, 2) for t in (q, *held))
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)

    @staticmethod
    def _normed(norm: nn.Module | None, x: Tensor) -> Tensor:
        if norm is not None and norm.weight is not None and len(norm.weight) > x.shape[-1]:
            return norm(x.flatten(-2)).view_as(x)  # across the heads
        return x if norm is None else norm(x)


def _parts(angles: Tensor) -> tuple[Tensor, Tensor]:
    return angles.real, angles.imag


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[B, n, H, d] turned pair by pair by the angles of [B, n, d], in fp32 as stock diffusers does."""
    cos, sin, wide = cos[:, :, None, ::2], sin[:, :, None, ::2], x.float()
    even, odd = wide[..., ::2], wide[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2).to(x.dtype)


def take(x: Tensor, rows: Tensor) -> Tensor:
    """x [B, N, ...] at rows [B, K]."""
    return torch.stack([sample[index] for sample, index in zip(x, rows, strict=True)])


def put(x: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """x with values at rows."""
    x = x.clone()
    for b in range(x.shape[0]):
        x[b][rows[b]] = values[b]
    return x


def random_rows(counts: dict[int, int], tokens: int, batch: int) -> Choose:
    """Rows that depend on the step alone: `counts` of them at these steps."""

    def choose(step: int, velocity: Tensor, sigmas: Any) -> Tensor | None:
        if step + 1 not in counts:
            return None
        g = torch.Generator().manual_seed(step)
        picks = [
            torch.randperm(tokens, generator=g)[: counts[step + 1]].sort().values
            for _ in range(batch)
        ]
        return torch.stack(picks)

    return choose


def published(
    ratio: float,
    steps: int,
    start: int,
    resets: tuple[int, ...],
    high_ratio: float,
    metric: str = "std",
    linear: tuple[int, int] | None = None,
    patch: int = 2,
    packed: bool = False,
) -> Choose:
    """The published selection (sections 3 and 4 of the paper's code), for one image."""
    state: dict[str, Tensor] = {}

    def dropped(step: int, tokens: int) -> int:
        count = int((1 - ratio) * tokens)
        if linear is not None:
            more, every = linear
            count += more * (step // every - math.floor(math.floor((steps + start) / every) / 2))
            count = 64 * math.floor(count / 64)
        return 0 if step < start or step in resets else count

    def choose(step: int, velocity: Tensor, sigmas: Tensor) -> Tensor | None:
        if packed:  # [N, C p p] as [C, N, 1, p, p]
            field = velocity[0].unflatten(-1, (-1, patch, patch)).transpose(0, 1).unsqueeze(2)
        else:  # [C, gh, gw, p, p]
            rows = velocity[0].unflatten(-1, (-1, patch)).unflatten(1, (-1, patch))
            field = rows.transpose(2, 3)
        tokens = field.shape[1] * field.shape[2]
        if "drops" not in state:
            state["drops"] = torch.full((tokens,), -float(steps + 1))
        if step + 1 >= steps:
            return None
        count = dropped(step + 1, tokens)
        low, high = int(count * (1 - high_ratio)), int(count * high_ratio)
        if step + 1 < start or step + 1 in resets or low + high == 0:
            return None
        moved = (sigmas[step + 1] - sigmas[step]) * field
        per_pixel = moved.std(0) if metric == "std" else moved.norm(dim=0)
        score = per_pixel.mean(-1).mean(-1).flatten()
        score = (score * torch.exp(0.1 * state["drops"])).to(score.dtype)
        order = torch.sort(score).indices
        state["drops"][order[:low]] += 1
        state["drops"][order[tokens - high :]] += 1
        return order[low : tokens - high][None]

    return choose


def by_change(
    ratio: float,
    steps: int,
    start: int,
    resets: tuple[int, ...],
    patch: int = 2,
    packed: bool = False,
    max_age: int | None = None,
    drawn: Collection[int] = (),
) -> Choose:
    """Tokens by how wrong their kept velocities are, in fp64, token by token.

    At the steps `drawn` the model does not run, so nothing is seen there and nothing chosen before.
    """
    known: list[list[dict[str, Any]]] = []
    chosen: list[Any] = [None]

    def choose(step: int, velocity: Tensor, sigmas: Tensor) -> Tensor | None:
        if packed:
            tokens = velocity
        elif velocity.ndim == 5:  # a video's patches are of one frame
            tokens = F.unfold(velocity.transpose(1, 2).flatten(0, 1), patch, stride=patch)
            tokens = tokens.unflatten(0, (len(velocity), -1)).transpose(2, 3).flatten(1, 2)
        else:
            tokens = F.unfold(velocity, patch, stride=patch).transpose(1, 2)
        batch, count, _ = tokens.shape
        known.extend([{"age": 0} for _ in range(count)] for _ in range(batch - len(known)))
        for b in range(batch):
            for i, token in enumerate(() if step in drawn else known[b]):
                if chosen[0] is None or i in chosen[0][b]:
                    now, sigma = tokens[b, i].double(), float(sigmas[step])
                    if "value" in token and sigma != token["sigma"]:
                        change = math.dist(now.tolist(), token["value"].tolist())
                        token["rate"] = change / abs(sigma - token["sigma"])
                    token.update(value=now, sigma=sigma)
        if step + 1 in drawn:
            return None
        dense = step + 1 < start or step + 1 in resets or step + 1 >= steps
        keep = count - int((1 - ratio) * count)
        if dense or keep == count:
            chosen[0] = None
            for of_image in known:
                for token in of_image:
                    token["age"] = 0
            return None
        coming, picked = float(sigmas[step + 1]), []
        for of_image in known:

            def last_dropped(i: int, of_image: Any = of_image) -> Any:
                token = of_image[i]
                forced = max_age is not None and token["age"] >= max_age
                unknown = "rate" not in token
                score = 0.0 if unknown else token["rate"] * abs(coming - token["sigma"])
                return forced, unknown, score, i

            order = sorted(range(count), key=last_dropped)
            kept = sorted(order[count - keep :])
            for i, token in enumerate(of_image):
                token["age"] = 0 if i in kept else token["age"] + 1
            picked.append(kept)
        chosen[0] = picked
        return torch.tensor(picked)

    return choose
