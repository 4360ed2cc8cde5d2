"""Find plug-ins by their folder: the one mechanism by which adapters, methods and backends become known.

A plug-in is a module of the package that exposes the wanted name. Private modules (leading underscore) and `base` are
skipped. Adding a family, a method or a backend therefore means adding one file and editing none.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from types import MappingProxyType, ModuleType
from typing import Any


def discover(package: ModuleType, attribute: str) -> Mapping[str, Any]:
    """Import each module of `package` once and collect `module.<attribute>`.

    Returns:
        A read-only mapping from module name to the attribute, sorted by module name; modules without it are left out.
    """
    found = {}
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda entry: entry.name):
        if info.name.startswith("_") or info.name == "base":
            continue
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        if hasattr(module, attribute):
            found[info.name] = getattr(module, attribute)
    return MappingProxyType(found)
