"""Two checkpoints of one model → the modules of a LoRA that approximates their difference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lora_merge.conversion.lora import Difference, Form, LoraModule, nested
from lora_merge.core.checkpoint import INPUT_NAMES, OUTPUT_NAMES, Checkpoint, owner_name
from lora_merge.core.report import Issue, error, note, warning
from lora_merge.core.tensor import TensorRef, shape_text
from lora_merge.core.weight import Weight
from lora_merge.modeling.skeleton import Skeleton
from lora_merge.peft_rules.kinds import PREFIX
from lora_merge.peft_rules.targets import is_listed
from lora_merge.quantised import describe
from lora_merge.words import counted, listing, of_several

if TYPE_CHECKING:
    from collections.abc import Collection


_LINEAR = frozenset({"Linear", "Conv1D"})
_CONVOLUTIONS = frozenset({"Conv1d", "Conv2d", "Conv3d"})


@dataclass(slots=True)
class Extraction:
    """What an extraction writes: modules with LoRA, tensors carried whole, and the issues found on the way."""

    modules: list[LoraModule] = field(default_factory=list)
    whole: dict[str, TensorRef] = field(default_factory=dict)
    """Tensors that are carried whole, by their names in a PEFT file."""

    decoded: dict[str, Weight] = field(default_factory=dict)
    """Weights that are carried whole too, and are stored quantised: they are decoded when the adapter is written."""

    config: dict[str, Any] = field(default_factory=dict)
    """Fields of ``adapter_config.json`` other than ranks and targets."""

    issues: list[Issue] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Pairing:
    """Two checkpoints of one model, weight by weight, under the names of either."""

    base: Checkpoint
    tuned: Checkpoint
    known: Skeleton | None
    """The module tree; None where transformers has no class for the model."""

    before: Mapping[str, Weight]
    after: Mapping[str, Weight]
    twins: Mapping[str, str] = field(default_factory=dict)
    """Ties of the tuned model: the name of an end that is not stored → the name of the tensor that it shares."""

    spelled: Mapping[str, str] = field(default_factory=dict)
    """Stored names → those that PEFT knows the parameters by, where they differ."""

    def parameter(self, name: str) -> str:
        """Return the name that PEFT has for a stored parameter."""
        return self.spelled.get(name, name)

    def paths(self, name: str) -> tuple[str, str]:
        """Return two paths of a parameter's module: as stored, and as PEFT names it."""
        return name.rpartition(".")[0], self.parameter(name).rpartition(".")[0]

    def is_resized(self, name: str) -> bool:
        """Return True for an embedding, an output embedding or a bias of one whose number of rows differs."""
        one, other = self.before[name], self.after[name]
        # Tokens are rows; only their number may differ.
        if one.shape == other.shape or one.shape[1:] != other.shape[1:]:
            return False
        _, path = self.paths(name)
        ends = {self.known.input_embedding, self.known.output_embedding} if self.known else set()
        return path in ends or owner_name(name) in INPUT_NAMES | OUTPUT_NAMES


def misfits(pairing: Pairing) -> list[Issue]:
    """Return issues that show that one checkpoint was not trained from the other.

    Other names, shapes and unreadable dtypes are errors. A tensor that only the base has is a warning: it is taken as
    unchanged.
    """
    before, after, tuned = pairing.before, pairing.after, pairing.tuned
    issues = []
    strange = sorted(after.keys() - before.keys())
    if strange:
        where = f"in {tuned.root}, but not in the base"
        sentence = of_several(len(strange), f"is {where}", f"are {where}")
        hint = "save both with the same release of transformers, or pass the base that was trained"
        issues.append(error("unexpected-tensor", strange[0], sentence, hint))
    for name in sorted(before.keys() & after.keys()):
        if before[name].shape != after[name].shape and not pairing.is_resized(name):
            sentence = f"has the shape {shape_text(after[name].shape)}, expected {shape_text(before[name].shape)} as in the base"
            hint = "pass the base that was trained: an adapter cannot resize a weight"
            issues.append(error("shape-mismatch", name, sentence, hint))
        elif before[name].storage != after[name].storage and not (
            # Weights of two storages are compared as numbers.
            before[name].holds_floats and after[name].holds_floats
        ):
            one, other = describe(after[name].storage), describe(before[name].storage)
            sentence = f"is stored as {one}, but the base has {other}; expected BF16, F16 or F32"
            issues.append(error("bad-dtype", name, sentence))
    issues += _otherwise_stored(pairing)
    missing = sorted(before.keys() - after.keys())
    # With other names on both sides, the error above says it already.
    if missing and not strange:
        where = f"in the base, but not in {tuned.root}: treated as unchanged"
        sentence = of_several(len(missing), f"is {where}", f"are {where}")
        issues.append(warning("missing-tensor", missing[0], sentence))
    return issues


def _otherwise_stored(pairing: Pairing) -> list[Issue]:
    """Return a note on weights that are stored quantised in one checkpoint and otherwise in the other."""
    pairs = [
        (pairing.before[name].storage, pairing.after[name].storage)
        for name in sorted(pairing.before.keys() & pairing.after.keys())
    ]
    odd = [(one, two) for one, two in pairs if one != two and not (one.is_dense and two.is_dense)]
    if not odd:
        return []
    kinds = dict.fromkeys(
        f"{describe(one)} in the base and {describe(two)} in the tuned model" for one, two in odd
    )
    sentence = (
        f"the two models store {counted(len(odd), 'weight')} differently ({listing(list(kinds))}); "
        "the LoRA is made from the decoded values, which include the rounding of both"
    )
    return [note("storage", "", sentence)]


def extracted(
    pairing: Pairing, changed: Collection[str], *, targets: tuple[str, ...] = (), save_modules: bool = False
) -> Extraction:
    """Return the modules that LoRA can hold, and what becomes of the rest: carried whole, or lost with a warning.

    Args:
        pairing: what was trained, and what came of it.
        changed: names of the tensors that differ.
        targets: ends of the paths of the modules to take; empty: all that LoRA can hold.
        save_modules: carry the rest whole.
    """
    found = Extraction(config=_config(pairing.base))
    before, after, known = pairing.before, pairing.after, pairing.known
    rest = []
    for name in sorted(changed):
        is_resized = pairing.is_resized(name)
        module = (
            None if is_resized else _lora_module(pairing.parameter(name), before[name], after[name], known)
        )
        is_wanted = not targets or any(is_listed(path, targets) for path in pairing.paths(name))
        if module is None or not is_wanted:
            rest.append(name)
        else:
            found.modules.append(module)
        if is_resized and targets and is_wanted:
            found.issues.append(_resized_target(name, pairing))
    # ``Conv1D`` stores weights as ``[in, out]``, which this flag tells PEFT.
    if any(known and known.classes.get(module.path) == "Conv1D" for module in found.modules):
        found.config["fan_in_fan_out"] = True
    if known is not None:
        # PEFT nests several parameters of one module in the order of their registration.
        found.modules = nested(found.modules, known.parameters)
    if save_modules:
        _carry(found, rest, pairing)
    elif rest:
        found.issues += _left_out(rest, pairing)
    if not found.modules:
        sentence = "no module that LoRA can change differs from the base"
        hint = "check --base and --tuned: their weights are equal, or LoRA cannot express what differs"
        found.issues.append(error("empty", pairing.tuned.root, sentence, hint))
    return found


def _resized_target(name: str, pairing: Pairing) -> Issue:
    before, after = pairing.before[name].shape[0], pairing.after[name].shape[0]
    sentence = f"has {after} rows, expected {before} as in the base: LoRA cannot resize a weight"
    hint = "leave it out of --target and pass --save-modules to save it whole, or pass a resized base"
    return error("unsupported", name, sentence, hint)


def _left_out(names: list[str], pairing: Pairing) -> list[Issue]:
    """Return a warning for the changes that are lost, and one for each resized embedding."""
    hint = "pass --save-modules to save them whole"
    resized = [name for name in names if pairing.is_resized(name)]
    others = [name for name in names if name not in resized]
    issues = []
    if resized:
        before, after = (refs[resized[0]].shape[0] for refs in (pairing.before, pairing.after))
        sentence = (
            f"has {after} rows in the tuned model, but {before} in the base; it is left out, so the training of "
            "added tokens is lost"
        )
        issues += [warning("left-out", name, sentence, hint) for name in resized]
    if others:
        lost = (
            "changed by the training, but LoRA on the chosen modules cannot express it: this change is lost"
        )
        sentence = of_several(len(others), lost, lost)
        issues.append(warning("left-out", others[0], sentence, hint))
    return issues


def _lora_module(name: str, before: Weight, after: Weight, known: Skeleton | None) -> LoraModule | None:
    """Return the module of a weight that LoRA can hold: linear, convolution or stacked experts; otherwise None."""
    if not (before.holds_floats and after.holds_floats):
        return None
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
        # A bias of all experts has two axes and no orientation.
        form, turned = "experts", path in known.transposed and len(shape) == 3
        path = name
    else:
        return None
    if turned:
        shape = (*shape[:-2], shape[-1], shape[-2])
    return LoraModule(path, form, Difference(before, after, turned), shape, 0)


def _is_stacked(path: str, parameter: str, known: Skeleton, n_axes: int) -> bool:
    """Return True for a parameter that holds all experts: three axes, or two for a bias."""
    own = known.parameters.get(path, ())
    return parameter in own and (n_axes == 3 or (n_axes == 2 and parameter != "weight" and "experts" in path))


def _is_embedding(path: str) -> bool:
    return path.rpartition(".")[2] in INPUT_NAMES


def _carry(found: Extraction, names: list[str], pairing: Pairing) -> None:
    """Carry parameters whole: biases under ``bias="all"``, the rest in ``modules_to_save``.

    Reference:
        ``peft.utils.other.ModulesToSaveWrapper.adapter_state_dict_load_map`` (PEFT 0.21.2).
    """
    before, after = pairing.before, pairing.after
    resized = sorted(name for name in names if pairing.is_resized(name))
    sources = {pairing.parameter(name): after.get(name, ref) for name, ref in before.items()}
    # PEFT gives each module of ``modules_to_save`` a separate weight, so both ends of a tie are written. A
    # PEFT that knows ``ensure_weight_tying`` writes both too, and older ones read both.
    ends = {pairing.parameter(end): source for end, source in pairing.twins.items() if source in names}
    sources |= {end: after[source] for end, source in ends.items()}
    is_bias = {pairing.parameter(name): name.endswith(".bias") and name not in resized for name in names}
    is_bias |= dict.fromkeys(ends, False)
    adapted = {module.owner for module in found.modules}
    modules = {name.rpartition(".")[0] for name in is_bias if not is_bias[name]} - adapted
    sentence = "changed, but cannot be saved whole: its module has LoRA on another parameter"
    found.issues += [
        error("unsupported", name, sentence)
        for name in is_bias
        if not is_bias[name] and name.rpartition(".")[0] in adapted
    ]
    saved = {name for name in sources if name.rpartition(".")[0] in modules}
    if any(is_bias.values()):
        found.config["bias"] = "all"
        # ``bias="all"`` means every bias of the model, changed or not.
        saved |= {name for name in sources if name.endswith(".bias")}
    for name in sorted(saved):
        owner, _, parameter = name.rpartition(".")
        # Beside LoRA, PEFT keeps the original layer, and its bias, under ``base_layer``.
        inner = ".base_layer" if owner in adapted else ""
        weight, path = sources[name], f"{PREFIX}{owner}{inner}.{parameter}"
        if weight.plain is not None:
            found.whole[path] = weight.plain
        else:
            found.decoded[path] = weight
    if modules:
        found.config["modules_to_save"] = sorted(modules)
    if resized:
        rows = after[resized[0]].shape[0]
        sentence = (
            f"is saved whole with {rows} rows, but the base has {before[resized[0]].shape[0]}; call "
            f"model.resize_token_embeddings({rows}) before PEFT loads the adapter (lora-merge needs nothing)"
        )
        found.issues.append(note("resized", resized[0], sentence))


def _config(base: Checkpoint) -> dict[str, Any]:
    """Return ``task_type`` where the architecture's name tells it."""
    config: dict[str, Any] = {}
    names = base.config.get("architectures") or [""]
    for end, task in (("ForCausalLM", "CAUSAL_LM"), ("ForSequenceClassification", "SEQ_CLS")):
        if str(names[0]).endswith(end):
            config["task_type"] = task
    return config
