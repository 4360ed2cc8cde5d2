"""benchmarks/tune.py up to the measurement itself: what it tries, chooses and writes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from triton_kernels import launch as table
from triton_kernels.launch import Launch

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "tune.py"
RULE, FAST, FASTER = Launch(1, 256, 1), Launch(1, 512, 2), Launch(2, 512, 4)


@pytest.fixture(scope="module")
def tune():
    spec = importlib.util.spec_from_file_location("tune", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here: it would measure")
def test_without_a_device_it_says_so_and_writes_nothing(tune):
    before = tune.FILE.read_bytes()
    path = os.pathsep.join(filter(None, (str(SCRIPT.parent), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path}
    command = [sys.executable, str(SCRIPT)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "no CUDA device: nothing was measured" in done.stderr
    assert tune.FILE.read_bytes() == before


def test_the_committed_table_is_what_it_would_write(tune):
    source = tune.FILE.read_text()
    assert tune.rewrite(source, table.TABLE) == source


def test_entries_are_sorted_and_read_back(tune):
    source = tune.FILE.read_text()
    entries = {("norm_modulate", 3072, 256, 90): FAST, ("gated_residual", 1152, 1024, 90): FASTER}
    written = tune.rewrite(source, entries)
    assert written == tune.rewrite(source, dict(reversed(entries.items())))
    assert written == tune.rewrite(written, entries)
    assert written.index('"gated_residual", 1152') < written.index('"norm_modulate", 3072')
    assert tune.rewrite(written, {}) == tune.rewrite(source, {})
    # Defined the way a module is, so that its dataclass can be.
    spec = importlib.util.spec_from_loader("rewritten", loader=None)
    module = importlib.util.module_from_spec(spec)
    sys.modules["rewritten"] = module
    try:
        exec(compile(written, "rewritten", "exec"), module.__dict__)
    finally:
        del sys.modules["rewritten"]
    found = module.launch_for("norm_modulate", 3072, 200, 90)
    assert (found.rows, found.cols, found.warps) == (1, 512, 2)
    assert module.launch_for("norm_modulate", 3072, 200, 80) == module.whole_rows(3072)


def test_a_file_without_markers_is_left_alone(tune):
    with pytest.raises(ValueError, match="markers"):
        tune.rewrite("TABLE = {}\n", {})


def test_the_rule_stays_where_nothing_is_clearly_faster(tune):
    assert tune.choose({RULE: 10.0, FAST: 9.9}, RULE) is None
    assert tune.choose({RULE: 10.0, FAST: 9.0, FASTER: 8.0}, RULE) == FASTER
    assert tune.choose({RULE: 10.0, FASTER: 8.0, FAST: 8.0}, RULE) == FAST


def test_attention_enters_only_where_it_beats_all_of_torch(tune):
    rivals = {"torch": 10.0, "cudnn": 9.0}
    assert tune.outruns(rivals | {FAST: 8.9}, set(rivals)) is None
    assert tune.outruns(rivals | {FAST: 9.5, RULE: 12.0}, set(rivals)) is None
    assert tune.outruns(rivals | {FAST: 8.0, FASTER: 7.0}, set(rivals)) == FASTER
    # A tile that could not run, and a rival that could not.
    assert tune.outruns(rivals, set(rivals)) is None
    assert tune.outruns({"torch": 10.0, FAST: 9.0}, {"torch", "flash"}) == FAST
    assert tune.outruns({FAST: 9.0}, {"torch"}) is None


def test_attention_is_tuned_at_the_sizes_of_the_models(tune):
    sizes = tune.model_sizes()
    assert (1, 24, 24, 1536, 4608, 128) in sizes  # FLUX with a quarter of its image tokens
    assert (2, 32, 8, 512, 4096, 72) in sizes  # Lumina-Next with an eighth
    key = ("sparse_attention", 128, 1, 24, 24, 1536, 4608)
    written = tune.rewrite(tune.FILE.read_text(), {(*key, 90): FAST, (*key, 80): RULE})
    assert written.index("4608, 80)") < written.index("4608, 90)")


def test_other_architectures_keep_their_entries(tune, monkeypatch):
    old = {("norm_modulate", 3072, 256, arch): RULE for arch in (80, 90)}
    monkeypatch.setattr(tune, "TABLE", old)
    new = {("gated_residual", 1152, 256, 90): FAST}
    assert tune.merge(new, 90) == {("norm_modulate", 3072, 256, 80): RULE} | new


def test_candidates_start_with_the_rule_and_hold_a_row(tune):
    for op, rule in table.RULES.items():
        for width in tune.WIDTHS:
            found = tune.candidates(op, width)
            assert found[0] == rule(width)
            assert len(found) == len(set(found))
            assert all(4 <= c.rows * c.cols // (32 * c.warps) <= 16 for c in found[1:])
