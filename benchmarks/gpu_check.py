"""Everything a GPU can say of fastdit, in one command: `make gpu-check`.

    python benchmarks/gpu_check.py [--out FILE] [--minutes 20] [--only SECTION ...]

Sections, in this order: ceilings (copy, matmul), tests (every kernel test on the device), ops (every
op against eager, torch.compile and every backend), attention (of a few tokens over all, at the models' shapes),
steps (whole steps of published models with random weights), runs (whole runs of their pipelines,
with every method), pictures (the packaged model with every method, against the same on the CPU),
sanitizer (a subset of the tests under compute-sanitizer). The file is written after each, so what
was measured survives what fails.

Without a GPU the same code runs shortened on the CPU, in a file marked `rehearsal`: its figures mean
nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fastdit
from attention import MODELS as ATTENTIONS
from attention import SHARES, TINY_MODELS, torch_contenders
from attention import inputs as attention_inputs
from fastdit import Schedule
from fastdit.ops import sparse_attention
from fastdit.tiny import load_pipeline
from hooks import hooks_of
from machine import describe_machine
from op_cases import backends, cases
from real_models import MODELS, RealModel
from real_runs import Runs, measure_runs
from shapes import ALL, TINY
from timing import race, sets_needed

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TEST_FILE = ROOT / "tests" / "test_gpu.py"
RUNS = [m for m in reversed(MODELS) if m.name.startswith(("FLUX.1-dev", "SD3 medium", "PixArt"))]
OP_SHAPES = ("pixart-512", "pixart-1024", "sd3-medium-1024", "sd3.5-large-1024", "flux-1024")


class Check:
    """The device, whether this is a rehearsal, and the time that is left."""

    def __init__(self, minutes: float) -> None:
        self.rehearsal = not torch.cuda.is_available()
        self.device = torch.device("cpu" if self.rehearsal else "cuda")
        self.dtype = torch.float32 if self.rehearsal else torch.bfloat16
        self.turns = 2 if self.rehearsal else 31
        self.deadline = time.monotonic() + 60 * minutes

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def synchronize(self) -> None:
        if not self.rehearsal:
            torch.cuda.synchronize()

    # --- sections

    def ceilings(self) -> dict[str, Any]:
        """What this device can copy and multiply: the measure of everything else."""
        count, side = (1 << 20, 256) if self.rehearsal else (1 << 29, 8192)
        a = torch.ones(count, device=self.device, dtype=self.dtype)
        b = torch.empty_like(a)
        left, right = (
            torch.randn(side, side, device=self.device, dtype=self.dtype) for _ in range(2)
        )
        out = torch.empty_like(left)
        copy = race({"copy": lambda i: b.copy_(a)}, 1, self.device, self.turns)
        matmul = race({"mm": lambda i: torch.mm(left, right, out=out)}, 1, self.device, self.turns)
        return {
            "copy_tb_s": 2 * a.nbytes / copy.seconds["copy"] / 1e12,
            "matmul_tflop_s": 2 * side**3 / matmul.seconds["mm"] / 1e12,
            "self_checks": [copy.self_check, matmul.self_check],
        }

    def tests(self) -> dict[str, Any]:
        """The kernel tests, in as many processes as there are cores: Triton compiles hundreds of forms."""
        chosen = "mirrored and check_empty" if self.rehearsal else "cuda or triton or repeat"
        cores = 1 if self.rehearsal else len(os.sched_getaffinity(0))
        process = self._pytest(chosen, parallel=("-v", "-n", str(cores), "--dist", "worksteal"))
        output = _finish(process, min(240.0, self.left()))  # they took 180 s on 16 cores
        outcomes = re.findall(r"(PASSED|FAILED|ERROR|SKIPPED) (\S+)", output)
        found: dict[str, Any] = {
            "passed": process.returncode == 0,
            "summary": _last_line(output),
            "outcomes": dict(Counter(outcome for outcome, _ in outcomes)),
            "failures": sorted({n for outcome, n in outcomes if outcome in ("FAILED", "ERROR")}),
        }
        if found["failures"]:
            found["output"] = re.findall(r"^E  .*", output, re.M)[:200]
        return found

    def ops(self) -> dict[str, Any]:
        """Every case of every op; microseconds of a call."""
        rows, copy = [], self.ceilings()["copy_tb_s"]
        shapes = TINY if self.rehearsal else tuple(s for s in ALL if s.name in OP_SHAPES)
        for case in cases(shapes):
            if self.left() < 0:
                rows.append({"op": case.op, "case": case.name, "skipped": "the time is up"})
                continue
            moved = case.bytes_moved(self.dtype)
            sets = sets_needed(moved, self.device)
            contenders = case.contenders(self.device, sets, self.dtype)
            if self.rehearsal and rows:  # one compilation rehearses the way there; all take minutes
                contenders.pop("compile", None)
            found = race(contenders, sets, self.device, self.turns)
            row = {"op": case.op, "case": case.name, "shape": case.shape.name, "bytes": moved}
            row |= found.asdict()
            row["share_of_copy"] = {
                name: moved / seconds / (copy * 1e12) for name, seconds in found.seconds.items()
            }
            rows.append(row)
            shown = ", ".join(f"{k} {v:.1f}" for k, v in row["us"].items())
            print(f"  {case.op:15} {case.name:20} {case.shape.name:17} us: {shown}", flush=True)
        return {"rows": rows}

    def attention(self) -> dict[str, Any]:
        """Attention of a share of the image tokens over all keys: torch's, each of its backends, and the op's."""
        rows = []
        for form in TINY_MODELS if self.rehearsal else ATTENTIONS:
            for share in SHARES:
                row: dict[str, Any] = {"model": form.model, "share": share, "keys": form.keys}
                rows.append(row | {"queries": form.queries(share)})
                if self.left() < 45:
                    rows[-1]["skipped"] = "the time is up"
                    continue
                q, k, v = attention_inputs(form, share, self.device, self.dtype)
                calls = torch_contenders(q, k, v)
                if "triton" in backends("sparse_attention", self.device, self.dtype):
                    calls["triton"] = lambda q=q, k=k, v=v: sparse_attention(
                        q, k, v, backend="triton"
                    )
                contenders = {name: lambda i, call=call: call() for name, call in calls.items()}
                found = race(contenders, 1, self.device, self.turns)
                rows[-1] |= found.asdict()
                flops = form.flops(share)
                rows[-1]["tflop_s"] = {n: flops / t / 1e12 for n, t in found.seconds.items()}
                print(f"  {rows[-1]}", flush=True)
        return {"rows": rows}

    def steps(self) -> dict[str, Any]:
        """Whole steps; a step counts from its call until the device is done."""
        try:
            import diffusers
        except ImportError as error:
            return {"skipped": f"diffusers is not installed: {error}"}
        rows = []
        for real in MODELS:
            if self.left() < 45:
                rows.append({"model": real.name, "skipped": "the time is up"})
                continue
            rows.append(self._steps_of(real))
            print(f"  {rows[-1]}", flush=True)
            if not self.rehearsal:
                torch.cuda.empty_cache()
        return {"diffusers": diffusers.__version__, "rows": rows}

    @torch.no_grad()
    def _steps_of(self, real: RealModel) -> dict[str, Any]:
        torch.manual_seed(0)
        model = real.build(self.device, self.dtype, self.rehearsal)
        arguments = real.arguments(model, self.rehearsal)
        row: dict[str, Any] = {"model": real.name, "ms": {}, "host_ms": {}}
        row["parameters"] = sum(p.numel() for p in model.parameters())

        def measured(name: str, prepare: Callable[[], None] = lambda: None) -> None:
            times = [self._step_seconds(model, arguments, prepare) for _ in range(6)][1:]
            row["ms"][name] = 1e3 * statistics.median(t for t, _ in times)
            row["host_ms"][name] = 1e3 * statistics.median(t for _, t in times)

        measured("eager")
        handle = fastdit.patch(model)
        with handle.run(torch.linspace(999, 0, 2)):
            measured("fastdit dense")
        handle.unpatch()
        handle = fastdit.patch(model, fastdit.Cached(Schedule.every(2)))

        def reused() -> None:
            handle.reset()
            self._run = handle.run(torch.linspace(999, 0, 2))
            self._run.__enter__()
            model(**arguments)
            handle.advance()

        measured("fastdit every(2), a reused step", reused)
        handle.unpatch()
        hooks = hooks_of(model)
        for cache in hooks:
            cache.start_step(0)
        model(**arguments)
        for cache in hooks:
            cache.start_step(1)
        measured("hooks, a reused step")
        for cache in hooks:
            cache.remove()
        if not self.rehearsal and self.left() > 120:
            try:
                model.compile_repeated_blocks(fullgraph=True)
                measured("torch.compile of the blocks")
            except Exception as error:  # a rival that does not run is a result too
                row["compile_failed"] = f"{type(error).__name__}: {str(error)[:200]}"
        return row

    def _step_seconds(self, model, arguments, prepare) -> tuple[float, float]:
        """Until the device is done, and until the host is."""
        self._run = None
        prepare()
        self.synchronize()
        start = time.perf_counter()
        model(**arguments)
        host = time.perf_counter() - start
        self.synchronize()
        whole = time.perf_counter() - start
        if self._run is not None:
            self._run.__exit__(None, None, None)
        return whole, host

    def runs(self) -> dict[str, Any]:
        """Whole runs of stock pipelines, unpatched and with every method in turns."""
        found = {}
        for real in RUNS:
            if self.left() < 45:
                found[real.name] = {"skipped": "the time is up"}
                continue
            print(f"  {real.name}", flush=True)
            runs = Runs(real, self.device, self.dtype, self.rehearsal)
            found[real.name] = measure_runs(
                runs, *((1, 0) if self.rehearsal else (2, 1)), self.left
            )
            del runs
            if not self.rehearsal:
                torch.cuda.empty_cache()
        return found

    def pictures(self) -> dict[str, Any]:
        """Latents of the packaged model, fp32: how far a device's are from the CPU's, relative L2.

        `rounding` is the same between two ways on the device, the kernels and plain torch; `graphs` between a replayed
        run and an eager one.
        """
        rows = []
        methods: dict[str, tuple[int, list[Any]]] = {
            "unpatched": (28, []),
            "dense": (28, [fastdit.Dense()]),
            "every(2)": (28, [fastdit.Cached(Schedule.every(2))]),
            "ECAD fast": (20, [fastdit.ECAD.preset("tiny", "fast")]),
            "RAS 0.5": (28, [fastdit.RAS(ratio=0.5)]),
            "RAS 0.5 + every(2)": (28, [fastdit.RAS(ratio=0.5), fastdit.Cached(Schedule.every(2))]),
            "RALU sd3-2x": (20, [fastdit.RALU.preset("sd3-2x", selector="gradient")]),
        }
        pipes = [load_pipeline() for _ in range(2)]
        pipes[1].to(self.device)

        def drawn(
            pipe: Any, steps: int, chosen: list[Any], backend: str | None, graphs: bool = False
        ) -> torch.Tensor:
            handle = None
            if chosen:
                handle = fastdit.patch(pipe, *chosen, backend=backend, cuda_graphs=graphs)
            for _ in range(3 if graphs else 1):
                latents = pipe(
                    ["a small red cross in the bottom right on a gray background"] * 2,
                    num_inference_steps=steps,
                    generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)],
                    output_type="latent",
                ).images
            if handle:
                handle.unpatch()
            return latents.double().cpu()

        for name, (usual, chosen) in methods.items():
            steps = 5 if self.rehearsal else usual
            if self.rehearsal and usual == 20:  # these need that many
                continue
            truth = drawn(pipes[0], steps, chosen, "reference")
            kernels, plain = (drawn(pipes[1], steps, chosen, b) for b in (None, "reference"))
            row = {"method": name, "to_cpu": float((kernels - truth).norm() / truth.norm())}
            row["rounding"] = float((kernels - plain).norm() / truth.norm())
            if chosen and "RALU" not in name and not self.rehearsal:
                replayed = drawn(pipes[1], steps, chosen, None, graphs=True)
                row["graphs"] = float((replayed - kernels).norm() / truth.norm())
            rows.append(row)
            print(f"  {row}", flush=True)
        return {"rows": rows}

    def sanitizer(self) -> dict[str, Any]:
        """The CUDA kernels' address, race and barrier checks."""
        tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        if self.rehearsal or not Path(tool).exists():
            return {"skipped": "no GPU" if self.rehearsal else "compute-sanitizer is not installed"}
        found = {}
        for check in ("memcheck", "racecheck", "synccheck"):
            if self.left() < 20:
                found[check] = {"skipped": "the time is up"}
                continue
            process = self._pytest(
                "cuda and (check_inputs_and_guards or check_cache)",
                [tool, "--tool", check, "--error-exitcode", "86"],
                {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            )
            output = _finish(process, min(90.0, self.left()))
            ran = "ERROR SUMMARY" in output
            found[check] = {"rc": process.returncode, "summary": _last_line(output)}
            if not ran:
                found[check]["skipped"] = f"it did not run: {_last_line(output)}"
        return found

    def _pytest(
        self, chosen: str, before=(), environment=None, parallel=("-q",)
    ) -> subprocess.Popen[str]:
        command = [*before, sys.executable, "-m", "pytest", *parallel, "-p", "no:cacheprovider"]
        command += ["-k", chosen, str(TEST_FILE)]
        return subprocess.Popen(
            command,
            cwd=ROOT / "tests",
            env=os.environ | (environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


SECTIONS = (
    "ceilings",
    "tests",
    "ops",
    "attention",
    "steps",
    "runs",
    "pictures",
    "sanitizer",
)


def _finish(process: subprocess.Popen[str], seconds: float) -> str:
    try:
        return process.communicate(timeout=max(1.0, seconds))[0]
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()[0] + "\nout of time"


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""


def driver() -> str | None:
    """The NVIDIA driver's version."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.split("\n")[0] or None


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--minutes", type=float, default=20.0, help="for all sections together")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    arguments = parser.parse_args()
    check = Check(arguments.minutes)
    machine = describe_machine()
    result: dict[str, Any] = {
        "rehearsal": check.rehearsal,
        "machine": machine | {"driver": driver()},
    }
    name = "rehearsal" if check.rehearsal else re.sub(r"\W+", "-", str(machine["gpu"]).lower())
    folder = ROOT / "build" if check.rehearsal else RESULTS
    out = arguments.out or folder / f"gpu-check-{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    failed = False
    for section in arguments.only:
        print(f"== {section}", flush=True)
        start = time.monotonic()
        try:
            found = getattr(check, section)()
        except Exception:  # the other sections are worth having
            found = {"error": traceback.format_exc()}
            print(found["error"], flush=True)
        failed |= "error" in found or found.get("passed") is False
        result[section] = found | {"seconds": round(time.monotonic() - start, 1)}
        out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {out}" + (" (a rehearsal: no GPU)" if check.rehearsal else ""))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
