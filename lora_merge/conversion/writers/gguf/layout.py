"""The place of each module in llama.cpp: the weight's name, the rows, and other modules in the same weight."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lora_merge.conversion.writers.gguf.config import whole
from lora_merge.conversion.writers.gguf.families import Family, family_of
from lora_merge.conversion.writers.gguf.order import factors_of, rows_of, wqkv_rows
from lora_merge.conversion.writers.gguf.package import gguf_package
from lora_merge.conversion.writers.gguf.tensors import (
    EXPERT,
    GgufTensor,
    WeightPart,
    number_of_expert,
    stack_of,
    tensor_of,
)
from lora_merge.core.report import error
from lora_merge.errors import ConvertError

if TYPE_CHECKING:
    from lora_merge.conversion.lora import Lora, Made

_MERGE = "merge it, and convert the checkpoint"

_INPUT, _OUTPUT = "token_embd.weight", "output.weight"

_MOST_LAYERS = 4096
"""Upper limit: the table of gguf has the names of all layers."""

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
"""Last part of an expert's path → llama.cpp's names of the matrices in it."""


class Layout:
    """The places of a LoRA's modules in llama.cpp."""

    def __init__(self, lora: Lora) -> None:
        self._lora = lora
        text = lora.base_config.get("text_config")
        self._text: Mapping[str, Any] = text if isinstance(text, dict) else {}
        self._config: Mapping[str, Any] = {**lora.base_config, **self._text}

    @cached_property
    def family(self) -> Family:
        """What llama.cpp makes of the base's family.

        Raises:
            ConvertError: the family is not known.
        """
        return family_of(self._lora.base_config, self._text)

    @cached_property
    def _names(self) -> Any:
        gguf = gguf_package()
        archs = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
        n_layers = whole(self._config, "num_hidden_layers", "n_layer", most=_MOST_LAYERS)
        return gguf.get_tensor_name_map(archs[self.family.arch], n_layers)

    @cached_property
    def _is_tied(self) -> bool:
        """True if llama.cpp has one tensor for both ends of the model."""
        said = [level.get("tie_word_embeddings") for level in (self._lora.base_config, self._text)]
        return any(said) or (said == [None, None] and self.family.tied)

    def tensors(self) -> list[GgufTensor]:
        """Return every weight of llama.cpp that gets LoRA.

        Raises:
            ConvertError: modules have no place in llama.cpp; all of them are listed.
        """
        found: list[GgufTensor] = []
        stacks: dict[str, list[tuple[Made, WeightPart]]] = {}
        issues = []
        for made in self._lora.made:
            path = _text_path(made)
            places = self._places(made, path)
            problem = self._problem(made, path, places)
            if problem:
                issues.append(error("unsupported", made.module.path, problem, _MERGE))
            elif made.module.form != "experts" and EXPERT.fullmatch(path):
                for place in places:
                    stacks.setdefault(place.name, []).append((made, place))
            else:
                found += (tensor_of(made, place) for place in places)
        found += (self._stack(name, members) for name, members in stacks.items())
        sentence = "has LoRA of several modules, but llama.cpp has one pair of factors for it"
        counts = Counter(one.name for one in found)
        issues += [error("unsupported", name, sentence, _MERGE) for name, n in counts.items() if n > 1]
        if issues:
            raise ConvertError(issues)
        return found

    def _problem(self, made: Made, path: str, places: Sequence[WeightPart]) -> str:
        """Return why a module cannot have LoRA in llama.cpp, as a sentence; empty if it can."""
        last, form = path.rpartition(".")[2], made.module.form
        names = {place.name for place in places}
        is_turned = form == "experts" and (_INPUT in names or self.family.arch == "gpt2")
        is_tied_end = self._is_tied and names & {_INPUT, _OUTPUT}
        problems = {
            f"is a {last}, {self.family.refused.get(last)}": last in self.family.refused,
            "is not part of the text model, and LoRA in llama.cpp changes the text model only": _TOWER.search(
                path
            ),
            "is a convolution, and llama.cpp does not support LoRA on convolutions": form == "convolution",
            "has no name in llama.cpp": "" in names,
            "is one end of tied embeddings, which are one tensor in llama.cpp": is_tied_end,
            "is LoRA on a parameter that llama.cpp stores transposed": is_turned,
        }
        return next((sentence for sentence, holds in problems.items() if holds), "")

    def _places(self, made: Made, path: str) -> list[WeightPart]:
        """Return the weights of llama.cpp that a module becomes. A fused gate and up become two."""
        layer = _LAYER.search(path)
        block, last = f"blk.{layer[1]}." if layer else "", path.rpartition(".")[2]
        n_out = made.module.shape[-2] if made.module.form == "experts" else made.module.shape[0]
        # One matrix in the base, three weights in llama.cpp.
        if self.family.arch == "internlm2" and last == "wqkv":
            ends = wqkv_rows(self._config, path, n_out)
            return [self._place(f"{block}attn_{end}", rows) for end, rows in ends.items()]
        kind = self._kind_of_experts(path)
        if kind is not None and last in _PARTS:
            names, every = [f"{block}ffn_{part}{kind}" for part in _PARTS[last]], range(n_out)
            halves = (every[: n_out // 2], every[n_out // 2 :])
            if self.family.arch == "gpt-oss":
                # gpt-oss stores gate and up interleaved.
                halves = (every[::2], every[1::2])
            rows = halves if len(names) == 2 else (every,)
            return [self._place(name, own) for name, own in zip(names, rows, strict=True)]
        arch = self.family.arch
        order = rows_of(arch, self._config, path, n_out, permuted=self.family.permuted)
        return [self._place(path, order, factors_of(arch, self._config, path, n_out))]

    def _place(self, path: str, rows: Sequence[int], factor: float | Sequence[float] = 1.0) -> WeightPart:
        """Return the weight for a path; its name is empty if llama.cpp has none."""
        # transformers 5 has the routers of Granite without the inner ``layer`` that gguf's table knows.
        found = (self._names.get_name(f"{path}{end}", (".weight",)) for end in (".weight", ".layer.weight"))
        name = next(filter(None, found), None)
        return WeightPart(f"{name.removesuffix('.weight')}.weight" if name else "", rows, factor)

    def _kind_of_experts(self, path: str) -> str | None:
        """Return the end of llama.cpp's names for experts; None for a module outside of experts.

        Reference:
            ``GraniteMoeModel.modify_tensors`` (conversion/granite.py) of llama.cpp.
        """
        owner = path.rpartition(".")[0]
        if EXPERT.fullmatch(path) or owner.endswith("block_sparse_moe"):
            return "_exps"
        if owner.endswith("shared_mlp"):
            return "_shexp" if self._config.get("num_local_experts") else ""
        return None

    def _stack(self, name: str, members: Sequence[tuple[Made, WeightPart]]) -> GgufTensor:
        """Return the weight for all experts of a layer; experts without factors, or with fewer, get zeros."""
        n = whole(self._config, "num_local_experts", "num_experts", "n_routed_experts")
        last = max(number_of_expert(made.module.path) for made, _ in members)
        if last >= n:
            sentence = f"has LoRA of expert {last}, but the base has {n} experts (config.json)"
            raise ConvertError([error("unsupported", name, sentence, _MERGE)])
        return stack_of(name, n, members)


def _text_path(made: Made) -> str:
    """Return a module's path as in the text model alone. A parameter loses its ``.weight``."""
    # ``model.language_model.model.`` would leave the first word twice.
    path = made.module.path.replace("language_model.", "").replace("model.model.", "model.")
    return path.removesuffix(".weight") if made.module.form == "experts" else path
