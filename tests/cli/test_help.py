"""Help answers at once, and the documentation cannot rot."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from lora_merge.cli import exits
from lora_merge.cli import main as app

ROOT = Path(__file__).parents[2]
COMMANDS = [("lora-merge", app), *app.commands.items()]
HEAVY = ("torch", "transformers", "peft", "accelerate", "numpy", "rich", "pydantic", "yaml", "safetensors")


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from lora_merge.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )

    assert result.stderr.strip() == "[]"


def test_help_answers_in_a_fifth_of_a_second():
    """The fastest of several runs, against an empty interpreter, so that a busy machine does not decide."""

    def seconds(*arguments):
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], capture_output=True, check=True, cwd=ROOT)
        return time.perf_counter() - start

    bare = min(seconds("-c", "pass") for _ in range(5))
    full = min(seconds("-m", "lora_merge", "--help") for _ in range(8))

    assert full < max(0.2, 20 * bare)


@pytest.mark.parametrize(("name", "command"), COMMANDS, ids=[name for name, _ in COMMANDS])
def test_every_option_has_a_sentence_of_help(name, command):
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]

    assert command.help
    for option in options:
        assert option.help, option.name
        assert option.help.rstrip("] ")[-1] in ".]" or "[" in option.help, option.help


def test_every_field_of_a_request_is_an_option():
    from dataclasses import fields

    from lora_merge.core.request import Request

    options = {parameter.name for parameter in app.commands["merge"].params}
    assert {field.name for field in fields(Request)} <= options


def test_the_generated_page_is_current():
    result = subprocess.run(
        [sys.executable, ROOT / "scripts" / "docs.py", "--check"], capture_output=True, text=True, check=False
    )

    assert result.returncode == 0, result.stderr


def test_the_help_of_the_group_lists_the_options_and_the_exit_codes(cli):
    text = cli("--help").output

    assert "--adapter DIR" in text
    for meaning in exits.MEANINGS.values():
        assert " ".join(meaning.split()[:4]) in text


def test_version_is_that_of_the_package(cli):
    from lora_merge import __version__

    assert cli("--version").output == f"lora-merge, version {__version__}\n"


def test_no_arguments_show_the_help(cli):
    assert "Usage: lora-merge" in cli().output
