"""Forecasts: whole steps that are extrapolated, against plain hooks on stock pipelines and closed forms."""

from __future__ import annotations

import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.modeling_utils import ModelMixin
from torch._dynamo.testing import CompileCounter

import fastdit
import tiny_models
from fastdit.schedules.forecast import last_nodes, weights
from oracle import Oracle, random_bits
from tiny_models import sample

every = fastdit.Schedule.every


@pytest.mark.parametrize("order", [0, 1, 2])
def test_polynomials_of_the_order_are_met_exactly(order):
    nodes = [0.31, 0.52, 0.94][: order + 1]
    found = weights(nodes, 0.17)
    assert sum(found) == pytest.approx(1.0, abs=1e-12)
    for degree in range(order + 1):
        drawn = sum(w * node**degree for w, node in zip(found, nodes, strict=True))
        assert drawn == pytest.approx(0.17**degree, abs=1e-12)
    assert sum(w * node ** (order + 1) for w, node in zip(found, nodes, strict=True)) != (
        pytest.approx(0.17 ** (order + 1), abs=1e-3)
    )


def test_a_step_at_the_sigma_of_another_replaces_it():
    sigmas = [1.0, 0.8, 0.8, 0.6, 0.6, 0.3]
    assert last_nodes([0, 1, 2, 3, 4], sigmas, 1) == (4, 2)
    assert last_nodes([0, 1, 2, 3, 4], sigmas, 2) == (4, 2, 0)
    assert last_nodes([0], sigmas, 2) == (0,)


class Plain:
    """The same by a hook on the stock transformer: it forgets that a step at a forecast ran.

    With the order "auto" each sample repeats while that was nearer to what was computed last.
    """

    def __init__(self, pipe, n, order):
        self.auto, order = order == "auto", 1 if order == "auto" else order
        self.bends = {}
        self.n, self.order, self.step = n, order, 0
        self.calls, self.computed, self.pipe = Counter(), {}, pipe
        pipe.transformer.register_forward_hook(self.after)
        self.scheduled = pipe.scheduler.step
        pipe.scheduler.step = self.after_step

    def after_step(self, *args, **kwargs):
        found = self.scheduled(*args, **kwargs)
        self.step += 1
        return found

    def sigma(self, step):
        scheduler = self.pipe.scheduler
        if hasattr(scheduler, "sigmas"):
            return float(scheduler.sigmas[step])
        alpha = float(scheduler.alphas_cumprod[int(scheduler.timesteps[step])])
        return ((1 - alpha) / alpha) ** 0.5

    def after(self, module, args, output):
        branch = self.calls[self.step]
        self.calls[self.step] += 1
        nodes = self.computed.setdefault(branch, {})
        sample = output[0]
        begun = getattr(self.pipe.scheduler, "begin_index", None)
        if not self.step and begun:  # image to image
            self.step = begun
            self.calls[self.step] = self.calls.pop(0)
        at = self.sigma(self.step)
        if self.step % self.n == 0 or not nodes:
            if len(nodes) > 1 and at not in nodes:
                off = [
                    (drawn - sample).flatten(1).norm(dim=1)
                    for drawn in (self.drawn(nodes, at), list(nodes.values())[-1])
                ]
                self.bends[branch] = off[0] >= off[1]
            nodes[at] = sample.clone()
            return
        found = self.drawn(nodes, at)
        if self.auto and branch in self.bends:
            found[self.bends[branch]] = list(nodes.values())[-1][self.bends[branch]]
        sample.copy_(found)

    def drawn(self, nodes, at):
        used = list(nodes.items())[-1 - self.order :]
        total = torch.zeros_like(used[0][1])
        for i, (own, value) in enumerate(used):
            others = [other for j, (other, _) in enumerate(used) if j != i]
            total += value * np.prod([(at - other) / (own - other) for other in others])
        return total


def flow(cls, **settings):
    return lambda: cls(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, **settings
    )


CASES = [
    ("sd3", FlowMatchEulerDiscreteScheduler),
    ("sd3", FlowMatchHeunDiscreteScheduler),
    ("sd3", flow(UniPCMultistepScheduler)),
    ("sd3-img2img", FlowMatchEulerDiscreteScheduler),
    ("flux", FlowMatchEulerDiscreteScheduler),
    ("pixart-sigma", DPMSolverMultistepScheduler),
    ("dit", DDIMScheduler),
    ("lumina", FlowMatchEulerDiscreteScheduler),
    pytest.param(
        "qwen",
        FlowMatchEulerDiscreteScheduler,
        marks=pytest.mark.skipif(not tiny_models.HAS_QWEN, reason="diffusers has none"),
    ),
]


@pytest.mark.parametrize("order", [1, 2, "auto"])
@pytest.mark.parametrize(("family", "scheduler"), CASES)
def test_whole_steps_equal_a_plain_hook(family, scheduler, order):
    pipe = tiny_models.pipeline(family, torch.float64, scheduler=scheduler())
    handle = fastdit.patch(pipe, fastdit.Cached(every(2), order=order), backend="reference")
    found = tiny_models.generate(pipe, family, batch=2, steps=9, prompt_per_image=True)
    report = handle.report()
    stock = tiny_models.pipeline(family, torch.float64, scheduler=scheduler())
    Plain(stock, 2, order)
    expected = tiny_models.generate(stock, family, batch=2, steps=9, prompt_per_image=True)
    assert torch.linalg.norm(found - expected) <= 1e-9 * torch.linalg.norm(expected)
    assert report.reused > 0
    assert report.tokens_per_step.count(0) == report.steps - sum(
        tokens > 0 for tokens in report.tokens_per_step
    )


def test_no_block_is_visited_and_no_output_of_one_kept():
    pipe = tiny_models.pipeline("sd3")
    handle = fastdit.patch(pipe, fastdit.Cached(every(3), order=1))
    visits = []
    pipe.transformer.transformer_blocks[0].ff.register_forward_hook(
        lambda *_: visits.append(handle.report)
    )
    pipe.transformer.pos_embed.register_forward_hook(lambda *_: visits.append(None))
    tiny_models.generate(pipe, "sd3", steps=9)
    assert len(visits) == 2 * 3
    report = handle.report()
    assert report.flop_speedup == pytest.approx(3.0, rel=0.01)
    latents = 2 * 2 * 4 * tiny_models.HEIGHT // 8 * tiny_models.WIDTH // 8 * 4
    assert report.peak_cache_bytes <= 3 * latents + 2 * 4 * 64 * tiny_models.TEXT * 8


def test_euler_takes_the_line_at_the_beginning_of_a_skipped_step():
    """In closed form, from the computed velocities alone."""
    pipe = tiny_models.pipeline("sd3", torch.float64)
    given = []
    pipe.transformer.register_forward_hook(lambda m, a, out: given.append(out[0].clone()))
    fastdit.patch(pipe, fastdit.Cached(every(2), order=1), backend="reference")
    found = tiny_models.generate(pipe, "sd3", steps=6, cfg=False)
    sigmas = pipe.scheduler.sigmas.double()
    computed = given[::2]
    x = pipe.prepare_latents(
        1, 4, tiny_models.HEIGHT, tiny_models.WIDTH, torch.float64, "cpu",
        torch.Generator().manual_seed(0),
    )  # fmt: skip
    for i, velocity in enumerate(computed):
        a, b, c = sigmas[2 * i : 2 * i + 3]
        slope = 0 if i == 0 else (velocity - computed[i - 1]) / (a - sigmas[2 * i - 2])
        x = x + (b - a) * velocity + (c - b) * (velocity + (b - a) * slope)
    assert torch.linalg.norm(found - x) <= 1e-6 * torch.linalg.norm(
        x
    )  # its scheduler's sigmas are fp32


def test_order_0_is_what_it_was():
    drawn = []
    for method in (fastdit.Cached(every(2)), fastdit.Cached(every(2), order=0)):
        pipe = tiny_models.pipeline("flux")
        fastdit.patch(pipe, method)
        drawn.append(tiny_models.generate(pipe, "flux", steps=5))
    assert torch.equal(*drawn)


class Streams(ModelMixin, ConfigMixin):
    """A model that nobody knows, of two streams, which gives a list and a number beside them."""

    @register_to_config
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.calls = 0

    def forward(self, x, t, cap_feats=None):
        self.calls += 1
        sigma = t.reshape(-1, 1, 1) / 1000
        return [x.sin() * self.scale * sigma, x.cos() * sigma**2], x.shape[1]


def test_any_model_will_do():
    model = Streams()
    given = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    handle = fastdit.patch(model, fastdit.Cached(every(2), order=1))
    times = torch.tensor([1000.0, 800.0, 500.0, 300.0])
    with torch.no_grad(), handle.run(times):
        outputs = []
        for t in times:
            outputs.append(model(x=given, t=t.expand(2)))
            handle.advance()
    assert model.calls == 2
    (sine, cosine), length = outputs[3]
    assert length == 5
    last, first = 0.5, 1.0
    for stream, power, drawn in ((given.sin(), 1, sine), (given.cos(), 2, cosine)):
        a, b = last**power, first**power
        expected = stream * (a + (0.3 - last) * (a - b) / (last - first))
        torch.testing.assert_close(drawn, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(outputs[1][0][0], outputs[0][0][0])  # one output alone is repeated
    assert handle.report().reuse_share == 0.5
    assert "output" in str(handle.explain(steps=4, height=8, width=8))
    fastdit.unpatch(model)
    model(x=given, t=times[:1].expand(2))
    assert model.calls == 3


@pytest.mark.parametrize("grad", [False, True])
def test_each_picture_is_drawn_by_what_was_nearer(grad):
    """The outputs of the first follow a line, those of the second jump to and fro; with two of them both are drawn."""

    class Two(Streams):
        def forward(self, x, t):
            self.calls += 1
            line, jump = t[0] / 1000, torch.tensor([1.0, 5.0, 1.0])[self.calls - 1]
            return (torch.stack([line * x[0], jump * x[1]]),)

    model, x = Two(), torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    handle = fastdit.patch(model, fastdit.Cached(every(2), order="auto"))
    times = torch.tensor([1000.0, 900.0, 800.0, 600.0, 500.0, 300.0])
    outputs = []
    with torch.set_grad_enabled(grad), handle.run(times):
        for t in times:
            outputs.append(model(x=x, t=t.expand(2))[0].detach())
            handle.advance()
    assert model.calls == 3
    torch.testing.assert_close(outputs[3][0], 0.6 * x[0])
    torch.testing.assert_close(outputs[3][1], 9.0 * x[1])
    torch.testing.assert_close(outputs[5][0], 0.3 * x[0])
    assert torch.equal(outputs[5][1], outputs[4][1])


def test_auto_takes_no_schedule_that_separates_the_parts_of_a_block():
    bits, names = random_bits(tiny_models.transformer("sd3"), 4, 0)
    apart = fastdit.Schedule.from_bits(bits, names)
    for method in (fastdit.Cached, fastdit.ECAD):
        with pytest.raises(fastdit.ScheduleError, match=r'order="auto" takes .* step 1 .* order=1'):
            method(apart, order="auto")
    whole = {kind: np.repeat(part[..., :1], part.shape[2], 2) for kind, part in bits.items()}
    method = fastdit.Cached(fastdit.Schedule.from_bits(whole, names), order="auto")
    assert method.adapts
    assert method.forecasts
    for layer in method.source.layers.values():
        assert (layer.orders == ~layer.bits).all()
    assert not fastdit.Cached(every(2), order=1).adapts


def test_another_cache_on_any_model_is_refused():
    """Also one that comes after the patch, on parts of which nothing is known."""

    class Stateful(ModelHook):
        _is_stateful = True

    model = Streams()
    model.part = torch.nn.Linear(2, 2)
    method = fastdit.Cached(every(2), order=1)
    handle = fastdit.patch(model, method)
    HookRegistry.check_if_exists_or_initialize(model.part).register_hook(Stateful(), "cache")
    given = torch.zeros(1, 5, 8), torch.ones(1)
    refused = pytest.raises(fastdit.UnsupportedModelError, match="part carries diffusers' Stateful")
    with torch.no_grad(), handle.run(range(4)), refused:
        model(*given)
    handle.unpatch()
    with pytest.raises(fastdit.UnsupportedModelError, match="part carries diffusers' Stateful"):
        fastdit.patch(model, method)


@pytest.mark.parametrize("given", [-1, 3, True, 1.0, "auto?"])
def test_orders_are_checked(given):
    with pytest.raises(fastdit.ScheduleError, match="order must be 0, 1 or 2, got"):
        fastdit.Cached(every(2), order=given)


def test_samplers_that_draw_noise():
    """An output under other noise lies on no line with another; repeated it is wrong too, which is said."""
    noisy = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    pipe = tiny_models.pipeline("sd3", scheduler=noisy)
    with pytest.raises(fastdit.ArgumentError, match=r"order must be 0 .*stochastic_sampling=True"):
        fastdit.patch(pipe, fastdit.Cached(every(2), order=1))
    for method in (fastdit.Cached(every(2)), fastdit.RAS()):
        with pytest.warns(UserWarning, match=f"{method.name} keeps outputs .* draws noise at each"):
            fastdit.patch(pipe, method)
    fastdit.unpatch(pipe)
    # One that comes later is seen when it sets its timesteps.
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    handle = fastdit.patch(pipe, fastdit.Cached(every(2), order=1))
    pipe.scheduler = noisy
    with pytest.raises(fastdit.ArgumentError, match="draws noise"):
        tiny_models.generate(pipe, "sd3")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    tiny_models.generate(pipe, "sd3")
    assert handle.report().live


def test_noise_that_a_step_is_asked_for():
    pipe = tiny_models.pipeline("dit", scheduler=DDIMScheduler())
    fastdit.patch(pipe, fastdit.Cached(every(2), order=1))
    scheduler = pipe.scheduler
    scheduler.set_timesteps(4)
    x = torch.zeros(1, 4, 8, 8)
    with pytest.raises(fastdit.ArgumentError, match=r"eta=0\.5"):
        scheduler.step(x, scheduler.timesteps[0], x, eta=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step(x, scheduler.timesteps[0], x)


def test_ancestral_samplers_are_known():
    pipe = tiny_models.pipeline("pixart-sigma", scheduler=EulerAncestralDiscreteScheduler())
    with pytest.raises(fastdit.ArgumentError, match="EulerAncestralDiscreteScheduler"):
        fastdit.patch(pipe, fastdit.Cached(every(2), order=2))
    sde = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")
    pipe = tiny_models.pipeline("pixart-sigma", scheduler=sde)
    with pytest.raises(fastdit.ArgumentError, match="algorithm_type='sde-dpmsolver"):
        fastdit.patch(pipe, fastdit.Cached(every(2), order=1))


def test_a_compiled_model_stays_compiled():
    counter = CompileCounter()
    model = Streams()
    handle = fastdit.patch(model, fastdit.Cached(every(2), order=1))
    model.compile(backend=counter)
    given, times = torch.randn(2, 5, 8), torch.tensor([1000.0, 800.0, 500.0, 300.0])
    with torch.no_grad(), handle.run(times):
        for t in times:
            model(x=given, t=t.expand(2))
            handle.advance()
    assert counter.op_count >= 5
    assert handle.report().reuse_share == 0.5


def drawn_both_ways(family, seed, dtype, backend, batch=2, steps=7):
    """Outputs of each step's call of a random schedule of random orders: (patched, plain hooks)."""
    generator = np.random.default_rng(seed)
    model = tiny_models.transformer(family, dtype)
    bits, names = random_bits(model, steps, seed, compute=0.4)
    orders = {kind: generator.integers(0, 3, part.shape) for kind, part in bits.items()}
    sigmas = np.sort(generator.random(steps))[::-1].tolist()
    inputs = [tiny_models.call(family, batch, dtype, step=step) for step in range(steps)]
    with torch.no_grad(), Oracle(model, bits, orders=orders, sigmas=sigmas).installed():
        expected = [sample(model(**given)) for given in inputs]
    schedule = fastdit.Schedule.from_bits(bits, names, orders=orders)
    handle = fastdit.patch(model, fastdit.Cached(schedule), backend=backend)
    with torch.no_grad(), handle.run(sigmas):
        actual = [sample(model(**given)) for given in inputs]
    return actual, expected


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_random_orders_equal_plain_hooks(family, seed, backend):
    if backend == "cpu":
        actual, expected = drawn_both_ways(family, seed, torch.float32, backend)
        bound = 1e-4
    else:
        actual, expected = drawn_both_ways(family, seed, torch.float64, backend)
        bound = 1e-9
    for one, other in zip(actual, expected, strict=True):
        assert torch.linalg.norm(one - other) <= bound * torch.linalg.norm(other)


SAMPLERS = {
    "euler": FlowMatchEulerDiscreteScheduler,
    "heun": FlowMatchHeunDiscreteScheduler,
    "unipc": flow(UniPCMultistepScheduler),
    "dpm": flow(DPMSolverMultistepScheduler, algorithm_type="dpmsolver++"),
}


@pytest.mark.parametrize(
    ("family", "sampler"),
    [("sd3", name) for name in SAMPLERS] + [("flux", "euler"), ("flux", "unipc")],
)
def test_whole_runs_of_random_orders_equal_plain_hooks(family, sampler):
    """The sigmas are the scheduler's, where outputs at one sigma replace each other."""
    pipe = tiny_models.pipeline(family, torch.float64, scheduler=SAMPLERS[sampler]())
    tiny_models.generate(pipe, family, steps=6)  # the pipeline may have sigmas of its own
    steps, sigmas = len(pipe.scheduler.timesteps), [float(s) for s in pipe.scheduler.sigmas]
    generator = np.random.default_rng(3)
    bits, names = random_bits(pipe.transformer, steps, 3, compute=0.4)
    orders = {kind: generator.integers(0, 3, part.shape) for kind, part in bits.items()}
    calls = 2 if family == "flux" else 1
    with Oracle(pipe.transformer, bits, calls, orders=orders, sigmas=sigmas).installed():
        expected = tiny_models.generate(pipe, family, batch=2, steps=6)
    schedule = fastdit.Schedule.from_bits(bits, names, orders=orders)
    handle = fastdit.patch(pipe, fastdit.Cached(schedule), backend="reference")
    found = tiny_models.generate(pipe, family, batch=2, steps=6)
    assert torch.linalg.norm(found - expected) <= 1e-9 * torch.linalg.norm(expected)
    report = handle.report()
    assert report.peak_cache_bytes > 0
    assert handle.explain(
        tiny_models.HEIGHT, tiny_models.WIDTH, 2, steps, text_tokens=tiny_models.TEXT, cfg=True
    ).cache_bytes == pytest.approx(report.peak_cache_bytes, rel=0.1)


@pytest.mark.parametrize("order", [1, 2])
def test_a_bare_loop_tells_its_sigmas_by_the_timestep(order):
    """Nobody said before how many steps there are, and where they lie."""
    model = Streams()
    given = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    fastdit.patch(model, fastdit.Cached(every(2), order=order))
    times = [1000.0, 800.0, 500.0, 300.0]
    with torch.no_grad():
        outputs = [model(x=given, t=torch.full((2,), t)) for t in times]
    assert model.calls == 2
    expected = given.sin() * 0.3  # on the line through those at 1 and 0.5
    torch.testing.assert_close(outputs[3][0][0], expected, rtol=1e-5, atol=1e-6)


def test_a_swapped_prompt_is_not_drawn_through():
    """Outputs of another prompt are of another picture: the next step computes."""
    counts = []
    for swapped in (False, True):
        pipe = tiny_models.pipeline("sd3")
        handle = fastdit.patch(pipe, fastdit.Cached(every(4), order=1))

        def swap(pipe, step, timestep, kwargs, swapped=swapped):
            found = kwargs["prompt_embeds"]
            return {"prompt_embeds": found + 1 if swapped and step == 1 else found}

        tiny_models.generate(
            pipe,
            "sd3",
            steps=4,
            callback_on_step_end=swap,
            callback_on_step_end_tensor_inputs=["prompt_embeds"],
        )
        counts.append(handle.report().tokens_per_step)
    assert [tokens > 0 for tokens in counts[0]] == [True, False, False, False]
    assert [tokens > 0 for tokens in counts[1]] == [True, False, True, False]


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("family", tiny_models.one_each(list(tiny_models.FAMILIES)))
def test_the_outputs_that_are_kept_are_counted(family, order):
    model = tiny_models.transformer(family)
    handle = fastdit.patch(model, fastdit.Cached(every(2), order=order), backend="reference")
    given = [tiny_models.call(family, 2, step=step) for step in range(6)]
    with torch.no_grad(), handle.run(range(6)):
        for call in given:
            output = sample(model(**call))
    assert handle.report().peak_cache_bytes == (1 + order) * output.nbytes
    capped = fastdit.Cached(every(2), order=order, max_cache_bytes=(1 + order) * output.nbytes - 1)
    handle = fastdit.patch(model, capped, backend="reference")
    said = f"need {(1 + order) * output.nbytes} bytes"
    with torch.no_grad(), handle.run(range(6)), pytest.raises(fastdit.ArgumentError, match=said):
        model(**given[0])
