"""RAS: the published rule step by step, chosen rows against a restatement on stock models, and the edges of a run."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler
from peft.tuners.tuners_utils import BaseTunerLayer

import fastdit
import oracle
import tiny_models
from contract import RUN_FP64, distance, same_bits, within_contract
from fastdit import RAS, ArgumentError, Linear, ScheduleError, UnsupportedModelError
from fastdit.adapters import find_adapter
from fastdit.blocks.active import CachedRows
from fastdit.methods.ras import SparseStep
from fastdit.schedules.plan import RunPlan
from fastdit.tokens.active import TokenRun
from fastdit.tokens.waves import Waves
from ras_oracle import RowOracle, published, random_rows
from snapshot import snapshot
from test_coexistence import FEATURES
from test_forecast import SAMPLERS
from tiny_models import generate

PIPELINES = tiny_models.forms("layouts")
ONE_EACH, LAST_OF_EACH = (tiny_models.one_each(PIPELINES, which) for which in (0, -1))
TOKENS = 32  # of the tiny pipelines' default size
STEPS = 7
NO_GPU = Waves(0, 1, 1, ())
COUNTS = {1: 16, 2: 20, 4: 8, 5: 8, 6: 31}


class Chosen(RAS):
    """Computes given rows, whatever the velocity says."""

    def __init__(self, choose, counts, tokens=TOKENS):
        super().__init__(start=1)
        for name, value in (("choose", choose), ("counts", counts), ("all", tokens)):
            object.__setattr__(self, name, value)

    def active(self, steps, tokens):
        counts = (self.counts.get(step) for step in range(steps))
        return [None if count is None else SparseStep(count, 0) for count in counts]


@pytest.fixture
def chosen(monkeypatch):
    """Let `Chosen` decide."""
    real = TokenRun.observe

    def observe(self, step, velocity, delta):
        if not isinstance(self.method, Chosen):
            real(self, step, velocity, delta)
            return
        self.active = self.method.choose(step, velocity, None)
        if self.active is not None:
            self.history[step + 1] = self.active

    monkeypatch.setattr(TokenRun, "observe", observe)


def token_run(method, steps, tokens, backend=None):
    """The choice of tokens in a run without a model."""
    patched = SimpleNamespace(ops=fastdit.ops.bind(backend))
    run = SimpleNamespace(patched=patched, steps=steps, first=0)
    run.resolution, run.plan_partial = None, lambda _: None
    run.plan = RunPlan(steps, None, ())
    made = method.begin(run)
    made.lay_out(tokens, NO_GPU)
    return made


def calls_per_step(name: str) -> int:
    return 1 if tiny_models.FAMILIES[name].cfg_in_one_call else 2


def observed_run(pipe, name, method, backend=None, **kwargs):
    """(latents, rows of each step) of a patched run."""
    handle = fastdit.patch(pipe, method, backend=backend)
    latents = generate(pipe, name, **kwargs)
    history = handle.last_run().selection.history
    handle.unpatch()
    return latents, history


# --- which tokens


def test_the_published_lists_of_dropped_tokens():
    sd3 = RAS.preset("sd3", mode="parity").dropped(28, 4096)
    assert sd3 == [0] * 4 + [2048] * 8 + [0] + [2048] * 7 + [0] + [2048] * 7
    lumina = RAS.preset("lumina-next", mode="parity").dropped(30, 4096)
    expected = [0] * 4 + [1280] * 4 + [1536] * 4 + [0] + [1792] * 3 + [2048] * 4 + [2304] * 2
    assert lumina == expected + [0, 2304] + [2560] * 4 + [2816] * 2
    sparse = [count for count in lumina if count]
    assert sum(4096 - count for count in sparse) / (24 * 4096) == pytest.approx(0.516, abs=1e-3)
    assert sum(4096 - count for count in lumina) / (30 * 4096) == pytest.approx(0.6125, abs=1e-4)


@pytest.mark.parametrize(
    ("ratio", "active"),
    [(0.5, (1433, 614, 2049)), (0.25, (2150, 921, 1025)), (0.125, (2508, 1075, 513))],
)
def test_the_published_truncation(ratio, active):
    step = RAS.preset("sd3", ratio=ratio, mode="parity").active(28, 4096)[4]
    low = 4096 - step.keep - step.high
    assert (low, step.high, step.keep) == active


@pytest.mark.parametrize(
    ("tokens", "ratio", "align", "keep"),
    [
        (4096, 0.5, 64, 2048),
        (1000, 0.5, 64, 512),
        (1000, 0.5, 1, 500),
        (100, 0.05, 64, 64),
        (40, 0.5, 64, 40),
    ],
)
def test_the_active_count_is_rounded(tokens, ratio, align, keep):
    step = RAS(ratio=ratio, align=align).active(28, tokens)[4]
    assert (tokens if step is None else step.keep) == keep


@pytest.mark.parametrize(
    ("steps", "resets"),
    [(7, ()), (10, (7,)), (14, (8,)), (20, (9, 14)), (28, (12, 20)), (30, (12, 22))],
)
def test_resets_by_number_of_steps(steps, resets):
    assert RAS(metric="std").resets_for(steps) == RAS(mode="parity").resets_for(steps) == resets
    assert RAS().resets_for(steps) == tuple(range(8, steps, 4))
    assert RAS(resets=(5,)).resets_for(steps) == (5,)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"), [("sd3", 16), ("sd3.5", 16), ("flux-dev", 16), ("pixart-sigma", 16)]
)
@pytest.mark.parametrize(
    ("settings", "linear"),
    [
        ({"high_ratio": 0.3}, None),
        ({"ratio": 0.25, "metric": "l2norm"}, None),
        ({"high_ratio": 0.0}, None),
        ({"ratio": 0.6, "schedule": Linear(64, 12)}, (64, 12)),
    ],
    ids=["std", "l2norm", "low end", "linear"],
)
def test_parity_is_the_published_rule_over_a_whole_run(name, size, settings, linear):
    """Token set by token set, and the latents at the end."""
    size = size if linear is None else 2 * size  # its counts are multiples of 64
    arguments = {"steps": 28, "height": size, "width": size, "cfg": not name.startswith("flux")}
    pipe = tiny_models.pipeline(name, torch.float64)
    choose = published(
        settings.get("ratio", 0.5),
        28,
        4,
        (12, 20),
        settings.get("high_ratio", 1.0),
        settings.get("metric", "std"),
        linear,
        packed=name.startswith("flux"),
    )
    truth = RowOracle(pipe, choose)
    with truth.installed():
        expected = generate(pipe, name, **arguments)
    method = RAS(mode="parity", **settings)
    for backend in ("reference", None):
        latents, history = observed_run(pipe, name, method, backend, **arguments)
        assert list(history) == list(truth.history)
        assert len(history) >= 10
        for step, rows in history.items():
            assert rows.tolist() == truth.history[step].tolist(), step
        assert distance(latents, expected) <= 1e-9


@pytest.mark.parametrize("metric", ["std", "l2norm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_parity_rounds_as_published(dtype, metric):
    """Each mean of the metric rounds to the model's dtype, which makes ties; the step of the sigmas does not."""
    steps, size = 28, 32
    choose = published(0.5, steps, 4, (12, 20), 0.3, metric)
    method = RAS(mode="parity", high_ratio=0.3, metric=metric)
    run = token_run(method, steps, (size // 2) ** 2, "reference")
    draw = torch.Generator().manual_seed(0)
    sigmas = torch.linspace(1, 0, steps + 1) ** 1.5
    patches = find_adapter(tiny_models.transformer("sd3")).patches
    for step in range(steps):
        velocity = torch.randn(1, 16, size, size, generator=draw, dtype=torch.float64).to(dtype)
        run.observe(step, patches(velocity, 2), sigmas[step + 1] - sigmas[step])
        expected = choose(step, velocity, sigmas)
        assert (run.active is None) == (expected is None)
        assert expected is None or run.active.tolist() == expected.tolist(), step


def test_a_dense_step_resets_the_ages():
    """Tokens 0 to 3 have the small metric and are dropped, but for every third step."""
    given = {"metric": "std", "starvation": 0.0, "high_ratio": 0.0}
    method = RAS(start=2, resets=(6,), align=1, max_age=2, **given)
    run = token_run(method, 12, 8, "reference")
    pattern = torch.randn(4, generator=torch.Generator().manual_seed(0))
    velocity = pattern * torch.arange(1.0, 9.0).view(1, 8, 1, 1, 1, 1).expand(-1, -1, 1, 2, 2, 4)
    chosen = {}
    for step in range(11):
        run.observe(step, velocity, 1.0)
        chosen[step + 1] = None if run.active is None else run.active[0].tolist()
    small, large = [0, 1, 2, 3], [4, 5, 6, 7]
    since_dense = [large, large, small, large]
    assert [chosen[step] for step in range(2, 6)] == since_dense
    assert chosen[6] is None
    assert [chosen[step] for step in range(7, 11)] == since_dense


# --- what is computed


@pytest.mark.diffusers
@pytest.mark.parametrize(
    ("batch", "scheduled"),
    [(1, False), (3, False), (3, True)],
    ids=["1-tokens", "3-tokens", "3-tokens and schedule"],
)
@pytest.mark.parametrize("name", PIPELINES)
def test_chosen_rows_equal_the_restatement(name, batch, scheduled, chosen):
    pipe = tiny_models.pipeline(name, torch.float64)
    bits, methods = None, []
    if scheduled:
        bits, names = oracle.random_bits(pipe.transformer, STEPS, seed=batch, compute=0.5)
        methods = [fastdit.Cached(fastdit.Schedule.from_bits(bits, names))]
    choose = random_rows(COUNTS, TOKENS, batch)
    truth = RowOracle(pipe, choose, bits, calls_per_step(name))
    with truth.installed():
        expected = generate(pipe, name, batch=batch, steps=STEPS)
    for backend in ("reference", None):
        handle = fastdit.patch(pipe, Chosen(choose, COUNTS), *methods, backend=backend)
        found = generate(pipe, name, batch=batch, steps=STEPS)
        tokens = list(handle.report().tokens_per_step)
        assert tokens == [COUNTS.get(step, TOKENS) for step in range(STEPS)]
        handle.unpatch()
        assert distance(found, expected) <= 1e-9


@pytest.mark.diffusers
@pytest.mark.parametrize("name", PIPELINES)
def test_what_is_drawn_beside_chosen_rows_equals_the_restatement(name, chosen):
    batch = 3
    """Each token through its own last values, of random orders; one step is forecast as a whole."""
    pipe = tiny_models.pipeline(name, torch.float64)
    bits, names = oracle.random_bits(pipe.transformer, STEPS, seed=batch, compute=0.5)
    generator = np.random.default_rng(batch)
    orders = {kind: generator.integers(0, 3, part.shape) for kind, part in bits.items()}
    for kind, part in bits.items():
        part[[0, 1, 2]] = True
        part[3] = False
        orders[kind][3] = 1
    choose = random_rows(COUNTS, TOKENS, batch)
    truth = RowOracle(pipe, choose, bits, calls_per_step(name), orders, {3: 1})
    with truth.installed():
        expected = generate(pipe, name, batch=batch, steps=STEPS)
    schedule = fastdit.Schedule.from_bits(bits, names, orders=orders)
    for backend in ("reference", None):
        handle = fastdit.patch(
            pipe, Chosen(choose, COUNTS), fastdit.Cached(schedule), backend=backend
        )
        found = generate(pipe, name, batch=batch, steps=STEPS)
        tokens = list(handle.report().tokens_per_step)
        assert tokens == [0 if step == 3 else COUNTS.get(step, TOKENS) for step in range(STEPS)]
        handle.unpatch()
        assert distance(found, expected) <= 1e-9


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("sampler", ["heun", "unipc"])
def test_a_token_is_drawn_through_one_value_a_sigma(sampler, order, chosen):
    """Heun computes twice at a sigma, and of its tokens some only once; the dense step in between is of all of them."""
    pipe = tiny_models.pipeline("sd3", torch.float64, scheduler=SAMPLERS[sampler]())
    steps = 9 if sampler == "heun" else 8
    counts = {2: 16, 3: 12, 5: 20, 7: 8}
    bits, names = oracle.random_bits(pipe.transformer, steps, seed=4, compute=0.6)
    orders = {kind: np.full(part.shape, order) for kind, part in bits.items()}
    choose = random_rows(counts, TOKENS, 2)
    with RowOracle(pipe, choose, bits, 1, orders).installed():
        expected = generate(pipe, "sd3", batch=2, steps=5 if sampler == "heun" else 8)
    schedule = fastdit.Schedule.from_bits(bits, names, orders=orders)
    handle = fastdit.patch(pipe, Chosen(choose, counts), fastdit.Cached(schedule))
    found = generate(pipe, "sd3", batch=2, steps=5 if sampler == "heun" else 8)
    assert distance(found, expected) <= 1e-9
    report = handle.report()
    assert report.peak_cache_bytes > 0
    said = handle.explain(
        tiny_models.HEIGHT, tiny_models.WIDTH, 2, steps, text_tokens=tiny_models.TEXT, cfg=True
    )
    assert said.cache_bytes == pytest.approx(report.peak_cache_bytes, rel=0.1)


@pytest.mark.diffusers
@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("queries", [None, TOKENS], ids=["by key", "by query and key"])
def test_pixart_attention_mask(queries, backend):
    """Given the same latents at each step, those that are left out change nothing."""
    model = tiny_models.transformer("pixart-sigma", torch.float64)
    given = tiny_models.call("pixart-sigma", 2, torch.float64)
    draw = torch.Generator().manual_seed(0)
    if queries is None:
        mask = torch.randint(2, (2, TOKENS), generator=draw)
    else:
        mask = 9 * torch.randn(2, queries, TOKENS, generator=draw, dtype=torch.float64)
    with torch.no_grad():
        expected = model(**given, attention_mask=mask)[0]
        assert distance(model(**given)[0], expected) > 0.01
        handle = fastdit.patch(model, RAS(start=1, resets=(), align=1), backend=backend)
        with handle.run(range(3)):
            for _ in range(3):
                assert distance(model(**given, attention_mask=mask)[0], expected) <= 1e-9
                handle.advance()
    assert max(handle.report().tokens_per_step[1:]) < TOKENS


@pytest.mark.parametrize("name", ["sd3", "flux"])  # one stream of values, and joint ones
def test_rows_are_written_into_a_copy_that_nobody_else_holds(name, chosen):
    """Step 0 computes everything that step 5 reuses; steps 1 to 4 compute the chosen tokens anew."""
    pipe = tiny_models.pipeline(name)
    bits, names = oracle.random_bits(pipe.transformer, 6, seed=0, compute=1.0)
    for layer in bits.values():
        layer[5] = False
    counts = {1: 16, 2: 20, 3: 12, 4: 8}
    choose = random_rows(counts, TOKENS, 1)
    cached = fastdit.Cached(fastdit.Schedule.from_bits(bits, names))
    handle = fastdit.patch(pipe, Chosen(choose, counts), cached)
    given, storages = [], []

    def hook(module, args, output):
        given.append((output, output.clone()))

    def look(pipe, step, timestep, kwargs):
        slots = next(iter(handle.last_run().branches.values())).slots if step < 5 else {}
        storages.append({key: pointers(value) for key, value in slots.items()})
        return kwargs

    component = pipe.transformer.transformer_blocks[0].ff
    component.register_forward_hook(hook)
    generate(pipe, name, steps=6, callback_on_step_end=look)
    assert all(storages[:5])
    image = [(key, 0) for key in storages[0] if "context" not in key[1]]
    for key, part in image:
        first, *later = (at[key][part] for at in storages[:5])
        assert first not in later  # the module's own output stays
        assert len(set(later)) == 1
    assert all(torch.equal(output, before) for output, before in given)


@pytest.mark.parametrize("name", LAST_OF_EACH)
def test_what_is_reused_is_read_at_the_rows_and_not_copied(name, chosen, monkeypatch):
    pipe = tiny_models.pipeline(name)
    bits, names = oracle.random_bits(pipe.transformer, 4, seed=0, compute=1.0)
    for layer in bits.values():
        layer[[1, 3]] = False
    counts = {1: 16, 2: 20, 3: 12}
    method = Chosen(random_rows(counts, TOKENS, 1), counts)
    handle = fastdit.patch(pipe, method, fastdit.Cached(fastdit.Schedule.from_bits(bits, names)))
    monkeypatch.setattr(
        CachedRows, "gathered", lambda self: pytest.fail("a kept output was copied")
    )
    generate(pipe, name, steps=4)
    records = handle.last_run().records
    assert [records[step].computed for step in (1, 3)] == [0, 0]
    assert records[2].computed > 0


def test_kept_outputs_may_have_any_strides(chosen):
    pipe = tiny_models.pipeline("sd3", torch.float64)
    bits, names = oracle.random_bits(pipe.transformer, 3, seed=0, compute=1.0)
    for layer in bits.values():
        layer[1:] = False
    counts = {1: 16, 2: 20}
    method = Chosen(random_rows(counts, TOKENS, 1), counts)
    fastdit.patch(pipe, method, fastdit.Cached(fastdit.Schedule.from_bits(bits, names)))
    plain = generate(pipe, "sd3", steps=3)

    def transposed(module, args, output):
        return output.mT.contiguous().mT

    pipe.transformer.transformer_blocks[0].ff.register_forward_hook(transposed)
    assert distance(generate(pipe, "sd3", steps=3), plain) <= 1e-12


def pointers(value) -> list[int]:
    parts = value if isinstance(value, tuple) else (value,)
    return [part.data_ptr() for part in parts if part is not None]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", PIPELINES)
def test_low_precision_obeys_the_rule(name, dtype, chosen):
    """The restatement in the dtype and in fp64 are the two measures."""
    choose = random_rows(COUNTS, TOKENS, 2)

    def restated(kind):
        pipe = tiny_models.pipeline(name, dtype).to(kind)
        with RowOracle(pipe, choose, None, calls_per_step(name)).installed():
            return generate(pipe, name, batch=2, steps=STEPS)

    stock, truth = restated(dtype), restated(torch.float64)
    pipe = tiny_models.pipeline(name, dtype)
    fastdit.patch(pipe, Chosen(choose, COUNTS))
    within_contract(generate(pipe, name, batch=2, steps=STEPS), stock, truth)


@pytest.mark.parametrize("name", PIPELINES)
def test_nothing_dropped_is_bit_equal(name):
    pipe = tiny_models.pipeline(name)
    stock = generate(pipe, name, steps=6)
    for method in (RAS(ratio=1.0), RAS(start=5), RAS(align=64)):  # 32 tokens round up to all
        fastdit.patch(pipe, method, backend="reference")
        same_bits(generate(pipe, name, steps=6), stock)


@pytest.mark.parametrize("name", PIPELINES)
def test_all_tokens_in_another_order_equal_dense(name, chosen):
    pipe = tiny_models.pipeline(name, torch.float64)
    stock = generate(pipe, name, batch=2, steps=5)
    counts = dict.fromkeys(range(1, 5), TOKENS)

    def permuted(step, velocity, sigmas):
        g = torch.Generator().manual_seed(step)
        return torch.stack([torch.randperm(TOKENS, generator=g) for _ in range(2)])

    fastdit.patch(pipe, Chosen(permuted, counts))
    assert distance(generate(pipe, name, batch=2, steps=5), stock) <= RUN_FP64


def test_after_a_reset_keys_are_those_of_a_dense_step(chosen):
    pipe = tiny_models.pipeline("sd3", torch.float64)
    counts = {1: 8, 2: 8, 4: 8}
    handle = fastdit.patch(pipe, Chosen(random_rows(counts, TOKENS, 1), counts))
    seen = {}
    keys = pipe.transformer.transformer_blocks[1].attn.to_k

    def look(module, args, output):
        run = handle.last_run()
        if run.step == 3:  # dense again
            seen["projected"] = output

    def compare(pipe, step, t, values):
        if step == 3:
            branch = next(iter(handle.last_run().branches.values()))
            held = branch.keys[1, "attn"].k[:, :TOKENS].flatten(2)
            assert torch.equal(held, seen["projected"])
            seen["compared"] = True
        return {}

    hook = keys.register_forward_hook(look)
    generate(pipe, "sd3", steps=5, callback_on_step_end=compare)
    hook.remove()
    assert seen["compared"]


def test_inactive_keys_are_read_and_active_ones_are_overwritten(chosen):
    pipe = tiny_models.pipeline("sd3", torch.float64)
    counts = {1: 8}
    rows = random_rows(counts, TOKENS, 1)(0, None, None)[0]
    inactive = next(i for i in range(TOKENS) if i not in rows.tolist())
    handle = fastdit.patch(pipe, Chosen(random_rows(counts, TOKENS, 1), counts))
    clean = generate(pipe, "sd3", steps=2)
    for row, poisons in ((int(rows[0]), False), (inactive, True)):

        def poison(pipe, step, t, values, row=row):
            if step == 0:
                next(iter(handle.last_run().branches.values())).keys[2, "attn"].k[:, row] = float(
                    "nan"
                )
            return {}

        found = generate(pipe, "sd3", steps=2, callback_on_step_end=poison)
        assert bool(found.isnan().any()) is poisons
        if not poisons:
            same_bits(found, clean)


@pytest.mark.parametrize(
    ("name", "attentions", "streams"),
    [
        ("sd3", 3, 2),
        ("sd3.5", 3 + 2 / 2, 2),
        ("flux", 2 + 2 / 2, 2),
        ("pixart-sigma", 3, 1),
        ("lumina", 3 + 3, 1),
    ],
)
@pytest.mark.usefixtures("unprogrammed")
def test_one_launch_prepares_a_stream(name, attentions, streams, chosen, monkeypatch):
    """Also where a second attention or a single-stream block has one stream only."""
    counts = {1: 16, 2: 16}
    pipe = tiny_models.pipeline(name)
    calls, stock = [], fastdit.ops.bind

    def bind(backend):
        bound = stock(backend)
        real = bound.qkv_prologue

        def spy(*args, **kwargs):
            calls.append(handle.last_run().step)
            real(*args, **kwargs)

        bound.qkv_prologue = spy
        return bound

    monkeypatch.setattr(fastdit.ops, "bind", bind)
    handle = fastdit.patch(pipe, Chosen(random_rows(counts, TOKENS, 1), counts))
    generate(pipe, name, steps=4)
    expected = attentions * streams * calls_per_step(name)
    assert [calls.count(step) for step in range(4)] == [expected] * 3 + [0]


# --- batches, sizes, guidance


@pytest.mark.parametrize("name", LAST_OF_EACH)
def test_a_batch_is_its_single_runs(name):
    """Each image has an active set of its own."""
    method = RAS(0.5, metric="std", start=2, align=1, high_ratio=0.5, resets=(4,))
    pipe = tiny_models.pipeline(name, torch.float64)
    noise = tiny_models.arguments(name, batch=4, dtype=torch.float64)
    whole, history = observed_run(pipe, name, method, batch=4, steps=6, latents=noise_of(name, 4))
    assert not torch.equal(history[2][0], history[2][1])
    del noise
    for i in range(4):
        given = noise_of(name, 4)[i : i + 1]
        single, alone = single_run(pipe, name, method, i, given)
        for step, rows in alone.items():
            assert rows[0].tolist() == history[step][i].tolist()
        assert distance(single[0], whole[i]) <= 1e-9


def noise_of(name, batch):
    g = torch.Generator().manual_seed(5)
    shape = tiny_models.latents_given(name, tiny_models.call(name, batch)).shape
    noise = torch.randn(shape, generator=g, dtype=torch.float64)
    # FLUX.2's pipelines take a token's channels at its row and column
    return noise.mT.unflatten(2, (4, 8)) if name.startswith("flux2") else noise


def single_run(pipe, name, method, i, latents):
    """Image `i` of a batch of 4 alone: with its own prompt where the batch has several."""
    arguments = tiny_models.arguments(name, batch=4, steps=6, dtype=torch.float64)
    prompts = len(arguments["prompt_embeds"])
    for key, value in arguments.items():
        if isinstance(value, (torch.Tensor, list)) and len(value) == prompts > 1:
            arguments[key] = value[i : i + 1]
    number = next(key for key in arguments if key.endswith("_per_prompt"))
    arguments |= {number: 1, "latents": latents}
    handle = fastdit.patch(pipe, method)
    found = tiny_models.latents_of(pipe, arguments)
    history = handle.last_run().selection.history
    handle.unpatch()
    return found, history


@pytest.mark.diffusers
@pytest.mark.parametrize("size", [(8, 16), (16, 8), (16, 24)])
@pytest.mark.parametrize("cfg", [True, False], ids=["cfg", "no cfg"])
@pytest.mark.parametrize("name", ONE_EACH)
def test_sizes_and_guidance(name, cfg, size, chosen):
    height, width = size
    tokens = height * width // 4
    counts = {1: 9, 2: tokens - 1}
    arguments = {"steps": 4, "height": height, "width": width, "cfg": cfg, "batch": 2}
    choose = random_rows(counts, tokens, 2)
    pipe = tiny_models.pipeline(name, torch.float64)
    calls = calls_per_step(name) if cfg else 1
    with RowOracle(pipe, choose, None, calls).installed():
        expected = generate(pipe, name, **arguments)
    fastdit.patch(pipe, Chosen(choose, counts))
    assert distance(generate(pipe, name, **arguments), expected) <= 1e-9


@pytest.mark.slow
@pytest.mark.diffusers
@pytest.mark.parametrize(
    "feature", ["LoRA", "accelerate offload", "group offload by block", "group offload by leaf"]
)
@pytest.mark.parametrize("name", LAST_OF_EACH)
def test_adapters_and_offloading(name, feature):
    """Adapters equal the same run with their weights merged in; offloading changes nothing."""
    found = {}
    for arm in ("plain", "feature"):
        pipe = tiny_models.pipeline(name, torch.float64)
        if feature == "LoRA" or arm == "feature":
            FEATURES[feature](pipe.transformer)
        if feature == "LoRA" and arm == "plain":
            for module in pipe.transformer.modules():
                if isinstance(module, BaseTunerLayer):
                    module.merge()
        handle = fastdit.patch(pipe, RAS(start=1, align=1, resets=(3,)))
        found[arm] = generate(pipe, name, batch=2, steps=5)
        assert handle.report().tokens_per_step[1] < handle.report().tokens_per_step[0]
    assert distance(found["feature"], found["plain"]) <= RUN_FP64


def test_guidance_that_skips_layers_keeps_its_own_keys():
    """SD3.5's third call of a step: it begins at a sparse step, so it runs dense there."""
    pipe = tiny_models.pipeline("sd3.5", torch.float64)
    guidance = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0}
    given = {"steps": 8, "skip_layer_guidance_stop": 0.9, **guidance}
    stock = generate(pipe, "sd3.5", **given)
    handle = fastdit.patch(pipe, RAS(start=2, align=1, resets=()))
    found = generate(pipe, "sd3.5", **given)
    assert torch.isfinite(found).all()
    assert 0 < distance(found, stock) < 1
    assert handle.report().steps == 8


@pytest.mark.parametrize("name", tiny_models.IMAGE_TO_IMAGE)
def test_image_to_image_starts_dense(name):
    """Steps count from the first one that is executed."""
    pipe = tiny_models.pipeline(name)
    handle = fastdit.patch(pipe, RAS(start=2, align=1, resets=()))
    generate(pipe, name, steps=10)  # strength 0.6 executes 6
    tokens = list(handle.report().tokens_per_step)
    assert tokens == [32, 32, 16, 16, 16, 16]


@pytest.mark.parametrize("name", ["sd3", "pixart-sigma"])  # Heun's history, and a multistep one
def test_the_scheduler_sees_a_whole_field(name):
    """Multistep solvers and Heun keep a history of model outputs: inactive tokens are in it."""
    pipe = tiny_models.pipeline(name, torch.float64)
    if name == "sd3":
        pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    seen = []
    step = type(pipe.scheduler).step

    class Watched(type(pipe.scheduler)):
        def step(self, model_output, *args, **kwargs):
            seen.append(model_output.clone())
            return step(self, model_output, *args, **kwargs)

    pipe.scheduler.__class__ = Watched
    handle = fastdit.patch(pipe, RAS(start=2, align=1, resets=()))
    generate(pipe, name, steps=6)
    chosen = handle.report().active
    assert len(chosen) >= 4
    adapter = find_adapter(pipe.transformer)
    for at, active in chosen.items():
        before, now = (adapter.patches(seen[i], 2).flatten(1, 2)[0] for i in (at - 1, at))
        inactive = ~torch.from_numpy(active[0].ravel())
        same_bits(now[inactive], before[inactive])
        assert not torch.equal(now[~inactive], before[~inactive])


# --- the rest of a pipeline's life


@pytest.mark.parametrize("name", PIPELINES)
def test_unpatch_leaves_no_trace(name):
    pipe = tiny_models.pipeline(name)
    stock, before = generate(pipe, name), snapshot(pipe.transformer)
    handle = fastdit.patch(pipe, RAS(start=1, align=1))
    assert distance(generate(pipe, name), stock) > 1e-3
    with handle.disabled():
        same_bits(generate(pipe, name), stock)
    clone = copy.deepcopy(pipe)
    handle.unpatch()
    assert snapshot(pipe.transformer) == before
    same_bits(generate(pipe, name), stock)
    assert distance(generate(clone, name), stock) > 1e-3
    fastdit.unpatch(clone)
    same_bits(generate(clone, name), stock)


def test_an_aborted_run_leaves_nothing_behind():
    pipe = tiny_models.pipeline("sd3")
    handle = fastdit.patch(pipe, RAS(start=1, align=1))
    expected = generate(pipe, "sd3", steps=6)

    def abort(pipe, step, t, values):
        if step == 3:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        generate(pipe, "sd3", steps=6, callback_on_step_end=abort)
    same_bits(generate(pipe, "sd3", steps=6), expected)
    assert handle.cache_bytes() == 0


def test_two_pipelines_in_turns_do_not_touch():
    names = ("sd3", "flux")
    pipes = [tiny_models.pipeline(name) for name in names]
    handles = [fastdit.patch(pipe, RAS(start=1, align=1)) for pipe in pipes]
    alone = [generate(pipe, name, steps=6) for pipe, name in zip(pipes, names, strict=True)]
    inner = []

    def other(pipe, step, t, values):
        if step == 2:
            inner.append(generate(pipes[1], "flux", steps=6))
        return {}

    same_bits(generate(pipes[0], "sd3", steps=6, callback_on_step_end=other), alone[0])
    same_bits(inner[0], alone[1])
    del handles


def test_guidance_switched_off_in_the_run():
    """A callback drops the unconditional half: another batch, so that step runs dense."""
    pipe = tiny_models.pipeline("sd3")
    handle = fastdit.patch(pipe, RAS(start=1, align=1, resets=()))

    def drop(pipe, step, t, values):
        if step == 2:
            pipe._guidance_scale = 1.0
            return {
                "prompt_embeds": values["prompt_embeds"].chunk(2)[-1],
                "pooled_prompt_embeds": values["pooled_prompt_embeds"].chunk(2)[-1],
            }
        return {}

    watched = ["latents", "prompt_embeds", "pooled_prompt_embeds"]
    found = generate(
        pipe, "sd3", steps=6, callback_on_step_end=drop, callback_on_step_end_tensor_inputs=watched
    )
    assert torch.isfinite(found).all()
    tokens = list(handle.report().tokens_per_step)
    assert tokens == [32, 16, 16, 32, 16, 16]


def test_controlnet_residuals_are_gathered(chosen):
    """All tokens in another order, with residuals: as dense."""
    model = tiny_models.transformer("sd3", torch.float64)
    g = torch.Generator().manual_seed(3)
    residuals = [torch.randn(1, TOKENS, 32, generator=g, dtype=torch.float64) for _ in range(2)]
    calls = [tiny_models.call("sd3", dtype=torch.float64, step=i) for i in range(2)]
    with torch.no_grad():
        stock = [model(**c, block_controlnet_hidden_states=residuals)[0] for c in calls]
        order = torch.randperm(TOKENS, generator=g)[None]
        handle = fastdit.patch(model, Chosen(lambda *_: order, {1: TOKENS}))
        with handle.run([900.0, 750.0]):
            for given, expected in zip(calls, stock, strict=True):
                found = model(**given, block_controlnet_hidden_states=residuals)[0]
                within_contract(found, expected)
                handle.advance()


def test_a_bare_transformer_needs_the_number_of_steps():
    model = tiny_models.transformer("sd3")
    handle = fastdit.patch(model, RAS(start=1, align=1))
    with torch.no_grad(), pytest.raises(ScheduleError, match="number of steps"):
        model(**tiny_models.call("sd3"))
    with torch.no_grad(), handle.run([900.0, 750.0, 600.0]):
        for step in range(3):
            model(**tiny_models.call("sd3", step=step))
            handle.advance()
    tokens = list(handle.report().tokens_per_step)
    assert tokens == [32, 16, 16]


def test_old_tokens_come_back():
    pipe = tiny_models.pipeline("sd3")
    given = {"metric": "std", "starvation": 0.0, "max_age": 4}
    method = RAS(0.5, start=1, align=1, resets=(), **given)
    _, history = observed_run(pipe, "sd3", method, steps=24)
    waited = torch.zeros(TOKENS)
    for rows in history.values():
        waited += 1
        waited[rows[0].long()] = 0
        assert waited.max() <= 4


def test_a_nan_in_the_velocity_is_kept_active():
    run = token_run(RAS(start=1, align=1, metric="std"), 4, 8)
    velocity = torch.randn(1, 2, 4, 2, 2, 4)
    velocity[0, 1, 2, 0, 0, 0] = float("nan")
    run.observe(0, velocity, 1.0)
    assert 6 in run.active[0].tolist()


# --- bad input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"ratio": 0}, "ratio must be a number in (0, 1]"),
        ({"ratio": 1.5}, "got 1.5"),
        ({"ratio": math.nan}, "ratio"),
        ({"ratio": "half"}, "ratio"),
        ({"start": 0}, "start must be a whole number of at least 1, got 0"),
        ({"start": 2.5}, "start"),
        ({"high_ratio": -0.1}, "high_ratio must be a number in [0, 1]"),
        ({"starvation": -1}, "starvation"),
        ({"metric": "variance"}, "metric must be one of std, l2norm, change, None, got 'variance'"),
        ({"mode": "fast"}, 'mode must be "corrected" or "parity"'),
        ({"resets": 12}, "resets must be a sequence"),
        ({"resets": (0,)}, "resets"),
        ({"schedule": 256}, "schedule must be None or Linear"),
        ({"align": 0}, "align"),
        ({"align": "row"}, "align must be a whole number from 1 on or \"wave\", got 'row'"),
        ({"align": "wave", "mode": "parity"}, 'align must be a number with mode="parity"'),
        ({"max_age": 0}, "max_age"),
    ],
)
def test_wrong_arguments_are_named(arguments, words):
    with pytest.raises(ArgumentError) as error:
        RAS(**arguments)
    assert words in str(error.value)


def test_parity_refuses_several_images_at_its_first_step():
    pipe = tiny_models.pipeline("sd3")
    handle = fastdit.patch(pipe, RAS(start=2, align=1, resets=(), mode="parity"))
    with pytest.raises(ArgumentError, match=r'mode="parity" .* got a batch of 2'):
        generate(pipe, "sd3", batch=2, steps=5)
    assert handle.report().steps == 1
    alone = generate(pipe, "sd3", steps=5)
    handle.reset()
    same_bits(generate(pipe, "sd3", steps=5), alone)


def test_wrong_presets_and_linear_schedules():
    with pytest.raises(ArgumentError, match="preset must be one of sd3, lumina-next, flux"):
        RAS.preset("sdxl")
    with pytest.raises(ArgumentError, match="every must be a whole number of at least 1"):
        Linear(64, 0)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (RAS(start=9), "start=9"),
        (RAS(start=1, resets=(2, 8)), "resets has step 8"),
        (RAS(start=4), "4 steps"),
    ],
)
def test_a_run_too_short_is_refused_before_it_starts(method, words):
    pipe = tiny_models.pipeline("sd3")
    handle = fastdit.patch(pipe, method)
    with pytest.raises(ScheduleError, match=words):
        generate(pipe, "sd3", steps=4)
    assert not handle.live_runs()
    generate(pipe, "sd3", steps=12)


def test_what_cannot_compute_some_tokens_is_refused():
    model = tiny_models.transformer("dit")
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match="DiTTransformer2DModel cannot compute a part"):
        fastdit.patch(model, RAS())
    assert snapshot(model) == before


def test_an_unknown_processor_is_refused_by_name():
    class Mine:
        pass

    model = tiny_models.transformer("sd3")
    model.transformer_blocks[1].attn.processor = Mine()
    with pytest.raises(UnsupportedModelError, match=r"transformer_blocks\.1\.attn .*Mine"):
        fastdit.patch(model, RAS())


def test_gradients_are_refused():
    model = tiny_models.transformer("sd3")
    handle = fastdit.patch(model, RAS(start=1))
    given = tiny_models.call("sd3")
    given["hidden_states"].requires_grad_()
    with pytest.raises(ArgumentError, match="no gradient"), handle.run([900.0, 700.0]):
        model(**given)


def test_two_token_methods_do_not_compose():
    with pytest.raises(fastdit.CompositionError, match="rows"):
        fastdit.patch(tiny_models.pipeline("sd3"), RAS(), RAS(ratio=0.25))


# --- what the handle says


def test_explain_knows_the_published_bounds():
    """FLOP bounds of the published plans, and the cache they measured (RAS, tables of the supplement)."""
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

    with torch.device("meta"):
        sd3 = SD3Transformer2DModel(
            sample_size=128,
            num_layers=24,
            num_attention_heads=24,
            caption_projection_dim=1536,
            pos_embed_max_size=192,
        ).to(torch.float16)
        flux = FluxTransformer2DModel(guidance_embeds=True).to(torch.bfloat16)
    for model, text, rows, ratio, bound in (
        (sd3, 333, 2, 0.5, 1.57),
        (sd3, 333, 2, 0.25, 2.20),
        (sd3, 333, 2, 0.125, 2.75),
        (flux, 512, 1, 0.5, 1.54),
        (flux, 512, 1, 0.125, 2.57),
    ):
        handle = fastdit.patch(model, RAS(ratio=ratio, metric="std"))
        said = handle.explain(
            height=1024, width=1024, batch=rows, cfg=False, steps=28, text_tokens=text
        )
        assert said.flop_speedup == pytest.approx(bound, abs=0.02), (type(model).__name__, ratio)
        assert said.tokens_per_step[:5] == (4096,) * 4 + (4096 * ratio,)
    image_part = said.cache_bytes * 4096 / (4096 + 512)
    assert image_part == pytest.approx(2.87e9, rel=0.01)


@pytest.mark.parametrize("name", LAST_OF_EACH)
def test_the_report_counts_and_draws_tokens(name):
    pipe = tiny_models.pipeline(name)
    handle = fastdit.patch(pipe, RAS(start=1, align=1, resets=(3,)))
    generate(pipe, name, batch=2, steps=5)
    report = handle.report()
    assert report.live
    assert report.tokens_per_step == (32, 16, 16, 32, 16)
    assert set(report.active) == {1, 2, 4}
    for mask in report.active.values():
        assert mask.shape == (2, 4, 8)
        assert (mask.sum((1, 2)) == 16).all()
    drawn = report.token_map(sample=1, scale=3)
    assert drawn.shape == (5, 12, 24, 3)
    assert (drawn[0] == 255).all()
    expected = report.active[2][1].repeat(3, 0).repeat(3, 1)
    assert ((drawn[2] == 255).all(-1) == expected).all()
    frames = [torch.full((8, 16, 3), 90 + i, dtype=torch.uint8).numpy() for i in range(5)]
    laid = report.token_map(frames)
    assert laid.shape == (5, 8, 16, 3)
    assert set(laid[4].flatten().tolist()) == {94, 94 // 3}
    for wrong in (frames[:2], frames[0][..., :1], frames[0].astype(float)):
        with pytest.raises(ArgumentError, match="frames must be"):
            report.token_map(wrong)
    with pytest.raises(ArgumentError, match="sample must be 0 to 1"):
        report.token_map(sample=2)
    with handle.disabled():
        generate(pipe, name)
    with pytest.raises(ArgumentError, match="sparse step"):
        handle.report().token_map()


@pytest.mark.parametrize("method", [RAS, fastdit.RALU])
def test_the_old_word_for_the_corrected_mode_is_taken(method):
    with pytest.warns(DeprecationWarning, match='is called "corrected" now'):
        assert method(mode="fixed") == method()
