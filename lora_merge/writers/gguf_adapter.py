"""A LoRA for llama.cpp: one GGUF file, under llama.cpp's names and in its order of rows.

llama.cpp multiplies by α/r with one α for the file and the r of each tensor. So α is the rank that most tensors have,
and B of any other is multiplied by r/α: every product comes out with a factor of one.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from math import frexp, prod
from typing import TYPE_CHECKING, Any

from lora_merge.core.lora import Lora
from lora_merge.core.report import Issue, error
from lora_merge.core.shortage import not_for_want_of_memory
from lora_merge.core.tensor import TORCH_NAMES
from lora_merge.errors import ConvertError, RequestError
from lora_merge.io.files import tensor_bytes, write_error
from lora_merge.writers.gguf_config import check_divides, multiplier, multipliers, whole

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import torch

    from lora_merge.core.lora import Made
    from lora_merge.io.folder import Folder
    from lora_merge.writers.lora_writer import LoadFactors

GGUF_FILE = "adapter.gguf"

_MERGE = "merge it, and convert the checkpoint"
_INPUT, _OUTPUT = "token_embd.weight", "output.weight"


@dataclass(frozen=True, slots=True)
class Family:
    """How llama.cpp has the models of one family."""

    arch: str
    """Its name of the architecture."""

    permuted: bool = False
    """True where the rows of q and k lie in another order: pairs of a rotation side by side."""

    tied: bool = False
    """True where embeddings are tied unless ``config.json`` says otherwise."""

    refused: Mapping[str, str] = field(default_factory=dict)
    """Modules for which its graph has no LoRA, by the last part of the path, and what it does with one."""


_IGNORED = "which llama.cpp loads and does not apply"
_DROPPED = "which llama.cpp's graph of this family does not have"
_LATENT = dict.fromkeys(
    ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "lm_head"), _IGNORED
)
_GEMMA3 = {"lm_head": _DROPPED, "embed_tokens": "whose rows llama.cpp cuts"}

FAMILIES: Mapping[str, Family] = {
    "llama": Family("llama", permuted=True),
    "mistral": Family("llama", permuted=True),
    "mixtral": Family("llama", permuted=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "qwen2_moe": Family("qwen2moe"),
    "qwen3_moe": Family("qwen3moe"),
    "qwen2_vl": Family("qwen2vl"),
    "qwen2_vl_text": Family("qwen2vl"),
    "qwen2_5_vl": Family("qwen2vl"),
    "qwen2_5_vl_text": Family("qwen2vl"),
    "gemma": Family("gemma", tied=True, refused={"lm_head": _DROPPED}),
    "gemma2": Family("gemma2", tied=True, refused={"lm_head": _DROPPED}),
    "gemma3_text": Family("gemma3", tied=True, refused=_GEMMA3),
    "phi3": Family("phi3"),
    "gpt_oss": Family("gpt-oss"),
    "gpt2": Family("gpt2", tied=True, refused={"wpe": _IGNORED}),
    "gpt_neox": Family("gptneox"),
    "granite": Family("granite", permuted=True),
    "granitemoe": Family("granitemoe", permuted=True),
    "granitemoeshared": Family("granitemoe", permuted=True),
    "falcon_h1": Family("falcon-h1"),
    "internlm2": Family("internlm2", permuted=True),
    "deepseek_v2": Family("deepseek2", refused=_LATENT),
    "deepseek_v3": Family("deepseek2", refused=_LATENT),
    "glm4": Family("glm4"),
    "olmo2": Family("olmo2"),
    "starcoder2": Family("starcoder2", tied=True),
}
"""By the ``model_type`` of the text model (llama.cpp as llama-cpp-python 0.3.36 has it, ``conversion/*.py``)."""

_AROUND: Mapping[tuple[str, str], str] = {
    ("gemma3", "gemma3_text"): "gemma3",
    ("llava", "llama"): "llama",
    ("mistral3", "mistral"): "mistral3",
    ("qwen2_vl", "qwen2_vl_text"): "qwen2vl",
    ("qwen2_5_vl", "qwen2_5_vl_text"): "qwen2vl",
}
"""The architecture of a text model inside of another, by the ``model_type`` of both; of any other nothing is known."""

_MOST_LAYERS = 4096
"""gguf makes a table of the names of all."""

_EXPERT = re.compile(r".+\.experts(\.(?P<index>\d+))?\.(?P<part>[^.]+)")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_TOWER = re.compile(r"(^|\.)(visual|vision\w*|audio\w*|multi_modal_projector|mm_projector)\.")

_PARTS: Mapping[str, tuple[str, ...]] = {
    "w1": ("gate",),
    "w2": ("down",),
    "w3": ("up",),
    "gate_proj": ("gate",),
    "down_proj": ("down",),
    "up_proj": ("up",),
    "gate_up_proj": ("gate", "up"),
    "input_linear": ("gate", "up"),
    "output_linear": ("down",),
}
"""What llama.cpp calls the parts of an expert's weight."""

Produce = Callable[["LoadFactors"], "tuple[torch.Tensor, torch.Tensor]"]


@dataclass(frozen=True, slots=True)
class _Place:
    """A weight of llama.cpp, and what it has of a module."""

    name: str
    """llama.cpp's, ``blk.0.attn_q.weight``; empty where it has none."""

    rows: Sequence[int]
    """Which of the module's outputs, in llama.cpp's order."""

    factor: float | Sequence[float] = 1.0
    """What llama.cpp's converter multiplies the weight by, all of it or row by row."""


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One weight of llama.cpp that has LoRA."""

    name: str
    rank: int
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]
    dtype: str
    produce: Produce
    """Returns A and B, of scale 1."""

    def under(self, alpha: int) -> _Tensor:
        """Return it as it is stored in a file with this α: in a dtype that holds B · r/α."""
        ratio = self.rank / alpha
        is_exact = ratio == 1 or (self.dtype == "BF16" and frexp(ratio)[0] == 0.5)
        return self if is_exact else replace(self, dtype="F32")


def check_ready(base_config: Mapping[str, Any]) -> None:
    """Check that adapters of a model can be written at all, before anything is made.

    Raises:
        RequestError: the package gguf is not installed.
        ConvertError: the family is not known.
    """
    _gguf()
    _ = _Layout(Lora((), {}, base_config=base_config)).family


def write_gguf(folder: Folder, lora: Lora, factors: LoadFactors) -> tuple[str, ...]:
    """Write a LoRA whose scales are folded into B as llama.cpp reads one; return the name of the file.

    Raises:
        RequestError: the package gguf is not installed.
        ConvertError: the family is not known, or a module has no place in llama.cpp.
        WriteError: the disk is full or cannot be written.

    Reference:
        ``llama_adapter_lora_init_impl`` (src/llama-adapter.cpp) and ``convert_lora_to_gguf.py`` of llama.cpp.
    """
    gguf = _gguf()
    layout = _Layout(lora)
    tensors = layout.tensors()
    alpha = Counter(one.rank for one in tensors).most_common(1)[0][0]
    tensors = [one.under(alpha) for one in tensors]
    base = str(lora.config.get("base_model_name_or_path") or "").rstrip("/")
    writer = gguf.GGUFWriter(None, layout.family.arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_name(base.rpartition("/")[2] or "adapter")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    try:
        with folder.writing(GGUF_FILE, create=True) as fd, closing(writer):
            _fill(gguf, writer, tensors, alpha, factors, fd)
    except OSError as exc:
        raise write_error(folder.path / GGUF_FILE, exc) from exc
    return (GGUF_FILE,)


def _fill(
    gguf: Any, writer: Any, tensors: Sequence[_Tensor], alpha: int, factors: LoadFactors, fd: int
) -> None:
    """Write everything to the file, one weight in memory at a time.

    gguf writes tensors with ``numpy.ndarray.tofile``, which says nothing when the disk is full: not so here.
    """
    import torch

    for one in tensors:
        for end, shape in (("lora_a", one.a_shape), ("lora_b", one.b_shape)):
            _announce(gguf, writer, f"{one.name}.{end}", shape, one.dtype)
    writer.write_header_to_file(os.dup(fd))  # which `open` takes in place of a path, and `close` closes
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    (file,) = writer.fout
    writer.write_padding(file, file.tell())
    for one in tensors:
        a, b = one.produce(factors)
        if one.rank != alpha:
            b = b.float() * (one.rank / alpha)
        for tensor in (a, b):
            nbytes = file.write(tensor_bytes(tensor.to(getattr(torch, TORCH_NAMES[one.dtype]))))
            writer.write_padding(file, nbytes)


def check_gguf(root: Path, lora: Lora, factors: LoadFactors) -> list[Issue]:
    """Return an issue for each tensor of a written file that is not what was meant; read with gguf's own reader."""
    import torch

    gguf = _gguf()
    try:
        reader = gguf.GGUFReader(root / GGUF_FILE)
    except ValueError as exc:
        return [error("unreadable", GGUF_FILE, f"cannot be read back ({exc})")]
    alpha = float(reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents())
    found = {tensor.name: tensor for tensor in reader.tensors}
    issues = []
    for one in _Layout(lora).tensors():
        names = (f"{one.name}.lora_a", f"{one.name}.lora_b")
        missing = [name for name in names if name not in found]
        if missing:
            issues.append(error("missing", missing[0], "was made, and is not in the output"))
            continue
        a, b = (torch.from_numpy(_values(found.pop(name))) for name in names)
        wanted_a, wanted_b = one.produce(factors)
        # r/α and α/r are two roundings each; below the smallest normal number bits are lost
        atol = torch.finfo(torch.float32).tiny
        is_same = (
            torch.equal(a, wanted_a.float())
            and b.shape == wanted_b.shape
            and torch.allclose(b * (alpha / b.shape[-1]), wanted_b.float(), rtol=1e-6, atol=atol)
        )
        if not is_same:
            issues.append(error("differs", one.name, "is in the output with other values than were made"))
    issues += [error("surplus", name, "is in the output, and was not made") for name in sorted(found)]
    return issues


class _Layout:
    """Where the modules of a LoRA are in llama.cpp."""

    def __init__(self, lora: Lora) -> None:
        self._lora = lora
        text = lora.base_config.get("text_config")
        self._text: Mapping[str, Any] = text if isinstance(text, dict) else {}
        self._config: Mapping[str, Any] = {**lora.base_config, **self._text}

    @cached_property
    def family(self) -> Family:
        """Return how llama.cpp has the model.

        Raises:
            ConvertError: that is not known.

        Reference:
            ``get_model_architecture`` (conversion/base.py) of llama.cpp.
        """
        kind, around = (str(level.get("model_type")) for level in (self._config, self._lora.base_config))
        family = FAMILIES.get(kind)
        own_class = str((self._text.get("architectures") or [""])[0])
        if family is not None and around != kind and not own_class.endswith("ForCausalLM"):
            arch = _AROUND.get((around, kind))
            family = replace(family, arch=arch) if arch else None
        if family is None:
            found = repr(kind) if around == kind else f"{kind!r} inside of {around!r}"
            sentence = f"is {found}, a family whose LoRA for llama.cpp is not known here"
            known = ", ".join(sorted(FAMILIES))
            raise ConvertError([error("unsupported", "model_type", sentence, f"known: {known}")])
        return family

    @cached_property
    def _names(self) -> Any:
        gguf = _gguf()
        archs = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
        n_layers = whole(self._config, "num_hidden_layers", "n_layer", most=_MOST_LAYERS)
        return gguf.get_tensor_name_map(archs[self.family.arch], n_layers)

    @cached_property
    def _is_tied(self) -> bool:
        """Return True where one tensor of llama.cpp is both ends of the model."""
        said = [level.get("tie_word_embeddings") for level in (self._lora.base_config, self._text)]
        return any(said) or (said == [None, None] and self.family.tied)

    def tensors(self) -> list[_Tensor]:
        """Return every weight of llama.cpp that has LoRA.

        Raises:
            ConvertError: a module has no place there.
        """
        found: list[_Tensor] = []
        stacks: dict[str, list[tuple[Made, _Place]]] = {}
        issues = []
        for made in self._lora.made:
            path = _text_path(made)
            places = self._places(made, path)
            problem = self._problem(made, path, places)
            if problem:
                issues.append(error("unsupported", made.module.path, problem, _MERGE))
            elif made.module.form != "experts" and _EXPERT.fullmatch(path):
                for place in places:
                    stacks.setdefault(place.name, []).append((made, place))
            else:
                found += (_tensor(made, place) for place in places)
        found += (self._stack(name, members) for name, members in stacks.items())
        sentence = "has LoRA of several modules, and llama.cpp has one pair of factors for it"
        counts = Counter(one.name for one in found)
        issues += [error("unsupported", name, sentence, _MERGE) for name, n in counts.items() if n > 1]
        if issues:
            raise ConvertError(issues)
        return found

    def _problem(self, made: Made, path: str, places: Sequence[_Place]) -> str:
        """Return what keeps a module from llama.cpp; empty when nothing does."""
        last, form = path.rpartition(".")[2], made.module.form
        names = {place.name for place in places}
        is_turned = form == "experts" and (_INPUT in names or self.family.arch == "gpt2")
        problems = {
            f"is a {last}, {self.family.refused.get(last)}": last in self.family.refused,
            "is no part of the text model, which is all that llama.cpp's LoRA reaches": _TOWER.search(path),
            "is a convolution, for which llama.cpp has no LoRA": form == "convolution",
            "has no name in llama.cpp": "" in names,
            "is an end of tied embeddings, which are one tensor in llama.cpp": self._is_tied and names & {_INPUT, _OUTPUT},
            "is LoRA on a parameter that llama.cpp has the other way round": is_turned,
        }  # fmt: skip
        return next((sentence for sentence, holds in problems.items() if holds), "")

    def _places(self, made: Made, path: str) -> list[_Place]:
        """Return the weights that a module is in llama.cpp: gate and up are two of them."""
        layer = _LAYER.search(path)
        block, last = f"blk.{layer[1]}." if layer else "", path.rpartition(".")[2]
        n_out = made.module.shape[-2] if made.module.form == "experts" else made.module.shape[0]
        if self.family.arch == "internlm2" and last == "wqkv":
            return [self._place(f"{block}attn_{end}", rows) for end, rows in self._wqkv(path, n_out).items()]
        kind = self._kind_of_experts(path)
        if kind is not None and last in _PARTS:
            names, every = [f"{block}ffn_{part}{kind}" for part in _PARTS[last]], range(n_out)
            halves = (every[: n_out // 2], every[n_out // 2 :])
            if self.family.arch == "gpt-oss":
                halves = (every[::2], every[1::2])
            rows = halves if len(names) == 2 else (every,)
            return [self._place(name, own) for name, own in zip(names, rows, strict=True)]
        return [self._place(path, self._rows(path, n_out), self._factor(path, n_out))]

    def _place(self, path: str, rows: Sequence[int], factor: float | Sequence[float] = 1.0) -> _Place:
        """Return a place; transformers 5 has the routers of Granite without a layer inside."""
        found = (self._names.get_name(f"{path}{end}", (".weight",)) for end in (".weight", ".layer.weight"))
        name = next(filter(None, found), None)
        return _Place(f"{name.removesuffix('.weight')}.weight" if name else "", rows, factor)

    def _kind_of_experts(self, path: str) -> str | None:
        """Return how the names of experts end in llama.cpp; None for what is no expert.

        Reference:
            ``GraniteMoeModel.modify_tensors`` (conversion/granite.py) of llama.cpp.
        """
        owner = path.rpartition(".")[0]
        if _EXPERT.fullmatch(path) or owner.endswith("block_sparse_moe"):
            return "_exps"
        if owner.endswith("shared_mlp"):
            return "_shexp" if self._config.get("num_local_experts") else ""
        return None

    def _rows(self, path: str, n_out: int) -> Sequence[int]:
        """Return which of a weight's rows llama.cpp has at each place.

        Reference:
            ``LlamaModel.permute`` (conversion/llama.py) and ``GPTNeoXModel.modify_tensors`` of llama.cpp.
        """
        last = path.rpartition(".")[2]
        if self.family.arch == "gptneox" and last == "query_key_value":
            n_heads = whole(self._config, "num_attention_heads")
            check_divides("num_attention_heads", 3 * n_heads, n_out, path)
            return _grid(n_out, (n_heads, 3, n_out // n_heads // 3), (1, 0, 2))
        if not self.family.permuted or last not in {"q_proj", "k_proj"}:
            return range(n_out)
        is_grouped = last == "k_proj" and self._config.get("num_key_value_heads") is not None
        key = "num_key_value_heads" if is_grouped else "num_attention_heads"
        n_heads = whole(self._config, key)
        check_divides(key, 2 * n_heads, n_out, path)
        return _rotated(range(n_out), n_heads)

    def _wqkv(self, path: str, n_out: int) -> dict[str, Sequence[int]]:
        """Return the rows of q, k and v in InternLM2's one matrix.

        Reference:
            ``InternLM2Model.modify_tensors`` (conversion/internlm.py) of llama.cpp.
        """
        n_heads = whole(self._config, "num_attention_heads")
        n_kv = whole(self._config, "num_key_value_heads")
        check_divides("num_key_value_heads", n_kv, n_heads, "num_attention_heads")
        check_divides("num_attention_heads", 2 * (n_heads + 2 * n_kv), n_out, path)
        per_group = n_heads // n_kv + 2
        size = n_out // (n_kv * per_group)
        rows: dict[str, list[int]] = {"q": [], "k": [], "v": []}
        for row in range(n_out):
            place = row // size % per_group
            rows["q" if place < per_group - 2 else "k" if place == per_group - 2 else "v"].append(row)
        return {"q": _rotated(rows["q"], n_heads), "k": _rotated(rows["k"], n_kv), "v": rows["v"]}

    def _factor(self, path: str, n_out: int) -> float | Sequence[float]:
        """Return what Falcon-H1's multipliers make of a weight: llama.cpp's has them in it.

        Reference:
            ``FalconH1Model.modify_tensors`` (conversion/falcon_h1.py) of llama.cpp.
        """
        if self.family.arch != "falcon-h1":
            return 1.0
        config, last = self._config, path.rpartition(".")[2]
        gate, down = multipliers(config, "mlp_multipliers", 2)
        attention = multiplier(config, "attention_in_multiplier")
        if last == "in_proj":
            n_inner = whole(config, "mamba_d_ssm", most=n_out)
            n_state = whole(config, "mamba_n_groups", most=n_out) * whole(config, "mamba_d_state", most=n_out)
            sizes = (n_inner, n_inner, n_state, n_state, max(0, n_out - 2 * n_inner - 2 * n_state))
            check_divides("mamba_d_ssm", sum(sizes), n_out, path)
            parts = multipliers(config, "ssm_multipliers", len(sizes))
            every = multiplier(config, "ssm_in_multiplier")
            return [part * every for part, size in zip(parts, sizes, strict=True) for _ in range(size)]
        factors = {
            "gate_proj": gate, "down_proj": down, "q_proj": attention, "v_proj": attention,
            "k_proj": attention * multiplier(config, "key_multiplier"), "o_proj": multiplier(config, "attention_out_multiplier"),
            "out_proj": multiplier(config, "ssm_out_multiplier"), "lm_head": multiplier(config, "lm_head_multiplier"),
            "embed_tokens": multiplier(config, "embedding_multiplier"),
        }  # fmt: skip
        return float(factors.get(last, 1.0))

    def _stack(self, name: str, members: Sequence[tuple[Made, _Place]]) -> _Tensor:
        """Return a weight of all experts: zeros where an expert has no factors, or has fewer."""
        n = whole(self._config, "num_local_experts", "num_experts", "n_routed_experts")
        last = max(_number_of_expert(made.module.path) for made, _ in members)
        if last >= n:
            sentence = f"has LoRA of expert {last}, and by config.json the base has {n} experts"
            raise ConvertError([error("unsupported", name, sentence, _MERGE)])
        first, place = members[0]
        rank = max(made.rank for made, _ in members)
        a_shape, b_shape = (n, rank, first.module.shape[1]), (n, len(place.rows), rank)
        produce = partial(_stacked, tuple(members), a_shape, b_shape)
        return _Tensor(name, rank, a_shape, b_shape, _dtype([made for made, _ in members]), produce)


def _text_path(made: Made) -> str:
    """Return the path of a module in the text model alone; of a parameter without ``.weight``."""
    path = made.module.path.replace("language_model.", "").replace("model.model.", "model.")
    return path.removesuffix(".weight") if made.module.form == "experts" else path


def _tensor(made: Made, place: _Place) -> _Tensor:
    """Return a weight that is one module, or a part of it; an embedding lies there the other way round."""
    *stack, _, n_in = made.module.shape
    a_shape = (n_in, made.rank) if made.module.form == "embedding" else (*stack, made.rank, n_in)
    dtype = _dtype([made]) if place.factor == 1 else "F32"
    produce = partial(_placed, made, place)
    return _Tensor(place.name, made.rank, a_shape, (*stack, len(place.rows), made.rank), dtype, produce)


def _rotated(rows: Sequence[int], n_heads: int) -> list[int]:
    """Return rows in llama.cpp's order of a rotary embedding: the two halves of a head, interleaved."""
    size = len(rows) // n_heads
    return [
        rows[head * size + half * (size // 2) + n]
        for head in range(n_heads)
        for n in range(size // 2)
        for half in (0, 1)
    ]


def _grid(n: int, shape: tuple[int, ...], axes: tuple[int, ...]) -> list[int]:
    """Return the numbers from 0 on, laid out in a shape whose axes are then exchanged."""
    import numpy as np

    return [int(row) for row in np.arange(n).reshape(shape).transpose(axes).reshape(-1)]


def _placed(made: Made, place: _Place, factors: LoadFactors) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    a, b = factors(made)
    if place.rows != range(b.shape[-2]):
        b = b[..., list(place.rows), :]
    if place.factor != 1:
        b = b.float() * torch.tensor(place.factor, dtype=torch.float32).reshape(-1, 1)
    return a.mT.contiguous() if made.module.form == "embedding" else a, b.contiguous()


def _stacked(
    members: tuple[tuple[Made, _Place], ...],
    a_shape: tuple[int, ...],
    b_shape: tuple[int, ...],
    factors: LoadFactors,
) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    a, b = torch.zeros(a_shape), torch.zeros(b_shape)
    for made, place in members:
        n = _number_of_expert(made.module.path)
        own_a, own_b = _placed(made, place, factors)
        a[n, : made.rank] = own_a
        b[n, :, : made.rank] = own_b
    return a, b


def _number_of_expert(path: str) -> int:
    match = _EXPERT.fullmatch(path)
    assert match is not None
    return int(match["index"])


def _dtype(members: Sequence[Made]) -> str:
    """Return the dtype of a weight's factors: float32 where they differ, or llama.cpp has none like theirs."""
    dtypes = {dtype for made in members for dtype in (made.a.dtype, made.b.dtype)}
    return dtypes.pop() if len(dtypes) == 1 and dtypes <= {"BF16", "F16"} else "F32"


def _announce(gguf: Any, writer: Any, name: str, shape: tuple[int, ...], dtype: str) -> None:
    """Tell the writer of a tensor that will come."""
    import numpy as np

    nbytes = prod(shape) * (4 if dtype == "F32" else 2)
    raw = getattr(gguf.GGMLQuantizationType, dtype)
    writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, raw_dtype=raw)


def _values(tensor: Any) -> np.ndarray[Any, Any]:
    """Return the values of a tensor that gguf read, in float32."""
    import numpy as np

    data = np.asarray(tensor.data)
    if tensor.tensor_type.name == "BF16":
        wide = data.view(np.uint16).astype(np.uint32) << 16
        data = wide.view(np.float32)
    shape = tuple(int(size) for size in tensor.shape[::-1])
    return data.astype(np.float32).reshape(shape)


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as exc:
        not_for_want_of_memory(exc)
        hint = 'pip install "lora-merge[gguf]"'
        raise RequestError(
            "", 0, "format", "gguf needs the package gguf, which is not installed", hint=hint
        ) from exc
    return gguf
