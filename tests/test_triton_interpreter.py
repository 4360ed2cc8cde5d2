"""The Triton kernels without a GPU: all op checks, their own and planted faults, interpreted.

Triton decides at import whether it compiles or interprets, so this starts one process with
TRITON_INTERPRET=1. In it the backend `triton` serves CPU tensors, and the op tests pick it up.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastdit import ops

HERE = Path(__file__).parent
# The op tests size their repeats for compiled kernels; test_triton_kernels.py has smaller ones.
SELECTION = "triton and not triton-check_repeats"
#: of ops whose checks take minutes, those that take seconds; `make kernels` runs the others
SHORT = {
    "test_norm_modulate.py": "not check_branch and not check_rows",
    "test_qkv_prologue.py": "check_constant_heads or check_special_values or check_empty",
    "test_token_select.py": "check_all_equal or check_a_bounded_age or check_empty",
    "test_resolution_transition.py": "check_numbers or check_a_published_vector or check_larger_tokens "
    "or check_special_values or check_empty",
    "test_sparse_attention.py": "check_groups or check_scale or check_every_key_is_read or check_impossible_keys",
    "test_triton_kernels.py": "not check_more_tiles_than_partial_sums and not check_model_widths "
    "and not however_the_keys_are_shared",
}
#: by file; those of ops whose checks are all quick are whole
QUICK = {f"test_{op}.py": "" for op in ops.FILES} | {
    file: f" and ({c})" for file, c in SHORT.items()
}
LONG = {file: f" and not ({c})" for file, c in SHORT.items()} | {"test_triton_faults.py": ""}
# A process takes seconds to begin, so the quick ones share two.
RUNS = (
    *({file: QUICK[file] for file in list(QUICK)[first::2]} for first in range(2)),
    *(pytest.param({file: checks}, marks=pytest.mark.kernels) for file, checks in LONG.items()),
)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed (triton==3.7.1)"
)
@pytest.mark.parametrize("selections", RUNS, ids=lambda run: ", ".join(run))
def test_kernels_in_the_interpreter(selections, tmp_path):
    path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    environment.pop("FASTDIT_BACKEND", None)
    selection = " or ".join(f"({file}{checks})" for file, checks in selections.items())
    command = [sys.executable, "-m", "pytest", "-v", "-p", "interpreter"]
    command += ["-k", f"{SELECTION} and ({selection})"]
    command += ["-o", f"cache_dir={tmp_path}", *(str(HERE / file) for file in selections)]
    # Not in the checkout: `python -m` would import the package from there.
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    for file in selections:
        assert re.search(rf"\b{file}::.* PASSED", done.stdout), file
