"""A base and what a training made of it → the modules of a LoRA that says the same, as nearly as a rank allows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lora_merge.core.checkpoint import INPUT_NAMES, OUTPUT_NAMES, Checkpoint, config_levels
from lora_merge.core.kinds import PREFIX
from lora_merge.core.lora import Difference, Form, LoraModule, nested
from lora_merge.core.report import Issue, error, warning
from lora_merge.core.targets import is_listed
from lora_merge.core.tensor import TORCH_NAMES, TensorRef, shape_text
from lora_merge.words import of_several

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from lora_merge.core.skeleton import Skeleton

_LINEAR = frozenset({"Linear", "Conv1D"})
_CONVOLUTIONS = frozenset({"Conv1d", "Conv2d", "Conv3d"})


@dataclass(slots=True)
class Extraction:
    """What will be written."""

    modules: list[LoraModule] = field(default_factory=list)
    whole: dict[str, TensorRef] = field(default_factory=dict)
    """By name in a PEFT file."""

    config: dict[str, Any] = field(default_factory=dict)
    """What the configuration says beside ranks and targets."""

    issues: list[Issue] = field(default_factory=list)


def misfits(base: Checkpoint, tuned: Checkpoint) -> list[Issue]:
    """Return what shows that one model is no training of the other."""
    before, after = base.by_name(), tuned.by_name()
    issues = []
    strange = sorted(after.keys() - before.keys())
    if strange:
        where = f"in {tuned.root} and not in the base"
        sentence = of_several(len(strange), f"is {where}", f"are {where}")
        hint = "save both with the same release of transformers, or pass the base that was trained"
        issues.append(error("unexpected-tensor", strange[0], sentence, hint))
    for name in sorted(before.keys() & after.keys()):
        if before[name].shape != after[name].shape:
            sentence = f"is {shape_text(after[name].shape)}, the base's is {shape_text(before[name].shape)}"
            hint = "no adapter can resize a weight: pass the base that was trained, resized as it was"
            issues.append(error("shape-mismatch", name, sentence, hint))
        elif (
            before[name].dtype != after[name].dtype
            and not {before[name].dtype, after[name].dtype} <= TORCH_NAMES.keys()
        ):
            sentence = f"is stored as {after[name].dtype}, the base's as {before[name].dtype}; expected BF16, F16 or F32"
            issues.append(error("bad-dtype", name, sentence))
    missing = sorted(before.keys() - after.keys())
    if missing and not strange:
        where = f"in the base and not in {tuned.root}: taken as unchanged"
        sentence = of_several(len(missing), f"is {where}", f"are {where}")
        issues.append(warning("missing-tensor", missing[0], sentence))
    return issues


def extracted(
    base: Checkpoint,
    tuned: Checkpoint,
    changed: Collection[str],
    known: Skeleton | None,
    *,
    targets: tuple[str, ...] = (),
    save_modules: bool = False,
) -> Extraction:
    """Return the modules of a LoRA, and what is carried whole or lost.

    Args:
        base: what was trained.
        tuned: what came of it.
        changed: names of the tensors that differ.
        known: the module tree; None where transformers has no class for the model.
        targets: ends of the paths of the modules to take; empty: all that LoRA can hold.
        save_modules: carry the rest whole.
    """
    found = Extraction(config=_config(base))
    before, after = base.by_name(), tuned.by_name()
    rest = []
    for name in sorted(changed):
        module = _lora_module(name, before[name], after[name], known)
        if module is None or (targets and not is_listed(module.path, targets)):
            rest.append(name)
        else:
            found.modules.append(module)
    if any(known and known.classes.get(module.path) == "Conv1D" for module in found.modules):
        found.config["fan_in_fan_out"] = True
    if known is not None:
        found.modules = nested(found.modules, known.parameters)
    if save_modules:
        _carry(found, rest, before, after)
    elif rest:
        lost = "changed, and the LoRA on the chosen modules does not hold that: it is lost"
        sentence = of_several(len(rest), lost, lost)
        found.issues.append(warning("left-out", rest[0], sentence, "--save-modules carries them whole"))
    if not found.modules:
        sentence = "differs from the base in no module that LoRA could hold"
        found.issues.append(error("empty", tuned.root, sentence))
    return found


def _lora_module(name: str, before: TensorRef, after: TensorRef, known: Skeleton | None) -> LoraModule | None:
    """Return the module of a weight that LoRA can hold, or None."""
    path, _, parameter = name.rpartition(".")
    kind = known.classes.get(path, "") if known else ""
    shape = before.shape
    form: Form
    turned = False
    if (
        parameter == "weight"
        and len(shape) == 2
        and (kind in _LINEAR or (not kind and not _is_embedding(path)))
    ):
        form, turned = "linear", kind == "Conv1D"
    elif parameter == "weight" and len(shape) > 2 and kind in _CONVOLUTIONS:
        form = "convolution"
    elif known and _is_stacked(path, parameter, known, len(shape)):
        form, turned = "experts", path in known.transposed and len(shape) == 3
        path = name
    else:
        return None
    if turned:
        shape = (*shape[:-2], shape[-1], shape[-2])
    return LoraModule(path, form, Difference(before, after, turned), shape, 0)


def _is_stacked(path: str, parameter: str, known: Skeleton, n_axes: int) -> bool:
    """Return True for a parameter of all experts: three axes, or beside one of those two, as a bias has."""
    own = known.parameters.get(path, ())
    return parameter in own and (n_axes == 3 or (n_axes == 2 and parameter != "weight" and "experts" in path))


def _is_embedding(path: str) -> bool:
    return path.rpartition(".")[2] in INPUT_NAMES


def _carry(
    found: Extraction, names: list[str], before: Mapping[str, TensorRef], after: Mapping[str, TensorRef]
) -> None:
    """Carry parameters whole: biases as ``bias="all"``, which means all of them, the rest in ``modules_to_save``."""
    adapted = {module.owner for module in found.modules}
    modules = sorted({name.rpartition(".")[0] for name in names if not name.endswith(".bias")} - adapted)
    stuck = [name for name in names if not name.endswith(".bias") and name.rpartition(".")[0] in adapted]
    if stuck:
        sentence = "changed, and its module has LoRA on another parameter: it cannot be carried whole too"
        found.issues += [error("unsupported", name, sentence) for name in stuck]
    saved = {name for name in before if name.rpartition(".")[0] in modules}
    if any(name.endswith(".bias") for name in names):
        found.config["bias"] = "all"
        saved |= {name for name in before if name.endswith(".bias")}
    for name in sorted(saved):
        owner, _, parameter = name.rpartition(".")
        inner = ".base_layer" if owner in adapted else ""
        found.whole[f"{PREFIX}{owner}{inner}.{parameter}"] = after.get(name, before[name])
    if modules:
        found.config["modules_to_save"] = modules
    if any(_is_embedding(module) for module in modules) and found.config.pop("_tied", False):
        found.config["ensure_weight_tying"] = True


def _config(base: Checkpoint) -> dict[str, Any]:
    """Return what the configuration says of the model."""
    config: dict[str, Any] = {}
    names = base.config.get("architectures") or [""]
    for end, task in (("ForCausalLM", "CAUSAL_LM"), ("ForSequenceClassification", "SEQ_CLS")):
        if str(names[0]).endswith(end):
            config["task_type"] = task
    heads = {name for name in base.by_name() if name.rpartition(".")[0].rpartition(".")[2] in OUTPUT_NAMES}
    if not heads and any(level.get("tie_word_embeddings") for _, level in config_levels(base.config)):
        config["_tied"] = True
    return config
