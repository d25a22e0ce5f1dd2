"""ms-swift's own adapters: ``adapter_config.json`` with a ``swift_type``, as a ``SwiftModel`` saves them.

Its LoRA is PEFT's with other names: without ``base_model.model.``, and with the adapter's name.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lora_merge.adapters.directory import assemble
from lora_merge.adapters.peft import read_tensors
from lora_merge.adapters.spelling import canonical
from lora_merge.core.adapter import Adapter
from lora_merge.core.checkpoint import ADAPTER_CONFIG
from lora_merge.core.report import Issue, error
from lora_merge.errors import CheckpointError
from lora_merge.formats.repo_files import ADAPTER_WEIGHTS, TRAINING_ARGUMENTS
from lora_merge.formats.safetensors import read_header
from lora_merge.peft_rules.kinds import PREFIX, check_types
from lora_merge.storage.small_files import read_json
from lora_merge.words import quoted

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

OTHER_TUNERS: Mapping[str, str] = {
    "ADAPTER": "its bottleneck layers have an activation in between, which weights cannot express",
    "PROMPT": "it learns prompt vectors, which weights cannot express",
    "SIDE": "it runs a second network next to the model, which weights cannot express",
    "RESTUNING": "it runs a second network next to the model, which weights cannot express",
    "longlora": "it was trained with attention over groups of tokens, and has its own embeddings and norms",
    "NEFTUNE": "it only adds noise in training, so there is nothing to merge",
    "LLAMAPRO": "it adds layers to the model",
    "SCETuning": "it changes the layers' outputs with an activation in between, which weights cannot express",
    "part": "it runs second copies of some modules instead of the originals",
    "REFT": "it changes hidden states at chosen tokens, which weights cannot express",
}
"""Values of ``swift_type`` that are not LoRA, and why they are not merged (ms-swift 4.6.0, ``swift.tuners.mapping``)."""

_OWN_FIELDS = frozenset(
    {"swift_type", "model_key_mapping", "has_additional_modules", "enable_lora", "group_size"}
)
"""Fields that PEFT does not have. They change nothing unless one of `_UNMERGEABLE` is set."""

_UNMERGEABLE = {
    "use_merged_linear": "its factors belong to parts of a fused layer, selected by enable_lora",
    "use_qa_lora": "a QA-LoRA delta belongs to a quantised weight",
}


def read_swift(root: Path, ignored: Collection[str] = ()) -> Adapter | None:
    """Return an adapter of ms-swift's own, or None when the directory holds none.

    Args:
        root: the directory.
        ignored: files in it that the user wants left out.

    Raises:
        ResolveError: its files are broken.

    Reference:
        ``swift.tuners.base.SwiftModel.save_pretrained`` and ``swift.tuners.lora.LoRAConfig`` (ms-swift 4.6.0).
    """
    if not (root / ADAPTER_CONFIG).is_file():
        return None
    config = read_json(root / ADAPTER_CONFIG)
    if "swift_type" not in config:
        return None
    kind = config["swift_type"]
    if kind != "LORA":
        return _refused(root, config, kind)
    if not (root / ADAPTER_WEIGHTS).is_file():
        hint = "ms-swift reads safetensors only; save the adapter with safe_serialization=True"
        raise CheckpointError(str(root), "", f"has no {ADAPTER_WEIGHTS}", hint=hint)
    issues = [
        error("unsupported", name, f"{why}: it cannot be merged here", "merge it with ms-swift")
        for name, why in _UNMERGEABLE.items()
        if config.get(name)
    ]
    issues += _pattern_issues(config)
    refs, spelling = canonical(
        (
            # ms-swift leaves PEFT's prefix out.
            ref if ref.name.startswith(PREFIX) else replace(ref, name=f"{PREFIX}{ref.name}")
            for ref in read_header(root / ADAPTER_WEIGHTS).tensors
        ),
        ADAPTER_WEIGHTS,
    )
    issues += spelling
    plain = _as_peft(root, config)
    check_types(plain, str(root / ADAPTER_CONFIG))
    content = read_tensors(refs, plain, issues)
    return assemble((root / ADAPTER_WEIGHTS,), "ms-swift", plain, content, issues, ignored)


def _refused(root: Path, config: Mapping[str, Any], kind: object) -> Adapter:
    """Return an adapter without tensors whose one issue says why its kind is not merged."""
    sentence = f"is {quoted(kind)}, which is not a tuner of ms-swift 4"
    if isinstance(kind, str) and kind in OTHER_TUNERS:
        sentence = f"a {kind} adapter of ms-swift cannot be merged: {OTHER_TUNERS[kind]}"
    issue = error("unsupported", "swift_type", sentence, "serve it with ms-swift")
    return Adapter(
        str(root), "ms-swift", {**config, "peft_type": str(kind)}, (), frozenset(), (issue,), digest=""
    )


def _pattern_issues(config: Mapping[str, Any]) -> list[Issue]:
    """Return an issue for each pattern table that is set."""
    # ms-swift looks up both tables under the first key of either that matches.
    sentence = "is set, and ms-swift uses a different rule from PEFT to find a module's entry"
    hint = "convert the adapter with Swift.save_to_peft_format, if the patterns mean what they mean in PEFT"
    fields = ("rank_pattern", "alpha_pattern")
    return [error("unsupported", name, sentence, hint) for name in fields if config.get(name)]


def _as_peft(root: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return PEFT's configuration of a LoRA of ms-swift."""
    plain = {name: value for name, value in config.items() if name not in _OWN_FIELDS | _UNMERGEABLE.keys()}
    plain["peft_type"] = "LORA"
    if not plain.get("base_model_name_or_path"):
        # The base is named by the arguments that the training was called with.
        plain["base_model_name_or_path"] = _trained_on(root)
    return plain


def _trained_on(root: Path) -> str | None:
    """Return the base that the training's arguments name, in the adapter's folder or the one above; None if none
    does.
    """
    for folder in (root, root.parent):
        if (folder / TRAINING_ARGUMENTS).is_file():
            arguments = read_json(folder / TRAINING_ARGUMENTS)
            named = arguments.get("model_dir") or arguments.get("model")
            return named if isinstance(named, str) else None
    return None
