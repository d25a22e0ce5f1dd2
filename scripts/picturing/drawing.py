"""Draws a screen as a small PNG, with a font that comes with matplotlib, so that it looks the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
from PIL import Image, ImageColor, ImageDraw, ImageFont

if TYPE_CHECKING:
    from picturing.terminal import Screen

_FONTS = Path(mpl.get_data_path()) / "fonts" / "ttf"
_SIZE = 20
_CELL = (12, 25)
"""Columns and rows of pixels of one character."""

_MARGIN = 18
_BACKGROUND = "#1b1f27"
_COLOURS = {"default": "#d7dce4", "red": "#ff7b72", "brown": "#e3b341", "yellow": "#e3b341"}
_BOLD = "#ffffff"
_LINES = {"━": 4, "─": 1}
"""Characters that are drawn as lines, so that neighbours touch, and how thick they are."""

_SHADES = 12
"""Steps of the palette from the background to each colour."""


def draw(screen: Screen, path: Path) -> None:
    """Write a screen as PNG with a palette."""
    width, height = _CELL
    n_columns = len(screen.rows[0])
    # The empty rows below the text are left out.
    n_rows = max((n for n, line in enumerate(screen.lines, 1) if line), default=1)
    size = (n_columns * width + 2 * _MARGIN, n_rows * height + 2 * _MARGIN)
    image = Image.new("RGB", size, _BACKGROUND)
    pen = ImageDraw.Draw(image)
    plain = ImageFont.truetype(str(_FONTS / "DejaVuSansMono.ttf"), _SIZE)
    bold = ImageFont.truetype(str(_FONTS / "DejaVuSansMono-Bold.ttf"), _SIZE)
    for y, row in enumerate(screen.rows[:n_rows]):
        for x, glyph in enumerate(row):
            if not glyph.text.strip():
                continue
            left, top = _MARGIN + x * width, _MARGIN + y * height
            colour = _COLOURS.get(glyph.colour, _COLOURS["default"])
            if glyph.text in _LINES:
                middle, half = top + height // 2, _LINES[glyph.text]
                pen.rectangle((left, middle - half, left + width - 1, middle + half), fill=colour)
                continue
            ink = _BOLD if glyph.bold and glyph.colour == "default" else colour
            pen.text((left, top), glyph.text, fill=ink, font=bold if glyph.bold else plain)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.quantize(palette=_palette(), dither=Image.Dither.NONE).save(path, optimize=True)


def _palette() -> Image.Image:
    """Return an image with the palette of all pictures: shades from the background to each colour."""
    dark = ImageColor.getrgb(_BACKGROUND)
    values: list[int] = []
    for name in sorted({*_COLOURS.values(), _BOLD}):
        ink = ImageColor.getrgb(name)
        for step in range(_SHADES + 1):
            values += (low + (high - low) * step // _SHADES for low, high in zip(dark, ink, strict=True))
    made = Image.new("P", (1, 1))
    made.putpalette(values)
    return made
