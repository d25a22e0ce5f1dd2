"""Sentences about several things: lists that end, counts, groups of similar issues; and text fit to be printed.

All lists are shortened here, so that none ever says "and 0 more". All text from files and users is made fit to be
printed here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from lora_merge.core.report import Issue

_PATH = re.compile(r"[A-Za-z_]\w*(?:\.\w+)+")
"""A dotted path of a module or tensor. Decimal numbers and shapes do not match."""

_FEW = 3
"""Up to this many similar issues get a line each."""

CAUSE = "other-size"
"""Code of the issue that is the cause of others: the base is not the one of the training."""

_SHOWN = 100
"""Most characters of a value that a message repeats."""

_NUMBER = re.compile(r"(?<=\.)(\d+)(?=\.|$)")
"""A number in a path: of a layer, of an expert."""

_HIDDEN = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
"""Characters that Unicode calls printable although they show nothing: fillers, joiners, variation selectors."""


def printable(text: str) -> str:
    """Return a text as one line in which everything is visible and nothing controls a terminal.

    Everything from a file or a user goes through here before it is printed. Written as Python escapes are: control
    characters (newlines, tabs, DEL and those of 8 bits included), marks of direction, characters without a width,
    separators of lines and paragraphs, lone surrogates, and code points that Unicode has not assigned. Applying it twice
    changes nothing.

    Example:
        >>> print(printable("a\\x1b]0;b\\x07\\nerror: c"), printable("[/b] α"))
        a\\x1b]0;b\\x07\\nerror: c [/b] α
    """
    if not text.isprintable():
        text = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
    # Python's ``isprintable`` is True for these.
    return _HIDDEN.sub(lambda match: ascii(match[0])[1:-1], text)


def printable_json(text: str) -> str:
    """Return equal JSON in which nothing controls a terminal or ends a line.

    JSON allows DEL, controls of 8 bits and marks of direction in a string. Lone surrogates cannot be written as UTF-8.

    Example:
        >>> print(printable_json('{"α": "\\x7f\\u2028"}'))
        {"α": "\\u007f\\u2028"}
    """
    if all(line.isprintable() for line in text.split("\n")):
        return text  # megabytes, for a plan of many tensors
    return "".join(char if char.isprintable() or char == "\n" else _utf16(char) for char in text)


def _utf16(char: str) -> str:
    units = char.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[n : n + 2].hex()}" for n in range(0, len(units), 2))


def quoted(value: object) -> str:
    """Return the ``repr`` of a value for a message: on one line, and shortened.

    Example:
        >>> quoted("x"), quoted({"a": [1]}), len(quoted("x" * 5000))
        ("'x'", "{'a': [1]}", 101)
    """
    # Python refuses to print numbers of thousands of digits.
    if isinstance(value, int) and value.bit_length() > 4 * _SHOWN:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, str | list | tuple):
        value = value[:_SHOWN]
    elif isinstance(value, dict) and len(value) > _SHOWN:
        value = {key: value[key] for key in list(value)[:_SHOWN]}
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def shown(value: object) -> str:
    """Return a value as an error repeats it.

    Example:
        >>> shown("bf17"), shown({"token": "…"}), shown([])
        ("'bf17'", 'a table', '[]')
    """
    # The content of a table or list is not repeated: it may hold a token.
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, list | tuple | set | frozenset):
        return "a list" if value else "[]"
    return quoted(value)


def uncapitalised(text: str) -> str:
    """Return a text that begins in lower case, unless its first word is an abbreviation.

    Example:
        >>> uncapitalised("Invalid value"), uncapitalised("YAML file"), uncapitalised("`--dtype` has no value")
        ('invalid value', 'YAML file', '`--dtype` has no value')
    """
    return text if text[1:2].isupper() else f"{text[:1].lower()}{text[1:]}"


def counted(n: int, thing: str) -> str:
    """Return a number with its noun, in the plural where it is not 1.

    Example:
        >>> counted(1, "tensor"), counted(3, "tensor"), counted(2, "copy")
        ('1 tensor', '3 tensors', '2 copies')
    """
    plural = f"{thing[:-1]}ies" if thing.endswith("y") else f"{thing}s"
    return f"{n} {thing if n == 1 else plural}"


def rows_checked(n_projected: int, n_recomputed: int) -> str:
    """Return how many rows were checked, and how.

    Example:
        >>> rows_checked(9600, 2096), rows_checked(0, 7204)
        ('9600 rows by projection, 2096 recomputed', '7204 rows recomputed')
    """
    if not n_projected:
        return f"{counted(n_recomputed, 'row')} recomputed"
    return f"{counted(n_projected, 'row')} by projection, {n_recomputed} recomputed"


def size_text(nbytes: float) -> str:
    """Return a size in decimal units, as disks and shards use them.

    Example:
        >>> size_text(2_700_000_000)
        '2.70 GB'
    """
    for unit in ("B", "kB", "MB"):
        # What would be rounded to 1000 is written in the next unit.
        if nbytes < 999.95:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB" if nbytes < 9999.5 else f"{nbytes / 1000:.2f} TB"


def duration_text(seconds: float) -> str:
    """Return a duration in one unit.

    Example:
        >>> duration_text(0.2), duration_text(45), duration_text(600), duration_text(9000), duration_text(300_000)
        ('1 s', '45 s', '10 min', '2.5 h', '3.5 days')
    """
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    hours = seconds / 3600
    number, unit = (hours, "h") if hours < 48 else (hours / 24, "days")
    return f"{number:.1f}".removesuffix(".0") + f" {unit}"


def between(low: str, high: str) -> str:
    """Return a range of two quantities, with the unit once where both have it.

    Example:
        >>> between("2 s", "6 s"), between("50 s", "3 min"), between("3 s", "3 s")
        ('2 to 6 s', '50 s to 3 min', 'about 3 s')
    """
    if low == high:
        return f"about {low}"
    number, _, unit = low.partition(" ")
    return f"{number} to {high}" if high.endswith(f" {unit}") else f"{low} to {high}"


def listing(names: Collection[str], most: int = 4, rest: str = "more") -> str:
    """Return names as a list; of many, the first ones and the number of the others.

    Example:
        >>> listing(["a", "b"]), listing("abcdef"), listing(["a", "b"], most=1, rest="more of its tensors")
        ('a, b', 'a, b, c, d and 2 more', 'a and 1 more of its tensors')
        >>> listing("abcde", rest="other names"), listing("abcdef", rest="other names")
        ('a, b, c, d and 1 other name', 'a, b, c, d and 2 other names')
    """
    # "1 other name", but "1 more of its tensors".
    if len(names) == most + 1 and " of " not in rest:
        rest = rest.removesuffix("s")
    shown = ", ".join(list(names)[:most])
    return f"{shown} and {len(names) - most} {rest}" if len(names) > most else shown


def cut(shown: int, total: int, rest: str = "more", way: str = "") -> str:
    """Return the line under a list that was shortened; empty if it was not.

    Args:
        shown: number of lines that are shown.
        total: number of all lines.
        rest: noun for the others, in the plural.
        way: how to see them.

    Example:
        >>> cut(2, 5, way="-v lists all"), cut(5, 5), cut(1, 3, "groups"), cut(2, 3, "groups")
        ('… and 3 more (-v lists all)', '', '… and 2 groups', '… and 1 group')
    """
    if total <= shown:
        return ""
    rest = rest.removesuffix("s") if total - shown == 1 else rest
    return f"… and {total - shown} {rest}" + (f" ({way})" if way else "")


def of_several(n: int, one: str, several: str) -> str:
    """Return a sentence whose subject is the first of several things, and which also counts the others.

    Args:
        n: number of things.
        one: the sentence for one thing.
        several: the sentence for more than one.

    Example:
        >>> of_several(1, "is in no file", "are in no file"), of_several(3, "is in no file", "are in no file")
        ('is in no file', 'this and 2 more are in no file')
    """
    return one if n == 1 else f"this and {n - 1} more {several}"


def choice(names: Sequence[str]) -> str:
    """Return alternatives joined with commas and "or".

    Example:
        >>> choice(["a"]), choice(["a", "b", "c"])
        ('a', 'a, b or c')
    """
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def ranges(numbers: Iterable[int]) -> str:
    """Return numbers as ranges.

    Example:
        >>> ranges([0, 1, 2, 5])
        '0-2, 5'
    """
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


class Alike:
    """Issues that say the same about several modules, layers or experts.

    Args:
        issues: one or more.
    """

    def __init__(self, issues: Sequence[Issue]) -> None:
        self.issues = tuple(issues)

    @property
    def first(self) -> Issue:
        """The issue that represents the group."""
        return self.issues[0]

    @property
    def subject(self) -> str:
        """Their subjects. Paths that differ only in numbers are written as one."""
        paths: dict[str, list[str]] = {}
        for issue in self.issues:
            paths.setdefault(_masked(issue.subject), []).append(issue.subject)
        return listing([_folded(same) for same in paths.values()], rest="other names")

    @property
    def sentence(self) -> str:
        """Their common sentence, with their number if there are several."""
        return _folded([issue.sentence for issue in self.issues]) + self._times

    @property
    def hint(self) -> str:
        """Their common hint."""
        return _folded([issue.hint for issue in self.issues])

    @property
    def _times(self) -> str:
        return f"; {len(self.issues)} times" if len(self.issues) > 1 else ""

    def __str__(self) -> str:
        """Return the group as `Issue` does: a sentence, and the hint on a separate line."""
        return f"{self.line}\nhint: {printable(self.hint)}" if self.hint else self.line

    @property
    def line(self) -> str:
        """Subject and sentence as one line that is fit to be printed."""
        return printable(f"{self.subject}: {self.sentence}" if self.subject else self.sentence)


def alike(issues: Iterable[Issue]) -> list[Alike]:
    """Return issues in groups that differ only in their subjects and in numbers of paths.

    Example:
        >>> from lora_merge.core.report import error
        >>> found = [error("x", f"layers.{n}.{name}", "is lost") for name in ("a", "b") for n in range(3)]
        >>> [str(group) for group in alike([*found, error("x", "c", "is there twice")])]
        ['layers.{0-2}.a, layers.{0-2}.b: is lost; 6 times', 'c: is there twice']
    """
    groups: dict[tuple[str, ...], list[Issue]] = {}
    for issue in issues:
        key = (issue.severity, issue.code, _masked(issue.sentence), _masked(issue.hint))
        groups.setdefault(key, []).append(issue)
    return [
        Alike(part)
        for group in groups.values()
        # A few similar issues stay separate, so that each names its own subject.
        for part in ([group] if len(group) > _FEW else [[issue] for issue in group])
    ]


def told(issues: Sequence[Issue], most: int) -> tuple[list[Alike], int]:
    """Return the groups of issues to print, and the number of groups that are left out.

    If one issue is the cause of the others, it comes first, with a few of the others as examples.
    """
    cause = [issue for issue in issues if issue.code == CAUSE]
    groups = alike([*cause, *(issue for issue in issues if issue.code != CAUSE)])
    shown = groups[: len(cause) + _FEW if cause else most]
    return shown, len(groups) - len(shown)


def _masked(text: str) -> str:
    """Return a text with ``#`` for the numbers of its paths: the key of a group."""
    return _PATH.sub(lambda match: "#".join(_pieces(match[0])[::2]), text)


def _pieces(path: str) -> list[str]:
    """Return a path split at its numbers. Every second piece is a number."""
    return _NUMBER.split(path)


def _folded(texts: Sequence[str]) -> str:
    """Return texts that differ only in numbers of paths as one: ``layers.{0-18}.q_proj``."""
    first = texts[0]
    if len(set(texts)) == 1:
        return first
    columns = iter(zip(*(_numbers(text) for text in texts), strict=True))

    def fold(path: re.Match[str]) -> str:
        pieces = _pieces(path[0])
        for n in range(1, len(pieces), 2):
            found = set(map(int, next(columns)))
            pieces[n] = pieces[n] if len(found) == 1 else f"{{{ranges(found)}}}"
        return "".join(pieces)

    return _PATH.sub(fold, first)


def _numbers(text: str) -> list[str]:
    """Return all numbers of the paths in a text, in order."""
    return [number for path in _PATH.findall(text) for number in _pieces(path)[1::2]]
