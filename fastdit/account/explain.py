"""An explanation predicts what a patched model will do: backends, plan, FLOPs, bytes and cache size.

Nothing runs: see `account/cost.py` for what is counted.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fastdit.account.asked import Asked, default_of, latent_size, turn_of
from fastdit.account.cost import Cost
from fastdit.account.pace import pace_of, steps_that_wait
from fastdit.account.raster import LEGEND, Raster
from fastdit.account.report import ranges
from fastdit.adapters.base import Size
from fastdit.blocks.attention_choice import choices
from fastdit.blocks.modulation import ahead
from fastdit.blocks.prepacked import packs
from fastdit.runtime.timesteps import predicted_timesteps
from fastdit.schedules.actions import COMPUTE
from fastdit.schedules.plan import RunPlan, everywhere, ops_of
from fastdit.tokens.active import active_of
from fastdit.tokens.waves import UNIT, Waves, waves_of

DEFAULT_STEPS = 28
MAX_SIZE = 1 << 16  # of batch, height and width


@dataclass(frozen=True)
class Explanation:
    """This is a prediction; `print` it.

    Attributes:
        family, model: Adapter and transformer class.
        blocks: Block kind -> (count, component names).
        methods: Names of the methods.
        backends: Op -> backend that will serve it.
        attention: What was measured of attentions on this GPU, see :meth:`fastdit.Handle.tune_attention`; else empty.
        steps, transformer_batch, image_tokens, text_tokens: The run: the transformer's batch is images times branches
            of guidance.
        reuse_share: Share of all (step, block, component) entries that do not run, counted alike (HarmoniCa's CUR).
        macs, dense_macs: Multiply-accumulates of the run, with the plan and without.
        linear_macs: Those of linear layers where the schedule's bits compute, of all tokens: the ECAD paper's count.
        residual_bytes, dense_residual_bytes: Bytes that residual updates move, with the plan and in eager diffusers.
        cache_bytes: Most bytes in caches at once.
        modulation_bytes: Bytes of the modulations made ahead for the next steps, beside the caches, where a step is one
            call and its timesteps are known: of all steps where their layers are shed.
        packed_bytes: Most bytes of weights kept packed for few tokens, beside the caches; 0 without `pack_weights`.
        tokens_per_step: Image tokens of each step, where a method leaves some out; else empty.
        waves: What became of the numbers of active tokens that were fitted to the GPU; empty where none were.
        resampled: The step of a schedule of another number of steps that each step takes; else empty.
        collapse: Which reused outputs are kept as sums, or why none are; empty where the family has no such sums.
        reusable_share: Share of the arithmetic of a dense step that is in components: the most that reuse can spare.
        exact: Whether arithmetic and caches are counted. A model without an adapter is counted on the arguments of its
            last call of this size; before there was one they are estimates.
        graphs: Whether the run is replayed as CUDA graphs, and why; empty where nobody asked for it.
        shed: Which weights of modulations are elsewhere, and the tables that later runs may find; empty where all stay.
        budget: What a budget comes to; empty where none was asked for.
        plan: What each step computes of each component, of how many tokens, see :class:`Raster`; None where all.
        turns: How many steps each transformer does, where a pipeline has several.
    """

    family: str
    model: str
    blocks: Mapping[str, tuple[int, tuple[str, ...]]]
    methods: tuple[str, ...]
    backends: Mapping[str, str]
    steps: int
    transformer_batch: int
    image_tokens: int
    text_tokens: int
    reuse_share: float
    macs: int
    linear_macs: int
    dense_macs: int
    residual_bytes: int
    dense_residual_bytes: int
    cache_bytes: int
    plan: Raster | None = None
    modulation_bytes: int = 0
    packed_bytes: int = 0
    tokens_per_step: tuple[int, ...] = ()
    waves: str = ""
    attention: str = ""
    resampled: tuple[int, ...] = ()
    collapse: str = ""
    graphs: str = ""
    shed: str = ""
    budget: str = ""
    reusable_share: float = 1.0
    exact: bool = True
    turns: tuple[int, ...] = ()

    @property
    def flop_speedup(self) -> float:
        """Dense over planned multiply-accumulates are the most that a run can gain where arithmetic is all."""
        return self.dense_macs / self.macs if self.macs else 1.0

    @property
    def raster(self) -> str:
        """The plan as text: one line per component, one character per step."""
        return "" if self.plan is None else str(self.plan)

    def __str__(self) -> str:
        blocks = ", ".join(
            f"{count} x {kind} ({', '.join(names)})" for kind, (count, names) in self.blocks.items()
        )
        backends = ", ".join(f"{op} on {name}" for op, name in self.backends.items())
        tokens = f"{self.image_tokens} image + {self.text_tokens} text tokens"
        resampled = ", ".join(map(str, self.resampled))
        lines = (
            f"fastdit {' + '.join(self.methods)} on {self.model} ({self.family})",
            f"  blocks    {blocks}",
            f"  ops       {backends}",
            self.attention and f"  attention {self.attention}",
            f"  run       {self.steps} steps, a transformer batch of {self.transformer_batch} with {tokens}",
            self.turns and f"  turns     {', then '.join(map(str, self.turns))} steps",
            self.budget and f"  budget    {self.budget}",
            f"  reuse     {self.reuse_share:.2%} of all components of all steps",
            f"  spared    at most {self.reusable_share:.1%} of the arithmetic: that of components",
            f"  compute   {_macs(self.macs, self.dense_macs)}: {self.flop_speedup:.2f}x fewer"
            + ("" if self.exact else ", estimated before a call of this size"),
            f"  residuals {self.residual_bytes / 2**30:.2f} of {self.dense_residual_bytes / 2**30:.2f} GiB moved",
            f"  caches    at most {self.cache_bytes / 2**20:.1f} MiB",
            self.modulation_bytes
            and f"  ahead     modulations of the next steps, {self.modulation_bytes / 2**20:.1f} MiB",
            self.shed and f"  shed      {self.shed}",
            self.packed_bytes
            and f"  packed    weights, at most {self.packed_bytes / 2**20:.1f} MiB",
            self.collapse and f"  collapse  {self.collapse}",
            self.graphs and f"  graphs    {self.graphs}",
            self.tokens_per_step and f"  tokens    per step {ranges(self.tokens_per_step)}",
            self.waves and f"  waves     {self.waves}",
            resampled and f"  schedule  its steps {resampled}, the nearest in timestep",
            self.raster and f"  plan      step 0 to {self.steps - 1}: {LEGEND}\n{self.raster}",
        )
        return "\n".join(line for line in lines if line)


def _macs(count: int, dense: int) -> str:
    """Both are in the unit that suits a dense run, which for a tiny model is no TMAC."""
    scale, unit = next(
        ((s, u) for s, u in ((1e12, "TMAC"), (1e9, "GMAC")) if dense >= s), (1e6, "MMAC")
    )
    return f"{count / scale:.4g} of {dense / scale:.4g} {unit}"


def explain_parts(
    parts: Sequence[tuple[Any, nn.Module]], pipeline: Any | None, asked: Asked
) -> Explanation:
    """This explains the transformers of a pipeline in the run that is asked about, one after the other."""
    explained = [explain_patched(*part, pipeline, asked) for part in parts]
    found = [each for each in explained if each is not None]
    first = found[0]
    if len(found) == 1:
        return first
    summed = (
        "steps",
        "macs",
        "linear_macs",
        "dense_macs",
        "residual_bytes",
        "dense_residual_bytes",
    )
    largest = ("cache_bytes", "modulation_bytes", "packed_bytes", "reusable_share")
    told = ("model", "attention", "waves", "collapse", "graphs", "shed")
    values: dict[str, Any] = {name: sum(getattr(each, name) for each in found) for name in summed}
    values |= {name: max(getattr(each, name) for each in found) for name in largest}
    for name in told:
        lines = dict.fromkeys(filter(None, (getattr(each, name) for each in found)))
        values[name] = "; then ".join(lines)
    return replace(
        first,
        turns=tuple(each.steps for each in found),
        reuse_share=sum(each.reuse_share * each.steps for each in found) / values["steps"],
        tokens_per_step=sum((each.tokens_per_step for each in found), ()),
        plan=_one_after_the_other([each.plan for each in found]),
        exact=all(each.exact for each in found),
        **values,
    )


def explain_patched(
    patched: Any, transformer: nn.Module, pipeline: Any | None, asked: Asked
) -> Explanation | None:
    """This predicts what a patched model will do in the run that is asked about; None where it has no step of it."""
    adapter, spec = patched.adapter, patched.spec
    steps = asked.steps or patched.made_steps or default_of(pipeline, "num_inference_steps")
    steps = steps or DEFAULT_STEPS
    latents = latent_size(transformer, pipeline, asked)
    image, text = adapter.tokens(transformer, (1, 1, *latents)), asked.text_tokens
    size = Size(image, adapter.text_tokens_of(pipeline) if text is None else text)
    batch = asked.batch * (2 if (adapter.uses_cfg if asked.cfg is None else asked.cfg) else 1)
    weight = next(p for p in transformer.parameters() if p.is_floating_point())
    waves = waves_of(patched, transformer, weight.device, batch, size.text)
    timesteps = None if pipeline is None else predicted_timesteps(pipeline.scheduler, steps, image)
    begin, end = turn_of(transformer, pipeline, timesteps, steps)
    if begin == end:
        return None
    frames = adapter.frames((1, 1, *latents), None, adapter.patch(transformer))
    lengths, active, asked_for = _tokens_per_step(patched, steps, size, waves, begin, frames)
    tokens = tuple(
        length if step is None else step.keep for length, step in zip(lengths, active, strict=True)
    )
    methods = patched.under(None, steps)
    sparse, resolution = (patched.writer(field, steps) for field in ("rows", "resolution"))
    if resolution is not None:
        timesteps = timesteps.with_sigmas(resolution.run_sigmas)
    partial = tuple(step is not None for step in active) if any(active) else ()
    repeats = patched.forecasts and timesteps is not None and timesteps.repeat
    collapses = patched.may_collapse() and patched.holds_sums(transformer.dtype)
    plan = patched.planned(steps, partial, timesteps, collapses, repeats)
    if (begin, end) != (0, steps):
        plan = plan.part(begin, end).beginning()
        lengths, active, tokens = lengths[begin:end], active[begin:end], tokens[begin:end]
        asked_for = asked_for[begin:end]
    count = Cost(adapter, transformer, size, batch, transformer.dtype.itemsize)
    stages = _stages(count, plan, lengths, tokens)
    told: tuple[int, ...] = ()
    if resolution or sparse:
        told = tuple(0 if plan.forecast_order(i) else n for i, n in enumerate(tokens))
    kept = patched.precision(transformer.dtype) or (transformer.dtype,)
    # What graphs read stays where it is in the other stages, too.
    cached = (max if patched.graphs is None else sum)(
        part.cache_bytes(steps, kept[0].itemsize, estimated=True) for part, steps, _ in stages
    ) + (count.key_bytes() if any(active) else 0)
    prompt, keys = (0, 0) if patched.eager else (count.prompt_bytes(), count.prompt_key_bytes())
    most = patched.max_cache_bytes
    keys = keys if most is None or cached + prompt + keys <= most else 0
    return Explanation(
        family=adapter.family,
        model=type(transformer).__name__,
        blocks={kind.name: (kind.count, kind.components) for kind in spec.kinds},
        methods=tuple(method.name for method in methods),
        backends={
            op: patched.ops.backend_for(op, weight.device, transformer.dtype)
            for op in ops_of(methods)
        },
        steps=plan.steps,
        transformer_batch=batch,
        image_tokens=image,
        text_tokens=size.text,
        reuse_share=count.reuse_share(plan),
        macs=_spent(stages, not patched.eager, keys > 0),
        linear_macs=count.linear_macs(
            plan.reuse, plan.steps - sum(map(bool, plan.forecasts)), slice(begin, end)
        ),
        dense_macs=count.macs(RunPlan(plan.steps, None, ())),
        residual_bytes=sum(part.residual_bytes(steps) for part, steps, _ in stages),
        dense_residual_bytes=5 * count.bytes_of_outputs() * plan.steps,
        cache_bytes=cached + prompt + keys,
        modulation_bytes=count.modulation_bytes(_rows_ahead(patched, batch, plan.steps)),
        shed=str(patched.shed or ""),
        packed_bytes=sum(layer.weight.nbytes for layer in patched.linears if packs(layer.weight)),
        tokens_per_step=told,
        attention=str(choices(weight.device) or ""),
        waves=_waves(sparse, asked_for, active, waves),
        plan=Raster.of_plan(plan, spec, [n / size.image for n in told], _layouts(resolution)),
        resampled=plan.reuse.taken if plan.reuse is not None else (),
        collapse=_collapse(patched, plan, bool(partial), repeats, transformer.dtype),
        graphs=_graphs(patched, stages, plan.steps, weight.device),
        budget="; ".join(
            filter(None, (m.told(steps, _beside(patched, m)) for m in patched.methods))
        ),
        reusable_share=count.reusable_share,
        exact=count.exact,
    )


def _one_after_the_other(rasters: Sequence[Raster | None]) -> Raster | None:
    """The steps of all transformers in one raster."""
    first, *others = rasters
    for other in others:
        first = first.then(other) if first is not None and other is not None else first or other
    return first


def _layouts(resolution: Any) -> list[str]:
    """The token layout of each step of a run in stages."""
    stages = () if resolution is None else resolution.stages()
    return [stage.layout for stage in stages for _ in range(stage.steps)]


def _beside(patched: Any, method: Any) -> list[str]:
    """These other methods leave something out."""
    return [other.name for other in patched.methods if other.writes and other is not method]


def _rows_ahead(patched: Any, batch: int, steps: int) -> int:
    """Modulations are made ahead for so many rows at once."""
    if patched.shed is not None:
        return patched.shed.rows(batch, steps)
    return 0 if patched.eager else ahead(batch, steps)


def _graphs(patched: Any, stages: Sequence[Any], steps: int, device: torch.device) -> str:
    """This says whether calls are replayed; nothing where nobody asked for it."""
    if patched.graphs is None:
        return ""
    if device.type != "cuda":
        return f"off: the model is on {device.type}"
    if patched.programs is None:
        return "off: its calls are not recorded as programs"
    waits = steps_that_wait(stages, len(stages[0][0].components), pace_of(device))
    told = f"the GPU would wait for the host at {waits} of {steps} steps"
    return f"off: {told}" if patched.graphs.chooses and not waits else f"on: {told}"


def waits_for_host(call: Any) -> bool:
    """Whether the GPU would wait for the host in the run of this call: the choice of ``graphs="auto"``."""
    run, arguments, patched = call.run, call.arguments, call.run.patched
    pace = pace_of(arguments.hidden_states.device)
    if pace is None or run.steps is None:
        return False
    size, batch = Size(arguments.tokens, arguments.text), arguments.hidden_states.shape[0]
    count = Cost(patched.adapter, call.transformer, size, batch, call.transformer.dtype.itemsize)
    waves = waves_of(patched, call.transformer, arguments.hidden_states.device, batch, size.text)
    frames = patched.adapter.frames(run.latents, run.positions, run.patch)
    lengths, active, _ = _tokens_per_step(
        patched, run.steps, size, waves, frames=frames, budget=run.budget
    )
    tokens = [n if a is None else a.keep for n, a in zip(lengths, active, strict=True)]
    stages = _stages(count, run.plan, lengths, tokens)
    return steps_that_wait(stages, len(count.components), pace) > 0


def _collapse(patched: Any, plan: RunPlan, partial: bool, repeats: bool, dtype: torch.dtype) -> str:
    """This says what becomes of runs of reused outputs in a model whose gates allow sums; nothing of others."""
    if plan.reuse is None or not (patched.spec.shared_gates or patched.spec.common_gates):
        return ""
    if patched.eager:
        return "off on the reference backend"
    if partial:
        return "off: steps compute a part of the tokens"
    if not patched.may_collapse():
        return "off: hooks look at blocks"
    if not patched.holds_sums(dtype):
        return "off: sums may leave the range of fp16"
    if repeats:
        return "off: steps at one sigma replace each other in forecasts"
    made = [s for step in plan.sums for s in set(step.made.values())]
    lengths = sorted(len(s.slots) for s in made)
    if not lengths:
        return "none: no run of reused outputs stays long enough to pay"
    between = f"{lengths[0]} to {lengths[-1]}" if lengths[0] < lengths[-1] else f"{lengths[0]}"
    kept = "1 sum" if made[0].count == 1 else f"{made[0].count} sums"
    return f"{len(lengths)} times {between} outputs are kept as {kept}"


def run_speedup(patched: Any, run: Any, transformer: nn.Module) -> tuple[float, bool]:
    """This gives the arithmetic of the last run in the stock model over what it was, and whether that was counted.

    Both branches of guidance and all images of a batch follow one plan, so their number cancels out.
    """
    if run is None or not run.records:
        return 1.0, True
    steps = sorted(run.records)
    # A method may decide as the run goes on, and what had nothing to be reused was computed.
    told = [run.records[step].actions if run.records[step].reused else () for step in steps]
    computes = everywhere(patched.spec, COMPUTE)
    actions = [row or computes for row in told] if any(told) else ()
    forecasts = [
        0 if run.records[step].computed else run.plan.forecast_order(step) for step in steps
    ]
    plan = RunPlan(len(steps), run.plan.reuse, actions, forecasts=forecasts)
    count = Cost(patched.adapter, transformer, Size(run.image_tokens, run.text_tokens))
    tokens = [run.records[step].tokens for step in steps]
    lengths = [run.image_tokens] * len(steps)
    if run.resolution is not None:
        resolution = run.resolution
        lengths = resolution.method.tokens(run.image_tokens, run.text_tokens, resolution.frames)
        lengths = lengths[: len(steps)]
    keeps = not patched.eager
    stages = _stages(count, plan, lengths, tokens)
    spent = _spent(stages, keeps, keeps and run.keeps_prompt_keys)
    dense = count.macs(RunPlan(len(steps), None, ()))
    return dense / spent if spent else 1.0, count.exact


def _tokens_per_step(
    patched: Any,
    steps: int,
    size: Size,
    waves: Waves,
    first: int = 0,
    frames: int = 1,
    budget: Any = None,
) -> tuple[list[int], list[Any], list[Any]]:
    """Each step has so many image tokens, and what a method that leaves some out computes of them, or None.

    `first` is the first step that the model runs; the tokens are of so many `frames`. The third is the same before it
    was fitted to the device.
    """
    lengths, active = [size.image] * steps, [None] * steps
    asked_for = list(active)
    sparse, resolution = (patched.writer(field, steps, budget) for field in ("rows", "resolution"))
    if resolution is not None:
        resolution.check_steps(steps)
        lengths = resolution.tokens(size.image, size.text, frames)
        first = resolution.stages()[-1].first
    if sparse is not None:
        asked_for[first:] = active_of(sparse, steps - first, size.image, frames)
        active[first:] = sparse.fitted(asked_for[first:], size.image, waves)
    return lengths, active, asked_for


def _waves(method: Any, asked_for: Sequence[Any], active: Sequence[Any], waves: Waves) -> str:
    """This says how full the GPU's waves are with the counts that a method fitted to it."""
    if method is None or not method.fits_waves:
        return ""
    if not waves.multiprocessors:
        return f"none: no GPU; counts are rounded to {UNIT}"
    pairs = {(a.keep, b.keep) for a, b in zip(asked_for, active, strict=True) if a and b}
    told = (
        f"{kept} tokens for {asked}, {waves.fill(kept):.0%} full for {waves.fill(asked):.0%}"
        for asked, kept in sorted(pairs)
    )
    return f"of {waves.multiprocessors} tiles: {'; '.join(told)}"


def _stages(
    count: Cost, plan: RunPlan, lengths: Sequence[int], tokens: Sequence[int]
) -> list[tuple[Cost, RunPlan, Sequence[int]]]:
    """Steps in a row of one number of tokens have a cost, a plan, and the tokens that each computes."""
    found, first = [], 0
    for length, steps in itertools.groupby(lengths):
        last = first + len(list(steps))
        found.append((count.at(length), plan.part(first, last), tokens[first:last]))
        first = last
    return found


def _spent(
    stages: Sequence[tuple[Cost, RunPlan, Sequence[int]]], keeps_prompt: bool, keeps_keys: bool
) -> int:
    return sum(count.macs(plan, tokens, keeps_prompt, keeps_keys) for count, plan, tokens in stages)
