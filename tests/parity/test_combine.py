"""``--combine``: the real command against each adapter's true change, combined by PEFT's own functions.

A true change is what PEFT's merge of that adapter alone, into the base in float32, does to a weight. So rank, scale
and kind may differ from adapter to adapter. What chance drops is not compared but described: every value has to be
one of those that chance allows, and on average the right one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import product

import pytest
import torch

from tests.crossing import diagonal
from tests.parity import building
from tests.parity.kinds import KINDS, Kind
from tests.parity.test_several import CONV1D, DORA, OTHER_CONV1D, OTHER_DORA, PATTERNS, PLAIN, RANK_STABLE
from tests.tampering import edit_tensors

METHODS = ("ties", "dare_linear", "dare_ties", "svd")
RANDOM = ("dare_linear", "dare_ties")
DENSITY = 0.4

FLOAT32 = 2.0**-24
ROUNDOFF = {"float32": FLOAT32, "bfloat16": 2.0**-8, "float16": 2.0**-11}
"""Unit roundoff of each dtype that is stored."""

N_ROUNDINGS = 100
"""Operations behind one value of a change: a norm over at most 80 values, a product of rank at most 8, and a dozen
others. Each is off by at most 2⁻²⁴ of the largest value."""


def kind(name: str) -> Kind:
    """Return one of the kinds that the parity suite knows."""
    return next(kind for kind in KINDS if kind.name == name)


LOHA, EMBEDDING, BIASED = kind("LoHa"), kind("LoRA on an embedding"), kind("LoRA with a bias (lora_bias)")
EXPERTS, ADALORA = kind("LoRA on stacked experts beside linear layers"), kind("AdaLoRA")
TOKENS = kind("trainable_token_indices")


@dataclass(frozen=True, slots=True)
class Mix:
    """Adapters with their weights, on one base."""

    model: str
    parts: tuple[tuple[Kind, float], ...]


LOW_RANK = {
    "one": Mix("llama", ((PLAIN, 1),)),
    "one_with_a_weight": Mix("llama", ((RANK_STABLE, -0.5),)),
    "two": Mix("llama", ((PLAIN, 1), (RANK_STABLE, 1))),
    "two_with_weights": Mix("llama", ((PLAIN, 0.5), (RANK_STABLE, 1.75))),
    "three": Mix("llama", ((PLAIN, 0.25), (RANK_STABLE, 1), (PATTERNS, -0.75))),
    "adalora_and_lora": Mix("llama", ((ADALORA, 0.5), (PLAIN, 1))),
    "conv1d": Mix("gpt2", ((CONV1D, 0.5), (OTHER_CONV1D, -1))),
    "embedding": Mix("llama", ((EMBEDDING, 0.5), (EMBEDDING, 0.25))),
    "biases": Mix("llama_biased", ((BIASED, 0.5), (BIASED, 1))),
}
"""Changes of a low rank, which an SVD can keep."""

FULL_RANK = {
    "dora": Mix("llama", ((DORA, 1),)),
    "two_doras": Mix("llama", ((DORA, 0.5), (OTHER_DORA, 1))),
    "three_kinds": Mix("llama", ((PLAIN, 0.5), (RANK_STABLE, 1), (DORA, -0.75))),
}
OTHERS = {
    "loha_and_lora": Mix("llama", ((LOHA, 0.5), (PLAIN, 1))),
    "loha_twice": Mix("llama", ((LOHA, 0.5), (LOHA, -0.25))),
    "tokens_and_embedding": Mix("llama", ((TOKENS, 1), (EMBEDDING, 0.5))),
    "experts": Mix("qwen3_moe", ((EXPERTS, 0.5), (EXPERTS, 0.75))),
}
MIXES = LOW_RANK | FULL_RANK | OTHERS
DTYPES = ("float32", "bfloat16")


def every(mixes):
    """Return the parametrization over some mixes, by their names."""
    return pytest.mark.parametrize("mix", mixes.values(), ids=mixes.keys())


@pytest.fixture(autouse=True)
def one_thread():
    """Compute on one thread: the products are tiny."""
    with building.one_thread():
        yield


def cases_of(mix, workshop, dtype):
    """Return a base and an adapter for each part of a mix."""
    return [building.case(workshop, kind, mix.model, dtype) for kind, _ in mix.parts]


@pytest.fixture
def combine(workshop, cli, tmp_path):
    """Return a function (mix, dtype, options) → the directory that the command wrote; all of it was verified."""

    def run(mix, dtype, *options, name="merged"):
        cases = cases_of(mix, workshop, dtype)
        adapters = [
            option
            for case, (_, weight) in zip(cases, mix.parts, strict=True)
            for option in ("--adapter", f"{case.adapter}:{weight:g}")
        ]
        out = tmp_path / name
        result = cli("--base", cases[0].base, *adapters, "--out", out, "--verify", "full", *options)
        assert result.exit_code == 0, result.output
        return out

    return run


def tensors_in(directory):
    """Return every tensor of a checkpoint, widened to float64."""
    from safetensors.torch import load_file

    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    return {name: tensor.double() for name, tensor in found.items()}


@dataclass(frozen=True, slots=True)
class Changes:
    """What the adapters of a mix do to one weight, each alone."""

    weight: torch.Tensor
    """Before, float64; a convolution or a stack of experts as it is."""

    changes: tuple[torch.Tensor, ...]
    """One for each adapter that changes it, float32."""

    weights: tuple[float, ...]
    adapters: tuple[int, ...]
    """Which parts of the mix they are."""

    @property
    def off(self):
        """Return by how much float32 may get one change wrong."""
        largest = max(float(change.abs().max()) for change in self.changes)
        return N_ROUNDINGS * FLOAT32 * (float(self.weight.abs().max()) + largest)

    def combined_off(self, density=1.0):
        """Return by how much it may get their weighted sum wrong."""
        return (sum(map(abs, self.weights)) / density + 1) * self.off


def true_changes(mix, workshop, dtype):
    """Return the changes of every weight that an adapter of a mix changes."""
    from peft import PeftModel

    cases = cases_of(mix, workshop, dtype)
    before = building.load(cases[0].base, mix.model).float().state_dict()
    found = {}
    for n, (case, (_, weight)) in enumerate(zip(cases, mix.parts, strict=True)):
        model = building.load(case.base, mix.model).float()
        after = PeftModel.from_pretrained(model, case.adapter).merge_and_unload().state_dict()
        for name, tensor in before.items():
            change = after[name] - tensor
            if change.any():
                changes, weights, adapters = found.get(name, ((), (), ()))
                found[name] = ((*changes, change), (*weights, weight), (*adapters, n))
    return {name: Changes(before[name].double(), *parts) for name, parts in found.items()}


def assert_near(got, wanted, off, dtype):
    """A stored value is off by the rounding of its dtype, and by what float32 may have been off by before."""
    bound = ROUNDOFF[dtype] * wanted.abs() + (1 + ROUNDOFF[dtype]) * off
    assert bool(((got - wanted).abs() <= bound).all())


def assert_others_untouched(before, after, changed):
    """Nothing else is changed, and everything that should be is."""
    assert before.keys() == after.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(changed)


# ties


def elected(changes, weights):
    """Return what PEFT makes of changes that are already trimmed, or dropped and scaled up."""
    from peft.utils import merge_utils

    stacked = torch.stack(list(changes))
    mask = merge_utils.calculate_majority_sign_mask(stacked, "total")
    weighted = stacked * torch.tensor(weights, dtype=stacked.dtype).view(-1, *[1] * changes[0].dim())
    return merge_utils.disjoint_merge(weighted, mask)


def undecided(found, density):
    """Return where float32 cannot tell which values are the largest, or which sign has more of them."""
    close = torch.zeros(found.weight.shape, dtype=torch.bool)
    total = torch.zeros_like(found.weight)
    for change in found.changes:
        sizes = change.abs().double()
        least = sizes.flatten().topk(int(density * sizes.numel())).values[-1]
        close |= (sizes != 0) & ((sizes - least).abs() <= 2 * found.off)
        total += torch.where(sizes >= least, change.double(), 0.0)
    return close | ((total != 0) & (total.abs() <= 2 * len(found.changes) * found.off))


@pytest.mark.parametrize(("mix", "dtype"), diagonal(MIXES, DTYPES))
def test_ties_of_the_true_changes_are_what_peft_makes_of_them(dtype, mix, workshop, combine):
    from peft.utils import merge_utils

    cases = cases_of(mix, workshop, dtype)
    changes = true_changes(mix, workshop, dtype)
    out = combine(mix, dtype, "--combine", "ties", "--density", DENSITY)
    before, after = tensors_in(cases[0].base), tensors_in(out)
    assert_others_untouched(before, after, changes)
    for name, found in changes.items():
        if found.weight.dim() == 1:  # nothing is combined that is no matrix
            wanted, clear = weighted_sum(found), torch.ones_like(found.weight, dtype=torch.bool)
        else:
            wanted = merge_utils.ties(list(found.changes), torch.tensor(found.weights), DENSITY).double()
            clear = ~undecided(found, DENSITY)
        assert clear.double().mean() > 0.97
        assert_near(after[name][clear], (before[name] + wanted)[clear], found.combined_off(), dtype)


@every({name: MIXES[name] for name in ("one", "three", "three_kinds")})
def test_ties_differs_from_the_sum_and_its_density_counts(mix, combine, stored):
    outs = [
        stored(combine(mix, "float32", *options, name=f"out{n}"))
        for n, options in enumerate(
            ((), ("--combine", "ties", "--density", 0.4), ("--combine", "ties", "--density", 0.8))
        )
    ]
    assert outs[0] != outs[1] != outs[2] != outs[0]


def test_ties_of_one_adapter_with_a_density_of_one_is_its_merge(combine, stored):
    mix = MIXES["one"]
    tied = combine(mix, "bfloat16", "--combine", "ties", "--density", 1, name="ties")
    assert stored(tied) == stored(combine(mix, "bfloat16", name="plain"))


# dare


def weighted_sum(found):
    """Return Σ wᵢ·Δᵢ."""
    pairs = zip(found.weights, found.changes, strict=True)
    return sum(weight * change.double() for weight, change in pairs)


def possible(found, method, density):
    """Return ``(probability, change)`` for every choice of adapters that chance may keep, value by value."""
    for kept in product((0.0, 1.0), repeat=len(found.changes)):
        scaled = [keep * change.double() / density for keep, change in zip(kept, found.changes, strict=True)]
        chance = density ** sum(kept) * (1 - density) ** (len(kept) - sum(kept))
        if method == "dare_linear":
            pairs = zip(found.weights, scaled, strict=True)
            yield chance, sum(weight * change for weight, change in pairs)
        else:
            yield chance, elected(scaled, found.weights)


@pytest.mark.parametrize(("mix", "dtype", "method"), diagonal(MIXES, DTYPES, RANDOM))
def test_dare_keeps_and_drops_whole_values_and_scales_up_what_it_keeps(method, dtype, mix, workshop, combine):
    cases = cases_of(mix, workshop, dtype)
    changes = true_changes(mix, workshop, dtype)
    out = combine(mix, dtype, "--combine", method, "--density", DENSITY)
    before, after = tensors_in(cases[0].base), tensors_in(out)
    assert_others_untouched(before, after, changes)
    for name, found in changes.items():
        off = found.combined_off(DENSITY)
        if found.weight.dim() == 1:
            assert_near(after[name], before[name] + weighted_sum(found), off, dtype)
            continue
        fits = torch.zeros(found.weight.shape, dtype=torch.bool)
        for _, change in possible(found, method, DENSITY):
            wanted = before[name] + change
            bound = ROUNDOFF[dtype] * wanted.abs() + (1 + ROUNDOFF[dtype]) * off
            fits |= (after[name] - wanted).abs() <= bound
        assert bool(fits.all()), name


@pytest.mark.parametrize(
    ("mix", "density", "method"),
    diagonal(
        {name: MIXES[name] for name in ("one", "two_with_weights", "three", "three_kinds", "conv1d")},
        [0.2, 0.7],
        RANDOM,
    ),
)
def test_dare_is_right_on_average(method, density, mix, workshop, combine):
    # Seen along an adapter's own changes, Σ Δ·(got - mean) has the mean 0; six standard deviations are passed once in
    # a thousand million, whatever the seed.
    out = combine(mix, "float32", "--combine", method, "--density", density, "--seed", 5)
    before, after = tensors_in(cases_of(mix, workshop, "float32")[0].base), tensors_in(out)
    measured, variances, off, expected = ([0.0] * len(mix.parts) for _ in range(4))
    for name, found in true_changes(mix, workshop, "float32").items():
        outcomes = list(possible(found, method, density))
        mean = sum(chance * change for chance, change in outcomes)
        variance = sum(chance * (change - mean) ** 2 for chance, change in outcomes)
        if method == "dare_linear":
            torch.testing.assert_close(mean, weighted_sum(found))
        for n, change in zip(found.adapters, found.changes, strict=True):
            along = change.double()
            measured[n] += float((along * (after[name] - before[name] - mean)).sum())
            variances[n] += float((along**2 * variance).sum())
            off[n] += found.combined_off(density) * float(along.abs().sum())
            expected[n] += float((along * mean).sum())
    for n in range(len(mix.parts)):
        limit = 6 * variances[n] ** 0.5 + off[n]
        assert abs(measured[n]) <= limit
        assert limit < 0.7 * abs(expected[n])  # so that nothing at all would not pass


@pytest.mark.parametrize("method", RANDOM)
def test_the_seed_decides_what_is_dropped(method, combine, stored):
    def run(name, *options):
        return stored(combine(MIXES["three_kinds"], "bfloat16", "--combine", method, *options, name=name))

    first = run("first", "--seed", 3)
    assert run("again", "--seed", 3) == first
    other = run("other", "--seed", 4)
    assert other != first
    assert other.keys() == first.keys()
    assert run("default") == run("zero", "--seed", 0) != first


@pytest.mark.parametrize("method", RANDOM)
def test_two_layers_do_not_drop_the_same_values(method, workshop, combine):
    mix = MIXES["one"]
    before = tensors_in(cases_of(mix, workshop, "float32")[0].base)
    after = tensors_in(combine(mix, "float32", "--combine", method, "--density", 0.5))
    one, other = (
        before[name] == after[name]
        for name in (f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1))
    )
    # of 4096 pairs of coins a half is equal; six standard deviations are 0.047
    assert abs(float((one == other).double().mean()) - 0.5) < 6 * 0.5 / one.numel() ** 0.5


# svd


def stack_of(tensor):
    """Return a weight as matrices: experts one by one, an embedding or a linear layer alone."""
    return tensor if tensor.dim() == 3 else tensor.reshape(1, len(tensor), -1)


def ranks_of(mix, workshop, dtype):
    """Return the largest rank that an adapter has at each weight."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    ranks: dict[str, int] = {}
    for case in cases_of(mix, workshop, dtype):
        model = PeftModel.from_pretrained(building.load(case.base, mix.model), case.adapter)
        for path, module in model.base_model.model.named_modules():
            if isinstance(module, LoraLayer):
                parameter = getattr(module, "parameter_name", "weight")
                name = f"{path.replace('.base_layer', '')}.{parameter}"
                ranks[name] = max(ranks.get(name, 0), module.r["default"])
    return ranks


@pytest.mark.parametrize(
    ("mix", "dtype"), diagonal(LOW_RANK | FULL_RANK | {"experts": MIXES["experts"]}, DTYPES)
)
def test_svd_keeps_the_largest_rank_of_the_adapters_and_the_best_of_their_sum(dtype, mix, workshop, combine):
    # Eckart and Young: of all matrices of rank r, the truncated SVD is nearest to the sum, at √(Σ s²) of the singular
    # values left out; with rank and distance it is told. Both are blurred by the rounding of the stored weight:
    # an error of at most e in each of m·n values moves a singular value by no more than e·√(m·n).
    changes, ranks = true_changes(mix, workshop, dtype), ranks_of(mix, workshop, dtype)
    out = combine(mix, dtype, "--combine", "svd")
    before, after = tensors_in(cases_of(mix, workshop, dtype)[0].base), tensors_in(out)
    assert_others_untouched(before, after, changes)
    for name, found in changes.items():
        if found.weight.dim() == 1:
            assert_near(after[name], before[name] + weighted_sum(found), found.combined_off(), dtype)
            continue
        matrices = zip(*map(stack_of, (weighted_sum(found), after[name] - before[name])), strict=True)
        rounding = ROUNDOFF[dtype] * float(after[name].abs().max()) + found.combined_off()
        for wanted, got in matrices:
            blur = rounding * wanted.numel() ** 0.5
            left_out = torch.linalg.svdvals(wanted)[ranks[name] :]
            assert bool((torch.linalg.svdvals(got)[ranks[name] :] <= blur).all())
            assert float((wanted - got).norm()) <= float(left_out.norm()) + blur
            assert blur < 0.4 * float(wanted.norm())


@every({name: MIXES[name] for name in ("one", "one_with_a_weight")})
def test_svd_of_one_low_rank_adapter_is_its_merge(mix, workshop, combine):
    plain = tensors_in(combine(mix, "float32", name="plain"))
    got = tensors_in(combine(mix, "float32", "--combine", "svd", name="svd"))
    for name, found in true_changes(mix, workshop, "float32").items():
        # LAPACK is backward stable: off by a modest multiple of √n·2⁻²⁴ of the norm
        off = found.combined_off() + 4 * 96**0.5 * FLOAT32 * float(weighted_sum(found).norm())
        assert_near(got[name], plain[name], off, "float32")


def test_svd_of_adapters_without_a_rank_is_refused(workshop, cli, tmp_path):
    case = building.case(workshop, LOHA, "llama", "float32")
    result = cli(
        "--base", case.base, "--adapter", case.adapter, "--combine", "svd", "--out", tmp_path / "out"
    )
    assert result.exit_code == 4, result.output
    assert "rank" in result.output
    assert not (tmp_path / "out").exists()


# all of them


def content(directory):
    """Return the bytes of every file."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("method", METHODS)
def test_the_number_of_workers_changes_no_byte(method, combine):
    options = ("--combine", method, "--density", DENSITY)
    one, two = (
        combine(MIXES["three"], "bfloat16", *options, "--workers", workers, name=f"{workers}/merged")
        for workers in (1, 2)
    )
    assert content(one) == content(two)


@every({name: MIXES[name] for name in ("one_with_a_weight", "three", "three_kinds", "loha_and_lora")})
def test_linear_is_what_is_done_without_being_asked(mix, combine):
    said, unsaid = (
        combine(mix, "bfloat16", *options, name=f"{len(options)}/merged")
        for options in (("--combine", "linear"), ())
    )
    assert content(said) == content(unsaid)


@pytest.mark.parametrize("method", ["linear", *METHODS])
def test_the_manifest_says_how_the_adapters_were_combined(method, combine):
    out = combine(MIXES["two"], "bfloat16", "--combine", method, "--density", 0.3, "--seed", 9)
    options = json.loads((out / "merge_manifest.json").read_text())["options"]
    said = {key: options[key] for key in ("combine", "density", "seed") if key in options}
    assert said == ({} if method == "linear" else {"combine": method, "density": 0.3, "seed": 9})


@pytest.mark.parametrize("method", METHODS)
def test_another_dtype_of_the_output_rounds_the_combined_weight_once(method, workshop, combine):
    # the same change is added to the same weight: float16 is the float32 output, rounded
    mix, options = MIXES["three_kinds"], ("--combine", method, "--seed", 2)
    exact = tensors_in(combine(mix, "bfloat16", *options, "--dtype", "float32", name="float32"))
    rounded = tensors_in(combine(mix, "bfloat16", *options, "--dtype", "float16", name="float16"))
    assert all(torch.equal(rounded[name], exact[name].half().double()) for name in exact)


TIED_TOKENS = Kind(
    "trained tokens of a tied model", "whole parameters", "LORA", "LoraConfig",
    {"r": 4, "trainable_token_indices": [1, 17, 80], "target_modules": ["q_proj"]}, ("llama_tied",),
)  # fmt: skip


@pytest.mark.parametrize("method", ["ties", *RANDOM])
def test_two_ends_of_a_tie_that_are_both_stored_drop_the_same_values(
    method, workshop, cli, tampered, tmp_path
):
    case = building.case(workshop, TIED_TOKENS, "llama_tied", "float32")
    base = tampered(case.base)
    edit_tensors(
        base / "model.safetensors",
        lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}),
    )
    out = tmp_path / "out"
    result = cli("--base", base, "--adapter", case.adapter, "--combine", method, "--out", out)
    assert result.exit_code == 0, result.output
    after = tensors_in(out)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"]
    assert not torch.equal(after["model.embed_tokens.weight"], tensors_in(base)["model.embed_tokens.weight"])
    assert torch.equal(after["model.embed_tokens.weight"], after["lm_head.weight"])
