"""Whether torch's library is loaded beside the imports of a command: a guess from options and two small files."""

from __future__ import annotations

import json
import os

import pytest

from lora_merge.cli import torch_ahead
from lora_merge.native.library import hidden, library

pytestmark = pytest.mark.skipif(library() is None, reason="the compiled loops are not built here")

BASE = {"dtype": "bfloat16"}
FP8 = {"dtype": "bfloat16", "quantization_config": {"quant_method": "fp8"}}
INT4 = {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}}
GPTQ = {"quantization_config": {"quant_method": "gptq"}}
ADAPTER = {"peft_type": "LORA"}
VERIFY = {"level": "sample", "forward": False, "engine": None}


@pytest.fixture
def loaded(monkeypatch):
    """A list that is not empty once the library is loaded."""
    found = []
    monkeypatch.setattr(torch_ahead, "load_beside", lambda: found.append(True))
    return found


@pytest.fixture
def flags(tmp_path):
    """Return a function that writes two configurations and returns the options of a merge."""

    def made(base=BASE, adapter=ADAPTER, **more):
        for name, file, config in (
            ("base", "config.json", base),
            ("adapter", "adapter_config.json", adapter),
        ):
            (tmp_path / name).mkdir(exist_ok=True)
            text = config if isinstance(config, str) else json.dumps(config)
            (tmp_path / name / file).write_text(text)
        return {"base": str(tmp_path / "base"), "adapter": (str(tmp_path / "adapter"),), **more}

    return made


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"base": {"torch_dtype": "bfloat16"}},
        {"base": {"text_config": {"dtype": "bfloat16"}}},
        {"base": "{", "adapter": "[]"},
        {"rounding": "nearest", "device": "auto", "out_storage": "base"},
        {"base": FP8, "out_storage": "base"},
        {"base": FP8, "out_storage": "base", "rounding": "adapter"},
        {"base": INT4, "out_storage": "base", "rounding": "nearest"},
    ],
    ids=str,
)
def test_a_plain_lora_needs_none(flags, loaded, fields):
    torch_ahead.load_for_merge(flags(**fields))
    assert not loaded


@pytest.mark.parametrize(
    "fields",
    [
        {"base": {"dtype": "float16"}},
        {"base": {"text_config": {"dtype": "float32"}}},
        {"base": {"dtype": "bfloat16", "quantization_config": {}}},
        {"base": FP8},
        {"base": FP8, "out_storage": "dense"},
        {"base": FP8, "out_storage": "base", "rounding": "stochastic"},
        {"base": GPTQ, "out_storage": "base"},
        {"base": {"quantization_config": {"quant_method": ["fp8"]}}, "out_storage": "base"},
        {"adapter": {"peft_type": "LOHA"}},
        {"adapter": {"peft_type": "LORA", "use_dora": True}},
        {"adapter": {"peft_type": "LORA", "modules_to_save": ["lm_head"]}},
        {"rounding": "adapter"},
        {"quantize": "fp8"},
        {"dtype": "float16"},
        {"device": "cuda"},
        {"adapter": ADAPTER, "more": True},
    ],
    ids=str,
)
def test_others_need_it(flags, loaded, fields):
    several = fields.pop("more", False)
    found = flags(**fields)
    torch_ahead.load_for_merge(found | ({"adapter": found["adapter"] * 2} if several else {}))
    assert loaded


def test_without_compiled_code_all_need_it(flags, loaded):
    with hidden():
        torch_ahead.load_for_merge(flags())
    assert loaded


def test_what_cannot_be_read_is_no_reason_and_is_not_waited_for(tmp_path, loaded):
    os.mkfifo(tmp_path / "config.json")
    torch_ahead.load_for_merge({"base": str(tmp_path), "adapter": ("org/name", "s3://bucket/folder")[:1]})
    torch_ahead.load_for_merge({"base": None, "adapter": ()})
    assert not loaded


@pytest.mark.parametrize(
    ("fields", "config", "is_loaded"),
    [
        ({}, BASE, False),
        ({}, {"dtype": "float32"}, True),
        ({"level": "full"}, BASE, False),
        ({"level": "structure"}, {"dtype": "float32"}, False),
        ({"forward": True}, BASE, True),
        ({"engine": "vllm"}, BASE, True),
    ],
    ids=str,
)
def test_verify(tmp_path, loaded, fields, config, is_loaded):
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch_ahead.load_for_verify({**VERIFY, "out": str(tmp_path), **fields})
    assert bool(loaded) == is_loaded


@pytest.mark.parametrize(("storage", "is_loaded"), [("base", False), ("dense", True), (None, True)])
def test_verification_of_kept_scales_needs_none(tmp_path, loaded, storage, is_loaded):
    (tmp_path / "config.json").write_text(json.dumps(FP8))
    manifest = {"options": {"out_storage": storage}} if storage else []
    (tmp_path / "merge_manifest.json").write_text(json.dumps(manifest))
    torch_ahead.load_for_verify({**VERIFY, "out": str(tmp_path)})
    assert bool(loaded) == is_loaded


@pytest.mark.parametrize("base", [None, "some/base"])
def test_inspect_needs_it_for_a_base(loaded, base):
    torch_ahead.load_for_inspect({"base": base})
    assert bool(loaded) == bool(base)
