"""Whole parameters that trainers leave in files beside an adapter's own.

LLaVA's trainer and those made after it write ``non_lora_*.bin``, ms-swift ``vit.safetensors`` and ``extra_states/``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lora_merge.adapters.non_finite import non_finite
from lora_merge.adapters.spelling import canonical
from lora_merge.core.adapter import Replacement
from lora_merge.core.checkpoint import ADAPTER_CONFIG
from lora_merge.core.report import Issue, error, note
from lora_merge.errors import CheckpointError
from lora_merge.formats.repo_files import ADAPTER_WEIGHTS, EXTRA_FOLDER, VISION_WEIGHTS
from lora_merge.formats.trainer_files import LOAD_AFTER, described, trained_beside
from lora_merge.formats.weight_files import reader_of
from lora_merge.peft_rules.hints import OTHER_CONFIG
from lora_merge.peft_rules.patterns import TargetError, patterns_of
from lora_merge.storage.small_files import read_json
from lora_merge.words import counted, quoted

if TYPE_CHECKING:
    from collections.abc import Collection

    from lora_merge.core.tensor import TensorRef

_WRAPPER = re.compile(r"^(?:module\.)?base_model\.(?:model\.)?|^module\.")
"""What PEFT and ``DistributedDataParallel`` put before the names of a model's own parameters."""


@dataclass(slots=True)
class Saved:
    """Whole parameters in files beside an adapter, and what is wrong with them."""

    replacements: dict[str, Replacement] = field(default_factory=dict)
    issues: list[Issue] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    """Where it was read from."""

    def add(self, path: Path, label: str, patterns: list[str] | None = None) -> None:
        """Read the whole parameters of one file into the replacements and issues.

        Args:
            path: the file.
            label: what to call it.
            patterns: each name must match one of these regexes; None where they are not known.

        Raises:
            CheckpointError: the file is broken.
        """
        stored = reader_of(path.name)(path, str(path)).tensors
        self.files.append(path)
        refs, issues = canonical(stored, label)
        # A note on spelling would say the same as that of the adapter's own file.
        self.issues += [issue for issue in issues if issue.severity == "error"] + non_finite(refs)
        self.issues += _unasked(stored, patterns) + _empty(refs, label)
        for parameter, ref in _parameters(tuple(ref for ref in refs if 0 not in ref.shape)):
            if ".lora_" in parameter:
                self.issues.append(
                    error("unexpected-tensor", ref.name, f"is not a whole parameter, and it is in {label}")
                )
            elif parameter in self.replacements:
                self.issues.append(
                    error("duplicate-tensor", ref.name, f"is both in {self.files[0].name} and in {label}")
                )
            else:
                self.replacements[parameter] = Replacement(ref, "saved")
        sentence = f"replaces {counted(len(refs), 'parameter')} of the base"
        if not refs:
            sentence = "contains no tensors: only the LoRA was trained"
        self.issues.append(note("saved-beside", label, sentence))


def saved_beside(root: Path, ignored: Collection[str] = ()) -> Saved:
    """Return the whole parameters that were trained along with an adapter and saved in files beside it.

    Args:
        root: the adapter's folder.
        ignored: files in it that the user wants left out.

    Raises:
        ResolveError: a file is broken.

    References:
        ``get_peft_state_non_lora_maybe_zero_3`` in LLaVA's ``llava/train/train.py`` (1.2), which the trainers of
        Qwen-VL, Phi-3-Vision, Bunny, MoE-LLaVA and VideoLLaMA took over;
        ``swift.tuner_plugin.lora_llm.LoRALLMTuner`` and ``swift.tuners.base.SwiftModel.save_pretrained``
        (ms-swift 4.6.0).
    """
    saved = Saved()
    for name in trained_beside([path.name for path in root.iterdir() if path.is_file()], ignored):
        try:
            saved.add(root / name, name)
        except CheckpointError as exc:
            # Not raised: the folder may have more faults, and the file can be left out with --ignore-file.
            saved.issues.append(error("unread-file", name, f"cannot be read: {exc}", described(name)[1]))
    if (root / VISION_WEIGHTS).is_file() and VISION_WEIGHTS not in ignored:
        saved.add(root / VISION_WEIGHTS, VISION_WEIGHTS)
    # ms-swift puts the folder beside the adapter's files, or beside the adapter's own folder.
    folder = next(
        (path for path in (root / EXTRA_FOLDER, root.parent / EXTRA_FOLDER) if _is_extra(path)), None
    )
    label = f"{EXTRA_FOLDER}/{ADAPTER_WEIGHTS}"
    if folder is None or label in ignored:
        return saved
    config = read_json(folder / ADAPTER_CONFIG)
    if not (folder / ADAPTER_WEIGHTS).is_file():
        sentence = f"names extra states, and {label} does not exist"
        hint = "save or download the adapter again: it is incomplete (ms-swift reads only safetensors)"
        saved.issues.append(error("missing-module", f"{EXTRA_FOLDER}/{ADAPTER_CONFIG}", sentence, hint))
        return saved
    try:
        saved.add(folder / ADAPTER_WEIGHTS, label, _patterns(config.get("extra_state_keys")))
    except TargetError as exc:
        saved.issues.append(exc.issue)
    return saved


def _parameters(refs: tuple[TensorRef, ...]) -> list[tuple[str, TensorRef]]:
    """Return whole parameters under their names in the model, without what trainers put before them."""
    names = [_WRAPPER.sub("", ref.name).replace(".base_layer.", ".") for ref in refs]
    # The trainers' own loaders take one ``model.`` off every name where one begins with two.
    if any(name.startswith("model.model.") for name in names):
        names = [name.removeprefix("model.") for name in names]
    return list(zip(names, refs, strict=True))


def _empty(refs: tuple[TensorRef, ...], label: str) -> list[Issue]:
    """Return an issue when tensors have no values."""
    # DeepSpeed ZeRO-3 keeps each process's part elsewhere, and leaves empty tensors.
    empty = [ref for ref in refs if 0 in ref.shape]
    if not empty:
        return []
    sentence = (
        f"{len(empty)} of its {len(refs)} tensors have no values (the first is {empty[0].name}): DeepSpeed "
        "ZeRO-3"
    )
    hint = f"gather them with python zero_to_fp32.py FOLDER OUTPUT; {LOAD_AFTER}"
    return [error("sharded-state", label, sentence, hint)]


def _is_extra(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file()


def _patterns(value: object) -> list[str]:
    """Return the regexes of ``extra_state_keys``, which compile.

    Raises:
        TargetError: the value is not a list of texts, or one does not compile.
    """
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise TargetError("extra_state_keys", f"is {quoted(value)}, expected a list of regular expressions")
    patterns_of("extra_state_keys", tuple(value), "whole").check()
    return value


def _unasked(refs: tuple[TensorRef, ...], patterns: list[str] | None) -> list[Issue]:
    """Return an issue for each tensor that no regex matches; none where no regexes are known."""
    if patterns is None:
        return []
    meant = patterns_of("extra_state_keys", tuple(patterns), "whole")
    strays = [ref.name for ref in refs if not meant.matching(ref.name)]
    hint = OTHER_CONFIG
    return [
        error("unexpected-tensor", name, "is an extra state, and extra_state_keys does not match it", hint)
        for name in strays
    ]
