"""Write the rows of docs/supported.md: what becomes of each transformer of the installed diffusers when it is patched.

    PYTHONPATH=.:tests python tools/supported.py

Each is first run as tests/test_denoisers.py runs it, which also says where the file is not what a run gives.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path

import pytest
import torch

from denoiser_runs import check_refused, check_served, classes, row
from denoisers import ENTRIES

OUT = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "supported.json"


def main() -> int:
    """Run all and write the file."""
    rows = []
    for name in classes():
        print(name, flush=True)
        with torch.compiler.set_stance("force_eager"), pytest.MonkeyPatch.context() as monkeypatch:
            if ENTRIES[name].refused:
                check_refused(name, ENTRIES[name])
            else:
                check_served(name, monkeypatch, ENTRIES[name])
            rows.append(row(name))
    found = {"diffusers": importlib.metadata.version("diffusers"), "rows": rows}
    OUT.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
