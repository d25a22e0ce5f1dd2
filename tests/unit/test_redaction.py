"""No token is repeated, however a request is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import traceback

import pytest

from lora_merge.batches.event_log import EventLog
from lora_merge.errors import RequestError
from lora_merge.redaction import without_secrets
from lora_merge.requests.request import ConvertRequest, InspectRequest, Request, VerifyRequest
from lora_merge.requests.request_file import read_request
from lora_merge.storage.hub import Access
from lora_merge.storage.hub.hub_errors import hub_errors
from lora_merge.storage.source import Source

TOKEN = "hf_SECRETsecretSECRETsecret"
OTHER = "s3cret-of-a-hub-of-our-own"

REQUESTS = {
    "a table for a path": "base: {token: %}\nadapter: a\nout: o\n",
    "a table for a weight": "base: b\nadapter: {token: %}\nout: o\n",
    "a list for a path": "base: b\nadapter: a\nout: [o, %]\n",
    "a list for a token": "base: b\nadapter: a\nout: o\ntoken: [%]\n",
    "a table for a token": "base: b\nadapter: a\nout: o\ntoken: {a: %}\n",
    "a token of several words": "base: b\nadapter: a\nout: o\ntoken: % and more\n",
    "a table for a number": "base: b\nadapter: a\nout: o\nworkers: {token: %}\n",
    "a table for a size": "base: b\nadapter: a\nout: o\nmemory_limit: {token: %}\n",
    "a table for a switch": "base: b\nadapter: a\nout: o\nstrict: {token: %}\n",
    "a table for a choice": "base: b\nadapter: a\nout: o\nverify: {token: %}\n",
    "a list for a dtype": "base: b\nadapter: a\nout: o\ndtype: [%]\n",
    "a table for layouts": "base: b\nadapter: a\nout: o\nexpert_layout: {token: %}\n",
    "a table for files": "base: b\nadapter: a\nout: o\nignore_file: [{token: %}]\n",
    "no output": "base: b\nadapter: a\ntoken: %\n",
    "an alias": "base: b\nadapter: a\nout: o\ntoken: *%\n",
    "an anchor twice": "base: &% b\nadapter: &% a\nout: [\n",
    "a tag": "base: b\nadapter: a\nout: o\ntoken: !% x\n",
    "an open quote": 'base: b\nadapter: a\nout: o\ntoken: "%\n',
    "a tab": "base: b\ntoken: %\n\tout: o\n",
    "a colon": "base: b\ntoken: %: x\n",
    "an unknown escape": 'base: b\ntoken: "\\%"\n',
    "nothing but a token": "%\n",
    "a token twice": "base: b\ntoken: %\ntoken: %\n",
}

BY_ITS_LOOK = {
    "a key": "base: b\nadapter: a\nout: o\n%: x\n",
    "a key twice": "%: b\n%: c\n",
    "a device": "base: b\nadapter: a\nout: o\ndevice: %\n",
    "a number": "base: b\nadapter: a\nout: o\nworkers: %\n",
}


def said(text, tmp_path):
    """Return all that the error of a request file may come out as: sentence, hint, traceback."""
    path = tmp_path / "merge.yaml"
    path.write_text(text)
    with pytest.raises(RequestError) as caught:
        read_request(str(path), {})
    return "".join(traceback.format_exception(caught.value)) + str(caught.value) + caught.value.hint


@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("token", [TOKEN, OTHER])
def test_a_request_that_is_wrong_is_said_without_its_token(name, token, tmp_path):
    assert token not in said(REQUESTS[name].replace("%", token), tmp_path)


@pytest.mark.parametrize("name", BY_ITS_LOOK)
def test_a_token_in_a_wrong_place_is_known_by_its_look(name, tmp_path):
    assert TOKEN not in said(BY_ITS_LOOK[name].replace("%", TOKEN), tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--base", f"https://me:{OTHER}@huggingface.co/org/name", "--adapter", "a", "--out", "o"),
        ("--base", TOKEN, "--adapter", "a", "--out", "o"),
        ("--base", f"org/name@{TOKEN}", "--adapter", "a", "--out", "o", "--offline"),
        ("--base", "b", "--adapter", "a", "--out", "o", "--device", TOKEN),
        ("--base", "b", "--adapter", "a", "--out", "o", "--token", f"{TOKEN} and more"),
        ("--base", "b", "--adapter", "a", "--out", "o", TOKEN),
        ("verify", "o", TOKEN),
        (f"--{TOKEN}",),
        ("--base", os.fsdecode(b"b\xff"), "--adapter", "a", "--out", "o", "--token", TOKEN),
    ],
)
def test_a_command_that_is_wrong_is_said_without_a_token(arguments, cli):
    for more in ((), ("--json",)):
        result = cli(*arguments, *more)
        assert result.exit_code in {2, 3}
        assert TOKEN not in result.output
        assert OTHER not in result.output


def test_the_environments_token_is_taken_out_of_the_traceback_of_a_bug(tmp_path):
    program = (
        "import sys\n"
        "from lora_merge import cli\n"
        "from lora_merge.cli import process\n"
        f"def broken(**_): raise TypeError({f'Bearer {OTHER}'!r})\n"
        "process.main = broken\n"
        "cli.entry()\n"
    )
    environment = {**os.environ, "HF_TOKEN": OTHER}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert "TypeError: Bearer …" in done.stderr
    assert OTHER not in done.stderr


def test_what_a_hubs_package_raises_is_said_without_the_token():
    access = Access(OTHER)
    with (
        pytest.raises(Exception, match="the download failed") as caught,
        hub_errors(Source("hf", "a/b"), access),
    ):
        raise ValueError(f"Illegal header value b'Bearer {OTHER}'")
    assert OTHER not in "".join(traceback.format_exception(caught.value))


def test_a_log_has_no_token(tmp_path):
    with EventLog(tmp_path / "log") as log:
        log.add("failed", message=f"https://me:{OTHER}@host says no to {TOKEN}")
    assert "https://…@host says no to hf_…" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    "request_",
    [
        Request(("a",), "o", token=TOKEN), VerifyRequest("o", token=TOKEN), InspectRequest("a", token=TOKEN),
        ConvertRequest("a", "o", token=TOKEN),
    ],
)  # fmt: skip
def test_no_request_shows_its_token(request_):
    assert TOKEN not in repr(request_)
    assert TOKEN not in str(request_)


@pytest.mark.parametrize(
    "text",
    [
        "/models/hf_checkpoint",
        "hf_llama_merged",
        "hf_transformersmodels",
        "org/name@v1",
        "a@b",
        "s3://bucket/key",
    ],
)
def test_names_stay_as_they_are(text):
    assert without_secrets(text) == text
