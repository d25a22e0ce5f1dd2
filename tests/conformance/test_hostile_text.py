"""Every verb prints text of strangers, wherever it comes from, so that it steers nothing and fakes no line."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

import lora_merge
from lora_merge.cli import main
from lora_merge.runtime.streams import Foreign

HOSTILE = "x\x1b]0;owned\x07\x9b31m\x7f\r\nFAKED: all is well\u202e\u2066\u200b\u2028z[/b][red]:smile:[link=a]\ud800"
IN_A_PATH = HOSTILE.replace("/", "_").replace("\ud800", "\udcff")

OURS = re.compile(
    r"(error|warning|note|hint|time|checked|not checked|done|failed|running|kept|planned|not run): "
    r"|Usage: |  |[┏┃┡│└…/]|verified|verification|the structure|\d+ jobs?: |[a-z ]+( [\d.]+ k?B)? …$|[\w.]+$"
    r"|[A-Za-z ,]+:$|wrote .+: (merged )?\d+ |\[v1\] x\[/b\]\.yaml$|(.*: )?(Llama|Model) 68k, bf16|LoRA r\d+ on \d+ modules "
)
"""How our lines begin: words of ours, tables, names of parameters that are explained, paths of outputs, headlines."""


@pytest.fixture(scope="module")
def good(pico, pico_adapter, tmp_path_factory):
    """Return a base, an adapter and what was merged of them."""
    base = pico()
    adapter = pico_adapter(base)
    out = tmp_path_factory.mktemp("good") / "merged"
    lora_merge.merge(base=base, adapter=adapter, out=out)
    return base, adapter, out


@pytest.fixture(params=[[], ["--json"], ["-v"]], ids=lambda mode: "".join(mode) or "plain")
def check(request, monkeypatch, tmp_path):
    """Return a function that runs a command and looks at every line of it."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, codes=range(1, 8)):
        foreign = Foreign(io.StringIO())  # as in a process that is the command's own
        monkeypatch.setattr(sys, "stderr", foreign)
        monkeypatch.setattr(sys, "stdout", io.StringIO())
        with pytest.raises(SystemExit) as ended:
            main(
                [os.fspath(word) if isinstance(word, Path) else word for word in (*arguments, *request.param)]
            )
        foreign.finish()
        said, shown = foreign.own.getvalue(), sys.stdout.getvalue()
        assert ended.value.code in codes, said
        for line in (*said.split("\n"), *shown.split("\n")):
            assert line.isprintable()
            assert "FAKED" not in line[:10]
        for line in filter(None, said.split("\n")):
            assert OURS.match(line), line
        if request.param == ["--json"]:
            json.loads(shown)
        return said + shown

    return run


def edited(source, target, name, **fields):
    """Return a copy of a directory with fields of a JSON file changed."""
    if source != target:
        shutil.copytree(source, target)
    path = target / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return target


def with_tensors(source, target, rename):
    """Return a copy of an adapter or a base with other names of tensors."""
    shutil.copytree(source, target)
    path = next(target.glob("*.safetensors"))
    with safe_open(path, "pt") as file:
        tensors = {rename(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        metadata = file.metadata()
    save_file(tensors, path, metadata={**(metadata or {}), "x": HOSTILE[:20]})
    return target


NAME = HOSTILE.removesuffix("\ud800")  # safetensors takes UTF-8 only


@pytest.mark.parametrize("verb", ["merge", "plan", "inspect", "convert"])
def test_names_of_tensors_of_an_adapter(verb, good, check, tmp_path):
    adapter = with_tensors(good[1], tmp_path / "a", lambda name: name.replace("layers.0.self_attn", NAME))
    words = {
        "merge": ["--base", good[0], "--adapter", adapter, "--out", "out"],
        "plan": ["plan", "--base", good[0], "--adapter", adapter],
        "inspect": ["inspect", adapter],
        "convert": ["convert", adapter, "--rank", "2", "--out", "out"],
    }
    check(*words[verb], codes=range(8))


def test_names_of_tensors_of_a_base_and_of_an_output(good, check, tmp_path):
    base = with_tensors(good[0], tmp_path / "b", lambda name: name.replace("layers.1.mlp", NAME))

    check("--base", base, "--adapter", good[1], "--out", "out")


def test_names_of_an_output(good, check, tmp_path):
    out = with_tensors(good[2], tmp_path / "o", lambda name: name.replace("layers.1.mlp", NAME))

    check("verify", out)


@pytest.mark.parametrize(
    "field",
    ["peft_type", "base_model_name_or_path", "target_modules", "lora_alpha", "bias", "init_lora_weights", "revision",
     "task_type", "peft_version", "exclude_modules", "modules_to_save", "layers_pattern", "use_dora", HOSTILE],
    ids=lambda field: field[:20].encode("unicode_escape").decode(),
)  # fmt: skip
@pytest.mark.parametrize("value", [HOSTILE, [HOSTILE], {HOSTILE: HOSTILE}], ids=["text", "list", "table"])
def test_fields_of_an_adapter(field, value, good, check, tmp_path):
    if field == "base_model_name_or_path" and value == HOSTILE:
        value = NAME  # a path that no filesystem has is another matter
    adapter = edited(good[1], tmp_path / "a", "adapter_config.json", **{field: value})

    check("plan", "--base", good[0], "--adapter", adapter, codes=range(8))


@pytest.mark.parametrize("field", ["architectures", "model_type", "hidden_act", "_name_or_path", "auto_map"])
@pytest.mark.parametrize("verb", ["plan", "verify"])
def test_fields_of_a_model(field, verb, good, check, tmp_path):
    value = [HOSTILE] if field == "architectures" else HOSTILE
    model = edited(good[0 if verb == "plan" else 2], tmp_path / "m", "config.json", **{field: value})
    words = {"plan": ["plan", "--base", model, "--adapter", good[1]], "verify": ["verify", model]}

    check(*words[verb], codes=range(8))


@pytest.mark.parametrize("where", ["base", "adapter", "tensors", "side_files", "versions", "options"])
def test_a_manifest(where, good, check, tmp_path):
    manifest = json.loads((good[2] / "merge_manifest.json").read_text())
    changed = {
        "base": {"base": {"path": HOSTILE}},
        "adapter": {"adapters": [{**manifest["adapters"][0], "path": HOSTILE}]},
        "tensors": {"tensors": {**manifest["tensors"], HOSTILE: next(iter(manifest["tensors"].values()))}},
        "side_files": {"side_files": {HOSTILE: {"origin": HOSTILE, "digest": HOSTILE}}},
        "versions": {"versions": {HOSTILE: HOSTILE}},
        "options": {"options": {HOSTILE: HOSTILE, "dtype": HOSTILE}},
    }
    check("verify", edited(good[2], tmp_path / "o", "merge_manifest.json", **changed[where]), codes=range(8))


@pytest.mark.parametrize("verb", ["merge", "verify", "inspect", "convert", "missing"])
def test_paths(verb, good, check, tmp_path):
    here = IN_A_PATH.removesuffix("\udcff")
    base, adapter, out = (shutil.copytree(source, tmp_path / f"{n}{here}") for n, source in enumerate(good))
    words = {
        "merge": ["--base", base, "--adapter", adapter, "--out", here],
        "verify": ["verify", out],
        "inspect": ["inspect", adapter, "--base", base],
        "convert": ["convert", adapter, "--rank", "2", "--out", here],
        "missing": ["inspect", IN_A_PATH],
    }
    check(*words[verb], codes=range(8))


@pytest.mark.parametrize("verb", ["verify", "inspect", "batch", "convert", "plan"])
def test_paths_that_look_like_markup(verb, good, check):
    here = Path("[v1] x[")
    base, adapter, out = (shutil.copytree(source, here / f"b]{n} :smile:") for n, source in enumerate(good))
    file = here / "b].yaml"
    file.write_text(json.dumps({"jobs": [{"base": str(base), "adapter": str(adapter), "out": "out"}]}))
    words = {
        "verify": ["verify", out, "--base", base, "--adapter", adapter],
        "inspect": ["inspect", adapter],
        "batch": ["batch", file],
        "convert": ["convert", adapter, "--rank", "2", "--out", here / "b]3"],
        "plan": ["plan", "--base", base, "--adapter", adapter],
    }
    assert "[v1]" in "".join(check(*words[verb], codes={0}).split())  # a title may be folded


@pytest.mark.parametrize(
    "words",
    [[f"--{HOSTILE}"], [HOSTILE], ["batch", IN_A_PATH], ["--adapter", "a", "--out", "o", "--dtype", HOSTILE],
     ["inspect", "a", "--engine", HOSTILE], ["inspect", f"org/{IN_A_PATH}", "--offline"],
     ["--base", "b", "--adapter", f"a:{HOSTILE}", "--out", "o"]],
    ids=range(7),
)  # fmt: skip
def test_words_of_the_command_line(words, check):
    check(*words)


@pytest.mark.parametrize("kind", ["names", "key", "yaml", "value"])
def test_batches(kind, good, check, tmp_path):
    job = {"base": str(good[0]), "adapter": str(good[1]), "out": str(tmp_path / "out"), "name": NAME}
    text = {
        "names": json.dumps({"jobs": [job, {**job, "name": "other", "adapter": NAME, "out": NAME}]}),
        "key": json.dumps({"jobs": [{NAME: 1}]}),
        "yaml": "jobs: [\n 'x\x1b\n FAKED: y",
        "value": json.dumps({"jobs": [{**job, "dtype": NAME}]}),
    }
    file = tmp_path / f"{IN_A_PATH.removesuffix(chr(0xDCFF))}.yaml"
    file.write_text(text[kind])

    check("batch", file, "--keep-going", "--log-file", tmp_path / "log")
    if (tmp_path / "log").exists():
        for line in (tmp_path / "log").read_text().split("\n"):
            assert line.isprintable()
            assert not line or json.loads(line)


def test_a_tokenizer(good, check, tmp_path):
    base = edited(good[0], tmp_path / "b", "tokenizer.json", model={"type": HOSTILE})
    edited(base, base, "tokenizer_config.json", tokenizer_class=HOSTILE, chat_template="{{ " + HOSTILE)

    check("--base", base, "--adapter", good[1], "--out", "out", codes=range(8))


ROOM = Path(lora_merge.__file__).parent / "cli"
VOICE = "voice.py"
PRINTS = {"print", "click.echo", "click.secho", "RichConsole", "Table", "Text"}


@pytest.mark.parametrize("file", sorted(ROOM.glob("*.py")), ids=lambda file: file.name)
def test_only_the_voice_prints(file):
    """Whatever else printed would have to remember what may not leave."""
    if file.name == VOICE:
        return
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in PRINTS, called
            assert not called.endswith(("stderr.write", "stdout.write")), called
