"""The search on a real pipeline of random weights: judges, worker processes, ranks, and the command."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("pymoo")

import fastdit
from fastdit.cli.distance import relative_l2
from fastdit.cli.search import load_pipeline
from fastdit.errors import ArgumentError, DependencyError, SearchError
from fastdit.search import Settings, Work, ecad, seeds
from fastdit.search.evaluator import Evaluator, Task
from fastdit.search.evolve import LEDGER
from fastdit.search.quality import make_quality
from fastdit.search.ray_actors import RayActors
from fastdit.search.workers import InProcess, Processes
from saved_clip import save_clip
from saved_pipelines import save_sd3

PROMPTS = ("a red circle", "a blue square", "a small green cross")
WORK = Work(PROMPTS, steps=3, batch=2)
SETTINGS = Settings(generations=1, population=6, race=1)
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_sd3(tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory) -> Path:
    """The result of a search in this process."""
    out = tmp_path_factory.mktemp("alone")
    ecad(functools.partial(load_pipeline, folder, "float32"), out, WORK, SETTINGS)
    return out


def ledger_of(out: Path) -> list[str]:
    return sorted((out / LEDGER).read_text().splitlines())


def test_paired_losses_are_distances_to_the_unpatched_pictures(folder):
    evaluator = Evaluator(functools.partial(load_pipeline, folder, "float32"), WORK)
    vector = seeds.fora(evaluator.genome, 3)
    found = evaluator.measure(Task("any", "losses", evaluator.genome.to_bytes(vector), 3, 0, 3))

    pipeline = load_pipeline(folder, "float32")

    def draw() -> list[np.ndarray]:
        return [
            pipeline(
                prompt,
                num_inference_steps=3,
                generator=torch.Generator().manual_seed(item),
                output_type="np",
            ).images[0]
            for item, prompt in enumerate(PROMPTS)
        ]

    plain = draw()
    handle = fastdit.patch(pipeline, fastdit.Cached(fastdit.Schedule.every(3)))
    expected = [relative_l2(*pair) for pair in zip(draw(), plain, strict=True)]
    np.testing.assert_allclose(found["losses"], expected, rtol=1e-3, atol=1e-6)
    assert min(expected) > 1e-4
    predicted = handle.explain(steps=3)
    assert found["costs"] == {"macs": predicted.linear_macs, "true-macs": predicted.macs}
    assert not any("forward" in vars(b) for b in evaluator.pipeline.transformer.transformer_blocks)


def test_worker_processes_find_the_same_and_end(folder, alone, tmp_path):
    factory = functools.partial(load_pipeline, folder, "float32")
    with closing(Processes(factory, WORK, 2)) as workers:
        ecad(factory, tmp_path, WORK, SETTINGS, workers=workers)
        processes = list(workers.processes)
        assert ledger_of(tmp_path) == ledger_of(alone)
        wrong = Task("any", "losses", b"too few bits", 3, 0, 1)
        with pytest.raises(fastdit.errors.ScheduleError, match="cannot hold"):
            list(workers.run([wrong]))
        processes[0].kill()
        processes[0].join()
        with pytest.raises(SearchError, match="exit code -9"):
            list(workers.run([wrong]))
    assert not any(process.is_alive() for process in processes)


def test_ranks_find_the_same(folder, alone, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n\n".join(PROMPTS))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "fastdit", "search", "--model", folder, "--prompts", prompts]
    command += ["--out", tmp_path / "out", "--steps", "3", "--batch", "2", "--population", "6"]
    command += ["--generations", "1", "--race", "1", "--dtype", "float32"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    assert ledger_of(tmp_path / "out") == ledger_of(alone)
    assert done.stdout.count("fastdit search") == 1  # one rank speaks


def test_ray_actors_find_the_same(folder, alone, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    factory = functools.partial(load_pipeline, folder, "float32")
    with closing(RayActors(factory, WORK, 2)) as workers:
        ecad(factory, tmp_path, WORK, SETTINGS, workers=workers)
        assert ledger_of(tmp_path) == ledger_of(alone)
        wrong = Task("any", "losses", b"too few bits", 3, 0, 1)
        with pytest.raises(fastdit.errors.ScheduleError, match="cannot hold"):
            list(workers.run([wrong]))
        for actor in workers.actors:
            ray.kill(actor)
        with pytest.raises(SearchError, match="actor ended"):
            list(workers.run([wrong]))
    assert not ray.is_initialized()


def test_a_pipeline_object_stays_in_its_process(folder, tmp_path):
    pipeline = load_pipeline(folder, "float32")
    with pytest.raises(ArgumentError, match="workers=2 needs a function"):
        ecad(pipeline, tmp_path, WORK, SETTINGS, workers=2)
    threads = torch.get_num_threads()
    with closing(InProcess(lambda: pipeline, WORK)) as workers:
        assert workers.facts()["family"] == "sd3"
    assert torch.get_num_threads() == threads
    assert not list(tmp_path.iterdir())


def test_extras_that_are_missing_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DependencyError, match=r"pip install fastdit\[search,ray\]"):
        RayActors(load_pipeline, WORK, 1)
    monkeypatch.setitem(sys.modules, "pymoo", None)
    with pytest.raises(DependencyError, match=r"pip install fastdit\[search\]"):
        ecad(load_pipeline, "nowhere", WORK)
    assert not Path("nowhere").exists()


# ---- judges


def test_qualities_say_what_is_missing(tmp_path):
    with pytest.raises(ArgumentError, match="quality must be one of"):
        make_quality("beauty")
    with pytest.raises(ArgumentError, match="needs quality_path"):
        make_quality("clip")
    with pytest.raises(ArgumentError, match=r"has no config.json.*nothing is downloaded"):
        make_quality("clip", tmp_path)
    with pytest.raises(ArgumentError, match="is not a folder"):
        make_quality("clip", tmp_path / "missing")


def test_task_judges_by_the_prompt():
    from fastdit import tiny

    scene = tiny.scenes.sample_scene(np.random.default_rng(0), objects=1)
    image, prompt = tiny.scenes.render(scene), tiny.captions.write(scene)
    quality = make_quality("task")
    assert quality.losses(np.stack([image, np.ones_like(image)]), [prompt] * 2, None) == [0, 1]
    with pytest.raises(ArgumentError, match="embedded model only"):
        quality.losses(image[None], ["a fox in the snow"], None)


def test_clip_reads_a_local_folder(tmp_path):
    model, words, pictures = save_clip(tmp_path)
    images = np.random.default_rng(0).random((2, 48, 48, 3)).astype(np.float32)
    quality = make_quality("clip", tmp_path)
    found = quality.losses(images, ["a red circle", "a square"], None)
    embedded = quality.embeddings(images)

    pixels = pictures(images=[(i * 255).round().astype(np.uint8) for i in images])
    pixels = torch.tensor(np.stack(pixels["pixel_values"]))
    with torch.no_grad():
        for row, prompt in enumerate(["a red circle", "a square"]):
            ids = words(prompt, return_tensors="pt")["input_ids"]
            out = model(pixel_values=pixels[row : row + 1], input_ids=ids)
            cosine = (out.image_embeds * out.text_embeds).sum() / (
                out.image_embeds.norm() * out.text_embeds.norm()
            )
            assert found[row] == pytest.approx(1 - float(cosine), abs=1e-5)
            wanted = out.image_embeds[0] / out.image_embeds[0].norm()
            np.testing.assert_allclose(embedded[row], wanted, atol=1e-5)


def test_image_reward_reads_the_released_layout(tmp_path):
    """A checkpoint of random weights under the released names, scored beside transformers' own modules."""
    from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig, BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    torch.manual_seed(0)
    small = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2}
    vision = BlipVisionModel(
        BlipVisionConfig(
            **small, num_attention_heads=2, image_size=32, patch_size=16, layer_norm_eps=1e-6
        )
    ).eval()
    text_config = BlipTextConfig(
        **{**small, "hidden_size": 64},
        vocab_size=8,
        num_attention_heads=1,
        encoder_hidden_size=128,
    )
    text = BlipTextModel(text_config, add_pooling_layer=False).eval()
    head = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.Dropout(), torch.nn.Linear(8, 1))
    for module in (vision, text, head):
        for weight in module.parameters():
            torch.nn.init.normal_(weight, std=0.2)
    names = {
        "embeddings.patch_embedding": "patch_embed.proj",
        "embeddings.position_embedding": "pos_embed",
        "embeddings.class_embedding": "cls_token",
        "post_layernorm": "norm",
        "encoder.layers": "blocks",
        "self_attn.projection": "attn.proj",
        "self_attn": "attn",
        "layer_norm": "norm",
    }
    weights = {}
    for name, tensor in vision.state_dict().items():
        for ours, released in names.items():
            name = name.replace(ours, released)
        weights[f"blip.visual_encoder.{name}"] = tensor
    weights |= {f"blip.text_encoder.{name}": t for name, t in text.state_dict().items()}
    weights |= {f"mlp.layers.{name}": t for name, t in head.state_dict().items()}
    weights["blip.vision_proj.weight"] = torch.zeros(2, 2)  # not needed
    torch.save(weights, tmp_path / "ImageReward.pt")
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nred\ncircle\n")

    images = np.random.default_rng(0).random((2, 32, 32, 3)).astype(np.float32)
    prompts = ["a red circle", "a circle"]
    found = make_quality("image-reward", tmp_path).losses(images, prompts, None)

    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    words = BertTokenizer.from_pretrained(tmp_path)
    assert words("a Red circle")["input_ids"] == [2, 5, 6, 7, 3]
    for image, prompt, loss in zip(images, prompts, found, strict=True):
        pixels = torch.tensor((image * 255).round() / 255).permute(2, 0, 1)[None]
        pixels = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        with torch.no_grad():
            seen = vision(pixel_values=pixels.float()).last_hidden_state
            ids = words(prompt, return_tensors="pt")["input_ids"]
            read = text(input_ids=ids, encoder_hidden_states=seen)
            score = float(head.eval()(read.last_hidden_state[:, 0]))
        assert loss == pytest.approx(1 - (score - 0.16717362830052426) / 1.0333394966054072, 1e-4)
    assert found[0] != pytest.approx(found[1], 1e-3)

    torch.save({"other": torch.zeros(1)}, tmp_path / "ImageReward.pt")
    with pytest.raises(
        ArgumentError, match=r"not the released checkpoint.*no blip\.visual_encoder"
    ):
        make_quality("image-reward", tmp_path)


# ---- the command


def test_the_command_spares_what_the_paper_does(tmp_path, monkeypatch):
    """Multiply-accumulates of linear layers, unless another cost is asked for."""
    from typer.testing import CliRunner

    from fastdit.cli import commands

    asked = []
    monkeypatch.setattr("fastdit.cli.search.run", lambda *given: asked.append(given[4].costs))
    for more in ([], ["--cost", "true-macs"]):
        arguments = ["search", "--out", str(tmp_path / "out"), *more]
        found = CliRunner().invoke(commands.app, arguments)
        assert found.exit_code == 0, found.output
    assert asked == [("macs",), ("true-macs",)]


def test_command(folder, tmp_path):
    from typer.testing import CliRunner

    from fastdit.cli import commands

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS[:2]))
    out = tmp_path / "out"
    seed = tmp_path / "seed.json"
    genome = Evaluator(functools.partial(load_pipeline, folder, "float32"), WORK).genome
    genome.schedule(seeds.fora(genome, 2)).save(seed)
    arguments = ["search", "--model", folder, "--prompts", prompts, "--out", out, "--steps", 3]
    arguments += ["--population", 4, "--generations", 1, "--seed-schedule", seed]
    arguments += ["--cost", "latency", "--cost", "true-macs"]
    runner = CliRunner(env={"COLUMNS": "80", "TERM": "dumb"})
    first = runner.invoke(commands.app, [str(argument) for argument in arguments])
    assert first.exit_code == 0, first.output
    assert "1 generations" in first.output
    summary = (out / "search.json").read_text()
    front = json.loads(summary)["front"]
    assert {"loss", "latency", "true-macs"} <= set(front[0])
    again = runner.invoke(commands.app, [str(argument) for argument in arguments])
    assert again.exit_code == 0, again.output
    assert (out / "search.json").read_text() == summary
    refused = runner.invoke(commands.app, [str(a) for a in [*arguments, "--image-seed", 1]])
    assert refused.exit_code == 2
    assert "belongs to another search" in refused.output
    refused = runner.invoke(commands.app, [str(a) for a in [*arguments, "--unit", "block"]])
    assert refused.exit_code == 2
    assert "unit must be one of bit, step" in refused.output


def test_more_threads_or_workers_than_a_machine_has_are_refused(folder, tmp_path):
    with pytest.raises(ArgumentError, match="threads must be at most 1024"):
        Work(("a",), threads=10**6)
    for seed in (-1, 2**63, 1.5):
        with pytest.raises(ArgumentError, match="seed must be"):
            Work(("a",), seed=seed)
    with pytest.raises(ArgumentError, match="workers must be from 1 to 1024"):
        ecad(functools.partial(load_pipeline, folder, "float32"), tmp_path, WORK, workers=10**6)
