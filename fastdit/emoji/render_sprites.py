"""Making the sheets of emoji: ``python -m fastdit.emoji.render_sprites FOLDER``.

Reads ``npm pack @iconify-json/noto @iconify-json/fluent-emoji-flat @iconify-json/twemoji`` out of
the folder and draws with ``resvg-py``, which nothing else needs. It runs once; the sheets are
in the package.
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

from .sprites import NAMES, NAMES_IN_SETS, SHEETS, SIDES, STYLES

SETS = {"noto": "noto", "fluent": "fluent-emoji-flat", "twemoji": "twemoji"}


def read_set(folder: Path, style: str) -> dict[str, Any]:
    """A style has the one packed iconify set in the folder that bears its name."""
    (path,) = folder.glob(f"iconify-json-{SETS[style]}-[0-9]*.tgz")
    with tarfile.open(path) as packed:
        icons = packed.extractfile("package/icons.json")
        if icons is None:
            raise FileNotFoundError(f"{path} must hold package/icons.json")
        return json.load(icons)


def draw(icons: dict[str, Any], name: str, side: int) -> bytes:
    """An icon becomes a PNG with alpha, ``side`` pixels wide and high."""
    import resvg_py

    icon = icons["icons"][name]
    width, height = (icon.get(key, icons[key]) for key in ("width", "height"))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    text = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box}" width="{side}" height="{side}">{icon["body"]}</svg>'
    )
    return bytes(resvg_py.svg_to_bytes(svg_string=text, width=side, height=side))


def main() -> None:
    """Draw all sheets."""
    from PIL import Image

    folder = Path(sys.argv[1])
    SHEETS.mkdir(parents=True, exist_ok=True)
    sets = {style: read_set(folder, style) for style in STYLES}
    for side in SIDES:
        sheet = Image.new("RGBA", (side * len(NAMES), side * len(STYLES)))
        for row, style in enumerate(STYLES):
            for column, name in enumerate(NAMES):
                drawn = Image.open(io.BytesIO(draw(sets[style], NAMES_IN_SETS[name], side)))
                sheet.paste(drawn.convert("RGBA"), (column * side, row * side))
        sheet.save(SHEETS / f"{side}.png", optimize=True)


if __name__ == "__main__":
    main()
