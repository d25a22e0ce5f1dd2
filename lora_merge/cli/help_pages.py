"""Help pages: options in groups, and lines that break between words only."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import click

from lora_merge.cli.groups import grouped
from lora_merge.cli.program import with_name
from lora_merge.cli.usage import StrayTextError
from lora_merge.requests.table import options_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from click.shell_completion import CompletionItem

    from lora_merge.cli.groups import Listed

_WIDEST = 30
"""Widest first column; the explanation of a longer option begins on the next line."""

_WIDEST_SHORT = 28
"""The same on the short page, where every option has one line."""


class Page(click.HelpFormatter):
    """A help page of click that breaks no word: neither ``--dry-run`` at its hyphens nor a long metavar."""

    def write_usage(self, prog: str, args: str = "", prefix: str | None = None) -> None:
        """Write the usage line; what does not fit is continued below the first argument."""
        head = f"{'Usage: ' if prefix is None else prefix}{prog} "
        self.write(_filled(args, self.width, head, " " * len(head)) + "\n")

    def write_text(self, text: str) -> None:
        """Write paragraphs. A paragraph that begins with ``\\b`` keeps its lines."""
        margin = " " * self.current_indent
        parts = []
        for part in text.split("\n\n"):
            lines = part.strip("\n").split("\n")
            if lines[0].strip() == "\b":
                parts.append("\n".join(margin + with_name(line) for line in lines[1:]))
            else:
                parts.append(_filled(" ".join(part.split()), self.width, margin, margin))
        self.write("\n\n".join(parts) + "\n")

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = _WIDEST, col_spacing: int = 2) -> None:
        """Write names and their explanations in two columns."""
        rows = list(rows)
        first = min(max(len(name) for name, _ in rows), col_max) + col_spacing
        margin = " " * self.current_indent
        for name, text in rows:
            head = f"{margin}{name}".ljust(self.current_indent + first)
            rest = margin + " " * first
            if len(name) > first - col_spacing:
                self.write(head.rstrip() + "\n")
                head = rest
            self.write((_filled(text, self.width, head, rest) if text else head.rstrip()) + "\n")


def _filled(text: str, width: int, first: str, rest: str) -> str:
    """Return a text in lines of at most ``width`` characters, where its words allow it."""
    lines = textwrap.wrap(
        text,
        width,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join(lines) if lines else first.rstrip()


class PageContext(click.Context):
    """A context whose help is a `Page`."""

    formatter_class = Page


class Verb(click.Command):
    """A command of the table of options: its help lists them in groups."""

    context_class = PageContext

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the options; texts without an option are refused by name.

        Raises:
            StrayTextError: there are texts that the command has no arguments for.
        """
        ctx.allow_extra_args = True
        left = super().parse_args(ctx, args)
        if left and not ctx.resilient_parsing:
            raise StrayTextError(left, ctx)
        return left

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Offer the options by their long names, also where nothing was written yet."""
        offers = super().shell_complete(ctx, incomplete or "-")
        return [offer for offer in offers if len(offer.value) > 2 or offer.value == incomplete]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the arguments, then every option in its group."""
        verb = self.name or ""
        arguments = [
            (option.name.upper(), option.help)
            for option in options_of(verb)  # type: ignore[arg-type]  # the name of a command is a verb
            if option.is_positional
        ]
        if arguments:
            with formatter.section("Arguments"):
                formatter.write_dl(arguments)
        groups = [(group.title, _records(group.all, ctx)) for group in self.groups(ctx)]
        widest = max(len(name) for _, rows in groups for name, _ in rows)
        for title, rows in groups:
            with formatter.section(title):
                formatter.write_dl(_padded(rows, min(widest, _WIDEST)))

    def groups(self, ctx: click.Context) -> list[Listed]:
        """Return the command's options in groups."""
        options = [one for one in self.get_params(ctx) if isinstance(one, click.Option) and not one.hidden]
        return grouped(self.name or "", options)

    def format_common(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the short page: common options in one line each, the names of the others below them."""
        for group in self.groups(ctx):
            rows = [_short(one, ctx) for one in group.common]
            with formatter.section(group.title):
                if rows:
                    formatter.write_dl(_padded(rows, _WIDEST_SHORT), _WIDEST_SHORT)
                if group.rare:
                    names = ", ".join(dict.fromkeys(max(one.opts, key=len) for one in group.rare))
                    margin = " " * formatter.current_indent
                    formatter.write(
                        _filled(names, formatter.width, f"{margin}also: ", margin + " " * 6) + "\n"
                    )


def _padded(rows: list[tuple[str, str]], width: int) -> list[tuple[str, str]]:
    """Return rows whose first column has the same width in every group."""
    (name, text), *others = rows
    return [(name.ljust(width), text), *others]


def _records(options: Sequence[click.Parameter], ctx: click.Context) -> list[tuple[str, str]]:
    """Return what click shows of options: their names and their help."""
    records = (one.get_help_record(ctx) for one in options)
    return [record for record in records if record is not None]


def _short(option: click.Parameter, ctx: click.Context) -> tuple[str, str]:
    """Return an option's name and the first sentence of its help."""
    (record,) = _records([option], ctx)
    name, text = record
    name = name.partition(" / --no-")[0]
    if len(name) > _WIDEST_SHORT:
        # The long page lists the values.
        name = f"{name.partition(' ')[0]} NAME"
    sentence, dot, _ = text.partition("  [")[0].partition(". ")
    return name, sentence + dot.strip() + ("  [required]" if "  [required" in text else "")
