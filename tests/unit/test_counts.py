"""Numbers of strangers are bounded before anything is built of them."""

from __future__ import annotations

import time

import pytest

from lora_merge.errors import CheckpointError
from lora_merge.formats.weight_files import _unindexed
from lora_merge.modeling.counts import excess_of
from lora_merge.modeling.skeleton import build_skeleton, parse_config
from lora_merge.peft_rules.patterns import TargetError
from lora_merge.planning.outline import layer_order

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "num_attention_heads": 1,
}


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"text_config": {"num_hidden_layers": 10**400}}, "text_config.num_hidden_layers"),
        ({"vision_config": {"depths": [2, 2, 10**12]}}, "vision_config.depths"),
        ({"n_layer": 5000}, "n_layer"),
        ({"encoder_layers": 5000}, "encoder_layers"),
        ({"num_local_experts": 10**6}, "num_local_experts"),
        ({"n_routed_experts": 10**6}, "n_routed_experts"),
        ({"num_labels": 10**9}, "num_labels"),
        ({"num_hidden_layers": 4000, "num_experts": 1000}, "layers × experts"),
    ],
)
def test_a_count_that_no_model_has_is_named_and_nothing_is_built(config, field):
    excess = excess_of(config)
    assert excess is not None
    assert excess.field == field
    assert parse_config({**LLAMA, **config}) is None
    assert build_skeleton({**LLAMA, **config}) is None


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 126, "vocab_size": 256_000, "max_position_embeddings": 10_485_760},
        {"num_hidden_layers": 61, "n_routed_experts": 384, "moe_layer_freq": 1, "block_size": 131_072},
        {"num_hidden_layers": 94, "num_experts": 512, "vision_feature_layer": -2, "layer_norm_eps": 1e-5},
    ],
)
def test_counts_of_the_largest_models_are_none_too_many(config):
    assert excess_of(config) is None


def test_layers_are_counted_before_they_are_repeated():
    for ranges in ([[0, 10**12]], [[0, 2], [10**400, 10**401]], [[-(10**12), 1]], [[0, 4]] * 5000, [[3, 1]]):
        with pytest.raises(TargetError) as caught:
            layer_order({"layer_replication": ranges}, 4)
        assert len(str(caught.value)) < 500
    assert layer_order({"layer_replication": [[0, 3], [3, 1], [1, 4]]}, 4) == (0, 1, 2, 1, 2, 3)


def test_shards_that_a_name_counts_are_not_looked_for_one_by_one(tmp_path):
    began = time.process_time()
    with pytest.raises(CheckpointError, match="count 99999999999 shards, expected at most 100000"):
        _unindexed(tmp_path, "adapter_model-00001-of-99999999999.safetensors")
    assert time.process_time() - began < 5
