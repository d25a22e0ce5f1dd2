"""Inputs whose names, sizes and contents are odd: each is merged as any other, or has its sentence before any work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import lora_merge
from lora_merge.cli import exits
from lora_merge.storage.small_files import parse_json
from tests.faults.odd_values import (
    BASE_TENSORS,
    LORA_TENSORS,
    MLX,
    MLX_TENSORS,
    PEFT_LAYER,
    make_adapter,
    make_base,
    write_tensors,
)
from tests.tampering import edit_json


def sentence(result):
    """Return the one error that a command ended with."""
    lines = [line for line in result.stderr.splitlines() if line.startswith(("error:", "Error:"))]
    assert "Traceback" not in result.stderr
    assert len(lines) == 1, result.stderr
    return lines[0]


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no such names")
def test_a_directory_whose_name_is_not_utf_8_is_merged_and_found_again(tmp_path, cli):
    base = make_base(tmp_path / os.fsdecode(b"base\xff"))
    adapter, out = make_adapter(tmp_path / os.fsdecode(b"ad\xfe")), tmp_path / os.fsdecode(b"out\xfd")

    lora_merge.merge(base=base, adapter=adapter, out=out, offline=True)

    manifest = json.loads((out / "merge_manifest.json").read_bytes().decode("utf-8"))
    assert manifest["base"]["path"] == str(base)
    card = (out / "README.md").read_bytes().decode("utf-8")
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "base\\udcff"
    assert lora_merge.verify(out, offline=True).ok
    found = lora_merge.convert(adapter, tmp_path / "c", base=base, engine="vllm", offline=True)
    assert lora_merge.inspect(tmp_path / "c", base=base, offline=True)
    assert found.modules


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no such names")
def test_a_batch_finds_and_merges_what_has_no_name_in_utf_8(tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    make_base(tmp_path / "base")
    make_adapter(tmp_path / os.fsdecode(b"runs/a\xff"))
    (tmp_path / "batch.yaml").write_text("jobs: [{base: base, adapter: 'runs/*', out: 'm/{1}'}]")

    result = cli("batch", "batch.yaml", "--log-file", "log")

    assert result.exit_code == 0, result.stderr
    assert lora_merge.verify(tmp_path / os.fsdecode(b"m/a\xff"), offline=True).ok
    assert all(json.loads(line) for line in Path("log").read_text("utf-8").splitlines())


def test_a_name_with_lines_of_its_own_stays_one_line_of_the_card(tmp_path):
    base = make_base(tmp_path / "a: b\n---\n| `c` | *d*")
    out = tmp_path / "out"

    lora_merge.merge(base=base, adapter=make_adapter(tmp_path / "adapter"), out=out, offline=True)

    card = (out / "README.md").read_text()
    assert card.count("\n---\n") == 1
    assert yaml.safe_load(card.split("\n---\n")[0])["base_model"] == "a: b\\n---\\n| `c` | *d*"


@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
@pytest.mark.parametrize("shape", [(4, 0), (0,), (0, 3), (2, 0, 2), ()])
def test_an_empty_tensor_is_in_the_output_in_any_dtype(shape, dtype, tmp_path):
    from safetensors import safe_open

    base = make_base(tmp_path / "base", {**BASE_TENSORS, "extra.empty": ("BF16", shape)})
    out = tmp_path / "out"

    # The change of this adapter is too small for float16.
    lora_merge.merge(
        base=base, adapter=make_adapter(tmp_path / "a"), out=out, dtype=dtype, offline=True, allow_loss=True
    )

    with safe_open(out / "model.safetensors", "pt") as file:
        found = file.get_tensor("extra.empty")
    assert tuple(found.shape) == shape
    assert str(found.dtype) == f"torch.{dtype or 'bfloat16'}"
    assert lora_merge.verify(out, level="full", offline=True).ok


def test_factors_that_are_single_numbers_are_refused(tmp_path, cli):
    extra = {f"{PEFT_LAYER}mlp.up_proj.lora_{end}.weight": ("F32", ()) for end in "AB"}
    adapter = make_adapter(
        tmp_path / "a", {**LORA_TENSORS, **extra}, target_modules=["q_proj", "down_proj", "up_proj"]
    )

    result = cli("--base", make_base(tmp_path / "base"), "--adapter", adapter, "--out", tmp_path / "out")

    assert result.exit_code == exits.PLAN
    assert "lora_A is (), lora_B is (), expected matrices" in sentence(result)


def test_a_scale_that_no_float32_holds_is_refused_in_the_plan(tmp_path, cli):
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "a", lora_alpha=1e38)

    result = cli("--base", base, "--adapter", f"{adapter}:1e38", "--out", tmp_path / "out")

    assert result.exit_code == exits.PLAN
    assert "has the scale" in result.stderr
    edit_json(adapter / "adapter_config.json", lora_alpha=1e37)
    result = cli("convert", adapter, "--rank", "1", "--out", tmp_path / "c")
    assert result.exit_code in {0, exits.PLAN}


def test_a_tokenizer_that_makes_its_library_panic_is_one_that_does_not_load(tmp_path, cli):
    base = make_base(tmp_path / "base")
    table = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}, "pre_tokenizer": None,
        "post_processor": None, "decoder": None, "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
    }  # fmt: skip
    (base / "tokenizer.json").write_text(json.dumps(table))

    result = cli("--base", base, "--adapter", make_adapter(tmp_path / "a"), "--out", tmp_path / "out")

    assert result.exit_code == 0, result.stderr
    assert "tokenizer.json: does not load" in result.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{root}/loop/x", "its links lead in a circle"),
        ("{root}/" + "d/" * 2500, "File name too long"),
        ("a\0b", "holds a NUL character"),
        ("\ud800", "holds half of a character"),
        ("~nobody-of-this-name/x", "there is no user nobody-of-this-name"),
        ("", "is empty, expected a path"),
        ("{root}/file/x", "is a file"),
    ],
)
def test_an_output_that_can_be_no_directory_is_refused(text, words, tmp_path):
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "a")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()

    with pytest.raises(lora_merge.LoraMergeError) as caught:
        lora_merge.merge(base=base, adapter=adapter, out=text.replace("{root}", str(tmp_path)), offline=True)

    assert words in str(caught.value)


def test_a_working_directory_that_was_removed_has_its_sentence(tmp_path):
    base, adapter, gone = make_base(tmp_path / "base"), make_adapter(tmp_path / "a"), tmp_path / "gone"
    gone.mkdir()
    program = (
        f"import os, sys; os.chdir({str(gone)!r}); os.rmdir({str(gone)!r}); sys.argv[1:] = "
        f"['--base', {str(base)!r}, '--adapter', {str(adapter)!r}, '--out', 'x']\n"
        "from lora_merge.cli import entry; entry()"
    )

    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )  # fmt: skip

    assert done.returncode == exits.RESOLVE, done.stderr
    assert "the current directory was removed" in sentence(done)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("jobs: " + "[" * 20_000 + "]" * 20_000, "more than 64 levels deep"),
        ("jobs: " + "[" * 70 + "]" * 70, "more than 64 levels deep"),
        ("jobs: \x01", "it has a control character"),
        ("jobs: !!int x", "a value does not fit its tag"),
        ("jobs: !!timestamp x", "a value does not fit its tag"),
        ("jobs: [{adapter: a, out: b, matrix: 7}]", "is 7, expected a table"),
        ("jobs: [{adapter: a, out: b, density: " + "9" * 400 + "}]", "is not a density"),
        ("a: &a [x]\n" + "".join(f"{n}: &{n} [*{p}, *{p}, *{p}, *{p}]\n" for p, n in zip("abcdefghijk", "bcdefghijkl", strict=True)), "expands to more than 200000 values"),
    ],
)  # fmt: skip
def test_a_batch_file_that_cannot_be_read_has_its_sentence(text, words, tmp_path, cli):
    (tmp_path / "batch.yaml").write_text(text)

    result = cli("batch", tmp_path / "batch.yaml")

    assert result.exit_code == exits.USAGE, result.stderr
    assert words in result.stderr
    sentence(result)


@pytest.mark.parametrize(
    "options", [{"num_attention_heads": 3}, {"num_hidden_layers": "x"}, {"num_attention_heads": 0}]
)
def test_a_configuration_that_cannot_tell_llama_cpps_rows_is_refused(options, tmp_path, cli):
    pytest.importorskip("gguf")
    base = make_base(tmp_path / "base", **options)

    result = cli(
        "convert", make_adapter(tmp_path / "a"), "--base", base, "--for", "llamacpp", "--out", tmp_path / "c"
    )

    assert result.exit_code == exits.PLAN, result.stderr
    assert f"config.json: {next(iter(options))}" in sentence(result)
    assert not (tmp_path / "c").exists()


def test_a_manifest_that_asks_for_what_no_merge_has_is_a_broken_one(tmp_path, cli):
    out = tmp_path / "out"
    lora_merge.merge(
        base=make_base(tmp_path / "b"), adapter=make_adapter(tmp_path / "a"), out=out, offline=True
    )
    edit_json(out / "merge_manifest.json", options={"ignore_file": [7]})

    result = cli("verify", out)

    assert result.exit_code == exits.VERIFY, result.stderr
    assert "describes a merge that is not possible" in result.stderr + result.stdout


def test_an_index_with_tables_for_names_is_a_wrong_one(tmp_path, cli):
    base = make_base(tmp_path / "b")
    (base / "model.safetensors.index.json").write_text('{"weight_map": {"a": {}}}')

    result = cli("verify", base, "--level", "structure")

    assert result.exit_code == exits.VERIFY, result.stderr
    assert "is mapped to {}, expected a file name" in result.stderr + result.stdout


def test_an_interpreter_that_cannot_be_run_has_its_sentence(tmp_path):
    from lora_merge.verification.engines.vllm import ask_vllm, find_python

    (tmp_path / "python").write_text("no program")

    with pytest.raises(lora_merge.RequestError, match="cannot run it"):
        ask_vllm(find_python(str(tmp_path / "python")), tmp_path, (), 1, trust_remote_code=False)
    with pytest.raises(lora_merge.RequestError, match="expected a Python interpreter"):
        find_python("x" * 300)


@pytest.mark.parametrize("value", [["lora"], {"a": 1}, 7, None])
def test_a_kind_of_training_that_is_no_text_is_one_that_mlx_lm_does_not_have(value, tmp_path, cli):
    root = tmp_path / "mlx"
    root.mkdir()
    write_tensors(root / "adapters.safetensors", MLX_TENSORS)
    (root / "adapter_config.json").write_text(json.dumps({**MLX, "fine_tune_type": value}))

    result = cli("--base", make_base(tmp_path / "base"), "--adapter", root, "--out", tmp_path / "out")

    assert result.exit_code == exits.PLAN, result.stderr
    assert "expected 'lora', 'dora' or 'full'" in sentence(result)


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        (rb'"\ud83d\ude00"', False),
        (rb'"\\ud83d"', False),
        (rb'"\ud83d"', True),
        (rb'"\ude00"', True),
        (rb'"\ude00\ud83d"', True),
        (rb'"\\ud83d\ude00"', True),
        (rb'"\udcff"', True),
        (b'{"a": [' + b"9" * 309 + b"]}", True),
        (b'"' + b"9" * 400 + b'"', False),
        (b"[" * 64 + b"]" * 64, False),
        (b"[" * 65 + b"]" * 65, True),
        (b'["' + b"[{" * 100 + b'"]', False),
    ],
)
def test_a_json_text_is_refused_for_what_it_holds_and_nothing_else(text, refused):
    try:
        parse_json(text)
    except ValueError:
        assert refused
    else:
        assert not refused


def test_a_byte_of_a_file_name_is_kept_where_names_may_be():
    assert parse_json(rb'"\udcff"', paths=True) == "\udcff"


def test_an_output_whose_name_is_a_link_to_itself_is_refused(pico, pico_adapter, cli, tmp_path):
    out = tmp_path / "loop"
    out.symlink_to("loop")
    adapter = pico_adapter(pico())

    for verb in (("--base", pico(), "--adapter", adapter), ("convert", adapter, "--rank", 2)):
        result = cli(*verb, "--out", out)

        assert result.exit_code == exits.WRITE, result.output
        assert "already exists and is a link to loop" in result.stderr


def test_an_output_below_more_folders_than_python_can_recurse_into_is_made(
    pico, pico_adapter, cli, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    out = "/".join("a" * 1500)

    result = cli("--base", pico(), "--adapter", pico_adapter(pico()), "--out", out)

    assert result.exit_code == exits.OK, result.output
    assert (tmp_path / out / "config.json").is_file()
    subprocess.run(["rm", "-rf", tmp_path / "a"], check=True)  # pytest's own cleaning recurses


def test_a_base_with_names_too_long_to_look_for_is_told_so_or_merged(
    pico, pico_adapter, tampered, cli, tmp_path, monkeypatch
):
    base = tampered(pico("llama", "float32", "60KB"), "long")
    index = json.loads((base / "model.safetensors.index.json").read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = "a" * 300 + ".safetensors"
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    result = cli("--base", base, "--adapter", pico_adapter(pico()), "--out", tmp_path / "out")
    assert result.exit_code == exits.RESOLVE, result.output
    assert "does not have aaa" in result.stderr

    deep = tampered(pico(), "deep")
    monkeypatch.chdir(deep)
    for _ in range(90):
        Path("d" * 50).mkdir()
        monkeypatch.chdir("d" * 50)
    monkeypatch.chdir(tmp_path)
    result = cli("--base", deep, "--adapter", pico_adapter(pico()), "--out", tmp_path / "out")
    assert result.exit_code == exits.OK, result.output
    subprocess.run(["rm", "-rf", deep], check=True)


@pytest.mark.parametrize("word", ["a" * 300 + "*", "a/" * 2500 + "*"], ids=["name", "path"])
def test_a_wildcard_that_is_too_long_matches_nothing(word, cli, tmp_path):
    (tmp_path / "batch.yaml").write_text(f'jobs: [{{base: b, adapter: "{word}", out: "o/{{1}}"}}]\n')

    result = cli("batch", tmp_path / "batch.yaml")

    assert result.exit_code == exits.USAGE, result.output
    assert "adapter: aa" in result.stderr or "adapter: a/a" in result.stderr
