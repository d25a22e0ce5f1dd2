"""Every field of every file of a stranger, given every kind of wrong value: what must end in an answer or a sentence.

The models are smaller than those of other tests, since there are tens of thousands of attempts; all run in one process.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import TYPE_CHECKING, Any

import lora_merge
from lora_merge.batches.batch_file import read_batch
from lora_merge.peft_rules.kinds import KNOWN_FIELDS
from lora_merge.requests.request_file import read_request

if TYPE_CHECKING:
    from pathlib import Path

HIDDEN, INNER, VOCAB = 8, 16, 12
LAYER = "model.layers.0."
PEFT_LAYER = f"base_model.model.{LAYER}"

CONFIG: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": VOCAB,
    "max_position_embeddings": 32, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "rms_norm_eps": 1e-6,
}  # fmt: skip
LORA: Mapping[str, Any] = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "x", "peft_version": "0.18.0",
}  # fmt: skip
SWIFT: Mapping[str, Any] = {**LORA, "swift_type": "LORA", "lora_dtype": None, "lorap_lr_ratio": None}
MLX: Mapping[str, Any] = {
    "fine_tune_type": "lora", "num_layers": 1, "model": "x",
    "lora_parameters": {"rank": 2, "scale": 2.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]},
}  # fmt: skip

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]
BASE_TENSORS: Shapes = {
    "model.embed_tokens.weight": ("BF16", (VOCAB, HIDDEN)),
    **{f"{LAYER}self_attn.{name}_proj.weight": ("BF16", (HIDDEN, HIDDEN)) for name in "qkvo"},
    **{f"{LAYER}mlp.{name}_proj.weight": ("BF16", (INNER, HIDDEN)) for name in ("gate", "up")},
    f"{LAYER}mlp.down_proj.weight": ("BF16", (HIDDEN, INNER)),
    f"{LAYER}input_layernorm.weight": ("BF16", (HIDDEN,)),
    f"{LAYER}post_attention_layernorm.weight": ("BF16", (HIDDEN,)),
    "model.norm.weight": ("BF16", (HIDDEN,)),
    "lm_head.weight": ("BF16", (VOCAB, HIDDEN)),
}
LORA_TENSORS: Shapes = {
    f"{PEFT_LAYER}self_attn.q_proj.lora_A.weight": ("F32", (2, HIDDEN)),
    f"{PEFT_LAYER}self_attn.q_proj.lora_B.weight": ("F32", (HIDDEN, 2)),
    f"{PEFT_LAYER}mlp.down_proj.lora_A.weight": ("F32", (2, INNER)),
    f"{PEFT_LAYER}mlp.down_proj.lora_B.weight": ("F32", (HIDDEN, 2)),
}
MLX_TENSORS: Shapes = {
    f"{LAYER}self_attn.q_proj.lora_a": ("F32", (HIDDEN, 2)),
    f"{LAYER}self_attn.q_proj.lora_b": ("F32", (2, HIDDEN)),
}
_WIDTHS = {"F32": 4, "BF16": 2, "F16": 2, "F64": 8, "I64": 8, "U8": 1, "I8": 1, "BOOL": 1, "F8_E4M3": 1}

VALUES: Sequence[Any] = (
    None, True, False, 0, 1, 2, -1, 10**400, -(10**400), 10**30, 0.5, 1e308, -0.0, 1e-320,
    float("nan"), float("inf"), float("-inf"),
    "", "q_proj", "a\0b", "a\nb", "\x1b[31m", "\u202ex", "\ud800", "\udcff", "x" * 5000, "(", "all-linear",
    [], [0], [[]], [None], [True], [10**400], ["\ud800"], ["q_proj"], ["q_proj", 1], [[0, 1]], [[1, 0]], [0.5, 1], [{}],
    {}, {"": None}, {"": {}}, {"q_proj": 1}, {"q_proj": 0}, {"q_proj": -1}, {"q_proj": 10**400}, {"q_proj": 1e308},
    {"q_proj": "x"}, {"q_proj": [True]}, {"q_proj": None}, {"\ud800": 1}, {"a": {"b": ["\udfff"]}}, {"(": 1}, {"a": []},
)  # fmt: skip
"""Every type, and of each what has broken something once."""

FIELDS = sorted({*KNOWN_FIELDS, "feedforward_modules", "unknown", ""})
MLX_FIELDS = (
    "fine_tune_type", "num_layers", "lora_layers", "lora_parameters", "model", "use_dora", "rank", "alpha", "unknown",
    "lora_parameters.rank", "lora_parameters.scale", "lora_parameters.alpha", "lora_parameters.keys",
)  # fmt: skip
CONFIG_FIELDS = (
    "architectures", "model_type", "tie_word_embeddings", "vocab_size", "torch_dtype", "auto_map", "text_config",
    "quantization_config", "_name_or_path", "id2label", "pad_token_id", "layer_types", "unknown", "foo_config",
    "text_config.architectures", "text_config.model_type", "text_config.vocab_size", "is_encoder_decoder",
)  # fmt: skip
"""Sizes are not among them: a model of a billion layers is another matter."""
INDEX_FIELDS = (
    "weight_map",
    "metadata",
    "metadata.total_size",
    "weight_map.lm_head\\.weight",
    "weight_map.new",
)
MANIFEST_FIELDS = (
    "manifest_version", "versions", "base", "base.path", "base.hub", "base.id", "base.commit", "base.adapters", "adapters",
    "adapters.0", "adapters.0.path", "adapters.0.weight", "adapters.0.digest", "adapters.0.config", "options",
    "options.dtype", "options.ignore_file", "options.expert_layout", "options.combine", "options.density", "options.seed",
    "options.base_is", "options.max_shard_size", "side_files", "side_files.config\\.json", "tensors",
    "tensors.lm_head\\.weight", "tensors.lm_head\\.weight.shape", "tensors.lm_head\\.weight.file",
)  # fmt: skip
REQUEST_KEYS = (
    "adapter", "base", "out", "base_is", "combine", "density", "seed", "expert_layout", "ignore_file", "allow_svd", "dtype",
    "workers", "memory_limit", "link", "max_shard_size", "verify", "token", "unknown", "''", "matrix", "name", "rank",
    "energy", "convert", "for", "1", "null", "jobs",
)  # fmt: skip
YAML_VALUES = (
    "null", "true", "7", "9" * 400, "9" * 5000, ".nan", ".inf", "1e308", "''", "a", '"\\0"', '"\\ud800"', '"\\udcff"',
    '"a\\nb"', '"\\U00110000"', "x" * 5000, "[]", "[[]]", "[1]", "[null]", "[{}]", "{}", "{a: b}", "{1: 2}", "{[a]: b}",
    "{2020-01-01: 1}", "2020-01-01", "!!binary YQ==", "!!int x", "!!float x", "!!bool x", "!!timestamp x", "!!set {a}",
    "!!omap [a: 1]", "!x y", "{a: .nan}", "{a: 0}", "[a, 1]", "[[a, b]]", "'{x}'", "'['", "~nobody/x", "'~nobody/x'", "/", "..",
    "a:1e400", "'hf://'", "'a/b@'", "*a", "&a [*a]", "[" * 20_000 + "]" * 20_000, "{<<: 7}",
)  # fmt: skip

Attempt = tuple[str, Callable[[], object]]


def write_tensors(path: Path, tensors: Shapes) -> None:
    """Write a safetensors file whose values are small numbers, none of them zero."""
    table, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        n_elements = 1
        for size in shape:
            n_elements *= size
        nbytes = n_elements * _WIDTHS[dtype]
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(n % 49 + 1 for n in range(at)))


def make_base(root: Path, tensors: Shapes = BASE_TENSORS, **fields: Any) -> Path:
    """Make a base of one layer."""
    root.mkdir(parents=True, exist_ok=True)
    write_tensors(root / "model.safetensors", tensors)
    (root / "config.json").write_text(json.dumps({**CONFIG, **fields}))
    return root


def make_adapter(root: Path, tensors: Shapes = LORA_TENSORS, **fields: Any) -> Path:
    """Make a LoRA on it."""
    root.mkdir(parents=True, exist_ok=True)
    write_tensors(root / "adapter_model.safetensors", tensors)
    (root / "adapter_config.json").write_text(json.dumps({**LORA, **fields}))
    return root


def with_field(table: Mapping[str, Any], field: str, value: Any) -> Any:
    """Return a table with one field, at any depth, set to a value; ``\\.`` is a dot in a name."""
    changed = deepcopy(dict(table))
    *parents, last = (part.replace("\0", ".") for part in field.replace("\\.", "\0").split("."))
    level: Any = changed
    for part in parents:
        level = level[int(part)] if isinstance(level, list) else level.setdefault(part, {})
    level[int(last) if isinstance(level, list) else last] = value
    return changed


def fields(
    path: Path, table: Mapping[str, Any], names: Sequence[str], act: Callable[[], object]
) -> Iterator[Attempt]:
    """Yield an attempt for each field and value: the file is written, then something is done with it."""

    def attempt(name: str, value: Any) -> object:
        before = path.read_bytes() if path.exists() else None
        path.write_text(json.dumps(with_field(table, name, value)))
        try:
            return act()
        finally:
            path.unlink() if before is None else path.write_bytes(before)

    for name in names:
        for value in VALUES:
            shown = ascii(value)[:60]
            yield f"{path.name}: {name} = {shown}", partial(attempt, name, value)


def adapter_attempts(root: Path) -> Iterator[Attempt]:
    """Yield attempts with adapters' configurations: planned, inspected and converted."""
    base = make_base(root / "base")
    peft, swift, mlx = make_adapter(root / "peft"), make_adapter(root / "swift"), make_adapter(root / "mlx")
    write_tensors(mlx / "adapters.safetensors", MLX_TENSORS)
    (mlx / "adapter_model.safetensors").unlink()
    out = root / "out"
    for folder, table, names in ((peft, LORA, FIELDS), (swift, SWIFT, FIELDS), (mlx, MLX, MLX_FIELDS)):
        convert = partial(lora_merge.convert, folder, out, offline=True, overwrite=True)
        verbs: tuple[Callable[[], object], ...] = (
            partial(lora_merge.plan, adapter=folder, base=base, offline=True),
            partial(lora_merge.plan, adapter=folder, offline=True),
            partial(lora_merge.inspect, folder, base=base, offline=True),
            partial(convert, engine="vllm"),
            partial(convert, rank=1),
        )
        for verb in verbs:
            yield from fields(folder / "adapter_config.json", table, names, verb)


def base_attempts(root: Path) -> Iterator[Attempt]:
    """Yield attempts with a base's configuration and index, and with the manifest of an output."""
    base, adapter, out = make_base(root / "base"), make_adapter(root / "adapter"), root / "out"
    every = make_adapter(root / "every", target_modules="all-linear")
    lora_merge.merge(adapter=adapter, base=base, out=out, offline=True)
    manifest = json.loads((out / "merge_manifest.json").read_text())
    verbs: tuple[Callable[[], object], ...] = (
        lambda: lora_merge.plan(adapter=adapter, base=base, dtype="float16", offline=True),
        lambda: lora_merge.plan(adapter=every, base=base, offline=True),
        lambda: lora_merge.convert(
            adapter, root / "c", base=base, engine="llamacpp", offline=True, overwrite=True
        ),
        lambda: lora_merge.verify(base, level="structure", offline=True),
    )
    for verb in verbs:
        yield from fields(base / "config.json", CONFIG, CONFIG_FIELDS, verb)
    yield from fields(
        out / "merge_manifest.json", manifest, MANIFEST_FIELDS, lambda: lora_merge.verify(out, offline=True)
    )
    weight_map = dict.fromkeys(BASE_TENSORS, "model.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    for verb in (verbs[0], verbs[3]):
        yield from fields(base / "model.safetensors.index.json", index, INDEX_FIELDS, verb)


def yaml_attempts(root: Path) -> Iterator[Attempt]:
    """Yield attempts with request files and batch files."""
    path = root / "file.yaml"

    def attempt(text: str, read: Callable[[str], object]) -> object:
        path.write_text(text)
        return read(str(path))

    for key in REQUEST_KEYS:
        for value in YAML_VALUES:
            given = {"adapter": "a", "out": "b", key: value}
            lines = [f"{name}: {one}" for name, one in given.items()]
            texts: dict[str, Callable[[str], object]] = {
                "\n".join(lines): lambda file: read_request(file, {}),
                "jobs:\n - " + "\n   ".join(lines): read_batch,
                f"defaults: {{{key}: {value}}}\njobs: [{{convert: a, out: b}}]": read_batch,
                f"jobs: [{{adapter: a, out: b, matrix: {{{key}: [{value}]}}}}]": read_batch,
                f"jobs: {value}": read_batch,
            }
            for text, read in texts.items():
                yield text[:60], partial(attempt, text, read)


KINDS: Mapping[str, Callable[[Path], Iterator[Attempt]]] = {
    "adapters": adapter_attempts,
    "bases and outputs": base_attempts,
    "request files": yaml_attempts,
}
