"""Directories of strangers with pipes, devices, sockets and files without end in the place of files: every verb ends at once."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import sys
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SECONDS = 120
"""A verb takes one or two."""

EXTRA = {
    "generation_config.json": "{}", "tokenizer.json": "{}", "tokenizer_config.json": "{}", "README.md": "words",
    "chat_template.jinja": "{{ messages }}", "added_tokens.json": "{}", "special_tokens_map.json": "{}", "vocab.json": "{}",
    "preprocessor_config.json": "{}", "modeling_own.py": "import os\n", "modules.json": "[]",
    "config_sentence_transformers.json": "{}", "model.safetensors.index.json": "{}", "training_args.json": "{}",
    "merge_manifest.json": "{}", "args.json": "{}", "additional_config.json": "{}",
}  # fmt: skip
"""Files that some reader may look for."""


def fifo(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def listening(path: Path) -> None:
    where = Path.cwd()
    os.chdir(path.parent)  # the path of a socket is short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(where)


def huge(path: Path) -> None:
    """Make a file of a terabyte, all of it a hole."""
    path.touch()
    os.truncate(path, 1 << 40)


KINDS = (fifo, endless, huge)


@pytest.fixture(scope="module")
def sound(pico, pico_adapter, tmp_path_factory, cli):
    """Return a base, an adapter and their merge, which have every file that some reader may look for."""
    root = tmp_path_factory.mktemp("sound")
    base, adapter = shutil.copytree(pico("llama"), root / "base"), root / "adapter"
    shutil.copytree(pico_adapter(pico("llama")), adapter)
    assert cli("--base", base, "--adapter", adapter, "--out", root / "out").exit_code == 0
    return root


@pytest.fixture
def ending() -> Iterator[None]:
    """Fail what takes too long, or more memory than a verb needs."""

    def late(*_: object) -> None:
        raise AssertionError("it takes too long")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - began < 2_500_000  # kilobytes


def names_in(root: Path) -> list[str]:
    return sorted({path.name for path in root.iterdir()} | EXTRA.keys())


VERBS: dict[str, tuple[str, Callable[[Path, Path], list[object]]]] = {
    "merge a base": ("base", lambda bad, sound: ["--base", bad, "--adapter", sound / "adapter"]),
    "merge an adapter": ("adapter", lambda bad, sound: ["--base", sound / "base", "--adapter", bad]),
    "plan": ("base", lambda bad, sound: ["plan", "--base", bad, "--adapter", sound / "adapter"]),
    "verify": ("out", lambda bad, sound: ["verify", bad]),
    "verify a base": ("base", lambda bad, sound: ["verify", sound / "out", "--base", bad, "--adapter", sound / "adapter"]),
    "inspect": ("adapter", lambda bad, sound: ["inspect", bad]),
    "inspect with a base": ("base", lambda bad, sound: ["inspect", sound / "adapter", "--base", bad]),
    "convert": ("adapter", lambda bad, sound: ["convert", bad]),
    "extract": ("base", lambda bad, sound: ["extract", "--base", sound / "base", "--tuned", bad, "--rank", "2"]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("verb", "kind"),
    [*product(VERBS, KINDS), *product(["verify", "merge a base"], [listening, Path.mkdir])],
    ids=lambda one: one if isinstance(one, str) else one.__name__,
)
def test_what_is_no_file_has_a_sentence_and_keeps_nobody_waiting(verb, kind, sound, cli, tmp_path, ending):
    role, arguments = VERBS[verb]
    for name in names_in(sound / role):
        bad, out = tmp_path / "bad", tmp_path / "out"
        shutil.copytree(sound / role, bad)
        (bad / name).unlink(missing_ok=True)
        kind(bad / name)

        writes = verb.startswith(("merge", "convert", "extract"))
        result = cli(*arguments(bad, sound), *(["--out", out] if writes else []))

        assert result.exit_code in {0, 3, 4, 5, 6}, (name, result.stderr, result.exception)
        assert "Traceback" not in result.stderr, (name, result.stderr)
        if result.exit_code:
            assert "error:" in result.stderr or "verification failed" in result.stdout, (name, result.stdout)
        for path in (bad, out):
            shutil.rmtree(path, ignore_errors=True)


def said(result: Any) -> str:
    """Return what a verification found, a line each."""
    findings = json.loads(result.stdout)["findings"]
    return "\n".join(
        f"{issue['subject']}: {issue['sentence']}" for one in findings for issue in one["issues"]
    )


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "README.md"])
def test_verify_says_what_stands_in_a_file_s_place(name, sound, cli, tmp_path):
    bad = shutil.copytree(sound / "out", tmp_path / "bad")
    (bad / name).unlink(missing_ok=True)
    fifo(bad / name)

    assert f"{name}: is a pipe, expected a regular file" in said(cli("verify", bad, "--json"))


def test_verify_tells_of_a_link_out_of_the_directory(sound, cli, tmp_path):
    bad = shutil.copytree(sound / "out", tmp_path / "bad")
    (tmp_path / "elsewhere").write_text("{}")
    (bad / "notes.json").symlink_to(tmp_path / "elsewhere")

    result = cli("verify", bad)

    assert result.exit_code == 0
    assert (
        f"notes.json: is a link to {tmp_path}/elsewhere, outside the directory"
        in result.stdout + result.stderr
    )


def test_a_base_with_a_pipe_in_a_file_s_place_is_refused(sound, cli, tmp_path):
    bad = shutil.copytree(sound / "base", tmp_path / "bad")
    (bad / "tokenizer.json").unlink(missing_ok=True)
    fifo(bad / "tokenizer.json")
    result = cli("--base", bad, "--adapter", sound / "adapter", "--out", tmp_path / "out")
    assert result.exit_code == 3
    assert "tokenizer.json: is a pipe, expected a regular file" in result.stderr


def test_a_tokenizer_that_ends_whoever_loads_it_is_named(sound, cli, tmp_path, monkeypatch):
    bad = shutil.copytree(sound / "out", tmp_path / "bad")
    (bad / "tokenizer.json").write_text("{}")
    assert "tokenizer.json: does not load (" in said(cli("verify", bad, "--json"))

    (tmp_path / "script.py").write_text("import os; os.abort()")
    monkeypatch.setattr(sys.modules["lora_merge.formats.tokenizer_file"], "_SCRIPT", tmp_path / "script.py")
    assert "tokenizer.json: does not load (loading it takes more than a minute" in said(
        cli("verify", bad, "--json")
    )


@pytest.mark.parametrize(
    "text",
    [
        "-" * 100_000 + "1", "a" + ".b" * 100_000, "1" + "+1" * 100_000, "(" * 100_000, "a" + "()" * 100_000,
        "if 1:\n pass\n" + "elif 1:\n pass\n" * 50_000, "x = '" + "\\d" * 1000 + "'", "\0", "x" * 5_000_000,
    ],
    ids=lambda text: text[:8],
)  # fmt: skip
def test_code_that_is_nested_without_end_is_named(text, sound, cli, tmp_path, ending):
    bad = shutil.copytree(sound / "out", tmp_path / "bad")
    config = json.loads((bad / "config.json").read_text())
    (bad / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "modeling_own.M"}}))
    (bad / "modeling_own.py").write_text(text)

    result = cli("verify", bad, "--json")

    assert result.exit_code == 6, result.stderr  # the digest of config.json is another
    assert "Warning" not in result.stderr
    assert ("modeling_own.py: " in said(result)) == ("\\d" not in text)


def test_a_side_file_of_a_terabyte_is_not_read(sound, cli, tmp_path, ending):
    bad = shutil.copytree(sound / "out", tmp_path / "bad")
    (bad / "generation_config.json").unlink()
    huge(bad / "generation_config.json")
    assert "generation_config.json: has 1099511627776 bytes" in said(cli("verify", bad, "--json"))
