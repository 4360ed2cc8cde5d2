"""`pip install .` compiles csrc through CMake and ninja; the metadata is in pyproject.toml.

Environment:
  FASTDIT_CUDA        0, 1 or auto (default): with nvcc, without, or whether one is found.
  FASTDIT_CUDA_ARCHS  CMAKE_CUDA_ARCHITECTURES, e.g. "90a-real" for a quick build for one GPU.
  FASTDIT_BUILD_DIR   keep the build tree here (it holds build.log); a temporary one otherwise.
  MAX_JOBS            compile jobs; the number of usable cores otherwise.
  CMAKE_ARGS          handed to cmake as they are.

No torch is needed to build: csrc sees plain pointers, never a torch header. No driver is needed to
import the result: cudart is linked statically and libcuda not at all.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_nvcc() -> str | None:
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and (Path(home) / "bin/nvcc").exists():
            return str(Path(home) / "bin/nvcc")
    usual = Path("/usr/local/cuda/bin/nvcc")
    return shutil.which("nvcc") or (str(usual) if usual.exists() else None)


def chosen_nvcc() -> str | None:
    """The nvcc to build with, or None for a build without CUDA."""
    mode = os.environ.get("FASTDIT_CUDA", "auto").strip().lower()
    if mode not in ("0", "1", "auto"):
        sys.exit(f"FASTDIT_CUDA={mode!r} is not understood: use 0, 1 or auto")
    if mode == "0":
        return None
    nvcc = find_nvcc()
    if mode == "1" and nvcc is None:
        sys.exit(
            "FASTDIT_CUDA=1, but CUDA_HOME, CUDA_PATH, PATH and /usr/local/cuda have no nvcc: "
            "install the CUDA toolkit, or build without CUDA by FASTDIT_CUDA=0"
        )
    return nvcc


class CMakeBuild(build_ext):
    """Configures, compiles and installs every target of CMakeLists.txt into the package."""

    def run(self) -> None:
        nvcc = chosen_nvcc()
        in_place = self.inplace or getattr(self, "editable_mode", False)
        package = (ROOT if in_place else Path(self.build_lib).resolve()) / "fastdit"
        tree = Path(os.environ.get("FASTDIT_BUILD_DIR") or self.build_temp).resolve()
        tree.mkdir(parents=True, exist_ok=True)
        subprocess.check_call(self.configure_command(tree, package, nvcc))
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        compile_command = ["cmake", "--build", str(tree), "-j", jobs]
        done = subprocess.run(
            compile_command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        # The log holds what ptxas says of registers and spills, which outlives the console.
        (tree / "build.log").write_text(done.stdout)
        print(done.stdout)
        done.check_returncode()
        for stale in package.glob("_cuda*.so") if nvcc is None else ():
            stale.unlink()  # of an earlier build in this tree
        subprocess.check_call(["cmake", "--install", str(tree)])

    def configure_command(self, tree: Path, package: Path, nvcc: str | None) -> list[str]:
        import pybind11

        command = ["cmake", "-S", str(ROOT), "-B", str(tree), "-G", "Ninja"]
        command += [
            f"-DCMAKE_INSTALL_PREFIX={package}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DFASTDIT_WITH_CUDA={'ON' if nvcc else 'OFF'}",
        ]
        if nvcc:
            command.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
            if archs := os.environ.get("FASTDIT_CUDA_ARCHS"):
                command.append(f"-DFASTDIT_CUDA_ARCHS={archs}")
        return command + shlex.split(os.environ.get("CMAKE_ARGS", ""))

    def get_outputs(self) -> list[str]:
        return [str(path) for path in (Path(self.build_lib) / "fastdit").glob("*.so")]

    def get_source_files(self) -> list[str]:
        sources = [p for p in (ROOT / "csrc").rglob("*") if p.is_file()]
        own = ["CMakeLists.txt", "tools/_backend.py"]  # what a source archive needs to build
        return own + [str(p.relative_to(ROOT)) for p in sources]


setup(ext_modules=[Extension("fastdit._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
