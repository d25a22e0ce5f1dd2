"""What becomes of a delta in a coarse dtype: the manifest's and the report's numbers against an exact computation.

A bfloat16 weight has gaps of 1/128 of its size. Of a delta that is much smaller than the gap, most values change
nothing at all. The command looks at a sample of each merged tensor, and says how much was lost.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

import pytest
import torch

from lora_merge.core.view import View
from lora_merge.merging.worker import SAMPLE_ELEMENTS
from tests.tampering import edit_tensors

W_STD, DELTA_STD = 0.02, 1e-4
SHARE = 0.32
"""What `lora_merge.merging.survival` says of these two in bfloat16."""

RANK = 8
SHAPES = {
    "model.layers.0.self_attn.q_proj.weight": (512, 512),
    "model.layers.0.self_attn.v_proj.weight": (256, 512),
    "model.layers.0.mlp.up_proj.weight": (3072, 512),
    "model.layers.0.mlp.down_proj.weight": (512, 3072),
}
"""What the adapters change: one tile, less than one, and three tiles of many and of few rows."""

FLOAT32 = 2.0**-24

# A sum of n squares in float32 is off by at most n·2⁻²⁴ of it, its root by half of that; n is SAMPLE_ELEMENTS.
NORM_TOLERANCE = SAMPLE_ELEMENTS * FLOAT32

# The manifest has so many decimals.
RELATIVE_DECIMALS, SHARE_DECIMALS = 0.5e-9, 0.5e-6


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A Llama of one layer in bfloat16, with weights of a usual size."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=512, intermediate_size=3072, num_hidden_layers=1, num_attention_heads=8,
            num_key_value_heads=4, vocab_size=64, tie_word_embeddings=False,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, W_STD)
    root = tmp_path_factory.mktemp("survival") / "base"
    model.bfloat16().save_pretrained(root)
    return root


@pytest.fixture(scope="session")
def adapter(base, tmp_path_factory):
    """Return a function (standard deviation of the delta, LoraConfig fields) → directory of an adapter."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    def build(delta_std=DELTA_STD, seed=2, **fields):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        modules = [name.rpartition(".")[0].rpartition(".")[2] for name in SHAPES]
        config = LoraConfig(**{"r": RANK, "lora_alpha": RANK, "target_modules": modules, **fields})
        peft_model = get_peft_model(model, config)
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in peft_model.named_parameters():
                if "lora_A" in name:
                    parameter.normal_(0, 1)
                elif "lora_B" in name:
                    parameter.normal_(0, delta_std / RANK**0.5)
                elif "modules_to_save" in name:
                    parameter.add_(W_STD)
        peft_model.peft_config["default"].base_model_name_or_path = str(base)
        root = tmp_path_factory.mktemp("adapter")
        peft_model.save_pretrained(root)
        return root

    return build


@pytest.fixture
def run(base, cli, tmp_path):
    """Return a function (adapter, options) → the directory that the command wrote, and its JSON report."""

    def merge(adapter, *options):
        out = tmp_path / "merged"
        result = cli("--base", base, "--adapter", adapter, "--out", out, "--overwrite", "--json", *options)
        assert result.exit_code == 0, result.output
        return out, json.loads(result.stdout)

    return merge


def tensors_in(directory):
    """Return every tensor of a checkpoint, widened to float32."""
    from safetensors.torch import load_file

    return {
        name: tensor.float()
        for file in directory.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def merged_in_float32(base, *adapters):
    """Return what PEFT makes of the base in float32, one adapter after the other."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for adapter in adapters:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return model.state_dict()


@dataclass(frozen=True, slots=True)
class Fate:
    """What became of a delta, in float64 and for every value."""

    weight: torch.Tensor
    wanted: torch.Tensor
    kept: torch.Tensor

    def of(self, rows):
        """Return the fate of some rows."""
        return Fate(self.weight[rows], self.wanted[rows], self.kept[rows])

    @property
    def relative(self):
        return float(self.wanted.norm() / self.weight.norm())

    @property
    def lost(self):
        return float((self.kept - self.wanted).norm() / self.wanted.norm())

    @property
    def unchanged(self):
        """Return, row by row, the share of the values that stay as they are though a delta was meant for them."""
        touched = self.wanted != 0
        return ((self.kept == 0) & touched).sum(dim=1) / touched.sum(dim=1)


def fates_of(base, out, wanted):
    """Return the fate of every delta."""
    before, after = tensors_in(base), tensors_in(out)
    return {
        name: Fate(
            before[name].double(),
            (wanted[name] - before[name]).double(),
            (after[name] - before[name]).double(),
        )
        for name in SHAPES
    }


def sampled_rows(shape):
    """Return the rows that the command looks at: the first of the tile in the middle."""
    tiles = View.of(shape).tiles()
    start, end = tiles[len(tiles) // 2]
    return slice(start, start + max(1, min(end - start, SAMPLE_ELEMENTS // shape[1])))


def manifest_of(out):
    """Return what the manifest says of each tensor."""
    return json.loads((out / "merge_manifest.json").read_text())["tensors"]


def test_the_shapes_are_sampled_in_the_middle_of_one_tile_and_of_several():
    assert {name.split(".")[-2]: sampled_rows(shape) for name, shape in SHAPES.items()} == {
        "q_proj": slice(0, 32),
        "v_proj": slice(0, 32),
        "up_proj": slice(1024, 1056),
        "down_proj": slice(170, 175),
    }


EACH_DTYPE = pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
EACH_KIND = pytest.mark.parametrize(
    "fields", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["LoRA", "rsLoRA", "DoRA"]
)


@EACH_KIND
@EACH_DTYPE
def test_the_manifest_says_of_the_sample_what_is_exactly_true_of_it(dtype, fields, base, adapter, run):
    made = adapter(**fields)
    out, _ = run(made, "--dtype", dtype)
    said = manifest_of(out)
    for name, whole in fates_of(base, out, merged_in_float32(base, made)).items():
        fate, delta = whole.of(sampled_rows(SHAPES[name])), said[name]["delta"]
        # a delta may itself be off by a rounding of the float32 sum: 2⁻²³ of the weight
        blur = 2 * FLOAT32 * fate.relative**-1
        assert delta["relative_norm"] == pytest.approx(
            fate.relative, rel=NORM_TOLERANCE + blur, abs=RELATIVE_DECIMALS
        )
        assert delta["lost_share"] == pytest.approx(fate.lost, rel=NORM_TOLERANCE, abs=SHARE_DECIMALS + blur)
        unsure = (fate.wanted.abs() <= 2 * FLOAT32 * fate.weight.abs()).double().mean()
        assert delta["unchanged_share"] == pytest.approx(
            float(fate.unchanged.mean()), abs=float(unsure) + SHARE_DECIMALS
        )


@EACH_DTYPE
def test_the_sample_speaks_for_the_whole_tensor(dtype, base, adapter, run):
    # Rows are independent: the mean over m of them is off by six of its standard deviations, σ/√m, once in a thousand
    # million.
    made = adapter()
    out, _ = run(made, "--dtype", dtype)
    said = manifest_of(out)
    for name, fate in fates_of(base, out, merged_in_float32(base, made)).items():
        rows = sampled_rows(SHAPES[name])
        n_rows = rows.stop - rows.start

        def limit(values, n_rows=n_rows):
            return 6 * float(values.std()) / n_rows**0.5

        delta, unchanged = said[name]["delta"], fate.unchanged
        assert delta["unchanged_share"] == pytest.approx(
            float(unchanged.mean()), abs=limit(unchanged) + SHARE_DECIMALS
        )
        squares = [part.square().mean(dim=1) for part in (fate.wanted, fate.weight, fate.kept - fate.wanted)]
        wanted, weight, error = (float(part.mean()) for part in squares)
        slack = [limit(part) / float(part.mean()) if part.any() else 0.0 for part in squares]
        for said_square, square, off in (
            (delta["relative_norm"] ** 2, wanted / weight, slack[0] + slack[1]),
            (delta["lost_share"] ** 2, error / wanted, slack[0] + slack[2]),
        ):
            assert said_square == pytest.approx(square, rel=2 * off + NORM_TOLERANCE, abs=1e-6)


def expected_share(base, adapter):
    """Return the share of values that bfloat16 must swallow: those of less than half the gap around the weight.

    A row of the delta is normal, with the length of its row of B as the standard deviation.
    """
    from safetensors.torch import load_file

    factors = load_file(adapter / "adapter_model.safetensors")
    before, shares = tensors_in(base), {}
    for name in SHAPES:
        b = factors[f"base_model.model.{name.removesuffix('.weight')}.lora_B.weight"].double()
        _, exponent = torch.frexp(before[name])  # |W| is in [2ᵉ⁻¹, 2ᵉ), where 128 numbers lie
        gap = torch.ldexp(torch.ones(()), exponent - 8).double()
        shares[name] = torch.erf(gap / 2 / (2**0.5 * b.norm(dim=1, keepdim=True)))
    return shares


def test_a_third_of_a_delta_of_one_ten_thousandth_drowns_in_bfloat16(base, adapter, run):
    made = adapter()
    out, report = run(made)
    said, fates = manifest_of(out), fates_of(base, out, merged_in_float32(base, made))
    for name, chances in expected_share(base, made).items():
        share, rows = said[name]["delta"]["unchanged_share"], sampled_rows(SHAPES[name])
        # The values of a column share their column of A, and columns are independent: six standard deviations again.
        by_column = (fates[name].of(rows).kept == 0).double().mean(dim=0)
        limit = 6 * float(by_column.std()) / len(by_column) ** 0.5
        assert share == pytest.approx(float(chances[rows].mean()), abs=limit + SHARE_DECIMALS)
        assert share == pytest.approx(SHARE, abs=0.05)
        assert said[name]["delta"]["relative_norm"] == pytest.approx(DELTA_STD / W_STD, rel=0.2)
    (warning,) = [issue for issue in report["issues"] if issue["code"] == "delta-drowns"]
    assert warning["severity"] == "warning"
    worst = max(SHAPES, key=lambda name: report["survival"][name]["unchanged"])
    assert warning["subject"] == worst
    assert warning["sentence"].startswith(f"{report['survival'][worst]['unchanged']:.0%} of the delta's")
    assert "4 of 4 merged tensors lose more than 25%" in warning["sentence"]


def test_the_warning_is_seen_by_people_and_strict_heeds_it(base, adapter, cli, tmp_path):
    made = adapter()
    result = cli("--base", base, "--adapter", made, "--out", tmp_path / "out")
    assert result.exit_code == 0
    assert "warning: model.layers.0" in result.stderr
    assert "change nothing" in result.stderr
    assert "--dtype float32 or float16" in result.stderr
    strict = cli("--base", base, "--adapter", made, "--out", tmp_path / "strict", "--strict")
    assert strict.exit_code == 4
    assert "change nothing" in strict.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("delta_std", "options"),
    [
        pytest.param(DELTA_STD, ("--dtype", "float32"), id="float32"),
        pytest.param(DELTA_STD, ("--dtype", "float16"), id="float16"),
        pytest.param(20 * DELTA_STD, (), id="a_larger_delta"),
    ],
)
def test_a_delta_that_the_dtype_can_hold_is_not_warned_of(delta_std, options, adapter, run):
    out, report = run(adapter(delta_std), *options, "--strict")
    assert [issue for issue in report["issues"] if issue["code"] == "delta-drowns"] == []
    shares = [manifest_of(out)[name]["delta"]["unchanged_share"] for name in SHAPES]
    assert max(shares) < 0.1
    if "float32" in options:
        # float32 has 2¹⁶ times finer gaps than bfloat16
        assert max(shares) < 0.001
        assert max(manifest_of(out)[name]["delta"]["lost_share"] for name in SHAPES) == 0


def test_the_report_says_what_the_manifest_says(adapter, run):
    out, report = run(adapter())
    said = {name: row["delta"] for name, row in manifest_of(out).items() if "delta" in row}
    assert said.keys() == report["survival"].keys() == SHAPES.keys()
    for name, row in report["survival"].items():
        assert said[name] == {
            "relative_norm": round(row["delta_norm"] / row["weight_norm"], 9),
            "unchanged_share": round(row["unchanged"], 6),
            "lost_share": round(row["error_norm"] / row["delta_norm"], 6),
        }


def test_only_what_is_merged_has_a_delta(adapter, run):
    out, _ = run(adapter(modules_to_save=["lm_head"]), "--max-shard-size", "3MB")
    rows = manifest_of(out)
    assert rows["lm_head.weight"]["action"] == "replaced"
    assert rows["model.norm.weight"]["action"] == "copied"
    assert {name for name, row in rows.items() if row["action"] == "merged"} == set(SHAPES)
    assert {name for name, row in rows.items() if "delta" in row} == set(SHAPES)


def test_of_several_adapters_it_is_the_change_that_they_make_together(base, adapter, run):
    one, other = adapter(), adapter(seed=3)
    out, _ = run(one, "--adapter", other)
    said = manifest_of(out)
    for name, whole in fates_of(base, out, merged_in_float32(base, one, other)).items():
        fate = whole.of(sampled_rows(SHAPES[name]))
        # two sums of float32, each off by 2⁻²⁴ of the weight, with PEFT and with us
        blur = 4 * FLOAT32 / fate.relative
        assert said[name]["delta"]["relative_norm"] == pytest.approx(
            fate.relative, rel=NORM_TOLERANCE + blur, abs=RELATIVE_DECIMALS
        )
        assert said[name]["delta"]["lost_share"] == pytest.approx(
            fate.lost, rel=NORM_TOLERANCE, abs=SHARE_DECIMALS + blur
        )


def test_a_module_without_a_delta_loses_nothing(adapter, run, base):
    trained = adapter()
    nothing = [name for name in SHAPES if "q_proj" in name or "down_proj" in name]

    def untrain(tensors):
        for name in nothing:
            tensors[f"base_model.model.{name.removesuffix('.weight')}.lora_B.weight"].zero_()

    edit_tensors(trained / "adapter_model.safetensors", untrain)
    out, report = run(trained)
    assert all(torch.equal(tensors_in(base)[name], tensors_in(out)[name]) for name in nothing)
    zero = {"relative_norm": 0.0, "unchanged_share": 0.0, "lost_share": 0.0}
    assert [manifest_of(out)[name]["delta"] for name in nothing] == [zero] * len(nothing)
    assert "no-effect" not in {issue["code"] for issue in report["issues"]}


def test_deltas_that_are_all_too_small_for_the_stored_dtype_are_no_merge(adapter, base, cli, tmp_path):
    out = tmp_path / "out"
    result = cli("--base", base, "--adapter", adapter(1e-12), "--out", out)
    assert result.exit_code == 4, result.output
    assert "every change is too small for the stored dtype" in result.output
    assert "--dtype float32" in result.output
    assert not out.exists()


def test_a_delta_of_which_nothing_arrives_is_lost_as_a_whole(adapter, run):
    out, report = run(adapter(1e-9), "--allow-loss")
    for name in SHAPES:
        delta = manifest_of(out)[name]["delta"]
        assert delta["unchanged_share"] > 0.99
        assert delta["lost_share"] == pytest.approx(1, abs=0.2)
    assert "delta-drowns" in {issue["code"] for issue in report["issues"]}


def test_losing_more_than_half_of_the_change_is_refused_with_the_cure(base, adapter, cli, tmp_path):
    made, out = adapter(1e-5), tmp_path / "out"
    result = cli("--base", base, "--adapter", made, "--out", out)
    assert result.exit_code == 4
    kept = int(
        re.search(
            r"rounding to the nearest \(BF16\) keeps about (\d+)% of the adapter's change", result.stderr
        )[1]
    )
    assert 5 < kept < 50
    assert "--rounding adapter to keep the adapter's effect" in result.stderr
    assert not out.exists()

    allowed = cli("--base", base, "--adapter", made, "--out", out, "--allow-loss", "--json")
    assert allowed.exit_code == 0
    survival = json.loads(allowed.stdout)["survival"]
    squares = [one["delta_norm"] ** 2 for one in survival.values()]
    whole = sum(one["kept"] * square for one, square in zip(survival.values(), squares, strict=True)) / sum(
        squares
    )
    assert kept == pytest.approx(100 * whole, abs=0.6)

    cured = cli(
        "--base", base, "--adapter", made, "--out", tmp_path / "cured", "--rounding", "adapter", "--json"
    )
    assert cured.exit_code == 0
    for one in json.loads(cured.stdout)["survival"].values():
        assert one["kept"] > 0.95
        assert one["effect_error"] < 0.05 * one["effect_norm"]
