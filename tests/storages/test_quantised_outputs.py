"""``--quantize`` writes what the libraries make of the dense output: at once, from any base, and they load it."""

from __future__ import annotations

import json

import pytest
import torch

import lora_merge
from tests.crossing import diagonal
from tests.storages import dense
from tests.storages.asking import ask
from tests.storages.quantising import SCHEMES, digest_of
from tests.storages.reference import decoded, logits_of, model_of, tensors_of

each = pytest.mark.parametrize("scheme", SCHEMES)


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """Return a folder with a base, an adapter, one of its head, and the dense output."""
    root = tmp_path_factory.mktemp("quantised-outputs")
    base = dense.build(root / "base")
    lora_merge.merge(base=base, adapter=dense.lora(base, root / "lora"), out=root / "dense")
    dense.of_head(base, root / "head")
    return root


@pytest.fixture(scope="session")
def quantised(place):
    """Return a function: scheme → the output that is made at once."""

    def find(scheme):
        out = place / f"out-{scheme}"
        if not out.exists():
            lora_merge.merge(base=place / "base", adapter=place / "lora", out=out, quantize=scheme)
        return out

    return find


# By two runs of this command.


@each
def test_at_once_is_merging_and_then_quantising(scheme, place, quantised, tmp_path):
    out = tmp_path / "out"
    lora_merge.merge(base=place / "dense", adapter=place / "head", out=out, quantize=scheme, allow_again=True)
    assert dense.apart_from_head(out) == dense.apart_from_head(quantised(scheme))
    assert len(tensors_of(out)) > len(tensors_of(place / "dense"))


@pytest.mark.parametrize(
    ("fixture", "scheme"),
    diagonal(["fp8-block", "gptq-4bit-act-order", "bnb-nf4-double"], ["fp8", "int4-g32", "nvfp4", "mxfp8"]),
)
def test_a_quantised_base_is_decoded_and_then_quantised(fixture, scheme, case, tmp_path):
    base, adapter, _ = case(fixture)
    ours, between, then = (tmp_path / name for name in ("ours", "between", "then"))
    lora_merge.merge(base=base, adapter=adapter, out=between, dtype="bfloat16")
    lora_merge.merge(base=base, adapter=adapter, out=ours, quantize=scheme, dtype="bfloat16")
    head = dense.of_head(between, tmp_path / "head")
    lora_merge.merge(base=between, adapter=head, out=then, quantize=scheme, allow_again=True)
    assert dense.apart_from_head(ours) == dense.apart_from_head(then)


@pytest.mark.parametrize("scheme", ["int4", "nvfp4", "fp8"])
def test_a_base_in_float32_is_rounded_to_bfloat16_first(scheme, place, tmp_path):
    """As a library would see it: what that quantises is a checkpoint in bfloat16."""
    base = dense.build(tmp_path / "base", "float32")
    ours, between, then = (tmp_path / name for name in ("ours", "between", "then"))
    lora_merge.merge(base=base, adapter=place / "lora", out=between, dtype="bfloat16")
    lora_merge.merge(base=base, adapter=place / "lora", out=ours, quantize=scheme, dtype="bfloat16")
    lora_merge.merge(base=between, adapter=place / "head", out=then, quantize=scheme, allow_again=True)
    assert dense.apart_from_head(ours) == dense.apart_from_head(then)


# By the libraries.

DECODED = {"int4": "fp8-block", "nvfp4": "bnb-nf4", "mxfp8": "gptq-4bit-v2"}
"""Schemes, and a base that is decoded first."""


@pytest.fixture(scope="session")
def of_decoded(case, tmp_path_factory):
    """Return a function: scheme → a folder with the output of a quantised base, and the same dense."""
    root = tmp_path_factory.mktemp("of-decoded")

    def find(scheme):
        here = root / scheme
        if not here.exists():
            base, adapter, _ = case(DECODED[scheme])
            lora_merge.merge(base=base, adapter=adapter, out=here / "dense", dtype="bfloat16")
            dense.write_tokenizer(here / "dense")
            lora_merge.merge(base=base, adapter=adapter, out=here / "ours", quantize=scheme, dtype="bfloat16")
        return here

    return find


@pytest.fixture(scope="session")
def made(oracles_python, place, quantised, of_decoded):
    """Return what the libraries read in the configurations, having written what they make of the dense outputs."""
    texts = [f"{scheme}={place / 'dense'}={quantised(scheme)}={place / scheme}" for scheme in SCHEMES]
    for scheme in DECODED:
        here = of_decoded(scheme)
        texts.append(f"{scheme}={here / 'dense'}={here / 'ours'}={here / 'theirs'}")
    return ask(oracles_python, "tests.storages.making.outputs", texts)


def assert_same(ours, theirs, made):
    """Check that every tensor of a library's output is in ours, with the same bytes, and no other; and the configuration."""
    found, expected = tensors_of(ours), tensors_of(theirs)
    assert found.keys() == expected.keys()
    assert [name for name in found if digest_of(found[name]) != digest_of(expected[name])] == []
    meant, mean = made[str(theirs)]
    assert mean == meant


@each
def test_all_of_it_is_what_the_library_makes_of_the_dense_output(scheme, made, place, quantised):
    assert_same(quantised(scheme), place / scheme, made)


@pytest.mark.parametrize("scheme", DECODED)
def test_of_a_decoded_base_it_is_the_same(scheme, made, of_decoded):
    assert_same(of_decoded(scheme) / "ours", of_decoded(scheme) / "theirs", made)


UNLOADED = ("int4-asym", "int4-asym-g32")
"""What transformers 5.23 does not load packed, no more than what its library makes: it expects the zeros unpacked."""

IN_EIGHT_BITS = ("fp8", "fp8-block", "fp8-channel", "int8")
"""What they multiply is rounded to eight bits as well."""


@pytest.fixture(scope="session")
def loaded(oracles_python, quantised, place, made, tmp_path_factory):
    """Return what transformers says of outputs: decoded, by scheme, and as `from_pretrained` loads them: one process."""
    links = tmp_path_factory.mktemp("loaded")
    texts = []
    for scheme in SCHEMES:
        (links / f"decoded {scheme}").symlink_to(quantised(scheme))
        (links / f"plain {scheme}").symlink_to(quantised(scheme))
        (links / f"theirs {scheme}").symlink_to(place / scheme)
        kind = "fp8" if scheme == "fp8" else "ct"
        texts += [f"{kind}={links}/decoded {scheme}", f"plain={links}/plain {scheme}"]
    texts += [f"plain={links}/theirs {scheme}" for scheme in UNLOADED]
    said = ask(oracles_python, "tests.storages.making.loading", texts)
    return {folder.rpartition("/")[2]: line for folder, line in said.items()}


@pytest.mark.parametrize("way", ["decoded", "plain"])
@each
def test_transformers_computes_with_our_values(scheme, way, loaded, quantised, tmp_path):
    said, out = loaded[f"{way} {scheme}"], quantised(scheme)
    if way == "plain" and scheme in UNLOADED:
        assert said == loaded[f"theirs {scheme}"]
        assert "mismatched_sizes" in said["error"]
        return
    assert "error" not in said, said["error"]
    expected = logits_of(model_of(decoded(out), out, tmp_path / "decoded"))
    far = float((torch.tensor(said["logits"]) - expected).abs().max() / expected.abs().max())
    # The library decodes to bfloat16; as it is loaded, it computes in it as well.
    assert far < (1e-2 if way == "decoded" else 1e-1 if scheme in IN_EIGHT_BITS else 2e-2)


@each
def test_only_the_head_is_named_as_dense(scheme, quantised):
    settings = json.loads((quantised(scheme) / "config.json").read_text())["quantization_config"]
    assert settings.get("ignore", settings.get("modules_to_not_convert")) == ["lm_head"]
