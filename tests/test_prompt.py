"""The projection of the prompt, which a run does once: exact, and given up wherever somebody looks into it."""

from __future__ import annotations

import itertools

import pytest
import torch

import fastdit
import tiny_models
from contract import FORWARD_FP64, distance, same_bits
from fastdit.runtime.asked import Asked
from fastdit.runtime.install import is_installed
from tiny_models import generate, sample

PROJECTIONS = {
    name: tiny_models.adapter_of(name).prompt_projections[0]
    for name in tiny_models.one_each(tiny_models.forms("prompt_projections"))
}
STEPS = 4


def counted(pipe, name):
    """The calls that reach the projection's own layer, through the class so that no hook is seen."""
    layer = next(
        part
        for part in pipe.transformer.get_submodule(PROJECTIONS[name]).modules()
        if isinstance(part, torch.nn.Linear)
    )
    calls = []

    class Counting(type(layer)):
        def forward(self, x):
            calls.append(x)
            return super().forward(x)

    layer.__class__ = Counting
    return calls


@pytest.mark.parametrize("name", PROJECTIONS)
def test_the_prompt_is_projected_once_for_each_branch_of_a_run(name):
    pipe = tiny_models.pipeline(name)
    expected = generate(pipe, name, steps=STEPS)
    calls = counted(pipe, name)
    fastdit.patch(pipe)
    for run in (1, 2):
        assert distance(generate(pipe, name, steps=STEPS), expected) < 1e-5
        assert len(calls) == run * branches(name)
    fastdit.patch(pipe, backend="reference")
    same_bits(generate(pipe, name, steps=STEPS), expected)
    assert len(calls) == (2 + STEPS) * branches(name)
    fastdit.unpatch(pipe)
    assert not is_installed(pipe.transformer.get_submodule(PROJECTIONS[name]))


@pytest.mark.parametrize("name", ["sd3", "flux"])  # by one call and by two a step
def test_the_prompt_outlives_a_change_of_resolution(name):
    pipe = tiny_models.pipeline(name)
    method = fastdit.RALU((2, 2, 3), (0.3, 0.45, 1.0), (5.0, 2.6, 2.2), 0.05, 0.3, "gradient")
    fastdit.patch(pipe, method, backend="reference")
    size = {"steps": 7, "height": 16, "width": 24}
    expected = generate(pipe, name, **size)
    calls = counted(pipe, name)
    fastdit.patch(pipe, method)
    assert distance(generate(pipe, name, **size), expected) < 1e-4
    assert len(calls) == (2 if name == "flux" else 1)


@pytest.mark.parametrize("name", ["sd3", "pixart-sigma"])  # by a callback of each kind
def test_a_prompt_swapped_in_a_run_is_projected_anew(name):
    """As stock does, whether the tensor is another one or is written into."""

    def swap(pipe, step, timestep, tensors):
        prompt = tensors["prompt_embeds"]
        if step == 0:
            prompt = prompt.flip(1)
        elif step == 1:
            prompt.mul_(1.5)
        return {**tensors, "prompt_embeds": prompt}

    given = {
        "steps": STEPS,
        "callback_on_step_end": swap,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    }
    if name.startswith("pixart"):  # its callback is of the old kind
        embeddings = []

        def swap_in_place(step, timestep, latents):
            embeddings[-1].mul_(1.5)

        given = {"steps": STEPS, "callback": swap_in_place}
    pipe = tiny_models.pipeline(name, torch.float64)
    plain = generate(pipe, name, steps=STEPS)
    if name.startswith("pixart"):
        watch = lambda module, args, kwargs: embeddings.append(kwargs["encoder_hidden_states"])  # noqa: E731
        pipe.transformer.register_forward_pre_hook(watch, with_kwargs=True)
    expected = generate(pipe, name, **given)
    assert distance(plain, expected) > 1e-3
    fastdit.patch(pipe)
    assert distance(generate(pipe, name, **given), expected) <= FORWARD_FP64


def test_hooks_and_gradients_see_every_call():
    pipe = tiny_models.pipeline("sd3")
    calls = counted(pipe, "sd3")
    fastdit.patch(pipe)
    hook = pipe.transformer.context_embedder.register_forward_hook(lambda *_: None)
    generate(pipe, "sd3", steps=STEPS)
    assert len(calls) == STEPS
    hook.remove()

    call = tiny_models.call("sd3")
    call["encoder_hidden_states"].requires_grad_()
    with torch.enable_grad():
        for _ in range(2):
            sample(pipe.transformer(**call)).sum().backward()
    assert call["encoder_hidden_states"].grad.abs().sum() > 0


ATTENTIONS = tiny_models.one_each(tiny_models.forms("prompt_attentions"))


def branches(name):
    """Calls in a step."""
    return 1 if tiny_models.FAMILIES[name].cfg_in_one_call else 2


def layers_of(pipe):
    """What makes keys and values of the prompt alone."""
    return [
        part
        for name, part in pipe.transformer.named_modules()
        if name.endswith(("attn2.to_k", "attn2.to_v"))
    ]


@pytest.fixture
def made(monkeypatch):
    """Layers whose keys or values were made anew, in order."""
    found = []
    stock = Asked.project_prompt_keys

    def project(self, module, x):
        before = set(self.branch.prompts)
        if module not in before or not self.run.keeps_prompt_keys:
            found.append(module)
        return stock(self, module, x)

    monkeypatch.setattr(Asked, "project_prompt_keys", project)
    return found


@pytest.mark.parametrize("name", ATTENTIONS)
def test_keys_of_the_prompt_are_made_once_and_are_the_same_bits(
    name, made, monkeypatch, unprogrammed
):
    pipe = tiny_models.pipeline(name)
    fastdit.patch(pipe)
    found = generate(pipe, name, steps=STEPS)
    assert made == branches(name) * layers_of(pipe)
    with monkeypatch.context() as patch:
        patch.setattr(
            Asked,
            "project_prompt_keys",
            lambda self, module, x: module.__class__.forward(module, x),
        )
        same_bits(generate(pipe, name, steps=STEPS), found)


def schedule(pipe):
    return fastdit.Schedule.every(2)


@pytest.mark.parametrize("programmed", [True, False])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_keys_of_the_prompt_stay_where_they_fit(name, programmed, made, request):
    """A byte less, and they are made at each step that needs them; never more than was allowed."""
    if not programmed:
        request.getfixturevalue("unprogrammed")
    pipe = tiny_models.pipeline(name)
    given = {"steps": STEPS, "height": 16, "width": 16}
    size = tiny_models.asked(name, 16, 16)
    size["text_tokens"] = tiny_models.arguments(name)["prompt_embeds"].shape[1]
    handle = fastdit.patch(pipe, fastdit.Cached(schedule(pipe)))
    expected = generate(pipe, name, **given)
    needed = handle.explain(steps=STEPS, **size).cache_bytes
    assert fastdit.report(pipe).peak_cache_bytes == needed
    for spare, kept in ((0, True), (-1, False)):
        method = fastdit.Cached(schedule(pipe), max_cache_bytes=needed + spare)
        handle = fastdit.patch(pipe, method)
        said = handle.explain(steps=STEPS, **size)
        made.clear()
        same_bits(generate(pipe, name, **given), expected)
        assert fastdit.report(pipe).peak_cache_bytes == said.cache_bytes <= needed + spare
        times = branches(name) * (1 if kept else STEPS // 2)
        if not programmed:
            assert made == times * layers_of(pipe)
        assert (said.cache_bytes == needed) is kept


@pytest.mark.parametrize("name", ATTENTIONS)
@torch.no_grad()
def test_keys_of_the_prompt_give_way_to_a_second_condition(name):
    """Those of the first fitted alone; the next run's first call is like this run's, and its second is not."""
    model = tiny_models.transformer(name)
    first, second = (tiny_models.call(name, 1, step=seed) for seed in range(2))
    second["timestep"] = first["timestep"]

    def capped(most):
        method = fastdit.Cached(fastdit.Schedule.every(2), max_cache_bytes=most)
        return fastdit.patch(model, method)

    def drawn(handle):
        found = []
        with handle.run(range(STEPS)):
            for _ in range(STEPS):
                found.append(sample(model(**first)))
                found.append(sample(model(**second)))
                handle.advance()
        return found, handle.report().peak_cache_bytes

    expected, peak = drawn(capped(None))
    layers = [p for path, p in model.named_modules() if path.endswith(("attn2.to_k", "attn2.to_v"))]
    tokens = first["encoder_hidden_states"].shape[1]
    keys = 4 * tokens * sum(layer.out_features for layer in layers)
    most = max(peak // 2, peak - 2 * keys)
    handle = capped(most)
    for _ in range(2):
        found, peak = drawn(handle)
        assert peak <= most
        for each, wanted in zip(found, expected, strict=True):
            same_bits(each, wanted)


def write_weight(layer):
    with torch.no_grad():
        layer.weight.mul_(1.5)


def replace_weight(layer):
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 1.5)


@pytest.mark.parametrize("change", [write_weight, replace_weight])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_weights_of_the_prompt_that_change_in_a_run_are_seen(name, change):
    """Of an attention's values, and of the prompt's projection; as stock does."""
    model = tiny_models.transformer(name, torch.float64)
    layers = [part for path, part in model.named_modules() if path.endswith("1.attn2.to_v")]
    if name.startswith("pixart"):
        layers.append(model.caption_projection.linear_2)
    call = tiny_models.call(name, 2, dtype=torch.float64)
    states = [layer.weight.detach().clone() for layer in layers]

    def drawn(advance):
        for layer, state in zip(layers, states, strict=True):
            layer.weight = torch.nn.Parameter(state.clone())
        found = []
        with torch.no_grad():
            for step in range(len(layers) + 1):
                if step:
                    change(layers[step - 1])
                found.append(sample(model(**call)))
                advance()
        return found

    expected = drawn(lambda: None)
    assert all(distance(a, b) > 1e-4 for a, b in itertools.pairwise(expected))
    handle = fastdit.patch(model)
    with handle.run(range(len(layers) + 1)):
        found = drawn(handle.advance)
    for each, wanted in zip(found, expected, strict=True):
        assert distance(each, wanted) <= FORWARD_FP64
