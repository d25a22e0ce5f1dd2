"""A configuration is data: what it names is not fetched, and no code is loaded for it, whatever the libraries would do."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import pytest
import transformers
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import OfflineModeIsEnabled
from transformers.integrations import hub_kernels

from lora_merge.modeling import cut_off as wall
from lora_merge.modeling import skeleton as room
from lora_merge.modeling.cut_off import cut_off, is_cut_off
from lora_merge.modeling.plain_config import FetchError, fetched_part, plain_adapter_config, plain_config
from lora_merge.modeling.skeleton import build_skeleton, meta_model, model_class, parse_config
from lora_merge.peft_rules.injection import Injection, InjectionError

KERNEL = {
    "_attn_implementation": "evil/kernel",
    "attn_implementation": "evil/kernel",
    "_experts_implementation": "evil/kernel",
    "experts_implementation": "evil/kernel",
}
ELSEWHERE = {
    "_name_or_path": "evil/model",
    "auto_map": {"AutoModel": "evil/code--model.Model", "AutoBackbone": "evil/code--model.Model"},
    "quantization_config": {"quant_method": "fp8"},
    "trust_remote_code": True,
    "use_pretrained_backbone": True,
    "attribute_map": {"hidden_act": "_attn_implementation"},
}
TINY = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 16,
}
SOURCES = Path(transformers.__file__).parent / "models"
LOADING = re.compile(r"load_backbone\(|AutoBackbone|timm\.create_model|get_kernel\(")
"""What models do in their constructors: they load another model, or code."""


def loading_types():
    """Return the model types of transformers whose models load something, and a class of each."""
    found = {}
    for path in sorted(SOURCES.glob("*/modeling_*.py")):
        text = path.read_text()
        classes = re.findall(r"^class (\w+)\(.*PreTrainedModel.*\):", text, re.MULTILINE)
        known = [name for name in classes if hasattr(transformers, name)]
        if LOADING.search(text) and known:
            found[getattr(transformers, known[-1]).config_class.model_type] = known[-1]
    return sorted(found.items())


@pytest.fixture
def online(monkeypatch):
    """Let huggingface_hub ask: whatever it asks is refused here, and fails the test."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.invalid")
    room._built.cache_clear()
    yield
    room._built.cache_clear()


def test_there_are_models_that_load_others():
    assert {"detr", "maskformer", "upernet", "timm_backbone", "rwkv", "yoso"} <= dict(loading_types()).keys()


@pytest.mark.parametrize(("kind", "name"), loading_types())
def test_no_model_is_fetched_for_a_skeleton(kind, name, online):
    backbone = {
        "model_type": "timm_backbone",
        "backbone": "hf-hub:evil/backbone",
        "features_only": True,
        **ELSEWHERE,
    }
    for fields in (
        {"backbone": "evil/backbone", "use_timm_backbone": False, "backbone_config": None},
        {"backbone": "resnet50", "use_timm_backbone": False, "backbone_config": None},
        {"backbone_config": backbone},
        {"architecture": "hf-hub:evil/backbone"},
    ):
        build_skeleton({"model_type": kind, "architectures": [name], **KERNEL, **ELSEWHERE, **fields})


def test_the_first_wall_alone_keeps_backbones_from_being_fetched(online, monkeypatch):
    monkeypatch.setattr(wall, "is_cut_off", lambda: False)
    config = {
        "model_type": "upernet",
        "architectures": ["UperNetForSemanticSegmentation"],
        **KERNEL,
        **ELSEWHERE,
    }
    assert build_skeleton({**config, "backbone": "evil/backbone", "use_timm_backbone": False}) is None
    described = {
        "model_type": "convnext",
        "out_features": [f"stage{n}" for n in range(1, 5)],
        "depths": [1, 1, 1, 1],
        "hidden_sizes": [8, 8, 8, 8],
        **KERNEL,
        **ELSEWHERE,
    }
    assert build_skeleton({**config, "backbone": "evil/backbone", "backbone_config": described}) is not None


def test_the_second_wall_alone_keeps_backbones_from_being_fetched(online, monkeypatch):
    monkeypatch.setattr(room, "plain_config", dict)
    config = {"model_type": "detr", "architectures": ["DetrModel"], "backbone": "evil/backbone"}
    assert build_skeleton({**config, "use_timm_backbone": False, "backbone_config": None}) is None


def test_a_model_is_built_as_if_the_fields_that_are_no_data_were_not_there(online):
    plain = build_skeleton(TINY)
    assert plain is not None
    assert build_skeleton({**TINY, **KERNEL, **ELSEWHERE, "torch_dtype": "hub"}) == plain
    nested = {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "text_config": {**TINY},
    }
    poisoned = {
        **nested,
        **KERNEL,
        "text_config": {**TINY, **KERNEL, **ELSEWHERE},
        "vision_config": {**KERNEL},
    }
    assert build_skeleton(poisoned) == build_skeleton({**nested, "vision_config": {}}) is not None


@pytest.mark.parametrize(
    "name", ["pipeline", "AutoModel", "AutoConfig", "Trainer", "models", "__name__", ["LlamaModel"], 7]
)
def test_only_a_class_of_models_is_called(name):
    assert model_class({"architectures": [name]}) is None
    assert meta_model({**TINY, "architectures": [name]}) is None


def test_what_has_to_be_fetched_is_named():
    assert fetched_part(TINY) is None
    part = fetched_part({"vision_config": {"backbone": "org/backbone"}})
    assert str(part) == "vision_config.backbone: names org/backbone, which would have to be downloaded"
    with pytest.raises(FetchError):
        parse_config({"model_type": "detr", "backbone": "local-dir:/home/someone", "use_timm_backbone": True})
    assert fetched_part({"backbone": "resnet50"}) is None
    assert fetched_part({"backbone": "org/backbone", "backbone_config": {"model_type": "resnet"}}) is None


def test_files_are_no_arguments_of_a_timm_model():
    arguments = {
        "depth": 3,
        "pretrained": True,
        "pretrained_cfg_overlay": {"file": "/etc/passwd"},
        "checkpoint_path": "/x",
    }
    assert plain_config({"model_type": "timm_wrapper", "model_args": arguments})["model_args"] == {"depth": 3}


def test_peft_imports_no_module_that_an_adapter_names(online):
    config = {
        "peft_type": "LORA",
        "r": 2,
        "target_modules": ["q_proj"],
        "megatron_config": {"a": 1},
        "megatron_core": "antigravity",
    }
    assert plain_adapter_config(config).keys() == {"peft_type", "r", "target_modules", "megatron_core"}
    named = {
        "base_model_name_or_path": "evil/base",
        "revision": "main",
        "auto_mapping": {"parent_library": "antigravity"},
    }
    injection = Injection({**TINY, **KERNEL, **ELSEWHERE}, config | named, {})
    assert [target.module for target in injection.targets] == ["model.layers.0.self_attn.q_proj"]
    assert injection.config.base_model_name_or_path is None


def test_an_injection_names_what_would_have_to_be_fetched(online):
    config = {
        "model_type": "upernet",
        "architectures": ["UperNetForSemanticSegmentation"],
        "backbone": "evil/backbone",
    }
    with pytest.raises(InjectionError, match="names evil/backbone, which would have to be downloaded"):
        Injection(config, {"peft_type": "LORA", "target_modules": ["x"]}, {})


def test_a_thread_that_is_cut_off_asks_no_hub_and_its_neighbours_may(online, no_sockets):
    heard: list[bool] = []
    with cut_off(), cut_off():
        with pytest.raises(OfflineModeIsEnabled):
            HfApi().model_info("org/model")
        thread = threading.Thread(target=lambda: heard.append(bool(constants.HF_HUB_OFFLINE)))
        thread.start()
        thread.join()
    assert heard == [False]
    assert not is_cut_off()
    assert not constants.HF_HUB_OFFLINE
    with pytest.raises(Exception, match="no test speaks to a network"):
        HfApi().model_info("org/model", timeout=1)
    assert "hub.invalid" in no_sockets.read_text()  # so the tests above would have failed
    no_sockets.unlink()


def test_a_thread_that_is_cut_off_loads_no_kernel():
    with cut_off(), pytest.raises(FileNotFoundError):
        hub_kernels.get_kernel("kernels-community/rwkv", version=1)
    with pytest.raises(ImportError, match="kernels"):  # as ever: the package is not installed here
        hub_kernels.get_kernel("kernels-community/rwkv", version=1)
