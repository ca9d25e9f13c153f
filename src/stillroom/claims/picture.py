"""Panels of a claim side by side, as one PNG for pages that take no HTML."""

import io
from collections.abc import Sequence

from matplotlib.figure import Figure
from PIL import Image

GAP, MARGIN, PAPER = 24, 16, "#ffffff"


def side_by_side(panels: Sequence[Figure], width: int = 1200) -> bytes:
    wide = (width - 2 * MARGIN - GAP * (len(panels) - 1)) // len(panels)
    pictures = []
    for panel in panels:
        out = io.BytesIO()
        panel.savefig(out, format="png", dpi=wide / panel.get_figwidth(), facecolor=PAPER)
        pictures.append(Image.open(out))
    high = max(p.height for p in pictures)
    sheet = Image.new("RGB", (width, high + 2 * MARGIN), PAPER)
    for i, picture in enumerate(pictures):
        sheet.paste(picture.convert("RGB"), (MARGIN + i * (wide + GAP), MARGIN))
    out = io.BytesIO()
    sheet.save(out, "png", optimize=True)
    return out.getvalue()
