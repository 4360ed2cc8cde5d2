"""Write what leaves models of published sizes where modulations are shed, and how large their tables are.

    PYTHONPATH=.:benchmarks python tools/shed.py

Models are built without memory, in bf16.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from fastdit import UnsupportedModelError
from fastdit.account.cost import Cost
from fastdit.account.modulators import modulation_layers
from fastdit.adapters import find_adapter
from fastdit.adapters.base import Size
from fastdit.blocks.held import bytes_of
from fastdit.runtime.shed import Shed
from real_models import MODELS, RealModel

OUT = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "shed.json"
#: the published form is the class's default
LUMINA2 = RealModel(
    "Lumina 2 1024", "Lumina2Transformer2DModel", {}, {}, 1, 128, 256, 30, lambda *_: {}
)


def row(entry: RealModel) -> dict[str, Any]:
    """Bytes of a model's weights, of those that are shed, and of the table of a run of one picture."""
    model = entry.build(torch.device("meta"), torch.bfloat16, tiny=False)
    adapter = find_adapter(model)
    found = {
        "model": entry.name.rpartition(" ")[0],
        "bytes": sum(parameter.nbytes for parameter in model.parameters()),
        "steps": entry.steps,
        "batch": entry.batch,
    }
    try:
        units, alike = modulation_layers(adapter, model)
    except UnsupportedModelError:
        return found | {"shed": 0, "layers": 0, "table": 0}
    layers = tuple(layer for several in units.values() for layer in several)
    rows = Shed("host", False, alike, tuple(units), layers).rows(entry.batch, entry.steps)
    cost = Cost(adapter, model, Size(1, 1), 1, torch.bfloat16.itemsize)
    table = cost.modulation_bytes(rows)
    return found | {"shed": sum(map(bytes_of, layers)), "layers": len(layers), "table": table}


def main() -> int:
    """Write the file."""
    rows = [row(entry) for entry in (*MODELS, LUMINA2)]
    rows.sort(key=lambda found: -found["shed"])
    OUT.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
