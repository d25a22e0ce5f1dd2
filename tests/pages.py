"""Reads a page of ``--report`` back, without a browser."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path


def data_of(page: Path):
    """Return the JSON that a page carries."""
    text = page.read_text(encoding="utf-8")
    return json.loads(
        re.search(r'<script type="application/json" id="report-data">(.*?)</script>', text, re.DOTALL)[1]
    )


def text_of(page: Path) -> str:
    """Return what a reader sees, in one line."""
    text = re.sub(r"<(style|script)\b.*?</\1>", " ", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text)).split())
