"""Help answers at once, and the documentation cannot rot."""

from __future__ import annotations

import re
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
HEAVY = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "numpy",
    "rich",
    "pydantic",
    "yaml",
    "safetensors",
    "huggingface_hub",
)


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

    from lora_merge.requests.request import Request

    options = {parameter.name for parameter in app.commands["merge"].params}
    assert {field.name for field in fields(Request)} <= options


@pytest.mark.parametrize(
    ("command", "request_class"),
    [("inspect", "InspectRequest"), ("convert", "ConvertRequest"), ("extract", "ExtractRequest")],
)
def test_every_field_of_a_request_about_an_adapter_is_an_option(command, request_class):
    from dataclasses import fields

    from lora_merge.requests import request

    options = {parameter.name for parameter in app.commands[command].params}
    assert {field.name for field in fields(getattr(request, request_class))} <= options


def test_the_generated_page_is_current():
    result = subprocess.run(
        [sys.executable, ROOT / "scripts" / "docs.py", "--check"], capture_output=True, text=True, check=False
    )

    assert result.returncode == 0, result.stderr


def test_the_long_help_explains_every_option_of_a_merge_and_every_exit_code(cli):
    text = cli("--help-all").output

    assert all(meaning in " ".join(text.split()) for meaning in exits.MEANINGS.values())
    for option in app.commands["merge"].params:
        assert option.opts[-1] in text
        assert " ".join(option.help.split()) in " ".join(text.split())


def test_the_short_help_lists_commands_first_and_fits_two_screens(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = cli("--help").output

    assert len(text.splitlines()) < 60
    assert text.index("Commands:") < text.index("Base and adapters:") < text.index("Output:")
    for name, command in app.commands.items():
        assert re.search(rf"^  {name} +{re.escape(command.help.partition(chr(10))[0])}$", text, re.MULTILINE)


def test_every_option_of_the_short_help_has_one_line(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = cli("--help").output.partition("Base and adapters:")[2].splitlines()

    assert all(re.match(r"  (-|also: |      --)", line) for line in lines if line.startswith(" ")), lines


def test_the_short_help_names_every_option(cli):
    named = set(re.findall(r"--[a-z][a-z-]*", cli("--help").output))

    assert {option.opts[-1] for option in app.commands["merge"].params} <= named


@pytest.mark.parametrize(("name", "command"), COMMANDS, ids=[name for name, _ in COMMANDS])
@pytest.mark.parametrize("columns", [60, 80, 100])
def test_no_line_of_help_breaks_a_word(name, command, columns, cli, monkeypatch):
    """The words of the page are the same, however wide it is."""

    def page(columns):
        monkeypatch.setenv("COLUMNS", str(columns))
        return cli(*([] if command is app else [name]), "--help").output

    wide = page(100)
    text = page(columns)

    assert text.split() == wide.split()
    # A command in backticks stays on one line.
    assert not re.findall(r"`[^`\n]*\n[^`]*`", text) or columns < 80
    for line in text.splitlines():
        # Only what cannot be broken at all may stick out: an example, a list of values.
        assert len(line) <= columns or columns < 80 or len(line.split()) == 1, line


@pytest.mark.parametrize(("name", "command"), COMMANDS[1:], ids=[name for name, _ in COMMANDS[1:]])
def test_every_option_is_in_a_group(name, command):
    from lora_merge.cli.groups import OTHER

    groups = command.groups(click.Context(command))

    assert OTHER not in [group.title for group in groups]
    listed = [option.name for group in groups for option in group.all]
    assert {one.name for one in command.params if isinstance(one, click.Option)} <= set(listed)


def test_a_group_names_no_option_that_is_gone():
    from lora_merge.cli.groups import GROUPS
    from lora_merge.requests.table import OPTIONS

    known = {option.name for option in OPTIONS} | {"help", "_click_default_help", "report"}
    names = [name.rpartition(":")[2] for group in GROUPS for name in (*group.names, *group.rare)]
    assert set(names) <= known


@pytest.mark.parametrize("verb", ["merge", "convert", "extract"])
def test_out_has_a_short_name(verb):
    (out,) = [option for option in app.commands[verb].params if option.name == "out"]

    assert out.opts == ["-o", "--out"]


@pytest.mark.parametrize(
    "option",
    [
        "--adapter DIR|ID[:WEIGHT]", "--base DIR|ID", "--token TEXT", "--offline", "--base-is [original|residual]", "--density SHARE", "--seed N", "--allow-untie",
        "--allow-svd", "--combine [linear|ties|dare_linear|dare_ties|svd]",
    ],
)  # fmt: skip
def test_the_help_of_merge_shows_an_option_and_its_values(option, cli):
    assert option in cli("merge", "--help").output


def test_the_values_in_the_help_are_those_that_parse(cli):
    from typing import get_args

    from lora_merge.deltas import COMBINATIONS
    from lora_merge.executors import choices
    from lora_merge.quantised.schemes import SCHEMES
    from lora_merge.requests.choices import BaseIs, RoundingMethod

    shown = cli("merge", "--help").output
    assert f"--combine [{'|'.join(['linear', *COMBINATIONS])}]" in shown
    assert f"--executor [{'|'.join(choices())}]" in shown
    assert f"--base-is [{'|'.join(get_args(BaseIs))}]" in shown
    assert f"--rounding [{'|'.join(get_args(RoundingMethod))}]" in shown
    told = shown[shown.index("--quantize") : shown.index("--ignore ")]
    assert set(re.findall(r"[a-z]+\d[-a-z0-9]*", told)) == set(SCHEMES)


def test_version_is_that_of_the_package(cli):
    from lora_merge import __version__

    assert cli("--version").output == f"lora-merge, version {__version__}\n"


@pytest.mark.parametrize("columns", [40, 80])
def test_no_arguments_show_the_help(columns, cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    result = cli()

    assert result.exit_code == exits.USAGE
    assert result.stdout == ""
    assert result.stderr == cli("--help").stdout
