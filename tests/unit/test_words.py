"""How several things are said in one sentence, and that nobody says it by hand."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import lora_merge
from lora_merge.core.report import error, warning
from lora_merge.words import alike, counted, cut, listing, of_several, printable, ranges

SOURCES = sorted(Path(lora_merge.__file__).parent.rglob("*.py"))
BY_HAND = (
    re.compile(r"\{[^{}]*\blen\([^{}]*\} (other |groups? )?more\b"),
    re.compile(r"\{[^{}]*\} (others|more)\b(?! than)"),
    re.compile(r"\{[^{}]*(- *1|- *_[A-Z]+|- len\([^{}]*)\} "),
    re.compile(r"[\"'], ?…[\"'] if \w*len\("),
)
"""How a list that is cut short looks where it is made by hand."""


@pytest.mark.parametrize("n", range(5))
def test_no_list_says_that_there_are_none_left(n):
    names = [f"m{i}" for i in range(n)]
    said = [listing(names, most) for most in range(1, 6)] + [cut(most, n) for most in range(6)]
    said += [of_several(n, "is one", "are several")] if n else []

    assert not any(re.search(r"\b(0|-\d+) ", text) for text in said)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_no_list_is_cut_short_by_hand(path):
    if path.name == "words.py":
        return
    text = path.read_text(encoding="utf-8")
    found = [match[0] for pattern in BY_HAND for match in pattern.finditer(_code(text))]

    assert not found, "lora_merge.words has listing, cut and of_several"


def _code(text: str) -> str:
    """Return a module's text without its docstrings and comments."""
    tree = ast.parse(text)
    lines = text.splitlines()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            for n in range(node.lineno - 1, node.end_lineno or node.lineno):
                lines[n] = ""
    return "\n".join(re.sub(r"  # .*", "", line) for line in lines)


def test_what_is_made_by_hand_is_found():
    by_hand = [
        'f"and {len(names) - 1} more are lost"',
        'f"… and {len(errors) - _LISTED} more"',
        'f" and {n_left} others"',
        '", ".join(names[:4]) + (", …" if len(names) > 4 else "")',
    ]

    assert all(any(pattern.search(text) for pattern in BY_HAND) for text in by_hand)


def test_issues_that_differ_in_a_layer_are_one():
    found = [
        error(
            "shape", f"model.layers.{n}.self_attn.{name}", "lora_B is (64, 8), the base needs (32, 8)", "hint"
        )
        for n in range(19)
        for name in ("q_proj", "o_proj")
    ]

    (group,) = alike(found)

    assert str(group) == (
        "model.layers.{0-18}.self_attn.q_proj, model.layers.{0-18}.self_attn.o_proj: "
        "lora_B is (64, 8), the base needs (32, 8); 38 times\nhint: hint"
    )


def test_numbers_of_paths_are_folded_in_sentences_and_hints_and_no_others_are():
    found = [
        error("absent", f"layers.{n}.mlp.experts.{e}.up", f"the base has no layers.{n}.mlp.experts.{e}.up.weight", f"nearest: layers.{n}.mlp.up")
        for n in (4, 5, 7)
        for e in (0, 1)
    ]  # fmt: skip
    ranks = [error("rank", "layers.0.q", f"has rank {rank} and the scale 0.{rank}") for rank in (4, 8)]

    first, *others = alike([*found, *ranks])

    assert str(first) == (
        "layers.{4-5, 7}.mlp.experts.{0-1}.up: the base has no layers.{4-5, 7}.mlp.experts.{0-1}.up.weight; "
        "6 times\nhint: nearest: layers.{4-5, 7}.mlp.up"
    )
    assert [str(group) for group in others] == [
        "layers.0.q: has rank 4 and the scale 0.4",
        "layers.0.q: has rank 8 and the scale 0.8",
    ]


def test_severities_and_codes_are_not_mixed():
    found = [error("a", "x", "is odd"), warning("a", "x", "is odd"), error("b", "x", "is odd")]

    assert len(alike(found * 4)) == 3


def test_a_few_that_are_alike_keep_their_names():
    found = [error("a", f"layers.{n}.x", "is odd") for n in range(4)]

    assert [str(group) for group in alike(found[:3])] == [f"layers.{n}.x: is odd" for n in range(3)]
    assert [str(group) for group in alike(found)] == ["layers.{0-3}.x: is odd; 4 times"]


def test_counts_and_ranges_are_said_as_people_say_them():
    assert [counted(n, "tensor") for n in (0, 1, 2)] == ["0 tensors", "1 tensor", "2 tensors"]
    assert ranges([3, 1, 2, 2, 9]) == "1-3, 9"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nerror: b\r\tc", r"a\nerror: b\r\tc"),
        ("\x1b[31m\x1b]0;x\x07\x00\x7f\x9b", r"\x1b[31m\x1b]0;x\x07\x00\x7f\x9b"),
        ("\u202a\u202e\u2066\u2069\u200e\u200f", r"\u202a\u202e\u2066\u2069\u200e\u200f"),
        ("\u200b\u200d\ufeff\xad\u3164\ufe0f\U000e0041", r"\u200b\u200d\ufeff\xad\u3164\ufe0f\U000e0041"),
        ("\u2028\u2029\x85\xa0", r"\u2028\u2029\x85\xa0"),
        ("\ud800\udcff\ue000\U0010ffff", r"\ud800\udcff\ue000\U0010ffff"),
        ("[v1] [/b] :smile: α × 数 ‖Δ‖ 🙂 \\n", "[v1] [/b] :smile: α × 数 ‖Δ‖ 🙂 \\n"),
        ("", ""),
    ],
)
def test_a_text_that_is_printed_is_one_line_and_shows_all_of_itself(text, shown):
    assert printable(text) == shown
    assert printable(shown) == shown
    assert shown.isprintable()


def test_every_character_is_shown_or_written_out():
    every = "".join(map(chr, range(0x110000)))

    assert len(printable(every).splitlines()) == 1
    assert printable(every).isprintable()


def test_an_error_is_in_lines_of_its_own_and_no_others():
    from lora_merge.errors import LoraMergeError, PlanError

    issues = [error("x", f"a{n}\nerror: b", "c\x1b", "d\ne") for n in range(2)]

    assert str(issues[0]) == r"a0\nerror: b: c\x1b" + "\n" + r"hint: d\ne"
    assert len(str(PlanError(issues)).split("\n")) == 5
    assert str(LoraMergeError("a\nb", "c\rd", hint="e\nf")) == "a\\nb\nc\\rd"
    assert LoraMergeError("a", hint="e\nf").hint == r"e\nf"
