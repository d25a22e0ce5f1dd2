"""A page as values → HTML: escaped, self-contained, and allowed to run nothing but its own script."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from lora_merge._version import __version__
from lora_merge.drawing.heat_map import bar_svg, cells_svg, labels_svg
from lora_merge.drawing.scale import DARK, LIGHT, ink_on
from lora_merge.redaction import fit
from lora_merge.reporting.data import embedded

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from jinja2 import Template

    from lora_merge.reporting.page import Page

LIGHT_COLOURS: Mapping[str, str] = {
    "page": "#fcfbf8",
    "ink": "#1c1f23",
    "faint": "#5b6168",
    "rule": "#e4e1d9",
    "edge": "#b9b5aa",
    "panel": "#f3f1ea",
    "accent": "#1d5f88",
    "good": "#1d6b3f",
    "warn": "#7d5300",
    "bad": "#a82a22",
}
DARK_COLOURS: Mapping[str, str] = {
    "page": "#15181b",
    "ink": "#e8e6e1",
    "faint": "#a4aab0",
    "rule": "#2b3035",
    "edge": "#545b62",
    "panel": "#1e2226",
    "accent": "#8fc3e4",
    "good": "#85cfa0",
    "warn": "#e4bd6b",
    "bad": "#ff9d93",
}


def rendered(page: Page) -> str:
    """Return a page as HTML.

    Every value is made fit to be shown (without secrets, control characters or marks of direction) and escaped. The policy
    of the page allows no request, and no style and script but the page's own, by their digests.
    """
    from markupsafe import Markup

    style, script = style_text(), _asset("page.js")
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return (
        _template()
        .render(
            page=page,
            version=__version__,
            policy=policy,
            style=Markup(style),  # noqa: S704 - a file of the package
            script=Markup(script),  # noqa: S704 - a file of the package
            data=Markup(embedded(page.data)),  # noqa: S704 - escaped for this place, which HTML's escapes do not fit
        )
        .lstrip()
    )


def style_text() -> str:
    """Return the style sheet: the colours of both themes, then the rules."""
    light, dark = _colours(LIGHT_COLOURS, LIGHT), _colours(DARK_COLOURS, DARK)
    steps = "".join(
        f".q{n} rect, rect.q{n} {{ fill: var(--q{n}) }} .cells .q{n} text {{ fill: var(--i{n}) }}\n"
        for n in range(len(LIGHT))
    )
    return (
        f":root {{ color-scheme: light; {light} }}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root:not([data-theme=light]) {{ color-scheme: dark; {dark} }} }}\n"
        f"@media screen {{ :root[data-theme=dark] {{ color-scheme: dark; {dark} }} }}\n"
        f"{_asset('page.css')}{steps}"
    )


def _colours(named: Mapping[str, str], steps: Sequence[str]) -> str:
    """Return custom properties: named colours, the steps of the scale, and the ink on each."""
    found = [f"--{name}: {colour}" for name, colour in named.items()]
    found += [f"--q{n}: {colour}; --i{n}: {ink_on(colour)}" for n, colour in enumerate(steps)]
    return "; ".join(found)


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


@cache
def _asset(name: str) -> str:
    return files("lora_merge.reporting").joinpath("templates", name).read_text(encoding="utf-8")


@cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    def drawn(draw: Callable[[Any], str]) -> Callable[[Any], Markup]:
        return lambda value: Markup(draw(value))  # noqa: S704 - charts escape their texts

    def shown(value: object) -> object:
        # Numbers and macros pass; a text of a stranger becomes one line in which everything is visible.
        return fit(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = Environment(autoescape=True, finalize=shown, undefined=StrictUndefined, trim_blocks=False)
    environment.globals |= {"bar": drawn(bar_svg), "cells": drawn(cells_svg), "labels": drawn(labels_svg)}
    return environment.from_string(_asset("page.html.j2"))
