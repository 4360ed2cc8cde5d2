"""A comparison as one HTML page that needs nothing else: pictures to flip through, figures and verdicts.

Arrow keys or buttons change the arm and the prompt of the large picture; space shows the reference while it is held.
A grid has a line for each prompt. All text from outside is escaped; data stand in the page as JSON.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

#: pixels of a picture's longer side at most, pictures of an arm, and frames of a video
SIDE, SHOWN, FRAMES = 512, 12, 4
QUALITY = 90

TEMPLATE = Path(__file__).with_suffix(".html")


def write(result: Mapping[str, Any], pictures: Mapping[str, np.ndarray], path: Path) -> None:
    """This writes the page of a comparison.

    Args:
        result: Its JSON data, see `study.py`.
        pictures: Name of an arm -> [n, h, w, 3] or [n, frames, h, w, 3] in [0, 1], in the order in which they are
            flipped through.
    """
    rows = {row["arm"]: row for row in result["rows"]}
    count = min(SHOWN, len(result["prompts"]))
    solution = f"{result['solution']['steps']} steps of {result['solution']['solver']}"
    data = {
        "prompts": list(result["prompts"][:count]),
        "arms": [
            {
                "name": name,
                "told": told(rows[name]) if name in rows else solution,
                "pictures": [encoded(picture) for picture in drawn[:count]],
            }
            for name, drawn in pictures.items()
        ],
    }
    provenance = result["provenance"]
    parts = {
        "TITLE": escape(f"fastdit: {provenance['pipeline']}"),
        "SUBTITLE": escape(
            f"{result['pictures']} pictures; {provenance['model']}; {provenance['scheduler']}; "
            f"{provenance['machine']}, {provenance['threads']} threads; "
            f"errors are distances of latents to {solution}, whose own error is about "
            f"{result['solution']['error']:.2g}; {provenance['made']}"
        ),
        "VERDICTS": _verdicts(result),
        "ROWS": _rows(result),
        "REFUSED": _refused(result),
        # A closing tag in the data would end the script.
        "DATA": json.dumps(data).replace("<", "\\u003c"),
    }
    page = TEMPLATE.read_text(encoding="utf-8")
    # At once, since a prompt may hold such a name too.
    text = re.sub("@([A-Z]+)@", lambda found: parts.get(found[1], found[0]), page)
    path.write_text(text, encoding="utf-8")


def told(row: Mapping[str, Any]) -> str:
    """An arm in a few words."""
    return (
        f"{row['speedup']:.2f}x, error {row['error']:.3g}, {row['steps']} steps of {row['solver']}"
    )


def encoded(picture: np.ndarray) -> str:
    """A picture [h, w, 3], or frames of a video beside each other, as an address that holds it."""
    from PIL import Image

    image = Image.fromarray((np.clip(strip(picture), 0, 1) * 255).round().astype(np.uint8))
    image.thumbnail((SIDE if picture.ndim == 3 else SIDE * FRAMES, SIDE))
    held = io.BytesIO()
    image.save(held, "WEBP", quality=QUALITY, lossless=max(image.size) <= 256)
    return f"data:image/webp;base64,{base64.b64encode(held.getvalue()).decode()}"


def strip(picture: np.ndarray) -> np.ndarray:
    """A picture [h, w, 3]; of a video [frames, h, w, 3] a few frames, evenly spread from the first to the last."""
    if picture.ndim == 3:
        return picture
    places = np.linspace(0, len(picture) - 1, min(FRAMES, len(picture))).round().astype(int)
    return np.concatenate(picture[places], axis=1)


def _rows(result: Mapping[str, Any]) -> str:
    heads = (
        "arm",
        "group",
        "steps",
        "loop",
        "call",
        "arithmetic",
        "realised",
        "caches",
        "error",
        "of unpatched's",
        "95 %",
    )
    heads += ("PSNR to the solution", "SSIM")
    lines = []
    for row in result["rows"]:
        over, near = row["over_unpatched"], row["to_truth"]
        cells = [
            escape(row["arm"]),
            escape(row["group"]),
            f"{row['steps']}",
            f"{row['speedup']:.2f}x",
            f"{row['call_speedup']:.2f}x",
            f"{row['arithmetic']:.0%}",
            "" if row["realised"] is None else f"{row['realised']:.0%}",
            "" if row["cache_bytes"] is None else f"{row['cache_bytes'] / 2**20:.2f} MiB",
            f"{row['error']:.4f}",
            f"{over['value']:.2f}",
            f"{over['low']:.2f} to {over['high']:.2f}",
            "" if near["psnr"] is None else f"{near['psnr']['mean']:.1f} dB",
            f"{near['ssim']['mean']:.3f}",
        ]
        tags = ["td"] * 2 + ['td class="n"'] * (len(cells) - 2)
        body = "".join(f"<{tag}>{cell}</td>" for tag, cell in zip(tags, cells, strict=True))
        lines.append(f'<tr data-arm="{escape(row["arm"])}">{body}</tr>')
    return _table(heads, lines)


def _verdicts(result: Mapping[str, Any]) -> str:
    lines = []
    for each in result["verdicts"]:
        for group, one in each["against"].items():
            compared = one.get("ratio")
            cells = [
                escape(each["arm"]),
                escape(group),
                escape(one.get("arm", f"fastest {one.get('fastest', 0):.2f}x")),
                ""
                if compared is None
                else f"{compared['value']:.2f} [{compared['low']:.2f}, {compared['high']:.2f}]",
                f'<span class="{one["verdict"].replace(" ", "-")}">{one["verdict"]}</span>',
            ]
            lines.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    if not lines:
        return ""
    heads = (
        "arm",
        "beside",
        "its best arm in that time",
        "error over its",
        "the arm is",
    )
    return (
        f"<details open><summary>Verdicts at equal time</summary>{_table(heads, lines)}</details>"
    )


def _refused(result: Mapping[str, Any]) -> str:
    lines = [
        f"<tr><td>{escape(name)}</td><td>{escape(why)}</td></tr>"
        for name, why in result["refused"].items()
    ]
    return _table(("arm", "why"), lines) if lines else "<p>Everything ran.</p>"


def _table(heads: Sequence[str], lines: Sequence[str]) -> str:
    head = "".join(f"<th>{escape(each)}</th>" for each in heads)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
