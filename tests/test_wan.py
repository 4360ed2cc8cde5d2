"""Wan's own forms: fp32 within other dtypes, timesteps of tokens, images beside the prompt, and two transformers."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
)

import fastdit
import tiny_models
from contract import FORWARD_FP64, RUN_FP64, distance, same_bits, within_contract
from denoisers import ENTRIES
from fastdit import RAS, ArgumentError, Cached, FastDiTError, Schedule, UnsupportedModelError
from fastdit.patch import handle_of
from oracle import Oracle, random_bits
from ras_oracle import RowOracle, random_rows
from snapshot import scheduler_snapshot, snapshot
from test_ras import TOKENS, Chosen, chosen  # noqa: F401
from tiny_models import generate

pytestmark = pytest.mark.diffusers
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
STEPS = 4
PARTS = ("attn1", "attn2", "ffn")


@pytest.fixture
def exact():
    """In fp64 nothing is rounded to fp32."""
    with tiny_models.fp64_throughout():
        yield


def model(dtype=torch.float32, seed=0, **config):
    return tiny_models.randomise(tiny_models.wan(**config), seed).to(dtype)


def published(dtype):
    """As `from_pretrained` loads it: parts stay fp32."""
    made = model(dtype)
    for name, part in made.named_modules():
        if any(kept in name for kept in made._keep_in_fp32_modules):
            part.float()
    for owner in (made, *made.blocks):
        owner.scale_shift_table.data = owner.scale_shift_table.data.float()
    return made


def calls(dtype, of_tokens=False, steps=STEPS, **more):
    """Two videos; with `of_tokens` each token has a timestep, at first 0, as a frame that is given has."""
    for step in range(steps):
        given = tiny_models.call("wan", 2, dtype, step=step, **more)
        if of_tokens:
            ramp = torch.linspace(0, 1, TOKENS)
            given["timestep"] = given["timestep"].float()[:, None] * ramp
        yield given


def run(made, given):
    with torch.no_grad():
        return [made(**one)[0] for one in given]


def both(made, given, **more):
    """A random schedule by the oracle and patched."""
    bits, names = random_bits(made, STEPS, 2)
    with Oracle(made, bits).installed():
        expected = run(made, given)
    handle = fastdit.patch(made, Cached(Schedule.from_bits(bits, names)), **more)
    with handle.run(range(STEPS)):
        found = []
        for one in given:
            found += run(made, [one])
            handle.advance()
    handle.unpatch()
    return found, expected


@pytest.mark.parametrize("of_tokens", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", [{}, {"cross_attn_norm": False}, {"patch_size": (2, 2, 2)}])
def test_its_own_bits_in_every_dtype(config, dtype, of_tokens):
    """Also in fp64, where it rounds the stream to fp32 at each norm and gated sum."""
    made, given = model(dtype, **config), list(calls(dtype, of_tokens))
    if "patch_size" in config:
        given = [one | {"timestep": one["timestep"][..., :16]} for one in given]
    stock = run(made, given)
    fastdit.patch(made, backend="reference")
    for found, expected in zip(run(made, given), stock, strict=True):
        same_bits(found, expected)
    for found, expected in zip(*both(made, given, backend="reference"), strict=True):
        same_bits(found, expected)


@pytest.mark.parametrize("of_tokens", [False, True])
def test_in_fp64_the_fast_path_is_nearer_to_the_truth_than_stock(of_tokens):
    made, given = model(torch.float64), list(calls(torch.float64, of_tokens))
    stock = torch.cat(run(made, given))
    with tiny_models.fp64_throughout():
        truth = torch.cat(run(made, given))
    assert distance(stock, truth) > 1e-8
    fastdit.patch(made)
    assert distance(torch.cat(run(made, given)), truth) < distance(stock, truth)


@pytest.mark.parametrize("of_tokens", [False, True])
def test_a_schedule_is_exact_where_each_token_has_its_timestep(of_tokens, exact):
    for found, expected in zip(
        *both(model(torch.float64), list(calls(torch.float64, of_tokens))), strict=True
    ):
        within_contract(found, expected, bound=FORWARD_FP64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_parts_that_stay_fp32_in_a_loaded_model(dtype):
    made, given = published(dtype), list(calls(dtype))
    stock = run(made, given)
    fastdit.patch(made, backend="reference")
    for found, expected in zip(run(made, given), stock, strict=True):
        same_bits(found, expected)
    truth_model = published(dtype).double()
    with tiny_models.fp64_throughout():
        truth = run(truth_model, [as_double(one) for one in given])
    handle = fastdit.patch(made)
    with handle.run(given[0]["timestep"][:1].new_tensor([900.0, 750.0, 600.0, 450.0])):
        found = run(made, given)
    within_contract(torch.cat(found), torch.cat(stock), torch.cat(truth))
    assert handle.last_run().programs > 0


@pytest.mark.parametrize("of_tokens", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_modulations_are_not_rounded(dtype, of_tokens):
    """Scales near -1 leave what 16 bits of them do not hold, and large gates make it weigh."""
    made = published(dtype)
    for name, parameter in made.named_parameters():
        if "time_proj" in name or (name.endswith("bias") and ("attn1" in name or "ffn" in name)):
            parameter.data.zero_()
    for block in made.blocks:
        table = block.scale_shift_table.data.zero_()
        table[:, 1::3] = 2.0**-7 * torch.randn(1, 2, table.shape[-1]) - 1
        table[:, 2::3] = 64.0
    given = list(calls(dtype, of_tokens, steps=1))
    stock = run(made, given)
    with tiny_models.fp64_throughout():
        truth = run(copy.deepcopy(made).double(), [as_double(one) for one in given])
    fastdit.patch(made)
    within_contract(*map(torch.cat, (run(made, given), stock, truth)))


def as_double(given):
    return {
        name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in given.items()
    }


def test_what_stays_fp32_may_be_said_in_one_word(monkeypatch):
    """diffusers takes the model for fp32 then."""
    made = published(torch.float16)
    monkeypatch.setattr(type(made), "_keep_in_fp32_modules", "scale_shift_table")
    if made.dtype is not torch.float32:
        pytest.skip("this diffusers takes it for what it is")
    stock = run(made, list(calls(torch.float16)))
    fastdit.patch(made, backend="reference")
    for found, expected in zip(run(made, list(calls(torch.float16))), stock, strict=True):
        same_bits(found, expected)


def test_reused_outputs_are_kept_as_three_sums(exact):
    """The gates of all blocks differ by constants, and the cross-attention has none."""
    made, given = model(torch.float64, layers=6), list(calls(torch.float64, steps=8))
    bits = {"blocks": torch.zeros(8, 6, 3).bool().numpy()}
    bits["blocks"][::4] = True
    with Oracle(made, bits).installed():
        expected = run(made, given)
    handle = fastdit.patch(made, Cached(Schedule.from_bits(bits, {"blocks": PARTS})))
    with handle.run(range(8)):
        for found, wanted in zip(run(made, given), expected, strict=True):
            within_contract(found, wanted, bound=FORWARD_FP64)
    said = handle.explain(steps=8, height=64, width=128, batch=2, cfg=False, text_tokens=5)
    assert said.collapse == "2 times 18 outputs are kept as 3 sums"
    assert said.cache_bytes == handle.report().peak_cache_bytes


# ---- a part of the tokens


def test_all_tokens_in_another_order(chosen, exact):  # noqa: F811
    """Rows, layouts and positions are over (frame, row, column)."""
    pipe = tiny_models.pipeline("wan", torch.float64)
    given = {"batch": 2, "steps": 5, "num_frames": 3, "height": 8, "width": 6}
    tokens = 4 * 2 * 3
    stock = generate(pipe, "wan", **given)
    assert stock.shape == (2, 4, 4, 4, 6)

    def permuted(step, velocity, sigmas):
        draw = torch.Generator().manual_seed(step)
        return torch.stack([torch.randperm(tokens, generator=draw) for _ in range(2)])

    handle = fastdit.patch(pipe, Chosen(permuted, dict.fromkeys(range(1, 5), tokens)))
    within_contract(generate(pipe, "wan", **given), stock)
    assert handle.report().active[2].shape == (2, tokens // 3, 3)
    assert handle.report().active[2].all()


def test_patches_of_several_frames_compute_no_part_of_the_tokens():
    transformer = model(torch.float64, patch_size=(2, 2, 2))
    with pytest.raises(UnsupportedModelError, match="has patches of 2 frames"):
        fastdit.patch(transformer, fastdit.RAS())


@pytest.mark.parametrize("shown", [True, False], ids=["all alike", "a ramp"])
def test_active_tokens_have_their_own_timesteps(shown, chosen, exact):  # noqa: F811
    """TI2V-5B: in another order, and where they are all alike as by one timestep."""
    pipe = tiny_models.pipeline("wan", torch.float64)
    alike = generate(pipe, "wan", batch=2, steps=5)
    pipe.register_to_config(expand_timesteps=True)
    if not shown:
        pipe.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: (
                args,
                kwargs | {"timestep": kwargs["timestep"] * torch.linspace(0, 1, TOKENS)},
            ),
            with_kwargs=True,
        )
    stock = generate(pipe, "wan", batch=2, steps=5)
    assert (distance(stock, alike) <= RUN_FP64) is shown

    def permuted(step, velocity, sigmas):
        draw = torch.Generator().manual_seed(step)
        return torch.stack([torch.randperm(TOKENS, generator=draw) for _ in range(2)])

    handle = fastdit.patch(pipe, Chosen(permuted, dict.fromkeys(range(1, 5), TOKENS)))
    within_contract(generate(pipe, "wan", batch=2, steps=5), stock)
    assert len(handle.report().active) == 4


def test_a_run_by_timesteps_of_tokens_takes_steps_apart_by_the_last_token():
    """The first tokens' are 0 at every step."""
    made, given = model(), list(calls(torch.float32, of_tokens=True))
    handle = fastdit.patch(made, Cached(Schedule.every(2)))
    with handle.run(range(STEPS)):
        run(made, given)
    assert handle.report().steps == STEPS


# ---- pipelines


@pytest.mark.parametrize("size", [(8, 12), (12, 4)])
def test_the_usual_sampler_and_other_sizes(size):
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    pipe = tiny_models.pipeline("wan", scheduler=UniPCMultistepScheduler(**flow))
    given = {"steps": 6, "batch": 2, "height": size[0], "width": size[1], "num_frames": 4}
    stock = generate(pipe, "wan", **given)
    fastdit.patch(pipe, backend="reference")
    same_bits(generate(pipe, "wan", **given), stock)
    for name in ("reference", None):
        handle = fastdit.patch(pipe, RAS(start=2, align=1), Cached(Schedule.every(2)), backend=name)
        generate(pipe, "wan", **given)
        assert handle.report().active


IMAGES = {
    "2.1": {"in_channels": 9, "image_dim": 12, "added_kv_proj_dim": 32},
    "2.2": {"in_channels": 9},
    "TI2V-5B": {},
}


def image_to_video(form, dtype=torch.float32):
    """The autoencoder keeps the size, and the pipeline knows it."""
    parts = dict(tiny_models.wan_vae().config) | {"scale_factor_spatial": 1}
    names = AutoencoderKLWan.__init__.__wrapped__.__code__.co_varnames
    vae = AutoencoderKLWan(**{name: value for name, value in parts.items() if name in names})
    pipe = WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=tiny_models.randomise(vae, 1).to(dtype),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=model(dtype, **IMAGES[form]),
        expand_timesteps=form == "TI2V-5B",
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def animate(pipe, dtype=torch.float32, **more):
    draw = torch.Generator().manual_seed(5)

    def randn(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

    embedded = randn(1, 6, 12)
    pipe.encode_image = lambda image, device: embedded
    given = {
        "image": randn(1, 3, 16, 16).sigmoid(),
        "prompt_embeds": randn(2, 512, 20),
        "negative_prompt_embeds": randn(2, 512, 20),
        "height": 16,
        "width": 16,
        "num_frames": 4,
        "num_inference_steps": STEPS,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(1),
    }
    return pipe(**given | more).frames


@pytest.mark.parametrize("form", IMAGES)
def test_images_become_videos(form, exact):
    pipe = image_to_video(form)
    stock = animate(pipe)
    fastdit.patch(pipe, backend="reference")
    same_bits(animate(pipe), stock)
    fastdit.unpatch(pipe)
    pipe = image_to_video(form, torch.float64)
    bits, names = random_bits(pipe.transformer, STEPS, 4)
    with Oracle(pipe.transformer, bits, calls_per_step=2).installed():
        expected = animate(pipe, torch.float64)
    handle = fastdit.patch(pipe, Cached(Schedule.from_bits(bits, names)))
    within_contract(animate(pipe, torch.float64), expected)
    said = handle.explain(height=16, width=16, frames=5, batch=2, text_tokens=512, steps=STEPS)
    assert said.image_tokens == handle.report().tokens_per_step[0] == 5 * 64


@pytest.mark.parametrize("form", IMAGES)
def test_all_tokens_of_such_a_video_in_another_order(form, chosen, exact):  # noqa: F811
    """The latents have more channels than the velocity, or tokens of the image a timestep of 0."""
    pipe = image_to_video(form, torch.float64)
    stock = animate(pipe, torch.float64)

    def permuted(step, velocity, sigmas):
        draw = torch.Generator().manual_seed(step)
        return torch.stack([torch.randperm(320, generator=draw) for _ in range(2)])

    fastdit.patch(pipe, Chosen(permuted, dict.fromkeys(range(1, STEPS), 320)))
    within_contract(animate(pipe, torch.float64), stock)


def test_keys_of_the_image_are_made_once_a_run():
    pipe = image_to_video("2.1")
    made = []
    for name in ("add_k_proj", "add_v_proj", "to_k"):
        layer = getattr(pipe.transformer.blocks[1].attn2, name)

        class Counting(type(layer)):
            def forward(self, x, name=name):
                made.append(name)
                return super().forward(x)

        layer.__class__ = Counting
    fastdit.patch(pipe)
    made.clear()  # what the drift guard ran
    animate(pipe)
    assert sorted(made) == ["add_k_proj", "add_k_proj", "add_v_proj", "add_v_proj", "to_k", "to_k"]


def test_a_first_and_a_last_image_in_one_row():
    config = {"image_dim": 12, "added_kv_proj_dim": 32, "pos_embed_seq_len": 6}
    made = model(**config)
    image = torch.randn(4, 3, 12, generator=torch.Generator().manual_seed(3))
    given = [one | {"encoder_hidden_states_image": image} for one in calls(torch.float32, text=512)]
    for found, expected in zip(*both(made, given, backend="reference"), strict=True):
        same_bits(found, expected)
    assert fastdit.patch(made).explain(height=64, width=64).macs > 0


# ---- two transformers

BOUNDARY = 3  # steps of eight that the first one does


def two(dtype=torch.float32, cls=None, **more):
    """Wan 2.2."""
    pipe = tiny_models.pipeline("wan", dtype)
    parts = [model(dtype, seed) for seed in (0, 1)] if cls is None else [cls(0), cls(1)]
    made = WanPipeline(
        **pipe.components | {"transformer": parts[0], "transformer_2": parts[1]} | more,
        boundary_ratio=0.7,
    )
    made.set_progress_bar_config(disable=True)
    return made


def drawn(pipe, **more):
    return generate(pipe, "wan", **{"steps": 8, "batch": 2} | more)


def state(pipe):
    parts = snapshot(pipe.transformer), snapshot(pipe.transformer_2)
    return *parts, scheduler_snapshot(pipe.scheduler), set(pipe.__dict__)


@pytest.mark.parametrize("cfg", [True, False])
@pytest.mark.parametrize("backend", ["reference", None])
def test_both_transformers_run_by_the_pipelines_steps(backend, cfg, exact):
    dtype = torch.float32 if backend else torch.float64
    pipe = two(dtype)
    bits, names = random_bits(pipe.transformer, 8, 3)
    each = {"calls_per_step": 1 + cfg}
    with (
        Oracle(pipe.transformer, bits, **each).installed() as first,
        Oracle(pipe.transformer_2, bits, **each, first=BOUNDARY).installed() as second,
    ):
        expected = drawn(pipe, cfg=cfg)
    assert min(first.reused, second.reused) > 0
    before = state(pipe)
    handle = fastdit.patch(pipe, Cached(Schedule.from_bits(bits, names)), backend=backend)
    for _ in range(2):
        found = drawn(pipe, cfg=cfg)
        if backend:
            same_bits(found, expected)
        else:
            within_contract(found, expected)
        report = handle.report()
        assert report.steps == 8
        assert report.computed == first.computed + second.computed
        assert report.reused == first.reused + second.reused
    handle.unpatch()
    assert state(pipe) == before


def test_the_prediction_is_of_both_and_what_is_held_is_of_one(exact):
    pipe = two()
    handle = fastdit.patch(pipe, Cached(Schedule.every(3)))
    held = []

    def look(pipe, step, timestep, tensors):
        held.append(
            [handle_of(part).cache_bytes() for part in (pipe.transformer, pipe.transformer_2)]
        )
        return tensors

    drawn(pipe, callback_on_step_end=look)
    for step, (first, second) in enumerate(held[:-1]):
        assert (first > 0) is (step < BOUNDARY)
        assert (second > 0) is (step >= BOUNDARY)
    report = handle.report()
    said = handle.explain(
        batch=2, steps=8, text_tokens=tiny_models.TEXT, **tiny_models.asked("wan")
    )
    assert said.turns == (BOUNDARY, 8 - BOUNDARY)
    assert "turns     3, then 5 steps" in str(said)
    assert said.steps == report.steps == 8
    assert said.reuse_share == pytest.approx(report.reuse_share)
    assert said.flop_speedup == pytest.approx(report.flop_speedup)
    assert said.cache_bytes == report.peak_cache_bytes == max(map(sum, held))
    assert [line.split()[-1] for line in said.raster.splitlines()] == ["█··█··█·"] * 3
    assert handle.last_run() is handle_of(pipe.transformer_2).last_run()
    one = fastdit.patch(pipe.transformer, Cached(Schedule.every(3)))
    assert one.explain(batch=2, steps=8, text_tokens=5, height=32, width=128).turns == ()


def test_active_tokens_of_both(chosen, exact):  # noqa: F811
    """Each begins with dense steps of its own, and counts from there."""
    pipe = two(torch.float64)
    counts = {1: 16, 2: 20, 4: 8}
    rows = random_rows(counts, TOKENS, 2)

    def of_first(step, velocity, sigmas):
        return rows(step, velocity, sigmas) if step + 1 < BOUNDARY else None

    def of_second(step, velocity, sigmas):
        return rows(step - BOUNDARY, velocity, sigmas) if step >= BOUNDARY else None

    second = copy.copy(pipe)
    second.transformer = pipe.transformer_2
    with (
        RowOracle(pipe, of_first, calls_per_step=2).installed(),
        RowOracle(second, of_second, calls_per_step=2).installed(),
    ):
        expected = drawn(pipe)
    handle = fastdit.patch(pipe, Chosen(rows, counts))
    within_contract(drawn(pipe), expected)
    assert handle.report().tokens_per_step == (32, 16, 20, 32, 16, 20, 32, 8)
    assert sorted(handle.report().active) == [1, 2, 4, 5, 7]


def test_what_is_watched_is_one_picture_a_step():
    pipe = two()
    handle = fastdit.patch(pipe, RAS(start=1, align=1, resets=()))
    with handle.watch() as frames:
        drawn(pipe)
    assert len(frames.latents) == 8
    assert handle.report().token_map(frames.pictures(1), sample=1).shape[0] == 8
    with handle.disabled():
        stock = drawn(pipe)
    handle.unpatch()
    same_bits(drawn(pipe), stock)


def test_a_loop_by_hand_over_both():
    pipe = two()
    given = list(calls(torch.float32, steps=6))
    parts = [pipe.transformer] * 3 + [pipe.transformer_2] * 3
    bits, names = random_bits(pipe.transformer, 6, 1)
    with (
        Oracle(pipe.transformer, bits).installed(),
        Oracle(pipe.transformer_2, bits, first=3).installed(),
    ):
        expected = [run(part, [one])[0] for part, one in zip(parts, given, strict=True)]
    handle = fastdit.patch(pipe, Cached(Schedule.from_bits(bits, names)), backend="reference")
    with handle.run(range(6)):
        with pytest.raises(FastDiTError, match="cannot unpatch a model while"):
            fastdit.unpatch(pipe)
        for part, one, wanted in zip(parts, given, expected, strict=True):
            same_bits(run(part, [one])[0], wanted)
            handle.advance()
    assert len(handle.live_runs()) == handle.cache_bytes() == 0


def test_a_second_transformer_that_is_refused_leaves_both_as_they_were():
    pipe = two()
    fastdit.patch(pipe, Cached(Schedule.every(2)))
    stock, before = drawn(pipe), state(pipe)
    pipe.transformer_2.blocks[1].attn1.processor = object()
    with pytest.raises(UnsupportedModelError, match=r"blocks.1.attn1 has the attention processor"):
        fastdit.patch(pipe, RAS())
    pipe.transformer_2.blocks[1].attn1.processor = pipe.transformer.blocks[1].attn1.processor
    assert [len(part) for part in state(pipe)] == [len(part) for part in before]
    same_bits(drawn(pipe), stock)


def test_each_may_have_a_method_of_its_own_or_be_alone():
    pipe = two()
    fastdit.patch(pipe, Cached(Schedule.every(2)))
    fastdit.patch(pipe.transformer_2)
    drawn(pipe)
    report = fastdit.report(pipe)
    assert (report.computed, report.reused) == (9 * 2 * 2 + 9 * 2 * 5, 9 * 2)
    pipe.register_modules(transformer=None)
    pipe.register_to_config(boundary_ratio=2.0)
    handle = fastdit.patch(pipe, Cached(Schedule.every(2)))
    drawn(pipe, dtype=torch.float32)
    assert handle.report().reused == 9 * 2 * 4
    pipe.register_modules(transformer_2=None)
    with pytest.raises(UnsupportedModelError, match="a pipeline with a transformer"):
        fastdit.patch(pipe)


def test_two_without_an_adapter():
    """SkyReels' class is another, and is wrapped; one warning tells of both."""

    name = "SkyReelsV2Transformer3DModel"

    def sky(seed):
        return tiny_models.randomise(SkyReelsV2Transformer3DModel(**ENTRIES[name].config), seed)

    pipe = two(cls=sky)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        handle = fastdit.patch(pipe, Cached(Schedule.every(2)))
    assert [str(each.message).partition(":")[0] for each in told] == [f"{name} has no adapter"]
    assert f"{name} and" in repr(handle)


def test_frames_are_asked_of_pipelines_of_videos_alone():
    with pytest.raises(ArgumentError, match="frames must be None for StableDiffusion3Pipeline"):
        fastdit.patch(tiny_models.pipeline("sd3")).explain(frames=5)
    pipe = tiny_models.pipeline("wan")
    said = fastdit.patch(pipe).explain()
    assert said.image_tokens == 81 * 30 * 52
    assert said.steps == 50
