"""Completion, in the shells themselves: keys are typed into bash and zsh in a terminal, fish is asked by ``complete -C``."""

from __future__ import annotations

import contextlib
import os
import pty
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lora_merge.cli import main as app
from lora_merge.cli.completing import split_line

LINES = (
    ("ver", "verify"),
    ("comp", "completion"),
    ("completion fi", "completion fish"),
    ("--dty", "--dtype"),
    ("--base x --adapter y --ove", "--base x --adapter y --overwrite"),
    ("--dtype bf", "--dtype bfloat16"),
    ("--dtype=bf", "--dtype=bfloat16"),
    ("--base x --dtype=bf", "--base x --dtype=bfloat16"),
    ("--combine dare_l", "--combine dare_linear"),
    ("--quantize fp8-b", "--quantize fp8-block"),
    ("--base mod", "--base model/"),
    ("--base=mod", "--base=model/"),
    ("--base model/in", "--base model/inner/"),
    ("--adapter my", "--adapter my\\ lora/"),
    ("-o mod", "-o model/"),
    ("--config mer", "--config merge.yaml"),
    ("--base org/ca", "--base org/cached"),
    ("--adapter org/tr", "--adapter org/trained"),
    ("verify --lev", "verify --level"),
    ("verify --level stru", "verify --level structure"),
    ("verify mod", "verify model/"),
    ("inspect --eng", "inspect --engine"),
    ("convert model --for lmd", "convert model --for lmdeploy"),
    ("batch mer", "batch merge.yaml"),
)
"""What is written behind ``lora-merge`` before a tab, and after it."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with models and files, a cache of the Hub, and the command on a PATH: (directory, environment)."""
    root = tmp_path_factory.mktemp("completion")
    for folder in ("here/model/inner", "here/my lora", "bin", "hub"):
        (root / folder).mkdir(parents=True)
    (root / "here" / "merge.yaml").write_text("adapter: a\n")
    (root / "hub" / "models--org--cached" / "snapshots" / "0").mkdir(parents=True)
    trained = root / "hub" / "models--org--trained" / "snapshots" / "0"
    trained.mkdir(parents=True)
    (trained / "adapter_config.json").write_text("{}")
    command = root / "bin" / "lora-merge"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m lora_merge "$@"\n')
    command.chmod(0o755)
    environment = {
        "PATH": f"{root / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.environ["PYTHONPATH"],
        "HOME": str(root),
        "HF_HUB_CACHE": str(root / "hub"),
        "TERM": "xterm",
        "LC_ALL": "C.UTF-8",
        "RESULT": str(root / "result"),
    }
    return root / "here", environment


def needs(shell):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")


def typed(command, setup, lines, place, seconds=120):
    """Return what a shell's line editor holds after each line and a tab.

    Args:
        command: starts the shell.
        setup: makes ctrl-x append the line to the file ``$RESULT``.
        lines: what is typed before the tab.
        place: directory and environment.
    """
    here, environment = place
    result = Path(environment["RESULT"])
    result.unlink(missing_ok=True)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=here, env=environment, start_new_session=True
    )
    os.close(theirs)
    threading.Thread(target=_drain, args=(ours,), daemon=True).start()
    deadline = time.monotonic() + seconds
    try:
        os.write(ours, f"{setup}\n".encode())
        _wait(result, 1, deadline)
        for n, line in enumerate(lines):
            os.write(ours, f"\x15lora-merge {line}\t\x18".encode())
            _wait(result, n + 2, deadline)
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    return [line.removeprefix("lora-merge ").rstrip() for line in result.read_text().splitlines()[1:]]


def _drain(terminal):
    with contextlib.suppress(OSError):
        while os.read(terminal, 1 << 16):
            pass


def _wait(result, n, deadline):
    while not result.is_file() or len(result.read_text().splitlines()) < n:
        assert time.monotonic() < deadline, f"line {n} did not come"
        time.sleep(0.02)


@pytest.mark.system
def test_bash_completes(place):
    needs("bash")
    setup = (
        r"""bind 'set enable-bracketed-paste off'; bind -x '"\C-x": printf "%s\n" "$READLINE_LINE" >> "$RESULT"'; """
        'eval "$(lora-merge completion bash)"; echo ready >> "$RESULT"'
    )

    found = typed(["bash", "--norc", "--noprofile", "-i"], setup, [line for line, _ in LINES], place)

    assert dict(zip(LINES, found, strict=True)) == {line: line[1] for line in LINES}


@pytest.mark.system
def test_zsh_completes(place):
    needs("zsh")
    setup = (
        "autoload -Uz compinit; compinit -u -D; unset zle_bracketed_paste; "
        'held() { print -r -- "$BUFFER" >> "$RESULT" }; zle -N held; bindkey "^X" held; bindkey "^U" kill-whole-line; '
        'eval "$(lora-merge completion zsh)"; echo ready >> "$RESULT"'
    )

    found = typed(["zsh", "-f", "-i"], setup, [line for line, _ in LINES], place)

    assert dict(zip(LINES, found, strict=True)) == {line: line[1] for line in LINES}


@pytest.mark.system
def test_zsh_completes_without_a_start_up_file(place):
    """``compinit`` was not run: the script runs it."""
    needs("zsh")
    here, environment = place

    result = subprocess.run(
        ["zsh", "-f", "-c", 'eval "$(lora-merge completion zsh)"; print $_comps[lora-merge]'],
        capture_output=True,
        text=True,
        cwd=here,
        env=environment,
        check=True,
    )

    assert result.stdout.strip() == "_lora_merge_completion"


@pytest.mark.system
def test_fish_completes(place):
    needs("fish")
    here, environment = place
    asked = "\n".join(f'complete -C "lora-merge {line}"; echo ---' for line, _ in LINES)

    result = subprocess.run(
        ["fish", "-N", "-c", f"lora-merge completion fish | source\n{asked}"],
        capture_output=True,
        text=True,
        cwd=here,
        env=environment,
        check=True,
    )

    answers = [part.strip("\n").splitlines() for part in result.stdout.split("---\n")[:-1]]
    for (line, completed), answer in zip(LINES, answers, strict=True):
        last = completed.replace("\\ ", " ").rpartition(" --adapter ")[2]
        word = last.removeprefix("--adapter ") if "my lora" in last else completed.split()[-1]
        assert [offer.partition("\t")[0] for offer in answer] == [word], line


@pytest.fixture
def offers(place, cli, monkeypatch):
    """Return a function: a line up to the cursor → (sort, value, explanation) of every offer."""
    here, environment = place
    monkeypatch.chdir(here)
    monkeypatch.setenv("HF_HUB_CACHE", environment["HF_HUB_CACHE"])

    def ask(line):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("COMP_LINE", line)
            patch.setenv("_LORA_MERGE_COMPLETE", "bash_complete")
            result = cli()
        assert (result.exit_code, result.stderr) == (0, "")
        return [tuple(one.split("\t")) for one in result.stdout.splitlines() if one]

    return ask


def test_every_command_is_offered_with_its_sentence(offers):
    found = {value: text for _, value, text in offers("lora-merge ")}

    assert found == {
        name: command.help.partition("\n")[0].rstrip(".") for name, command in app.commands.items()
    }


def test_every_option_of_the_default_command_is_offered(offers):
    found = {value for _, value, _ in offers("lora-merge --")}

    for option in app.commands["merge"].params:
        assert option.opts[-1] in found
    assert {"--help-all", "--version", "--no-overwrite"} <= found


def test_an_option_that_was_given_is_not_offered_again(offers):
    found = {value for _, value, _ in offers("lora-merge --base x --adapter y --")}

    assert "--base" not in found
    assert "--adapter" in found  # it may be repeated


def test_the_options_of_a_verb_are_its_own(offers):
    found = {value for _, value, _ in offers("lora-merge verify --")}

    assert found == {
        name
        for option in app.commands["verify"].params
        if option.param_type_name == "option"
        for name in option.opts
        if len(name) > 2
    } | {name for option in app.commands["verify"].params for name in option.secondary_opts} | {"--help"}


@pytest.mark.parametrize("verb", app.commands)
def test_every_value_that_an_option_lists_is_offered(verb, offers):
    from lora_merge.requests.table import options_of

    lists = {
        option.name: option
        for option in options_of(verb)
        if option.kind.words and not option.sets and not option.is_positional
    }
    for name, option in list(lists.items())[:3]:
        flag = option.flag or f"--{name.replace('_', '-')}"
        assert [value for _, value, _ in offers(f"lora-merge {verb} {flag} ")] == list(option.kind.words)


@pytest.mark.parametrize(
    ("line", "sorts"),
    [
        ("lora-merge --base ", {"dir", "plain"}),
        ("lora-merge -o ", {"dir"}),
        ("lora-merge --config ", {"file"}),
        ("lora-merge verify ", {"dir", "plain"}),
        ("lora-merge batch ", {"file"}),
        ("lora-merge --seed ", set()),
        ("lora-merge --token ", set()),
    ],
)
def test_paths_are_left_to_the_shell(line, sorts, offers):
    assert {sort for sort, _, _ in offers(line)} == sorts


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell_is_printed(shell, cli):
    result = cli("completion", shell)

    assert result.exit_code == 0
    assert f"_LORA_MERGE_COMPLETE={shell}_complete" in result.stdout
    assert "%(" not in result.stdout
    if shutil.which(shell):
        checked = subprocess.run(
            [shell, "-n"], input=result.stdout, capture_output=True, text=True, check=False
        )
        assert (checked.returncode, checked.stderr) == (0, "")


def test_a_shell_that_is_not_known_is_refused(cli):
    result = cli("completion", "tcsh")

    assert result.exit_code == 2
    assert "bash" in result.stderr


@pytest.mark.parametrize(
    ("line", "words", "incomplete"),
    [
        ("lora-merge", [], "lora-merge"),
        ("lora-merge ", ["lora-merge"], ""),
        ("lora-merge 'a b", ["lora-merge"], "a b"),
        ('lora-merge "a b', ["lora-merge"], "a b"),
        (r"lora-merge a\ ", ["lora-merge"], "a "),
        (r"lora-merge a\ b", ["lora-merge"], "a b"),
        ("lora-merge 'a b' ", ["lora-merge", "a b"], ""),
        ("", [], ""),
    ],
)
def test_a_line_is_split_as_a_shell_would(line, words, incomplete):
    assert split_line(line) == (words, incomplete)


@pytest.mark.parametrize(
    "line", ["lora-merge ", "lora-merge --", "lora-merge --base ", "lora-merge --dtype "]
)
def test_an_answer_loads_nothing_heavy(line):
    code = (
        "import os, sys\n"
        f"os.environ.update(COMP_LINE={line!r}, _LORA_MERGE_COMPLETE='zsh_complete')\n"
        "from lora_merge.cli import main\n"
        "try: main(prog_name='lora-merge')\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'numpy', 'rich', 'yaml', 'huggingface_hub', 'transformers') if name in sys.modules], file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert result.stderr.strip() == "[]"
    assert result.stdout.strip()


def test_an_answer_comes_in_half_a_second(place):
    """The fastest of several, against an empty interpreter, so that a busy machine does not decide."""
    here, environment = place
    environment = {**environment, "COMP_LINE": "lora-merge --d", "_LORA_MERGE_COMPLETE": "bash_complete"}

    def seconds(*arguments):
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, *arguments], capture_output=True, check=True, cwd=here, env=environment
        )
        return time.perf_counter() - start

    bare = min(seconds("-c", "pass") for _ in range(4))
    assert min(seconds("-m", "lora_merge") for _ in range(6)) < max(0.5, 25 * bare)
