"""What to say about a wrong command line: the sentence, and the command that was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import click

from lora_merge.cli.arguments import Word, command_line, names_of, split_words
from lora_merge.cli.program import called
from lora_merge.cli.synonyms import OPTIONS, Synonym
from lora_merge.requests.table import OPTIONS as TABLE
from lora_merge.requests.table import options_of
from lora_merge.words import choice, uncapitalised

if TYPE_CHECKING:
    from lora_merge.requests.option import Option

NEAR: Final = 0.7
"""How similar a misspelt name has to be, from 0 to 1."""

_NEAR_OTHERS: Final = 0.8
"""The same for names of other tools. There are so many that some name is a bit like any word."""


@dataclass(frozen=True, slots=True)
class Advice:
    """An answer to a wrong command line."""

    sentence: str

    hints: tuple[str, ...]
    """Commands to copy, or what to do."""

    lines: tuple[str, ...] = ()
    """Lines below the sentence, where it is about several things."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A command line as far as it was understood."""

    command: click.Command
    shown: str
    """Name of the command as the user wrote it; empty for a merge without it."""

    words: tuple[Word, ...]

    @property
    def verb(self) -> str:
        """The command's name."""
        return self.command.name or ""

    @property
    def known(self) -> dict[str, click.Option]:
        """The command's options by name."""
        return names_of(self.command)

    def line(self, tokens: Sequence[str]) -> str:
        """Return the command with other arguments, to copy."""
        return command_line(self.shown, tokens)


def reading_of(command: click.Command, arguments: Sequence[str]) -> Reading:
    """Return a command line in words.

    Args:
        command: the command that the line is for.
        arguments: everything behind ``lora-merge``.
    """
    shown = command.name if arguments and arguments[0] == command.name else ""
    words = split_words(arguments[1 if shown else 0 :], names_of(command), _arity)
    return Reading(command, shown or "", tuple(words))


def _arity(name: str) -> int | None:
    """Return how many values an option has that the command lacks; None if it is not known."""
    found = OPTIONS.get(plain(name))
    if found is not None:
        return found.n_values
    rows = _rows_of(plain(name))
    return None if not rows else 0 if rows[0].is_switch or rows[0].sets else 1


def _rows_of(name: str) -> list[Option]:
    """Return the rows of the table that have this name on the command line, in any command."""
    return [row for row in TABLE if not row.is_positional and name in {_flag(row.name, row.flag), row.short}]


def plain(name: str) -> str:
    """Return an option's name in lower case, with ``-`` for ``_``, and two dashes before a long one.

    Example:
        >>> plain("--Base_Model"), plain("-base"), plain("-o")
        ('--base-model', '--base', '-o')
    """
    text = name.lower().replace("_", "-")
    return f"-{text}" if len(text) > 2 and not text.startswith("--") else text


def about_unknown_options(read: Reading) -> Advice:
    """Return the answer to options that the command does not have: one sentence for each, and the corrected command."""
    answers = {word: _about(word, read) for word in read.words if not word.is_known}
    sentences = tuple(dict.fromkeys(sentence for sentence, _ in answers.values()))
    head = sentences[0] if len(sentences) == 1 else f"{len(sentences)} options are not known here"
    lines = sentences if len(sentences) > 1 else ()
    if any(arguments is None for _, arguments in answers.values()):
        return Advice(head, (_as_plan(read) or help_hint(read),), lines)
    tokens: list[str] = []
    for word in read.words:
        tokens += word.tokens if word not in answers else answers[word][1] or []
    for word in answers:
        tokens = _with_suffixes(tokens, OPTIONS.get(plain(word.name)), word)
    return Advice(head, (read.line(tokens),), lines)


_EXAMPLES: Final = {"adapter": "ADAPTER", "base": "BASE", "tuned": "FINE_TUNED"}
"""Values to show for the options that commands require."""


def about_missing(name: str, also: str, read: Reading) -> Advice:
    """Return the answer to a command without a required option: the command with it.

    Args:
        name: the option's field.
        also: where else it could be given; the end of the sentence.
        read: the command line.
    """
    tokens = [text for word in read.words for text in word.tokens]
    example = ["-o", "merged" if read.verb == "merge" else "new-adapter"]
    if name != "out":
        example = [f"--{name.replace('_', '-')}", _EXAMPLES.get(name, name.upper())]
    row = next(row for row in options_of(read.verb) if row.name == name)  # type: ignore[arg-type]
    first = uncapitalised(row.help.partition(". ")[0].rstrip(".")).replace(": ", ", ", 1)
    sentence = f"missing option `--{name.replace('_', '-')}`: {first}{also}"
    return Advice(sentence, (read.line([*tokens, *example]),))


def about_late_command(command: click.Command, arguments: Sequence[str]) -> Advice:
    """Return the answer to a command's name behind options: ``lora-merge --quiet verify merged``."""
    name = command.name or ""
    rest = list(arguments)
    rest.remove(name)
    return Advice(f"the command comes first: {called()} {name} …", (command_line(name, rest),))


def help_hint(read: Reading) -> str:
    """Return where the options of a command are listed."""
    return f"{command_line(read.shown, ['--help'])} lists the options"


def _about(word: Word, read: Reading) -> tuple[str, list[str] | None]:
    """Return a sentence about an unknown option, and the arguments to write instead; None where they are not known."""
    for rule in _RULES:
        answer = rule(word, read)
        if answer is not None:
            return answer
    return f"no option `{word.name}`", None


def _spelling(word: Word, read: Reading) -> tuple[str, list[str]] | None:
    """``--dry_run``, ``-base``."""
    name = plain(word.name)
    if name not in read.known:
        return None
    return f"`{word.name}` is written `{name}`", _tokens(name, word, read)


def _synonym(word: Word, read: Reading) -> tuple[str, list[str] | None] | None:
    """An option of another tool."""
    found = OPTIONS.get(plain(word.name))
    if found is None:
        return None
    if not found.option:
        return f"there is no `{word.name}`: {found.why}", []
    name, _, fixed = found.option.partition(" ")
    argument = _positional(name, read)
    if argument is not None:
        sentence = f"`{word.name}` is the argument {argument} of `{read.verb}`, without a name"
        return sentence, list(word.values)
    if name not in read.known:
        return None
    verb = "written" if fixed else "called"
    return f"`{word.name}` is {verb} `{found.option}` here", found.arguments(word.values)


def _argument(word: Word, read: Reading) -> tuple[str, list[str]] | None:
    """``lora-merge inspect --adapter DIR``: the option of a merge, where it is an argument."""
    argument = _positional(plain(word.name), read)
    if argument is None:
        return None
    return f"`{word.name}` is the argument {argument} of `{read.verb}`, without a name", list(word.values)


def _of_others(word: Word, read: Reading) -> tuple[str, list[str] | None] | None:
    """An option of other commands."""
    verbs = sorted({verb for row in _rows_of(plain(word.name)) for verb in row.verbs})
    if not verbs:
        return None
    # The command of a merge, with another name: the plan does without.
    if read.verb == "plan" and "merge" in verbs:
        return f"`plan` writes nothing and has no `{word.name}`", []
    named = choice([f"`{verb}`" for verb in verbs])
    return f"`{word.name}` is an option of {named}, not of `{read.verb}`", None


def _as_plan(read: Reading) -> str:
    """Return a merge as a plan, without its output, where all of its options are those of a plan; otherwise empty."""
    words = [word for word in read.words if word.name not in {"--out", "-o"}]
    names = {name for row in options_of("plan") for name in (_flag(row.name, row.flag), row.short)}
    if read.verb != "merge" or not {plain(word.name) for word in words if word.name} <= names:
        return ""
    return command_line("plan", [text for word in words for text in word.tokens])


def _near(word: Word, read: Reading) -> tuple[str, list[str] | None] | None:
    """A misspelt option."""
    name = plain(word.name)
    near = _similar(name, read.known, 3, NEAR)
    if near:
        tokens = _tokens(near[0], word, read) if len(near) == 1 or _is_sure(name, near) else None
        listed = near[:1] if tokens is not None else near
        return f"no option `{word.name}`; did you mean {choice([f'`{one}`' for one in listed])}?", tokens
    for other in _similar(name, OPTIONS, 1, _NEAR_OTHERS):
        answer = _synonym(Word(other, word.values), read)
        if answer is not None and OPTIONS[other].option:
            option = OPTIONS[other].option
            return f"no option `{word.name}`; did you mean `{option}`?", answer[1]
    return None


def _similar(name: str, names: Iterable[str], most: int, least: float) -> list[str]:
    """Return the long options that are most similar to one. Their dashes do not count, since all have them."""
    known = {one.lstrip("-"): one for one in names if len(one) > 2}
    return [known[one] for one in difflib.get_close_matches(name.lstrip("-"), known, most, least)]


def _is_sure(name: str, near: Sequence[str]) -> bool:
    """Return True where the first of several similar names is far nearer than the second."""
    first, second = (difflib.SequenceMatcher(None, name, one).ratio() for one in near[:2])
    return first - second > 0.1


_Rule = Callable[[Word, Reading], "tuple[str, list[str] | None] | None"]
_RULES: Final[tuple[_Rule, ...]] = (_spelling, _argument, _synonym, _of_others, _near)


def _tokens(name: str, word: Word, read: Reading) -> list[str]:
    """Return an option with the values that were given to another name of it."""
    option = read.known[name]
    return [name] if option.is_flag or not word.values else [name, word.values[0], *word.values[1:]]


def _positional(name: str, read: Reading) -> str | None:
    """Return how the help shows the argument that an option's name means; None if it means none."""
    for option in options_of(read.verb):  # type: ignore[arg-type]  # the name of a command is a verb
        if option.is_positional and f"--{option.name}" == name:
            return option.name.upper()
    return None


def _flag(name: str, flag: str) -> str:
    return flag or f"--{name.replace('_', '-')}"


def _with_suffixes(tokens: list[str], found: Synonym | None, word: Word) -> list[str]:
    """Return arguments with values that belong to another option's value: ``--adapter DIR:0.5``."""
    if found is None or not found.onto:
        return tokens
    places = [n + 1 for n, text in enumerate(tokens[:-1]) if text == found.onto]
    values = word.values if len(word.values) > 1 else word.values * len(places)
    for place, value in zip(places, values, strict=False):
        tokens[place] += f"{found.mark}{value}"
    return tokens
