"""Completion in a shell: what is offered where, and how shells ask for it.

click finds out which option or argument is being completed. The shells' part is in `completion_scripts`: they send the command
line up to the cursor in ``COMP_LINE``, and get one line for each offer: sort, value and explanation, with tabs between them.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from typing import TYPE_CHECKING

from click.shell_completion import CompletionItem, ShellComplete, add_completion_class

from lora_merge.cli.completion_scripts import SCRIPTS
from lora_merge.diagnosis.caches import cached_repos

if TYPE_CHECKING:
    import click

    from lora_merge.requests.option import Option

Completer = Callable[["click.Context", "click.Parameter", str], "list[CompletionItem[str]]"]


def completer(option: Option) -> Completer | None:
    """Return what offers values of an option; None where there is nothing to offer."""
    kind = option.kind
    if kind.words:
        return lambda _ctx, _param, incomplete: _words(option, incomplete)
    if kind.metavar.startswith("DIR|ID"):
        return lambda _ctx, _param, incomplete: [*_repos(option, incomplete), CompletionItem("", "dir")]
    if kind.metavar == "DIR":
        return lambda _ctx, _param, _incomplete: [CompletionItem("", "dir")]
    if kind.file or kind.metavar in {"FILE", "PATH"}:
        return lambda _ctx, _param, _incomplete: [CompletionItem("", "file")]
    return None


def _words(option: Option, incomplete: str) -> list[CompletionItem[str]]:
    return [CompletionItem(word) for word in option.kind.words if word.startswith(incomplete)]


def _repos(option: Option, incomplete: str) -> list[CompletionItem[str]]:
    """Offer repos of the Hub that its cache holds: adapters for ``--adapter``, models for the others."""
    found = cached_repos(adapters=option.name == "adapter")
    return [CompletionItem(name, help="in the Hub's cache") for name in found if name.startswith(incomplete)]


def split_line(line: str) -> tuple[list[str], str]:
    """Return the words of a command line up to the cursor, and the word that is being written.

    Example:
        >>> split_line("lora-merge --base 'my mod")
        (['lora-merge', '--base'], 'my mod')
        >>> split_line("lora-merge --base ")
        (['lora-merge', '--base'], '')
    """
    lexer = shlex.shlex(line, posix=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    words: list[str] = []
    is_open = False
    try:
        words += lexer
    except ValueError:  # a quote or an escape that is not closed yet
        is_open = True
        words.append(lexer.token)
    if not is_open and (not words or (line[-1].isspace() and not line.endswith("\\ "))):
        return words, ""
    return words[:-1], words[-1]


class _Shell(ShellComplete):
    """One way to ask for all shells."""

    def get_completion_args(self) -> tuple[list[str], str]:
        """Return the complete words behind the command's name, and the one that is being written."""
        words, incomplete = split_line(os.environ.get("COMP_LINE", ""))
        if len(words) == 1 and incomplete.startswith("--") and "=" in incomplete:
            # click looks for the option among those of the group.
            words.append("merge")
        return words[1:], incomplete

    def format_completion(self, item: CompletionItem[str]) -> str:
        """Return an offer as a line."""
        sentence = " ".join((item.help or "").split()).partition(". ")[0]
        return "\t".join((item.type, item.value, sentence.partition(" [default")[0].removesuffix(".")))


def _add_shells() -> None:
    """Make the shells known to click, in place of click's scripts."""
    for name, script in SCRIPTS.items():
        add_completion_class(type(f"_{name.title()}", (_Shell,), {"source_template": script}), name)


_add_shells()
