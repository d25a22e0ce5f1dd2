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


def test_the_help_of_the_group_lists_the_options_and_the_exit_codes(cli):
    text = cli("--help").output

    assert "--adapter DIR" in text
    for meaning in exits.MEANINGS.values():
        assert " ".join(meaning.split()[:4]) in text


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


def test_no_arguments_show_the_help(cli):
    assert "Usage: lora-merge" in cli().output
