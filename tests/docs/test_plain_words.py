"""The pages are written in plain English: short words, the field's terms, the subject first."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.archaic import ARCHAIC
from tests.docs.blocks import ROOT, pages

PHRASES = {
    **ARCHAIC,
    r"(?<![Tt]here )\b(?:is|are|was|were) no (?!longer\b|such\b|more\b)": "is not a",
    r"\bof (?:its|their) own\b": "its own, separate",
    r"\bstands?\b(?! for| in for|-in)": "is, has",
    r"\b(?:lies|lie)\b": "is, are",
    r"\bwhatever\b": "any, every",
    r"\bwhoever\b": "anyone who",
    r"\bgo(?:es|ne)? on with\b": "continue, resume",
    r"\bbeyond (?:it|them)\b": "above the limit",
    r"\bhardly\b": "almost not",
    r"\bthereof\b|\bthereby\b|\bhence\b|\bupon\b": "use a shorter word",
    r"(?:^|[.:;] )What (?:is|was|are|were|it|they|that|he|a merge|engines) [^?\n]{1,90}\.": "begin with the subject",
    r"\blow_rank\b": "LoRA",
    r"\bproved on\b": "tested on",
    r"\bthe house\b": "lora-merge, the package",
}
"""Phrase → what to write instead; pages do without more of them than messages."""

_GENERATED = re.compile(r"<!-- ([\w ]+): begin.*?<!-- \1: end -->", re.DOTALL)
_FENCED = re.compile(r"^ *```.*?^ *```$", re.DOTALL | re.MULTILINE)
_CODE = re.compile(r"`[^`\n]+`")


def prose(page: Path) -> str:
    """Return a page without generated parts, blocks, and code."""
    text = page.read_text(encoding="utf-8")
    for pattern in (_GENERATED, _FENCED, _CODE):
        text = pattern.sub("", text)
    return text


@pytest.mark.parametrize(
    "page", [page for page in pages() if page.name != "cli.md"], ids=lambda page: page.name
)
def test_a_page_has_no_archaic_words(page):
    place = page.relative_to(ROOT).as_posix()
    found = [
        f"{match.group()!r}: {advice}"
        for pattern, advice in PHRASES.items()
        for match in re.finditer(pattern, prose(page), re.MULTILINE)
    ]

    assert not found, f"{place}: {found}"


@pytest.mark.parametrize(
    "sentence", ["It begins anew.", "A pickle is no file.", "It lies beside it.", "What is written. Then"]
)
def test_the_patterns_find_archaic_sentences(sentence):
    assert any(re.search(pattern, sentence, re.MULTILINE) for pattern in PHRASES)
