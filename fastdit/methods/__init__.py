"""The methods: one file each, found by this folder and exported by the package under the name of its class."""

from __future__ import annotations

import sys
from typing import Any

from fastdit.discover import discover


def methods() -> dict[str, Any]:
    """These are all methods by module name."""
    return dict(discover(sys.modules[__name__], "METHOD"))
