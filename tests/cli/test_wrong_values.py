"""Values that an option does not take, and what is missing: the answer is the command that was meant."""

from __future__ import annotations

import shlex

import pytest

from lora_merge.cli import exits
from lora_merge.cli import main as app
from lora_merge.cli.wrong_values import _VALUES
from lora_merge.requests.table import options_of


def hints(result):
    return [line.removeprefix("hint: ") for line in result.stderr.splitlines() if line.startswith("hint: ")]


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("convert a -o o --for vlm", "convert a -o o --for vllm"),
        ("convert a -o o --format gguff", "convert a -o o --format gguf"),
        ("--verify none --adapter a -o o", "--no-verify --adapter a -o o"),
        ("--verify=ful --adapter a -o o", "--verify full --adapter a -o o"),
        ("--adapter a -o o --dtype auto", "--adapter a -o o"),
        ("--adapter a -o o --dtype bf17", "--adapter a -o o --dtype bf16"),
        ("--adapter a -o o --dtype bfloat", "--adapter a -o o --dtype bfloat16"),
        ("--adapter a -o o --device GPU", "--adapter a -o o --device cuda"),
        ("--combine dare --adapter a -o o", "--combine dare_linear --adapter a -o o"),
        ("--combine tise --adapter a -o o", "--combine ties --adapter a -o o"),
        ("merge --adapter a -o o --rounding nearst", "merge --adapter a -o o --rounding nearest"),
        ("plan --adapter a --out-storage bas", "plan --adapter a --out-storage base"),
        ("completion bash2", "completion --help lists its options"),
        ("completion", "completion bash"),
        ("inspect", "inspect ADAPTER"),
        ("inspect --json", "inspect --json ADAPTER"),
        ("batch", "batch FILE"),
        ("verify", "verify OUT"),
        ("convert -o o", "convert -o o ADAPTER"),
    ],
)
def test_the_hint_is_the_command_that_was_meant(line, meant, cli):
    result = cli(*shlex.split(line))

    assert result.exit_code == exits.USAGE
    assert hints(result) == [f"lora-merge {meant}"]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("batch nothere.yaml", "file 'nothere.yaml' does not exist"),
        ("--adapter a -o o --config nothere.yaml", "--config: file 'nothere.yaml' does not exist"),
    ],
)
def test_a_file_that_does_not_exist_is_named_alone(line, sentence, cli):
    result = cli(*shlex.split(line))

    assert result.exit_code == exits.USAGE
    assert result.stderr == f"error: {sentence}\nhint: check the path\n"


@pytest.mark.parametrize(
    "line", ["--adapter a -o o --seed x", "--adapter a -o o --combine slerp", "--adapter a -o o --device tpu"]
)
def test_a_value_that_is_like_no_other_is_answered_with_the_help(line, cli):
    result = cli(*shlex.split(line))

    assert result.exit_code == exits.USAGE
    assert hints(result) == ["lora-merge merge --help lists its options"]


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("--adapter a --dtype", "--dtype takes bfloat16, float16, float32: Dtype of the merged weights"),
        ("--base", "--base takes DIR|ID: Base model: directory, repo or URL"),
        ("verify o --level", "--level takes structure, sample, full: How much to check"),
    ],
)
def test_an_option_without_its_value_says_what_it_takes(line, hint, cli):
    result = cli(*shlex.split(line))

    assert result.exit_code == exits.USAGE
    assert result.stderr.splitlines()[0] == f"error: `{shlex.split(line)[-1]}` has no value"
    assert hints(result) == [hint]


def test_a_missing_argument_says_what_it_is(cli):
    assert (
        cli("completion").stderr.splitlines()[0]
        == "error: missing argument SHELL: shell to complete in (bash, zsh, fish)"
    )


def _flag(row):
    return row.flag or f"--{row.name.replace('_', '-')}"


def test_a_value_of_another_command_is_not_proposed(cli):
    """``verify --engine`` runs vLLM only."""
    assert hints(cli("verify", "o", "--engine", "llama.cpp")) == [
        "lora-merge verify --help lists its options"
    ]
    assert hints(cli("inspect", "a", "--engine", "llama.cpp")) == ["lora-merge inspect a --engine llamacpp"]


@pytest.mark.parametrize(("flag", "value"), _VALUES)
def test_every_value_of_another_tool_means_arguments_that_parse(flag, value, cli):
    meant = _VALUES[flag, value]
    words = {
        verb: [
            word
            for row in options_of(verb)
            if row.kind.words and _flag(row) == flag
            for word in row.kind.words
        ]
        for verb in app.commands
    }
    verb = next(
        name for name in app.commands if words[name] and (meant[:1] != (flag,) or meant[1] in words[name])
    )
    assert value not in words[verb]  # otherwise the row is never asked
    required = {
        "merge": ["--adapter", "a", "-o", "o"],
        "convert": ["a", "-o", "o"],
        "inspect": ["a"],
        "verify": ["o"],
    }[verb]

    (hint,) = hints(cli(verb, *required, flag, value))
    assert hint == shlex.join(["lora-merge", verb, *required, *meant])
    app.commands[verb].make_context(verb, [*required, *meant])
