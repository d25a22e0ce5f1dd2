"""The program speaks plain English: archaic phrases in messages, hints, help and docstrings are refused.

Every text of the package is read from its syntax tree: arguments of calls, f-strings, and the docstrings of modules,
classes, functions and fields. Comments are not read.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.archaic import ARCHAIC

PACKAGE = Path(__file__).parents[2] / "lora_merge"

EXCEPTIONS = {("words.py", "and 0 more"): "it says what the lists that it cuts never say"}
"""(file, phrase as it is written) → why it may stay."""


def texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and value of each text of several words. An f-string is one text, with ``…`` for each value."""
    parts: set[int] = set()
    for node in ast.walk(tree):  # outer nodes come first
        match node:
            case ast.JoinedStr() if id(node) not in parts:
                parts |= {id(part) for part in node.values if isinstance(part, ast.Constant)}
                parts |= {
                    id(part)
                    for value in node.values
                    if isinstance(value, ast.FormattedValue) and value.format_spec is not None
                    for part in ast.walk(value.format_spec)
                }
                text = "".join(
                    str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values
                )
            case ast.Constant(value=str(text)) if id(node) not in parts:
                pass
            case _:
                continue
        if " " in text.strip():
            yield node.lineno, " ".join(text.split())


def archaic(source: str) -> Iterator[tuple[int, str, str]]:
    """Yield line, phrase and plain words for each archaic phrase in the texts of a module."""
    for line, text in texts(ast.parse(source)):
        for pattern, plain in ARCHAIC.items():
            for match in re.finditer(pattern, text, re.IGNORECASE):
                yield line, match[0], plain


def modules() -> dict[str, str]:
    return {str(path.relative_to(PACKAGE)): path.read_text("utf-8") for path in sorted(PACKAGE.rglob("*.py"))}


def test_messages_help_and_docstrings_have_no_archaic_phrases():
    found = [
        f"{file}:{line}: {phrase!r}: write {plain!r}"
        for file, source in modules().items()
        for line, phrase, plain in archaic(source)
        if (file, phrase) not in EXCEPTIONS
    ]

    assert not found, "\n".join(found)


def test_every_exception_is_used():
    sources = modules()
    used = {
        (file, phrase) for file in {file for file, _ in EXCEPTIONS} for _, phrase, _ in archaic(sources[file])
    }

    assert used == EXCEPTIONS.keys()


@pytest.mark.parametrize(
    ("source", "phrase"),
    [
        ('"""A module that stands beside another."""', "stands beside"),
        ('def f():\n    """Return what nobody has."""', "nobody"),
        ('raise ValueError(f"{name!r} is no dtype")', "is no"),
        ('raise ValueError(f"x is no {name}")', "is no"),
        ('error("code", "subject", "engines leave it out " "without a word")', "without a word"),
        ('warning("code", "a", "b", hint="give each job an output of its own")', "of its own"),
        ('say(f"{n} files, so they are made anew")', "anew"),
        ('width: int\n"""Where a weight lies in the file."""', "lies in"),
        ("say(f\"a {f'file that goes on with {x}'}\")", "goes on with"),
    ],
)
def test_a_phrase_is_found_where_texts_are(source, phrase):
    assert phrase in [found for _, found, _ in archaic(source)]


@pytest.mark.parametrize(
    "source",
    [
        "# Nobody reads this comment.\nx = 1",
        'raise ValueError("there is no such directory")',
        'say("the file is no longer part of the output, and is no more than 3 bytes long")',
        'say("one of its own tensors stands for the whole; it stands out")',
    ],
)
def test_plain_sentences_and_comments_pass(source):
    assert not list(archaic(source))
