"""Qwen-Image's pipelines that are given pictures, and the form of Edit-2511, where these have own modulations."""

from __future__ import annotations

import functools

import diffusers
import numpy as np
import pytest
import torch
from torch import nn

import fastdit
import ralu_oracle
import tiny_models
from contract import FORWARD_FP64, RUN_FP64, distance, same_bits, within_contract
from fastdit import RALU, RAS, ArgumentError, Cached, Dense, Schedule
from fastdit.blocks.modulation import Modulations
from oracle import Oracle, random_bits
from ras_oracle import RowOracle, by_change, published
from replays import graphs_of, tapes  # noqa: F401
from test_adapters import as_double
from tiny_models import LATENT, TOO_NEW

pytestmark = [
    pytest.mark.diffusers,
    pytest.mark.skipif("qwen" in TOO_NEW, reason="its attention was another before"),
]
STEPS = 6
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
#: two references of other shapes than the picture's
SHAPES = [(1, 4, 8), (1, 2, 4), (1, 4, 2)]
TOKENS, REFERENCES = 32, 16


def form(dtype=torch.float32, **more):
    model = tiny_models.FAMILIES["qwen"].build()
    given = {name: value for name, value in model.config.items() if name[0] != "_"}
    return tiny_models.randomise(type(model)(**given | {"zero_cond_t": True} | more)).to(dtype)


def call(batch=2, dtype=torch.float32, step=0):
    """Of pictures with two references each, and prompts of unlike length."""
    given = tiny_models.call("qwen", batch, dtype, step=step, width=24)
    return given | {"img_shapes": [SHAPES] * batch}


@torch.no_grad()
def run(model, dtype=torch.float32, steps=STEPS):
    return [model(**call(2, dtype, step))[0] for step in range(steps)]


# --- the transformer


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_reference_is_bit_equal_to_stock(dtype):
    model = form(dtype)
    expected = model(**call(3, dtype))[0]
    for method in (Dense(), Cached(Schedule.every(1))):
        fastdit.patch(model, method, backend="reference")
        same_bits(model(**call(3, dtype))[0], expected)


@torch.no_grad()
def test_the_fast_path_is_exact_in_fp64():
    model = form(torch.float64)
    expected = model(**call(3, torch.float64))[0]
    fastdit.patch(model)
    for _ in range(2):
        found = model(**call(3, torch.float64))[0]
        within_contract(found, expected, bound=FORWARD_FP64)
    for index in range(3):  # a batch equals single runs
        alone = {
            name: value[index : index + 1] if isinstance(value, torch.Tensor) else value
            for name, value in call(3, torch.float64).items()
        } | {"img_shapes": [SHAPES]}
        assert distance(found[index : index + 1], model(**alone)[0]) <= FORWARD_FP64


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_the_fast_path_errs_at_most_twice_as_much_as_stock(dtype):
    model, truth_model = form(dtype), form(dtype).double()
    with torch.no_grad():
        truth = [truth_model(**as_double(call(2, dtype, step)))[0] for step in range(STEPS)]
    stock = torch.cat(run(model, dtype))
    fastdit.patch(model)
    within_contract(torch.cat(run(model, dtype)), stock, torch.cat(truth))


def test_references_have_another_modulation():
    """Else the tests here could not fail."""
    two, one = form(), form(zero_cond_t=False)
    assert distance(run(two, steps=1)[0], run(one, steps=1)[0]) > 0.01


@pytest.mark.parametrize(
    ("backend", "dtype"), [("reference", torch.float32), (None, torch.float64)]
)
def test_a_schedule_is_a_plain_cache(backend, dtype):
    model = form(dtype)
    bits, names = random_bits(model, STEPS, 2)
    with Oracle(model, bits).installed() as plain:
        expected = run(model, dtype)
    assert plain.reused
    handle = fastdit.patch(model, Cached(Schedule.from_bits(bits, names)), backend=backend)
    for _ in range(3):
        with handle.run(range(STEPS)):
            found = run(model, dtype)
        for mine, theirs in zip(found, expected, strict=True):
            if backend == "reference":
                same_bits(mine, theirs)
            else:
                assert distance(mine, theirs) <= FORWARD_FP64
    assert (backend == "reference") or handle.last_run().programs >= STEPS - 1


@torch.no_grad()
def test_the_adapters_own_attention_is_exact(monkeypatch):
    """As on a GPU."""
    monkeypatch.setattr("fastdit.blocks.attention.fuses", lambda device: True)
    model = form(torch.float64)
    expected = model(**call(2, torch.float64))[0]
    fastdit.patch(model)
    within_contract(model(**call(2, torch.float64))[0], expected, bound=FORWARD_FP64)


def test_streams_are_clipped_in_fp16():
    """Gates of both ranges so large that streams pass 65504."""
    model = form(torch.float16)
    for block in model.transformer_blocks:
        block.img_mod[1].bias.data.chunk(6)[5].fill_(6e4)
    expected = run(model, torch.float16, 1)[0]
    seen = []
    model.transformer_blocks[1].register_forward_hook(lambda m, a, out: seen.append(out[1]))
    fastdit.patch(model, backend="reference")
    same_bits(run(model, torch.float16, 1)[0], expected)
    assert seen[0].abs().max() == 65504


def test_modulations_are_made_ahead_for_both(monkeypatch):
    """One product a layer and run, of the rows of all steps and as many of the timestep 0 for the picture's stream."""
    made = []
    stock = Modulations.of

    def of(self, layer, compute):
        def counted(*inputs):
            made.append(sum(len(vectors) for vectors in inputs))
            return compute(*inputs)

        return stock(self, layer, counted)

    monkeypatch.setattr(Modulations, "of", of)
    pipe = edit_plus(torch.float64)
    expected = pipe.draw(steps=STEPS)
    fastdit.patch(pipe.pipe)
    assert distance(pipe.draw(steps=STEPS), expected) <= RUN_FP64
    layers = 2 * len(pipe.pipe.transformer.transformer_blocks) + 1
    assert made == [2 * STEPS] * 2 * layers


@pytest.mark.parametrize("backend", ["reference", None])
def test_shapes_that_are_unlike_in_a_batch_are_refused(backend):
    model = form()
    fastdit.patch(model, backend=backend)
    shapes = [[(1, 4, 8), (1, 4, 4)], [(1, 4, 4), (1, 4, 8)]]
    with (
        torch.no_grad(),
        pytest.raises(ArgumentError, match=r"img_shapes must be alike in a batch .* zero_cond_t"),
    ):
        model(**call() | {"img_shapes": shapes})


# --- the pipelines


class Editing:
    """A pipeline of the family that is given pictures.

    Args:
        name: Its class.
        picture: Arguments of its call, pictures.
        config: Of the transformer.
    """

    def __init__(self, name, dtype=torch.float32, picture=None, **config):
        cls = getattr(diffusers, name, None)
        if cls is None:
            pytest.skip(f"this diffusers has no {name}")
        named = {"text_encoder": Encoder(dtype), "tokenizer": None}
        if "Edit" in name or "Layered" in name:
            named["processor"] = None
        if "ControlNet" in name:
            named["controlnet"] = controlnet(dtype, 4 * ("Inpaint" in name))
        vae = tiny_models.video_vae().to(dtype)
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        model = form(dtype, **{"zero_cond_t": False} | config)
        self.pipe = cls(vae=vae, transformer=model, scheduler=scheduler, **named)
        self.pipe.set_progress_bar_config(disable=True)
        self.name, self.dtype, self.picture = name, dtype, picture or {}

    def given(self, batch=1, steps=STEPS, cfg=True, seed=0, **more):
        """Arguments of a call; a height and a width only where it takes them."""
        given = tiny_models.arguments(
            "qwen", batch, steps, seed, cfg, self.dtype, prompt_per_image=True
        )
        if "Layered" in self.name or "EditInpaint" in self.name:
            del given["height"], given["width"]
        if "Layered" in self.name:
            given |= {"prompt": ["words, for it would ask for some"] * batch, "output_type": "pt"}
        return given | self.picture | more

    def draw(self, **kwargs):
        """The latents at the end; of layers, which are given as pictures only, those of the last step."""
        seen = []
        if "Layered" in self.name:
            kwargs["callback_on_step_end"] = lambda *given: seen.append(given[-1]["latents"]) or {}
        torch.manual_seed(
            0
        )  # the autoencoder of a ControlNet's picture draws without the generator
        found = self.pipe(**self.given(**kwargs)).images
        return seen[-1] if seen else found


class Encoder(nn.Module):
    """In the place of a text encoder whose dtype alone is asked."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype, self.device = dtype, torch.device("cpu")


def controlnet(dtype, masks):
    model = diffusers.QwenImageControlNetModel(
        patch_size=2,
        in_channels=4 * LATENT,
        out_channels=LATENT,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=20,
        axes_dims_rope=(4, 6, 6),
        extra_condition_channels=masks,
    )
    return tiny_models.randomise(model, 3).to(dtype)


def picture(height, width, seed=5):
    from PIL import Image

    draw = torch.Generator().manual_seed(seed)
    return Image.fromarray((torch.rand(height, width, 3, generator=draw) * 255).byte().numpy())


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Pictures to edit are made a megapixel; these are as small as what is drawn."""
    for name in ("edit", "edit_inpaint", "edit_plus", "layered"):
        module = f"diffusers.pipelines.qwenimage.pipeline_qwenimage_{name}"
        size = (16, 8, None) if name in ("edit", "edit_inpaint") else (16, 8)
        try:
            monkeypatch.setattr(f"{module}.calculate_dimensions", lambda area, ratio, s=size: s)
        except ImportError:
            assert name == "layered"


def edit_plus(dtype=torch.float32, two_modulations=True):
    """With two references."""
    images = [picture(8, 16), picture(8, 16, 6)]
    name = "QwenImageEditPlusPipeline"
    given = {"image": images} if two_modulations else {"image": images[:1]}
    return Editing(name, dtype, given, zero_cond_t=two_modulations)


MASK = {"image": picture(8, 16), "mask_image": picture(8, 16, 7).convert("L"), "strength": 1.0}
CONTROL = {"control_image": torch.rand(1, 3, 8, 16, generator=torch.Generator().manual_seed(1))}
PIPES = {
    "edit": lambda d: Editing("QwenImageEditPipeline", d, {"image": picture(8, 16)}),
    "edit-2511": edit_plus,
    "edit-2509": functools.partial(edit_plus, two_modulations=False),
    "edit of two modulations": lambda d: Editing(
        "QwenImageEditPipeline", d, {"image": picture(8, 16)}, zero_cond_t=True
    ),
    "edit-inpaint": lambda d: Editing("QwenImageEditInpaintPipeline", d, MASK, zero_cond_t=True),
    "layered": lambda d: Editing(
        "QwenImageLayeredPipeline",
        d,
        {"image": picture(8, 16).convert("RGBA"), "layers": 2, "cfg_normalize": True},
        use_layer3d_rope=True,
        use_additional_t_cond=True,
    ),
    "inpaint": lambda d: Editing("QwenImageInpaintPipeline", d, MASK),
    "img2img": lambda d: Editing(
        "QwenImageImg2ImgPipeline", d, {"image": picture(8, 16), "strength": 1.0}
    ),
    "controlnet": lambda d: Editing("QwenImageControlNetPipeline", d, CONTROL),
    "controlnet-inpaint": lambda d: Editing(
        "QwenImageControlNetInpaintPipeline",
        d,
        {"control_image": picture(8, 16), "control_mask": MASK["mask_image"]},
    ),
}
BATCHES = {"edit-2511": 1, "edit-2509": 1}  # it refuses several prompts


@pytest.mark.parametrize("cfg", [False, True], ids=["one call", "two calls"])
@pytest.mark.parametrize("name", PIPES)
def test_a_pipeline_patched_is_bit_equal(name, cfg):
    """Dense, and a schedule to a plain cache; guidance of two calls rescales, and has a prompt of another length."""
    pipe = PIPES[name](torch.float32)
    given = {"batch": BATCHES.get(name, 2), "cfg": cfg}
    model = pipe.pipe.transformer
    stock = pipe.draw(**given)
    bits, names = random_bits(model, STEPS, 4)
    with Oracle(model, bits, 1 + cfg).installed() as plain:
        cached = pipe.draw(**given)
    assert plain.reused
    assert distance(cached, stock) > 1e-3
    cases = (([], stock), ([Cached(Schedule.from_bits(bits, names))], cached))
    for methods, expected in cases:
        handle = fastdit.patch(pipe.pipe, *methods, backend="reference")
        same_bits(pipe.draw(**given), expected)
        handle.unpatch()
    same_bits(pipe.draw(**given), stock)


@pytest.mark.parametrize("name", PIPES)
def test_a_pipeline_on_the_fast_path_is_exact_in_fp64(name):
    pipe = PIPES[name](torch.float64)
    model = pipe.pipe.transformer
    bits, names = random_bits(model, STEPS, 4)
    expected = pipe.draw()
    with Oracle(model, bits, 2).installed():
        cached = pipe.draw()
    for methods, wanted in (
        ([], expected),
        ([Cached(Schedule.from_bits(bits, names))], cached),
    ):
        handle = fastdit.patch(pipe.pipe, *methods)
        for _ in range(2):
            assert distance(pipe.draw(), wanted) <= RUN_FP64
        handle.unpatch()


def test_several_pictures_of_a_prompt():
    """The pipeline says the shapes once for each prompt."""
    pipe = edit_plus()
    stock = pipe.draw(num_images_per_prompt=2)
    assert len(stock) == 2
    fastdit.patch(pipe.pipe, backend="reference")
    same_bits(pipe.draw(num_images_per_prompt=2), stock)
    pipe = edit_plus(torch.float64)
    stock = pipe.draw(num_images_per_prompt=2)
    fastdit.patch(pipe.pipe)
    assert distance(pipe.draw(num_images_per_prompt=2), stock) <= RUN_FP64


def test_a_callback_sees_and_interrupts():
    pipe = edit_plus()

    def draw():
        seen = []

        def callback(pipe, step, timestep, given):
            seen.append(given["latents"].clone())
            pipe._interrupt = step == 2
            return {"latents": given["latents"] * 1.01}

        seen.append(pipe.draw(callback_on_step_end=callback))
        return seen

    stock = draw()
    assert len(stock) == 4
    handle = fastdit.patch(pipe.pipe, backend="reference")
    for found, expected in zip(draw(), stock, strict=True):
        same_bits(found, expected)
    handle.unpatch()
    handle = fastdit.patch(pipe.pipe, Cached(Schedule.every(2)))
    assert len(draw()) == 4
    handle.unpatch()
    same_bits(draw()[-1], stock[-1])


# --- a part of the tokens


@pytest.mark.parametrize("beside", ["nothing", "a schedule", "forecasts"])
@pytest.mark.parametrize("cfg", [False, True], ids=["one call", "two calls"])
@pytest.mark.parametrize("name", ["edit-2511", "edit-2509", "layered", "edit-inpaint"])
def test_ras_chooses_among_the_tokens_of_what_is_drawn(name, cfg, beside):
    """References are keys and values of each step, of the last whole one."""
    pipe = PIPES[name](torch.float64)
    bits, orders, methods = None, None, []
    if beside != "nothing":
        bits, names = random_bits(pipe.pipe.transformer, STEPS, seed=1, compute=0.5)
        if beside == "forecasts":
            generator = np.random.default_rng(0)
            orders = {kind: generator.integers(0, 3, some.shape) for kind, some in bits.items()}
        methods = [Cached(Schedule.from_bits(bits, names, orders=orders))]
    tokens = TOKENS * (3 if name == "layered" else 1)
    for mode, choose in (
        ("parity", published(0.5, STEPS, 2, (4,), 0.3, packed=True)),
        ("change", by_change(0.5, STEPS, 2, (4,), packed=True)),
    ):
        truth = RowOracle(pipe.pipe, choose, bits, 1 + cfg, orders)
        with truth.installed():
            expected = pipe.draw(cfg=cfg)
        assert expected.shape[1] == tokens < truth.tokens
        given = {"start": 2, "resets": (4,), "align": 1}
        given |= {"mode": "parity", "high_ratio": 0.3} if mode == "parity" else {"max_age": None}
        for backend in ("reference", None):
            handle = fastdit.patch(pipe.pipe, RAS(**given), *methods, backend=backend)
            found = pipe.draw(cfg=cfg)
            assert distance(found, expected) <= 1e-9, (mode, backend)
            report = handle.report()
            assert report.active.keys() == truth.history.keys()
            for step, rows in truth.history.items():
                chosen = report.active[step].reshape(1, -1).nonzero()[1]
                assert chosen.tolist() == rows[0].sort().values.tolist()
            handle.unpatch()


def test_layers_are_pictures_of_a_report():
    pipe = PIPES["layered"](torch.float32)
    handle = fastdit.patch(pipe.pipe, RAS(start=1, align=1, resets=()))
    pipe.draw()
    assert {mask.shape for mask in handle.report().active.values()} == {(1, 3 * 4, 8)}


# --- two resolutions


RESIZES = (2, 2, 3), (0.3, 0.45, 1.0), (5.0, 2.6, 2.2), 0.05, 0.3, "gradient"


def test_ralu_refuses_references():
    for name in ("edit-2511", "edit", "layered"):
        pipe = PIPES[name](torch.float32)
        fastdit.patch(pipe.pipe, RALU(*RESIZES))
        with pytest.raises(ArgumentError, match="img_shapes must be those of one picture for RALU"):
            pipe.draw(steps=7)


@pytest.mark.parametrize("cfg", [False, True], ids=["one call", "two calls"])
@pytest.mark.parametrize("config", [{}, {"zero_cond_t": False, "use_layer3d_rope": True}], ids=str)
def test_ralu_without_references_is_a_slow_restatement(config, cfg):
    """The model picks modulations by the shape of a whole picture, where a layout has fewer tokens."""
    parts = tiny_models.pipeline("qwen", torch.float64).components
    pipe = diffusers.QwenImagePipeline(**parts | {"transformer": form(torch.float64, **config)})
    pipe.set_progress_bar_config(disable=True)
    draw = torch.Generator().manual_seed(3)
    noise = torch.randn(2, LATENT, 16, 24, generator=draw, dtype=torch.float64)
    size = {"height": 16, "width": 24}
    given = tiny_models.arguments("qwen", 2, 7, cfg=cfg, dtype=torch.float64, **size)
    frame = -1 if config else 0
    with torch.no_grad():
        expected = ralu_oracle.run(pipe, RALU(*RESIZES), noise, given | {"frame": frame})
    fastdit.patch(pipe, RALU(*RESIZES))
    found = ralu_oracle.unpack(pipe(**given, latents=ralu_oracle.pack(noise)).images, (8, 12))
    within_contract(found, expected)


@pytest.mark.parametrize("method", ["dense", "cached", "ras", "ras + cached"])
def test_replayed_runs_draw_what_eager_ones_do(method, tapes):  # noqa: F811
    pipe = edit_plus()
    bits, names = random_bits(pipe.pipe.transformer, STEPS, 1)
    methods = {
        "dense": [Dense()],
        "cached": [Cached(Schedule.from_bits(bits, names))],
        "ras": [RAS(ratio=0.5, start=2, resets=(), align=1)],
    }
    methods["ras + cached"] = [*methods["ras"], *methods["cached"]]

    def draw(seed):
        given = pipe.given(seed=seed)
        for key, value in given.items():
            if key.endswith("embeds"):
                given[key] = value + 0.1 * seed
        return pipe.pipe(**given).images.clone()

    fastdit.patch(pipe.pipe, *methods[method])
    eager = [draw(seed) for seed in range(4)]
    handle = fastdit.patch(pipe.pipe, *methods[method], graphs=True)
    for seed in range(4):
        same_bits(draw(seed), eager[seed])
    assert handle.last_run().trace.replayed > 0
    assert graphs_of(pipe.pipe)
