"""``lora-merge completion``: prints the script by which a shell completes the command."""

from __future__ import annotations

import click

from lora_merge.cli.help_pages import Verb
from lora_merge.cli.options import SETTINGS, options
from lora_merge.cli.voice import show

VARIABLE = "_LORA_MERGE_COMPLETE"
"""Environment variable by which a shell asks for offers."""


@click.command(cls=Verb, context_settings=SETTINGS)
@options("completion")
def completion(*, shell: str) -> None:
    """Print the completion script of a shell.

    The script completes commands, options, their values, paths, and repos in the Hub's cache. Add one line to the
    shell's start-up file, and open a new shell.

    \b
    Examples:
      eval "$(lora-merge completion bash)"     # in ~/.bashrc
      eval "$(lora-merge completion zsh)"      # in ~/.zshrc
      lora-merge completion fish | source      # in ~/.config/fish/config.fish
    """
    from click.shell_completion import get_completion_class

    from lora_merge.cli import completing  # noqa: F401 - its shells replace those of click

    root = click.get_current_context().find_root()
    made = get_completion_class(shell)
    if made is None:
        raise click.UsageError(f"no completion for the shell {shell}")
    show(made(root.command, {}, "lora-merge", VARIABLE).source().rstrip("\n"))
