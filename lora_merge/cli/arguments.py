"""A command line split into options with their values, by the options that a command has."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from lora_merge.cli.program import called

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_NEGATIVE = re.compile(r"-[\d.]")
_TRUTH = {"true", "false", "yes", "no", "on", "off"}

Arity = Callable[[str], int | None]
"""Returns how many values an unknown option has: 0, 1, or -1 for all that follow; None if that is not known."""


@dataclass(frozen=True, slots=True)
class Word:
    """An option with its values, or a text without an option."""

    name: str
    """As the user wrote it: ``--model``, ``-o``. Empty for a text without an option."""

    values: tuple[str, ...]
    is_known: bool = True
    is_joined: bool = False
    """True for ``--model=x``."""

    @property
    def tokens(self) -> tuple[str, ...]:
        """The texts that a shell would pass."""
        if self.is_joined:
            return (f"{self.name}={self.values[0]}",)
        return (self.name, *self.values) if self.name else self.values


def names_of(command: click.Command) -> dict[str, click.Option]:
    """Return the options of a command by each of their names, ``--no-…`` and ``--help`` included."""
    options = [one for one in command.get_params(click.Context(command)) if isinstance(one, click.Option)]
    return {name: one for one in options for name in (*one.opts, *one.secondary_opts)}


def split_words(arguments: Sequence[str], known: Mapping[str, click.Option], arity: Arity) -> list[Word]:
    """Return a command line as words. Nothing is checked: an option may lack its value.

    Args:
        arguments: texts behind the command's name.
        known: the command's options by name.
        arity: asked for options that are not known.
    """
    return list(_words(list(arguments), known, arity))


def _words(left: list[str], known: Mapping[str, click.Option], arity: Arity) -> Iterator[Word]:
    while left:
        text = left.pop(0)
        if text == "--":
            yield from (Word("", (rest,)) for rest in left)
            return
        if not _is_option(text):
            yield Word("", (text,))
            continue
        name, equals, value = text.partition("=")
        is_known = name in known or _is_cluster(name, known)
        if equals:
            yield Word(name, (value,), is_known, is_joined=True)
        elif is_known:
            option = known.get(name)
            n_values = option.nargs if option and not (option.is_flag or option.count) else 0
            yield Word(name, tuple(_taken(left, n_values)))
        else:
            yield Word(name, _values_of_unknown(left, arity(name)), is_known=False)


def _is_option(text: str) -> bool:
    """Return True for a text that begins as an option does. Negative numbers and a single ``-`` are values."""
    return text.startswith("-") and len(text) > 1 and not _NEGATIVE.match(text)


def _is_cluster(name: str, known: Mapping[str, click.Option]) -> bool:
    """Return True for short options in one text: ``-qv``, or ``-oDIR`` with its value."""
    if name.startswith("--") or len(name) < 3:
        return False
    first = known.get(name[:2])
    if first is not None and not first.is_flag:
        return True
    return all(f"-{letter}" in known for letter in name[1:])


def _values_of_unknown(left: list[str], n_values: int | None) -> tuple[str, ...]:
    """Take the values of an option that the command does not have."""
    if n_values == 0:
        # ``--merge_lora true``, ``--gpu 0``
        has_value = bool(left) and (left[0].lower() in _TRUTH or left[0].isdecimal())
        return tuple(_taken(left, 1 if has_value else 0))
    values: list[str] = []
    while left and not _is_option(left[0]):
        values.append(left.pop(0))
        if n_values != -1:
            break
    return tuple(values)


def _taken(left: list[str], n: int) -> list[str]:
    """Remove the first texts from a list, and return them."""
    taken, left[:] = left[:n], left[n:]
    return taken


def command_line(verb: str, tokens: Sequence[str]) -> str:
    """Return a command to copy, quoted for a shell. A token of the Hub is not repeated.

    Args:
        verb: name of the command; empty for a merge without it.
        tokens: texts behind it.
    """
    shown, prefix, left = [], "", list(tokens)
    while left:
        text = left.pop(0)
        if text == "--token" or text.startswith("--token="):
            prefix = "HF_TOKEN=… "
            del left[: text == "--token"]
        else:
            shown.append(text)
    return f"{prefix}{called()} {shlex.join([*filter(None, [verb]), *shown])}".rstrip()
