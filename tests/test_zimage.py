"""Z-Image's own forms: prompts of unlike length, padding, guidance that ends early, references, ControlNets."""

from __future__ import annotations

import functools

import pytest
import torch

import fastdit
import tiny_models
from contract import FORWARD_FP64, RUN_FP64, distance, same_bits, within_contract
from fastdit import RAS, ArgumentError, Cached, Schedule
from fastdit.blocks import products
from fastdit.blocks.modulation import Modulations
from oracle import Oracle, random_bits
from ras_oracle import RowOracle, random_rows
from test_cached import as_double
from test_ras import Chosen, chosen  # noqa: F401
from tiny_models import generate, sample

pytestmark = [
    pytest.mark.diffusers,
    pytest.mark.skipif(not tiny_models.HAS_ZIMAGE, reason="its blocks knew no references before"),
]
STEPS = 6
#: prompts that are padded to 32, 64 and 32 tokens
LENGTHS = (5, 33, 7)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def prompts(lengths, dtype=torch.float64, seed=3):
    draw = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(n, 20, generator=draw, dtype=torch.float64) for n in lengths]
    return [each.to(dtype) for each in drawn]


def calls(dtype=torch.float64, height=12, width=8, steps=STEPS):
    """24 image tokens, so padded too, beside prompts of unlike padded length."""
    for step in range(steps):
        given = tiny_models.call("zimage", len(LENGTHS), dtype, height, width, step)
        yield given | {"cap_feats": prompts(LENGTHS, dtype)}


@torch.no_grad()
def run(model, given):
    return [sample(model(**one)) for one in given]


@pytest.fixture
def fused(monkeypatch):
    """The adapter's own attention runs, as on a GPU."""
    monkeypatch.setattr("fastdit.blocks.attention.fuses", lambda device: True)


# ---- calls of the model


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks_and_padding_are_bit_equal(dtype):
    model = tiny_models.transformer("zimage", dtype)
    given = list(calls(dtype))
    dense = run(model, given)
    bits, names = random_bits(model, STEPS, 2)
    with Oracle(model, bits).installed():
        cached = run(model, given)
    for methods, expected in (((), dense), ((Cached(Schedule.from_bits(bits, names)),), cached)):
        handle = fastdit.patch(model, *methods, backend="reference")
        with handle.run(range(STEPS)):
            for found, wanted in zip(run(model, given), expected, strict=True):
                same_bits(found, wanted)
        handle.unpatch()


@pytest.mark.parametrize("own", [False, True], ids=["stock attention", "own attention"])
def test_masks_and_padding_are_exact_in_fp64(own, request):
    if own:
        request.getfixturevalue("fused")
    model = tiny_models.transformer("zimage", torch.float64)
    given = list(calls())
    bits, names = random_bits(model, STEPS, 2)
    with Oracle(model, bits).installed():
        expected = run(model, given)
    handle = fastdit.patch(model, Cached(Schedule.from_bits(bits, names)))
    for _ in range(2):  # the second run has programs for all but its first call
        with handle.run(range(STEPS)):
            for found, wanted in zip(run(model, given), expected, strict=True):
                assert distance(found, wanted) <= FORWARD_FP64


@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
def test_masks_and_padding_err_at_most_twice_as_much_as_stock(dtype):
    model = tiny_models.transformer("zimage", dtype)
    given = list(calls(dtype))
    truth = run(tiny_models.transformer("zimage", dtype).double(), map(as_double, given))
    stock = run(model, given)
    fastdit.patch(model)
    found = run(model, given)
    within_contract(torch.cat(found), torch.cat(stock), torch.cat(truth))


@pytest.mark.parametrize("backend", ["reference", None])
def test_pictures_of_unlike_sizes(backend):
    model = tiny_models.transformer("zimage", torch.float64)
    draw = torch.Generator().manual_seed(0)
    sizes = ((8, 8), (4, 20), (12, 8))
    given = [
        one
        | {"x": [torch.randn(4, 1, *size, generator=draw, dtype=torch.float64) for size in sizes]}
        for one in calls()
    ]
    with torch.no_grad():
        stock = [model(**one)[0] for one in given]
    bits, names = random_bits(model, STEPS, 4)
    with torch.no_grad(), Oracle(model, bits).installed():
        expected = [model(**one)[0] for one in given]
    cached = (Cached(Schedule.from_bits(bits, names)),)
    for methods, wanted in (((), stock), (cached, expected)):
        handle = fastdit.patch(model, *methods, backend=backend)
        with torch.no_grad(), handle.run(range(STEPS)):
            for one, pictures in zip(given, wanted, strict=True):
                for found, picture in zip(model(**one)[0], pictures, strict=True):
                    assert distance(found, picture) <= FORWARD_FP64
    handle = fastdit.patch(model, RAS(start=1, ratio=0.5, align=1, resets=()))
    refused = pytest.raises(ArgumentError, match="x must be pictures of one size and one frame")
    with torch.no_grad(), refused, handle.run(range(STEPS)):
        model(**given[0])


def test_other_sizes_of_the_later_pictures_make_caches_anew():
    """The first picture says nothing of the others."""
    model = tiny_models.transformer("zimage", torch.float64)
    one, other = list(calls(steps=2))
    other = other | {"x": [other["x"][0], *(x.transpose(-1, -2) for x in other["x"][1:])]}
    with torch.no_grad():
        expected = model(**other)[0]
        handle = fastdit.patch(model, Cached(Schedule.every(2)), backend="reference")
        with handle.run(range(2)):
            model(**one)
            for found, wanted in zip(model(**other)[0], expected, strict=True):
                same_bits(found, wanted)


def test_a_hook_that_comes_in_a_run_finds_what_was_kept_of_the_prompt():
    """Where somebody looks behind the blocks the model's own forward runs."""
    model = tiny_models.transformer("zimage", torch.float64)
    given, seen = list(calls(steps=4)), []
    expected = run(model, given)
    handle = fastdit.patch(model)
    with handle.run(range(4)):
        for step, (one, wanted) in enumerate(zip(given, expected, strict=True)):
            if step % 2:
                last = model.all_final_layer["2-1"].norm_final
                hook = last.register_forward_hook(lambda *_: seen.append(1))
            (found,) = run(model, [one])
            assert distance(found, wanted) <= FORWARD_FP64
            if step % 2:
                hook.remove()
    assert len(seen) == 2


def test_the_output_in_an_object():
    model = tiny_models.transformer("zimage", torch.float64)
    (given,) = calls(steps=1)
    with torch.no_grad():
        expected = model(**given)[0]
        fastdit.patch(model)
        for _ in range(3):
            found = model(**given | {"return_dict": True})
            assert type(found).__name__ == "Transformer2DModelOutput"
            for mine, wanted in zip(found.sample, expected, strict=True):
                assert distance(mine, wanted) <= FORWARD_FP64


def test_its_feed_forward_is_none_of_diffusers_shared_ones(monkeypatch):
    """It has the name of those, whose GELU goes into the product on GPUs."""
    monkeypatch.setattr(products, "gelu_of_products", lambda device: "tanh")
    model = tiny_models.transformer("zimage", torch.float64)
    given = list(calls(steps=1))
    stock = run(model, given)
    fastdit.patch(model)
    assert distance(run(model, given)[0], stock[0]) <= FORWARD_FP64


# ---- references and ControlNets


def with_references():
    """(model, its calls): pictures with a reference each, and what SigLIP says of it."""
    stock = tiny_models.transformer("zimage", torch.float64)
    config = {name: value for name, value in stock.config.items() if name[0] != "_"}
    model = tiny_models.randomise(type(stock)(**config | {"siglip_feat_dim": 12})).double()
    fixed = torch.Generator().manual_seed(7)

    def randn(*shape, draw=fixed):
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    clean, seen = [randn(4, 1, 8, 8) for _ in range(2)], [randn(2, 3, 12) for _ in range(2)]
    texts = [[randn(5, 20), randn(3, 20), randn(1, 20)] for _ in range(2)]

    def given(step):
        draw = torch.Generator().manual_seed(step)
        return {
            "x": [[own, randn(4, 1, 8, 12, draw=draw)] for own in clean],
            "t": torch.full((2,), 0.1 + 0.1 * step, dtype=torch.float64),
            "cap_feats": texts,
            "siglip_feats": [[own, None] for own in seen],
            "image_noise_mask": [[0, 1]] * 2,
            "return_dict": False,
        }

    return model, [given(step) for step in range(STEPS)]


@pytest.mark.parametrize("backend", ["reference", None])
def test_references(backend):
    model, given = with_references()
    stock = run(model, given)
    bits, names = random_bits(model, STEPS, 1)
    with Oracle(model, bits).installed():
        cached = run(model, given)
    assert distance(cached[-1], stock[-1]) > 0.01
    for methods, expected in (((), stock), ((Cached(Schedule.from_bits(bits, names)),), cached)):
        handle = fastdit.patch(model, *methods, backend=backend)
        with handle.run([float(one["t"][0]) for one in given]):
            for found, wanted in zip(run(model, given), expected, strict=True):
                assert distance(found, wanted) <= (0 if backend else FORWARD_FP64)
        handle.unpatch()


def test_another_reference_makes_caches_anew():
    model, given = with_references()
    other = given[1] | {"x": [[2 * row[0], row[1]] for row in given[1]["x"]]}
    expected = run(model, [given[0], other])
    handle = fastdit.patch(model, Cached(Schedule.every(2)), backend="reference")
    with handle.run(range(2)):
        for found, wanted in zip(run(model, [given[0], other]), expected, strict=True):
            same_bits(found, wanted)


def test_tokens_beside_references_are_refused():
    model, given = with_references()
    handle = fastdit.patch(model, RAS(start=1))
    refused = pytest.raises(
        ArgumentError, match=r"x must be one picture a row, .* image_noise_mask="
    )
    with refused, handle.run(range(STEPS)):
        run(model, given)


def residuals(step, sequence):
    draw = torch.Generator().manual_seed(50 + step)
    shape = len(LENGTHS), sequence, 32
    return {n: torch.randn(shape, generator=draw, dtype=torch.float64) for n in (0, 2)}


@pytest.mark.parametrize("backend", ["reference", None])
def test_a_controlnet(backend):
    """32 image tokens with padding, and 64 of text."""
    model = tiny_models.transformer("zimage", torch.float64)
    given = [
        one | {"controlnet_block_samples": residuals(step, 96)} for step, one in enumerate(calls())
    ]
    bits, names = random_bits(model, STEPS, 6)
    plain = run(model, calls())
    with Oracle(model, bits).installed():
        expected = run(model, given)
    assert distance(expected[0], plain[0]) > 0.01
    handle = fastdit.patch(model, Cached(Schedule.from_bits(bits, names)), backend=backend)
    for _ in range(2):
        with handle.run(range(STEPS)):
            for found, wanted in zip(run(model, given), expected, strict=True):
                assert distance(found, wanted) <= FORWARD_FP64


@pytest.mark.parametrize("backend", ["reference", None])
def test_a_controlnet_where_tokens_are_left_out(backend):
    """Active tokens get their own residuals: all of them in another order are those of stock."""
    model = tiny_models.transformer("zimage", torch.float64)
    given = [
        one | {"controlnet_block_samples": residuals(step, 96)} for step, one in enumerate(calls())
    ]
    expected = run(model, given)

    def permuted(step, velocity, sigmas):
        draw = torch.Generator().manual_seed(step)
        return torch.stack([torch.randperm(24, generator=draw) for _ in LENGTHS])

    method = Chosen(permuted, dict.fromkeys(range(1, STEPS), 24))
    handle = fastdit.patch(model, method, backend=backend)
    with handle.run(range(STEPS)):
        for one, wanted in zip(given, expected, strict=True):
            (found,) = run(model, [one])
            assert distance(found, wanted) <= FORWARD_FP64
            handle.advance()
    assert handle.report().tokens_per_step == (24,) * STEPS


# ---- runs of the pipeline


def told(lengths=LENGTHS, negative=(33, 2, 3), **more):
    """Arguments of the pipeline with prompts of unlike padded length."""
    given = tiny_models.arguments("zimage", steps=STEPS, dtype=torch.float64, prompt_per_image=True)
    given |= {"prompt_embeds": prompts(lengths), "height": 12, "width": 8, **more}
    if given["guidance_scale"]:
        given["negative_prompt_embeds"] = prompts(negative, seed=4)
    return given


class Truncated(Oracle):
    """The plain cache, which an end of guidance empties: there are fewer rows then."""

    rows = None

    def _count(self, module, args):
        super()._count(module, args)
        if self.rows != len(args[0]):
            self.drop()
        self.rows = len(args[0])


RUNS = {
    "guided": {},
    "unguided": {"guidance_scale": 0.0},
    "guidance ends early": {"cfg_truncation": 0.2},
    "rescaled": {"cfg_normalization": 0.5, "guidance_scale": 7.0},
    "several each": {"num_images_per_prompt": 2},
}


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("case", RUNS)
def test_runs_of_the_pipeline(case, backend):
    pipe = tiny_models.pipeline("zimage", torch.float64)
    rows = []
    hook = pipe.transformer.register_forward_pre_hook(lambda m, args: rows.append(len(args[0])))
    dense = pipe(**told(**RUNS[case])).images
    hook.remove()
    if case == "guidance ends early":
        assert len(set(rows)) == 2
    bits, names = random_bits(pipe.transformer, STEPS, 3)
    with Truncated(pipe.transformer, bits).installed():
        cached = pipe(**told(**RUNS[case])).images
    assert distance(cached, dense) > 0.01
    for methods, expected in (((), dense), ((Cached(Schedule.from_bits(bits, names)),), cached)):
        handle = fastdit.patch(pipe, *methods, backend=backend)
        for _ in range(2):
            found = pipe(**told(**RUNS[case])).images
            assert distance(found, expected) <= (0 if backend else RUN_FP64)
        if (
            backend is None
        ):  # all but the run's first call, and the one after the number of rows changed
            assert handle.last_run().programs >= STEPS - 2
        handle.unpatch()


@pytest.mark.parametrize("case", ["guided", "guidance ends early"])
def test_all_tokens_in_another_order(case, chosen):  # noqa: F811
    pipe = tiny_models.pipeline("zimage", torch.float64)
    stock = pipe(**told(**RUNS[case])).images

    def permuted(step, velocity, sigmas):
        return torch.stack([torch.randperm(24) for _ in LENGTHS])

    fastdit.patch(pipe, Chosen(permuted, dict.fromkeys(range(1, STEPS), 24)))
    assert distance(pipe(**told(**RUNS[case])).images, stock) <= RUN_FP64


@pytest.mark.parametrize("backend", ["reference", None])
def test_rows_beside_padding_and_masks(backend, chosen):  # noqa: F811
    counts = {1: 12, 2: 15, 4: 6, 5: 23}
    pipe = tiny_models.pipeline("zimage", torch.float64)
    with RowOracle(pipe, random_rows(counts, 24, len(LENGTHS))).installed():
        expected = pipe(**told()).images
    assert distance(expected, pipe(**told()).images) > 0.01
    handle = fastdit.patch(
        pipe, Chosen(random_rows(counts, 24, len(LENGTHS)), counts), backend=backend
    )
    for _ in range(2):
        assert distance(pipe(**told()).images, expected) <= RUN_FP64
    assert handle.report().tokens_per_step == (24, 12, 15, 24, 6, 23)


def test_an_interrupted_run():
    pipe = tiny_models.pipeline("zimage", torch.float64)

    def stop(pipe, step, timestep, kwargs):
        pipe._interrupt = step == 2
        return kwargs

    stock = pipe(**told(callback_on_step_end=stop)).images
    fastdit.patch(pipe)
    assert distance(pipe(**told(callback_on_step_end=stop)).images, stock) <= RUN_FP64
    assert distance(pipe(**told()).images, stock) > 0.01


def test_a_prompt_changed_by_a_callback():
    pipe = tiny_models.pipeline("zimage", torch.float64)

    def change(pipe, step, timestep, kwargs):
        if step == 2:
            kwargs["prompt_embeds"] = prompts(LENGTHS, seed=9)
        return kwargs

    given = {"callback_on_step_end": change}
    given["callback_on_step_end_tensor_inputs"] = ["latents", "prompt_embeds"]
    stock = pipe(**told(**given)).images
    assert distance(pipe(**told()).images, stock) > 0.01
    fastdit.patch(pipe)
    assert distance(pipe(**told(**given)).images, stock) <= RUN_FP64


def test_what_sees_the_prompt_alone_runs_once_in_a_run(monkeypatch):
    pipe = tiny_models.pipeline("zimage")
    refiner = pipe.transformer.context_refiner[0]
    seen = []
    stock = type(refiner).forward

    @functools.wraps(stock)
    def forward(self, *args, **kwargs):
        seen.append(self)
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(type(refiner), "forward", forward)
    fastdit.patch(pipe)
    generate(pipe, "zimage", steps=STEPS)
    assert seen.count(refiner) == 1


def test_modulations_are_made_ahead(monkeypatch):
    """Of all steps at once, of the blocks and of what is behind them."""
    made = []
    stock = Modulations.of

    def of(self, layer, compute):
        def counted(*inputs):
            made.append(inputs[0].shape[0])
            return compute(*inputs)

        return stock(self, layer, counted)

    monkeypatch.setattr(Modulations, "of", of)
    pipe = tiny_models.pipeline("zimage", torch.float64)
    expected = pipe(**told()).images
    fastdit.patch(pipe)
    assert distance(pipe(**told()).images, expected) <= RUN_FP64
    blocks = len(pipe.transformer.noise_refiner) + len(pipe.transformer.layers)
    assert made == [2 * len(LENGTHS) * STEPS] * (blocks + 1)


def test_a_lora_scale_beside_rows():
    """The pipeline's `joint_attention_kwargs` scales LoRA layers, in the restated model, too."""
    peft = pytest.importorskip("peft")
    found = []
    for scale in (1.0, 0.3):
        for patched in (False, True):
            pipe = tiny_models.pipeline("zimage", torch.float64)
            names = ["to_q", "w1"]
            settings = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=names)
            torch.manual_seed(0)
            peft.inject_adapter_in_model(settings, pipe.transformer)
            given = told(joint_attention_kwargs={"scale": scale})
            if patched:
                permuted = torch.stack([torch.arange(24)] * len(LENGTHS))
                rows = dict.fromkeys(range(1, STEPS), 24)
                fastdit.patch(pipe, Chosen(lambda *_: permuted, rows))  # noqa: B023
            found.append(pipe(**given).images)
    assert distance(found[2], found[0]) > 1e-3
    assert distance(found[1], found[0]) <= RUN_FP64
    assert distance(found[3], found[2]) <= RUN_FP64
