"""What a patched model will do, before it does it: backends, plan, FLOPs, bytes and cache size.

Counts are closed forms over the model's own layers (multiply-accumulates of linear layers and of attention products;
norms and activations are not counted), so nothing runs. The cache size is the sum of the slots that are kept after the
worst step.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastdit.adapters.base import Size
from fastdit.clock import predicted_levels
from fastdit.errors import ArgumentError
from fastdit.plan import COMPUTE, KEEP, REUSE, RunPlan, plan_run
from fastdit.report import ranges
from fastdit.spec import ModelSpec

DEFAULT_STEPS = 28
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
        residual_bytes, dense_residual_bytes: Bytes that residual updates move, with the plan and in eager diffusers.
        cache_bytes: Most bytes in caches at once.
        tokens_per_step: Image tokens of each step, where a method leaves some out; else empty.
        resampled: The row of a schedule of another number of steps that each step takes; else empty.
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
    dense_macs: int
    residual_bytes: int
    dense_residual_bytes: int
    cache_bytes: int
    raster: str
    tokens_per_step: tuple[int, ...] = ()
    resampled: tuple[int, ...] = ()

    @property
    def flop_speedup(self) -> float:
        """Dense over planned multiply-accumulates: the most a run can gain where arithmetic is all."""
        return self.dense_macs / self.macs

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
            f"  compute   {self.macs / 1e12:.3f} of {self.dense_macs / 1e12:.3f} TMAC: {self.flop_speedup:.2f}x fewer",
            f"  residuals {self.residual_bytes / 2**30:.2f} of {self.dense_residual_bytes / 2**30:.2f} GiB moved",
            f"  caches    at most {self.cache_bytes / 2**20:.1f} MiB",
        ]
        if self.tokens_per_step:
            lines.append(f"  tokens    per step {ranges(self.tokens_per_step)}")
        if self.resampled:
            rows = ", ".join(map(str, self.resampled))
            lines.append(f"  schedule  its rows {rows}, the nearest in noise level")
        return "\n".join(lines) + (
            f"\n  plan      step 0 to {self.steps - 1}\n{self.raster}" if self.raster else ""
        )


def explain_session(
    session: Any,
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
    adapter, spec = session.adapter, session.spec
    if steps is None:
        fixed = (method.run_steps for method in session.methods)
        steps = next((n for n in fixed if n is not None), _default_steps(pipeline))
    for name, value in (("batch", batch), ("steps", steps), ("height", height), ("width", width)):
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int) or value < 1
        ):
            raise ArgumentError(f"{name} must be a positive int, got {value!r}")
    image = adapter.tokens(transformer, (1, 1, *_latent_size(transformer, pipeline, height, width)))
    text = adapter.text_tokens_of(pipeline) if text_tokens is None else text_tokens
    size = Size(image, text)
    rows = batch * (2 if (adapter.uses_cfg if cfg is None else cfg) else 1)
    weight = next(p for p in transformer.parameters() if p.is_floating_point())
    token_method = next((m for m in session.methods if "rows" in m.writes), None)
    active = [] if token_method is None else token_method.active(steps, image)
    tokens = tuple(image if step is None else step.keep for step in active)
    levels = None if pipeline is None else predicted_levels(pipeline.scheduler, steps, image)
    partial = tuple(step is not None for step in active)
    plan = plan_run(session.methods, spec, steps, partial, levels)
    count = _Count(adapter, transformer, spec, size, rows, transformer.dtype.itemsize)
    return Explanation(
        family=adapter.family,
        model=type(transformer).__name__,
        blocks={kind.name: (kind.count, kind.components) for kind in spec.kinds},
        methods=tuple(method.name for method in session.methods),
        backends={
            op: session.ops.backend_for(op, weight.device, transformer.dtype)
            for op in (
                "gated_residual",
                "norm_modulate",
                *(() if token_method is None else ("qkv_prologue", "token_select")),
            )
        },
        steps=steps,
        rows=rows,
        image_tokens=image,
        text_tokens=text,
        reuse_share=count.reuse_share(plan),
        macs=count.macs(plan, tokens),
        dense_macs=count.macs(RunPlan(steps, None, ())),
        residual_bytes=count.residual_bytes(plan),
        dense_residual_bytes=5 * count.bytes_of_outputs() * steps,
        cache_bytes=count.cache_bytes(plan) + (count.key_bytes() if any(active) else 0),
        tokens_per_step=tokens,
        raster=raster(plan, spec),
        resampled=plan.reuse.rows if plan.reuse is not None else (),
    )


def run_speedup(session: Any, transformer: nn.Module) -> float:
    """Multiply-accumulates of the last run as the stock model would do them, over those that it did.

    Both branches of guidance and all images of a batch follow one plan, so their number cancels out.
    """
    run = session.run
    if run is None or not run.records:
        return 1.0
    steps = sorted(run.records)
    actions = [run.plan.actions[step] for step in steps] if run.plan.actions else ()
    plan = RunPlan(len(steps), run.plan.reuse, actions)
    size = Size(run.image_tokens, run.text_tokens)
    count = _Count(session.adapter, transformer, session.spec, size, 1, 1)
    dense = count.macs(RunPlan(len(steps), None, ()))
    return dense / count.macs(plan, [run.records[step].tokens for step in steps])


class _Count:
    """Sums over the components of a model for one size; per-component values are computed once."""

    def __init__(
        self,
        adapter: Any,
        transformer: nn.Module,
        spec: ModelSpec,
        size: Size,
        rows: int,
        itemsize: int,
    ) -> None:
        blocks = adapter.blocks(transformer)
        first = {}
        for index, (kind, _) in enumerate(blocks):
            first.setdefault(kind, index)
        self._adapter, self._size, self._rows, self._itemsize = adapter, size, rows, itemsize
        self._transformer = transformer
        self._arguments: list[tuple[Any, ...]] = []
        self._sparse: dict[int, list[int]] = {}
        self.cells = []  # (block over all kinds, component, MACs, bytes, adds to the stream itself)
        for kind, block, component in spec.components():
            index = first[kind.name] + block
            arguments = (transformer, kind.name, blocks[index][1], component, size)
            macs = adapter.macs(*arguments) * rows
            moved = adapter.slot_elements(*arguments) * rows * itemsize
            self.cells.append((index, component, macs, moved, component not in kind.consumers))
            self._arguments.append(arguments[:-1])
        self.overhead = adapter.overhead_macs(transformer, size) * rows
        self.stream = (size.image + size.text) * adapter.width(transformer) * rows * itemsize

    def reuse_share(self, plan: RunPlan) -> float:
        """Share of the cells that do not run."""
        skipped = sum(
            not step[index][component] & COMPUTE
            for step in plan.actions
            for index, component, *_ in self.cells
        )
        return skipped / (plan.steps * len(self.cells))

    def macs(self, plan: RunPlan, tokens: Sequence[int] = ()) -> int:
        """Multiply-accumulates of a run whose steps compute so many image tokens; all if not said."""
        total = 0
        for step in range(plan.steps):
            count = tokens[step] if tokens else self._size.image
            actions = plan.actions[step] if plan.actions else None
            total += self._adapter.overhead_macs(
                self._transformer, Size(count, self._size.text)
            ) * self._rows + sum(
                macs
                for (index, component, *_), macs in zip(self.cells, self._at(count), strict=True)
                if actions is None or actions[index][component] & COMPUTE
            )
        return total

    def _at(self, count: int) -> list[int]:
        """MACs of every cell for `count` active image tokens, whose attentions still read the keys of all.

        A count of n tokens is a n + q (n + t)^2 + c with the attention's products in q, t being the text where it joins
        them. The second difference is 2 q; of these products, (count + t) ask and (image + t) are asked.
        """
        if count not in self._sparse:
            image, text = self._size.image, self._size.text

            def macs(arguments: tuple[Any, ...], n: int) -> int:
                return self._adapter.macs(*arguments, Size(n, text)) * self._rows

            found = []
            for arguments in self._arguments:
                dense = macs(arguments, count)
                q = (macs(arguments, count + 1) - 2 * dense + macs(arguments, count - 1)) // 2
                joint = set(self._adapter.layouts.get(arguments[-1], ())) & {"text", "joint"}
                asked = count + (text if joint else 0)
                found.append(dense + q * asked * (image - count))
            self._sparse[count] = found
        return self._sparse[count]

    def key_bytes(self) -> int:
        """Bytes of the keys and values that a method keeps which leaves tokens out, one CFG branch's rows."""
        total = 0
        for (_, component, *_), arguments in zip(self.cells, self._arguments, strict=True):
            transformer, kind, block, _ = arguments
            total += self._adapter.key_elements(transformer, kind, block, component, self._size)
        return total * self._rows * self._itemsize

    def bytes_of_outputs(self) -> int:
        """Bytes of all outputs that are added to the stream in one step."""
        return sum(moved for _, _, _, moved, adds in self.cells if adds)

    def residual_bytes(self, plan: RunPlan) -> int:
        """Bytes moved by residual updates: each output once, and the stream read and written once per update.

        An update is a maximal run of reused components together with the computed one that ends it.
        """
        if not plan.actions:
            updates = sum(1 for *_, adds in self.cells if adds)
            return plan.steps * (self.bytes_of_outputs() + 2 * updates * self.stream)
        total = 0
        for step in plan.actions:
            added = [step[index][component] for index, component, _, _, adds in self.cells if adds]
            updates = sum(1 for flags in added if flags & COMPUTE) + bool(
                added and added[-1] & REUSE
            )
            total += self.bytes_of_outputs() + 2 * updates * self.stream
        return total

    def cache_bytes(self, plan: RunPlan) -> int:
        """Most bytes kept after any step."""
        return max(
            (
                sum(
                    moved
                    for index, component, _, moved, _ in self.cells
                    if step[index][component] & KEEP
                )
                for step in plan.actions
            ),
            default=0,
        )


def raster(plan: RunPlan, spec: ModelSpec) -> str:
    """The plan as text: one line per component, one character per step."""
    if not plan.actions:
        return ""
    lines, first = [], 0
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
