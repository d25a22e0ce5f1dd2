"""The parameters of the most common decoders, from their ``config.json`` alone: no library has to be loaded for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


@dataclass(frozen=True, slots=True)
class _Family:
    """How a decoder differs from Llama."""

    model_type: str
    """Of its ``config.json``."""

    has_qkv_biases: bool = False
    """Always, whatever the configuration says."""

    options: frozenset[str] = frozenset()
    """Fields that give biases, of ``attention_bias`` and ``mlp_bias``."""

    has_head_norms: bool = False
    """Norms of the queries and keys of a head."""

    derives: str = "absent or null"
    """When transformers derives ``head_dim`` from the other sizes: ``absent or null``, ``absent``, ``never``."""


_FAMILIES: Mapping[str, _Family] = {
    "LlamaForCausalLM": _Family("llama", options=frozenset({"attention_bias", "mlp_bias"})),
    "MistralForCausalLM": _Family("mistral"),
    "Qwen2ForCausalLM": _Family("qwen2", has_qkv_biases=True, derives="absent"),
    "Qwen3ForCausalLM": _Family(
        "qwen3", options=frozenset({"attention_bias"}), has_head_norms=True, derives="never"
    ),
}
"""transformers' class → its family (transformers 5.23)."""

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "vocab_size",
)
"""Fields that have to be there: defaults are transformers' affair."""


def parameters_of(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]] | None:
    """Return parameter → shape of the model of a ``config.json``; None where this table does not know the model.

    With an output embedding, also where the configuration ties it to the input embedding.
    """
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and len(architectures) == 1 else None
    family = _FAMILIES.get(name) if isinstance(name, str) else None
    if family is None or config.get("model_type") != family.model_type:
        return None
    sizes = {field: config.get(field) for field in _SIZES}
    if not all(map(_is_size, sizes.values())):
        return None
    n_heads, hidden = config["num_attention_heads"], config["hidden_size"]
    head = config.get("head_dim")
    is_derived = family.derives == "absent or null" or (
        family.derives == "absent" and "head_dim" not in config
    )
    if head is None and is_derived and hidden % n_heads == 0:
        head = hidden // n_heads
    biases = [config.get(field, False) for field in ("attention_bias", "mlp_bias")]
    if not _is_size(head) or not all(isinstance(one, bool) for one in biases):
        return None
    return dict(_parameters(config, family, head))


def linear_layers(config: Mapping[str, Any]) -> frozenset[str] | None:
    """Return the modules that are linear layers, without the output embedding; None where this table does not know the
    model.
    """
    known = parameters_of(config)
    if known is None:
        return None
    return frozenset(name.removesuffix(".weight") for name in known if name.endswith("_proj.weight"))


def modules_of(config: Mapping[str, Any]) -> dict[str, tuple[str, tuple[str, ...]]] | None:
    """Return each module of the model of a ``config.json``, in the order of ``named_modules``: path → its class, as
    `lora_merge.modeling.skeleton.Skeleton` has it, and its own parameters. None where this table does not know the model.
    """
    known = parameters_of(config)
    # The class of another activation would have to be looked up.
    if known is None or config.get("hidden_act") != "silu":
        return None
    names: dict[str, list[str]] = {}
    for name in known:
        module, _, own = name.rpartition(".")
        names.setdefault(module, []).append(own)
    prefix = str(config["architectures"][0]).removesuffix("ForCausalLM")
    found: dict[str, tuple[str, tuple[str, ...]]] = {}

    def put(path: str, kind: str) -> None:
        if kind not in {"Linear", "Embedding", "ModuleList", "SiLUActivation"}:
            kind = f"{prefix}{kind}"
        found[path] = kind, tuple(names.get(path, ()))

    put("", "ForCausalLM")
    put("model", "Model")
    put("model.embed_tokens", "Embedding")
    put("model.layers", "ModuleList")
    for layer in range(config["num_hidden_layers"]):
        for path, kind in _MODULES.items():
            if kind != "RMSNorm" or f"model.layers.{layer}{path}" in names:
                put(f"model.layers.{layer}{path}", kind)
    put("model.norm", "RMSNorm")
    put("model.rotary_emb", "RotaryEmbedding")
    put("lm_head", "Linear")
    return found


_MODULES = {
    "": "DecoderLayer",
    ".self_attn": "Attention",
    **{f".self_attn.{name}_proj": "Linear" for name in "qkvo"},
    ".self_attn.q_norm": "RMSNorm",
    ".self_attn.k_norm": "RMSNorm",
    ".mlp": "MLP",
    **{f".mlp.{name}_proj": "Linear" for name in ("gate", "up", "down")},
    ".mlp.act_fn": "SiLUActivation",
    ".input_layernorm": "RMSNorm",
    ".post_attention_layernorm": "RMSNorm",
}
"""Path in a layer → class, without the family's name (transformers 5.23)."""


def is_whole(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Return True when stored tensors are the parameters of the model, each once and none beside them.

    False says nothing: the model may be unknown here, or have other names.

    Args:
        config: of the model.
        shapes: name → shape of each stored weight.
    """
    wanted = parameters_of(config)
    if wanted is None:
        return False
    if config.get("tie_word_embeddings") is True and _HEAD not in shapes:
        del wanted[_HEAD]
    return dict(shapes) == wanted


_HEAD = "lm_head.weight"


def _is_size(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _parameters(
    config: Mapping[str, Any], family: _Family, head: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield each parameter with its shape.

    Args:
        config: with all fields that are needed.
        family: of the model.
        head: size of an attention head.
    """
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(config["num_hidden_layers"]):
        for name, shape in _layer(config, family, head).items():
            yield f"model.layers.{layer}.{name}", shape
    yield "model.norm.weight", (hidden,)
    yield _HEAD, (vocabulary, hidden)


def _layer(config: Mapping[str, Any], family: _Family, head: int) -> dict[str, tuple[int, ...]]:
    """Return the parameters of one layer, by their paths in it."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    attention = {"q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden)}
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    has = {
        field: field in family.options and config.get(field, False)
        for field in ("attention_bias", "mlp_bias")
    }
    linear = [
        ("self_attn", name, shape, family.has_qkv_biases or has["attention_bias"])
        for name, shape in attention.items()
    ]
    linear.append(("self_attn", "o_proj", (hidden, queries), has["attention_bias"]))
    linear += [("mlp", name, shape, has["mlp_bias"]) for name, shape in mlp.items()]
    found: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    if family.has_head_norms:
        found |= {"self_attn.q_norm.weight": (head,), "self_attn.k_norm.weight": (head,)}
    for part, name, shape, has_bias in linear:
        found[f"{part}.{name}.weight"] = shape
        if has_bias:
            found[f"{part}.{name}.bias"] = shape[:1]
    return found
