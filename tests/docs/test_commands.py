"""Every command of the documentation does what its page says, on small models; one that cannot be run is parsed."""

from __future__ import annotations

import ast
import re
import shutil
from functools import cache
from pathlib import Path

import click
import pytest

from lora_merge.cli import main
from tests.docs import sandbox
from tests.docs.blocks import NEEDS, PROGRAMS, ROOT, Block, blocks, pages

LANGUAGES = {"sh", "console", "python", "yaml", "make", "text", "json", "dockerfile", "toml"}
SHELLS = {"sh", "console"}
PYTHON_PAGE = "docs/python.md"
SKETCHES = {"docs/rounding.md": 1}
"""Page → number of its Python blocks that show an idea."""


def all_blocks() -> list[Block]:
    return [block for page in pages() for block in blocks(page)]


def of_page(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def targets() -> set[str]:
    """Return the targets of the Makefile."""
    lines = (ROOT / "Makefile").read_text().splitlines()
    return {line.partition(":")[0] for line in lines if line[:1].isalpha() and ":" in line}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("documented")
    sandbox.build(root)
    return root


@pytest.fixture
def home(models, tmp_path, monkeypatch):
    """Return a fresh copy of the sandbox, and go there."""
    shutil.copytree(models, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


@pytest.mark.parametrize("page", [page for page in pages() if blocks(page)], ids=of_page)
def test_every_command_of_a_page_runs(page, request):
    runnable = [
        block for block in blocks(page) if block.language in SHELLS | {"yaml", "python"} and not block.needs
    ]
    if not runnable:
        return
    home, made = request.getfixturevalue("home"), set()
    given = set(home.iterdir())
    for block in runnable:
        if block.language == "yaml":
            remove_outputs(home, given)
            check_yaml(block, home)
        elif block.language == "python":
            check_python(block)
        else:
            for words in block.commands:
                if words[1:2] == ["batch"]:
                    remove_outputs(home, given)
                    made.clear()
                check_command(block, words, made)


def remove_outputs(home: Path, given: set[Path]) -> None:
    """Remove every directory that was made here: two examples of a page are not one after the other for its reader."""
    for path in set(home.iterdir()) - given:
        if path.is_dir():
            shutil.rmtree(path)


def check_command(block: Block, words: list[str], made: set[str]) -> None:
    """Run one command. An output that an earlier command of the page made is removed first, unless it should fail."""
    assert words[0] == "lora-merge", f"{block.place}: {words[0]} is not run by this test; mark the block"
    out = next((words[at + 1] for at, word in enumerate(words) if word in {"--out", "-o"}), "")
    if out in made and not block.fails and "--dry-run" not in words:
        shutil.rmtree(out)
        made.discard(out)
    had_it = bool(out) and Path(out).exists()
    done = sandbox.run(words[1:])
    assert done.exit_code == block.fails, f"{block.place}: {' '.join(words)}\n{done.output}"
    if out and not had_it and Path(out).exists():
        made.add(out)


def check_yaml(block: Block, home: Path) -> None:
    """Plan every job of a batch file. A first line such as ``# jobs.yaml: …`` is its name for the commands that follow."""
    first = block.text.partition("\n")[0]
    name = first[2:].partition(":")[0] if first.startswith("# ") and ".yaml" in first else "example.yaml"
    (home / name).write_text(block.text)
    arguments = ["batch", name] if "jobs:" in block.text else ["--config", name]
    done = sandbox.run([*arguments, "--dry-run"])
    assert done.exit_code == 0, f"{block.place}:\n{done.output}"


def check_python(block: Block) -> None:
    if block.is_sketch:
        ast.parse(block.text)
    elif of_page(block.page) != PYTHON_PAGE:
        exec(compile(block.text, block.place, "exec"), {})


@pytest.mark.parametrize("number", range(1, 4), ids=["plan", "several", "errors"])
def test_the_other_examples_in_python_run(number, home, capsys):
    examples = [block for block in blocks(ROOT / PYTHON_PAGE) if block.language == "python"]
    assert len(examples) == 4, "the first is run by test_python_page.py, the others here"

    exec(compile(examples[number].text, examples[number].place, "exec"), {})

    said = capsys.readouterr().out
    assert said if number != 2 else (home / "both" / "merge_manifest.json").is_file()


@pytest.mark.parametrize(
    "block", [block for block in all_blocks() if block.needs], ids=lambda block: block.place
)
def test_a_block_that_cannot_be_run_is_still_right(block):
    for words in block.commands:
        if words[0] == "lora-merge":
            assert_parses(words[1:], block)
        if words[0] == "make":
            named = {word for word in words[1:] if "=" not in word and not word.startswith("-")}
            assert named <= targets(), block.place
        for word in words:
            if word.startswith(("scripts/", "tests/", "configs/")):
                assert (ROOT / word).exists(), f"{block.place}: there is no {word}"


def assert_parses(arguments: list[str], block: Block) -> None:
    """Fail unless the real parser accepts a command's options and values."""
    try:
        group = main.make_context("lora-merge", list(arguments))
        name, command, rest = main.resolve_command(group, [*group._protected_args, *group.args])
        assert command is not None
        command.make_context(name, rest, parent=group)
    except click.ClickException as exc:
        pytest.fail(f"{block.place}: lora-merge {' '.join(arguments)}: {exc.format_message()}")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--base", "b", "--adaptor", "a", "--out", "o"],
        ["verify", "o", "--engine", "none"],
        ["extract", "--base", "b"],
    ],
)
def test_the_parser_refuses_what_does_not_exist(arguments):
    block = Block(ROOT / "README.md", 1, "sh", "")

    with pytest.raises(pytest.fail.Exception, match=r"README\.md:1: lora-merge"):
        assert_parses(arguments, block)


def test_commands_are_found_in_pipelines_and_substitutions():
    text = (
        'eval "$(lora-merge completion bash)"  # ~/.bashrc\nlora-merge completion fish | source\nA=1 \\\n  b'
    )

    commands = Block(ROOT / "README.md", 1, "sh", text).commands

    assert commands == [
        ["eval"], ["lora-merge", "completion", "fish"], ["A=1", "b"], ["lora-merge", "completion", "bash"],
    ]  # fmt: skip


def test_marks_name_only_what_a_test_cannot_have():
    for block in all_blocks():
        assert set(block.needs) <= set(NEEDS), f"{block.place}: {block.needs} is not all in {sorted(NEEDS)}"
        for need in set(block.needs) & set(PROGRAMS):
            first = {words[0] for words in block.commands}
            assert first & set(PROGRAMS[need]), f"{block.place}: no command of it needs {need}"


def test_a_hub_is_needed_only_by_names_that_are_not_in_the_sandbox():
    local = {*sandbox.BASES, *sandbox.QUANTISED, *sandbox.ADAPTERS, "adapters", "my-model"}
    for block in all_blocks():
        if block.needs == ("hub",):
            inputs = {
                words[at + 1]
                for words in block.commands
                for at, word in enumerate(words)
                if word in {"--base", "--adapter"}
            }
            assert inputs - local or "--base" not in str(block.commands), f"{block.place}: this can be run"


def test_only_known_languages_are_used_and_no_command_hides_in_a_text():
    for block in all_blocks():
        assert block.language in LANGUAGES, f"{block.place}: {block.language or 'no language'}"
        if block.language == "text":
            lines = block.text.splitlines()
            assert not [line for line in lines if line.startswith("lora-merge ")], block.place


OTHER_TOOLS = {
    "--adapters", "--adapter-path", "--backend", "--enable-lora", "--fine-tune-type", "--lora-paths", "--max-lora-rank",
    "--force", "--head", "--index-url", "--load-format", "--merge_lora", "--model", "--no-compile", "--model-path", "--outfile", "--quant_method", "--quantization", "--to_hf",
}  # fmt: skip
"""Options of engines and trainers that pages mention."""

OF_SCRIPTS = {
    "docs/api.md",
    "docs/cli.md",
    "docs/performance.md",
    "docs/design.md",
    "docs/engines.md",
    "docs/extending.md",
    "docs/scale.md",
}
"""Pages that mention options of this project's scripts."""


def test_every_option_that_a_page_mentions_exists():
    known = {
        option
        for command in [main, *main.commands.values()]
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    } | {"--help"}
    for page in [page for page in pages() if of_page(page) not in OF_SCRIPTS]:
        prose = re.sub(r"^( *`{3,})[\w+-]*\n.*?^\1$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        spans = re.findall(r"`([^`\n]+)`", prose)
        named = {option for span in spans for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", span)}
        assert named <= known | OTHER_TOOLS, f"{of_page(page)}: {sorted(named - known - OTHER_TOOLS)}"


def test_sketches_are_counted():
    found = [of_page(block.page) for block in all_blocks() if block.is_sketch]

    assert {page: found.count(page) for page in found} == SKETCHES


def test_there_are_many_commands_and_most_of_them_are_run():
    run = [
        words
        for block in all_blocks()
        if block.language in SHELLS and not block.needs
        for words in block.commands
    ]

    assert len(run) > 50
