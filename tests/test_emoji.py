"""The emoji model's data and judge: scenes on a grid, captions, what is held out, and reading pictures back."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from fastdit import emoji
from fastdit.emoji import captions, scenes, sprites
from fastdit.emoji.recipe import RECIPE
from fastdit.emoji.score import read
from fastdit.emoji.train import COURSE
from fastdit.tiny.bank import BankConfig, build_bank, load_bank, save_bank
from fastdit.tiny.evaluate import sample
from fastdit.tiny.models import build_vae
from fastdit.tiny.tokenizer import build_tokenizer
from fastdit.tiny.train import main
from fastdit.tiny.train_transformer import Trainer, TransformerTraining
from fastdit.tiny.train_vae import VaeTraining, vae_batch, vae_loss


def _drawn(count: int, size: int = 128) -> tuple[np.ndarray, list[str]]:
    """Pictures of held-out scenes of one to three emoji by turns, with complete captions."""
    rng = np.random.default_rng(5)
    chosen = [scenes.sample_scene(rng, 1 + i % 3, "test") for i in range(count)]
    pictures = np.stack([scenes.render(scene, size, rng) for scene in chosen])
    return pictures, [captions.write(scene) for scene in chosen]


# --- sprites and scenes --------------------------------------------------------------------


def test_every_name_has_a_picture_of_its_own_in_every_style() -> None:
    seen = set()
    for name, style, side in itertools.product(sprites.NAMES, sprites.STYLES, (80, 48, 40, 24)):
        drawn, cover = sprites.sprite(name, style, side)
        assert drawn.shape == (side, side, 3)
        assert cover.shape == (side, side, 1)
        assert 0.1 < cover.mean() < 0.9
        assert (drawn <= cover + 1e-6).all()
        seen.add(drawn.tobytes())
    assert len(seen) == 24 * 3 * 4


def test_a_sprite_at_half_size_is_the_mean_of_its_pixels() -> None:
    whole, _ = sprites.sprite("rocket", "noto", 80)
    half, _ = sprites.sprite("rocket", "noto", 40)
    assert np.allclose(half, whole.reshape(40, 2, 40, 2, 3).mean((1, 3)), atol=1e-6)


def test_a_scene_is_drawn_the_same_by_the_same_generator() -> None:
    rng = np.random.default_rng(5)
    scene = next(
        s for s in (scenes.sample_scene(rng, 3) for _ in range(50)) if s.ground == "clouds"
    )
    pictures = [scenes.render(scene, 128, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert pictures[0].shape == (128, 128, 3)
    assert pictures[0].dtype == np.float32
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])
    assert pictures[0].min() >= 0.0
    assert pictures[0].max() <= 1.0


def test_emoji_lie_on_the_grid_and_never_on_each_other() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        scene = scenes.sample_scene(rng, int(rng.integers(1, 4)))
        cover = np.zeros((scenes.CELLS, scenes.CELLS), int)
        for one in scene.objects:
            x, y, side = one.box
            assert cover[y : y + side, x : x + side].shape == (side, side)
            cover[y : y + side, x : x + side] += 1
        assert cover.max() == 1


def test_grounds_differ_and_keep_their_colour() -> None:
    for color in scenes.COLORS:
        drawn = []
        for ground in scenes.GROUNDS:
            one = scenes.SceneObject("cat", "noto", "small", "center")
            scene = scenes.Scene((one,), color, ground)
            drawn.append(scenes.render(scene, 64, np.random.default_rng(3)))
            assert np.abs(drawn[-1][:, :8].mean((0, 1)) - scenes.COLORS[color]).max() < 0.25
        assert not np.array_equal(drawn[0], drawn[1])
        assert not np.array_equal(drawn[1], drawn[2])


@pytest.mark.parametrize(
    ("size", "objects", "split"), [(100, 1, "test"), (128, 4, "test"), (128, 1, "all")]
)
def test_what_cannot_be_drawn_is_refused(size: int, objects: int, split: str) -> None:
    with pytest.raises(ValueError, match=r"size|objects|split"):
        scenes.render(scenes.sample_scene(np.random.default_rng(0), objects, split), size)


def test_pairs_that_are_held_out_never_meet_in_training() -> None:
    rng = np.random.default_rng(0)
    pairs: dict[str, set[tuple[str, ...]]] = {"train": set(), "test": set()}
    for split, found in pairs.items():
        for _ in range(1500):
            names = sorted(one.name for one in scenes.sample_scene(rng, 2, split).objects)
            found.add(tuple(names))
    assert not pairs["train"] & pairs["test"]
    assert 15 < len(pairs["test"]) < 60  # of 276
    for _ in range(300):
        names = sorted(one.name for one in scenes.sample_scene(rng, 3, "train").objects)
        assert not set(itertools.combinations(names, 2)) & pairs["test"]


# --- captions ------------------------------------------------------------------------------


def test_complete_captions_are_read_back() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        scene = scenes.sample_scene(rng, int(rng.integers(1, 4)))
        parsed = captions.parse(captions.write(scene))
        assert parsed.color == scene.color
        for said, one in zip(parsed.objects, scene.objects, strict=True):
            size = None if len(scene.objects) == 3 else one.size
            assert said == captions.ParsedObject(one.name, one.style, size, one.place)


def test_terse_captions_name_the_emoji_alone() -> None:
    (text,) = emoji.prompts(1, objects=2, terse=True)
    parsed = captions.parse(text)
    assert text == " and ".join(
        f"{'an' if one.name == 'apple' else 'a'} {one.name}" for one in parsed.objects
    )
    assert parsed.color is None


def test_the_tokenizer_knows_every_word_and_cuts_no_caption() -> None:
    tokenizer = build_tokenizer(captions.MAX_TOKENS, captions.VOCABULARY)
    rng = np.random.default_rng(2)
    for _ in range(300):
        text = captions.write(scenes.sample_scene(rng, int(rng.integers(1, 4))), rng, rng.random())
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids
        assert len(ids) <= captions.MAX_TOKENS


def test_prompts_are_held_out_and_repeat() -> None:
    assert emoji.prompts(6, objects=2) == emoji.prompts(6, objects=2)
    assert emoji.prompts(6, objects=2, seed=1) != emoji.prompts(6, objects=2)
    with pytest.raises(ValueError, match="must name an emoji"):
        captions.parse("a small red circle")


# --- the judge -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [64, 128])
def test_clean_pictures_are_read_without_a_fault(size: int) -> None:
    pictures, texts = _drawn(60, size)
    found = emoji.score(pictures, texts)
    assert (found.mean, found.style, found.size, found.place) == (1.0, 1.0, 1.0, 1.0)
    assert found.clean == 1.0
    assert found.chance < 0.1


def test_pictures_of_other_prompts_are_right_by_chance_alone() -> None:
    pictures, texts = _drawn(60)
    found = emoji.score(np.roll(pictures, 3, axis=0), texts)
    assert found.mean < 2.5 * found.chance
    assert found.clean == 1.0


def test_damage_lowers_the_clean_share() -> None:
    pictures, texts = _drawn(30)
    blurred = [
        np.asarray(Image.fromarray((p * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(3)))
        / 255.0
        for p in pictures
    ]
    assert emoji.score(np.stack(blurred), texts).clean < 0.5
    blended = 0.5 * pictures + 0.5 * np.roll(pictures, 3, axis=0)
    assert emoji.score(blended, texts).clean < 0.1


def test_a_ground_alone_shows_nothing_and_a_stranger_is_noticed() -> None:
    one = scenes.SceneObject("cat", "noto", "small", "top left")
    for ground in scenes.GROUNDS:
        whole = scenes.render(scenes.Scene((one,), "green", ground), 128, np.random.default_rng(1))
        assert read(whole[64:, 64:]).objects == ()
        assert not read(whole[64:, 64:]).clean
        assert read(whole).clean
        whole[80:112, 80:112] = (0.1, 0.2, 0.9)
        assert read(whole).rest
        assert not read(whole).clean


# --- training ------------------------------------------------------------------------------


def test_the_recipe_trains_and_resumes(tmp_path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    bank = build_bank(build_vae(RECIPE.teacher), BankConfig(half=6, full=6), str, RECIPE)
    assert bank.latents[128].shape == (6, 16, 16, 16)
    save_bank(bank, tmp_path)
    assert load_bank(tmp_path, RECIPE).scenes == bank.scenes
    settings = TransformerTraining(steps=3, half_batch=2, full_batch=2, bfloat16=True)
    straight = Trainer(bank, settings, tmp_path / "a", RECIPE)
    losses = [straight.advance() for _ in range(3)]
    assert all(np.isfinite(losses))
    halves = Trainer(bank, settings, tmp_path / "b", RECIPE)
    halves.advance()
    halves.save()
    resumed = Trainer(bank, settings, tmp_path / "b", RECIPE)
    assert [resumed.advance() for _ in range(2)] == losses[1:]


def test_a_course_ends_with_a_pipeline_and_can_be_looked_at(tmp_path) -> None:
    torch.set_num_threads(1)
    course = replace(
        COURSE,
        bank=BankConfig(half=8, full=8),
        transformer=replace(COURSE.transformer, half_batch=2, full_batch=2),
        measure=lambda pipeline, count, report: {"count": count},
    )
    run, out = tmp_path / "run", tmp_path / "out"
    options = ["--run", str(run), "--out", str(out), "--steps", "1", "--count", "3"]
    main(["all", *options], course)
    facts = json.loads((out / "training.json").read_text())
    assert facts["command"].startswith("python -m fastdit.emoji.train all")
    assert facts["measured"] == {"count": 3}
    assert {stage: facts["stages"][stage]["steps"] for stage in facts["stages"]} == {
        "vae": 1,
        "compact": 1,
        "transformer": 1,
    }
    pipeline = emoji.load_pipeline(out)
    assert pipeline.transformer.config.in_channels == 16
    assert pipeline("a cat", num_inference_steps=1, output_type="np").images.shape == (
        1,
        128,
        128,
        3,
    )
    main(["look", *options], course)
    for name, height in (("vae", 512), ("samples", 256)):
        with Image.open(run / f"{name}.png") as picture:
            assert picture.size == (1024, height)


def test_the_shipped_model_draws_what_held_out_prompts_name() -> None:
    texts = [text for objects in (1, 2) for text in emoji.prompts(8, "test", objects, seed=3)]
    pictures = sample(emoji.load_pipeline(), texts, batch=16, num_inference_steps=14)
    found = emoji.score(pictures, texts)
    assert found.mean >= 0.9 > 5 * found.chance
    assert found.place >= 0.9
    assert found.clean >= 0.5


def test_missing_weights_are_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no weights of the emoji model"):
        emoji.load_pipeline(tmp_path)


def test_the_autoencoder_starts_with_edges_and_learns_scales() -> None:
    vae = RECIPE.start_vae()
    fresh = build_vae(RECIPE.teacher)
    own, other = vae.state_dict(), fresh.state_dict()
    name = "decoder.up_blocks.3.resnets.1.conv1.weight"
    assert own.keys() == other.keys()
    assert own[name].std() != other[name].std()
    settings = VaeTraining(batch=4)
    pictures = vae_batch(settings, 7, RECIPE)
    assert pictures.shape == (1, 3, 128, 128)
    losses = [
        vae_loss(
            vae, pictures, VaeTraining(batch=4, consistency=c), torch.Generator().manual_seed(0)
        )[0]
        for c in (0.0, 1.0)
    ]
    assert losses[1] > losses[0]
