"""The embedded tiny model: its scenes, its judge, its loading and its behaviour as a pipeline.

Uses the shipped assets and the CPU only. Training itself is checked in ``test_tiny_train.py``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdit import tiny
from fastdit.tiny import captions, scenes

PROMPT = "a small red circle at the left and a large blue square at the right on a gray background"
BUDGET = 8 * 1024 * 1024


@pytest.fixture(scope="module")
def pipeline():
    """The shipped pipeline, loaded once."""
    torch.set_num_threads(1)
    return tiny.load_pipeline()


def _seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _drawn(count: int, objects: int, size: int = 64) -> tuple[np.ndarray, list[str]]:
    rng = np.random.default_rng(objects)
    chosen = [scenes.sample_scene(rng, objects, "test") for _ in range(count)]
    pictures = np.stack([scenes.render(scene, size, rng) for scene in chosen])
    return pictures, [captions.write(scene, rng) for scene in chosen]


# --- scenes and captions -------------------------------------------------------------------


def test_scenes_are_deterministic_and_drawn_at_any_size() -> None:
    one = scenes.sample_scene(np.random.default_rng(5), 2)
    two = scenes.sample_scene(np.random.default_rng(5), 2)
    assert one == two
    picture = scenes.render(one, (96, 128), np.random.default_rng(1))
    assert picture.shape == (96, 128, 3)
    assert picture.dtype == np.float32
    assert np.array_equal(picture, scenes.render(two, (96, 128), np.random.default_rng(1)))
    assert picture.min() >= 0.0
    assert picture.max() <= 1.0


@pytest.mark.parametrize("objects", [1, 2])
def test_splits_are_disjoint_by_caption(objects: int) -> None:
    rng = np.random.default_rng(0)
    keys: dict[str, set[str]] = {}
    for split in scenes.SPLITS:
        chosen = [scenes.sample_scene(rng, objects, split) for _ in range(400)]
        assert {scene.split for scene in chosen} == {split}
        keys[split] = {scene.key for scene in chosen}
    assert not keys["train"] & keys["test"]
    for prompt in tiny.prompts(100, "test", objects, seed=3):
        assert _scene_of(prompt).split == "test"


def _scene_of(prompt: str) -> scenes.Scene:
    """The scene that a complete prompt describes."""
    parsed = captions.parse(prompt)
    items = tuple(scenes.SceneObject(o.shape, o.color, o.size, o.place) for o in parsed.objects)
    return scenes.Scene(items, parsed.background)


def test_split_ignores_the_order_of_objects() -> None:
    scene = scenes.sample_scene(np.random.default_rng(2), 2)
    assert scenes.Scene(scene.objects[::-1], scene.background).key == scene.key


def test_captions_read_back_whatever_their_wording() -> None:
    rng = np.random.default_rng(1)
    for index in range(300):
        scene = scenes.sample_scene(rng, 1 + index % 2)
        text = captions.write(scene, rng, synonyms=0.2)
        assert _scene_of(text).key == scene.key, text
        assert len(captions.words(text)) <= 22


def test_short_prompts_leave_attributes_open() -> None:
    parsed = captions.parse("A red circle!")
    assert parsed.objects == (captions.ParsedObject("circle", "red"),)
    assert parsed.background is None


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: tiny.prompts(1, objects=3), "objects"),
        (lambda: tiny.prompts(1, split="valid"), "split"),
        (lambda: tiny.prompts(-1), "n must"),
        (lambda: captions.parse("something else"), "shape"),
        (lambda: tiny.score(np.zeros((1, 8, 8, 3)), ["a circle", "a square"]), "equally many"),
        (lambda: tiny.score(torch.zeros(1, 8, 8, 3), ["a circle"]), "tensor"),
        (lambda: scenes.render(scenes.sample_scene(np.random.default_rng(0)), 8), "size"),
    ],
)
def test_errors_name_the_argument(call, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        call()


# --- judge ---------------------------------------------------------------------------------


@pytest.mark.parametrize("objects", [1, 2])
@pytest.mark.parametrize("size", [64, 128])
def test_judge_accepts_the_truth_and_rejects_other_captions(objects: int, size: int) -> None:
    pictures, texts = _drawn(150, objects, size)
    truth = tiny.score(pictures, texts)
    assert truth.mean >= 0.99
    assert min(truth.size, truth.place, truth.background) >= 0.98
    shuffled = tiny.score(pictures, texts[1:] + texts[:1])
    # Chance: a picture with n of the 30 shape and colour pairs shows a given pair with n / 30.
    assert truth.chance == pytest.approx(objects / 30)
    assert shuffled.mean <= shuffled.chance + 0.03


def test_judge_takes_any_kind_of_picture_and_soft_ones() -> None:
    from PIL import Image

    pictures, texts = _drawn(20, 2)
    padded = np.pad(pictures, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    soft = sum(padded[:, i : i + 64, j : j + 64] for i in range(3) for j in range(3)) / 9
    kinds = [
        pictures,
        soft,
        torch.from_numpy(pictures).permute(0, 3, 1, 2),
        [Image.fromarray((p * 255).astype(np.uint8)) for p in pictures],
    ]
    for kind in kinds:
        assert tiny.score(kind, texts).mean >= 0.95


def test_judge_finds_nothing_on_an_empty_picture() -> None:
    result = tiny.score(np.full((1, 64, 64, 3), 0.58, np.float32), [PROMPT])
    assert result.mean == 0.0
    assert result.background == 1.0
    assert [verdict.found for verdict in result.objects] == [None, None]


# --- loading -------------------------------------------------------------------------------


def test_assets_are_small_and_plain() -> None:
    files = [path for path in tiny.assets_path().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= BUDGET
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md", ".txt"}
    for path in files:
        if path.suffix == ".json":
            text = path.read_text()
            json.loads(text)
            assert "_name_or_path" not in text
            assert "/root" not in text
            assert "/tmp" not in text


def test_import_is_cheap_and_loading_is_offline_and_quiet() -> None:
    code = (
        "import sys, fastdit.tiny as t\n"
        "assert 'diffusers' not in sys.modules and 'transformers' not in sys.modules\n"
        "import warnings; warnings.simplefilter('error', FutureWarning)\n"
        "import torch; p = t.load_pipeline(); assert p.transformer.dtype == torch.float32\n"
        "assert p.vae.dtype == p.text_encoder.dtype == torch.float32\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    root = str(Path(tiny.__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert not (done.stdout + done.stderr).strip()


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="model_index"):
        tiny.load_pipeline(tmp_path)


def test_save_and_load_round_trip(pipeline, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline, StableDiffusion3Pipeline

    from fastdit.tiny.pipeline import GUIDANCE_SCALE

    settings = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "latent"}
    expected = pipeline(PROMPT, generator=_seeded(), **settings).images
    pipeline.save_pretrained(tmp_path)
    again = tiny.load_pipeline(tmp_path)
    # Mapped and copied weights may be aligned differently, which changes the last digits.
    close = {"atol": 1e-3, "rtol": 1e-3}
    got = again(PROMPT, generator=_seeded(), **settings).images
    torch.testing.assert_close(got, expected, **close)
    stock = DiffusionPipeline.from_pretrained(str(tmp_path), text_encoder_3=None, tokenizer_3=None)
    assert type(stock) is StableDiffusion3Pipeline
    stock.set_progress_bar_config(disable=True)
    settings |= {"guidance_scale": GUIDANCE_SCALE, "max_sequence_length": 0}
    same = stock(PROMPT, generator=_seeded(), **settings).images
    reference = pipeline(PROMPT, generator=_seeded(), **settings).images
    torch.testing.assert_close(same, reference, **close)


# --- behaviour as a pipeline ---------------------------------------------------------------


def test_transformer_sees_at_most_32_text_tokens(pipeline) -> None:
    seen = []

    def watch(module, arguments, keywords) -> None:
        seen.append((keywords["encoder_hidden_states"].shape, keywords["hidden_states"].shape))

    handle = pipeline.transformer.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        pipeline(PROMPT, num_inference_steps=1, output_type="latent")
    finally:
        handle.remove()
    text, latents = seen[0]
    assert text[1] <= 32
    assert latents == (2, 4, 32, 32)  # guidance doubles the batch; 256 tokens of patch 2


def test_architecture_is_stock_and_large_enough(pipeline) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    assert type(pipeline.transformer) is SD3Transformer2DModel
    assert type(pipeline.scheduler) is FlowMatchEulerDiscreteScheduler
    assert pipeline.scheduler.config.shift == 3.0
    assert len(pipeline.transformer.transformer_blocks) >= 6
    assert (pipeline.transformer.config.sample_size // 2) ** 2 >= 256


def test_generators_decide_the_picture(pipeline) -> None:
    settings = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "np"}
    first = pipeline(PROMPT, generator=_seeded(1), **settings).images
    again = pipeline(PROMPT, generator=_seeded(1), **settings).images
    other = pipeline(PROMPT, generator=_seeded(2), **settings).images
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 128), (128, 96)])
def test_other_sizes(pipeline, height: int, width: int) -> None:
    images = pipeline(PROMPT, num_inference_steps=1, height=height, width=width, output_type="pt")
    assert images.images.shape == (1, 3, height, width)
    assert torch.isfinite(images.images).all()


def test_stock_arguments_work(pipeline) -> None:
    steps = []

    def note(pipe, step, timestep, tensors):
        steps.append(step)
        return tensors

    images = pipeline(
        ["a red circle", "an unheard-of prompt: zebra on the moon"],
        negative_prompt=["blue", "a green square"],
        num_images_per_prompt=2,
        num_inference_steps=2,
        guidance_scale=2.0,
        height=64,
        width=64,
        generator=_seeded(),
        callback_on_step_end=note,
    ).images
    assert len(images) == 4
    assert images[0].size == (64, 64)
    assert steps == [0, 1]


def test_autoencoder_is_crisp(pipeline) -> None:
    pictures, _ = _drawn(8, 2, 128)
    batch = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    with torch.no_grad():
        latents = pipeline.vae.encode(batch * 2 - 1).latent_dist.mean
        back = pipeline.vae.decode(latents).sample / 2 + 0.5
        scaled = (latents - pipeline.vae.config.shift_factor) * pipeline.vae.config.scaling_factor
    assert (back - batch).abs().mean() < 0.03
    assert 0.6 < scaled.std() < 1.4


def test_held_out_prompts_are_drawn(pipeline) -> None:
    texts = tiny.prompts(6, "test", objects=1, seed=11)
    images = pipeline(texts, num_inference_steps=12, output_type="np", generator=_seeded()).images
    result = tiny.score(images, texts)
    # Chance is 1 in 30; the measured scores are in assets/training.json.
    assert result.mean >= 0.5
    assert result.place >= 0.5
    assert result.background >= 0.75
