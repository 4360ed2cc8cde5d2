"""What judges that are models in a local folder share: their files, and pictures as they take them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastdit.errors import ArgumentError


def require_files(folder: Path, quality: str, names: Sequence[str]) -> None:
    """This refuses a folder without these files."""
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        what = f"has no {', '.join(missing)}" if folder.is_dir() else "is not a folder"
        raise ArgumentError(f"quality {quality!r}: {folder} {what}; nothing is downloaded")


def eight_bits(image: np.ndarray) -> np.ndarray:
    """[H, W, 3] in [0, 1] becomes bytes."""
    return (np.clip(image, 0, 1) * 255).round().astype(np.uint8)
