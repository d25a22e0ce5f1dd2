"""What is wrong, or worth knowing: issues and errors, on stderr and as data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.cli.data import error_data
from lora_merge.cli.voice import say, say_lines, show_data
from lora_merge.words import Alike, alike, cut, told

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_merge.core.report import Issue


def say_issues(issues: Sequence[Issue], *, each: bool) -> None:
    """Print issues on stderr: each, or those alike as one."""
    errors = [issue for issue in issues if issue.severity == "error"]
    groups, n_left = ([Alike([issue]) for issue in errors], 0) if each else told(errors, len(errors))
    others = [issue for issue in issues if issue.severity != "error"]
    for group in (*([Alike([issue]) for issue in others] if each else alike(others)), *groups):
        say(f"{group.first.severity}: {group}")
    if left := cut(len(groups), len(groups) + n_left, "other kinds", "-v and --json list them all"):
        say(left)


def say_error(
    error: BaseException, sentence: str, code: int, *, as_json: bool, verbose: bool = False
) -> None:
    """Print an error: for people on stderr, with ``verbose`` every issue of it, and with ``as_json`` as data on stdout.

    Args:
        error: what was raised.
        sentence: what it says, in lines of ours.
        code: the exit code.
        as_json: print it as data too.
        verbose: print every issue.
    """
    issues: tuple[Issue, ...] = getattr(error, "issues", ())
    if verbose and len(issues) > 1:
        say_issues(issues, each=True)
        sentence = sentence.partition("\n")[0]
    say_lines(f"error: {sentence}")
    hints = _hints(error)
    for hint in hints:
        say(f"hint: {hint}")
    if as_json:
        show_data(error_data(error, sentence, code, hints))


def say_bug(exc: BaseException) -> None:
    """Print a bug for whoever reports it: each line of its traceback as one, and the error in one line."""
    import traceback

    for text in traceback.format_exception(exc):
        for line in text.rstrip("\n").split("\n"):
            say(f"  {line}")
    say(f"error: a bug in lora-merge: {type(exc).__name__}: {exc}")
    say("hint: please report it, with the lines above")


def _hints(error: BaseException) -> list[str]:
    """Return what an error says to do about it: its own hint, and what was noted on its way."""
    return [hint for hint in (getattr(error, "hint", ""), *getattr(error, "__notes__", ())) if hint]
