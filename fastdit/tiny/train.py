"""Command line of the tiny model's training: ``python -m fastdit.tiny.train STAGE``.

Stages, in order: ``vae``, ``compact`` (the autoencoder that is shipped),
``transformer`` (which first encodes a bank of scenes) and ``export``; ``all`` does them all.
Each resumes from what the run's folder holds. The work is done in the modules named after the
stages; this file only wires them together, for any recipe.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .bank import Bank, BankConfig, build_bank, load_bank, save_bank
from .compact_vae import CompactTraining, train_compact
from .recipe import Recipe
from .shapes import SHAPES_RECIPE
from .train_transformer import TransformerTraining, train_transformer
from .train_vae import VaeTraining, train_vae

if TYPE_CHECKING:
    from .pipeline import TinySD3Pipeline

STAGES = ("vae", "compact", "transformer", "export")


@dataclass(frozen=True)
class Course:
    """A model is trained by a recipe with these settings.

    Attributes
    ----------
    recipe : Recipe
        Its sizes and scenes.
    vae, compact, bank, transformer
        Settings of the stages.
    measure : callable
        ``measure(pipeline, count, report)`` gives figures on held-out prompts, for JSON.
    assets : Path
        Where ``export`` writes to unless told otherwise.
    """

    recipe: Recipe
    vae: VaeTraining
    compact: CompactTraining
    bank: BankConfig
    transformer: TransformerTraining
    measure: Callable[[TinySD3Pipeline, int, Callable[[str], None]], dict[str, Any]]
    assets: Path


def _measure(
    pipeline: TinySD3Pipeline, count: int, report: Callable[[str], None]
) -> dict[str, Any]:
    from .evaluate import evaluate, figures

    measured = {}
    for objects in (1, 2):
        # Other prompts than those of seed 0, on which the default guidance was chosen.
        result, _ = evaluate(pipeline, objects, count, seed=1)
        measured[f"objects_{objects}"] = figures(result, count)
        report(f"{objects} object(s): {measured[f'objects_{objects}']}")
    return measured


COURSE = Course(
    SHAPES_RECIPE,
    VaeTraining(),
    CompactTraining(),
    BankConfig(),
    TransformerTraining(),
    _measure,
    Path(__file__).parent / "assets",
)


def _report(line: str) -> None:
    print(line, flush=True)


def _settings(stage: Any, options: argparse.Namespace) -> Any:
    """The settings of a stage follow the command line."""
    changed = replace(stage, seed=options.seed, steps=options.steps)
    return changed if options.minutes is None else replace(changed, minutes=options.minutes)


def _bank(course: Course, folder: Path, seed: int) -> Bank:
    """The run's bank is built at first use."""
    from .export import load_vae

    bank = load_bank(folder, course.recipe)
    if bank is None:
        vae = load_vae(folder, "vae", course.recipe)
        bank = build_bank(vae, replace(course.bank, seed=seed), _report, course.recipe)
        save_bank(bank, folder)
    return bank


def run_vae(course: Course, options: argparse.Namespace) -> None:
    """This trains the autoencoder."""
    vae = train_vae(_settings(course.vae, options), options.run, _report, course.recipe)
    _report(f"latents scaled by {vae.config.scaling_factor:.4f}")


def run_compact(course: Course, options: argparse.Namespace) -> None:
    """This trains the autoencoder that is shipped."""
    from .export import load_vae

    teacher = load_vae(options.run, "vae", course.recipe)
    train_compact(teacher, _settings(course.compact, options), options.run, _report, course.recipe)


def run_transformer(course: Course, options: argparse.Namespace) -> None:
    """This trains the denoiser and the text encoders."""
    bank = _bank(course, Path(options.run), options.seed)
    train_transformer(
        bank, _settings(course.transformer, options), options.run, _report, course.recipe
    )


def _provenance(
    course: Course, options: argparse.Namespace, measured: dict[str, Any]
) -> dict[str, Any]:
    stages = {}
    for stage in ("vae", "compact", "transformer"):
        facts = json.loads((Path(options.run) / stage / "state.json").read_text())
        stages[stage] = {
            "steps": facts["step"],
            "minutes": round(facts["seconds"] / 60.0, 1),
            "settings": facts["config"],
        }
    command = f"python -m fastdit.{course.recipe.name}.train all --seed {options.seed}"
    return {"command": command, "stages": stages, "measured": measured}


def run_export(course: Course, options: argparse.Namespace) -> None:
    """This writes the pipeline folder, measures it on held-out prompts and notes how it was made."""
    from .export import assemble, export, load_denoiser, load_vae
    from .pipeline import load_pipeline

    out = Path(options.out)
    vae = load_vae(options.run, recipe=course.recipe)
    export(assemble(vae, load_denoiser(options.run, course.recipe.sizes)), out)
    measured = course.measure(load_pipeline(out), options.count, _report)
    facts = _provenance(course, options, measured)
    (out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")


@torch.no_grad()
def run_look(course: Course, options: argparse.Namespace) -> None:
    """This draws what the run's parts can do so far into ``vae.png`` and ``samples.png`` in its folder.

    In the former, rows of scenes and of what is left of them take turns.
    """
    from .evaluate import sample, save_sheet
    from .export import assemble, load_denoiser, load_vae

    folder, recipe = Path(options.run), course.recipe
    stage = "compact" if (folder / "compact" / "state.json").exists() else "vae"
    vae = load_vae(folder, stage, recipe)
    rng = np.random.default_rng(11)
    scenes = [recipe.sample(rng, 0.4) for _ in range(16)]
    drawn = np.stack([recipe.render(scene, 128, rng) for scene in scenes])
    latents = vae.encode(torch.from_numpy(drawn).permute(0, 3, 1, 2) * 2.0 - 1.0).latent_dist.mean
    again = (vae.decode(latents).sample / 2.0 + 0.5).clamp(0.0, 1.0).permute(0, 2, 3, 1).numpy()
    psnr = -10.0 * np.log10(np.square(again - drawn).mean())
    _report(f"{stage}: {psnr:.1f} dB")
    rows = [drawn[:8], again[:8], drawn[8:], again[8:]]
    save_sheet(np.concatenate(rows), folder / "vae.png")
    if (folder / "transformer" / "state.json").exists():
        pipeline = assemble(vae, load_denoiser(folder, recipe.sizes))
        texts = [recipe.caption(scene, rng, True, 0.0) for scene in scenes]
        save_sheet(sample(pipeline, texts, batch=16), folder / "samples.png")
        _report("\n".join(texts))


def main(arguments: list[str] | None = None, course: Course = COURSE) -> None:
    """This parses ``arguments`` (the process's own if not given) and runs the stage they name."""
    parser = argparse.ArgumentParser(
        prog=f"python -m fastdit.{course.recipe.name}.train", description=__doc__
    )
    parser.add_argument("stage", choices=(*STAGES, "all", "look"))
    parser.add_argument("--run", default=f"{course.recipe.name}_run", help="folder of checkpoints")
    parser.add_argument("--out", default=str(course.assets), help="folder export writes to")
    parser.add_argument("--minutes", type=float, help="time budget of the stage")
    parser.add_argument("--steps", type=int, help="number of steps, instead of a time budget")
    parser.add_argument("--count", type=int, default=200, help="prompts export measures, each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="torch threads")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    # Nearly vanished gradients become denormal numbers, on which many processors are slow.
    torch.set_flush_denormal(True)
    stages = {
        "vae": run_vae,
        "compact": run_compact,
        "transformer": run_transformer,
        "export": run_export,
        "look": run_look,
    }
    for name in STAGES if options.stage == "all" else [options.stage]:
        stages[name](course, options)


if __name__ == "__main__":
    main()
