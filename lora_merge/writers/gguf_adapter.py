"""A LoRA for llama.cpp: one GGUF file, under llama.cpp's names and in its order of rows.

llama.cpp multiplies by α/r with one α for the file and the r of each tensor. So α is the rank that most tensors have,
and B of any other is multiplied by r/α: every product comes out with a factor of one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from lora_merge.core.checkpoint import OUTPUT_NAMES
from lora_merge.core.report import Issue, error
from lora_merge.core.tensor import TORCH_NAMES
from lora_merge.errors import ConvertError, RequestError
from lora_merge.io.files import write_error

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import torch

    from lora_merge.core.lora import Lora, Made
    from lora_merge.writers.lora_writer import LoadFactors

GGUF_FILE = "adapter.gguf"

_MERGE = "merge it, and convert the checkpoint"


@dataclass(frozen=True, slots=True)
class Family:
    """How llama.cpp has the models of one family."""

    arch: str
    """Its name of the architecture."""

    permuted: bool = False
    """True where the rows of q and k lie in another order: pairs of a rotation side by side."""

    refused: Mapping[str, str] = field(default_factory=dict)
    """Modules for which its graph has no LoRA, by the last part of the path, and what it does with one."""


_IGNORED = "which llama.cpp loads and does not apply"
_DROPPED = "which llama.cpp's graph of this family does not have"
_LATENT = dict.fromkeys(
    ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "lm_head"), _IGNORED
)

FAMILIES: Mapping[str, Family] = {
    "llama": Family("llama", permuted=True),
    "mistral": Family("llama", permuted=True),
    "mixtral": Family("llama", permuted=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "qwen2_moe": Family("qwen2moe"),
    "qwen3_moe": Family("qwen3moe"),
    "gemma": Family("gemma", refused={"lm_head": _DROPPED}),
    "gemma2": Family("gemma2", refused={"lm_head": _DROPPED}),
    "gemma3_text": Family(
        "gemma3", refused={"lm_head": _DROPPED, "embed_tokens": "whose rows llama.cpp cuts"}
    ),
    "phi3": Family("phi3"),
    "gpt_oss": Family("gpt-oss"),
    "gpt2": Family("gpt2"),
    "gpt_neox": Family("gptneox"),
    "granite": Family("granite", permuted=True),
    "granitemoe": Family("granitemoe", permuted=True),
    "internlm2": Family("internlm2", permuted=True),
    "deepseek_v2": Family("deepseek2", refused=_LATENT),
    "deepseek_v3": Family("deepseek2", refused=_LATENT),
    "glm4": Family("glm4"),
    "olmo2": Family("olmo2"),
    "starcoder2": Family("starcoder2"),
}
"""By the ``model_type`` of the text model (llama.cpp as llama-cpp-python 0.3.36 has it, ``conversion/*.py``)."""

_EXPERT = re.compile(r"(?P<block>.+\.experts)\.(?P<index>\d+)\.(?P<projection>[^.]+)")
_LAYER = re.compile(r"layers\.(\d+)\.")

Produce = Callable[["LoadFactors"], "tuple[torch.Tensor, torch.Tensor]"]


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One weight of llama.cpp that has LoRA."""

    name: str
    """llama.cpp's, ``blk.0.attn_q.weight``."""

    rank: int
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]
    dtype: str
    produce: Produce


def write_gguf(root: Path, lora: Lora, factors: LoadFactors) -> tuple[str, ...]:
    """Write a LoRA whose scales are folded into B as llama.cpp reads one; return the name of the file.

    Raises:
        RequestError: the package gguf is not installed.
        ConvertError: the family is not known, or a module has no place in llama.cpp.
        WriteError: the disk is full or cannot be written.

    Reference:
        ``llama_adapter_lora_init_impl`` (src/llama-adapter.cpp) and ``convert_lora_to_gguf.py`` of llama.cpp.
    """
    gguf = _gguf()
    tensors = _Layout(lora).tensors()
    alpha = Counter(one.rank for one in tensors).most_common(1)[0][0]
    path = root / GGUF_FILE
    writer = gguf.GGUFWriter(path, _Layout(lora).family.arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_name(str(lora.config.get("base_model_name_or_path") or "adapter").rpartition("/")[2])
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    try:
        for one in tensors:
            for end, shape in (("lora_a", one.a_shape), ("lora_b", one.b_shape)):
                _announce(gguf, writer, f"{one.name}.{end}", shape, one.dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for one in tensors:
            a, b = one.produce(factors)
            if one.rank != alpha:
                b = b.float() * (one.rank / alpha)
            for tensor in (a, b):
                writer.write_tensor_data(_array(tensor, one.dtype))
        writer.close()
    except OSError as exc:
        raise write_error(path, exc) from exc
    return (GGUF_FILE,)


def check_gguf(root: Path, lora: Lora, factors: LoadFactors) -> list[Issue]:
    """Return an issue for each tensor of a written file that is not what was meant; read with gguf's own reader."""
    import torch

    gguf = _gguf()
    reader = gguf.GGUFReader(root / GGUF_FILE)
    alpha = float(reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents())
    found = {tensor.name: _values(tensor) for tensor in reader.tensors}
    issues = []
    for one in _Layout(lora).tensors():
        names = (f"{one.name}.lora_a", f"{one.name}.lora_b")
        missing = [name for name in names if name not in found]
        if missing:
            issues.append(error("missing", missing[0], "was made, and is not in the output"))
            continue
        a, b = (torch.from_numpy(found.pop(name)) for name in names)
        wanted_a, wanted_b = one.produce(factors)
        scale = alpha / a.shape[-2] if one.a_shape[-2] == one.rank else alpha / one.rank
        same = torch.equal(a, wanted_a.float()) and torch.allclose(
            b * scale, wanted_b.float(), rtol=1e-6, atol=0
        )
        if not same:
            issues.append(error("differs", one.name, "is in the output with other values than were made"))
    issues += [error("surplus", name, "is in the output, and was not made") for name in sorted(found)]
    return issues


class _Layout:
    """Where the modules of a LoRA are in llama.cpp."""

    def __init__(self, lora: Lora) -> None:
        self._lora = lora
        text = lora.base_config.get("text_config")
        self._config: Mapping[str, Any] = {**lora.base_config, **(text if isinstance(text, dict) else {})}

    @cached_property
    def family(self) -> Family:
        """Return how llama.cpp has the model."""
        kind = self._config.get("model_type")
        if kind not in FAMILIES:
            sentence = f"is {kind!r}, a family whose LoRA for llama.cpp is not known here"
            known = ", ".join(sorted(FAMILIES))
            raise ConvertError([error("unsupported", "model_type", sentence, f"known: {known}")])
        return FAMILIES[str(kind)]

    @cached_property
    def _names(self) -> Any:
        gguf = _gguf()
        archs = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
        return gguf.get_tensor_name_map(
            archs[self.family.arch], int(self._number("num_hidden_layers", "n_layer"))
        )

    def _number(self, *keys: str) -> Any:
        return next(self._config[key] for key in keys if self._config.get(key) is not None)

    def tensors(self) -> list[_Tensor]:
        """Return every weight of llama.cpp that has LoRA.

        Raises:
            ConvertError: a module has no place there.
        """
        found: list[_Tensor] = []
        experts: dict[str, list[Made]] = {}
        issues = []
        for made in self._lora.made:
            path = made.module.path.replace("language_model.", "").replace("model.model.", "model.")
            problem = self._problem(made, path)
            if problem:
                issues.append(error("unsupported", made.module.path, problem, _MERGE))
                continue
            match = _EXPERT.fullmatch(path)
            if match:
                experts.setdefault(self._name(f"{match['block']}.{match['projection']}"), []).append(made)
            else:
                found += self._placed(made, path)
        found += (self._stack(name, members) for name, members in experts.items())
        issues += [
            error("unsupported", one.name.removeprefix("?"), "has no name in llama.cpp", _MERGE)
            for one in found
            if one.name.startswith("?")
        ]
        if issues:
            raise ConvertError(issues)
        return found

    def _problem(self, made: Made, path: str) -> str:
        """Return what keeps a module from llama.cpp; empty when nothing does."""
        last = path.rpartition(".")[2]
        tied = self._config.get("tie_word_embeddings", self.family.arch.startswith("gemma"))
        if last in self.family.refused:
            return f"is a {last}, {self.family.refused[last]}"
        if made.module.form == "convolution":
            return "is a convolution, for which llama.cpp has no LoRA"
        if (made.module.form == "embedding" or last in OUTPUT_NAMES) and tied:
            return "is an end of tied embeddings, which are one tensor in llama.cpp"
        if re.search(r"(^|\.)(visual|vision\w*|audio\w*|multi_modal_projector|mm_projector)\.", path):
            return "is no part of the text model, which is all that llama.cpp's LoRA reaches"
        return ""

    def _name(self, path: str) -> str:
        """Return llama.cpp's name of a weight; one that begins with ``?`` where there is none."""
        name = self._names.get_name(f"{path}.weight", try_suffixes=(".weight",))
        if name is None and "block_sparse_moe" in path:
            other = path.replace("block_sparse_moe", "feed_forward").replace("model.", "", 1)
            name = self._names.get_name(f"{other}.weight", try_suffixes=(".weight",))
        if name is None:
            return f"?{path}"
        return f"{str(name).removesuffix('.weight')}.weight"

    def _placed(self, made: Made, path: str) -> Iterator[_Tensor]:
        """Yield the weights that a module is in llama.cpp."""
        if made.module.form == "experts":
            yield from self._unstacked(made, path)
            return
        n_out, n_in = made.module.shape
        last = path.rpartition(".")[2]
        if made.module.form == "embedding":
            yield _Tensor(
                self._name(path),
                made.rank,
                (n_in, made.rank),
                (n_out, made.rank),
                _dtype([made]),
                partial(_flipped, made),
            )
            return
        if self.family.arch == "internlm2" and last == "wqkv":
            layer = _LAYER.search(path)
            assert layer is not None
            for end, rows in self._wqkv(n_out).items():
                yield self._of_rows(made, f"blk.{layer[1]}.attn_{end}.weight", rows)
            return
        yield self._of_rows(made, self._name(path), self._rows(last, n_out))

    def _of_rows(self, made: Made, name: str, rows: Sequence[int] | None) -> _Tensor:
        n_out, n_in = made.module.shape
        n_rows = n_out if rows is None else len(rows)
        return _Tensor(
            name,
            made.rank,
            (made.rank, n_in),
            (n_rows, made.rank),
            _dtype([made]),
            partial(_picked, made, rows),
        )

    def _rows(self, last: str, n_out: int) -> Sequence[int] | None:
        """Return which of a weight's rows llama.cpp has at each place; None where they lie as they are.

        Reference:
            ``LlamaModel.permute`` (conversion/llama.py) and ``GPTNeoXModel.modify_tensors`` of llama.cpp.
        """
        n_heads = self._number("num_attention_heads", "n_head")
        if self.family.arch == "gptneox" and last == "query_key_value":
            return _grid(n_out, (n_heads, 3, n_out // n_heads // 3), (1, 0, 2))
        if not self.family.permuted or last not in {"q_proj", "k_proj"}:
            return None
        n = n_heads if last == "q_proj" else self._config.get("num_key_value_heads") or n_heads
        return _rotated(range(n_out), n)

    def _wqkv(self, n_out: int) -> dict[str, Sequence[int]]:
        """Return the rows of q, k and v in InternLM2's one matrix.

        Reference:
            ``InternLM2Model.modify_tensors`` (conversion/internlm.py) of llama.cpp.
        """
        n_heads, n_kv = self._number("num_attention_heads"), self._number("num_key_value_heads")
        per_group = n_heads // n_kv + 2
        size = n_out // (n_kv * per_group)
        rows: dict[str, list[int]] = {"q": [], "k": [], "v": []}
        for row in range(n_out):
            place = row // size % per_group
            rows["q" if place < per_group - 2 else "k" if place == per_group - 2 else "v"].append(row)
        return {"q": _rotated(rows["q"], n_heads), "k": _rotated(rows["k"], n_kv), "v": rows["v"]}

    def _stack(self, name: str, members: list[Made]) -> _Tensor:
        """Return a weight of all experts: zeros where an expert has no factors, or has fewer."""
        n = int(self._number("num_local_experts", "num_experts", "n_routed_experts"))
        rank = max(made.rank for made in members)
        n_out, n_in = members[0].module.shape
        produce = partial(_stacked, tuple(members), n, rank)
        return _Tensor(name, rank, (n, rank, n_in), (n, n_out, rank), _dtype(members), produce)

    def _unstacked(self, made: Made, path: str) -> Iterator[_Tensor]:
        """Yield the weights of LoRA on stacked experts: gate and up are two of them."""
        n, n_out, n_in = made.module.shape
        block, _, parameter = path.rpartition(".")
        halves: dict[str, slice] = {parameter: slice(None)}
        if parameter == "gate_up_proj":
            mixed = self.family.arch == "gpt-oss"
            one, other = (
                (slice(0, None, 2), slice(1, None, 2))
                if mixed
                else (slice(n_out // 2), slice(n_out // 2, None))
            )
            halves = {"gate_proj": one, "up_proj": other}
        for projection, rows in halves.items():
            n_rows = len(range(n_out)[rows])
            yield _Tensor(
                self._name(f"{block}.{projection}"), made.rank, (n, made.rank, n_in), (n, n_rows, made.rank),
                _dtype([made]), partial(_sliced, made, rows),
            )  # fmt: skip


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


def _picked(
    made: Made, rows: Sequence[int] | None, factors: LoadFactors
) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = factors(made)
    return a, b if rows is None else b[list(rows)]


def _flipped(made: Made, factors: LoadFactors) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = factors(made)
    return a.T.contiguous(), b


def _sliced(made: Made, rows: slice, factors: LoadFactors) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = factors(made)
    return a, b[:, rows].contiguous()


def _stacked(
    members: tuple[Made, ...], n: int, rank: int, factors: LoadFactors
) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    n_out, n_in = members[0].module.shape
    a, b = torch.zeros(n, rank, n_in), torch.zeros(n, n_out, rank)
    for made in members:
        match = _EXPERT.fullmatch(made.module.path)
        assert match is not None
        own_a, own_b = factors(made)
        a[int(match["index"]), : made.rank] = own_a
        b[int(match["index"]), :, : made.rank] = own_b
    return a, b


def _dtype(members: Sequence[Made]) -> str:
    """Return the dtype of a weight's factors: float32 where they differ."""
    dtypes = {dtype for made in members for dtype in (made.a.dtype, made.b.dtype)}
    return dtypes.pop() if len(dtypes) == 1 else "F32"


def _announce(gguf: Any, writer: Any, name: str, shape: tuple[int, ...], dtype: str) -> None:
    """Tell the writer of a tensor that will come."""
    import numpy as np

    raw = {"BF16": gguf.GGMLQuantizationType.BF16, "F16": gguf.GGMLQuantizationType.F16}.get(
        dtype, gguf.GGMLQuantizationType.F32
    )
    size = 4 if dtype == "F32" else 2
    nbytes = size * int(np.prod(shape))
    writer.add_tensor_info(
        name, shape, np.dtype(np.int16 if size == 2 else np.float32), nbytes, raw_dtype=raw
    )


def _array(tensor: torch.Tensor, dtype: str) -> np.ndarray[Any, Any]:
    """Return a tensor's bytes as numpy holds them."""
    import torch

    stored = tensor.to(getattr(torch, TORCH_NAMES[dtype])).contiguous()
    return (stored if dtype == "F32" else stored.view(torch.int16)).numpy()


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
        hint = 'pip install "lora-merge[gguf]"'
        raise RequestError(
            "", 0, "format", "gguf needs the package gguf, which is not installed", hint=hint
        ) from exc
    return gguf
