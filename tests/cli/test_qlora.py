"""Which copy of the base an adapter was trained on: the quantised one, the original, another one; and how far apart they are."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path

import pytest

from lora_merge.cli import exits
from lora_merge.planning import distance
from tests.tampering import edit_json

FIXTURES = Path(__file__).parents[1] / "fixtures" / "quantised"
RANK, ALPHA = 4, 8
LAYER = "model.layers.0"
DOWN, QUERY = f"{LAYER}.mlp.down_proj", f"{LAYER}.self_attn.q_proj"
SHAPES = {DOWN: (128, 256), QUERY: (128, 128), f"{LAYER}.self_attn.k_proj": (64, 128), "lm_head": (32, 128)}
PEFT_CARD = """---
library_name: peft
---
## Training procedure

The following `bitsandbytes` quantization config was used during training:
- quant_method: bitsandbytes
- load_in_8bit: False
- load_in_4bit: True
- bnb_4bit_quant_type: nf4
"""
AXOLOTL_CARD = """<details><summary>See axolotl config</summary>

axolotl version: `0.18.0`
```yaml
adapter: qlora
load_in_8bit: false
load_in_4bit: true
```
"""
SIGNS = {
    "PEFT's card": ("README.md", PEFT_CARD, "bitsandbytes, 4 bits"),
    "Axolotl's card": ("README.md", AXOLOTL_CARD, "bitsandbytes, 4 bits"),
    "ms-swift": ("args.json", json.dumps({"quant_method": "bnb", "quant_bits": 8}), "bitsandbytes, 8 bits"),
    "ms-swift, FP8": ("args.json", json.dumps({"quant_method": "fp8", "quant_bits": None}), "fp8"),
    "LLaMA-Factory": ("training_args.yaml", "quantization_bit: 4\nquantization_method: bnb\n", "bitsandbytes, 4 bits"),
}  # fmt: skip
NO_SIGNS = {
    "another card": ("README.md", "load_in_4bit: true\n- load_in_4bit: True\n"),
    "PEFT's card of a training in full precision": ("README.md", PEFT_CARD.replace(": True", ": False")),
    "ms-swift": ("args.json", json.dumps({"quant_method": None, "quant_bits": None})),
    "a broken file": ("args.json", "{"),
    "LLaMA-Factory": ("training_args.yaml", "export_quantization_bit: 4\n"),
}


def values_of(name):
    """Return the values of a fixture, decoded, by name."""
    from lora_merge.formats.weights import values_of
    from lora_merge.planning.resolve import resolve_base

    return {name: values_of(weight) for name, weight in resolve_base(FIXTURES / name).weights.items()}


@pytest.fixture
def quantised(tmp_path):
    """Return a function: fixture, name of a folder → a copy of it there."""

    def make(fixture="bnb-nf4", folder="Solid-7B-bnb-4bit"):
        root = tmp_path / folder
        shutil.copytree(FIXTURES / fixture, root)
        return root

    return make


@pytest.fixture
def original(tmp_path):
    """Return a function: fixture, name of a folder, noise → a model in float32 from which it may have been quantised."""

    def make(fixture="bnb-nf4", folder="Solid-7B", noise=0.01):
        import torch
        from safetensors.torch import save_file

        root = tmp_path / folder
        root.mkdir()
        generator = torch.Generator().manual_seed(3)
        values = {
            name: one + noise * torch.randn(one.shape, generator=generator)
            for name, one in values_of(fixture).items()
        }
        save_file(values, root / "model.safetensors", {"format": "pt"})
        shutil.copy(FIXTURES / fixture / "config.json", root)
        edit_json(root / "config.json", quantization_config=..., dtype="float32")
        return root

    return make


@pytest.fixture
def adapter(tmp_path):
    """Return a function: what it names, modules, size of its factors, fields → a LoRA adapter."""

    def make(named, modules=(DOWN, QUERY), size=0.05, folder="adapter", **fields):
        import torch
        from safetensors.torch import save_file

        root = tmp_path / folder
        root.mkdir()
        generator = torch.Generator().manual_seed(11)
        tensors = {}
        for module in modules:
            out, inner = SHAPES[module]
            for key, shape in (("lora_A", (RANK, inner)), ("lora_B", (out, RANK))):
                name = f"base_model.model.{module}.{key}.weight"
                tensors[name] = size * torch.randn(shape, generator=generator)
        save_file(tensors, root / "adapter_model.safetensors", {"format": "pt"})
        config = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "bias": "none",
            "target_modules": [module.rpartition(".")[2] for module in modules],
            "base_model_name_or_path": named if named is None else str(named), **fields,
        }  # fmt: skip
        (root / "adapter_config.json").write_text(json.dumps(config))
        return root

    return make


@pytest.fixture
def said(cli):
    """Return a function: options of ``plan`` → the issues about copies of the base."""

    def ask(*options):
        result = cli("plan", *options, "--json")
        assert result.exit_code == exits.OK, result.output
        issues = json.loads(result.stdout)["issues"]
        return [issue for issue in issues if issue["code"] in {"other-storage", "folded-norms", "other-base"}]

    return ask


def deltas_of(root):
    from safetensors.torch import load_file

    tensors = load_file(root / "adapter_model.safetensors")
    return {
        module: ALPHA
        / RANK
        * tensors[f"base_model.model.{module}.lora_B.weight"]
        @ tensors[f"base_model.model.{module}.lora_A.weight"]
        for module in SHAPES
        if f"base_model.model.{module}.lora_B.weight" in tensors
    }


def ratios_of(one, other, adapter):
    """Return ‖q‖ / ‖Δ‖ by module, from whole tensors."""
    deltas = deltas_of(adapter)
    return {
        module: float((one[f"{module}.weight"] - other[f"{module}.weight"]).norm() / delta.norm())
        for module, delta in deltas.items()
    }


def loaded(root):
    from safetensors.torch import load_file

    return load_file(root / "model.safetensors")


# the copy that it was trained on


def test_the_quantised_base_that_an_adapter_names_is_the_default_and_is_decoded(
    quantised, adapter, cli, tmp_path
):
    import torch

    base = quantised()
    lora = adapter(base)

    result = cli("--adapter", lora, "--out", tmp_path / "out")

    assert result.exit_code == exits.OK, result.stderr
    sentence = f"is stored quantised (NF4), and the adapter {lora} was trained on it; it is decoded, so the output computes what training computed"
    assert sentence in result.stderr.replace("\n", " ")
    merged, before, deltas = loaded(tmp_path / "out"), values_of("bnb-nf4"), deltas_of(lora)
    for module, delta in deltas.items():
        wanted = (before[f"{module}.weight"] + delta).to(torch.bfloat16)
        assert (merged[f"{module}.weight"] - wanted).abs().max() <= 2**-8 * wanted.abs().max()


@pytest.mark.parametrize("fixture", ["gptq-4bit", "awq-gemm", "fp8-block", "ct-int4", "modelopt-int4-awq"])
def test_calibrated_and_other_storages_need_nothing_where_they_are_what_is_named(
    fixture, quantised, adapter, said
):
    base = quantised(fixture, "base")

    (issue,) = said("--base", base, "--adapter", adapter(base))

    assert issue["severity"] == "note"
    assert "was trained on it; it is decoded" in issue["sentence"]


def test_nothing_is_said_where_only_dense_weights_change(quantised, original, adapter, said):
    base, plain = quantised(), original()

    assert said("--base", base, "--adapter", adapter(base, ["lm_head"])) == []
    assert said("--base", plain, "--adapter", adapter(base, ["lm_head"], folder="second")) == []


def test_nothing_is_said_of_two_copies_in_full_precision(original, adapter, said):
    base, other = original(), original(folder="Solid-7B-fp32")

    assert said("--base", base, "--adapter", adapter(other)) == []
    assert said("--base", base, "--adapter", adapter("acme/Solid-7B", folder="second")) == []


# another copy


@pytest.mark.parametrize("way", ["original", "quantised"])
def test_the_difference_of_two_copies_is_measured_by_the_adapters_change(
    way, quantised, original, adapter, said
):
    copies = {"quantised": quantised(), "original": original()}
    base = copies.pop(way)
    (named,) = copies.values()
    lora = adapter(named)
    ratios = ratios_of(
        values_of("bnb-nf4"), loaded(copies.get("original", base) if way == "quantised" else base), lora
    )

    (issue,) = said("--base", base, "--adapter", lora)

    worst = max(ratios, key=ratios.get)
    assert issue["severity"] == "note"
    assert issue["subject"] == str(base)
    assert f"is {statistics.median(ratios.values()):.2g} times as large" in issue["sentence"]
    assert f"(median of 2 tensors), and {ratios[worst]:.2g} times in {worst}.weight" in issue["sentence"]
    kinds = ("NF4", "full precision") if way == "original" else ("full precision", "NF4")
    assert f"was trained on {named} ({kinds[0]}), and this base is {kinds[1]}" in issue["sentence"]


def test_the_difference_is_measured_with_one_thread(quantised, original, adapter, said, monkeypatch):
    """Of such small samples, several take ten times as long: they wait for each other."""
    import torch

    before, n_threads, norm = torch.get_num_threads(), [], distance._delta_norm

    def noted(*args):
        n_threads.append(torch.get_num_threads())
        return norm(*args)

    monkeypatch.setattr(distance, "_delta_norm", noted)
    (_,) = said("--base", quantised(), "--adapter", adapter(original()))
    assert set(n_threads) == {1}
    assert torch.get_num_threads() == before


def test_a_difference_above_ten_times_the_change_is_a_warning_with_the_worst_tensor(
    quantised, original, adapter, said, cli
):
    named, base = quantised(), original(noise=0.05)
    lora = adapter(named, size=0.02)
    ratios = ratios_of(values_of("bnb-nf4"), loaded(base), lora)
    worst = max(ratios, key=ratios.get)
    assert ratios[worst] > 10

    (issue,) = said("--base", base, "--adapter", lora)

    assert issue["severity"] == "warning"
    assert f"{ratios[worst]:.0f} times in {worst}.weight" in issue["sentence"]
    assert issue["hint"] == f"merge into --base {named} to get what training computed"
    assert cli("plan", "--base", base, "--adapter", lora, "--strict", "--json").exit_code == exits.PLAN


def test_copies_with_equal_values_are_no_two_copies(quantised, original, adapter, said):
    named, base = quantised(), original(noise=0.0)

    assert said("--base", base, "--adapter", adapter(named)) == []


def test_each_adapter_is_measured_as_it_was_trained(quantised, original, adapter, said):
    """The weight that a merge gives an adapter changes nothing of its training."""
    named, base = quantised(), original()
    first, second = adapter(named), adapter(base, folder="second")

    (alone,) = said("--base", base, "--adapter", first)
    (among,) = said("--base", base, "--adapter", f"{first}:0.01", "--adapter", second)

    assert among == alone


def test_without_a_norm_from_factors_the_copies_are_only_named(quantised, original, adapter, said):
    import torch
    from safetensors.torch import load_file, save_file

    named, base = quantised(), original()
    lora = adapter(named, use_dora=True)
    file = lora / "adapter_model.safetensors"
    magnitudes = {
        f"base_model.model.{module}.lora_magnitude_vector": torch.ones(SHAPES[module][0])
        for module in (DOWN, QUERY)
    }
    save_file({**load_file(file), **magnitudes}, file, {"format": "pt"})

    (issue,) = said("--base", base, "--adapter", lora)

    assert issue["severity"] == "note"
    assert "and this base does not have that rounding" in issue["sentence"]


def test_a_copy_that_cannot_be_read_stops_nothing(quantised, original, adapter, said):
    named, base = quantised(), original()
    (named / "model.safetensors").write_bytes(b"\0" * 64)

    (issue,) = said("--base", base, "--adapter", adapter(named))

    assert "which is stored quantised, and this base does not have that rounding" in issue["sentence"]


def test_a_copy_in_the_hubs_cache_is_measured_and_nothing_is_fetched(
    quantised, original, adapter, said, tmp_path, monkeypatch
):
    from huggingface_hub import constants

    copy, base = quantised(), original()
    repo, commit = tmp_path / "hub" / "models--acme--Solid-7B-bnb-4bit", "ab" * 20
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    shutil.copytree(copy, repo / "snapshots" / commit)
    shutil.rmtree(copy)
    lora = adapter("acme/Solid-7B-bnb-4bit")

    (absent,) = said("--base", base, "--adapter", lora)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (cached,) = said("--base", base, "--adapter", lora)

    assert "which is stored quantised" in absent["sentence"]
    assert "(median of 2 tensors)" in cached["sentence"]


@pytest.mark.parametrize(
    ("folder", "named", "words"),
    [
        ("Solid-7B-FP8", "acme/Solid-7B", "without this rounding. Merge into --base acme/Solid-7B"),
        ("Solid-7B-bnb-4bit", "acme/Solid-7B-GPTQ", "is a quantised copy (NF4)"),
        ("Solid-7B", "acme/Solid-7B", "was trained on it"),
        ("base", "./somewhere", None),
        ("base", None, None),
    ],
)  # fmt: skip
def test_names_alone_tell_which_copy_it_was(folder, named, words, quantised, adapter, said):
    base = quantised(folder=folder)

    issues = said("--base", base, "--adapter", adapter(named))

    assert [issue["severity"] for issue in issues] == ["note"] * (words is not None)
    assert words is None or words in issues[0]["sentence"]


def test_a_configuration_that_names_the_original_is_not_taken_for_it(quantised, adapter, said):
    """Quantisers leave the original's name in the configuration."""
    base = quantised(folder="Solid-7B-bnb-4bit")
    edit_json(base / "config.json", _name_or_path="acme/Solid-7B")

    (issue,) = said("--base", base, "--adapter", adapter("acme/Solid-7B"))

    assert "is a quantised copy (NF4)" in issue["sentence"]


def test_of_another_model_only_that_is_said(quantised, adapter, said):
    (issue,) = said("--base", quantised(folder="Solid-7B-bnb-4bit"), "--adapter", adapter("acme/Liquid-3B"))

    assert issue["code"] == "other-base"


def test_inspect_says_it_too(quantised, original, adapter, cli):
    named, base = quantised(), original()

    result = cli("inspect", adapter(named), "--base", base)

    assert result.exit_code == exits.OK, result.output
    assert "(median of 2 tensors)" in " ".join(result.output.split())


# norms that carry scales


@pytest.mark.parametrize("fixture", ["awq-gemm", "modelopt-int4-awq"])
@pytest.mark.parametrize("named", ["acme/Solid-7B", "acme/Solid-7B-AWQ", "owner/Solid-7B-AWQ", None])
def test_folded_norms_are_a_warning_unless_the_adapter_names_this_checkpoint(
    fixture, named, quantised, adapter, said
):
    base = quantised(fixture, "hub/models--acme--Solid-7B-AWQ/snapshots/" + "ab" * 20)

    (issue,) = said("--base", base, "--adapter", adapter(named))

    if named == "acme/Solid-7B-AWQ":
        assert issue["severity"] == "note"
        return
    assert (issue["severity"], issue["code"]) == ("warning", "folded-norms")
    assert "so an adapter that was trained on the original model does not fit" in issue["sentence"]
    assert f"--base {named or 'ORIGINAL'}" in issue["hint"]


def test_an_adapter_of_folded_norms_does_not_fit_the_original(quantised, original, adapter, said):
    base, named = original(), quantised("awq-gemm", "trained")

    by_files = said("--base", base, "--adapter", adapter(named))
    by_name = said("--base", base, "--adapter", adapter("acme/Solid-7B-AWQ", folder="second"))

    for (issue,) in (by_files, by_name):
        assert (issue["severity"], issue["code"]) == ("warning", "folded-norms")
        assert "which AWQ quantised. Its norms and other weights are scaled differently" in issue["sentence"]


def test_gptq_folds_nothing(quantised, adapter, said):
    (issue,) = said("--base", quantised("gptq-4bit", "Solid-7B-GPTQ"), "--adapter", adapter("acme/Solid-7B"))

    assert (issue["severity"], issue["code"]) == ("note", "other-storage")


# signs of a training on weights that were quantised when they were loaded


@pytest.mark.parametrize("sign", SIGNS)
def test_files_of_trainers_say_that_the_base_was_quantised_in_memory(sign, original, adapter, said):
    file, text, words = SIGNS[sign]
    base = original()
    lora = adapter(base)
    (lora / file).write_text(text)

    (issue,) = said("--base", base, "--adapter", lora)

    assert issue["severity"] == "note"
    assert (
        f"trained on a base that its trainer had quantised ({words}), according to its {file}"
        in issue["sentence"]
    )
    assert "merge into a copy that is quantised with the same settings" in issue["sentence"]


@pytest.mark.parametrize("sign", NO_SIGNS)
def test_other_files_say_nothing(sign, original, tmp_path):
    from lora_merge.planning.trained_on import sign_of

    file, text = NO_SIGNS[sign]
    (tmp_path / file).write_text(text)

    assert sign_of(tmp_path) is None


def test_a_copy_that_is_quantised_like_the_training_is_what_was_trained_on(quantised, adapter, said):
    lora = adapter("acme/Solid-7B")
    (lora / "README.md").write_text(PEFT_CARD)

    (issue,) = said("--base", quantised(), "--adapter", lora)

    assert (
        "is decoded, and gives what training computed if it was quantised with the same settings"
        in issue["sentence"]
    )


# marks in adapter_config.json

AXOLOTL = {
    "scale_mode": "fresh",
    "pts_policy": "base_fused_max",
    "encoder": "torchao-0.18.0",
    "start_step": 0,
}


@pytest.mark.parametrize("mark", [AXOLOTL, {"backend": "native_torchao", "version": 1, "targets": {}}, True])
@pytest.mark.parametrize("way", ["dense", "mixed"])
def test_an_adapter_for_axolotls_own_merge_is_refused(mark, way, quantised, adapter, cli, tmp_path):
    base = quantised()
    lora = adapter(base, nvfp4_merge_aware=mark)

    result = cli("--base", base, "--adapter", lora, "--out", tmp_path / "out", "--out-storage", way)

    assert result.exit_code == exits.PLAN, result.output
    text = " ".join(result.stderr.split())
    assert (
        "nvfp4_merge_aware: Axolotl trained it for weights that are rounded to NVFP4 after the merge" in text
    )
    assert "axolotl merge-lora" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mark", [False, None, {}])
def test_the_mark_means_nothing_where_it_is_off(mark, original, adapter, cli):
    base = original()

    result = cli("plan", "--base", base, "--adapter", adapter(base, nvfp4_merge_aware=mark), "--strict")

    assert result.exit_code == exits.OK, result.output


# the measure itself


@pytest.mark.parametrize(
    "fixture", ["gptq-4bit", "fp8-ragged", "ct-int3-asymmetric", "mlx-mixed-bits", "gptoss-mxfp4"]
)
def test_a_sample_of_rows_is_near_the_whole(fixture, tmp_path, monkeypatch):
    """Rows of any storage can be sampled, whatever multiples its tiles begin at."""
    import torch
    from safetensors.torch import save_file

    from lora_merge.core.weight import Weight
    from lora_merge.formats.safetensors import read_header
    from lora_merge.formats.weights import values_of
    from lora_merge.planning import distance
    from lora_merge.planning.resolve import resolve_base

    monkeypatch.setattr(distance, "SAMPLE_ELEMENTS", 1 << 12)
    weights = resolve_base(FIXTURES / fixture).weights
    weight = next(one for name, one in weights.items() if one.plain is None and "down_proj" in name)
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    save_file({weight.name: values_of(weight) + noise}, tmp_path / "other.safetensors")
    (ref,) = read_header(tmp_path / "other.safetensors").tensors

    n_rows = distance._rows(weight)
    sample = distance._sample(n_rows, weight.shape[-1])
    assert len(sample) > 1
    assert sum(end - start for start, end in sample) < n_rows
    assert distance._difference(weight, weight) == 0.0
    assert distance._difference(weight, Weight.dense(ref)) == pytest.approx(1.0, rel=0.1)
