"""What sentence-transformers saves around a model (pooling, Dense layers, prompts) comes along; the adapter's wins."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from pathlib import Path

MODULES = "sentence_transformers.models."
WIDTH = 32


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A tiny BERT without modules around it, and a LoRA for it: (base, adapter)."""
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertModel

    root = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    model = BertModel(BertConfig(**sizes, vocab_size=64, max_position_embeddings=32))
    model.save_pretrained(root / "base")
    write_vocabulary(root / "base")
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["query"], task_type="FEATURE_EXTRACTION"))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    tuned.save_pretrained(root / "adapter")
    return root / "base", root / "adapter"


def write_vocabulary(root: Path) -> None:
    """Write a tokenizer of BERT's kind."""
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "query", ":", *(f"w{n}" for n in range(57))]
    (root / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizerFast(str(root / "vocab.txt")).save_pretrained(root)


@pytest.fixture
def place(encoder, tmp_path):
    """Return a function (which, name) → a copy of the base or the adapter, to put modules around."""

    def copy(which, name):
        shutil.copytree(encoder[which], tmp_path / name)
        return tmp_path / name

    return copy


def describe(root: Path, *modules: tuple[str, str], top: str = "") -> None:
    """List modules behind the transformer as sentence-transformers does: (folder, class)."""
    listed = [(top, "Transformer"), *modules]
    (root / "modules.json").write_text(
        json.dumps(
            [
                {"idx": n, "name": str(n), "path": folder, "type": MODULES + kind}
                for n, (folder, kind) in enumerate(listed)
            ]
        )
    )


def dense(root: Path, folder: str, value: float, pickled: bool = False) -> None:
    """Write a Dense layer whose every weight is a value."""
    (root / folder).mkdir()
    config = {"in_features": WIDTH, "out_features": 8, "bias": False}
    activation = {"activation_function": "torch.nn.modules.linear.Identity"}
    (root / folder / "config.json").write_text(json.dumps(config | activation))
    weight = {"linear.weight": torch.full((8, WIDTH), value)}
    if pickled:
        torch.save(weight, root / folder / "pytorch_model.bin")
    else:
        save_file(weight, root / folder / "model.safetensors")


def pooling(root: Path, mode: str) -> None:
    """Write a pooling that takes the first token (cls) or the mean."""
    (root / "1_Pooling").mkdir()
    modes = {f"pooling_mode_{name}": name == mode for name in ("cls_token", "mean_tokens")}
    (root / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": WIDTH, **modes}))


def prompts(root: Path, text: str) -> None:
    """Write the settings at the top."""
    (root / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"query": text}}))
    (root / "sentence_bert_config.json").write_text(
        json.dumps({"max_seq_length": 16, "do_lower_case": False})
    )


def full(root: Path, value: float, mode: str) -> Path:
    """Put a pooling, a Dense layer and prompts around a transformer."""
    describe(root, ("1_Pooling", "Pooling"), ("2_Dense", "Dense"))
    pooling(root, mode)
    dense(root, "2_Dense", value)
    prompts(root, f"{value}: ")
    return root


def full_directory(root: Path) -> Path:
    """Return a directory that holds the modules around a transformer, and not the transformer."""
    root.mkdir()
    return full(root, 1.0, "cls_token")


@pytest.fixture
def merged(cli, tmp_path):
    """Return a function (base, adapter) → the output, and the issues of the report."""

    def merge(base, adapter):
        result = cli("--base", base, "--adapter", adapter, "--out", tmp_path / "out", "--json")
        assert result.exit_code == 0, result.output
        return tmp_path / "out", json.loads(result.stdout)["issues"]

    return merge


def same(one: Path, other: Path, *names: str) -> bool:
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


AROUND = (
    "modules.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors",
    "config_sentence_transformers.json", "sentence_bert_config.json",
)  # fmt: skip


def test_the_bases_modules_come_along(place, merged):
    base = full(place(0, "base"), 0.0, "mean_tokens")
    out, _ = merged(base, place(1, "adapter"))
    assert same(out, base, *AROUND)


def test_the_adapters_modules_win(place, merged):
    base = full(place(0, "base"), 0.0, "mean_tokens")
    adapter = full(place(1, "adapter"), 1.0, "cls_token")
    out, issues = merged(base, adapter)
    assert same(out, adapter, *AROUND)
    assert "2_Dense/model.safetensors" in {i["subject"] for i in issues if i["code"] == "side-file"}


def test_a_plain_base_gets_the_adapters_modules(place, merged, cli):
    adapter = full(place(1, "adapter"), 1.0, "cls_token")
    out, issues = merged(place(0, "base"), adapter)
    assert same(out, adapter, *AROUND)
    assert "the output gets the adapter's copy" in {
        i["sentence"] for i in issues if i["subject"] == "modules.json"
    }
    assert not (out / "adapter_config.json").exists()
    assert cli("verify", out).exit_code == 0


def test_nothing_of_the_bases_is_left_in_a_folder_that_the_adapter_has(place, merged):
    # sentence-transformers prefers safetensors: the untrained layer would win over the trained one.
    base = full(place(0, "base"), 0.0, "mean_tokens")
    adapter = place(1, "adapter")
    describe(adapter, ("1_Pooling", "Pooling"), ("2_Dense", "Dense"))
    dense(adapter, "2_Dense", 1.0, pickled=True)
    out, _ = merged(base, adapter)
    assert {path.name for path in (out / "2_Dense").iterdir()} == {"config.json", "pytorch_model.bin"}
    assert same(out, base, "1_Pooling/config.json")  # the adapter names it and has none


def test_modules_that_the_adapter_does_not_list_are_left_out(place, merged):
    base = full(place(0, "base"), 0.0, "mean_tokens")
    adapter = place(1, "adapter")
    describe(adapter, ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    pooling(adapter, "cls_token")
    out, issues = merged(base, adapter)
    assert not (out / "2_Dense").exists()
    assert not [issue for issue in issues if issue["severity"] == "warning"]


@pytest.mark.parametrize("kind", ["Dense", "LayerNorm", "WeightedLayerPooling"])
def test_a_module_that_nobody_has_is_warned_of(kind, place, merged):
    adapter = place(1, "adapter")
    describe(adapter, (f"1_{kind}", kind))
    _, issues = merged(place(0, "base"), adapter)
    (warned,) = [issue for issue in issues if issue["severity"] == "warning"]
    assert warned["subject"] == f"modules.json: 1_{kind}"
    assert "neither the adapter nor the base has its folder" in warned["sentence"]


def test_the_code_of_a_module_comes_along(place, merged):
    adapter = place(1, "adapter")
    describe(adapter, ("1_Own", "Pooling"))
    listing = json.loads((adapter / "modules.json").read_text())
    listing[1]["type"] = "own_pooling.Own"
    (adapter / "modules.json").write_text(json.dumps(listing))
    (adapter / "own_pooling.py").write_text("class Own: ...\n")
    (adapter / "train.py").write_text("print('no part of the model')\n")
    (adapter / "1_Own").mkdir()
    (adapter / "1_Own" / "config.json").write_text("{}")
    out, _ = merged(place(0, "base"), adapter)
    assert (out / "own_pooling.py").is_file()
    assert not (out / "train.py").exists()


@pytest.mark.parametrize("which", ["modules.json", "router_config.json"])
def test_an_adapter_in_the_folder_of_one_module_is_warned_of(which, place, merged, tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    adapter = place(1, "whole/0_Transformer")
    describe(whole, ("1_Pooling", "Pooling"), top="0_Transformer")
    if which == "router_config.json":
        (whole / "modules.json").unlink()
        types = {"0_Transformer": f"{MODULES}Transformer", "query_0_Dense": f"{MODULES}Dense"}
        (whole / which).write_text(json.dumps({"types": types, "structure": {}}))
    _, issues = merged(place(0, "base"), adapter)
    (warned,) = [issue for issue in issues if issue["severity"] == "warning"]
    assert f"is one module of the sentence-transformers model in {whole}" in warned["sentence"]
    assert "0_Transformer/" in warned["hint"]


def test_so_is_the_directory_around_that_folder(place, merged, tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    place(1, "whole/0_Transformer")
    describe(whole, ("1_Pooling", "Pooling"), top="0_Transformer")
    pooling(whole, "cls_token")
    out, issues = merged(place(0, "base"), whole)
    (warned,) = [issue for issue in issues if issue["severity"] == "warning"]
    assert "is one module of the sentence-transformers model" in warned["sentence"]
    assert not (out / "modules.json").exists()  # it would look for the transformer in 0_Transformer/


def test_modules_around_an_adapter_with_a_name_of_its_own_come_along(place, merged, tmp_path):
    whole = full_directory(tmp_path / "whole")
    place(1, "whole/default")
    base = full(place(0, "base"), 0.0, "mean_tokens")
    out, _ = merged(base, whole)
    assert same(out, whole, *AROUND)


def test_weights_in_a_folder_that_no_list_names_are_not_lost(place, cli, tmp_path):
    adapter = place(1, "adapter")
    dense(adapter, "2_Dense", 1.0)
    options = ("--base", place(0, "base"), "--adapter", adapter, "--out", tmp_path / "out")
    result = cli(*options)
    assert result.exit_code == 4
    assert "2_Dense/model.safetensors" in result.output
    assert cli(*options, "--ignore-file", "2_Dense/model.safetensors").exit_code == 0


def test_routes_at_the_top_come_along_with_their_folders(place, merged):
    adapter = place(1, "adapter")
    types = {"query_0_Dense": f"{MODULES}Dense"}
    (adapter / "router_config.json").write_text(json.dumps({"types": types, "structure": {}}))
    describe(adapter)
    dense(adapter, "query_0_Dense", 1.0)
    out, _ = merged(place(0, "base"), adapter)
    assert same(out, adapter, "router_config.json", "query_0_Dense/model.safetensors")


@pytest.mark.parametrize("path", ["../secret", "/etc"])
def test_a_list_that_leads_out_of_the_directory_is_refused(path, place, cli, tmp_path):
    adapter = place(1, "adapter")
    describe(adapter, (path, "Dense"))
    result = cli("--base", place(0, "base"), "--adapter", adapter, "--out", tmp_path / "out")
    assert result.exit_code == 3
    assert "modules.json" in result.output
    assert "a folder inside the directory" in result.output


def test_a_modules_json_of_another_tool_is_none_of_the_models(place, merged):
    adapter = place(1, "adapter")
    (adapter / "modules.json").write_text('{"lora": ["query"]}')
    out, _ = merged(place(0, "base"), adapter)
    assert not (out / "modules.json").exists()


def test_sentence_transformers_loads_the_output_and_embeds_as_base_and_adapter(place, merged):
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    from peft import PeftModel

    base = full(place(0, "base"), 0.0, "mean_tokens")
    adapter = full(place(1, "adapter"), 0.3, "cls_token")
    out, _ = merged(base, adapter)
    texts = ["w1 w2 w3", "w9 w4"]
    got = library.SentenceTransformer(str(out), device="cpu").encode(texts, prompt_name="query")
    from transformers import AutoModel, AutoTokenizer

    tuned = PeftModel.from_pretrained(AutoModel.from_pretrained(base), adapter).eval()
    tokens = AutoTokenizer.from_pretrained(base)(
        [f"0.3: {text}" for text in texts], return_tensors="pt", padding=True
    )
    with torch.no_grad():
        first = tuned(**tokens).last_hidden_state[:, 0]
    weight = load_file(adapter / "2_Dense" / "model.safetensors")["linear.weight"]
    # a dozen products of inner dimension 48 at most, each off by √48·2⁻²⁴ of its size
    torch.testing.assert_close(torch.tensor(got), first @ weight.T, rtol=1e-5, atol=1e-5)
