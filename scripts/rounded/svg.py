"""Pictures as SVG, whose colours follow the reader's light or dark theme."""

from __future__ import annotations

from html import escape
from typing import Final

_STYLE: Final = """\
text { font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328; }
.small { font-size: 11px; } .bold { font-weight: 600; }
.middle { text-anchor: middle; } .end { text-anchor: end; }
.line { stroke: #d1d9e0; stroke-width: 1; } .axis { stroke: #59636e; stroke-width: 1; }
.dash { stroke: #59636e; stroke-width: 1; stroke-dasharray: 2 2; }
.open { fill: none; stroke: #59636e; stroke-width: 1.3; }
.nearest { fill: #8c959f; } .stochastic { fill: #e69f00; } .adapter { fill: #0072b2; } .dot { fill: #1f2328; }
@media (prefers-color-scheme: dark) {
text { fill: #f0f6fc; } .line { stroke: #3d444d; } .axis, .dash, .open { stroke: #9198a1; }
.nearest { fill: #7d8590; } .stochastic { fill: #e69f00; } .adapter { fill: #56b4e9; } .dot { fill: #f0f6fc; }
}"""
"""Okabe and Ito's colours, which people tell apart however they see colours."""


class Drawing:
    """A picture that grows.

    Args:
        width: in pixels.
        height: likewise.
        title: what it shows, for people who do not see it.
    """

    def __init__(self, width: int, height: int, title: str) -> None:
        size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        self._lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
            f"<title>{escape(title)}</title>",
            f"<style>\n{_STYLE}\n</style>",
        ]

    def line(self, start: tuple[float, float], end: tuple[float, float], style: str = "line") -> None:
        """Add a straight line between two points."""
        self._lines.append(
            f'<line class="{style}" x1="{start[0]:g}" y1="{start[1]:g}" x2="{end[0]:g}" y2="{end[1]:g}"/>'
        )

    def circle(self, x: float, y: float, radius: float, style: str) -> None:
        """Add a disc or a ring around a point."""
        self._lines.append(f'<circle class="{style}" cx="{x:g}" cy="{y:g}" r="{radius:g}"/>')

    def bar(self, x: float, y: float, width: float, height: float, style: str) -> None:
        """Add a rectangle whose upper left corner is given."""
        self._lines.append(
            f'<rect class="{style}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="1"/>'
        )

    def text(self, x: float, y: float, words: str, style: str = "") -> None:
        """Add words on a line."""
        self._lines.append(f'<text class="{style}" x="{x:g}" y="{y:g}">{escape(words)}</text>')

    def finished(self) -> str:
        """Return the file's text."""
        return "\n".join([*self._lines, "</svg>", ""])
