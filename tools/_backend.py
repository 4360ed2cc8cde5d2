"""The build backend: setuptools, asking for cmake and ninja only where PATH has none that will do.

A machine that already has both (most GPU boxes, every CI image) then builds without downloading
them, which also makes an offline `pip install --no-build-isolation --no-index .` possible.
"""

import re
import shutil
import subprocess

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401  (the hooks pip looks up by name)
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

CMAKE_MINIMUM = (3, 24)


def _missing_tools() -> list[str]:
    needed = []
    cmake = shutil.which("cmake")
    version = None
    if cmake:
        text = subprocess.run([cmake, "--version"], capture_output=True, text=True).stdout
        version = re.search(r"(\d+)\.(\d+)", text)
    if version is None or (int(version[1]), int(version[2])) < CMAKE_MINIMUM:
        needed.append("cmake>=" + ".".join(map(str, CMAKE_MINIMUM)))
    if not shutil.which("ninja"):
        needed.append("ninja")
    return needed


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + _missing_tools()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + _missing_tools()
