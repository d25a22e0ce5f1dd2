"""Pictures of an inspection: ranks and norms by layer and module, as PNG, SVG or HTML.

The same inspection always gives the same bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.errors import RequestError
from lora_merge.inspection.plots.grid import arranged, panels_of
from lora_merge.inspection.plots.image import image
from lora_merge.inspection.plots.page import page
from lora_merge.runtime.shortage import raise_if_out_of_memory
from lora_merge.storage.objects.urls import is_like_url
from lora_merge.storage.small_files import write_text
from lora_merge.storage.writing import write_error

if TYPE_CHECKING:
    from pathlib import Path

    from lora_merge.inspection.facts import Inspection

__all__ = ["SUFFIXES", "check", "draw"]

SUFFIXES = (".png", ".svg", ".html")
"""Suffixes of the formats that can be drawn."""


def check(path: Path) -> None:
    """Check that a file can be drawn, before anything is computed for it.

    Raises:
        RequestError: it is a URL, its suffix names no known format, or the format needs matplotlib, which is not installed.
    """
    if is_like_url(str(path)):
        hint = "name a file of this machine, and copy it afterwards"
        raise RequestError(
            "", 0, "plot", f"{path} is a URL, and pictures are written to a disk only", hint=hint
        )
    wanted = "expected .png, .svg or .html"
    suffix = path.suffix.lower()
    if not suffix:
        raise RequestError("", 0, "plot", f"{path} has no suffix, {wanted}")
    if suffix not in SUFFIXES:
        raise RequestError("", 0, "plot", f"{path} is a {suffix} file, {wanted}")
    if suffix == ".html":
        return
    try:
        import matplotlib.figure
        import matplotlib.style  # noqa: F401
    except ImportError as exc:
        raise_if_out_of_memory(exc)
        sentence = f"a {suffix} file is drawn by matplotlib, which cannot be imported ({exc})"
        hint = 'pip install "lora-merge[plot]", or name an .html file'
        raise RequestError("", 0, "plot", sentence, hint=hint) from exc


def draw(inspection: Inspection, path: Path) -> None:
    """Draw ranks, and norms if they are known, as a heat map of modules and layers.

    Args:
        inspection: what is drawn.
        path: the file; its suffix chooses the format.

    Raises:
        RequestError: the adapter changes no module, or the file cannot be drawn (`check`).
        WriteError: the file cannot be written.
    """
    check(path)
    if not inspection.modules:
        raise RequestError(
            "", 0, "plot", f"{inspection.adapter} changes no module, so there is nothing to draw"
        )
    grid = arranged(inspection.modules)
    panels = panels_of(grid)
    if path.suffix.lower() == ".html":
        write_text(path, page(inspection, grid, panels))
        return
    drawn = image(inspection, grid, panels, path.suffix.lower()[1:])
    try:
        path.write_bytes(drawn)
    except OSError as exc:
        raise write_error(path, exc) from exc
