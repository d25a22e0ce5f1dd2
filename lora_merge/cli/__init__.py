"""The command line: one file per command; options, exit codes and the console are shared."""

from lora_merge.cli.app import main

__all__ = ["main"]
