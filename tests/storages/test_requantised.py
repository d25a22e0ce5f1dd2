"""``--out-storage base``: new codes on the base's own scales, for every storage, and nothing else is another."""

from __future__ import annotations

import json
import shutil
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch
from safetensors.torch import save_file

import lora_merge
from lora_merge.core.weight import WEIGHT
from tests.crossing import diagonal, only
from tests.storages.asking import ask
from tests.storages.making.models import VOCABULARY
from tests.storages.reference import (
    FIXTURES,
    NAMES,
    ONE_OF_EACH_METHOD,
    by_library,
    decoded,
    everywhere,
    logits_of,
    model_of,
    quantised_of,
    same_bytes,
    tensors_of,
)
from tests.storages.test_loading import LOADED as MIXED_LOADED
from tests.storages.training import log_probabilities, task, trained
from tests.tampering import edit_tensors

if TYPE_CHECKING:
    from pathlib import Path

SAMPLE = only(ONE_OF_EACH_METHOD, NAMES)
each = pytest.mark.parametrize("name", SAMPLE)
each_and_rounding = pytest.mark.parametrize(("name", "rounding"), diagonal(SAMPLE, ["nearest", "adapter"]))


class Made(NamedTuple):
    """Outputs of a fixture with an adapter that has learned something, on all linear layers."""

    base: Path
    adapter: Path
    outputs: dict[str, Path]
    """By rounding."""

    errors: dict[str, float]
    """By rounding: how far the log-probabilities of what was learned are from those of base and adapter, as a share of what
    the adapter changes in them.
    """

    kept: dict[str, float]
    """By rounding: the share of what was learned that is left, in the loss."""


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Return a function: fixture → its outputs."""

    @cache
    def build(name):
        root, sequences = tmp_path_factory.mktemp(name), task(VOCABULARY)
        base, adapter = FIXTURES / name, root / "adapter"
        model = model_of(by_library(name), base, root / "bare")
        with torch.no_grad():
            bare = log_probabilities(model, sequences)
        model = trained(model, adapter, sequences, **everywhere(name))
        with torch.no_grad():
            wanted = log_probabilities(model, sequences)
        outputs, errors, kept = {}, {}, {}
        for rounding in ("nearest", "adapter"):
            out = outputs[rounding] = root / f"on-grid-{rounding}"
            requantise(base, adapter, out, rounding)
            with torch.no_grad():
                found = log_probabilities(model_of(decoded(out), out, root / "decoded"), sequences)
            errors[rounding] = float((found - wanted).norm() / (bare - wanted).norm())
            kept[rounding] = float((found - bare).mean() / (wanted - bare).mean())
        return Made(base, adapter, outputs, errors, kept)

    return build


def requantise(base, adapter, out, rounding):
    options = {"out_storage": "base", "rounding": rounding, "allow_loss": True}
    return lora_merge.merge(base=base, adapter=adapter, out=out, **options)


def codes_of(root, modules=("",)):
    """Return the names of the tensors that hold the codes of quantised weights, of modules with one of these endings."""
    return {
        weight.parts[WEIGHT].name
        for path, weight in quantised_of(root).items()
        if path.removesuffix(".weight").endswith(tuple(modules))
    }


def changed(one, other):
    """Return the names of tensors that differ; names, dtypes and shapes are the same."""
    before, after = tensors_of(one), tensors_of(other)
    assert {name: (one.dtype, one.shape) for name, one in before.items()} == {
        name: (one.dtype, one.shape) for name, one in after.items()
    }
    return {name for name in before if not same_bytes(before[name], after[name])}


@each_and_rounding
def test_only_codes_change_and_no_file_beside(name, rounding, made):
    about = made(name)
    out = about.outputs[rounding]
    other = changed(about.base, out)
    quantised = codes_of(out)
    assert quantised
    # What an adapter changes in a dense layer beside them changes as ever.
    dense = {path for path in tensors_of(out) if path.endswith("_proj.weight")} - quantised
    assert other <= quantised | dense
    if rounding == "adapter":
        # On a coarse grid rounding to the nearest may change none.
        assert (
            len(other & quantised) == len(codes_of(out, everywhere(name)["target_modules"]))
            or name == "gptoss-mxfp4"
        )
    for file in sorted(about.base.iterdir()):
        if file.name.endswith(".index.json"):
            assert json.loads((out / file.name).read_text()) == json.loads(file.read_text())
        elif file.suffix != ".safetensors":
            assert (out / file.name).read_bytes() == file.read_bytes(), file.name


@each_and_rounding
def test_what_no_adapter_is_on_keeps_its_bytes(name, rounding, case, tmp_path):
    touched = "o_proj" if name == "gptoss-mxfp4" else "v_proj"
    if name == "gptoss-mxfp4":
        fields = {"target_modules": [], "target_parameters": ["model.layers.1.mlp.experts.down_proj"]}
        touched = "layers.1.mlp.experts.down_proj"
    else:
        fields = {"target_modules": [touched]}
    about, out = case(name, **fields), tmp_path / "out"
    requantise(about.base, about.adapter, out, rounding)
    assert changed(about.base, out) <= codes_of(about.base, [touched])


@each_and_rounding
def test_a_change_of_zero_keeps_the_codes(name, rounding, case, tmp_path):
    """In one kind of modules, B is zero."""
    idle = "experts.base_layer" if name == "gptoss-mxfp4" else "v_proj"
    about, adapter, out = case(name), tmp_path / "adapter", tmp_path / "out"
    shutil.copytree(about.adapter, adapter)

    def clear(tensors):
        for path in tensors:
            if f"{idle}.lora_B" in path:
                tensors[path] = torch.zeros_like(tensors[path])

    edit_tensors(adapter / "adapter_model.safetensors", clear)
    requantise(about.base, adapter, out, rounding)
    modules = ("experts.gate_up_proj", idle)
    values = decoded(out)
    kept = [path for path in quantised_of(out) if path.removesuffix(".weight").endswith(modules)]
    assert kept
    assert all(torch.equal(values[path], by_library(name)[path]) for path in kept)
    assert changed(about.base, out).isdisjoint(codes_of(out, modules))


@each
def test_what_was_learned_is_kept_by_the_rounding_for_it(name, made, record_property):
    about = made(name)
    record_property("errors", about.errors)
    record_property("kept", about.kept)
    nearest, adapter = about.errors["nearest"], about.errors["adapter"]
    assert about.kept["adapter"] > 0.6
    # On grids of eight bits there is little to lose.
    assert adapter < max(0.7 * nearest, 0.1)


# The libraries.

LOADED = (
    *MIXED_LOADED,
    "ct-int8",
    "ct-fp8-block",
    "ct-fp8-tensor",
    "ct-mxfp4",
    "ct-mxfp8",
    "fp8-ue8m0",
    "gptoss-mxfp4",
    "bnb-fp4",
    "bnb-nf4-double",
    "torchao-fp8",
    "gptq-8bit",
)
"""What transformers or GPTQModel loads on a CPU."""


@pytest.fixture(scope="session")
def loaded(oracles_python, made):
    """Return what the libraries say of all of them: one process."""
    texts = [f"{name.partition('-')[0]}={made(name).outputs['adapter']}" for name in LOADED]
    return ask(oracles_python, "tests.storages.making.loading", texts)


@pytest.mark.parametrize("name", LOADED)
def test_a_library_computes_with_our_values(name, made, loaded, tmp_path):
    out = made(name).outputs["adapter"]
    said = loaded[str(out)]
    assert "error" not in said, said["error"]
    expected = logits_of(model_of(decoded(out), out, tmp_path / "decoded"))
    far = float((torch.tensor(said["logits"]) - expected).abs().max() / expected.abs().max())
    assert far < 2e-2


def test_rows_that_an_adapter_brings_are_stored_dense(tmp_path):
    """Trained tokens of a quantised embedding may be far beyond its scales."""
    base, adapter, out = FIXTURES / "mlx-4bit", tmp_path / "adapter", tmp_path / "out"
    embedding, rows = "model.embed_tokens.weight", [1, 5]
    before = decoded(base)[embedding]
    trained_rows = torch.full((len(rows), before.shape[1]), 3.0)
    adapter.mkdir()
    save_file(
        {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": trained_rows},
        adapter / "adapter_model.safetensors",
    )
    config = {"peft_type": "TRAINABLE_TOKENS", "target_modules": ["embed_tokens"], "token_indices": rows}
    (adapter / "adapter_config.json").write_text(json.dumps(config))

    requantise(base, adapter, out, "adapter")

    wanted = before.clone()
    wanted[rows] = trained_rows
    assert tensors_of(out)[embedding].equal(wanted.bfloat16())
    assert json.loads((out / "config.json").read_text())["quantization"]["model.embed_tokens"] is False
