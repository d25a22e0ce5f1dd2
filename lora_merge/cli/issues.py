"""Issues and errors: printed on stderr, and as data on stdout."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.cli.data import error_data
from lora_merge.cli.voice import say, say_lines, say_raw, show_data
from lora_merge.words import Alike, alike, cut, told

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_merge.core.report import Issue

_ORDER = ("error", "warning", "note")


def say_issues(issues: Sequence[Issue], *, each: bool) -> None:
    """Print issues on stderr: errors, then warnings, then notes, each with its hint on a separate line.

    Similar ones are grouped unless ``each`` is set.
    """
    errors = [issue for issue in issues if issue.severity == "error"]
    groups, n_left = ([Alike([issue]) for issue in errors], 0) if each else told(errors, len(errors))
    others = sorted(
        (issue for issue in issues if issue.severity != "error"),
        key=lambda issue: _ORDER.index(issue.severity),
    )
    for group in groups:
        say_group(group)
    if left := cut(len(groups), len(groups) + n_left, "other kinds", "-v and --json list them all"):
        say(left)
    for group in [Alike([issue]) for issue in others] if each else alike(others):
        say_group(group)


def say_group(group: Alike, about: str = "") -> None:
    """Print similar issues: the sentence after its severity, then the hint.

    Args:
        group: one issue or several.
        about: whose they are, such as the name of a job; empty: the run's.
    """
    say(f"{group.first.severity}: {about}{': ' * bool(about)}{group.line}")
    if group.hint:
        say(f"hint: {group.hint}")


def say_error(
    error: BaseException, sentence: str, code: int, *, as_json: bool, verbose: bool = False
) -> None:
    """Print an error on stderr; with ``as_json`` also as data on stdout.

    Args:
        error: the exception.
        sentence: its text, fit to be printed.
        code: the exit code.
        as_json: print it as data too.
        verbose: print each of its issues, not groups of them.
    """
    issues: tuple[Issue, ...] = getattr(error, "issues", ())
    hints = _hints(error)
    # The text of an error with one issue ends with its hint, which is printed below.
    for hint in hints:
        sentence = sentence.removesuffix(f"\nhint: {hint}")
    if verbose and len(issues) > 1:
        say_issues(issues, each=True)
        # The other lines of the sentence list the issues, which are printed already.
        sentence = sentence.partition("\n")[0]
    say_lines(f"error: {sentence}")
    for hint in hints:
        say(f"hint: {hint}")
    if as_json:
        show_data(error_data(error, sentence, code, hints))


def say_bug(exc: BaseException) -> None:
    """Print a bug: each line of its traceback, the error in one line, and where to report it."""
    import traceback

    for text in traceback.format_exception(exc):
        for line in text.rstrip("\n").split("\n"):
            say_raw(f"  {line}")
    say(f"error: a bug in lora-merge: {type(exc).__name__}: {exc}")
    say("hint: please report it, with the lines above")


def _hints(error: BaseException) -> list[str]:
    """Return the hints of an error: its own, and the notes that were added on its way."""
    return [hint for hint in (getattr(error, "hint", ""), *getattr(error, "__notes__", ())) if hint]
