"""HunyuanVideo-1.5: texts of three kinds, masked anywhere; guiders of any number of conditions; images, mean flows."""

from __future__ import annotations

import functools

import pytest
import torch
from diffusers import (
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    SkipLayerGuidance,
)
from diffusers.guiders.guider_utils import GuiderOutput
from diffusers.hooks import LayerSkipConfig
from diffusers.models.transformers.transformer_hunyuan_video15 import (
    HunyuanVideo15AttnProcessor2_0 as Processor,
)
from PIL import Image

import fastdit
import replays
import tiny_models
from contract import FORWARD_FP64, RUN_FP64, distance, same_bits, within_contract
from fastdit import RAS, ArgumentError, Cached, Dense, Schedule, UnsupportedModelError
from oracle import Oracle, random_bits
from replays import tapes  # noqa: F401

pytestmark = pytest.mark.diffusers

NAME = "hunyuanvideo15"
STEPS = 5


def model_of(dtype=torch.float64, **more):
    """A model whose patches are one latent pixel, as the published ones'."""
    made = tiny_models.hunyuanvideo15(**{"patch_size": 1, "num_refiner_layers": 2} | more)
    return tiny_models.randomise(made).to(dtype)


#: which tokens of the text and of the glyphs count, of three prompts
MASKS = {
    "all": ([[1] * 5] * 3, [[1] * 3] * 3),
    "no glyphs": ([[1] * 5] * 3, [[0] * 3] * 3),
    "as long": ([[0, 1, 1, 0, 1]] * 3, [[0, 0, 1]] * 3),
    "unlike": (
        [[1, 1, 0, 0, 0], [0, 0, 1, 1, 1], [1, 0, 1, 0, 1]],
        [[0, 0, 0], [1, 1, 1], [0, 1, 0]],
    ),
}


def calls(masks="unlike", image=True, dtype=torch.float64, steps=STEPS, **more):
    """The calls of a run of three videos of three frames each."""
    draw = torch.Generator().manual_seed(3)

    def randn(*shape):
        return torch.randn(3, *shape, generator=draw, dtype=torch.float64).to(dtype)

    text, glyphs = (torch.tensor(mask, dtype=dtype) for mask in MASKS[masks])
    prompt = {
        "encoder_hidden_states": randn(5, 20),
        "encoder_attention_mask": text,
        "encoder_hidden_states_2": randn(3, 12),
        "encoder_attention_mask_2": glyphs,
        "image_embeds": randn(2, 12) * image,
        "return_dict": False,
    }
    for step in range(steps):
        time = torch.full((3,), 900.0 - 100 * step, dtype=dtype)
        yield {"hidden_states": randn(9, 3, 4, 6), "timestep": time} | prompt | more


@torch.no_grad()
def run(model, given):
    return [model(**one)[0] for one in given]


def runs(model, given, *methods, backend):
    handle = fastdit.patch(model, *methods, backend=backend)
    with handle.run(range(len(given))):
        found = run(model, given)
    handle.unpatch()
    return found


@pytest.mark.parametrize("image", [True, False], ids=["image", "no image"])
@pytest.mark.parametrize("masks", MASKS)
def test_texts_are_masked_anywhere(masks, image):
    model, given = model_of(), list(calls(masks, image))
    dense = run(model, given)
    bits, names = random_bits(model, STEPS, 2)
    with Oracle(model, bits).installed():
        cached = run(model, given)
    schedule = Cached(Schedule.from_bits(bits, names))
    for methods, expected in (((), dense), ((schedule,), cached)):
        for found, wanted in zip(
            runs(model, given, *methods, backend="reference"), expected, strict=True
        ):
            same_bits(found, wanted)
        for _ in range(2):
            for found, wanted in zip(
                runs(model, given, *methods, backend=None), expected, strict=True
            ):
                within_contract(found, wanted, bound=FORWARD_FP64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_left_out_errs_at_most_twice_as_much_as_stock(dtype):
    model = model_of(dtype)
    given = list(calls(dtype=dtype))
    stock, found = run(model, given), runs(model, given, backend=None)
    doubles = [
        {k: v.double() if torch.is_tensor(v) else v for k, v in one.items()} for one in given
    ]
    truth = run(model.double(), doubles)
    within_contract(torch.cat(found), torch.cat(stock), torch.cat(truth))


@pytest.mark.parametrize(
    ("masks", "image", "text"),
    [("all", True, 10), ("no glyphs", False, 5), ("as long", True, 6), ("unlike", True, 8)],
)
def test_blocks_are_given_the_text_that_counts(masks, image, text, monkeypatch):
    """And no mask where all prompts have as much of it."""
    seen = []
    stock = Processor.__call__

    @functools.wraps(stock)
    def looked(self, attn, hidden_states, encoder_hidden_states=None, **more):
        seen.append((encoder_hidden_states.shape[1], bool(more["attention_mask"].all())))
        return stock(self, attn, hidden_states, encoder_hidden_states, **more)

    monkeypatch.setattr(Processor, "__call__", looked)
    model = model_of()
    runs(model, list(calls(masks, image, steps=1)), backend=None)
    assert set(seen[-3:]) == {(text, masks != "unlike")}


def test_what_sees_the_prompt_alone_runs_once_in_a_run(monkeypatch):
    model, seen = model_of(), []
    for name in ("context_embedder_2", "image_embedder"):
        cls = type(getattr(model, name))

        def forward(self, x, cls=cls, stock=cls.forward):
            seen.append(cls)
            return stock(self, x)

        monkeypatch.setattr(cls, "forward", functools.wraps(cls.forward)(forward))
    runs(model, list(calls()), backend=None)
    seen.clear()
    runs(model, list(calls()), backend=None)
    assert len(seen) == 2


def test_a_cap_on_the_caches_counts_what_is_kept_of_glyphs_and_image():
    model, given = model_of(torch.float32), list(calls("all", dtype=torch.float32))
    schedule = Schedule.every(2)

    def runs_within(most):
        handle = fastdit.patch(model, Cached(schedule, max_cache_bytes=most))
        with handle.run(range(STEPS)):
            run(model, given)
        return handle.report().peak_cache_bytes

    needed = runs_within(None)
    assert runs_within(needed) == needed
    with pytest.raises(ArgumentError, match=f"need {needed} bytes"):
        runs_within(needed - 1)


def test_another_mask_drops_what_was_kept():
    model = model_of()
    first, *_, second = calls("all", steps=3)
    shorter = second | {"encoder_attention_mask": second["encoder_attention_mask"].clone()}
    shorter["encoder_attention_mask"][:, 2:] = 0
    expected = run(model, [first, shorter])
    assert distance(run(model, [second])[0], expected[1]) > 0.01
    for found, wanted in zip(
        runs(model, [first, shorter], Cached(Schedule.every(2)), backend=None),
        expected,
        strict=True,
    ):
        assert distance(found, wanted) <= FORWARD_FP64


@torch.no_grad()
@pytest.mark.parametrize("backend", ["reference", None])
def test_somebody_begins_to_look_in_a_run(backend):
    """From then on the model's own forward runs, with the padding, for which nothing is kept; it always did for one."""
    model, given = model_of(), list(calls())
    bits, names = random_bits(model, STEPS, 4)
    expected, seen = [], []
    with Oracle(model, bits).installed() as oracle:
        for step, one in enumerate(given):
            if step == 2 and backend is None:
                oracle.drop()
            expected.append(model(**one)[0])
    handle = fastdit.patch(model, Cached(Schedule.from_bits(bits, names)), backend=backend)
    with handle.run(range(STEPS)):
        for step, one in enumerate(given):
            if step == 2:
                model.transformer_blocks[1].register_forward_hook(lambda *_: seen.append(1))
            assert distance(model(**one)[0], expected[step]) <= FORWARD_FP64
    assert len(seen) == STEPS - 2


@pytest.mark.parametrize("backend", ["reference", None])
def test_mean_flows_are_told_a_second_timestep(backend):
    model = model_of(use_meanflow=True)
    given = [
        one | {"timestep_r": one["timestep"] - 50 - 10 * step} for step, one in enumerate(calls())
    ]
    bits, names = random_bits(model, STEPS, 5)
    with Oracle(model, bits).installed():
        expected = run(model, given)
    again = [one | {"timestep_r": one["timestep"]} for one in given]
    assert distance(run(model, again)[3], run(model, given)[3]) > 0.01
    schedule = Cached(Schedule.from_bits(bits, names))
    for found, wanted in zip(runs(model, given, schedule, backend=backend), expected, strict=True):
        within_contract(found, wanted, bound=FORWARD_FP64)


# ---- pipelines


class Thrice(ClassifierFreeGuidance):
    """A third condition of the same prompt, with two of them at every third step."""

    _input_predictions = ["pred_cond", "pred_uncond", "pred_third"]

    def prepare_inputs(self, data):
        told = [(0, "pred_cond"), (1, "pred_uncond"), (0, "pred_third")]
        return [self._prepare_batch(data, *each) for each in told[: self.num_conditions]]

    @property
    def num_conditions(self):
        return 2 if self._step is not None and self._step % 3 == 1 else 3

    def forward(self, pred_cond, pred_uncond, pred_third=None):
        third = pred_cond if pred_third is None else pred_third
        return GuiderOutput(
            pred=2 * pred_cond - pred_uncond + 0.5 * (third - pred_cond),
            pred_cond=pred_cond,
            pred_uncond=pred_uncond,
        )


def skips():
    """Conditions of a prompt without a feed-forward of the second block: its hooks are there for a call of a step."""
    config = LayerSkipConfig([1], fqn="transformer_blocks", skip_attention=False)
    return SkipLayerGuidance(
        3.0,
        skip_layer_guidance_start=0.0,
        skip_layer_guidance_stop=0.7,
        skip_layer_config=config,
        start=0.0,
        stop=0.5,
    )


GUIDERS = {
    "one": lambda: ClassifierFreeGuidance(1.0),
    "disabled": lambda: ClassifierFreeGuidance(4.0, enabled=False),
    "two": lambda: ClassifierFreeGuidance(4.0),
    "two of some steps": lambda: ClassifierFreeGuidance(4.0, start=0.3, stop=0.8),
    "three": Thrice,
    "layers left out": skips,
}


def pipeline(guider="two", dtype=torch.float64, cls=HunyuanVideo15Pipeline, **more):
    pipe = cls(
        text_encoder=None,
        tokenizer=None,
        transformer=model_of(dtype),
        vae=tiny_models.hunyuanvideo15_vae().to(dtype),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder_2=None,
        tokenizer_2=None,
        guider=GUIDERS[guider](),
        **more,
    )
    pipe.vision_num_semantic_tokens = 2
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, batch=2, seed=0, **more):
    """The latents of a run of three frames that are no square."""
    given = tiny_models.arguments(NAME, batch, STEPS, seed, dtype=pipe.transformer.dtype)
    for name in ("guidance_scale", "num_images_per_prompt"):
        given.pop(name)
    return pipe(**given | {"height": 4, "width": 6, "num_frames": 3} | more).frames


@pytest.mark.parametrize("guider", GUIDERS)
def test_guiders_keep_their_bits(guider):
    expected = draw(pipeline(guider))
    pipe = pipeline(guider)
    fastdit.patch(pipe, backend="reference")
    same_bits(draw(pipe), expected)
    pipe = pipeline(guider)
    fastdit.patch(pipe)
    for _ in range(2):
        within_contract(draw(pipe), expected)


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize(("guider", "count"), [("one", 1), ("two", 2)])
def test_each_condition_has_caches_of_its_own(guider, count, backend):
    pipe = pipeline(guider)
    bits, names = random_bits(pipe.transformer, STEPS, 0)
    with Oracle(pipe.transformer, bits, count).installed():
        expected = draw(pipe)
    fastdit.patch(pipe, Cached(Schedule.from_bits(bits, names)), backend=backend)
    assert distance(draw(pipe), expected) <= RUN_FP64


class Conditions(Oracle):
    """The plain cache where some steps have a condition less, the last one."""

    def _count(self, module, args):
        super()._count(module, args)
        step, branch = divmod(self._calls, self._calls_per_step)
        if branch == 2 and step % 3 == 1:
            self._calls += 1


@pytest.mark.parametrize("backend", ["reference", None])
def test_a_third_condition_has_them_too(backend):
    pipe = pipeline("three")
    bits, names = random_bits(pipe.transformer, STEPS, 1)
    bits["transformer_blocks"][1::3] = (
        False  # else what the third one lacks there it computes later
    )
    with Conditions(pipe.transformer, bits, 3).installed():
        expected = draw(pipe)
    fastdit.patch(pipe, Cached(Schedule.from_bits(bits, names)), backend=backend)
    assert distance(draw(pipe), expected) <= RUN_FP64


@pytest.mark.parametrize("method", [Dense(), Cached(Schedule.every(2)), RAS(align=1, start=1)])
def test_an_interrupted_run_gives_what_it_has(method):
    """It has no callbacks: whoever shows its progress says that it is to stop."""
    pipe = pipeline()
    handle = fastdit.patch(pipe, method)
    whole, held = draw(pipe), []

    class Bar:
        def __init__(self, *_, **__):
            self.count = 0

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self):
            self.count += 1
            pipe._interrupt = self.count == 3
            held.append(handle.cache_bytes())

    pipe.progress_bar = Bar
    assert distance(draw(pipe), whole) > 0.01
    assert handle.report().steps == 3
    assert held[-1] == 0
    del pipe.progress_bar
    same_bits(draw(pipe), whole)


@pytest.mark.parametrize("meanflow", [False, True])
@pytest.mark.parametrize("backend", ["reference", None])
def test_images_become_videos(meanflow, backend):
    pipe = pipeline(
        cls=HunyuanVideo15ImageToVideoPipeline, image_encoder=None, feature_extractor=None
    )
    if meanflow:
        pipe.register_modules(transformer=model_of(use_meanflow=True))
    seen = torch.randn(2, 2, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pipe.encode_image = lambda **_: seen
    pipe.video_processor.calculate_default_height_width = lambda **_: (4, 6)
    picture = Image.effect_noise((6, 4), 90).convert("RGB")

    def drawn():
        given = tiny_models.arguments(NAME, 2, STEPS, dtype=torch.float64)
        for name in ("guidance_scale", "num_images_per_prompt", "height", "width"):
            given.pop(name)
        return pipe(picture, num_frames=3, **given).frames

    bits, names = random_bits(pipe.transformer, STEPS, 6)
    expected = [drawn()]
    with Oracle(pipe.transformer, bits, 2).installed():
        expected.append(drawn())
    for methods, wanted in zip(
        ((), (Cached(Schedule.from_bits(bits, names)),)), expected, strict=True
    ):
        handle = fastdit.patch(pipe, *methods, backend=backend)
        assert distance(drawn(), wanted) <= RUN_FP64
        handle.unpatch()


@pytest.mark.parametrize("method", ["dense", "cached", "forecast", "ras + cached"])
def test_runs_are_replayed(method, tapes):  # noqa: F811
    """Each prompt with as many tokens: another number is another graph."""
    pipe = tiny_models.pipeline(NAME)
    fastdit.patch(pipe, *replays.METHODS[method](pipe))
    expected = [replays.draw(NAME, pipe, seed) for seed in range(4)]
    handle = fastdit.patch(pipe, *replays.METHODS[method](pipe), graphs=True)
    for seed in range(4):
        same_bits(replays.draw(NAME, pipe, seed), expected[seed])
    trace = handle.last_run().trace
    assert trace.replayed == trace.calls - 2 > 0, str(trace)


def test_a_part_of_the_tokens_lies_anywhere_in_the_clip():
    pipe = pipeline()
    handle = fastdit.patch(pipe, RAS(ratio=0.5, start=2, align=1, resets=()))
    draw(pipe)
    report = handle.report()
    assert report.tokens_per_step == (72, 72, 36, 36, 36)
    assert {mask.shape for mask in report.active.values()} == {(2, 3 * 4, 6)}
    assert report.token_map(scale=1).shape == (STEPS, 3 * 4, 6, 3)


def test_patches_of_several_frames_are_refused_where_tokens_are_left_out():
    model = model_of(patch_size_t=2)
    fastdit.patch(model, Cached(Schedule.every(2)))
    with pytest.raises(UnsupportedModelError, match="patches of 2 frames"):
        fastdit.patch(model, RAS())
