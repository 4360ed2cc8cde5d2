"""The model families: one file each, found by this folder."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from fastdit.adapters.generic import Generic, refusal
from fastdit.discover import discover
from fastdit.errors import UnsupportedModelError


def adapters() -> dict[str, Any]:
    """All adapters by module name."""
    return dict(discover(sys.modules[__name__], "ADAPTER"))


def find_adapter(transformer: nn.Module, generic: str = "") -> Any:
    """This finds the adapter of a transformer's family.

    Args:
        generic: What will do where there is none: "components" wraps them, "steps" serves methods that skip whole
            steps; "" refuses.

    Raises:
        UnsupportedModelError: There is none; names the supported classes.
    """
    known = adapters().values()
    for adapter in known:
        if adapter.matches(transformer):
            return adapter
    reason = ""
    if generic:
        reason = refusal(transformer, generic == "components")
        if not reason:
            return Generic(transformer, generic == "components")
    supported = sorted(name for adapter in known for name in adapter.model_classes)
    raise UnsupportedModelError(
        f"no adapter for {type(transformer).__name__}{reason}; supported transformers: {', '.join(supported)}"
    )
