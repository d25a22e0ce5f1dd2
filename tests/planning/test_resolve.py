"""Broken bases and adapters: each fault is named with its file, what was found and what was expected."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lora_merge.cli import exits
from tests.tampering import edit_json


def rewrite_header(path, change):
    """Let a function change the header's table of a safetensors file; the data stays."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    table = json.loads(raw[8 : 8 + length])
    text = change(table)
    encoded = (json.dumps(table) if text is None else text).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + raw[8 + length :])


def shift(table):
    first = next(name for name in table if name != "__metadata__")
    begin, end = table[first]["data_offsets"]
    table[first]["data_offsets"] = [begin + 2, end + 2]


def lie_about_dtype(table):
    table["model.norm.weight"]["dtype"] = "F32"


def unknown_dtype(table):
    table["model.norm.weight"]["dtype"] = "F128"


def negative_shape(table):
    table["model.norm.weight"]["shape"] = [-64]


def twice(table):
    text = json.dumps(table)
    return text[:-1] + ', "model.norm.weight": ' + json.dumps(table["model.norm.weight"]) + "}"


HEADER_FAULTS = [
    (shift, "expected byte"),
    (lie_about_dtype, "model.norm.weight: spans bytes"),
    (unknown_dtype, "has the dtype 'F128'"),
    (negative_shape, "has the shape [-64]"),
    (twice, "the key 'model.norm.weight' occurs twice"),
    (lambda table: "{", "is not valid JSON"),
    (lambda table: "[]", "is a JSON list"),
    (lambda table: table.update(odd=3), "odd: has the header row 3"),
]


@pytest.mark.parametrize(("change", "words"), HEADER_FAULTS)
def test_a_broken_header_is_named(change, words, pico, pico_adapter, tampered, cli, tmp_path):
    base = tampered(pico(), "base")
    rewrite_header(base / "model.safetensors", change)

    result = cli("--base", base, "--adapter", pico_adapter(pico()), "--out", tmp_path / "out")

    assert result.exit_code == exits.RESOLVE, result.stderr
    assert words in result.stderr
    assert "model.safetensors" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("size", "words"),
    [(4, "has 4 bytes, expected at least 8"), (40, "header: claims"), (-100, "according to its header")],
)
def test_a_truncated_file_is_named(size, words, pico, pico_adapter, tampered, cli, tmp_path):
    base = tampered(pico(), "base")
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])

    result = cli("--base", base, "--adapter", pico_adapter(pico()), "--out", tmp_path / "out")

    assert result.exit_code == exits.RESOLVE
    assert words in result.stderr
    assert "download the file again" in result.stderr


def missing_shard(base, index):
    name = sorted(set(index["weight_map"].values()))[1]
    (base / name).unlink()
    return f"does not have {name}"


def tensor_in_no_file(base, index):
    first = min(index["weight_map"].values())
    index["weight_map"]["ghost.weight"] = first
    return "ghost.weight: is in no file"


def tensor_in_another_file(base, index):
    names = sorted(set(index["weight_map"].values()))
    files = list(index["weight_map"].values())
    crowded = next(name for name in names if files.count(name) > 1)
    other = next(name for name in names if name != crowded)
    tensor = next(name for name, file in index["weight_map"].items() if file == crowded)
    index["weight_map"][tensor] = other
    return f"{tensor}: is in {crowded}"


def outside(base, index):
    index["weight_map"]["model.norm.weight"] = "../../etc/passwd"
    return "expected a file inside the model's directory"


def no_map(base, index):
    index["weight_map"] = {}
    return "weight_map: is {}"


@pytest.mark.parametrize("fault", [missing_shard, tensor_in_no_file, tensor_in_another_file, outside, no_map])
def test_a_broken_index_is_named(fault, pico, pico_adapter, tampered, cli, tmp_path):
    sharded = pico("llama", "bfloat16", "20KB")
    base = tampered(sharded, "base")
    index = json.loads((base / "model.safetensors.index.json").read_text())
    words = fault(base, index)
    (base / "model.safetensors.index.json").write_text(json.dumps(index))

    result = cli("--base", base, "--adapter", pico_adapter(pico()), "--out", tmp_path / "out")

    assert result.exit_code == exits.RESOLVE, result.stderr
    assert words in result.stderr


def test_a_tensor_that_the_index_forgot_is_kept_and_named(pico, pico_adapter, tampered, cli, tmp_path):
    base = tampered(pico("llama", "bfloat16", "20KB"), "base")
    index = json.loads((base / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.norm.weight"]
    (base / "model.safetensors.index.json").write_text(json.dumps(index))

    result = cli("--base", base, "--adapter", pico_adapter(pico()), "--out", tmp_path / "out")

    assert result.exit_code == exits.OK, result.stderr
    assert "model.norm.weight is in" in result.stderr
    written = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert "model.norm.weight" in written["weight_map"]


def test_weight_files_that_the_index_does_not_name_are_left_out_with_a_note(
    pico, pico_adapter, tampered, cli, tmp_path
):
    base = tampered(pico("llama", "bfloat16", "20KB"), "base")
    (base / "model-00001-of-00099.safetensors").write_bytes(b"stale")
    (base / "consolidated.safetensors").write_bytes(b"duplicate")

    result = cli("--base", base, "--adapter", pico_adapter(pico()), "--out", tmp_path / "out")

    assert result.exit_code == exits.OK, result.stderr
    for name in ("model-00001-of-00099.safetensors", "consolidated.safetensors"):
        assert f"{name} was left out: the index does not name it" in result.stderr
        assert not (tmp_path / "out" / name).exists()


def no_config(base):
    (base / "config.json").unlink()
    return "has model.safetensors and no config.json"


def broken_config(base):
    (base / "config.json").write_text('{"model_type": ')
    return "config.json: is not valid JSON"


def config_list(base):
    (base / "config.json").write_text("[1]")
    return "config.json: holds a JSON list, expected a table"


def no_weights(base):
    (base / "model.safetensors").unlink()
    return "has config.json and no weights: model.safetensors, or shards with their index, is missing"


def renamed_weights(base):
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    return "is a safetensors file, according to its first bytes"


@pytest.mark.parametrize("fault", [no_config, broken_config, config_list, no_weights, renamed_weights])
def test_a_base_that_is_no_checkpoint_is_named(fault, pico, pico_adapter, tampered, cli, tmp_path):
    base = tampered(pico(), "base")
    words = fault(base)

    result = cli("--base", base, "--adapter", pico_adapter(pico()), "--out", tmp_path / "out")

    assert result.exit_code == exits.RESOLVE
    assert words in result.stderr


def test_a_path_that_is_not_there_is_named(pico, pico_adapter, cli, tmp_path):
    no_base = cli("--base", tmp_path / "nope", "--adapter", pico_adapter(pico()), "--out", tmp_path / "out")
    no_adapter = cli("--base", pico(), "--adapter", tmp_path / "nope", "--out", tmp_path / "out")
    a_file = cli(
        "--base", pico() / "config.json", "--adapter", pico_adapter(pico()), "--out", tmp_path / "out"
    )

    assert [r.exit_code for r in (no_base, no_adapter, a_file)] == [exits.RESOLVE] * 3
    assert "nope: this directory does not exist" in no_base.stderr
    assert "pass a directory, or a repo" in no_adapter.stderr
    assert "is a file, expected a directory with the base" in a_file.stderr


def test_a_directory_that_is_no_adapter_says_what_it_holds(pico, cli, tmp_path):
    result = cli("--base", pico(), "--adapter", pico(), "--out", tmp_path / "out")

    assert result.exit_code == exits.RESOLVE
    assert "is a whole model, not an adapter (it has config.json and model.safetensors)" in result.stderr
    assert "pass it as --base" in result.stderr


def test_a_directory_of_anything_says_what_it_holds(pico, cli, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("much")

    result = cli("--base", pico(), "--adapter", tmp_path / "notes", "--out", tmp_path / "out")

    assert result.exit_code == exits.RESOLVE
    assert "notes: not an adapter: found todo.txt, expected" in result.stderr
    assert (
        "expected adapter_config.json with adapter_model.safetensors or adapter_model.bin (PEFT) or"
        in result.stderr
    )


def test_an_adapter_without_tensors_is_refused(pico, pico_adapter, tampered, cli, tmp_path):
    from safetensors.torch import save_file

    adapter = tampered(pico_adapter(pico()), "adapter")
    (adapter / "adapter_model.safetensors").unlink()
    save_file({}, adapter / "adapter_model.safetensors")

    result = cli("--base", pico(), "--adapter", adapter, "--out", tmp_path / "out")

    assert result.exit_code == exits.PLAN
    assert "contains no tensors" in result.stderr


def test_integer_and_other_tensors_are_copied_untouched(pico, pico_adapter, tampered, cli, tmp_path):
    import torch
    from safetensors.torch import load_file

    from tests.tampering import edit_tensors

    base = tampered(pico(), "base")
    extra = {
        "buffer.ids": torch.arange(7),
        "buffer.mask": torch.tensor([True, False, True]),
        "buffer.scale": torch.tensor(3.5, dtype=torch.float64),
        "mtp.layers.0.weight": torch.randn(3, 5).bfloat16(),
        "buffer.empty": torch.zeros(0, 4),
    }
    edit_tensors(base / "model.safetensors", lambda tensors: tensors.update(extra))

    result = cli("--base", base, "--adapter", pico_adapter(pico()), "--out", tmp_path / "out")

    assert result.exit_code == exits.OK, result.stderr
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in extra.items():
        assert merged[name].dtype == tensor.dtype
        assert torch.equal(merged[name], tensor)


def test_a_base_inside_links_is_read_through_them(pico, pico_adapter, cli, tmp_path):
    """The Hub's cache is a directory of links to blobs."""
    base, blobs = tmp_path / "snapshots" / "0123", tmp_path / "blobs"
    base.mkdir(parents=True)
    shutil.copytree(pico(), blobs)
    for file in blobs.iterdir():
        (base / file.name).symlink_to(Path("..", "..", "blobs", file.name))

    result = cli("--base", base, "--adapter", pico_adapter(pico()), "--out", tmp_path / "out")

    assert result.exit_code == exits.OK, result.stderr
    out = tmp_path / "out"
    assert not any(path.is_symlink() for path in out.iterdir())
    assert (out / "tokenizer.json").read_bytes() == (pico() / "tokenizer.json").read_bytes()


def test_the_config_may_leave_fields_to_their_defaults(pico, pico_adapter, tampered, cli, tmp_path):
    adapter = tampered(pico_adapter(pico(), r=8, lora_alpha=8), "adapter")
    edit_json(adapter / "adapter_config.json", r=..., lora_alpha=..., rank_pattern=..., bias=...)

    result = cli("--base", pico(), "--adapter", adapter, "--out", tmp_path / "out")

    assert result.exit_code == exits.OK, result.stderr


def test_a_header_whose_metadata_are_null_is_read_as_mlx_writes_it(
    pico, pico_adapter, tampered, cli, tmp_path
):
    adapter = tampered(pico_adapter(pico()), "adapter")

    def null(table):
        table["__metadata__"] = None

    rewrite_header(adapter / "adapter_model.safetensors", null)
    result = cli("--base", pico(), "--adapter", adapter, "--out", tmp_path / "out", "--verify", "full")
    assert result.exit_code == exits.OK, result.output
