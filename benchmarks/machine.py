"""What a result file says of the machine it was measured on. No names of hosts."""

from __future__ import annotations

import datetime
import platform
import shutil
import subprocess
from pathlib import Path

import torch

import fastdit


def describe_machine() -> dict[str, object]:
    """Processor, GPU, threads, versions, commit and date."""
    cpu = Path("/proc/cpuinfo")
    models = [
        line.split(":")[1].strip()
        for line in cpu.read_text().splitlines()
        if line.startswith("model name")
    ]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": len(models),
        "gpu": gpu,
        **({"driver": _driver()} if gpu else {}),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastdit": fastdit.__version__,
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def _commit() -> str:
    folder = Path(__file__).parent
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=folder, capture_output=True, text=True
    )
    return found.stdout.strip() or "unknown"


def _driver() -> str | None:
    """The NVIDIA driver's version."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.split("\n")[0] or None
