"""A tokenizer of a stranger may make the library that reads it panic, and end its process; not this one."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import pytest

from lora_merge.formats import tokenizer_file
from lora_merge.formats.tokenizer_file import TokenizerError, n_tokens, without_panics
from lora_merge.runtime.streams import Foreign

PLAIN = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": None,
    "post_processor": None,
    "decoder": None,
    "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"},
}
# a merge that cuts a character of two bytes in half, and an error that is no UTF-8: tokenizers 0.22 panics while it panics
ABORTS: dict[str, Any] = {
    "model": {
        "type": "BPE",
        "vocab": {"a": 1, "é": 0, "a©": 2},
        "merges": [["a", "é"]],
        "continuing_subword_prefix": "x",
    }
}
PANICS: dict[str, Any] = {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}


def written(tmp_path, **fields):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**PLAIN, **fields}))
    return path


def test_the_tokens_of_a_tokenizer_are_counted(tmp_path):
    assert n_tokens(written(tmp_path)) == 2


@pytest.mark.parametrize(
    "fields",
    [ABORTS, PANICS, {"model": {"type": "\x1b[31m"}}, {"model": None}],
    ids=["aborts", "panics", "type", "none"],
)
def test_one_that_does_not_load_is_an_error_and_no_more(fields, tmp_path, capfd):
    with pytest.raises(TokenizerError):
        n_tokens(written(tmp_path, **fields))

    assert capfd.readouterr() == ("", "")


def test_one_that_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "tokenizer.json")

    with pytest.raises(TokenizerError, match="is a pipe"):
        n_tokens(tmp_path / "tokenizer.json")


def test_one_that_never_ends_loading_is_given_up(tmp_path, monkeypatch):
    (tmp_path / "script.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr(tokenizer_file, "_SCRIPT", tmp_path / "script.py")
    monkeypatch.setattr(tokenizer_file, "_SECONDS", 0.2)

    with pytest.raises(TokenizerError, match="takes more than"):
        n_tokens(written(tmp_path))


def test_a_panic_in_this_process_is_an_error_and_a_note(tmp_path, monkeypatch, capfd):
    from tokenizers import Tokenizer

    foreign = Foreign(sys.stdout)
    monkeypatch.setattr(sys, "stderr", foreign)
    with pytest.raises(TokenizerError), without_panics():
        Tokenizer.from_file(str(written(tmp_path, **PANICS)))

    said = capfd.readouterr()
    assert said.err == ""
    assert all(line.startswith("note: ") for line in said.out.splitlines())
    assert "panicked" in said.out


def test_other_errors_are_left_alone():
    with pytest.raises(KeyError), without_panics():
        raise KeyError
