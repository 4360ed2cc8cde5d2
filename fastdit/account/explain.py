"""What a patched model will do, before it does it: backends, plan, FLOPs, bytes and cache size.

Nothing runs: see `account/cost.py` for what is counted.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastdit.account.cost import Cost
from fastdit.account.report import ranges
from fastdit.adapters.base import Size
from fastdit.blocks.modulation import ahead
from fastdit.blocks.packed import packs
from fastdit.errors import ArgumentError
from fastdit.runtime.clock import predicted_levels
from fastdit.schedules.actions import COMPUTE
from fastdit.schedules.plan import RunPlan, everywhere, plan_run
from fastdit.schedules.schedule_file import MAX_COUNT
from fastdit.spec import ModelSpec

DEFAULT_STEPS = 28
MAX_SIZE = 1 << 16  # of batch, height and width
SHADES = "·░▒▓█"


@dataclass(frozen=True)
class Explanation:
    """A prediction; `print` it.

    Attributes:
        family, model: Adapter and transformer class.
        blocks: Block kind -> (count, component names).
        methods: Names of the methods.
        backends: Op -> backend that will serve it.
        steps, rows, image_tokens, text_tokens: The run: transformer rows are batch times CFG branches.
        reuse_share: Share of all (step, block, component) cells that do not run, each counted alike (HarmoniCa's CUR).
        macs, dense_macs: Multiply-accumulates of the run, with the plan and without.
        linear_macs: Those of linear layers where the schedule's bits compute, of all tokens: the ECAD paper's count.
        residual_bytes, dense_residual_bytes: Bytes that residual updates move, with the plan and in eager diffusers.
        cache_bytes: Most bytes in caches at once.
        modulation_bytes: Bytes of the modulations made ahead for the next steps, beside the caches, where a step is one
            call and its timesteps are known.
        packed_bytes: Most bytes of weights kept packed for few rows, beside the caches; 0 without `pack_weights`.
        tokens_per_step: Image tokens of each step, where a method leaves some out; else empty.
        resampled: The row of a schedule of another number of steps that each step takes; else empty.
        collapse: Which reused outputs are kept as sums, or why none are; empty where the family has no such sums.
        reusable_share: Share of the arithmetic of a dense step that is in components: the most that reuse can spare.
        exact: Whether arithmetic and caches are counted. A model without an adapter is counted on the arguments of its
            last call of this size; before there was one they are estimates.
        raster: One line per component, one character per step: share of the blocks that compute.
    """

    family: str
    model: str
    blocks: Mapping[str, tuple[int, tuple[str, ...]]]
    methods: tuple[str, ...]
    backends: Mapping[str, str]
    steps: int
    rows: int
    image_tokens: int
    text_tokens: int
    reuse_share: float
    macs: int
    linear_macs: int
    dense_macs: int
    residual_bytes: int
    dense_residual_bytes: int
    cache_bytes: int
    raster: str
    modulation_bytes: int = 0
    packed_bytes: int = 0
    tokens_per_step: tuple[int, ...] = ()
    resampled: tuple[int, ...] = ()
    collapse: str = ""
    reusable_share: float = 1.0
    exact: bool = True

    @property
    def flop_speedup(self) -> float:
        """Dense over planned multiply-accumulates: the most a run can gain where arithmetic is all."""
        return self.dense_macs / self.macs if self.macs else 1.0

    def __str__(self) -> str:
        blocks = ", ".join(
            f"{count} x {kind} ({', '.join(names)})" for kind, (count, names) in self.blocks.items()
        )
        backends = ", ".join(f"{op} on {name}" for op, name in self.backends.items())
        tokens = f"{self.image_tokens} image + {self.text_tokens} text tokens"
        lines = [
            f"fastdit {' + '.join(self.methods)} on {self.model} ({self.family})",
            f"  blocks    {blocks}",
            f"  ops       {backends}",
            f"  run       {self.steps} steps, {self.rows} rows of {tokens}",
            f"  reuse     {self.reuse_share:.2%} of all components of all steps",
            f"  spared    at most {self.reusable_share:.1%} of the arithmetic: that of components",
            f"  compute   {_macs(self.macs, self.dense_macs)}: {self.flop_speedup:.2f}x fewer"
            + ("" if self.exact else ", estimated before a call of this size"),
            f"  residuals {self.residual_bytes / 2**30:.2f} of {self.dense_residual_bytes / 2**30:.2f} GiB moved",
            f"  caches    at most {self.cache_bytes / 2**20:.1f} MiB",
        ]
        if self.modulation_bytes:
            lines.append(
                f"  ahead     modulations of the next steps, {self.modulation_bytes / 2**20:.1f} MiB"
            )
        if self.packed_bytes:
            lines.append(f"  packed    weights, at most {self.packed_bytes / 2**20:.1f} MiB")
        if self.collapse:
            lines.append(f"  collapse  {self.collapse}")
        if self.tokens_per_step:
            lines.append(f"  tokens    per step {ranges(self.tokens_per_step)}")
        if self.resampled:
            rows = ", ".join(map(str, self.resampled))
            lines.append(f"  schedule  its rows {rows}, the nearest in noise level")
        return "\n".join(lines) + (
            f"\n  plan      step 0 to {self.steps - 1}\n{self.raster}" if self.raster else ""
        )


def _macs(count: int, dense: int) -> str:
    """Both in the unit that suits a dense run, which for a tiny model is no TMAC."""
    scale, unit = next(
        ((s, u) for s, u in ((1e12, "TMAC"), (1e9, "GMAC")) if dense >= s), (1e6, "MMAC")
    )
    return f"{count / scale:.4g} of {dense / scale:.4g} {unit}"


def explain_patched(
    patched: Any,
    transformer: nn.Module,
    pipeline: Any | None,
    height: int | None,
    width: int | None,
    batch: int,
    steps: int | None,
    cfg: bool | None,
    text_tokens: int | None,
) -> Explanation:
    """See :meth:`fastdit.patch.Handle.explain`."""
    adapter, spec = patched.adapter, patched.spec
    if steps is None:
        fixed = (method.run_steps for method in patched.methods)
        steps = next((n for n in fixed if n is not None), _default_steps(pipeline))
    for name, value, most in (
        ("batch", batch, MAX_SIZE),
        ("steps", steps, MAX_COUNT),
        ("height", height, MAX_SIZE),
        ("width", width, MAX_SIZE),
    ):
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most
        ):
            raise ArgumentError(f"{name} must be an int from 1 to {most}, got {value!r}")
    image = adapter.tokens(transformer, (1, 1, *_latent_size(transformer, pipeline, height, width)))
    text = adapter.text_tokens_of(pipeline) if text_tokens is None else text_tokens
    size = Size(image, text)
    rows = batch * (2 if (adapter.uses_cfg if cfg is None else cfg) else 1)
    weight = next(p for p in transformer.parameters() if p.is_floating_point())
    lengths, active = _tokens_per_step(patched.methods, steps, image, text)
    tokens = tuple(
        length if step is None else step.keep for length, step in zip(lengths, active, strict=True)
    )
    levels = None if pipeline is None else predicted_levels(pipeline.scheduler, steps, image)
    for method in patched.methods:
        if "resolution" in method.writes:
            levels = levels.with_sigmas(method.run_sigmas)
    partial = tuple(step is not None for step in active) if any(active) else ()
    repeats = patched.forecasts and levels is not None and levels.repeat
    plan = plan_run(patched.methods, spec, steps, partial, levels, patched.may_collapse(), repeats)
    count = Cost(adapter, transformer, spec, size, rows, transformer.dtype.itemsize)
    stages = [
        (count.at(length), plan.part(first, last), tokens[first:last])
        for length, first, last in _runs(lengths)
    ]
    written = {field for method in patched.methods for field in method.writes}
    return Explanation(
        family=adapter.family,
        model=type(transformer).__name__,
        blocks={kind.name: (kind.count, kind.components) for kind in spec.kinds},
        methods=tuple(method.name for method in patched.methods),
        backends={
            op: patched.ops.backend_for(op, weight.device, transformer.dtype)
            for op in (
                "gated_residual",
                "norm_modulate",
                *(("qkv_prologue", "token_change", "token_select") if "rows" in written else ()),
                *(
                    ("patchify", "unpatchify", "resolution_transition")
                    if "resolution" in written
                    else ()
                ),
            )
        },
        steps=steps,
        rows=rows,
        image_tokens=image,
        text_tokens=text,
        reuse_share=count.reuse_share(plan),
        macs=sum(part.macs(steps, tokens, not patched.eager) for part, steps, tokens in stages),
        linear_macs=count.linear_macs(plan.reuse, steps),
        dense_macs=count.macs(RunPlan(steps, None, ())),
        residual_bytes=sum(part.residual_bytes(steps) for part, steps, _ in stages),
        dense_residual_bytes=5 * count.bytes_of_outputs() * steps,
        cache_bytes=max(_slot_bytes(patched, part, steps) for part, steps, _ in stages)
        + (count.key_bytes() if any(active) else 0)
        + (0 if patched.eager else count.prompt_bytes()),
        modulation_bytes=0 if patched.eager else count.modulation_bytes(ahead(rows, steps)),
        packed_bytes=sum(layer.weight.nbytes for layer in patched.linears if packs(layer.weight)),
        tokens_per_step=tokens if written & {"rows", "resolution"} else (),
        raster=raster(plan, spec),
        resampled=plan.reuse.rows if plan.reuse is not None else (),
        collapse=_collapse(patched, plan, bool(partial)),
        reusable_share=count.reusable_share,
        exact=count.exact,
    )


def _collapse(patched: Any, plan: RunPlan, partial: bool) -> str:
    """What becomes of runs of reused outputs in a model whose gates allow sums; empty for others."""
    if plan.reuse is None or not patched.spec.shared_gates:
        return ""
    if patched.eager:
        return "off on the reference backend"
    if partial:
        return "off: steps compute a part of the tokens"
    if not patched.may_collapse():
        return "off: hooks look at blocks"
    lengths = sorted(len(s.cells) for step in plan.sums for s in set(step.made.values()))
    if not lengths:
        return "none: no run of reused outputs stays long enough to pay"
    between = f"{lengths[0]} to {lengths[-1]}" if lengths[0] < lengths[-1] else f"{lengths[0]}"
    return f"{len(lengths)} times {between} outputs are kept as 3 sums"


def _slot_bytes(patched: Any, count: Cost, plan: RunPlan) -> int:
    """Most bytes of slots; a lower precision makes them smaller."""
    names = [method.cache_dtype for method in patched.methods if method.cache_dtype is not None]
    itemsize = min([count.itemsize, *(getattr(torch, name).itemsize for name in names)])
    return count.cache_bytes(plan, itemsize, estimated=True)


def run_speedup(patched: Any, run: Any, transformer: nn.Module) -> tuple[float, bool]:
    """Multiply-accumulates of the last run as the stock model would do them, over those that it did; whether counted.

    Both branches of guidance and all images of a batch follow one plan, so their number cancels out.
    """
    if run is None or not run.records:
        return 1.0, True
    steps = sorted(run.records)
    told = [run.records[step].actions for step in steps]  # a method may decide as the run goes on
    computes = everywhere(patched.spec, COMPUTE)
    actions = [row or computes for row in told] if any(told) else ()
    forecasts = [0 if run.records[step].computed else run.plan.order_of(step) for step in steps]
    plan = RunPlan(len(steps), run.plan.reuse, actions, forecasts=forecasts)
    size = Size(run.image_tokens, run.text_tokens)
    count = Cost(patched.adapter, transformer, patched.spec, size, 1, 1)
    dense = count.macs(RunPlan(len(steps), None, ()))
    tokens = [run.records[step].tokens for step in steps]
    lengths = [run.image_tokens] * len(steps)
    resolution = run.resolution
    if resolution is not None:
        lengths = resolution.method.tokens(run.image_tokens, run.text_tokens)[: len(steps)]
    spent = sum(
        count.at(length).macs(plan.part(first, last), tokens[first:last], not patched.eager)
        for length, first, last in _runs(lengths)
    )
    return dense / spent if spent else 1.0, count.exact


def _tokens_per_step(
    methods: Sequence[Any], steps: int, image: int, text: int
) -> tuple[list[int], list[Any]]:
    """Of each step: the image tokens there are, and what a method that leaves some out computes of them, or None."""
    lengths, active, first = [image] * steps, [None] * steps, 0
    for method in methods:
        if "resolution" in method.writes:
            method.check_steps(steps)
            lengths = method.tokens(image, text)
            first = method.stages()[-1].first
    for method in methods:
        if "rows" in method.writes:
            active[first:] = method.active(steps - first, image)
    return lengths, active


def _runs(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """(value, first, last + 1) of each run of equal values."""
    found, first = [], 0
    for last in range(1, len(lengths) + 1):
        if last == len(lengths) or lengths[last] != lengths[first]:
            found.append((lengths[first], first, last))
            first = last
    return found


def raster(plan: RunPlan, spec: ModelSpec) -> str:
    """The plan as text: one line per component, one character per step."""
    if not plan.actions:
        return ""
    lines, first = [], 0
    if not spec.kinds:
        return "  output " + "".join(SHADES[0 if order else 4] for order in plan.forecasts)
    names = [component for kind in spec.kinds for component in kind.components]
    for kind in spec.kinds:
        for component in kind.components:
            blocks = [first + b for b in range(kind.count) if (b, component) not in kind.absent]
            if blocks:
                shares = [
                    sum(step[b][component] & COMPUTE for b in blocks) / len(blocks)
                    for step in plan.actions
                ]
                cells = "".join(
                    SHADES[0 if s == 0 else 4 if s == 1 else 1 + min(2, int(3 * s))] for s in shares
                )
                lines.append(f"  {component:>{max(map(len, names))}} {cells}")
        first += kind.count
    return "\n".join(lines)


def _default_steps(pipeline: Any | None) -> int:
    if pipeline is None:
        return DEFAULT_STEPS
    parameter = inspect.signature(type(pipeline).__call__).parameters.get("num_inference_steps")
    return (
        parameter.default
        if parameter is not None and isinstance(parameter.default, int)
        else DEFAULT_STEPS
    )


def _latent_size(
    transformer: nn.Module, pipeline: Any | None, height: int | None, width: int | None
) -> tuple[int, int]:
    """Latent height and width; FLUX has its default size in the pipeline, the others in the transformer."""
    scale = getattr(pipeline, "vae_scale_factor", 8)
    sample = (
        getattr(transformer.config, "sample_size", None)
        or getattr(pipeline, "default_sample_size", None)
        or 128
    )
    return (height // scale if height else sample), (width // scale if width else sample)
