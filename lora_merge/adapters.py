"""Adapter formats: a directory → `Adapter`. One reader per format; `FORMATS` is the table of them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lora_merge.core.adapter import Adapter, DeltaSpec
from lora_merge.core.report import Issue, error, warning
from lora_merge.core.targets import TargetError, compile_pattern, matching_patterns
from lora_merge.core.tensor import TORCH_NAMES, TensorRef, shape_text
from lora_merge.errors import UnknownFormatError
from lora_merge.io.files import file_digest, read_json
from lora_merge.io.safetensors import blocks, read_header
from lora_merge.io.side_files import adapter_side_files

if TYPE_CHECKING:
    from pathlib import Path

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."

IGNORED_FIELDS = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
        "inference_mode", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_config",
        "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
        # written by ms-swift for its trainer
        "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr",
    }
)  # fmt: skip
"""Fields of a LoRA configuration that do not change what it computes (PEFT 0.21.2)."""

READ_FIELDS = frozenset(
    {
        "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules",
        "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "init_lora_weights",
        "bias",
    }
)  # fmt: skip

UNSUPPORTED_FIELDS: Mapping[str, str] = {
    "use_dora": "DoRA",
    "lora_bias": "a bias in lora_B (lora_bias)",
    "modules_to_save": "fully trained modules (modules_to_save)",
    "trainable_token_indices": "trainable tokens (trainable_token_indices)",
    "target_parameters": "LoRA on parameters (target_parameters)",
    "layer_replication": "replicated layers (layer_replication)",
    "use_bdlora": "BD-LoRA",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
}
"""Fields that mean a kind of adapter which is not merged yet, and what to call it."""

UNMERGEABLE_FIELDS: Mapping[str, str] = {
    "alora_invocation_tokens": "aLoRA acts only after its invocation tokens",
    "arrow_config": "Arrow routes between adapters token by token",
    "use_qalora": "a QA-LoRA delta belongs to a quantised weight",
}
"""Fields that mean a kind of adapter which has no merged form, and why."""

_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")

NOT_IN_WEIGHTS: Mapping[str, str] = {
    "PROMPT_TUNING": "it learns prompt vectors",
    "MULTITASK_PROMPT_TUNING": "it learns prompt vectors",
    "P_TUNING": "it learns prompt vectors",
    "PREFIX_TUNING": "it learns keys and values",
    "CPT": "it learns prompt vectors",
    "CARTRIDGE": "it learns keys and values",
    "ADAPTION_PROMPT": "it learns prompts inside the attention",
    "XLORA": "a router mixes its experts token by token",
    "POLY": "a router mixes its experts by task",
    "LILY": "a router mixes its experts token by token",
    "SHADOW": "it runs a second network beside the model",
}
"""PEFT types that no change of weights can express, and why."""

_Pairs = dict[str, dict[str, TensorRef]]

_PAIR = re.compile(r"^(?P<module>.+)\.lora_(?P<role>[AB])(?:\.default)?\.weight$")

_FULL = re.compile(r"^(?P<module>(?:(?!\.lora_).)+?)(?:\.base_layer)?\.(?P<kind>weight|bias)$")
"""A whole parameter, trained or saved along (PEFT's ``save_embedding_layers`` does so by itself)."""

_OTHER_TENSORS: tuple[tuple[str, str], ...] = (
    (r"\.lora_magnitude_vector(\.|$)", "a DoRA magnitude"),
    (r"\.lora_embedding_[AB]$", "LoRA on an embedding"),
    (r"\.lora_B\.bias$", "a bias of lora_B"),
    (r"\.lora_diag$", "a KaSA diagonal"),
    (r"\.lora_E$", "an AdaLoRA diagonal"),
    (r"\.lora_[AB]\.[^.]+\.weight$", "of an adapter that has a name of its own"),
    (r"\.lora_[AB]$", "LoRA on a parameter, or AdaLoRA"),
    (r"\.trainable_tokens_delta$", "trained token rows"),
)
"""What a tensor is that is no A or B of a linear layer."""

_NON_FINITE_BITS: Mapping[str, tuple[str, int]] = {
    "BF16": ("<u2", 0x7F80), "F16": ("<u2", 0x7C00), "F32": ("<u4", 0x7F800000),
}  # fmt: skip
"""Storage type and exponent mask: a value with every exponent bit set is NaN or infinite."""


def read(root: Path) -> Adapter:
    """Return the adapter in a directory.

    Raises:
        UnknownFormatError: no format matches.
        ResolveError: its files are broken.
    """
    for reader in FORMATS.values():
        adapter = reader(root)
        if adapter is not None:
            return adapter
    found = sorted(path.name for path in root.iterdir())
    raise UnknownFormatError(str(root), found, [f"{CONFIG_FILE} and {WEIGHTS_FILE}"])


def read_peft(root: Path) -> Adapter | None:
    """Return a PEFT adapter, or None when the directory holds none.

    The tensors say what is changed; the configuration gives the scale and is checked against them. What
    is wrong is collected in ``issues``, not raised.
    """
    if not ((root / CONFIG_FILE).is_file() and (root / WEIGHTS_FILE).is_file()):
        return None
    config = read_json(root / CONFIG_FILE)
    file = read_header(root / WEIGHTS_FILE)
    issues = _kind_issues(config)
    deltas: tuple[DeltaSpec, ...] = ()
    pairs: _Pairs = {}
    full: dict[str, TensorRef] = {}
    if config.get("peft_type") == "LORA":
        pairs, full, tensor_issues = _sort_out(file.tensors)
        deltas, scale_issues = _scaled(pairs, config)
        issues += _field_issues(config) + tensor_issues + scale_issues + _non_finite(file.tensors)
    return Adapter(
        root=str(root),
        format="peft",
        config=config,
        deltas=deltas,
        modules=frozenset(pairs),
        issues=tuple(issues),
        digest=file_digest(root / WEIGHTS_FILE),
        full_tensors=full,
        side_files=adapter_side_files(root),
    )


FORMATS: Mapping[str, Callable[[Path], Adapter | None]] = {"peft": read_peft}


def _kind_issues(config: Mapping[str, Any]) -> list[Issue]:
    """Return an issue for each kind of adapter that is asked for and not merged."""
    kind = str(config.get("peft_type"))
    if kind in NOT_IN_WEIGHTS:
        sentence = f"a {kind} adapter cannot be merged: {NOT_IN_WEIGHTS[kind]}, which no weight can hold"
        return [error("unsupported", "peft_type", sentence, "serve it with PEFT")]
    if kind != "LORA":
        sentence = f"{kind!r} adapters are not merged by this version, only LORA"
        return [error("unsupported", "peft_type", sentence, "merge it with PEFT's merge_and_unload()")]
    issues = [
        error("unsupported", field, f"{name}: not merged by this version", "merge it with PEFT")
        for field, name in UNSUPPORTED_FIELDS.items()
        if config.get(field)
    ]
    issues += [
        error("unsupported", field, f"{why}: it has no merged form", "serve it with PEFT")
        for field, why in UNMERGEABLE_FIELDS.items()
        if config.get(field)
    ]
    if config.get("bias", "none") != "none":
        issues.append(
            error(
                "unsupported", "bias", f"is {config['bias']!r}: trained biases are not merged by this version"
            )
        )
    if config.get("init_lora_weights", True) not in _PLAIN_INITS:
        init = config["init_lora_weights"]
        sentence = f"is {init!r}, which changes the base's weights before training"
        hint = "merging it needs to know which base it belongs to; this version merges plain inits only"
        issues.append(error("unsupported", "init_lora_weights", sentence, hint))
    return issues


def _field_issues(config: Mapping[str, Any]) -> list[Issue]:
    """Return an issue for each field that is unknown: PEFT drops those, whatever they mean."""
    known = IGNORED_FIELDS | READ_FIELDS | UNSUPPORTED_FIELDS.keys() | UNMERGEABLE_FIELDS.keys()
    issues = []
    for field, value in config.items():
        if field in known:
            continue
        sentence = f"is {value!r}, and PEFT 0.21 knows no such field"
        if value:
            hint = (
                "it may change what the adapter computes; remove it from adapter_config.json if it does not"
            )
            issues.append(error("unknown-field", field, sentence, hint))
        else:
            issues.append(warning("unknown-field", field, sentence))
    return issues


def _sort_out(refs: tuple[TensorRef, ...]) -> tuple[_Pairs, dict[str, TensorRef], list[Issue]]:
    """Return ``{module: {"A": …, "B": …}}``, whole parameters by name, and an issue for all else."""
    pairs: _Pairs = {}
    full: dict[str, TensorRef] = {}
    issues = []
    outside = [ref.name for ref in refs if not ref.name.startswith(PREFIX)]
    for ref in refs:
        name = ref.name.removeprefix(PREFIX)
        if name == ref.name:
            continue
        if match := _PAIR.match(name):
            home, place, what = pairs.setdefault(match["module"], {}), match["role"], f"lora_{match['role']}"
        elif match := _FULL.match(name):
            home, place, what = full, f"{match['module']}.{match['kind']}", match["kind"]
        else:
            issues.append(_other_tensor(ref))
            continue
        if place in home:
            issues.append(error("duplicate-tensor", ref.name, f"is a second {what} of its module"))
        home.setdefault(place, ref)
    if outside:
        many = f"{len(outside)} of {len(refs)} tensors lack the prefix {PREFIX}"
        hint = "PEFT would load none of these; rename them, or save the adapter with PEFT"
        issues.append(error("wrong-prefix", outside[0], many, hint))
    if not refs:
        issues.append(error("empty", WEIGHTS_FILE, "holds no tensors"))
    return pairs, full, issues


def _other_tensor(ref: TensorRef) -> Issue:
    name = next((what for pattern, what in _OTHER_TENSORS if re.search(pattern, ref.name)), None)
    if name is None:
        return error("unexpected-tensor", ref.name, "is no tensor of a LoRA adapter")
    return error(
        "unexpected-tensor", ref.name, f"is {name}: not merged by this version", "merge it with PEFT"
    )


def _scaled(
    pairs: Mapping[str, Mapping[str, TensorRef]], config: Mapping[str, Any]
) -> tuple[tuple[DeltaSpec, ...], list[Issue]]:
    """Return a delta for each pair that can be multiplied, with its scale, and what is wrong with the pairs.

    A pair that disagrees with the configuration is still a delta, so that planning can judge the rest of it.
    """
    issues: list[Issue] = []
    try:
        scaling = _Scaling(config)
    except TargetError as exc:
        return (), [error("bad-field", exc.field, exc.sentence)]
    deltas = []
    for module, pair in pairs.items():
        problem = _pair_problem(module, pair)
        if problem is not None:
            issues.append(problem)
            continue
        rank, ambiguous = scaling.rank(module)
        alpha, ambiguous_alpha = scaling.alpha(module)
        found = pair["A"].shape[0]
        issues += ambiguous + ambiguous_alpha
        if found != rank and not ambiguous:
            sentence = f"has rank {found}, the config says {rank} (r and rank_pattern)"
            hint = "the config does not belong to these tensors"
            issues.append(error("rank-mismatch", module, sentence, hint))
        scale = alpha / (math.sqrt(rank) if scaling.rslora else rank)
        deltas.append(DeltaSpec("low_rank", f"{module}.weight", dict(pair), scale))
    return tuple(deltas), issues + scaling.unmatched(frozenset(pairs))


def _pair_problem(module: str, pair: Mapping[str, TensorRef]) -> Issue | None:
    """Return what keeps an A and a B from being multiplied."""
    for have, lack in (("A", "B"), ("B", "A")):
        if lack not in pair:
            hint = "the adapter file is incomplete; PEFT would merge noise or nothing here"
            return error(f"missing-{lack}", module, f"has lora_{have} and no lora_{lack}", hint)
    a, b = pair["A"], pair["B"]
    shapes = f"lora_A is {shape_text(a.shape)}, lora_B is {shape_text(b.shape)}"
    if len(a.shape) != 2 or len(b.shape) != 2:
        sentence = f"{shapes}: LoRA on convolutions is not merged by this version"
        return error("unsupported", module, sentence, "merge it with PEFT")
    if a.shape[0] != b.shape[1] or a.shape[0] == 0:
        return error("bad-shape", module, f"{shapes}, expected (r, in) and (out, r) of one rank r > 0")
    for ref in (a, b):
        if ref.dtype not in TORCH_NAMES:
            return error("bad-dtype", ref.name, f"is stored as {ref.dtype}, expected BF16, F16 or F32")
    return None


class _Scaling:
    """The rank and alpha of each module, by a configuration.

    Raises:
        TargetError: a field has a value that PEFT could not use.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._default_rank = _number(config, "r", 8)
        self._default_alpha = _number(config, "lora_alpha", 8)
        self._ranks = _pattern_table(config, "rank_pattern")
        self._alphas = _pattern_table(config, "alpha_pattern")
        self.rslora = bool(config.get("use_rslora"))

    def rank(self, module: str) -> tuple[float, list[Issue]]:
        """Return the rank of a module, or an issue when two patterns disagree about it."""
        return self._lookup("rank_pattern", self._ranks, module, self._default_rank)

    def alpha(self, module: str) -> tuple[float, list[Issue]]:
        """Return the alpha of a module, or an issue when two patterns disagree about it."""
        return self._lookup("alpha_pattern", self._alphas, module, self._default_alpha)

    @staticmethod
    def _lookup(
        field: str, table: Mapping[str, float], module: str, default: float
    ) -> tuple[float, list[Issue]]:
        matching = matching_patterns(table, module)
        if len(set(matching.values())) > 1:
            listed = ", ".join(f"{key!r}: {value:g}" for key, value in matching.items())
            sentence = f"{field} gives it several values ({listed})"
            hint = "saving sorted the patterns, so which came first in training is lost: keep the right one"
            return default, [error("ambiguous-pattern", module, sentence, hint)]
        return next(iter(matching.values()), default), []

    def unmatched(self, modules: frozenset[str]) -> list[Issue]:
        """Return an issue for each pattern that no module answers to."""
        return [
            error("unmatched-pattern", field, f"{key!r} matches none of the adapter's {len(modules)} modules")
            for field, table in (("rank_pattern", self._ranks), ("alpha_pattern", self._alphas))
            for key in table
            if not any(matching_patterns({key: 0}, module) for module in modules)
        ]


def _number(config: Mapping[str, Any], field: str, default: float) -> float:
    value = config.get(field, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TargetError(field, f"is {value!r}, expected a number")
    if field == "r" and value <= 0:
        raise TargetError(field, f"is {value!r}, expected a positive number")
    return value


def _pattern_table(config: Mapping[str, Any], field: str) -> dict[str, float]:
    table = config.get(field) or {}
    if not isinstance(table, dict):
        raise TargetError(field, f"is {table!r}, expected a table of pattern → number")
    for key in table:
        compile_pattern(field, f"(.*\\.)?({key})$")
    return {key: _number(table, key, 0) for key in table}


def _non_finite(refs: tuple[TensorRef, ...]) -> list[Issue]:
    """Return an issue for each tensor that holds NaN or infinity. Reads every value once."""
    import numpy as np

    issues = []
    for ref in refs:
        if ref.dtype not in _NON_FINITE_BITS:
            continue
        storage, mask = _NON_FINITE_BITS[ref.dtype]
        count = sum(
            int(np.count_nonzero((np.frombuffer(block, storage) & mask) == mask)) for block in blocks(ref)
        )
        if count:
            sentence = f"holds {count} values that are NaN or infinite"
            issues.append(
                error("non-finite", ref.name, sentence, "the training diverged; use an earlier checkpoint")
            )
    return issues
