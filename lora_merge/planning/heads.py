"""Heads that were trained on a model without them: what a classifier or a reward model adds to a language model.

transformers puts a new head on the base when training begins, with random values. The adapter carries it whole
(``modules_to_save``), so the merged checkpoint is one of the class with the head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lora_merge.core.checkpoint import INPUT_NAMES, OUTPUT_NAMES, ConfigPatch, owner_name, patched_config
from lora_merge.core.report import Issue, error, note
from lora_merge.core.tensor import shape_text
from lora_merge.layouts import LayoutError
from lora_merge.modeling.conversion import NOT_STORED, Conversion
from lora_merge.modeling.skeleton import TASK_MAPPINGS, class_for_task, meta_model
from lora_merge.planning.outline import Outline
from lora_merge.words import of_several

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_merge.core.adapter import Adapter
    from lora_merge.core.tensor import TensorRef
    from lora_merge.planning.model import Model

_MARK = 7919
"""A number of labels that no model has as a size (a prime), to find the parameters whose rows are labels."""


NOTHING_LOADED = "nothing-loaded"
"""Code of the issue of a head's class that takes nothing from the base; nothing else can be judged then."""

_TASK_ENDINGS = ("Classification", "QuestionAnswering", "RewardModel")
"""Endings of the names of classes with their own head."""


@dataclass(frozen=True, slots=True)
class Headed:
    """The base with the head's class: its tensors, the head's among them, and what changes in ``config.json``."""

    outline: Outline
    config_patch: Mapping[str, Any] = field(default_factory=dict)
    issues: tuple[Issue, ...] = ()


def with_head(adapters: Sequence[Adapter], model: Model) -> Headed | None:
    """Return the base with the head that an adapter brings; None where no adapter brings one that the base lacks.

    Args:
        adapters: of the merge.
        model: the base as it is.
    """
    lost = [issue for adapter in adapters for issue in _lost_head(adapter, model.config)]
    if lost:
        return Headed(model.outline, issues=tuple(lost))
    bringing = [adapter for adapter in adapters if _odd_parameters(adapter, model)]
    if not bringing:
        return None
    names = {_class_name(adapter, model.config) for adapter in bringing}
    # Adapters of two classes cannot be in one output; each parameter then gets its own issue.
    name = names.pop() if len(names) == 1 else None
    if name is None:
        return None
    head = _Head(name, bringing[0], model)
    return head.headed() if head.tensors else None


def _odd_parameters(adapter: Adapter, model: Model) -> dict[str, TensorRef]:
    """Return an adapter's trained parameters that the base does not store, or not in this shape; without embeddings."""
    return {
        parameter: replacement.ref
        for parameter, replacement in adapter.replacements.items()
        if replacement.why == "module" and owner_name(parameter) not in INPUT_NAMES | OUTPUT_NAMES
        if parameter not in model.sources or model.sources[parameter].shape != replacement.ref.shape
    }


def _lost_head(adapter: Adapter, config: Mapping[str, Any]) -> list[Issue]:
    """Return an issue when an adapter was trained with a head that neither it nor the base has."""
    task, base = str(adapter.config.get("task_type")), str((config.get("architectures") or [""])[0])
    # PEFT lists the head in modules_to_save by itself, under the names that most classes give it.
    is_trained = any(
        replacement.why == "module" and owner_name(parameter) not in INPUT_NAMES | OUTPUT_NAMES
        for parameter, replacement in adapter.replacements.items()
    )
    if is_trained or task not in TASK_MAPPINGS or not adapter.config.get("modules_to_save"):
        return []
    if base.endswith(_TASK_ENDINGS):
        return []
    sentence = (
        f"is {task}, the adapter file has no head, and the base has no head for it (its class: "
        f"{base or 'not named'})"
    )
    hint = (
        "save the base with its head and train again: the head had random values in the training, and they "
        "are lost"
    )
    return [error("no-head", "task_type", sentence, hint)]


def _class_name(adapter: Adapter, config: Mapping[str, Any]) -> str | None:
    """Return the class that an adapter was trained on, by its configuration; None where that does not say.

    PEFT writes ``auto_mapping`` where there is no ``task_type`` (``PeftModel.save_pretrained``, PEFT 0.21.2).
    """
    # PEFT writes auto_mapping only where there is no task_type.
    task, mapping = str(adapter.config.get("task_type")), adapter.config.get("auto_mapping")
    if task in TASK_MAPPINGS:
        return class_for_task(str(config.get("model_type")), task)
    return str(mapping.get("base_model_class") or "") or None if isinstance(mapping, dict) else None


def _patch(config: Mapping[str, Any], name: str, n_labels: int | None) -> dict[str, Any]:
    """Return what a class and a number of labels change in ``config.json``.

    Args:
        config: of the base.
        name: of the class.
        n_labels: None where the class has a fixed number, as for the two ends of an answer.
    """
    known = config.get("id2label")
    patch: dict[str, Any] = {"architectures": [name]}
    if n_labels is None:
        return patch
    # Labels that the base has names for are kept, if they are as many.
    if not (isinstance(known, dict) and len(known) == n_labels):
        patch["id2label"] = {str(n): f"LABEL_{n}" for n in range(n_labels)}
        patch["label2id"] = {f"LABEL_{n}": n for n in range(n_labels)}
    return patch | ({"num_labels": n_labels} if "num_labels" in config else {})


class _Head:
    """The head that one adapter brings to the base.

    Args:
        name: of the class with the head.
        adapter: which brings it.
        model: the base as it is.
    """

    def __init__(self, name: str, adapter: Adapter, model: Model) -> None:
        self._name, self._adapter, self._model = name, adapter, model
        # A class with a fixed number of labels refuses the mark, and has no rows that are labels.
        shapes = self._shapes(_MARK) or self._shapes(None)
        self._labels = {key for key, shape in shapes.items() if shape[:1] == (_MARK,)}
        """Parameters whose rows are labels."""
        self.tensors = {
            parameter: ref
            for parameter, ref in _odd_parameters(adapter, model).items()
            if parameter in self._labels or (parameter in shapes and self._is_absent(parameter, ref))
        }
        """Of the adapter: what the class has and the base has not, or not with these rows."""

    def _is_absent(self, parameter: str, ref: TensorRef) -> bool:
        """Return True when the base has no place for a parameter under any name."""
        try:
            return parameter not in self._model.sources and self._model.locate(parameter, ref.shape) is None
        # It has a place that cannot be used, and fitting says why.
        except LayoutError:
            return False

    def _shapes(self, n_labels: int | None) -> dict[str, tuple[int, ...]]:
        """Return the parameters of the class with so many labels → shapes; empty where it cannot be built."""
        built = meta_model(
            patched_config(self._model.config, ConfigPatch(_patch(self._model.config, self._name, n_labels)))
        )
        return {} if built is None else {key: tuple(value.shape) for key, value in built.state_dict().items()}

    def headed(self) -> Headed:
        """Return the base with the head, or with the issues that keep it from having one."""
        rows = {ref.shape[0] for parameter, ref in self.tensors.items() if parameter in self._labels}
        if len(rows) > 1:
            sentence = (
                f"{self._name} has one row per label, and the tensors of the adapter's head have different "
                f"numbers of rows: {sorted(rows)}"
            )
            return Headed(self._model.outline, issues=(error("bad-shape", min(self.tensors), sentence),))
        n_labels = rows.pop() if rows else None
        patch = _patch(self._model.config, self._name, n_labels)
        conversion = Conversion.of(patched_config(self._model.config, ConfigPatch(patch)))
        assert conversion is not None
        if not any(self._is_known(name, conversion) for name in self._model.sources):
            sentence = (
                "transformers would load none of the base's tensors into this class, so the adapter was "
                "trained on random weights"
            )
            return Headed(self._model.outline, issues=(error(NOTHING_LOADED, self._name, sentence),))
        outline, left_out = self._joined(conversion)
        issues = self._issues(conversion, outline, left_out)
        return Headed(outline, patch, tuple(issues))

    def _joined(self, conversion: Conversion) -> tuple[Outline, list[str]]:
        """Return the outline of the class with the head, and the names of the base that it does not use."""
        model = self._model
        known = {name: self._is_known(name, conversion) for name in model.sources}
        # The language model's own head, for example. What transformers never loads (MTP) stays as it is.
        left_out = [name for name, is_known in known.items() if not is_known and model.knows(name)]
        # A base without any head has no prefix on its names, and the class has one. transformers 4 adds it to all
        # tensors or to none.
        renamed = {
            name: conversion.renamed(name)
            for name, is_known in known.items()
            if is_known and conversion.renamed(name).endswith(f".{name}")
        }
        outline = model.outline.without({*left_out, *self.tensors}).renamed(renamed)
        return outline.with_new(self.tensors), left_out

    @staticmethod
    def _is_known(name: str, conversion: Conversion) -> bool:
        """Return True when the class takes in a stored tensor, under this name or after renaming."""
        return conversion.shape(conversion.canonical(name)[0]) is not None

    def _issues(self, conversion: Conversion, outline: Outline, left_out: Sequence[str]) -> list[Issue]:
        """Return a note on the head, and what is missing or left out."""
        missing = conversion.missing({name: ref.shape for name, ref in outline.sources.items()})
        hint = (
            "train again with this module in modules_to_save, or on a base saved with the head's class: it "
            "had random values in the training, and they are lost"
        )
        issues = [
            error(
                "no-head",
                parameter,
                f"{self._name} needs this parameter, and neither the base nor the adapter has it"
                + (f" ({why})" if why != NOT_STORED else ""),
                hint,
            )
            for parameter, why in missing.items()
        ]
        shapes = ", ".join(f"{name} {shape_text(ref.shape)}" for name, ref in self.tensors.items())
        said = f"the adapter has its own head ({shapes}): the output is a {self._name}"
        issues.append(note("head", min(self.tensors), said))
        if self._name.endswith("SequenceClassification") and self._model.config.get("pad_token_id") is None:
            sentence = "is not set in config.json; transformers needs it to classify several texts at once"
            issues.append(note("no-padding", "pad_token_id", sentence))
        if left_out:
            why = f"left out: {self._name} does not have"
            sentence = of_several(len(left_out), f"was {why} this parameter", f"were {why} these parameters")
            issues.append(note("left-out", left_out[0], sentence))
        return issues
