"""Mixed outputs are loaded by the libraries that quantise: what has become dense is dense to them."""

from __future__ import annotations

import pytest
import torch

from lora_merge.cli import exits
from tests.storages.asking import ask
from tests.storages.digesting import digest
from tests.storages.reference import quantised_of, tensors_of

LOADED = (
    "ct-int4",
    "ct-int4-asymmetric",
    "ct-fp8-channel",
    "ct-nvfp4",
    "fp8-block",
    "bnb-nf4",
    "bnb-int8",
    "torchao-int8",
    "gptq-4bit",
    "gptq-4bit-act-order",
    "awq-gemm",
)
"""What transformers or GPTQModel loads on a CPU."""

ROUNDED = 5e-2
"""The libraries decode to bfloat16."""


@pytest.fixture(scope="session")
def outputs(oracles_python, case, cli, tmp_path_factory):
    """Return, by fixture, a mixed output and its case."""
    root, found = tmp_path_factory.mktemp("mixed"), {}
    for name in LOADED:
        about = case(name, target_modules=["q_proj"])
        arguments = (
            "--base",
            about.base,
            "--adapter",
            about.adapter,
            "--out",
            root / name,
            "--out-storage",
            "mixed",
        )
        result = cli(*arguments)
        assert result.exit_code == exits.OK, result.stderr
        found[name] = root / name, about
    return found


@pytest.fixture(scope="session")
def loaded(oracles_python, outputs):
    """Return what the libraries say of all of them: one process."""
    texts = [f"{name.partition('-')[0]}={out}" for name, (out, _) in outputs.items()]
    return ask(oracles_python, "tests.storages.making.loading", texts)


@pytest.mark.parametrize("name", LOADED)
def test_a_mixed_output_is_loaded_by_its_library(name, outputs, loaded):
    out, about = outputs[name]
    said, stored = loaded[str(out)], tensors_of(out)
    assert "error" not in said, said["error"]
    dense = {
        path.removesuffix(".weight") for path in quantised_of(about.base).keys() - quantised_of(out).keys()
    }
    assert {path.rpartition(".")[2] for path in dense} == {"q_proj", "k_proj", "v_proj"}
    for module in dense:
        assert said["dense"][module] == digest(stored[f"{module}.weight"]), module
    logits = torch.tensor(said["logits"])
    assert float((logits - about.logits).abs().max() / about.logits.abs().max()) < ROUNDED
