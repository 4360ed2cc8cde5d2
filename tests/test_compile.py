"""torch.compile over a patched model: equal results, as many graphs whatever the schedule, one clear refusal.

Compiled with the `eager` backend: what is under test is what gets captured, not what a code
generator makes of it.
"""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import fastdit
import tiny_models
from contract import same_bits
from fastdit import Cached, Schedule
from fastdit.blocks.segments import segments_like
from fastdit.patch import handle_of
from oracle import Oracle, random_bits
from tiny_models import sample

pytestmark = [
    pytest.mark.diffusers,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

STEPS = 3
FAMILIES = tiny_models.one_each(tiny_models.forms(), -1)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    """No graph of another test; and a recompilation limit that raises instead of falling back in silence."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


def blocks(model):
    kinds = ("transformer_blocks", "single_transformer_blocks", "layers", "blocks")
    return [block for kind in kinds for block in getattr(model, kind, ())]


def compile_blocks(model, **options):
    """What `compile_repeated_blocks` does, for families that do not declare their blocks too."""
    for block in blocks(model):
        block.compile(**options)
    return model


def compile_in_place(model, **options):
    model.compile(**options)
    return model


def compile_outside(model, **options):
    return torch.compile(model, **options)


WAYS = {"blocks": compile_blocks, "transformer": compile_in_place, "wrapper": compile_outside}


def run(model, family):
    with torch.no_grad():
        return [sample(model(**tiny_models.call(family, 2, step=step))) for step in range(STEPS)]


def expected(family, seed, compute=0.5):
    model = tiny_models.transformer(family)
    bits, names = random_bits(model, STEPS, seed, compute)
    with Oracle(model, bits).installed():
        return run(model, family), Cached(Schedule.from_bits(bits, names))


CASES = [
    ("flux", "blocks", "before"),
    ("flux", "transformer", "after"),
    ("sd3.5", "wrapper", "after"),
    ("pixart-sigma", "blocks", "after"),
    ("lumina", "blocks", "after"),
    ("dit", "transformer", "before"),
]


@pytest.mark.parametrize(("family", "way", "order"), CASES)
def test_compiled_models_run_schedules(family, way, order):
    wanted, method = expected(family, 1)
    model = tiny_models.transformer(family)
    counter = CompileCounter()
    if order == "before":
        compiled = WAYS[way](model, backend=counter)
        handle = fastdit.patch(compiled, method, backend="reference")
    else:
        handle = fastdit.patch(model, method, backend="reference")
        compiled = WAYS[way](model, backend=counter)
    for _ in range(2):
        with handle.run(range(STEPS)):
            for actual, value in zip(run(compiled, family), wanted, strict=True):
                same_bits(actual, value)
    assert counter.frame_count > 0
    fastdit.unpatch(compiled)
    stock = run(tiny_models.transformer(family), family)
    for actual, value in zip(run(compiled, family), stock, strict=True):
        same_bits(actual, value)


@pytest.mark.parametrize(
    ("family", "way"),
    [("sd3.5", "blocks"), ("flux", "blocks"), ("flux", "transformer"), ("lumina", "blocks")],
)
def test_the_number_of_graphs_does_not_grow_with_the_schedule(family, way):
    """After a dense run, which needs every graph, no schedule adds one."""
    model = tiny_models.transformer(family)
    counter = CompileCounter()
    WAYS[way](model, backend=counter)
    handle = fastdit.patch(model)
    with handle.run(range(STEPS)):
        run(model, family)
    dense = counter.frame_count
    assert dense > 0
    for seed in range(2):
        _, method = expected(family, seed, compute=0.5)
        with fastdit.patch(model, method).run(range(STEPS)):
            run(model, family)
    assert counter.frame_count == dense


@pytest.mark.parametrize("family", FAMILIES)
def test_the_heavy_calls_are_compiled(family):
    """Each attention and feed-forward of a compiled block goes through a graph, not through eager code."""
    model = tiny_models.transformer(family)
    captured = []

    def backend(graph, inputs):
        captured.append(graph.code)
        return graph.forward

    compile_blocks(model, backend=backend)
    fastdit.patch(model)
    with torch.no_grad():
        model(**tiny_models.call(family))
    code = "\n".join(captured)
    assert "scaled_dot_product_attention" in code
    assert "gelu" in code or "silu" in code


def test_blocks_compile_with_fullgraph():
    """`compile_repeated_blocks(fullgraph=True)`, the form diffusers recommends."""
    model = tiny_models.transformer("flux")
    wanted, method = expected("flux", 2)
    counter = CompileCounter()
    fastdit.patch(model, method, backend="reference")
    model.compile_repeated_blocks(backend=counter, fullgraph=True)
    with handle_of(model).run(range(STEPS)):
        for actual, value in zip(run(model, "flux"), wanted, strict=True):
            same_bits(actual, value)
    assert counter.frame_count > 0


@pytest.mark.parametrize("way", ["transformer", "wrapper"])
def test_a_whole_model_in_one_graph_is_refused_by_name(way):
    model = tiny_models.transformer("sd3")
    fastdit.patch(model)
    compiled = WAYS[way](model, backend="eager", fullgraph=True)
    with torch.no_grad(), pytest.raises(Exception, match="fastdit"):
        compiled(**tiny_models.call("sd3"))


def test_a_pipeline_with_a_wrapped_transformer():
    pipe = tiny_models.pipeline("sd3")
    fastdit.patch(pipe, Cached(Schedule.every(2)), backend="reference")
    wanted = tiny_models.generate(pipe, "sd3")
    fastdit.unpatch(pipe)
    counter = CompileCounter()
    pipe.transformer = torch.compile(pipe.transformer, backend=counter)
    handle = fastdit.patch(pipe, Cached(Schedule.every(2)), backend="reference")
    same_bits(tiny_models.generate(pipe, "sd3"), wanted)
    assert counter.frame_count > 0
    assert handle.report().reused == 2 * 8
    handle.unpatch()


def test_only_blocks_of_one_form_share_code():
    """The compiler counts graphs per code object, up to 8."""
    model = compile_blocks(tiny_models.transformer("sd3.5"), backend="eager")
    codes = [
        segments_like(
            block._compiled_call_impl, block
        ).attention._torchdynamo_orig_callable.__code__
        for block in model.transformer_blocks
    ]
    assert codes[0] is codes[1]  # both with dual attention
    assert codes[0] is not codes[2]  # the last one, without text


@pytest.mark.parametrize("family", FAMILIES)
def test_one_size_needs_one_graph_of_each_call(family):
    """diffusers' own tests allow no recompilation: texts are shorter than images, and an attention is not another."""
    model = compile_blocks(tiny_models.transformer(family), backend="eager", fullgraph=True)
    wanted = run(tiny_models.transformer(family), family)
    handle = fastdit.patch(model, backend="reference")
    with torch._dynamo.config.patch(recompile_limit=1), handle.run(range(STEPS)):
        for actual, value in zip(run(model, family), wanted, strict=True):
            same_bits(actual, value)


def test_other_models_sizes_and_batches_stay_within_the_limit():
    """Attention comes in many forms, and the compiler's limit is 8 graphs per code object."""
    for family in ("sd3.5", "flux"):
        model = compile_blocks(tiny_models.transformer(family), backend="eager")
        fastdit.patch(model)
        for batch, height, width in ((1, 8, 8), (2, 8, 16)):
            with torch.no_grad():
                model(**tiny_models.call(family, batch, height=height, width=width))
