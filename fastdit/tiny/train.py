"""Command line of the tiny model's training: ``python -m fastdit.tiny.train STAGE``.

Stages, in order: ``vae``, ``compact`` (the smaller autoencoder that is shipped),
``transformer`` (which first encodes a bank of scenes) and ``export``; ``all`` does them all.
Each resumes from what the run's folder holds. The work is done in the modules named after the
stages; this file only wires them together.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .bank import Bank, BankConfig, build_bank, load_bank, save_bank
from .compact_vae import CompactTraining, train_compact
from .train_transformer import TransformerTraining, train_transformer
from .train_vae import VaeTraining, train_vae

STAGES = ("vae", "compact", "transformer", "export", "all")


def _report(line: str) -> None:
    print(line, flush=True)


def _bank(folder: Path, seed: int) -> Bank:
    """The run's bank is built at first use."""
    from .export import load_vae

    bank = load_bank(folder)
    if bank is None:
        bank = build_bank(load_vae(folder, "vae"), BankConfig(seed=seed), _report)
        save_bank(bank, folder)
    return bank


def run_vae(options: argparse.Namespace) -> None:
    """This trains the autoencoder."""
    config = VaeTraining(seed=options.seed, steps=options.steps)
    if options.minutes is not None:
        config = replace(config, minutes=options.minutes)
    vae = train_vae(config, options.run, _report)
    _report(f"latents scaled by {vae.config.scaling_factor:.4f}")


def run_compact(options: argparse.Namespace) -> None:
    """This trains the autoencoder that is shipped."""
    from .export import load_vae

    config = CompactTraining(seed=options.seed, steps=options.steps)
    if options.minutes is not None:
        config = replace(config, minutes=options.minutes)
    train_compact(load_vae(options.run, "vae"), config, options.run, _report)


def run_transformer(options: argparse.Namespace) -> None:
    """This trains the denoiser and the text encoders."""
    config = TransformerTraining(seed=options.seed, steps=options.steps)
    if options.minutes is not None:
        config = replace(config, minutes=options.minutes)
    train_transformer(_bank(Path(options.run), options.seed), config, options.run, _report)


def _provenance(options: argparse.Namespace, measured: dict[str, Any]) -> dict[str, Any]:
    stages = {}
    for stage in ("vae", "compact", "transformer"):
        facts = json.loads((Path(options.run) / stage / "state.json").read_text())
        stages[stage] = {
            "steps": facts["step"],
            "minutes": round(facts["seconds"] / 60.0, 1),
            "settings": facts["config"],
        }
    command = f"python -m fastdit.tiny.train all --seed {options.seed}"
    return {"command": command, "stages": stages, "measured": measured}


def run_export(options: argparse.Namespace) -> None:
    """This writes the pipeline folder, measures it on held-out prompts and notes how it was made."""
    from .evaluate import evaluate, figures
    from .export import assemble, export, load_denoiser, load_vae
    from .pipeline import load_pipeline

    out = Path(options.out)
    export(assemble(load_vae(options.run), load_denoiser(options.run)), out)
    pipeline = load_pipeline(out)
    measured = {}
    for objects in (1, 2):
        # Other prompts than those of seed 0, on which the default guidance was chosen.
        result, _ = evaluate(pipeline, objects, options.count, seed=1)
        measured[f"objects_{objects}"] = figures(result, options.count)
        _report(f"{objects} object(s): {measured[f'objects_{objects}']}")
    facts = _provenance(options, measured)
    (out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")


def main(arguments: list[str] | None = None) -> None:
    """This parses ``arguments`` (the process's own if not given) and runs the stage they name."""
    from . import assets_path

    parser = argparse.ArgumentParser(prog="python -m fastdit.tiny.train", description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--run", default="tiny_run", help="folder of checkpoints")
    parser.add_argument("--out", default=str(assets_path()), help="folder export writes to")
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
    }
    for name in stages if options.stage == "all" else [options.stage]:
        stages[name](options)


if __name__ == "__main__":
    main()
