"""Shapes of configs of PEFT's methods other than LoRA, as its own comparisons of methods keep them.

Those of language models have no ``target_modules`` and rely on PEFT's list for the family; those of image models name
every projection. Sizes are those that a tiny model can have.
"""

from __future__ import annotations

from typing import Any

from tests.parity.config_shapes import SEVEN, Shape, fields

COMMON = {
    "auto_mapping": None, "base_model_name_or_path": None, "bias": "none", "exclude_modules": None,
    "inference_mode": False, "layers_pattern": None, "layers_to_transform": None, "modules_to_save": None,
    "revision": None, "task_type": None,
}  # fmt: skip
VERSION = {"peft_version": "0.18.2.dev0@UNKNOWN"}
LAYERS = ("layers_pattern", "layers_to_transform")
FEW = (*LAYERS, "exclude_modules", "bias")
PROMPTS = (*FEW, "modules_to_save")
CAUSAL = {"task_type": "CAUSAL_LM"}
TWO = {"target_modules": ["q_proj", "v_proj"]}
ALL = {"target_modules": SEVEN}
NONE = {"target_modules": None}
SVD = {"allow_svd": True}


def method(kind: str, own: Any, lacks: tuple[str, ...] = (), **about: Any) -> Shape:
    """Return a method's shape: the fields that most methods have, without some, and its own."""
    common = {name: value for name, value in COMMON.items() if name not in lacks}
    config = {**common, "peft_type": kind, **own}
    return Shape(f"{kind} in PEFT's comparison of methods", config, **about)


def _adalora(**own: Any) -> dict[str, Any]:
    schedule = {
        "beta1": 0.85, "beta2": 0.85, "deltaT": 1, "init_r": 4, "orth_reg_weight": 0.5, "r": 8, "rank_pattern": None,
        "target_r": 8, "tfinal": 200, "tinit": 100, "total_step": 750,
    }  # fmt: skip
    return {**schedule, **own}


DROPOUT = {"module_dropout": 0.0, "rank_dropout": 0.0}
PLAIN = {"fan_in_fan_out": False, "init_weights": True}
KEY = {"projection_prng_key": 0, "save_projection": True}
CAYLEY = {"cayley_neumann_eps": None, "num_cayley_neumann_terms": 5}
PSOFT = {
    **PLAIN, **CAYLEY, "ab_svd_init": "psoft_init", "psoft_alpha": 8, "psoft_dropout": 0.0, "psoft_mag_a": True,
    "psoft_mag_b": True, "psoft_orth": True, "psoft_svd_lowrank_niter": 10, "r": 8,
}  # fmt: skip
DEFT = {**PLAIN, "deft_dropout": 0.0, "init_scale": 1.0, "r": 4}
GLORA = {"config_A_B": "lora", "config_C": "lora", "config_D_E": "constant", "init_weights": True, "r": 4}
LOHA = {**DROPOUT, "alpha": 8, "alpha_pattern": {}, "init_weights": True, "r": 4, "rank_pattern": {}}
LOKR = {**LOHA, "decompose_both": False, "rank_dropout_scale": False}
MISS = {"mini_r": 1, "miss_dropout": 0.0, "r": 4}
OFT = {**PLAIN, "block_share": False, "coft": False, "eps": 6e-05, "module_dropout": 0.0}
SUPER = {"init_weights": True, "lora_dropout": 0.0, **TWO, **CAUSAL}
VECTORS = {
    "fan_in_fan_out": False,
    "init_logits_std": 0.1,
    "init_vector_bank_bound": 0.02,
    "save_only_topk_weights": False,
    "topk": 2,
}
VIRTUAL = {
    "num_attention_heads": 4,
    "num_layers": 2,
    "num_transformer_submodules": 1,
    "num_virtual_tokens": 4,
    "token_dim": 64,
}
NOT_A_WEIGHT = {"refused": "unsupported", "says": "cannot be merged"}

METHOD_SHAPES: tuple[Shape, ...] = (
    method("ADALORA", {**fields("0.14.1"), **_adalora(inference_mode=False, peft_type="ADALORA", **NONE)}),
    method("ADALORA", {**fields("0.19"), **_adalora(peft_type="ADALORA", **ALL), "task_type": None}),
    method("ADAMSS", {**CAUSAL, **NONE, "r": 8, "num_subspaces": 2, "subspace_rank": 1, "init_weights": "orthogonal", "use_asa": False}, (*PROMPTS, "auto_mapping", "base_model_name_or_path", "inference_mode", "revision"), options=SVD),
    method("ADAPTION_PROMPT", {"adapter_layers": 2, "adapter_len": 4, **NONE, **CAUSAL}, PROMPTS, **NOT_A_WEIGHT),
    method("BEFT", {**VERSION, "init_weights": True, "target_modules": ["v_proj"]}, FEW, base="Llama, biased"),
    method("BOFT", {**PLAIN, **NONE, "boft_block_num": 0, "boft_block_size": 4, "boft_dropout": 0.0, "boft_n_butterfly_factor": 1}),
    method("BOFT", {**PLAIN, **ALL, **VERSION, "boft_block_num": 0, "boft_block_size": 4, "boft_dropout": 0.0, "boft_n_butterfly_factor": 2}),
    method("C3A", {**TWO, "block_size": 16, "block_size_pattern": {}, "fan_in_fan_out": False, "init_weights": False}),
    method("C3A", {**ALL, **VERSION, "block_size": 16, "block_size_pattern": {}, "init_weights": "xavier_uniform"}, ("exclude_modules",)),
    method("DEFT", {**DEFT, **VERSION, **NONE, **CAUSAL, "alpha": None, "decomposition_method": "qr", "para": True}),
    method("DEFT", {**DEFT, **VERSION, **NONE, **CAUSAL, "alpha": 16, "decomposition_method": "relu", "para": False}),
    method("DEFT", {**DEFT, **VERSION, **ALL, "alpha": None, "decomposition_method": "qr", "para": False}),
    method("DELORA", {**NONE, **CAUSAL, "delora_lambda": 15, "init_weights": True, "lambda_pattern": {}, "module_dropout": 0.0, "r": 4, "rank_pattern": {}}),
    method("DELORA", {**ALL, **VERSION, "delora_lambda": 15, "init_weights": True, "lambda_pattern": {}, "module_dropout": 0.0, "r": 4, "rank_pattern": {}}),
    method("FOURIERFT", {**TWO, "fan_in_fan_out": False, "init_weights": False, "n_frequency": 200, "n_frequency_pattern": {}, "random_loc_seed": 777, "scaling": 300}),
    method("FOURIERFT", {**ALL, **VERSION, "fan_in_fan_out": False, "init_weights": False, "n_frequency": 200, "n_frequency_pattern": {}, "random_loc_seed": 777, "scaling": 150.0}),
    method("FROD", {**PLAIN, **KEY, **NONE, **CAUSAL, "frod_dropout": 0.0, "regularization_alpha": 0.001, "runtime_offload_base_weight": True, "sparse_rate": 0.01}, ("exclude_modules",)),
    method("FROD", {**PLAIN, **KEY, **ALL, "frod_dropout": 0.0, "regularization_alpha": 0.001, "runtime_offload_base_weight": True, "sparse_rate": 0.02}, ("exclude_modules",)),
    method("GLORA", {**GLORA, **TWO, **CAUSAL}, (*LAYERS, "exclude_modules", "revision"), base="Llama, biased"),
    method("GLORA", {**GLORA, **ALL, "config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}, (*LAYERS, "exclude_modules", "revision"), base="Llama, biased"),
    method("GRALORA", {**PLAIN, **VERSION, **NONE, "alpha": 8, "gralora_dropout": 0.0, "gralora_k": 2, "hybrid_r": 0, "r": 4}, ("exclude_modules",)),
    method("GRALORA", {**PLAIN, **VERSION, **ALL, "alpha": 8, "gralora_dropout": 0.0, "gralora_k": 2, "hybrid_r": 0, "r": 4}, ("exclude_modules",)),
    method("HIRA", {**PLAIN, **TWO, **CAUSAL, "hira_dropout": 0.0, "r": 4, "rank_pattern": {}}, ("bias", "revision")),
    method("HRA", {**VERSION, **ALL, "apply_GS": False, "init_weights": True, "r": 4}),
    method("IA3", {"fan_in_fan_out": False, "feedforward_modules": ["down_proj", "gate_proj", "up_proj"], "init_ia3_weights": True, **ALL}, (*LAYERS, "bias")),
    method("IA3", {"fan_in_fan_out": False, "feedforward_modules": None, "init_ia3_weights": True, **NONE}, (*LAYERS, "bias")),
    method("IA3", {**VERSION, "fan_in_fan_out": False, "feedforward_modules": SEVEN, "init_ia3_weights": True, **ALL}, (*LAYERS, "bias")),
    method("LILY", {**VERSION, "init_weights": True, "num_B": 2, "r": 4, "scaling": 8.0, "stride_A": 1, "target_modules": ["gate_proj", "up_proj", "down_proj"]}, ("bias",), **NOT_A_WEIGHT),
    method("LN_TUNING", NONE, (*LAYERS, "bias")),
    method("LN_TUNING", {**VERSION, "target_modules": ["q_norm", "k_norm"]}, (*LAYERS, "bias"), base="Qwen3"),
    method("LOHA", {**LOHA, **TWO, "use_effective_conv2d": False}, ("bias",)),
    method("LOHA", {**LOHA, **ALL, **VERSION, "use_effective_conv2d": False}, ("bias",)),
    method("LOKR", {**LOKR, **TWO, "decompose_factor": 4, "use_effective_conv2d": False}, ("bias",)),
    method("LOKR", {**LOKR, **ALL, **VERSION, "decompose_factor": -1, "use_effective_conv2d": False}, ("bias",)),
    method("MISS", {**MISS, **NONE, "init_weights": "bat"}),
    method("MISS", {**MISS, **NONE, "init_weights": True}),
    method("MISS", {**MISS, **TWO, "init_weights": "mini"}),
    method("MISS", {**MISS, **ALL, **VERSION, "init_weights": True}),
    method("BONE", {"init_weights": True, "r": 4, **TWO}, refused="unsupported", says="MISS", built_with={"peft_type": "MISS", "init_weights": True, "r": 4}),
    method("OFT", {**OFT, **TWO, "alpha_pattern": {}, "oft_block_size": 0, "r": 4, "rank_pattern": {}}),
    method("OFT", {**OFT, **ALL, **VERSION, "num_cayley_neumann_terms": 5, "oft_block_size": 16, "r": 0, "use_cayley_neumann": True}),
    method("OSF", {"effective_rank": None, **ALL, "rank_pattern": {"q_proj": 60, "k_proj": 28, "v_proj": 28, "o_proj": 60, "gate_proj": 60, "up_proj": 60, "down_proj": 60}}, PROMPTS, options=SVD),
    method("OSF", {**VERSION, **ALL, "effective_rank": 8, "init_weights": None, "rank_pattern": None, "target_svd_config": None}, FEW, options=SVD),
    method("PEANUT", {**VERSION, **TWO, "act_fn": "relu", "depth": 0, "init_weights": True, "r": 1, "scaling": 32.0}, ("bias",)),
    method("PEANUT", {**VERSION, **ALL, "act_fn": "relu", "depth": 0, "init_weights": True, "r": 4, "scaling": 1.0}, ("bias",)),
    method("PREFIX_TUNING", {**VIRTUAL, **CAUSAL, "encoder_hidden_size": 64, "prefix_projection": False}, PROMPTS, **NOT_A_WEIGHT),
    method("PREFIX_TUNING", {**VIRTUAL, **CAUSAL, "encoder_hidden_size": 64, "init_weights": "zero", "prefix_projection": False}, PROMPTS, **NOT_A_WEIGHT),
    method("PROMPT_TUNING", {**VIRTUAL, **CAUSAL, "prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None, "tokenizer_kwargs": None, "tokenizer_name_or_path": None}, PROMPTS, **NOT_A_WEIGHT),
    method("P_TUNING", {**VIRTUAL, **CAUSAL, "encoder_dropout": 0.0, "encoder_hidden_size": 64, "encoder_num_layers": 2, "encoder_reparameterization_type": "MLP"}, PROMPTS, **NOT_A_WEIGHT),
    method("PSOFT", {**PSOFT, **NONE, "psoft_svd": "full", "use_cayley_neumann": False}, ("bias", "inference_mode"), options=SVD),
    method("PSOFT", {**PSOFT, **NONE, "psoft_svd": "lowrank", "use_cayley_neumann": True}, ("bias", "inference_mode"), options=SVD),
    method("PSOFT", {**PSOFT, **ALL, **VERSION, "psoft_svd": "full", "use_cayley_neumann": False}, ("bias",), options=SVD),
    method("PVERA", {**PLAIN, **KEY, **NONE, "d_initial": 0.1, "pvera_dropout": 0.0, "r": 8}, ("exclude_modules",)),
    method("PVERA", {**PLAIN, **KEY, **ALL, **VERSION, "d_initial": 0.1, "pvera_dropout": 0.0, "r": 8, "sample_at_inference": False}, ("exclude_modules",)),
    method("RANDLORA", {**PLAIN, **KEY, **NONE, "r": 4, "randlora_alpha": 640, "randlora_dropout": 0.0, "sparse": False, "very_sparse": False}, ("exclude_modules",)),
    method("RANDLORA", {**PLAIN, **KEY, **ALL, **VERSION, "r": 4, "randlora_alpha": 640, "randlora_dropout": 0.0, "sparse": False, "very_sparse": False}, ("exclude_modules",)),
    method("ROAD", {**NONE, "group_size": 16, "init_weights": True, "variant": "road_2"}, PROMPTS),
    method("ROAD", {**ALL, **VERSION, "group_size": 16, "init_weights": True, "variant": "road_1"}, FEW),
    method("SHIRA", {**PLAIN, **NONE, "mask_type": "random", "r": 4, "random_seed": 42}, FEW),
    method("SHIRA", {**PLAIN, **ALL, **VERSION, "mask_type": "random", "r": 4, "random_seed": None}, FEW),
    method("SUPERTUNING", {**SUPER, "lora_alpha": None, "r": None, "select_top": True, "sparsity": 0.974}, FEW),
    method("SUPERTUNING", {**SUPER, "lora_alpha": 64.0, "r": 4, "select_top": True, "sparsity": 0.99}, FEW),
    method("SUPERTUNING", {**SUPER, "lora_alpha": None, "r": None, "select_top": False, "sparsity": 0.9935}, FEW),
    method("TINYLORA", {**PLAIN, **NONE, "projection_seed": 42, "r": 2, "save_projection": True, "tinylora_dropout": 0.0, "u": 8, "weight_tying": 0.0}, ("exclude_modules",)),
    method("TINYLORA", {**PLAIN, **ALL, "projection_seed": 42, "r": 2, "save_projection": True, "tinylora_dropout": 0.0, "u": 8, "weight_tying": 1.0}, ("exclude_modules",)),
    method("TRAINABLE_TOKENS", {"token_indices": [3, 94], **CAUSAL}, (*PROMPTS, "auto_mapping", "inference_mode", "revision")),
    method("UNILORA", {**PLAIN, **TWO, **CAUSAL, "init_theta_d_bound": 0.02, "proj_seed": 42, "r": 4, "theta_d_length": 256, "unilora_dropout": 0.0}),
    method("VBLORA", {**VECTORS, **TWO, "num_vectors": 64, "r": 4, "vblora_dropout": 0.0, "vector_length": 16}),
    method("VBLORA", {**VECTORS, **ALL, **VERSION, "num_vectors": 32, "r": 4, "vblora_dropout": 0.0, "vector_length": 16}),
    method("VERA", {**PLAIN, **KEY, **NONE, "d_initial": 0.1, "r": 8, "vera_dropout": 0.0}, ("exclude_modules",)),
    method("VERA", {**PLAIN, **KEY, **ALL, **VERSION, "d_initial": 0.1, "r": 8, "vera_dropout": 0.0}, ("exclude_modules",)),
    method("WAVEFT", {**PLAIN, **TWO, **CAUSAL, "n_frequency": 200, "n_frequency_pattern": {}, "proportional_parameters": False, "random_loc_seed": 777, "scaling": 25.0, "use_idwt": True, "wavelet_family": "db1"}),
    method("WAVEFT", {**PLAIN, **ALL, **VERSION, "n_frequency": 100, "n_frequency_pattern": {}, "proportional_parameters": False, "random_loc_seed": 777, "scaling": 25.0, "use_idwt": True, "wavelet_family": "db1"}),
)  # fmt: skip
