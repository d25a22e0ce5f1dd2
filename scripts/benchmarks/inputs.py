"""Synthetic Llamas and adapters, built once and kept in a cache."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from benchmarks.cases import ITEM_BYTES, KINDS, TARGETS, Case

MAX_SHARD_BYTES = 5 * 10**9
CHUNK_BYTES = 64 * 2**20
VERSION = 2
"""Of what is built; a cache of another version is built again."""

Given = ParamSpec("Given")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Shape:
    """A synthetic Llama in numbers."""

    hidden: int
    intermediate: int
    n_heads: int
    n_kv_heads: int
    n_layers: int
    vocab: int = 32_000

    def module_shapes(self) -> dict[str, tuple[int, int]]:
        """Return [out, in] of each linear module of a layer, by its path in the layer."""
        kv = self.hidden // self.n_heads * self.n_kv_heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    def tensor_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield every tensor of the checkpoint with its shape."""
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        for layer in range(self.n_layers):
            prefix = f"model.layers.{layer}"
            for module, shape in self.module_shapes().items():
                yield f"{prefix}.{module}.weight", shape
            yield f"{prefix}.input_layernorm.weight", (self.hidden,)
            yield f"{prefix}.post_attention_layernorm.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocab, self.hidden)

    def n_values(self) -> int:
        """Return how many values all tensors have."""
        return sum(n_elements(dims) for _, dims in self.tensor_shapes())

    def merged_share(self, modules: tuple[str, ...]) -> float:
        """Return which share of all values an adapter of these modules changes, from 0 to 1."""
        shapes = self.module_shapes()
        touched = sum(n_elements(shapes[path]) for path in shapes if path.rpartition(".")[2] in modules)
        return touched * self.n_layers / self.n_values()


def shape_for(size_gb: float, dtype: str) -> Shape:
    """Return a Llama of about this size, with the proportions of real ones near it."""
    n_parameters = size_gb * 1e9 / ITEM_BYTES[dtype]
    hidden, intermediate, n_heads, vocab = 4096, 14_336, 32, 32_000
    if n_parameters < 2e7:
        hidden, intermediate, n_heads, vocab = 128, 352, 8, 1024
    elif n_parameters < 2e8:
        hidden, intermediate, n_heads, vocab = 512, 1408, 8, 8192
    elif n_parameters < 2e9:
        hidden, intermediate, n_heads = 2048, 5632, 32
    elif n_parameters < 5e9:
        hidden, intermediate, n_heads = 3072, 8192, 24
    one = Shape(hidden, intermediate, n_heads, n_kv_heads=8, n_layers=1, vocab=vocab)
    per_layer = sum(n_out * n_in for n_out, n_in in one.module_shapes().values())
    n_layers = max(1, round((n_parameters - 2 * vocab * hidden) / per_layer))
    return Shape(hidden, intermediate, n_heads, n_kv_heads=8, n_layers=n_layers, vocab=vocab)


@dataclass(frozen=True, slots=True)
class Place:
    """A directory of the cache: what is in it, and how it is built."""

    directory: Path
    parameters: dict[str, Any]
    builder: Callable[..., None]
    arguments: tuple[Any, ...]
    """Of the builder, after the directory."""

    @property
    def marker(self) -> Path:
        """Return the file beside it that says what was built."""
        return self.directory.with_name(f"{self.directory.name}.json")

    @property
    def ready(self) -> bool:
        """Whether what is wanted is there already."""
        wanted = json.dumps(self.parameters, sort_keys=True)
        return self.directory.is_dir() and self.marker.is_file() and self.marker.read_text() == wanted

    def build(self) -> None:
        """Build it anew."""
        print(f"building {self.directory.name} …", flush=True)
        self.remove()
        self.directory.mkdir(parents=True)
        self.builder(self.directory, *self.arguments)
        self.marker.write_text(json.dumps(self.parameters, sort_keys=True))

    def remove(self) -> None:
        """Remove it."""
        self.marker.unlink(missing_ok=True)
        shutil.rmtree(self.directory, ignore_errors=True)


def ensure(places: Iterable[Place]) -> list[Place]:
    """Build what is not there, in a process of its own, and return what was built."""
    missing = [place for place in places if not place.ready]
    if missing:
        apart(build_all, missing)
    return missing


def build_all(places: list[Place]) -> None:
    """Build some places one after the other."""
    for place in places:
        place.build()


def base_place(cache: Path, case: Case) -> Place:
    """Return where the base of a case is."""
    shape = shape_for(case.size_gb, case.dtype)
    return Place(
        cache / f"base-{case.size_gb:g}GB-{case.dtype}",
        {"shape": asdict(shape), "dtype": case.dtype, "version": VERSION},
        build_base,
        (shape, case.dtype),
    )


def adapter_place(cache: Path, case: Case, kind: str) -> Place:
    """Return where the adapter of a case and of a kind is."""
    base = base_place(cache, case)
    shape, modules = shape_for(case.size_gb, case.dtype), TARGETS[case.targets]
    about = {"rank": case.rank, "modules": modules, "base": str(base.directory), "kind": kind}
    ending = "" if kind == KINDS[0] else f"-{kind}"
    return Place(
        cache / f"adapter-{case.size_gb:g}GB-{case.dtype}-r{case.rank}-{case.targets}{ending}",
        base.parameters | about,
        build_adapter,
        (shape, case.rank, modules, str(base.directory), kind),
    )


def apart(function: Callable[Given, Result], *args: Given.args, **kwargs: Given.kwargs) -> Result:
    """Return what a function returns in a process of its own, which takes torch's memory with it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()


def build_base(directory: Path, shape: Shape, dtype: str) -> None:
    """Write a checkpoint with random weights, never holding more than a chunk of one, and a tokenizer."""
    from transformers import LlamaConfig

    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype=dtype,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        vocab_size=shape.vocab,
        tie_word_embeddings=False,
    ).save_pretrained(directory)
    build_tokenizer(directory)
    shards = split(dict(shape.tensor_shapes()), ITEM_BYTES[dtype])
    if len(shards) == 1:
        write_shard(directory / "model.safetensors", shards[0], dtype)
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_shard(directory / file, shard, dtype)
        weight_map.update(dict.fromkeys(shard, file))
    total_bytes = shape.n_values() * ITEM_BYTES[dtype]
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def build_tokenizer(directory: Path) -> None:
    """Write a tokenizer of single bytes: some of the others do not merge a model without one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    specials = ["<unk>", "<s>", "</s>"]
    tokens = specials + sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(directory / "tokenizer.json"))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "model_max_length": 2048,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")


def n_elements(dims: tuple[int, ...]) -> int:
    """Return how many elements a tensor has; here it has one axis or two."""
    return dims[0] * (dims[1] if len(dims) == 2 else 1)


def split(tensors: dict[str, tuple[int, ...]], item_bytes: int) -> list[dict[str, tuple[int, ...]]]:
    """Return tensors in files of at most `MAX_SHARD_BYTES`, in their order."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, dims in tensors.items():
        nbytes = n_elements(dims) * item_bytes
        if shards[-1] and filled + nbytes > MAX_SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = dims
        filled += nbytes
    return shards


def write_shard(file: Path, tensors: dict[str, tuple[int, ...]], dtype: str) -> None:
    """Write a safetensors file: its header by hand, then random values chunk by chunk."""
    import torch

    torch.manual_seed(sum(file.name.encode()))
    codes = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dims in tensors.items():
        start, end = end, end + n_elements(dims) * ITEM_BYTES[dtype]
        header[name] = {"dtype": codes[dtype], "shape": dims, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    chunk = torch.empty(CHUNK_BYTES // ITEM_BYTES[dtype], dtype=getattr(torch, dtype))
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for dims in tensors.values():
            for start in range(0, n_elements(dims), len(chunk)):
                part = chunk[: n_elements(dims) - start]
                part.normal_(0, 0.02) if len(dims) == 2 else part.fill_(1)
                stream.write(part.view(torch.uint8).numpy().data)


def build_adapter(
    directory: Path, shape: Shape, rank: int, modules: tuple[str, ...], base: str, kind: str
) -> None:
    """Write an adapter as PEFT stores it: float32 factors, all of them random."""
    import torch
    from peft import AdaLoraConfig, LoraConfig
    from safetensors.torch import save_file

    common = {
        "lora_alpha": 2 * rank,
        "target_modules": list(modules),
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
    }
    if kind == "adalora":
        config = AdaLoraConfig(init_r=rank, target_r=max(1, rank // 2), total_step=1000, **common)
    else:
        config = LoraConfig(r=rank, use_dora=kind == "dora", **common)
    config.save_pretrained(directory)
    torch.manual_seed(rank)
    tensors: dict[str, Any] = {}
    for layer in range(shape.n_layers):
        for module, dims in shape.module_shapes().items():
            if module.rpartition(".")[2] in modules:
                prefix = f"base_model.model.model.layers.{layer}.{module}"
                tensors |= {f"{prefix}.{name}": made for name, made in factors(kind, rank, *dims).items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})


def factors(kind: str, rank: int, n_out: int, n_in: int) -> dict[str, Any]:
    """Return the tensors of one module under the names that PEFT gives them."""
    import torch

    a, b = torch.randn(rank, n_in) * n_in**-0.5, torch.randn(n_out, rank) * 0.01
    match kind:
        case "adalora":
            return {"lora_A": a, "lora_B": b, "lora_E": torch.randn(rank, 1)}
        case "dora":  # the lengths of the base's rows, moved by some per cent
            lengths = 0.02 * n_in**0.5 * (1 + 0.05 * torch.randn(n_out))
            return {"lora_A.weight": a, "lora_B.weight": b, "lora_magnitude_vector": lengths}
        case _:
            return {"lora_A.weight": a, "lora_B.weight": b}
