"""Modulations made ahead for the steps to come: exact, once a window, and given up where a run goes another way."""

from __future__ import annotations

import re

import pytest
import torch

import fastdit
import tiny_models
from contract import FORWARD_FP64, distance
from fastdit.blocks import modulation
from fastdit.runtime.install import is_installed
from tiny_models import generate, sample

STEPS = 6
#: what adapters say the names of
TOLD = ("image", "time")


def says_inputs(name):
    """Whether the family's adapter says what its adaLN layers are given, so that they can be computed ahead."""
    model, given = tiny_models.transformer(name), tiny_models.call(name)
    return tiny_models.adapter_of(name).layer_inputs(model, (), given, 1) is not None


FORMS = [name for name in tiny_models.FAMILIES if says_inputs(name)]
NAMES = [*FORMS, *tiny_models.IMAGE_TO_IMAGE]


@pytest.fixture
def products(monkeypatch):
    """Rows of every product of an adaLN layer that is made ahead."""
    rows = []
    stock = modulation.Modulations.of

    def of(self, layer, compute):
        def counted(*inputs):
            rows.append(inputs[0].shape[0])
            return compute(*inputs)

        return stock(self, layer, counted)

    monkeypatch.setattr(modulation.Modulations, "of", of)
    return rows


def layers(model):
    """Norms with a product of their own, and what adds a table to one that all share."""
    classes = "AdaLayerNorm(Zero|Continuous)|RMSNormZero|LuminaLayerNormContinuous|Flux2Mod"
    return sum(
        bool(re.search(classes, type(module).__name__))
        or name.endswith(("_mod", "proj_out_1", "adaLN_modulation"))
        or hasattr(module, "scale_shift_table")
        for name, module in model.named_modules()
    )


@pytest.mark.parametrize("rows", [64, 4], ids=["all steps", "windows of steps"])
@pytest.mark.parametrize("name", NAMES)
def test_modulations_made_ahead_are_those_of_each_step(name, rows, products, monkeypatch):
    monkeypatch.setattr(modulation, "FREE_ROWS", rows)
    pipe = tiny_models.pipeline(name, torch.float64)
    expected = generate(pipe, name, steps=STEPS, cfg=False, batch=2)
    fastdit.patch(pipe)
    for _ in range(2):
        assert distance(generate(pipe, name, steps=STEPS, cfg=False, batch=2), expected) <= 1e-12
    steps = 4 if "img2img" in name else STEPS  # strength 0.6 leaves 4 (rounded up) of 6
    windows = -(-steps // (rows // 2))
    assert len(products) == 2 * windows * layers(pipe.transformer)
    assert sum(products) == 2 * 2 * steps * layers(pipe.transformer)


@pytest.mark.parametrize("name", tiny_models.one_each(FORMS, -1))
def test_explain_tells_their_bytes(name, monkeypatch):
    made = {}
    stock = modulation.Modulations.of

    def of(self, layer, compute):
        row = stock(self, layer, compute)
        made[layer] = {part.untyped_storage().data_ptr(): part for part in row}
        return row

    monkeypatch.setattr(modulation.Modulations, "of", of)
    pipe = tiny_models.pipeline(name)
    handle = fastdit.patch(pipe)
    generate(pipe, name, steps=STEPS, cfg=False, batch=2)
    said = handle.explain(batch=2, steps=STEPS, cfg=False)
    storages = [part for parts in made.values() for part in parts.values()]
    held = sum(part.untyped_storage().nbytes() for part in storages)
    assert said.modulation_bytes == held > 0
    assert "modulations" in str(said)


@pytest.mark.parametrize("name", ["sd3", "flux-dev"])  # without guidance in it, and with
def test_timestep_and_prompt_are_embedded_once(name):
    pipe = tiny_models.pipeline(name)
    layer = pipe.transformer.time_text_embed.timestep_embedder.linear_1
    rows = []

    class Counting(type(layer)):
        def forward(self, x):
            rows.append(len(x))
            return super().forward(x)

    layer.__class__ = Counting
    generate(pipe, name, steps=STEPS, cfg=False, batch=2)
    assert rows == [2] * STEPS
    rows.clear()
    handle = fastdit.patch(pipe)
    generate(pipe, name, steps=STEPS, cfg=False, batch=2)
    assert rows == [2 * STEPS]
    handle.unpatch()
    assert not is_installed(pipe.transformer.time_text_embed)


def other_prompt(pipe, step, timestep, tensors):
    name = "pooled_prompt_embeds"
    if name in tensors and step == 1:
        tensors[name] = tensors[name].flip(1)
    return tensors


def written_prompt(pipe, step, timestep, tensors):
    if step == 1:
        tensors["pooled_prompt_embeds"].mul_(1.5)
    return tensors


@pytest.mark.parametrize("change", [other_prompt, written_prompt])
def test_a_prompt_changed_in_the_run(change, products):
    pipe = tiny_models.pipeline("sd3", torch.float64)
    given = {
        "steps": STEPS,
        "callback_on_step_end": change,
        "callback_on_step_end_tensor_inputs": ["latents", "pooled_prompt_embeds"],
    }
    plain = generate(pipe, "sd3", steps=STEPS)
    expected = generate(pipe, "sd3", **given)
    assert distance(plain, expected) > 1e-4
    fastdit.patch(pipe)
    assert distance(generate(pipe, "sd3", **given), expected) <= FORWARD_FP64
    assert len(products) == layers(pipe.transformer)  # not made ahead again


@pytest.mark.parametrize("name", tiny_models.one_each(FORMS, -1))
def test_a_loop_that_goes_another_way_than_it_said(name, products):
    """Two steps as announced, then other timesteps, and another guidance; each as stock."""
    model = tiny_models.transformer(name, torch.float64)
    calls = [tiny_models.call(name, 2, dtype=torch.float64) for _ in range(4)]
    image, time = (getattr(tiny_models.adapter_of(name), f"{each}_argument") for each in TOLD)
    first = calls[0][time]
    said = torch.stack([first[0], first[0] / 2, first[0] / 4, first[0] / 8]).to(first.dtype)
    for call, value in zip(calls, said, strict=True):
        call |= {k: v for k, v in calls[0].items() if k != image}
        call[time] = value.expand(2)
    calls[2][time] = (said[2] * 3).expand(2)
    if "guidance" in calls[3]:
        calls[3]["guidance"] = calls[3]["guidance"] * 2
    with torch.no_grad():
        expected = [sample(model(**call)) for call in calls]
        handle = fastdit.patch(model)
        with handle.run(said):
            for call, wanted in zip(calls, expected, strict=True):
                assert distance(sample(model(**call)), wanted) <= FORWARD_FP64
                handle.advance()
    assert len(products) == layers(model)


@pytest.mark.parametrize(
    "target", ["norm1.linear", "time_text_embed.timestep_embedder.linear_1", "context_embedder"]
)
def test_an_adapter_whose_scale_changes(target):
    """In a layer, in what all layers are given, and in the projection of the prompt, which is made once too."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=[target])
    pipe = tiny_models.pipeline("sd3", torch.float64)
    pipe.transformer.add_adapter(settings)

    def fade(pipe, step, timestep, tensors):
        pipe.transformer.set_adapters(["default"], [0.5 ** ((step + 1) % STEPS)])
        return tensors

    expected = generate(pipe, "sd3", steps=STEPS, callback_on_step_end=fade)
    fastdit.patch(pipe)
    found = generate(pipe, "sd3", steps=STEPS, callback_on_step_end=fade)
    assert distance(found, expected) <= FORWARD_FP64


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["sd3", "flux"])  # the pooled prompt is an input of these
def test_a_pooled_prompt_written_in_a_run_is_seen(name, mode):
    """By a callback; nobody counts the writes to tensors made in inference mode."""

    def write(pipe, step, timestep, given):
        if step == 2:
            given["pooled_prompt_embeds"].mul_(-1)
        return given

    def drawn():
        pipe._callback_tensor_inputs = ["latents", "pooled_prompt_embeds"]
        return generate(
            pipe,
            name,
            steps=STEPS,
            cfg=False,
            callback_on_step_end=write,
            callback_on_step_end_tensor_inputs=["pooled_prompt_embeds"],
        )

    with mode():
        pipe = tiny_models.pipeline(name, torch.float64)
        plain, expected = generate(pipe, name, steps=STEPS, cfg=False), drawn()
        assert distance(plain, expected) > 1e-3
        fastdit.patch(pipe)
        assert distance(drawn(), expected) <= 1e-12


SEEN = {
    "the norm": lambda model: model.norm_out,
    "the projection": lambda model: getattr(model, "proj_out", None) or model.proj_out_2,
    "what modulates it": lambda model: getattr(model, "adaln_single", None) or model.proj_out_1,
}


@pytest.mark.parametrize("what", SEEN)
@pytest.mark.parametrize("name", ["pixart-sigma", "dit"])
def test_a_hook_at_an_output_that_its_model_modulates_is_honoured(name, what):
    """Their forwards modulate between the norm and the projection, in whose place one op stands."""
    pipe = tiny_models.pipeline(name, torch.float64)

    def louder(module, args, output):
        return tuple(part * 1.5 for part in output) if isinstance(output, tuple) else output * 1.5

    plain = generate(pipe, name, steps=STEPS, cfg=False)
    fastdit.patch(pipe)
    assert distance(generate(pipe, name, steps=STEPS, cfg=False), plain) <= FORWARD_FP64
    hook = SEEN[what](pipe.transformer).register_forward_hook(louder)
    found = generate(pipe, name, steps=STEPS, cfg=False)
    fastdit.unpatch(pipe)
    expected = generate(pipe, name, steps=STEPS, cfg=False)
    assert distance(expected, plain) > 1e-4
    assert distance(found, expected) <= FORWARD_FP64
    hook.remove()


@pytest.mark.parametrize("name", ["pixart-sigma", "dit"])
@torch.no_grad()
def test_a_projection_that_was_replaced_after_patching(name):
    """It is another's module, which is given what stock gives it."""
    model = tiny_models.transformer(name, torch.float64)
    call = tiny_models.call(name, 2, dtype=torch.float64)
    path = tiny_models.adapter_of(name).modulated_output[1]
    old = getattr(model, path)
    new = tiny_models.randomise(torch.nn.Linear(old.in_features, old.out_features), 7).double()
    setattr(model, path, new)
    expected = sample(model(**call))
    setattr(model, path, old)
    handle = fastdit.patch(model)
    setattr(model, path, new)
    with handle.run(call["timestep"][:1]):
        assert distance(sample(model(**call)), expected) <= FORWARD_FP64


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("pixart-sigma", "proj_out"),
        ("pixart-sigma", "adaln_single.linear"),
        ("dit", "proj_out_2"),
        ("dit", "proj_out_1"),
        ("dit", "norm1.emb.timestep_embedder.linear_1"),
        ("lumina", "norm_out.linear_2"),
        ("lumina", "norm_out.linear_1"),
        ("lumina", "time_caption_embed.caption_embedder.1"),
        ("lumina", "norm1.linear"),
        ("lumina2", "norm_out.linear_1"),
        ("pixart-sigma", "attn2.to_k"),
        ("lumina", "attn2.to_v"),
    ],
)
def test_an_adapter_that_came_after_patching(name, target):
    """And whose scale changes between the steps."""
    peft = pytest.importorskip("peft")
    model = tiny_models.transformer(name, torch.float64)
    settings = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=[target])
    calls = [tiny_models.call(name, 2, dtype=torch.float64) for _ in range(3)]
    first = calls[0]["timestep"]
    said = torch.stack([first[0], first[0] / 2, first[0] / 4]).to(first.dtype)
    for call, value in zip(calls, said, strict=True):
        call |= {k: v for k, v in calls[0].items() if k != "hidden_states"}
        call["timestep"] = value.expand(2)

    def drawn(advance):
        with torch.no_grad():
            for number, call in enumerate(calls):
                for part in model.modules():
                    if hasattr(part, "base_layer"):
                        part.set_scale("default", 0.5**number)
                yield sample(model(**call))
                advance()

    handle = fastdit.patch(model)
    peft.inject_adapter_in_model(settings, model)
    with handle.run(said):
        found = list(drawn(handle.advance))
    handle.unpatch()
    for each, wanted in zip(found, drawn(lambda: None), strict=True):
        assert distance(each, wanted) <= FORWARD_FP64
