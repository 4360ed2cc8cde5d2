"""What is installed, and what was imported: the wheel and not the checkout, without torch or CUDA.

With FASTDIT_TEST_INSTALLED=1, as `make test` sets it, the package under test must be the installed
wheel. Without it (an editable install) only the tests of contents and of the build are made.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import fastdit
import fastdit.tiny
from fastdit import _C
from fastdit.errors import DependencyError

ROOT = Path(__file__).resolve().parents[1]
SITE = Path(sysconfig.get_paths()["platlib"]).resolve()
INSTALLED = os.environ.get("FASTDIT_TEST_INSTALLED") == "1"
wheel_only = pytest.mark.skipif(not INSTALLED, reason="FASTDIT_TEST_INSTALLED is not set")

# PYTHONPATH may name an old diffusers, which is of no concern here.
CLEAN = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "FASTDIT_BACKEND")}


def python(code: str, folder: Path, **environment: str) -> str:
    """Run code in a fresh interpreter in `folder`; -I keeps folder and environment off its path."""
    command = [sys.executable, "-I", "-c", code]
    done = subprocess.run(
        command, cwd=folder, env={**CLEAN, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@wheel_only
@pytest.mark.parametrize("name", ["fastdit", "fastdit._C", "fastdit.ops", "triton_kernels"])
def test_modules_come_from_the_wheel(name):
    file = Path(importlib.import_module(name).__file__).resolve()
    assert file.is_relative_to(SITE), file


@wheel_only
def test_wheel_lists_every_source_file_and_nothing_else():
    files = {str(f) for f in importlib.metadata.files("fastdit")}
    listed = {f for f in files if f.startswith(("fastdit/", "triton_kernels/"))}
    expected = {
        str(path.relative_to(ROOT))
        for package in ("fastdit", "triton_kernels")
        for path in (ROOT / package).rglob("*.py")
    }
    for data in ("fastdit/books", "fastdit/emoji/assets", "fastdit/tiny/assets", "fastdit/presets"):
        expected |= {str(p.relative_to(ROOT)) for p in (ROOT / data).rglob("*") if p.is_file()}
    expected.add("fastdit/evaluate/page.html")
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    built = {f for f in listed if f.endswith(".so")}
    sources = {f for f in listed if not f.endswith((".so", ".pyc"))}
    assert sources == expected
    assert f"fastdit/_C{suffix}" in built
    assert built <= {f"fastdit/_C{suffix}", f"fastdit/_cuda{suffix}"}


def test_import_from_an_empty_folder(tmp_path):
    file = python("import fastdit, fastdit.ops; print(fastdit.__file__)", tmp_path)
    assert Path(file).samefile(fastdit.__file__)


def test_a_source_folder_says_that_it_has_no_kernels(tmp_path):
    """Python started in a checkout imports its folder, not the wheel; plain torch then runs, but not in silence."""
    package = Path(fastdit.__file__).parent
    unwanted = shutil.ignore_patterns("*.so", "assets", "__pycache__")
    shutil.copytree(package, tmp_path / "fastdit", ignore=unwanted)
    code = (
        "import sys, warnings; sys.path.insert(0, '.')\n"
        "with warnings.catch_warnings(record=True) as found:\n    import fastdit\n"
        "print(*(each.message for each in found))"
    )
    said = python(code, tmp_path)
    assert f"fastdit._C is not in {tmp_path / 'fastdit'}" in said
    assert "outside of its source folder" in said


def test_console_script(tmp_path):
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="fastdit")
    assert entry.value == "fastdit.cli:main"
    script = Path(sysconfig.get_paths()["scripts"]) / "fastdit"
    done = subprocess.run([script, "--help"], cwd=tmp_path, env=CLEAN, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_import_brings_neither_diffusers_nor_triton(tmp_path):
    code = (
        "import sys, fastdit, fastdit.ops; "
        "print([m for m in ('diffusers', 'transformers', 'triton', 'matplotlib', 'typer', 'rich', 'pymoo') "
        "if m in sys.modules])"
    )
    assert python(code, tmp_path) == "[]"


def test_the_command_line_says_what_it_misses(tmp_path):
    code = "import sys; sys.modules['typer'] = None; from fastdit.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "pip install 'fastdit[cli]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_model_in_the_package_says_what_it_misses(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(DependencyError, match=r"needs transformers.*fastdit\[cli\]"):
        fastdit.tiny.load_pipeline()


def test_cuda_module_imports_without_a_driver(tmp_path):
    cuda = pytest.importorskip("fastdit._cuda", reason="built without CUDA")
    info = cuda.info()
    assert info["cudart"] >= 12000
    assert bool(info["error"]) == (info["devices"] == 0)
    # And on a machine that hides its devices, whether it has a driver or not.
    code = "from fastdit import _cuda; print(_cuda.info()['devices'])"
    assert python(code, tmp_path, CUDA_VISIBLE_DEVICES="") == "0"


def test_one_openmp_runtime():
    """torch brings libgomp; a second copy beside it would double the threads."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc")
    assert torch.__version__
    assert _C.build_info()["openmp"]
    loaded = set(re.findall(r"\S*/libgomp[^/\s]*", maps.read_text()))
    assert len(loaded) == 1, loaded


def test_csrc_includes_no_torch_header():
    wrong = re.compile(r"#\s*include\s*[<\"](torch|ATen|c10|caffe2)/")
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.is_file()]
    assert sources
    assert not [p.name for p in sources if wrong.search(p.read_text())]
    assert "torch" not in (ROOT / "CMakeLists.txt").read_text().split("project(")[1]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FASTDIT_CUDA": "bogus"}, "FASTDIT_CUDA='bogus' is not understood: use 0, 1 or auto"),
        ({"FASTDIT_CUDA": "1", "PATH": "", "CUDA_HOME": "", "CUDA_PATH": ""}, "FASTDIT_CUDA=1"),
    ],
    ids=["bogus", "no nvcc"],
)
def test_setup_refuses_what_it_cannot_build(environment, message, tmp_path):
    if "PATH" in environment and Path("/usr/local/cuda/bin/nvcc").exists():
        pytest.skip("nvcc stands at a place that PATH does not hide")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext"],
        cwd=tmp_path,
        env={**CLEAN, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert message in done.stderr
