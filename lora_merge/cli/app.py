"""The command ``lora-merge``. Without a command's name it merges."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING, Any, NoReturn

import click

from lora_merge import __version__
from lora_merge.cli import AGAIN, OF_THE_GROUP, exits, interrupted_words, is_only_shown
from lora_merge.cli.batch import batch
from lora_merge.cli.completion import VARIABLE, completion
from lora_merge.cli.convert import convert
from lora_merge.cli.doctor import doctor
from lora_merge.cli.extract import extract
from lora_merge.cli.help_pages import PageContext
from lora_merge.cli.inspect import inspect
from lora_merge.cli.issues import say_error
from lora_merge.cli.merge import merge
from lora_merge.cli.options import SETTINGS
from lora_merge.cli.plan import plan
from lora_merge.cli.usage import UnknownCommandError, advice_about
from lora_merge.cli.verify import verify
from lora_merge.cli.voice import say, say_raw, show
from lora_merge.errors import LoraMergeError
from lora_merge.runtime.interrupts import as_keyboard_interrupt, strike
from lora_merge.runtime.shortage import MORE, translate_out_of_memory
from lora_merge.runtime.streams import Foreign, failure_of
from lora_merge.words import printable, uncapitalised

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

    from click.shell_completion import CompletionItem

_MORE = "COMMAND --help explains a command; --help-all explains every option."


class _App(click.Group):
    """A group whose default command is ``merge``."""

    context_class = PageContext

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Insert ``merge`` if the first argument names no command."""
        if args and args[0] not in self.commands and args[0] not in OF_THE_GROUP:
            if not ctx.resilient_parsing and _is_command(args):
                raise UnknownCommandError(f"no command {args[0]}", ctx)
            args = ["merge", *args]
        return super().parse_args(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Offer the commands, or options: those of ``merge`` may follow directly."""
        from click.shell_completion import CompletionItem

        offers = [
            CompletionItem(name, help=command.help)
            for name, command in self.commands.items()
            if name.startswith(incomplete)
        ]
        if incomplete.startswith("-"):
            offers = click.Command.shell_complete(self, ctx, incomplete)
            with merge.make_context("merge", [], parent=ctx, resilient_parsing=True) as inner:
                offers = [*merge.shell_complete(inner, incomplete), *offers]
        return list({offer.value: offer for offer in offers}.values())

    def _main_shell_completion(self, *args: Any, **more: Any) -> None:
        """Answer a shell, if one asks."""
        if VARIABLE in os.environ:
            # The shells' classes replace those of click.
            from lora_merge.cli import completing  # noqa: F401

            super()._main_shell_completion(*args, **more)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order of the help."""
        del ctx
        return list(self.commands)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands, then the options of ``merge``, which may follow directly."""
        self.format_commands(ctx, formatter)
        merge.format_common(ctx, formatter)
        formatter.write_paragraph()
        formatter.write_text(_MORE)

    def help_all(self, ctx: click.Context) -> str:
        """Return the long page: every option of ``merge`` with its explanation, and the exit codes."""
        formatter = ctx.make_formatter()
        self.format_usage(ctx, formatter)
        self.format_help_text(ctx, formatter)
        self.format_commands(ctx, formatter)
        merge.format_options(ctx, formatter)
        rows = [(str(code), meaning) for code, meaning in exits.MEANINGS.items()]
        with formatter.section("Exit codes"):
            formatter.write_dl(rows)
        return formatter.getvalue().rstrip("\n")

    @as_keyboard_interrupt()
    def invoke(self, ctx: click.Context) -> Any:
        """Carry out the command. Interrupts leave here as KeyboardInterrupt."""
        # click turns an interrupt into an Abort, which is a RuntimeError, but only outside of this call.
        return super().invoke(ctx)

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any) -> NoReturn:  # type: ignore[override]
        """Run the command line; turn any error into one sentence and one exit code."""
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # nohup ignores SIGHUP, and that has to stay.
            if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
                signal.signal(signum, _interrupt)
        arguments = list(sys.argv[1:] if args is None else args)
        # Read by hand, since an error may come before click has parsed anything.
        as_json = "--json" in arguments
        verbose = bool({"-v", "--verbose"} & set(arguments))
        if isinstance(sys.stderr, Foreign):
            # What libraries print on stderr becomes notes, and ``--quiet`` drops those as well.
            sys.stderr.quiet = bool({"-q", "--quiet"} & set(arguments))
        try:
            with translate_out_of_memory("starting", MORE):
                code = super().main(arguments, prog_name, **{**extra, "standalone_mode": False})
        except (click.exceptions.Exit, SystemExit) as exc:
            code = exc.code if isinstance(exc, SystemExit) else exc.exit_code
        except click.ClickException as exc:
            code = exits.USAGE
            _say_usage(exc, arguments, as_json=as_json)
        except (click.Abort, KeyboardInterrupt) as exc:
            code = exits.INTERRUPTED
            sentence, said = interrupted_words(arguments), exc.__cause__ or exc
            if not getattr(said, "__notes__", ()):
                said.add_note(AGAIN)
            say_error(said, sentence, code, as_json=as_json)  # click makes an Abort of it
        except LoraMergeError as exc:
            code = exits.code_of(exc)
            say_error(exc, str(exc), code, as_json=as_json, verbose=verbose)
        code = code if isinstance(code, int) else exits.OK
        sys.exit(_with_lost_result(code, is_all=is_only_shown(arguments)))


def _is_command(arguments: Sequence[str]) -> bool:
    """Return True if the first text was meant as a command: it is neither an option nor a path."""
    if arguments[0].startswith("-"):
        return False
    from lora_merge.cli.bare_paths import looks_like_path

    return not looks_like_path(arguments[0])


def _say_usage(exc: click.ClickException, arguments: Sequence[str], *, as_json: bool) -> None:
    """Print an error of the command line in one line, with the command that was probably meant, or how to get help."""
    if isinstance(exc, click.exceptions.NoArgsIsHelpError):
        # Its message is the help page.
        for line in exc.format_message().split("\n"):
            say_raw(line)
        return
    advice = None
    if isinstance(exc, click.UsageError):
        advice = advice_about(exc, arguments, main.commands)
    lines = (
        [uncapitalised(exc.format_message().rstrip("."))]
        if advice is None
        else [uncapitalised(advice.sentence), *(f"  {line}" for line in advice.lines)]
    )
    sentence = "\n".join(map(printable, lines))
    # Data has click's own names of errors.
    said = exc if type(exc).__module__.startswith("click.") else click.UsageError(sentence)
    context = getattr(exc, "ctx", None)
    if advice is not None:
        for hint in advice.hints:
            said.add_note(hint)
    elif context is not None:
        said.add_note(f"{context.command_path} --help lists its options")
    say_error(said, sentence, exits.USAGE, as_json=as_json)


def _with_lost_result(code: int, *, is_all: bool) -> int:
    """Report a result that stdout did not take; return the exit code.

    It is an error if the result is all that the command has to show for itself, otherwise a warning.
    """
    lost = failure_of(sys.stdout)
    # A reader that has left, such as ``head``, has what it wanted and does not count.
    if lost is None:
        return code
    say(f"{'error' if is_all else 'warning'}: the result cannot be written to stdout ({lost.strerror})")
    return exits.WRITE if is_all and code == exits.OK else code


def _interrupt(signum: int, frame: FrameType | None) -> None:
    """Treat SIGTERM, and SIGHUP of a closed terminal, like Ctrl-C: complete work is kept, the rest removed.

    A second signal ends the process at once.
    """
    # Except for SIGHUP: a terminal and its shell may both send it when the terminal is closed.
    again = signal.SIG_IGN if signum == signal.SIGHUP else lambda *_: os._exit(exits.INTERRUPTED)
    signal.signal(signum, again)
    strike(signum, frame)


def _show_help_all(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    """Print the long page, and end."""
    del param
    if value and not ctx.resilient_parsing:
        show(main.help_all(ctx))
        ctx.exit()


@click.group(
    cls=_App,
    context_settings=SETTINGS,
    subcommand_metavar="--adapter DIR|ID -o DIR [OPTIONS] | COMMAND …",
    options_metavar="",
)
@click.version_option(__version__, prog_name="lora-merge")
@click.option(
    "--help-all",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_help_all,
    help="Explain every option and exit code.",
)
def main() -> None:
    """Merge LoRA adapters into their base model. The output is a plain Hugging Face checkpoint, which any engine loads
    without LoRA support.

    \b
    Examples:
      lora-merge --base Llama-3-8B --adapter my-lora -o merged
      lora-merge verify merged --forward
      lora-merge convert my-lora --for vllm --rank 16 -o my-lora-16
    """


for _command in (merge, plan, verify, inspect, convert, extract, batch, doctor, completion):
    main.add_command(_command)
