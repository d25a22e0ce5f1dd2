"""Whole parameters that ms-swift leaves in files beside an adapter's own: ``vit.safetensors`` and ``extra_states/``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lora_merge.adapters.spelling import canonical
from lora_merge.adapters.values import non_finite
from lora_merge.core.adapter import Replacement
from lora_merge.core.kinds import PREFIX
from lora_merge.core.patterns import TargetError, compile_pattern, full_match
from lora_merge.core.report import Issue, error, note
from lora_merge.io.files import read_json
from lora_merge.io.needed import ADAPTER_CONFIG, ADAPTER_WEIGHTS, EXTRA_FOLDER, VISION_WEIGHTS
from lora_merge.io.safetensors import read_header

if TYPE_CHECKING:
    from lora_merge.core.tensor import TensorRef


@dataclass(slots=True)
class Saved:
    """What stands beside an adapter."""

    replacements: dict[str, Replacement] = field(default_factory=dict)
    issues: list[Issue] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    """Where it was read from."""

    def add(self, path: Path, label: str, patterns: list[str] | None = None) -> None:
        """Read the whole parameters of one file.

        Args:
            path: the file.
            label: what to call it.
            patterns: regexes one of which each name must match, when they are known.

        Raises:
            CheckpointError: the file is broken.
        """
        stored = read_header(path).tensors
        self.files.append(path)
        refs, issues = canonical(stored, label)
        self.issues += [issue for issue in issues if issue.severity == "error"] + non_finite(refs)
        self.issues += _unasked(stored, patterns)
        for ref in refs:
            parameter = ref.name.removeprefix(PREFIX).replace(".base_layer.", ".")
            if ".lora_" in parameter:
                self.issues.append(
                    error("unexpected-tensor", ref.name, f"is no whole parameter, and stands in {label}")
                )
            elif parameter in self.replacements:
                self.issues.append(
                    error("duplicate-tensor", ref.name, f"stands in {self.files[0].name} and in {label}")
                )
            else:
                self.replacements[parameter] = Replacement(ref, "saved")
        sentence = f"holds {len(refs)} whole parameters; they take the place of the base's"
        self.issues.append(note("saved-beside", label, sentence))


def saved_beside(root: Path) -> Saved:
    """Return the whole parameters that ms-swift trained along with an adapter and saved beside it.

    Raises:
        ResolveError: a file is broken.

    Reference:
        ``swift.tuner_plugin.lora_llm.LoRALLMTuner`` and ``swift.tuners.base.SwiftModel.save_pretrained``
        (ms-swift 4.6.0).
    """
    saved = Saved()
    if (root / VISION_WEIGHTS).is_file():
        saved.add(root / VISION_WEIGHTS, VISION_WEIGHTS)
    folder = next(
        (path for path in (root / EXTRA_FOLDER, root.parent / EXTRA_FOLDER) if _is_extra(path)), None
    )
    if folder is None:
        return saved
    config = read_json(folder / ADAPTER_CONFIG)
    label = f"{EXTRA_FOLDER}/{ADAPTER_WEIGHTS}"
    if not (folder / ADAPTER_WEIGHTS).is_file():
        sentence = f"names extra states, and {label} is not there"
        hint = "the adapter is incomplete; ms-swift reads safetensors only"
        saved.issues.append(error("missing-module", f"{EXTRA_FOLDER}/{ADAPTER_CONFIG}", sentence, hint))
        return saved
    try:
        saved.add(folder / ADAPTER_WEIGHTS, label, _patterns(config.get("extra_state_keys")))
    except TargetError as exc:
        saved.issues.append(error("bad-field", exc.field, exc.sentence))
    return saved


def _is_extra(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file()


def _patterns(value: object) -> list[str]:
    """Return the regexes of ``extra_state_keys``.

    Raises:
        TargetError: they are none.
    """
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise TargetError("extra_state_keys", f"is {value!r}, expected a list of regular expressions")
    for pattern in value:
        compile_pattern("extra_state_keys", pattern)
    return value


def _unasked(refs: tuple[TensorRef, ...], patterns: list[str] | None) -> list[Issue]:
    """Return an issue for each tensor that no regex asks for."""
    if patterns is None:
        return []
    strays = [
        ref.name
        for ref in refs
        if not any(full_match("extra_state_keys", pattern, ref.name) for pattern in patterns)
    ]
    hint = "the config does not belong to these tensors"
    return [
        error("unexpected-tensor", name, "is an extra state that extra_state_keys does not match", hint)
        for name in strays
    ]
