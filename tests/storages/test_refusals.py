"""Bases that are not merged: methods without a reader, and tensors that disagree with their configuration."""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_merge.cli import exits
from tests.storages.reference import FIXTURES
from tests.tampering import edit_json, to_pickles

Q = "model.layers.0.self_attn.q_proj"
METHODS = {
    "hqq": "HQQ",
    "aqlm": "AQLM",
    "vptq": "VPTQ",
    "spqr": "SpQR",
    "higgs": "HIGGS",
    "eetq": "EETQ",
    "bitnet": "BitNet",
    "fp_quant": "FP-Quant",
    "sinq": "SINQ",
    "quark": "Quark",
    "quanto": "quanto",
}


def settings(root, **changes):
    """Change ``quantization_config``, and the side file of the same content; ``...`` removes a key."""
    config = json.loads((root / "config.json").read_text())
    for key, value in changes.items():
        config["quantization_config"][key] = value
        if value is ...:
            del config["quantization_config"][key]
    edit_json(root / "config.json", quantization_config=config["quantization_config"])
    for file in ("quantize_config.json",):
        if (root / file).exists():
            edit_json(root / file, **changes)


def group(root, **changes):
    """Change the weights of the first group of compressed-tensors."""
    config = json.loads((root / "config.json").read_text())["quantization_config"]
    config["config_groups"]["group_0"]["weights"] |= changes
    edit_json(root / "config.json", quantization_config=config)


def tensors(root, change):
    """Change the table of tensors. The header's metadata stays: torchao keeps its classes there."""
    path, index = root / "model.safetensors", root / "model.safetensors.index.json"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    found = load_file(path)
    change(found)
    path.unlink()
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, path, metadata)
    if index.exists():
        edit_json(index, weight_map=dict.fromkeys(found, path.name))


def without(*suffixes):
    def change(found):
        for suffix in suffixes:
            del found[f"{Q}.{suffix}"]

    return lambda root: tensors(root, change)


def replaced(suffix, make):
    def change(found):
        found[f"{Q}.{suffix}"] = make(found[f"{Q}.{suffix}"])

    return lambda root: tensors(root, change)


def set_to(**changes):
    return lambda root: settings(root, **changes)


def no_settings(root):
    edit_json(root / "config.json", quantization_config=...)


def no_method(root):
    edit_json(root / "config.json", quantization_config={"bits_and_pieces": 4})


def dense_codes(root):
    """Scheme without tensors: the configuration of a quantised model over dense weights."""

    def change(found):
        for name in [name for name in found if name.endswith(".weight_scale")]:
            module = name.removesuffix(".weight_scale")
            found[f"{module}.weight"] = found[f"{module}.weight"].float().bfloat16()
            del found[name]

    tensors(root, change)


def a_dense_weight_beside(root):
    def change(found):
        found[f"{Q}.weight"] = torch.zeros(128, 128, dtype=torch.bfloat16)

    tensors(root, change)


def excepted(root):
    config = json.loads((root / "config.json").read_text())["quantization_config"]
    settings(root, ignore=[*config["ignore"], Q])


def another_state(root):
    """bitsandbytes' own description of a weight names another shape."""

    def change(found):
        name = f"{Q}.weight.quant_state.bitsandbytes__nf4"
        state = json.loads(bytes(found[name].numpy()))
        state["shape"] = [64, 128]
        found[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    tensors(root, change)


def second_layout(root):
    """The zeros of a symmetric model as version 2 stores them, one more than version 1."""

    def change(found):
        found.update({name: part + 0x11111111 for name, part in found.items() if name.endswith(".qzeros")})

    tensors(root, change)


class Case(NamedTuple):
    """A fixture that is broken, and what the error has to speak of."""

    name: str
    fixture: str
    breaks: Any
    says: str


REFUSED = (
    *(Case(method, "ct-int4", set_to(quant_method=method), name) for method, name in METHODS.items()),
    Case("a method of nobody", "ct-int4", set_to(quant_method="of_nobody"), "of_nobody"),
    Case("no method", "ct-int4", no_method, "quant_method"),
    Case("AWQ gemv", "awq-gemm", set_to(version="gemv", checkpoint_format="gemv", format="gemv"), "gemv"),
    Case(
        "AWQ gemv fast", "awq-gemm", set_to(version="gemv_fast", checkpoint_format="gemv_fast"), "gemv_fast"
    ),
    Case("AWQ marlin", "awq-gemm", set_to(version="marlin", checkpoint_format="marlin"), "marlin"),
    Case("GPTQ marlin", "gptq-4bit", set_to(checkpoint_format="marlin", format="marlin"), "marlin"),
    Case("GPTQ marlin, as AutoGPTQ had it", "gptq-4bit", set_to(is_marlin_format=True), "marlin"),
    Case("GPTQ of 5 bits", "gptq-4bit", set_to(bits=5), "5"),
    Case("GPTQ in shorts", "gptq-4bit", set_to(pack_dtype="int16"), "int16"),
    Case(
        "rotated",
        "ct-int4",
        set_to(transform_config={"config_groups": {"u": {"type": "hadamard"}}}),
        "transform",
    ),
    Case("sparse", "ct-int4", set_to(format="sparse-24-bitmask"), "sparse"),
    Case("sparsity", "ct-int4", set_to(sparsity_config={"format": "sparse-bitmask"}), "sparse"),
    Case("marlin-24", "ct-int4", set_to(format="marlin-24"), "marlin"),
    Case("frozen", "ct-int4", set_to(quantization_status="frozen"), "frozen"),
)
BROKEN = (
    Case("codes without scales, INT4", "ct-int4", without("weight_scale"), "weight_scale"),
    Case("codes without scales, FP8", "fp8-block", without("weight_scale_inv"), "weight_scale_inv"),
    Case("codes without scales, GPTQ", "gptq-4bit", without("scales"), "scales"),
    Case("codes without zeros, AWQ", "awq-gemm", without("qzeros"), "qzeros"),
    Case("codes without scales, NF4", "bnb-nf4", without("weight.absmax"), "absmax"),
    Case("codes without a table, NF4", "bnb-nf4", without("weight.quant_map"), "quant_map"),
    Case("codes without scales, INT8", "bnb-int8", without("SCB"), "SCB"),
    Case("codes without scales, MLX", "mlx-4bit", without("scales"), "scales"),
    Case("codes without biases, MLX", "mlx-4bit", without("biases"), "biases"),
    Case("codes without a global scale", "ct-nvfp4", without("weight_global_scale"), "weight_global_scale"),
    Case(
        "codes without a global scale, ModelOpt",
        "modelopt-nvfp4",
        without("weight_scale_2"),
        "weight_scale_2",
    ),
    Case("codes without scales, torchao", "torchao-fp8", without("_weight_scale"), "_weight_scale"),
    Case("scales without codes, INT4", "ct-int4", without("weight_packed"), "weight_packed"),
    Case("scales without codes, GPTQ", "gptq-4bit", without("qweight"), "qweight"),
    Case("a scheme without tensors", "ct-fp8-channel", dense_codes, "but no weight is"),
    Case("tensors without a scheme", "ct-int4", no_settings, "does not say how"),
    Case(
        "scales of another grid, FP8",
        "fp8-block",
        replaced("weight_scale_inv", lambda s: s.repeat(2, 1)),
        "shape",
    ),
    Case(
        "scales of another grid, INT4", "ct-int4", replaced("weight_scale", lambda s: s.repeat(1, 2)), "shape"
    ),
    Case("scales of another grid, MXFP4", "ct-mxfp4", replaced("weight_scale", lambda s: s[:, :2]), "shape"),
    Case("scales of another grid, AWQ", "awq-gemm", replaced("scales", lambda s: s[:1]), "shape"),
    Case("scales of another grid, NF4", "bnb-nf4", replaced("weight.absmax", lambda s: s[:100]), "shape"),
    Case("another block", "fp8-block", set_to(weight_block_size=[64, 64]), "shape"),
    Case("another group", "ct-int4", lambda root: group(root, group_size=32), "shape"),
    Case("other bits, INT4", "ct-int4", lambda root: group(root, num_bits=8), "shape"),
    Case("other bits, GPTQ", "gptq-4bit", set_to(bits=8), "shape"),
    Case("other bits, MLX", "mlx-4bit", lambda root: mlx_bits(root, 8), ""),
    Case("another shape, NF4", "bnb-nf4", another_state, "shape"),
    Case("another dtype of scales", "fp8-block", replaced("weight_scale_inv", lambda s: s.long()), "I64"),
    Case(
        "integers of another layout", "bnb-int8", replaced("weight_format", torch.ones_like), "weight_format"
    ),
    Case("zeros that are none", "torchao-int8", replaced("_weight_zero_point", torch.ones_like), "zero"),
    Case("a weight that is stored twice", "ct-int4", a_dense_weight_beside, Q),
    Case("quantised, and excepted", "ct-int4", excepted, "ignore"),
    Case(
        "zeros of the first layout",
        "gptq-4bit",
        set_to(checkpoint_format="gptq_v2", format="gptq_v2"),
        "stores 7 as every zero point, as gptq does",
    ),
    Case(
        "zeros of the second layout",
        "gptq-4bit",
        second_layout,
        "stores 8 as every zero point, as gptq_v2 does",
    ),
    Case(
        "two methods",
        "gptq-4bit",
        lambda root: edit_json(root / "quantize_config.json", quant_method="awq"),
        "awq",
    ),
)


def mlx_bits(root, bits):
    config = json.loads((root / "config.json").read_text())
    tables = {key: config[key] | {"bits": bits} for key in ("quantization", "quantization_config")}
    edit_json(root / "config.json", **tables)


def refusal(cli, fixture, breaks, tmp_path, case):
    about = case(fixture, target_modules=["q_proj"])
    broken = tmp_path / "broken"
    shutil.copytree(about.base, broken)
    breaks(broken)
    result = cli("--base", broken, "--adapter", about.adapter, "--out", tmp_path / "out")
    assert result.exit_code == exits.PLAN, (result.exit_code, result.stderr)
    assert not list(tmp_path.glob("out*")), "something was written"
    assert "Traceback" not in result.stderr
    return re.sub(r"\s+", " ", result.stderr)


@pytest.mark.parametrize("wrong", [*REFUSED, *BROKEN], ids=lambda wrong: wrong.name)
def test_a_base_that_is_not_understood_is_refused(wrong, cli, tmp_path, case):
    assert wrong.says in refusal(cli, wrong.fixture, wrong.breaks, tmp_path, case)


class Odd(NamedTuple):
    """A part of a weight, and a number in it with which nothing can be computed, as bytes."""

    fixture: str
    part: str
    number: bytes


NAN, INFINITY, ZERO = (struct.pack("<f", number) for number in (math.nan, math.inf, 0.0))
ODD = (
    Odd("fp8-block", "weight_scale_inv", NAN),
    Odd("fp8-block", "weight", b"\x7f"),
    Odd("bnb-nf4", "weight.absmax", INFINITY),
    Odd("ct-mxfp4", "weight_scale", b"\xff"),
    Odd("mlx-nvfp4", "scales", b"\x7f"),
    # To divide by infinity makes zeros.
    Odd("ct-nvfp4", "weight_global_scale", INFINITY),
    Odd("ct-nvfp4", "weight_global_scale", ZERO),
)


@pytest.mark.parametrize("options", [(), ("--no-verify", "--allow-loss")], ids=["", "not verified"])
@pytest.mark.parametrize("odd", ODD, ids=lambda odd: f"{odd.fixture} {odd.part} {odd.number.hex()}")
def test_a_number_that_cannot_be_computed_with_is_named(odd, options, cli, tmp_path, case):
    def put(part):
        part = part.clone()
        content = part.view(-1).view(torch.uint8)
        content[: len(odd.number)] = torch.tensor(list(odd.number), dtype=torch.uint8)
        return part

    def run(*arguments):
        return cli(*arguments, *options)

    said = refusal(run, odd.fixture, replaced(odd.part, put), tmp_path, case)
    assert f"error: {Q}.{odd.part}: " in said
    assert "in the base, expected" in said


@pytest.mark.parametrize("storage", ["dense", "mixed"])
@pytest.mark.parametrize("wrong", [REFUSED[0], BROKEN[0]], ids=lambda wrong: wrong.name)
def test_it_is_refused_however_it_would_be_stored(wrong, storage, cli, tmp_path, case):
    def run(*arguments):
        return cli(*arguments, "--out-storage", storage)

    assert wrong.says in refusal(run, wrong.fixture, wrong.breaks, tmp_path, case)


def test_every_method_has_a_sentence_of_its_own(cli, tmp_path, case):
    said = {}
    for wrong in REFUSED[: len(METHODS)]:
        (tmp_path / wrong.name).mkdir()
        text = refusal(cli, wrong.fixture, wrong.breaks, tmp_path / wrong.name, case)
        said[wrong.name] = text.replace(str(tmp_path), "").replace(wrong.name, "")
    assert len(set(said.values())) == len(METHODS)


def test_it_is_refused_where_nothing_touches_it(cli, tmp_path, case):
    """The rest would be copied: the output would be as broken as the base."""
    about = case("ct-int4", target_modules=["lm_head"])
    broken = tmp_path / "broken"
    shutil.copytree(about.base, broken)
    without("weight_scale")(broken)
    result = cli("--base", broken, "--adapter", about.adapter, "--out", tmp_path / "out")
    assert result.exit_code == exits.PLAN
    assert not (tmp_path / "out").exists()


def test_pickled_weights_of_torchao_are_refused(cli, tmp_path, case):
    about = case("torchao-int8", target_modules=["q_proj"])
    broken = tmp_path / "broken"
    shutil.copytree(about.base, broken)
    to_pickles(broken)
    result = cli("--base", broken, "--adapter", about.adapter, "--out", tmp_path / "out")
    assert result.exit_code == exits.PLAN, result.stderr
    assert "torchao" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_gguf_base_is_refused(cli, tmp_path, case):
    about = case("ct-int4", target_modules=["q_proj"])
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text((FIXTURES / "ct-int4" / "config.json").read_text())
    (base / "model.gguf").write_bytes(b"GGUF" + bytes(64))
    result = cli("--base", base, "--adapter", about.adapter, "--out", tmp_path / "out")
    assert result.exit_code in (exits.RESOLVE, exits.PLAN), result.stderr
    assert "GGUF" in result.stderr
    assert not (tmp_path / "out").exists()
