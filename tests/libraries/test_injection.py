"""PEFT's layers run on one module at a time give PEFT's bits, and nothing is left to chance."""

from __future__ import annotations

import copy
import functools
import gc
import json
import re
import tempfile
import threading
import warnings
import weakref
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from lora_merge.peft_rules.injection import (
    BIAS_TYPES,
    Injection,
    InjectionError,
    Target,
    ingredients,
    sort_by_module,
    turns,
)
from lora_merge.peft_rules.injection import injection as room
from lora_merge.peft_rules.kinds import PREFIX
from tests.crossing import diagonal, only

LINEAR = ["q_proj", "v_proj", "down_proj"]
SQUARE = ["q_proj", "o_proj"]

# name → (peft_type, fields, family)
CASES = {
    "lora": ("LORA", {"r": 4, "lora_alpha": 6, "target_modules": [*LINEAR, "embed_tokens"]}, "llama"),
    "lora_plain": ("LORA", {"r": 4, "use_rslora": True}, "plain"),
    "lora_conv1d": ("LORA", {"r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, "gpt2"),
    "lora_conv2d": ("LORA", {"r": 4, "target_modules": ["projection", "q_proj"]}, "vit"),
    "lora_attention": ("LORA", {"r": 4, "target_modules": ["head.attention"]}, "siglip"),
    "lora_patterns": (
        "LORA",
        {"r": 4, "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"v_proj": 3}},
        "llama",
    ),
    "dora": ("LORA", {"r": 4, "target_modules": [*LINEAR, "embed_tokens"], "use_dora": True}, "llama"),
    "lora_bias": ("LORA", {"r": 4, "lora_bias": True}, "llama"),
    "lora_only_bias": ("LORA", {"r": 4, "bias": "lora_only"}, "llama"),
    "velora": ("LORA", {"r": 4, "velora_config": {"num_groups": 4}}, "llama"),
    "monteclora": ("LORA", {"r": 4, "monteclora_config": {}}, "llama"),
    "mica": ("LORA", {"r": 4, "init_lora_weights": "mica"}, "llama"),
    "kasa": ("LORA", {"r": 4, "kasa_config": {}}, "llama"),
    "pissa": ("LORA", {"r": 4, "init_lora_weights": "pissa"}, "llama"),
    "olora": ("LORA", {"r": 4, "init_lora_weights": "olora"}, "llama"),
    "adalora": ("ADALORA", {"init_r": 6, "target_r": 3, "total_step": 10, "lora_alpha": 32}, "llama"),
    "adalora_conv2d": (
        "ADALORA",
        {"init_r": 6, "target_r": 3, "total_step": 10, "target_modules": ["projection", "q_proj"]},
        "vit",
    ),
    "adamss": ("ADAMSS", {"r": 16, "num_subspaces": 3, "subspace_rank": 1}, "llama"),
    "adamss_plain": ("ADAMSS", {"r": 16, "num_subspaces": 3, "subspace_rank": 1}, "plain"),
    "beft": ("BEFT", {}, "llama"),
    "boft": ("BOFT", {"boft_block_size": 4, "boft_n_butterfly_factor": 2}, "llama"),
    "boft_conv2d": ("BOFT", {"boft_block_size": 4, "target_modules": ["projection"]}, "vit"),
    "c3a": ("C3A", {"block_size": 16}, "llama"),
    "deft": ("DEFT", {"r": 4}, "llama"),
    "delora": ("DELORA", {"r": 4}, "llama"),
    "fourierft": ("FOURIERFT", {"n_frequency": 50}, "llama"),
    "frod": ("FROD", {"progressbar": False}, "llama"),
    "glora": ("GLORA", {"r": 4}, "llama"),
    "gralora": ("GRALORA", {"r": 8}, "llama"),
    "hira": ("HIRA", {"r": 4}, "llama"),
    "hra": ("HRA", {"r": 4}, "llama"),
    "hra_conv2d": ("HRA", {"r": 4, "target_modules": ["projection"]}, "vit"),
    "ia3": ("IA3", {"target_modules": LINEAR, "feedforward_modules": ["down_proj"]}, "llama"),
    "ia3_conv1d": ("IA3", {"target_modules": ["c_attn", "c_fc"], "feedforward_modules": ["c_fc"]}, "gpt2"),
    "ln_tuning": ("LN_TUNING", {"target_modules": ["ln_1", "ln_f"]}, "gpt2"),
    "loha": ("LOHA", {"r": 4, "alpha": 8}, "llama"),
    "loha_conv2d": (
        "LOHA",
        {"r": 4, "target_modules": ["projection"], "use_effective_conv2d": True},
        "vit",
    ),
    "lokr": ("LOKR", {"r": 4, "alpha": 8}, "llama"),
    "lokr_both": ("LOKR", {"r": 2, "decompose_both": True, "decompose_factor": 4}, "llama"),
    "lokr_conv2d": ("LOKR", {"r": 2, "target_modules": ["projection"], "use_effective_conv2d": True}, "vit"),
    "miss": ("MISS", {"r": 16}, "llama"),
    "miss_bat": ("MISS", {"r": 16, "target_modules": SQUARE, "init_weights": "bat"}, "llama"),
    "miss_mini": ("MISS", {"r": 16, "mini_r": 4, "target_modules": SQUARE, "init_weights": "mini"}, "llama"),
    "oft": ("OFT", {"oft_block_size": 16}, "llama"),
    "oft_conv2d": ("OFT", {"oft_block_size": 4, "r": 0, "target_modules": ["projection"]}, "vit"),
    "osf": ("OSF", {"effective_rank": 8}, "llama"),
    "peanut": ("PEANUT", {"r": 4}, "llama"),
    "psoft": ("PSOFT", {"r": 8}, "llama"),
    "pvera": ("PVERA", {"r": 8}, "llama"),
    "pvera_seeded": ("PVERA", {"r": 8, "save_projection": False}, "llama"),
    "randlora": ("RANDLORA", {"r": 8}, "llama"),
    "randlora_seeded": ("RANDLORA", {"r": 8, "save_projection": False}, "llama"),
    "road": ("ROAD", {"group_size": 16}, "llama"),
    "shira": ("SHIRA", {"r": 4, "random_seed": 1}, "llama"),
    "supertuning": ("SUPERTUNING", {"sparsity": 0.9}, "llama"),
    "tinylora": ("TINYLORA", {"r": 2, "u": 8, "target_modules": [*LINEAR, "embed_tokens"]}, "llama"),
    "tinylora_seeded": (
        "TINYLORA",
        {"r": 2, "u": 8, "weight_tying": 0.5, "save_projection": False},
        "llama",
    ),
    "trainable_tokens": (
        "TRAINABLE_TOKENS",
        {"token_indices": [1, 5, 7], "target_modules": ["embed_tokens"]},
        "llama",
    ),
    "unilora": ("UNILORA", {"r": 4, "theta_d_length": 64}, "llama"),
    "unilora_saved": ("UNILORA", {"r": 4, "theta_d_length": 64, "save_indices": True}, "llama"),
    "vblora": ("VBLORA", {"r": 4, "num_vectors": 16, "vector_length": 16}, "llama"),
    "vblora_topk": (
        "VBLORA",
        {"r": 4, "num_vectors": 16, "vector_length": 16, "save_only_topk_weights": True},
        "llama",
    ),
    "vblora_conv1d": (
        "VBLORA",
        {"r": 4, "num_vectors": 16, "vector_length": 16, "target_modules": ["c_attn"]},
        "gpt2",
    ),
    "vera": ("VERA", {"r": 8}, "llama"),
    "vera_seeded": ("VERA", {"r": 8, "save_projection": False}, "llama"),
    "waveft": ("WAVEFT", {"n_frequency": 50}, "llama"),
}
SAMPLE = (
    "lora", "lora_plain", "lora_conv1d", "lora_attention", "lora_bias", "dora", "adamss", "boft_conv2d", "frod", "glora",
    "ia3", "ln_tuning", "loha", "miss_mini", "osf", "pvera_seeded", "tinylora_seeded", "trainable_tokens", "unilora", "vblora_topk",
)  # fmt: skip
"""A case for each thing that a layer may have beside factors: biases, ties, seeds, indices, shared or missing matrices."""

DTYPES = ["float32", "bfloat16"]
CONFIGURED_BIAS = {"lora_bias", "lora_only_bias"}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads cost more than they bring for matrices this small, and most when other work runs beside."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_model(family):
    """Return a model that every kind of adapter fits in, with random weights, the same each time."""
    import torch
    import transformers as t

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    image = {**sizes, "num_hidden_layers": 1, "image_size": 16, "patch_size": 4}
    if family == "gpt2":
        ends = {"bos_token_id": 1, "eos_token_id": 2}
        config = t.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=96, n_positions=32, **ends)
        model = t.GPT2LMHeadModel(config)
    elif family == "vit":
        model = t.ViTForImageClassification(t.ViTConfig(**image, num_labels=3))
    elif family == "siglip":
        model = t.SiglipVisionModel(t.SiglipVisionConfig(**image))
    else:
        text = {
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "vocab_size": 96,
            "tie_word_embeddings": False,
        }
        biases = {"attention_bias": family == "llama", "mlp_bias": family == "llama"}
        model = t.LlamaForCausalLM(t.LlamaConfig(**sizes, **text, **biases))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2)
    return model.eval()


@functools.cache
def base_model(family, dtype):
    import torch

    return tiny_model(family).to(getattr(torch, dtype))


@functools.cache
def adapted(case, dtype="float32", stored=None):
    """Return an adapter that PEFT made, and what PEFT makes of it on the whole model."""
    import torch
    from peft import PeftModel, get_peft_model
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from safetensors.torch import load_file, save_file

    kind, fields, family = CASES[case]
    if kind == "ADAMSS":
        pytest.importorskip("sklearn", reason="AdaMSS clusters with scikit-learn")
    base = base_model(family, dtype)
    with tempfile.TemporaryDirectory() as root, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = PEFT_TYPE_TO_CONFIG_MAPPING[kind](**{"target_modules": LINEAR, **fields})
        torch.manual_seed(7)
        trained = get_peft_model(copy.deepcopy(base), config)
        stir(trained)
        trained.create_or_update_model_card = lambda _root: None  # a quarter of the time of these tests
        trained.save_pretrained(root)
        file = Path(root) / "adapter_model.safetensors"
        tensors = load_file(file)
        if stored is not None:
            tensors = {name: tensor.to(getattr(torch, stored)) for name, tensor in tensors.items()}
            save_file(tensors, file)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), root)
        answers = answers_of(loaded.base_model.model, base)
        merged = dict(loaded.merge_and_unload().named_parameters())
        return SimpleNamespace(
            kind=kind,
            model_config={**base.config.to_dict(), "architectures": [type(base).__name__]},
            adapter_config=json.loads((Path(root) / "adapter_config.json").read_text()),
            tensors=tensors,
            base=base,
            answers=answers,
            merged=merged,
        )


def answers_of(model, base):
    """Return what each adapted layer of an unmerged model answers, and the base's module, by path."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    answers = {}
    for path, module in base.named_modules():
        if isinstance(model.get_submodule(path), BaseTunerLayer):
            x = input_for(module)
            layer = copy.deepcopy(model.get_submodule(path))  # PEFT's attention rounds its weights in passing
            with torch.no_grad():
                answers[path] = answer(layer, x), answer(module, x)
    return answers


def answer(layer, x):
    import torch

    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    return layer(x, x, x)[0] if isinstance(base, torch.nn.MultiheadAttention) else layer(x)


def stir(model):
    """Give every trained value of an adapter something to do: many begin as zeros."""
    import torch

    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter, dtype=torch.float32) * 0.1)


def inject(adapter, **changes):
    """Return an injection of an adapter, with a changed model_config, adapter_config or tensors."""
    parts = {**vars(adapter), **changes}
    shared = {name: value for name, value in parts["tensors"].items() if not name.startswith(PREFIX)}
    return Injection(parts["model_config"], parts["adapter_config"], shared)


def tensors_of(adapter, injection, module):
    by_module, _, _ = sort_by_module(adapter.tensors, injection.targets)
    return {name: adapter.tensors[name] for name in by_module.get(module, [])}


def weights_of(adapter, target):
    base = dict(adapter.base.named_parameters())
    return {name: base[f"{target.module}.{name}"].detach() for name in target.parameters}


def merge_all(adapter, injection, step=1):
    """Return every parameter of every target after the merge, by its name in the model."""
    merged = {}
    for target in injection.targets[::step]:
        tensors = tensors_of(adapter, injection, target.module)
        after = injection.merge(target.module, weights_of(adapter, target), tensors)
        assert tuple(after) == target.parameters
        merged |= {f"{target.module}.{name}": tensor for name, tensor in after.items()}
    return merged


@functools.cache
def merged_modules(case, dtype="float32", stored=None):
    adapter = adapted(case, dtype, stored)
    return merge_all(adapter, inject(adapter))


def changed_parameters(case, dtype="float32"):
    import torch

    base = dict(adapted(case, dtype).base.named_parameters())
    merged = merged_modules(case, dtype)
    return {name for name in merged if not torch.equal(merged[name], base[name])}


def input_for(module):
    import torch

    torch.manual_seed(5)
    dtype = next(module.parameters()).dtype
    if isinstance(module, torch.nn.Embedding):
        return torch.arange(1, 9)
    if isinstance(module, torch.nn.Conv2d):
        return torch.randn(1, module.in_channels, 8, 8, dtype=dtype)
    wide = {"Conv1D": "nx", "Linear": "in_features"}.get(type(module).__name__)
    return torch.randn(2, 3, getattr(module, wide) if wide else 64, dtype=dtype)


def first_target(case, **changes):
    adapter = adapted(case)
    injection = inject(adapter, **changes)
    target = injection.targets[0]
    return (
        injection,
        target.module,
        weights_of(adapter, target),
        tensors_of(adapter, injection, target.module),
    )


@pytest.mark.parametrize(("case", "dtype"), diagonal(only(SAMPLE, CASES), DTYPES))
def test_one_module_at_a_time_has_the_bits_of_the_whole_model(case, dtype):
    import torch

    adapter = adapted(case, dtype)
    merged = merged_modules(case, dtype)

    assert changed_parameters(case, dtype), "a test that merges nothing proves nothing"
    for name, before in adapter.base.named_parameters():
        after, expected = merged.get(name, before), adapter.merged[name]
        assert after.dtype == expected.dtype == before.dtype, name
        assert torch.equal(after, expected), name


@pytest.mark.parametrize("case", ["lora", "dora", "loha", "boft"])
def test_values_stored_in_half_precision_are_used_in_single_precision(case):
    import torch

    adapter = adapted(case, "bfloat16", "bfloat16")

    for name, after in merged_modules(case, "bfloat16", "bfloat16").items():
        assert torch.equal(after, adapter.merged[name]), name


@pytest.mark.parametrize(("case", "dtype"), diagonal(only(SAMPLE, CASES), DTYPES))
def test_the_layer_answers_as_in_the_unmerged_model(case, dtype):
    import torch

    adapter = adapted(case, dtype)
    injection = inject(adapter)

    assert {target.module for target in injection.targets} == adapter.answers.keys()
    for target in injection.targets:
        x = input_for(adapter.base.get_submodule(target.module))
        tensors = tensors_of(adapter, injection, target.module)
        got = injection.forward(target.module, weights_of(adapter, target), tensors, x)
        for ours, theirs in zip(got, adapter.answers[target.module], strict=True):
            assert torch.equal(ours, theirs), target.module
        assert not torch.equal(*got), target.module


def test_every_mergeable_type_is_tried():
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner

    tuners = {
        kind.value for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items() if issubclass(tuner, BaseTuner)
    }

    assert {kind for kind, _, _ in CASES.values()} == tuners - ingredients._UNMERGEABLE.keys()


@pytest.mark.crossed
def test_only_the_bias_types_change_a_bias():
    changed = defaultdict(set)
    for case, (kind, _, _) in CASES.items():
        if case not in CONFIGURED_BIAS and kind != "ADAMSS":
            changed[kind] |= {
                "bias" if name.endswith("bias") else "weight" for name in changed_parameters(case)
            }

    assert {kind for kind, names in changed.items() if "bias" in names} == BIAS_TYPES
    assert {kind for kind, names in changed.items() if "weight" not in names} == {"BEFT"}


@pytest.mark.parametrize("case", sorted(CONFIGURED_BIAS))
def test_a_config_may_have_any_type_change_the_bias(case):
    assert any(name.endswith(".bias") for name in changed_parameters(case))


@pytest.mark.parametrize("case", only(SAMPLE, CASES))
def test_no_tensor_may_be_missing(case):
    adapter = adapted(case)
    injection, module, base, tensors = first_target(case)
    needed = sorted(name for name in tensors if not is_spare(name))

    for name in needed:
        rest = {other: tensor for other, tensor in tensors.items() if other != name}
        with pytest.raises(InjectionError, match=f"^{re.escape(name)}: is not in the adapter"):
            injection.merge(module, base, rest)
    for name in sorted(adapter.tensors):
        if not name.startswith(PREFIX) and not is_spare(name):
            rest = {other: tensor for other, tensor in adapter.tensors.items() if other != name}
            with pytest.raises(InjectionError, match=f"^{re.escape(name)}: is not in the adapter"):
                merge_all(adapter, inject(adapter, tensors=rest))


def is_spare(name):
    """Say whether PEFT saves a tensor twice (RandLoRA), or one that is the base's own (embeddings)."""
    return ".randlora_A" in name or ".randlora_B" in name or name.endswith("embed_tokens.base_layer.weight")


@pytest.mark.parametrize("case", only(SAMPLE, [case for case in CASES if not case.startswith("adamss")]))
def test_a_rehearsal_with_zeros_finds_what_is_missing_and_nothing_else(case):
    import torch

    injection, module, base, tensors = first_target(case)
    base = {name: torch.zeros_like(tensor) for name, tensor in base.items()}
    tensors = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}

    injection.rehearse(module, base, tensors)
    needed = [name for name in tensors if not is_spare(name)]
    for name in needed[:1]:
        del tensors[name]
        with pytest.raises(InjectionError, match=f"^{re.escape(name)}: is not in the adapter"):
            injection.rehearse(module, base, tensors)


@pytest.mark.parametrize("name", ["base_model.model.{module}.other.weight", "base_model.other"])
@pytest.mark.parametrize("case", ["lora", "vera", "tinylora", "unilora", "frod"])
def test_no_tensor_may_be_left_over(case, name):
    import torch

    injection, module, base, tensors = first_target(case)
    name = name.format(module=module)
    if name.startswith(PREFIX):
        tensors = {**tensors, name: torch.zeros(1)}
    else:
        injection = inject(adapted(case), tensors={**adapted(case).tensors, name: torch.zeros(1)})

    with pytest.raises(InjectionError, match="does not use it") as caught:
        injection.merge(module, base, tensors)
    assert caught.value.subject == name


@pytest.mark.parametrize("case", ["lora", "loha", "osf"])
def test_a_tensor_of_another_shape_is_refused(case):
    import torch

    injection, module, base, tensors = first_target(case)
    name = min(tensors)
    tensors = {**tensors, name: torch.zeros(3, 5)}

    with pytest.raises(InjectionError, match=r"shape \[3, 5\], expected \[") as caught:
        injection.merge(module, base, tensors)
    assert caught.value.subject == name


def test_the_base_must_be_whole_and_of_the_models_shapes():
    import torch

    injection, module, base, tensors = first_target("beft")

    with pytest.raises(InjectionError, match=r"q_proj\.bias: is missing"):
        injection.merge(module, {"weight": base["weight"]}, tensors)
    with pytest.raises(InjectionError, match=r"q_proj\.scale: is not a parameter of Linear"):
        injection.merge(module, {**base, "scale": base["bias"]}, tensors)
    with pytest.raises(InjectionError, match=r"q_proj\.bias: shape \[7\], expected \[64\]"):
        injection.merge(module, {**base, "bias": torch.zeros(7)}, tensors)
    with pytest.raises(InjectionError, match="lm_head: is not a target"):
        injection.merge("lm_head", base, tensors)


@pytest.mark.parametrize("case", only(SAMPLE, CASES))
def test_nothing_is_left_to_chance_and_what_is_given_stays_as_it_is(case, monkeypatch):
    import torch

    injection, module, base, tensors = first_target(case)
    x = input_for(adapted(case).base.get_submodule(module))
    copies = copy.deepcopy((base, tensors, x))
    torch.manual_seed(11)
    state = torch.random.get_rng_state()

    answers = injection.merge(module, base, tensors), injection.forward(module, base, tensors, x)
    assert torch.equal(torch.random.get_rng_state(), state)
    monkeypatch.setattr(turns, "_SEED", 1)
    other = inject(adapted(case))
    others = other.merge(module, base, tensors), other.forward(module, base, tensors, x)

    assert torch.equal(torch.random.get_rng_state(), state)
    for before, after in zip(flat(answers), flat(others), strict=True):
        assert torch.equal(before, after)
    for before, after in zip(flat(copies), flat((base, tensors, x)), strict=True):
        assert torch.equal(before, after)
    inputs = {tensor.data_ptr() for tensor in base.values()}
    assert inputs.isdisjoint(tensor.data_ptr() for tensor in answers[0].values())


def flat(value):
    if isinstance(value, dict):
        value = tuple(value.values())
    return [leaf for part in value for leaf in flat(part)] if isinstance(value, tuple) else [value]


@pytest.mark.parametrize("case", only(SAMPLE, CASES))
def test_a_module_leaves_nothing_behind(case, monkeypatch):
    seen = []
    filled = room.filled

    def watched(*arguments):
        module = filled(*arguments)
        seen.extend(weakref.ref(parameter) for parameter in module.parameters())
        return module

    monkeypatch.setattr(room, "filled", watched)
    injection, module, base, tensors = first_target(case)
    gc.disable()
    try:
        injection.merge(module, base, tensors)
        injection.forward(module, base, tensors, input_for(adapted(case).base.get_submodule(module)))
        assert seen
        assert not any(parameter() is not None for parameter in seen)
    finally:
        gc.enable()
    assert all(parameter.is_meta for parameter in injection._tuner.model.parameters())


@pytest.mark.parametrize("case", ["lora", "tinylora", "unilora", "vera", "vblora"])
def test_threads_may_share_an_injection(case):
    import torch

    adapter = adapted(case)
    injection = inject(adapter)
    merged = [{}, {}]
    threads = [
        threading.Thread(target=lambda into=into, step=step: into.update(merge_all(adapter, injection, step)))
        for into, step in zip(merged, (1, -1), strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    expected = merged_modules(case)
    assert merged[0].keys() == merged[1].keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(merged[0][name], tensor), name
        assert torch.equal(merged[1][name], tensor), name


def test_an_error_leaves_the_injection_as_it_was():
    import torch

    injection, module, base, tensors = first_target("lora")
    with pytest.raises(InjectionError):
        injection.merge(module, base, {})

    after = injection.merge(module, base, tensors)
    assert torch.equal(after["weight"], merged_modules("lora")[f"{module}.weight"])


@pytest.mark.parametrize(
    "kind", ["LILY", "POLY", "SHADOW", "XLORA", "PROMPT_TUNING", "ADAPTION_PROMPT", "NEW", None]
)
def test_types_without_a_merge_are_refused_by_name(kind):
    with pytest.raises(InjectionError, match=rf"^peft_type: .*\b{kind}\b") as caught:
        inject(adapted("loha"), adapter_config={"peft_type": kind})
    assert caught.value.subject == "peft_type"


@pytest.mark.parametrize(
    ("case", "changes", "subject"),
    [
        ("frod", {"save_projection": False}, "save_projection"),
        ("lora", {"layer_replication": [[0, 1], [0, 2]]}, "layer_replication"),
        ("lora", {"target_parameters": ["q_proj.weight"], "target_modules": []}, "target_parameters"),
        ("loha", {"target_modules": ["nothing_like_it"]}, "adapter_config.json"),
        ("adalora", {"total_step": None}, "adapter_config.json"),
    ],
)
def test_configs_that_cannot_be_merged_are_refused(case, changes, subject):
    adapter = adapted(case)
    with pytest.raises(InjectionError) as caught:
        inject(adapter, adapter_config={**adapter.adapter_config, **changes})
    assert caught.value.subject == subject


@pytest.mark.parametrize(
    ("changes", "subject"),
    [
        ({"model_type": "no_such_model"}, "model_type"),
        ({"architectures": ["NoSuchModel"]}, "architectures"),
        ({"architectures": None}, "architectures"),
        ({"hidden_act": "no_such_function"}, "config.json"),
    ],
)
def test_models_that_transformers_cannot_build_are_refused(changes, subject):
    adapter = adapted("loha")
    with pytest.raises(InjectionError) as caught:
        inject(adapter, model_config={**adapter.model_config, **changes})
    assert caught.value.subject == subject


def test_what_peft_raises_becomes_one_sentence():
    adapter = adapted("loha")
    injection = inject(
        adapter, adapter_config={**adapter.adapter_config, "target_modules": ["input_layernorm"]}
    )
    module = injection.targets[0].module

    with pytest.raises(InjectionError, match="PEFT raises TypeError: Target module") as caught:
        injection.merge(module, {"weight": adapter.base.get_parameter(f"{module}.weight")}, {})
    assert caught.value.subject == module
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value.__cause__, TypeError)


def test_a_tensor_belongs_to_the_deepest_target_that_its_name_leads_to():
    targets = [Target("a", ("weight",)), Target("a.b", ("weight",)), Target("a.bc", ("weight",))]
    own = [
        "base_model.model.a.x.weight",
        "base_model.model.a.b.lora_A.weight",
        "base_model.model.a.bc.lora_A",
    ]
    names = [*own, "base_model.vera_A", "base_model.model.b.lora_A", "base_model.model.a", "a.b.lora_A"]

    by_module, shared, orphans = sort_by_module(names, targets)

    assert by_module == {"a": own[:1], "a.b": own[1:2], "a.bc": own[2:]}
    assert shared == ["base_model.vera_A"]
    assert orphans == ["base_model.model.b.lora_A", "base_model.model.a", "a.b.lora_A"]
