"""What a transformer call asks of the host: Python frames entered and kernels launched, on models of real depth.

They are as narrow as can be, so that nothing else is left. Frames are `sys.setprofile`'s "call" events; launches are
what a dispatch trace sees of operators that make or change memory.
"""

from __future__ import annotations

import functools
import gc
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
from diffusers import (
    FluxTransformer2DModel,
    Lumina2Transformer2DModel,
    LuminaNextDiT2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import tiny_models
from fastdit.ops import BACKENDS, OPS
from fastdit.ops.registry import resolve
from fastdit.runtime import programmed

#: of a run; the call that is counted is one of its later ones
STEPS = 12


def sd3(dual: int = 0, qk_norm: str | None = None) -> nn.Module:
    """SD3-medium's depth; with 13 dual layers and norms SD3.5-medium's."""
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=24,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=20,
        pooled_projection_dim=12,
        dual_attention_layers=tuple(range(dual)),
        qk_norm=qk_norm,
        pos_embed_max_size=16,
    )


def flux() -> nn.Module:
    """FLUX-dev's depth."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=19,
        num_single_layers=38,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=20,
        pooled_projection_dim=12,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )


def pixart() -> nn.Module:
    """PixArt-Sigma's depth."""
    return PixArtTransformer2DModel(
        sample_size=16,
        num_layers=28,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        caption_channels=20,
        cross_attention_dim=16,
        interpolation_scale=1,
        use_additional_conditions=False,
    )


def lumina() -> nn.Module:
    """Lumina-Next's depth."""
    return LuminaNextDiT2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=32,
        num_layers=24,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        norm_eps=1e-5,
        learn_sigma=True,
        qk_norm=True,
        cross_attention_dim=20,
    )


def qwen() -> nn.Module:
    """Qwen-Image's depth."""
    return QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=60,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=20,
        axes_dims_rope=(2, 2, 4),
    )


def wan() -> nn.Module:
    """Wan's depth, that of 14B."""
    return tiny_models.wan(40, attention_head_dim=8, ffn_dim=16)


def flux2() -> nn.Module:
    """FLUX.2's depth."""
    return diffusers.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=8,
        num_single_layers=48,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=20,
        timestep_guidance_channels=32,
        axes_dims_rope=(2, 2, 2, 2),
    )


def lumina2() -> nn.Module:
    """Lumina 2's depth, with its refiners."""
    return Lumina2Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=32,
        num_layers=26,
        num_refiner_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(30, 32, 32),
        cap_feat_dim=20,
    )


def zimage() -> nn.Module:
    """Z-Image's depth."""
    return ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=30,
        n_refiner_layers=2,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=20,
        axes_dims=[2, 2, 4],
        axes_lens=[64, 32, 32],
    )


def hunyuanvideo15() -> nn.Module:
    """HunyuanVideo-1.5's depth."""
    sizes = {"attention_head_dim": 8, "num_refiner_layers": 2, "rope_axes_dim": (2, 2, 4)}
    return tiny_models.hunyuanvideo15(54, **sizes)


#: name -> its form in `tiny_models.PIPELINES`, and what builds it at real depth
MODELS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "SD3": ("sd3", sd3),
    "SD3.5": ("sd3.5", functools.partial(sd3, 13, "rms_norm")),
    "FLUX": ("flux-dev", flux),
    "PixArt": ("pixart-sigma", pixart),
    "Lumina": ("lumina", lumina),
    "Wan": ("wan", wan),
    "Lumina 2": ("lumina2", lumina2),
} | ({"Qwen-Image": ("qwen", qwen)} if tiny_models.HAS_QWEN else {})
if tiny_models.HAS_FLUX2:
    MODELS["FLUX.2"] = "flux2", flux2
MODELS |= {"Z-Image": ("zimage", zimage)} if tiny_models.HAS_ZIMAGE else {}
MODELS["HunyuanVideo-1.5"] = "hunyuanvideo15", hunyuanvideo15


def pipeline(name: str) -> Any:
    """A pipeline of real depth."""
    form, build = MODELS[name]
    pipe = tiny_models.pipeline(form)
    pipe.register_modules(transformer=tiny_models.randomise(build()))
    return pipe


def draw(name: str, pipe: Any, steps: int = STEPS, **more: Any) -> torch.Tensor:
    """The latents of a run, without a second call for guidance."""
    form, _ = MODELS[name]
    cfg = tiny_models.FAMILIES[form].cfg_in_one_call
    given = tiny_models.arguments(form, steps=steps, cfg=cfg, height=8, width=8, **more)
    return tiny_models.latents_of(pipe, given)


@contextmanager
def each_call(pipe: Any, around: Callable[[int, Callable[[], Any]], Any]) -> Iterator[None]:
    """Inside it ``around(number, call)`` stands for each call of the pipeline's transformer."""
    cls = type(pipe.transformer)
    calls = iter(range(sys.maxsize))

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return around(next(calls), lambda: nn.Module.__call__(self, *args, **kwargs))

    cls.__call__ = __call__
    try:
        yield
    finally:
        del cls.__call__


def frames(name: str, pipe: Any, steps: int = STEPS) -> list[Counter[str]]:
    """Python frames that each transformer call of a run enters, by function; the calls of a second run."""
    found: list[Counter[str]] = []

    def around(number: int, call: Callable[[], Any]) -> Any:
        entered: Counter[Any] = Counter()

        def profile(frame: Any, event: str, _: Any) -> None:
            if event == "call":
                entered[frame.f_code] += 1

        gc.disable()  # what others left would be finalised, and counted, here
        sys.setprofile(profile)
        try:
            output = call()
        finally:
            sys.setprofile(None)
            gc.enable()
        named = ((f"{code.co_filename}:{code.co_qualname}", n) for code, n in entered.items())
        found.append(Counter(dict(named)))
        return output

    draw(name, pipe, steps)
    with each_call(pipe, around):
        draw(name, pipe, steps)
    return found


class Launches(TorchDispatchMode):
    """Operators that make or change memory, by name, and all operators that were called.

    Attributes:
        kernels: The former.
        seen: The latter.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        aliases = (a.alias_info for a in func._schema.arguments)
        view = any(alias is not None and not alias.is_write for alias in aliases)
        self.seen[name] += 1
        if not (view or "empty" in name or name in NO_LAUNCH or name.startswith("fastdit::")):
            self.kernels[name] += 1
        return func(*args, **(kwargs or {}))


#: views by another name; and a look at a timestep that only calls on a CPU take
NO_LAUNCH = (
    "aten::detach",
    "aten::_unsafe_view",
    "aten::_reshape_alias",
    "aten::sym_size",
    "aten::equal",
)


@contextmanager
def counted_ops(count: Callable[[str], None]) -> Iterator[None]:
    """Inside it each launch of an op by the backend `cpu` is counted; programs are recorded in there, too."""
    backend = BACKENDS["cpu"]

    def counting(op: str) -> Callable[..., None]:
        function = getattr(backend, op)

        def run(*args: Any) -> None:
            count(f"fastdit::{op}")
            function(*args)

        return run

    vars(backend).update({op: counting(op) for op in OPS if hasattr(backend, op)})
    resolve.cache_clear()
    try:
        yield
    finally:
        for op in OPS:
            vars(backend).pop(op, None)
        resolve.cache_clear()


def launches(name: str, pipe: Any, steps: int = STEPS) -> list[Launches]:
    """What each transformer call of a second run launches, of a pipeline that was just patched: programs that were
    recorded before launch ops unseen."""
    found: list[Launches] = []
    now: list[Launches] = []

    def around(number: int, call: Callable[[], Any]) -> Any:
        now.append(Launches())
        with now[-1]:
            output = call()
        found.append(now.pop())
        return output

    def count(op: str) -> None:
        if now:
            now[-1].kernels[op] += 1

    is_seen = programmed.is_seen
    programmed.is_seen = lambda: False
    try:
        with counted_ops(count):
            draw(name, pipe, steps)
            with each_call(pipe, around):
                draw(name, pipe, steps)
    finally:
        programmed.is_seen = is_seen
    return found


def seconds(name: str, pipe: Any, steps: int = STEPS) -> list[float]:
    """How long this thread computes in each transformer call of a run; what else the machine does is no part of it."""
    found: list[float] = []

    def around(number: int, call: Callable[[], Any]) -> Any:
        start = time.thread_time()
        output = call()
        found.append(time.thread_time() - start)
        return output

    with each_call(pipe, around):
        draw(name, pipe, steps)
    return found
