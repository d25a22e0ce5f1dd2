"""A full fine-tune taken apart: what comes back, what is lost, and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

from lora_merge.cli import exits
from tests.conftest import write_tokenizer
from tests.parity import building
from tests.tampering import edit_json, edit_tensors

TOKENS = torch.tensor([[1, 17, 5, 80, 33, 9, 62, 2], [1, 94, 3, 3, 41, 28, 70, 11]])


@pytest.fixture(scope="module")
def base(pico):
    return pico("llama", "float32")


@pytest.fixture
def tuned(tmp_path):
    """Return a function: base, what changes a tensor by its name → directory of a model that was trained."""

    def make(base, change, name="tuned"):
        root = tmp_path / name
        shutil.copytree(base, root)

        def train(tensors):
            generator = torch.Generator().manual_seed(11)
            for key in sorted(tensors):
                changed = change(key, tensors[key], generator)
                if changed is not None:
                    tensors[key] = changed.to(tensors[key].dtype)

        edit_tensors(root / "model.safetensors", train)
        return root

    return make


def low_rank(rank, ends=("q_proj.weight", "down_proj.weight"), size=0.1):
    """Return a training that adds a matrix of a rank to some weights."""

    def change(name, tensor, generator):
        if not name.endswith(ends):
            return None
        b, a = (
            torch.randn(*shape, generator=generator)
            for shape in ((len(tensor), rank), (rank, tensor.shape[1]))
        )
        return tensor + size * b @ a

    return change


def everything(name, tensor, generator):
    """Change every parameter, by a matrix of full rank."""
    return tensor + 0.05 * torch.randn(tensor.shape, generator=generator)


def logits(root, adapter=None, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(root, dtype=dtype)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def extract(cli, base, tuned, out, *options):
    result = cli("extract", "--base", base, "--tuned", tuned, "--out", out, "--json", *options)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_training_of_a_low_rank_comes_back_whole(base, tuned, cli, tmp_path):
    trained = tuned(base, low_rank(3))

    report = extract(cli, base, trained, tmp_path / "out", "--rank", 3)

    assert len(report["modules"]) == 4
    assert report["loss"]["relative"] < 1e-6  # float32 differences of float32 weights, 2⁻²⁴ of each
    wanted = logits(trained)
    assert (logits(base, tmp_path / "out") - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_merging_what_was_extracted_gives_the_tuned_model_back(base, tuned, cli, tmp_path):
    trained = tuned(base, low_rank(4))
    extract(cli, base, trained, tmp_path / "lora", "--energy", 0.999999)

    assert cli("--base", base, "--adapter", tmp_path / "lora", "--out", tmp_path / "again").exit_code == 0

    again, wanted = (load_file(root / "model.safetensors") for root in (tmp_path / "again", trained))
    for name, tensor in wanted.items():
        assert (again[name] - tensor).norm() <= 1e-3 * tensor.norm(), name


def test_the_reported_loss_is_that_of_the_weights(base, tuned, cli, tmp_path):
    trained = tuned(base, low_rank(12))

    report = extract(cli, base, trained, tmp_path / "out", "--rank", 5)

    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    before, after = (load_file(root / "model.safetensors") for root in (base, trained))
    for module in report["modules"]:
        stem = f"base_model.model.{module['path']}"
        change = (after[f"{module['path']}.weight"] - before[f"{module['path']}.weight"]).double()
        kept = (tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]).double()
        sigma = torch.linalg.svdvals(change)
        assert module["loss"]["norm"] == pytest.approx(float(change.norm()), rel=1e-6)
        assert module["loss"]["residual"] == pytest.approx(float((change - kept).norm()), rel=1e-4)
        assert module["loss"]["residual"] == pytest.approx(
            float(sigma[5:].norm()), rel=1e-4
        )  # no rank 5 is nearer


def test_differences_of_bfloat16_weights_are_taken_in_float32(pico, tuned, cli, tmp_path):
    base = pico("llama", "bfloat16")
    trained = tuned(base, low_rank(2))
    before, after = (load_file(root / "model.safetensors") for root in (base, trained))

    report = extract(cli, base, trained, tmp_path / "out", "--rank", 64)

    for module in report["modules"]:
        name = f"{module['path']}.weight"
        assert module["loss"]["norm"] == pytest.approx(
            float((after[name].double() - before[name].double()).norm()), rel=1e-6
        )
        assert module["dtype"] == "F32"
        assert module["loss"]["relative"] < 1e-6


@pytest.mark.parametrize(
    "model", ["llama", "llama_tied", "llama_biased", "gpt2", "qwen3_moe", "granitemoe", "gpt_oss", "resnet"]
)
def test_everything_that_changed_is_carried_when_asked(model, tuned, cli, tmp_path_factory, tmp_path):
    """Of a full rank nothing is lost: the adapter on the base computes what the tuned model computes."""
    base = building.base(tmp_path_factory.getbasetemp() / "extracted", model, "float32")
    trained = tuned(base, everything)

    report = extract(cli, base, trained, tmp_path / "out", "--rank", 512, "--save-modules")

    assert report["loss"]["relative"] < 1e-5
    assert report["n_whole"] > 0
    assert [issue["code"] for issue in report["issues"]] == []
    result = cli("--base", base, "--adapter", tmp_path / "out", "--out", tmp_path / "again", "--allow-untie")
    assert result.exit_code == 0, result.output
    again, wanted = (load_file(root / "model.safetensors") for root in (tmp_path / "again", trained))
    for name, tensor in wanted.items():
        if tensor.is_floating_point():
            assert (again[name] - tensor).norm() <= 1e-5 * tensor.norm(), name


def test_what_no_lora_holds_is_lost_with_a_warning(base, tuned, cli, tmp_path):
    trained = tuned(base, everything)

    report = extract(cli, base, trained, tmp_path / "out", "--rank", 8)

    (issue,) = report["issues"]
    assert issue["code"] == "left-out"
    assert "--save-modules" in issue["hint"]
    assert (
        cli(
            "extract",
            "--base",
            base,
            "--tuned",
            trained,
            "--rank",
            8,
            "--strict",
            "--out",
            tmp_path / "strict",
        ).exit_code
        == exits.PLAN
    )
    assert not (tmp_path / "strict").exists()


def test_targets_choose_the_modules(base, tuned, cli, tmp_path):
    trained = tuned(base, low_rank(2))

    report = extract(
        cli,
        base,
        trained,
        tmp_path / "out",
        "--rank",
        2,
        "--target",
        "q_proj",
        "--target",
        "layers.1.mlp.down_proj",
    )

    assert sorted(module["path"] for module in report["modules"]) == [
        "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.q_proj",
    ]  # fmt: skip


def test_the_energy_decides_the_rank_of_every_module(base, tuned, cli, tmp_path):
    ranks = iter((1, 2, 3, 4))
    trained = tuned(
        base,
        lambda name, tensor, generator: (
            low_rank(next(ranks))(name, tensor, generator)
            if name.endswith(("q_proj.weight", "down_proj.weight"))
            else None
        ),
    )

    report = extract(cli, base, trained, tmp_path / "out", "--energy", 0.99999)

    assert sorted(module["rank"] for module in report["modules"]) == [1, 2, 3, 4]
    found = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    assert sorted(module.r["default"] for module in found.modules() if hasattr(module, "lora_A")) == [
        1,
        2,
        3,
        4,
    ]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensors: tensors.update({"model.embed_tokens.weight": torch.zeros(96, 32)}), "has the shape (96, 32), expected (96, 64) as in the base"),
        (lambda tensors: tensors.update({"model.layers.7.extra.weight": torch.zeros(4, 4)}), "model.layers.7.extra.weight: is in"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.zeros(64, dtype=torch.int8)}), "is stored as I8"),
    ],
    ids=["of another size", "another model", "no floats"],
)  # fmt: skip
def test_what_is_no_training_of_the_base_is_refused(change, says, base, cli, tmp_path):
    shutil.copytree(base, tmp_path / "tuned")
    edit_tensors(tmp_path / "tuned" / "model.safetensors", change)

    result = cli(
        "extract", "--base", base, "--tuned", tmp_path / "tuned", "--rank", 4, "--out", tmp_path / "out"
    )

    assert result.exit_code == exits.PLAN
    assert says in result.stderr
    assert not (tmp_path / "out").exists()


def resized(base, out, rows, change):
    """Write a base with another vocabulary after a training."""
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(3)
    model.resize_token_embeddings(rows, mean_resizing=False)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            changed = change(name, parameter, generator)
            if changed is not None:
                parameter.copy_(changed)
    model.save_pretrained(out)
    write_tokenizer(out)
    return model.eval()


def computed(model, tokens):
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits


NAMED = {"gpt2": "c_attn.weight", "gpt_neox": "query_key_value.weight"}


def model_of(family, pico, tmp_path):
    """Return a base of a family, gpt_neox with the names on disk that transformers 5 renames."""
    if family != "gpt_neox":
        return pico(family, "float32")
    config = GPTNeoXConfig(
        hidden_size=64, intermediate_size=80, num_hidden_layers=1, num_attention_heads=4, vocab_size=96
    )
    torch.manual_seed(0)
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "base")
    assert "embed_out.weight" in load_file(tmp_path / "base" / "model.safetensors")
    return tmp_path / "base"


@pytest.mark.parametrize("rows", [96, 100, 90])
@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2", "gpt_neox"])
def test_peft_computes_with_what_is_carried_whole_what_the_tuned_model_computes(
    family, rows, pico, cli, tmp_path
):
    """Both ends of a tie are in the file: PEFT has a weight for each. Added tokens come with their rows."""
    base = model_of(family, pico, tmp_path)
    ends = (
        NAMED.get(family, "q_proj.weight"),
        "embed_tokens.weight",
        "wte.weight",
        "embed_in.weight",
        "lm_head.weight",
    )
    trained = resized(base, tmp_path / "tuned", rows, low_rank(4, ends))
    tokens = TOKENS.clamp(max=rows - 1)
    if rows > 96:
        tokens[:, 3:5] = torch.tensor([96, 99])
    wanted = computed(trained, tokens)
    report = extract(cli, base, tmp_path / "tuned", tmp_path / "out", "--rank", 4, "--save-modules")
    assert [issue["code"] for issue in report["issues"]] == ([] if rows == 96 else ["resized"])
    assert (tmp_path / "out" / "tokenizer.json").exists() is (rows != 96)
    again = AutoModelForCausalLM.from_pretrained(base)
    again.resize_token_embeddings(rows, mean_resizing=False)
    got = computed(PeftModel.from_pretrained(again, tmp_path / "out"), tokens)
    assert (got - wanted).abs().max() <= 2e-5 * wanted.abs().max()

    result = cli("--base", base, "--adapter", tmp_path / "out", "--out", tmp_path / "merged")
    assert result.exit_code == 0, result.output
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (computed(merged, tokens) - wanted).abs().max() <= 2e-5 * wanted.abs().max()
    stored = load_file(tmp_path / "merged" / "model.safetensors").keys()
    assert stored == load_file(base / "model.safetensors").keys()  # what was tied still is


def test_a_head_that_was_trained_apart_from_its_tied_embedding_is_a_lora(pico, cli, tmp_path):
    base = pico("llama_tied", "float32")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.config.tie_word_embeddings = False
    head = low_rank(2, ("lm_head.weight",))(
        "lm_head.weight", model.lm_head.weight, torch.Generator().manual_seed(1)
    )
    model.lm_head.weight = torch.nn.Parameter(head.detach())
    model.save_pretrained(tmp_path / "tuned")
    report = extract(cli, base, tmp_path / "tuned", tmp_path / "out", "--rank", 2)
    assert [module["path"] for module in report["modules"]] == ["lm_head"]
    wanted = computed(model, TOKENS)
    assert (logits(base, tmp_path / "out") - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_added_tokens_are_left_out_with_a_warning_that_says_so(base, cli, tmp_path):
    resized(base, tmp_path / "tuned", 100, low_rank(2))
    report = extract(cli, base, tmp_path / "tuned", tmp_path / "out", "--rank", 2, "--target", "q_proj")
    assert {module["path"].rpartition(".")[2] for module in report["modules"]} == {"q_proj"}
    said = {issue["subject"]: issue["sentence"] for issue in report["issues"] if issue["code"] == "left-out"}
    assert said.keys() >= {"model.embed_tokens.weight", "lm_head.weight"}
    assert "has 100 rows in the tuned model, but 96 in the base; it is left out" in said["lm_head.weight"]


def test_a_target_that_was_resized_is_refused(base, cli, tmp_path):
    resized(base, tmp_path / "tuned", 100, low_rank(2))
    options = ("--rank", 2, "--target", "lm_head", "--target", "q_proj", "--out", tmp_path / "out")
    result = cli("extract", "--base", base, "--tuned", tmp_path / "tuned", *options)
    assert result.exit_code == exits.PLAN
    assert (
        "lm_head.weight: has 100 rows, expected 96 as in the base: LoRA cannot resize a weight"
        in result.stderr
    )


def test_nothing_changed_is_no_adapter(base, cli, tmp_path):
    result = cli("extract", "--base", base, "--tuned", base, "--rank", 4, "--out", tmp_path / "out")

    assert result.exit_code == exits.PLAN
    assert "no module that LoRA can change differs from the base" in result.stderr
    assert "\nhint: check --base and --tuned" in result.stderr


def test_how_much_to_keep_has_to_be_said(base, cli, tmp_path):
    result = cli("extract", "--base", base, "--tuned", base, "--out", tmp_path / "out")

    assert result.exit_code == exits.USAGE
    assert "--rank 32, or --energy 0.9" in result.stderr


def test_a_quantised_model_is_refused(base, cli, tmp_path):
    shutil.copytree(base, tmp_path / "tuned")
    edit_json(tmp_path / "tuned" / "config.json", quantization_config={"quant_method": "hqq"})

    result = cli(
        "extract", "--base", base, "--tuned", tmp_path / "tuned", "--rank", 4, "--out", tmp_path / "out"
    )

    assert result.exit_code == exits.PLAN
    assert "stored quantised with HQQ" in result.stderr
