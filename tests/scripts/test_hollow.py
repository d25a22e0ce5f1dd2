"""What the script of hollow models writes down, and what the page makes of it."""

from __future__ import annotations

import json

import hollow
import pytest
from hollows import page, tensors
from hollows.models import MODELS
from safetensors.torch import load_file


def test_new_rows_replace_older_ones_of_the_same_kind(tmp_path, monkeypatch):
    monkeypatch.setattr(hollow, "RESULTS", tmp_path / "scale.json")

    def row(model, storage, seconds):
        return {"model": model, "adapter": "all", "out_storage": storage, "cpu_s": seconds}

    hollow.record("plans", [row("gpt-oss-120b", "dense", 1.0), row("gpt-oss-120b", "base", 2.0)], "a machine")
    hollow.record("plans", [row("DeepSeek-V3", "base", 3.0)], "a machine")
    hollow.record("plans", [row("gpt-oss-120b", "dense", 4.0)], "another")
    found = json.loads(hollow.RESULTS.read_text())["plans"]
    assert [one["cpu_s"] for one in found["rows"]] == [3.0, 2.0, 4.0]
    assert found["machine"] == "another"


def test_an_unknown_place_is_refused(monkeypatch):
    monkeypatch.setattr("sys.argv", ["hollow.py", "slices", "--on", "disk,tape"])
    with pytest.raises(SystemExit, match="knows disk, s3, ray, not tape"):
        hollow.main()


def test_a_directory_that_exists_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["hollow.py", "make", "gpt-oss-120b", str(tmp_path)])
    with pytest.raises(SystemExit, match="exists already"):
        hollow.main()
    assert not list(tmp_path.iterdir())


def test_the_attention_of_deepseek_has_the_values_of_its_five_matrices():
    layer = 7168 * (1536 + 576 + 16_384) + 1536 * 24_576 + 512 * 32_768
    assert page.changed_values(MODELS["DeepSeek-V3"], "attention") == 61 * layer
    experts = 36 * 128 * 3 * 2880**2
    attention = 36 * 2880 * 64 * (64 + 8 + 8 + 64)
    assert page.changed_values(MODELS["gpt-oss-120b"], "all") == experts + attention


def test_a_file_has_values_where_they_are_given_and_zeros_elsewhere(tmp_path):
    stored = [
        tensors.Stored("first", "F32", (2, 3)),
        tensors.Stored("second", "BF16", (4,)),
        tensors.Stored("third", "U8", (2,)),
    ]
    path = tmp_path / "some.safetensors"
    nbytes = tensors.write(
        path, stored, lambda one: [b"\x80\x3f", b"\x00\x40"] if one.name == "second" else ()
    )
    found = load_file(path)
    assert nbytes == 24 + 8 + 2
    assert found["second"].tolist() == [1.0, 2.0, 0.0, 0.0]
    assert not found["first"].any()
    assert not found["third"].any()
    assert found["third"].shape == (2,)
