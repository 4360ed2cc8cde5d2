"""Other projects' caches, each as a context manager that a pipeline draws inside: cache-dit's and those of diffusers.

A cache runs through its own public functions. diffusers' hooks ask the model for methods of `CacheMixin`, which some
families lack although their blocks are known to the hooks: these are lent to the model for the time, and the whole run
is one cache context, which is right where the transformer is called once a step. cache-dit is given a description of
the blocks where it does not know the pipeline's class.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import json
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdit.errors import FastDiTError

#: of diffusers, from the most careful on: thresholds, numbers of steps and of blocks' calls
FIRST_BLOCK = (0.03, 0.06, 0.1, 0.2)
MAG = (0.03, 0.06, 0.12, 0.24)
TAYLOR_SEER = (2, 3, 4, 5)
PYRAMID = (2, 3, 4)
#: of cache-dit: thresholds of the residual's difference
DB_CACHE = (0.08, 0.16, 0.24, 0.4)

Opened = Callable[[Any], Any]


class Refused(FastDiTError):
    """A peer does not run on a model."""


def of_cache_dit(pipe: Any, steps: int) -> dict[str, Opened]:
    """cache-dit's DBCache with one block that always computes, plain and with TaylorSeer of order 1.

    Raises:
        Refused: It is not installed, or knows neither the pipeline's class nor a base class of it.
    """
    if importlib.util.find_spec("cache_dit") is None:
        raise Refused("cache-dit is not installed")
    target(pipe)
    return {
        f"cache-dit DBCache {threshold:g}{' + TaylorSeer' if taylor else ''}": functools.partial(
            _db_cache, steps=steps, threshold=threshold, taylor=taylor
        )
        for taylor in (False, True)
        for threshold in DB_CACHE
    }


def target(pipe: Any) -> Any:
    """What cache-dit is given: the pipeline, or a description by the adapter of its nearest base class that has one.

    Raises:
        Refused: There is none.
    """
    from cache_dit.caching.block_adapters import BlockAdapterRegister

    if BlockAdapterRegister.is_supported(pipe):
        return pipe
    own = type(pipe)
    for base in own.__mro__[1:]:
        # The register goes by the class alone, which the pipeline has again at once.
        if base.__module__.startswith("diffusers.pipelines"):
            pipe.__class__ = base
            try:
                found = BlockAdapterRegister.get_adapter(pipe)
            finally:
                pipe.__class__ = own
            if found is not None:
                return found
    raise Refused(f"cache-dit does not support {own.__name__}")


@contextmanager
def _db_cache(pipe: Any, steps: int, threshold: float, taylor: bool) -> Iterator[None]:
    import cache_dit

    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        max_warmup_steps=min(4, steps - 1),
        residual_diff_threshold=threshold,
    )
    more = {}
    if taylor:
        # SD3's last block gives no text, from which cache-dit would forecast it.
        blocks = getattr(pipe.transformer, "transformer_blocks", [None])
        more["calibrator_config"] = cache_dit.TaylorSeerCalibratorConfig(
            taylorseer_order=1,
            enable_encoder_calibrator=not getattr(blocks[-1], "context_pre_only", False),
        )
    with as_it_was(pipe):
        given = target(pipe)
        cache_dit.enable_cache(given, cache_config=config, **more)
        try:
            yield
        finally:
            cache_dit.disable_cache(given)


@dataclass(frozen=True)
class Guided:
    """How a pipeline runs its transformer with a prompt and without.

    Attributes:
        calls: In a step.
        doubled: Name -> what a call is given for one picture with a row more, see `studio.Sketch`.
        other: The same of another prompt.
        listed: Whether it is given them in lists.
    """

    calls: int
    doubled: Mapping[str, Tensor]
    other: Mapping[str, Tensor]
    listed: bool

    @property
    def prompt_first(self) -> bool:
        """Whether the first of two rows is the prompt's: it alone is another where the prompt is."""
        return any(
            not torch.equal(one[:1], self.other[name][:1])
            and torch.equal(one[1:], self.other[name][1:])
            for name, one in self.doubled.items()
            if name in self.other and one.shape == self.other[name].shape
        )


class Clock:
    """It tells a transformer's timestep by counting its calls, since not every scheduler tells its step.

    Args:
        calls: In a step.
    """

    def __init__(self, pipe: Any, calls: int) -> None:
        self._pipe, self._calls, self._seen = pipe, calls, 0

    def __call__(self) -> int:
        timesteps = self._pipe.scheduler.timesteps
        return int(timesteps[max(0, self._seen - 1) // self._calls % len(timesteps)])

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, it counts."""
        self._seen = 0

        def tick(*_: Any) -> None:
            self._seen += 1

        hook = self._pipe.transformer.register_forward_pre_hook(tick)
        try:
            yield
        finally:
            hook.remove()


def of_diffusers(
    pipe: Any, steps: int, ratios: Any, guided: Guided
) -> tuple[dict[str, Opened], dict[str, str]]:
    """The caches of the installed diffusers, and why some of them do not apply.

    Args:
        ratios: MagCache's, see :func:`mag_ratios`.
    """
    from diffusers import hooks

    now = Clock(pipe, guided.calls)

    def made(name: str, **given: Any) -> Opened:
        config = getattr(hooks, f"{name}Config")(**given)
        return functools.partial(hooked, config=config, clock=now)

    def attention(name: str, **given: Any) -> Opened:
        if guided.calls > 1:
            raise Refused(
                f"it keeps one output of an attention, and the model is called {guided.calls} times a step"
            )
        return made(name, current_timestep_callback=now, **given)

    weight = next(pipe.transformer.parameters())
    plans: dict[str, Callable[[], Mapping[str, Opened]]] = {
        "FirstBlockCache": lambda: {
            f"{each:g}": made("FirstBlockCache", threshold=each) for each in FIRST_BLOCK
        },
        "MagCache": lambda: {
            f"{each:g}": made(
                "MagCache", threshold=each, num_inference_steps=steps, mag_ratios=ratios()
            )
            for each in MAG
        },
        "TaylorSeer": lambda: {
            f"every {each}": made(
                "TaylorSeerCache", cache_interval=each, taylor_factors_dtype=weight.dtype
            )
            for each in TAYLOR_SEER
        },
        "PAB": lambda: {
            f"{each}": attention(
                "PyramidAttentionBroadcast",
                spatial_attention_block_skip_range=each,
                cross_attention_block_skip_range=each + 1,
            )
            for each in PYRAMID
        },
        "FasterCache": lambda: {"2": attention("FasterCache", **_faster_cache(pipe, guided))},
        "SeaCache": lambda: {"0.25": _sea_cache(pipe, made)},
    }
    found, refused = {}, {}
    for name, plan in plans.items():
        try:
            found |= {f"diffusers {name} {setting}": each for setting, each in plan().items()}
        except AttributeError:
            refused[f"diffusers {name}"] = "the installed diffusers does not have it"
        except Exception as error:  # a peer that cannot be set up is a result too
            refused[f"diffusers {name}"] = said(error)
    return found, refused


def _faster_cache(pipe: Any, guided: Guided) -> dict[str, Any]:
    """Its arguments: it computes the prompt's rows alone at some steps, which it takes to come last."""
    if guided.prompt_first:
        raise Refused(
            f"it takes the prompt's rows to come last, {type(pipe).__name__} has them first"
        )
    if guided.listed:
        raise Refused(f"it splits tensors of rows, {type(pipe).__name__} gives lists")
    shape = guided.doubled["hidden_states"].shape if "hidden_states" in guided.doubled else ()
    if len(shape) not in (0, 4, 5):
        raise Refused(f"it splits latents by frequency, and those of this model are {list(shape)}")
    video = "BCFHW" if len(shape) and shape[1] == pipe.transformer.config.in_channels else "BFCHW"
    return {
        "spatial_attention_block_skip_range": 2,
        "attention_weight_callback": lambda _: 0.3,
        "tensor_format": video if len(shape) == 5 else "BCHW",
        "is_guidance_distilled": not guided.doubled,
        "_unconditional_conditional_input_kwargs_identifiers": list(guided.doubled),
    }


def _sea_cache(pipe: Any, made: Callable[..., Opened]) -> Opened:
    kind = type(pipe.transformer).__name__
    if kind not in ("Cosmos3OmniTransformer", "WanTransformer3DModel"):
        raise Refused(
            f"it has no adapter for {kind}, and needs a pipeline that tells it the step and sigma"
        )
    return made("SeaCache")


@contextmanager
def hooked(pipe: Any, config: Any, clock: Clock | None = None) -> Iterator[None]:
    """Inside, a transformer has a cache of diffusers, which may ask the clock."""
    from diffusers.models.cache_utils import CacheMixin

    transformer = pipe.transformer
    with contextlib.ExitStack() as stack:
        stack.enter_context(as_it_was(pipe))
        if clock is not None:
            stack.enter_context(clock.running())
        if not isinstance(transformer, CacheMixin):

            def named() -> None:
                stack.enter_context(CacheMixin.cache_context(transformer, "all"))

            def reset() -> None:
                CacheMixin._reset_stateful_cache(transformer)
                named()

            # The pipeline itself calls what has this name, at the end of a call.
            transformer._reset_stateful_cache = reset
            transformer.is_cache_enabled, transformer._cache_config = False, None
            CacheMixin.enable_cache(transformer, config)
            stack.callback(CacheMixin.disable_cache, transformer)
            named()
        else:
            transformer.enable_cache(config)
            stack.callback(transformer.disable_cache)
        yield


@contextmanager
def as_it_was(pipe: Any) -> Iterator[None]:
    """What is put on a pipeline's class, its transformer or modules of that inside the `with` goes with it.

    Parts that were taken out and put back stand in their old order, by which diffusers finds a first and a last block.
    """
    modules = list(pipe.transformer.modules())
    owners = [type(pipe), pipe, *modules]
    before = [dict(vars(owner)) for owner in owners]
    parts = [dict(module._modules) for module in modules]
    try:
        yield
    finally:
        for module, old in zip(modules, parts, strict=True):
            module._modules.clear()
            module._modules.update(old)
        for owner, old in zip(owners, before, strict=True):
            now = vars(owner)
            for name in [n for n in now if n not in old]:
                # A module keeps its parts in a dict of their own.
                type.__delattr__(owner, name) if isinstance(owner, type) else now.pop(name)
            for name, value in old.items():
                if now.get(name) is not value:
                    setattr(owner, name, value) if isinstance(owner, type) else now.update(
                        {name: value}
                    )


def mag_ratios(pipe: Any, steps: int, draw: Callable[[], Any]) -> list[float]:
    """MagCache's ratios of a model, as it calibrates them: it prints them at the end of a run.

    Args:
        draw: Draws a picture of so many steps with the pipeline.

    Raises:
        Refused: It printed none.
    """
    from diffusers.hooks import MagCacheConfig

    told = io.StringIO()
    config = MagCacheConfig(calibrate=True, num_inference_steps=steps)
    with contextlib.redirect_stdout(told), hooked(pipe, config):
        draw()
    found = re.findall(r"\[[-\d., e]+\]", told.getvalue())
    if not found:
        raise Refused("MagCache's calibration gave no ratios")
    return json.loads(found[-1])


def said(error: BaseException) -> str:
    """An error of another project in one line."""
    text = textwrap.shorten(str(error), 240, placeholder=" ...")
    return text if isinstance(error, FastDiTError) else f"{type(error).__name__}: {text}"
