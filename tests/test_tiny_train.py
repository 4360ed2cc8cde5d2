"""Training of the tiny model: a run that stops and resumes ends with the same weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdit.tiny.bank import BankConfig, build_bank, load_bank, save_bank
from fastdit.tiny.models import build_vae
from fastdit.tiny.train_transformer import Trainer, TransformerTraining, make_batch
from fastdit.tiny.train_vae import VaeTraining, train_vae


def _silent(line: str) -> None:
    """Drop progress lines."""


@pytest.fixture(scope="module")
def bank():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return build_bank(build_vae(), BankConfig(half=12, full=4), _silent)


SETTINGS = TransformerTraining(steps=4, half_batch=4, full_batch=2, half_share=0.5)


def _weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    live = {name: parameter.detach() for parameter, name in trainer.names.items()}
    return live | {f"average.{name}": value for name, value in trainer.average.items()}


def test_transformer_stage_resumes_identically(bank, tmp_path: Path) -> None:
    straight = Trainer(bank, SETTINGS, tmp_path / "straight")
    losses = [straight.advance() for _ in range(4)]
    assert all(np.isfinite(losses))
    halves = Trainer(bank, SETTINGS, tmp_path / "halves")
    halves.advance()
    halves.advance()
    halves.save()
    resumed = Trainer(bank, SETTINGS, tmp_path / "halves")
    assert resumed.step == 2
    assert [resumed.advance(), resumed.advance()] == losses[2:]
    expected, got = _weights(straight), _weights(resumed)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_both_sizes_and_empty_captions_occur(bank) -> None:
    settings = replace(SETTINGS, null_share=0.3)
    batches = [make_batch(bank, settings, step) for step in range(20)]
    assert {latents.shape[-1] for latents, _ in batches} == {16, 32}
    texts = [text for _, some in batches for text in some]
    assert "" in texts
    assert len(set(texts)) > 10


def test_bank_round_trip(bank, tmp_path: Path) -> None:
    assert load_bank(tmp_path) is None
    save_bank(bank, tmp_path)
    again = load_bank(tmp_path)
    assert again.scenes == bank.scenes
    assert all(torch.equal(again.latents[size], bank.latents[size]) for size in bank.latents)
    assert {scene.split for some in bank.scenes.values() for scene in some} == {"train"}


def test_vae_stage_resumes_identically(tmp_path: Path) -> None:
    settings = VaeTraining(steps=3, batch=2, save_every=2)
    straight = train_vae(settings, tmp_path / "straight", _silent)
    # A run that stopped at a checkpoint: same folder, first with fewer steps allowed to pass.
    stopped = _StopAt(2)
    with pytest.raises(KeyboardInterrupt):
        train_vae(replace(settings, log_every=1), tmp_path / "halves", stopped)
    resumed = train_vae(settings, tmp_path / "halves", _silent)
    expected, got = straight.state_dict(), resumed.state_dict()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert straight.config.scaling_factor == resumed.config.scaling_factor


class _StopAt:
    """A reporter that interrupts training after some lines, as a user would."""

    def __init__(self, lines: int) -> None:
        self.lines = lines

    def __call__(self, line: str) -> None:
        self.lines -= 1
        if self.lines < 0:
            raise KeyboardInterrupt
