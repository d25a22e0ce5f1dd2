"""Words that are not a command: misspelt ones, and those of other tools."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from lora_merge.cli.advice import NEAR, Advice, about_unknown_options, reading_of
from lora_merge.cli.arguments import command_line
from lora_merge.cli.bare_paths import about_bare_paths
from lora_merge.cli.program import called
from lora_merge.cli.synonyms import VERBS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import click


def _lists() -> str:
    return f"{command_line('', ['--help'])} lists the commands"


def about_unknown_command(arguments: Sequence[str], known: Mapping[str, click.Command]) -> Advice:
    """Return the answer to a first word that is not a command.

    Args:
        arguments: the command line; its first text is the word.
        known: the commands by name.
    """
    word, *rest = arguments
    name = word.lower()
    if name in {"help", "version"}:
        verb = rest[0] if name == "help" and rest and rest[0] in known else ""
        return Advice(f"no command `{word}`", (command_line(verb, [f"--{name}"]),))
    found = VERBS.get(name)
    if found is None:
        return _misspelt(word, rest, known)
    if found.verb not in known:
        return Advice(f"no command `{word}`: {found.why}", (_lists(),))
    sentence = f"no command `{word}`: {found.why}" if found.why else f"`{word}` is called `{found.verb}` here"
    return _corrected(sentence, known[found.verb], [*rest, *found.arguments])


def _misspelt(word: str, rest: list[str], known: Mapping[str, click.Command]) -> Advice:
    """Return the answer to a word that is like a command, or like none."""
    for near in difflib.get_close_matches(word.lower(), [*known, *VERBS], 3, NEAR):
        verb = VERBS[near].verb if near in VERBS else near
        if verb in known:
            return _corrected(f"no command `{word}`; did you mean `{verb}`?", known[verb], rest)
    read = reading_of(known["merge"], [word, *rest])
    bare = [one.values[0] for one in read.words if not one.name]
    if len(bare) > 1:
        return about_bare_paths(bare, read)
    sentence = f"no command `{word}`, expected {', '.join(known)}"
    return Advice(sentence, (f"{_lists()}; a merge begins with its options: {called()} --adapter …",))


def _corrected(sentence: str, command: click.Command, rest: list[str]) -> Advice:
    """Return an answer with the whole command, in which wrong options and bare paths are corrected, too."""
    read = reading_of(command, [command.name or "", *rest])
    if any(not word.is_known for word in read.words):
        about = about_unknown_options(read)
        return Advice(sentence, about.hints, about.lines or (about.sentence,))
    bare = [word.values[0] for word in read.words if not word.name]
    if bare and command.name in {"merge", "plan"}:
        return Advice(sentence, about_bare_paths(bare, read).hints)
    return Advice(sentence, (read.line([text for word in read.words for text in word.tokens]),))
