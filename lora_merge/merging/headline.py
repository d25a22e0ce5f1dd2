"""The headline of a run: what is merged into what, in one line, with the words of the field."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from lora_merge.core.adapter import PlacedDelta
from lora_merge.core.plan import Merge
from lora_merge.peft_rules.method_names import COMBINATION_NAMES, method_name, ranks_text
from lora_merge.quantised import describe
from lora_merge.words import counted, listing, printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lora_merge.core.adapter import Adapter, AdapterUse, Delta
    from lora_merge.core.checkpoint import Checkpoint
    from lora_merge.core.plan import MergePlan
    from lora_merge.core.report import Issue, Observer
    from lora_merge.core.weight import Storage, Weight

_TASKS = re.compile(r"(For[A-Z]\w*|LMHeadModel|DoubleHeadsModel|LMModel|Model)$")
"""The end of a class's name that says what the model is for."""

_SPELLINGS = (
    (re.compile(r"(?<=\d)_(?=\d)"), "."),
    (re.compile(r"_"), " "),
    (re.compile(r"(?<=[A-Za-z0-9])(?=V\d|Moe|VL(?![a-z])|Next|Omni|Vision)"), " "),
    (re.compile(r"\bMoe\b"), "MoE"),
    (re.compile(r"^Deepseek"), "DeepSeek"),
    (re.compile(r"^GptOss"), "gpt-oss"),
    (re.compile(r"^Glm"), "GLM"),
    (re.compile(r"^Olmo"), "OLMo"),
    (re.compile(r"^Bert"), "BERT"),
)
"""Classes of transformers → the names that their makers use. In this order."""

DTYPE_WORDS: Mapping[str, str] = {"BF16": "bf16", "F16": "fp16", "F32": "fp32", "F64": "fp64"}
"""Dtype as safetensors spells it → as users do."""

_LISTED = 3
"""Up to this many adapters are named one by one."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a run is about to do. An observer that has a method ``begin`` hears it before the first byte is written."""

    headline: str

    total_bytes: int = 0
    """The bytes that all phases of the run advance by, together; 0: unknown."""

    n_bytes_of: Mapping[str, int] | None = None
    """In a batch: the bytes of each job, by its name."""


@runtime_checkable
class Announced(Protocol):
    """An observer that wants to hear what a run is about to do."""

    def begin(self, work: Work) -> None:
        """Hear it."""


def announce(watch: Observer, work: Work) -> None:
    """Tell an observer what a run is about to do, if it wants to hear it."""
    if isinstance(watch, Announced):
        watch.begin(work)


@runtime_checkable
class Forewarned(Protocol):
    """An observer that wants to hear a warning before a run begins."""

    def warn(self, issue: Issue) -> None:
        """Hear it."""


def forewarn(watch: Observer, issue: Issue) -> None:
    """Tell an observer of a warning before the work begins, if it wants to hear it. The report has it too."""
    if isinstance(watch, Forewarned):
        watch.warn(issue)


def merge_headline(base: Checkpoint, uses: Sequence[AdapterUse], plan: MergePlan) -> str:
    """Return what a merge does.

    Example:
        ``Llama 8B, bf16 + LoRA r16 on 224 modules → dense bf16``
    """
    return f"{model_words(base.config, base.parameters())} + {_changes_words(uses, plan)} → {_output_words(base, plan)}"


def adapter_headline(adapter: Adapter, deltas: Sequence[Delta | PlacedDelta] | None = None) -> str:
    """Return what an adapter is: ``LoRA r16 on 224 modules``.

    Args:
        adapter: from its headers.
        deltas: its changes, where a base has told them; default: those that its own files tell.
    """
    found = adapter.deltas if deltas is None else deltas
    n_modules = len({_module_of(delta) for delta in found}) or len(adapter.modules)
    words = _method_words(adapter, found)
    return f"{words} on {counted(n_modules, 'module')}" if n_modules else words


def model_words(config: Mapping[str, Any], weights: Mapping[str, Weight]) -> str:
    """Return a model's name, size and storage: ``Llama 8B, bf16``.

    Args:
        config: its ``config.json``, parsed.
        weights: its parameters.
    """
    n_values = sum(math.prod(one.shape) for one in weights.values())
    return f"{architecture(config)} {parameters_text(n_values)}, {_storage_words(_by_size(weights.values()))}"


def architecture(config: Mapping[str, Any]) -> str:
    """Return the name of a model's architecture, by its ``config.json``.

    Example:
        >>> [architecture({"architectures": [name]}) for name in ("LlamaForCausalLM", "Qwen3MoeForCausalLM")]
        ['Llama', 'Qwen3 MoE']
        >>> architecture({"architectures": ["Qwen2_5_VLForConditionalGeneration"]}), architecture({})
        ('Qwen2.5 VL', 'Model')
    """
    listed = config.get("architectures")
    first = listed[0] if isinstance(listed, list) and listed else None
    named = first if isinstance(first, str) else config.get("model_type")
    text = _TASKS.sub("", named) or named if isinstance(named, str) else ""
    for pattern, word in _SPELLINGS:
        text = pattern.sub(word, text)
    # A stranger's text: it may be long, and hold what a terminal obeys.
    return printable(text.strip())[:40] or "Model"


def parameters_text(n: int) -> str:
    """Return a number of parameters as names of models have it.

    Example:
        >>> [parameters_text(n) for n in (8_030_261_248, 1_235_814_400, 12_345_678, 671_026_419_200, 512)]
        ['8B', '1.2B', '12M', '671B', '512']
    """
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if n >= size:
            # One digit after the point below 10, and none where that is 0.
            return f"{n / size:.0f}{unit}" if n >= 9.95 * size else f"{n / size:.1f}{unit}".replace(".0", "")
    return str(n)


def storage_word(storage: Storage) -> str:
    """Return a storage in a word or two: ``bf16``, ``FP8``, ``GPTQ 4-bit``.

    Example:
        >>> from lora_merge.core.weight import Storage
        >>> storage_word(Storage("dense", "BF16")), storage_word(Storage("gptq", "I32", (("bits", 4), ("group", 64))))
        ('bf16', 'GPTQ 4-bit')
    """
    if storage.is_dense:
        return DTYPE_WORDS.get(storage.dtype, storage.dtype.lower())
    name, *more = describe(storage).split(", ")
    bits = [word.split()[0] for word in more if word.endswith(" bits")]
    return f"{name} {bits[0]}-bit" if bits else name


def _by_size(weights: Iterable[Weight], targets: Mapping[str, Storage] | None = None) -> Counter[Storage]:
    """Return how many values are stored in which way, of weights that are matrices; of others where there are none."""
    held = [one for one in weights if one.holds_floats]
    matrices = [one for one in held if len(one.shape) > 1] or held
    found: Counter[Storage] = Counter()
    for one in matrices:
        found[(targets or {}).get(one.name, one.storage)] += math.prod(one.shape)
    return found


def _storage_words(sizes: Counter[Storage]) -> str:
    """Return the storage of a model's weights; of a quantised one, that of the quantised weights."""
    words: Counter[str] = Counter()
    for storage, n in sizes.items():
        words[storage_word(storage)] += n
    quantised = {storage_word(storage) for storage in sizes if not storage.is_dense}
    ordered = [word for word, _ in words.most_common()]
    kept = [word for word in ordered if word in quantised] or ordered[:1]
    return listing(kept, 2) if kept else "no weights"


def _output_words(base: Checkpoint, plan: MergePlan) -> str:
    targets = {step.name: step.op.target for step in plan.steps if isinstance(step.op, Merge)}
    sizes = _by_size(base.parameters().values(), targets)
    words = _storage_words(sizes)
    if all(storage.is_dense for storage in sizes):
        return f"dense {words}"
    was_coded = {name for name, weight in base.weights.items() if not weight.storage.is_dense}
    dense = {storage_word(one) for name, one in targets.items() if one.is_dense and name in was_coded}
    return " + ".join((words, *sorted(dense)))


def _changes_words(uses: Sequence[AdapterUse], plan: MergePlan) -> str:
    """Return what all adapters are, and how many modules they change together."""
    merges = [step.op for step in plan.steps if isinstance(step.op, Merge)]
    deltas = [delta for op in merges for delta in op.deltas]
    own = [[delta for delta in deltas if delta.adapter == n] for n in range(len(uses))]
    named = [
        _weighted(_method_words(use.adapter, found), use.weight) for use, found in zip(uses, own, strict=True)
    ]
    words = " + ".join(named) if len(named) <= _LISTED else f"{len(named)} adapters"
    how = {COMBINATION_NAMES[op.combination.method] for op in merges if op.combination is not None}
    words += f" by {listing(sorted(how))}" if how else ""
    n_modules = len({_module_of(delta) for delta in deltas})
    n_whole = sum(step.replaced for step in plan.steps)
    on = [counted(n_modules, "module")] * bool(n_modules) + [counted(n_whole, "whole tensor")] * bool(n_whole)
    return f"{words} on {' and '.join(on)}" if n_modules else " and ".join(on) or words


def _weighted(words: str, weight: float) -> str:
    return words if weight == 1 else f"{weight:g} × {words}"


def _method_words(adapter: Adapter, deltas: Sequence[Delta | PlacedDelta]) -> str:
    """Return the method and the rank: ``LoRA r16``, ``DoRA r8-64``, ``LoKr``."""
    kind = adapter.kind if adapter.config.get("peft_type") else "LORA"
    told = next((delta.facts.method_key for delta in deltas if delta.facts.method_key), "")
    if told or adapter.config.get("use_dora") is True:
        kind = told or "DORA"
    elif kind == "LORA" and adapter.config.get("use_rslora") is True:
        kind = "RSLORA"
    ranks = [delta.rank for delta in deltas if delta.rank]
    return f"{printable(method_name(kind))}{ranks_text(ranks)}"


def _module_of(delta: Delta | PlacedDelta) -> str:
    parameter = delta.target if isinstance(delta, PlacedDelta) else delta.parameter
    return parameter.removesuffix(".weight").removesuffix(".bias")
