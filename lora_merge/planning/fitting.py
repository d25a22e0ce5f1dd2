"""How one adapter fits one base: the join of their names, shapes and rules."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from lora_merge.core.adapter import Delta
from lora_merge.core.report import Issue, error, note, warning
from lora_merge.core.tensor import TORCH_NAMES, Region, TensorRef, shape_text
from lora_merge.deltas import RowsFacts
from lora_merge.layouts import LayoutError, Located, Place
from lora_merge.peft_rules.bypassed import is_bypassed
from lora_merge.peft_rules.hints import OTHER_MODEL
from lora_merge.peft_rules.kinds import PREFIX
from lora_merge.peft_rules.loose_ends import LooseEnd, unmatched_patterns, unsaved
from lora_merge.peft_rules.patterns import TargetError
from lora_merge.peft_rules.targets import endings
from lora_merge.planning.absent import Absent
from lora_merge.planning.misfits import Misfits
from lora_merge.planning.model import SAVE_ANEW, misplaced
from lora_merge.planning.packing import packing_issues
from lora_merge.planning.rules import rule_issues
from lora_merge.planning.spellings import Names
from lora_merge.planning.stacked import stacked_deltas

if TYPE_CHECKING:
    from lora_merge.core.adapter import Adapter, AdapterUse, PlacedDelta, Replacement
    from lora_merge.planning.model import Model
    from lora_merge.planning.settings import Reading

_NESTED = ".language_model."
"""In the paths of multimodal models' language models (transformers 5.23)."""


class Fitting:
    """One adapter on one base.

    Args:
        use: the adapter.
        n: which of the plan's adapters it is.
        model: the base.
        reading: how experts are laid out, if the user says so.
    """

    def __init__(self, use: AdapterUse, n: int, model: Model, reading: Reading) -> None:
        self._use, self._n, self._model, self._reading = use, n, model, reading
        self._adapter = use.adapter
        self._misfits = Misfits(use.adapter, model, self.shape)
        self._located: dict[str, Located] = {}
        """Where each parameter that the adapter names was found."""
        self.issues: list[Issue] = []
        self.replacements: dict[str, TensorRef] = {}
        """Parameters of the output that are the adapter's own tensors."""
        self.copies: dict[str, TensorRef] = {}
        """The base's own parameters as the adapter carries them: PEFT loads them into the base, where ties share them."""
        self.deltas: list[PlacedDelta] = []
        """What changes, on tensors of the output, with the regions that it changes."""

    def fit(self, peft_layers: tuple[PlacedDelta, ...] = ()) -> Fitting:
        """Join everything, and collect what does not fit. Returns itself.

        Args:
            peft_layers: deltas that PEFT's own layers make, already joined.
        """
        for parameter, replacement in self._adapter.replacements.items():
            self._replace(parameter, replacement)
        deltas = self._adapter.deltas
        # Entries without tensors wait until all names are known: only then can the base be asked about them.
        ends = unsaved(self._adapter)
        lost = [delta for delta in deltas if not self._join(delta)]
        self.deltas = self._effective(self.deltas)
        ends += self._join_stacked()
        # An adapter of another model: one issue says so, in place of one per module.
        if lost and len(lost) == len(deltas) and not self._adapter.stacked:
            self.issues.append(self._all_absent(lost[0].parameter))
            return self
        self.issues += [self._absent(delta.parameter) for delta in lost]
        self.deltas += self._effective([replace(delta, adapter=self._n) for delta in peft_layers])
        for delta in peft_layers:
            self._located[delta.target] = Located(delta.rule, (Place(delta.tensor),))
        # How the two spell names is learnt from all that was found.
        names = Names(self._model, self._located)
        try:
            self.issues += Absent(self._model, names).issues(ends) if ends else []
        except TargetError as exc:
            self.issues.append(exc.issue)
        # PEFT itself checks the tensors of its own layers against the targets.
        if deltas or self._adapter.stacked or not (self._adapter.peft_layers or self._adapter.replacements):
            self.issues += names.several_rewritings() + names.named_twice()
            try:
                self.issues += rule_issues(self._adapter, self._model, names)
            except TargetError as exc:
                self.issues.append(exc.issue)
        return self

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape that a parameter has in the output, which may be resized or the adapter's own."""
        own = self.replacements.get(name) or self.copies.get(name)
        if own is not None:
            return own.shape
        stored = self._model.source(name).shape
        # One end of a tie may be resized by the name of the other.
        resized = {
            one: copy for one, copy in self.copies.items() if copy.shape != self._model.source(one).shape
        }
        shared = resized.keys() & set(self._model.users_with(name)) if resized else ()
        return next((resized[one].shape for one in shared), stored)

    def _effective(self, deltas: list[PlacedDelta]) -> list[PlacedDelta]:
        """Return the deltas without those of layers that the model never calls; a warning names each of these."""
        bypassed = {delta.target for delta in deltas if self._is_bypassed(delta)}
        sentence = "was left out: the model reads this layer's weight directly and never calls the layer"
        hint = (
            "PEFT's forward pass does not use the adapter here, and merging it would change what the model "
            "computes"
        )
        self.issues += [warning("no-effect", target, sentence, hint) for target in sorted(bypassed)]
        return [delta for delta in deltas if delta.target not in bypassed]

    def _is_bypassed(self, delta: PlacedDelta) -> bool:
        return is_bypassed(delta.target.rpartition(".")[0], self._model.config)

    def _join(self, delta: Delta) -> bool:
        """Place a delta, or say what keeps it from its place; return False when the base has no such parameter."""
        try:
            found = self._model.locate(delta.parameter, delta.weight_shape())
        except LayoutError as exc:
            self.issues.append(misplaced(delta.module, exc))
            return True
        if found is None:
            return False
        self._located[delta.parameter] = found
        for place in found.places:
            problem = self._misfits.of(delta, place, found)
            if problem is not None:
                self.issues.append(problem)
                # The other places would only say the same.
                break
            self.deltas.append(self._placed(delta, place, found))
        return True

    def _join_stacked(self) -> list[LooseEnd]:
        """Place the deltas on ``target_parameters``; return the patterns that match nothing."""
        # Patterns may mean the parameters, whose names only the model knows.
        paths = set(self._adapter.modules)
        n_found = 0
        self.issues += packing_issues(self._adapter, self._reading.expert_layout)
        for pair in self._adapter.stacked:
            try:
                found = stacked_deltas(pair, self._use, self._n, self._model, self._reading.expert_layout)
            except TargetError as exc:
                self.issues.append(exc.issue)
                continue
            self.issues += found.issues
            if found.located is not None:
                self._located[found.parameter] = found.located
                paths.add(found.parameter)
                n_found += bool(found.deltas)
            self.deltas += found.deltas
        # A pair without a place has no name that a pattern could match.
        if self._adapter.kind != "LORA" or n_found < len(self._adapter.stacked):
            return []
        try:
            return unmatched_patterns(self._adapter, paths)
        except TargetError as exc:
            self.issues.append(exc.issue)
            return []

    def _replace(self, parameter: str, replacement: Replacement) -> None:
        """Place a whole parameter of the adapter, or say what keeps it from its place."""
        if parameter in self._use.unchanged:
            sentence = "the adapter has a copy of it, equal to the base's"
            self.issues.append(note("full-tensor", replacement.ref.name, sentence))
            # Its name still counts as named, for the rules about targets.
            found = self._model.locate(parameter, replacement.ref.shape)  # found when it was compared
            self._located |= {parameter: found} if found is not None else {}
            return
        if self._replace_row(parameter, replacement):
            return
        name = self._whole_place(parameter, replacement)
        problem = self._replacement_problem(name, replacement) if name is not None else None
        if problem is not None:
            self.issues.append(problem)
        elif name is not None and replacement.why == "module":
            self.replacements[name] = replacement.ref
            self._copy(parameter, name, replacement.original, only_if_other=True)
        elif name is not None:
            self._copy(parameter, name, replacement.ref)

    def _replace_row(self, parameter: str, replacement: Replacement) -> bool:
        """Place an expert's whole bias as the row of the stack that it is; return False for anything else."""
        ref = replacement.ref
        try:
            found = self._model.locate(parameter, ref.shape) if len(ref.shape) == 1 else None
        except LayoutError:
            found = None
        place = found.places[0] if found is not None else None
        if found is None or place is None or found.shape != ref.shape or len(place.at) != 2:
            return False
        (n, _), columns = place.at
        if not replacement.why or columns != (0, self._model.source(place.tensor).shape[1]):
            return False
        row = replace(ref, shape=(1, *ref.shape))
        delta = Delta(parameter, RowsFacts((n,)), {"rows": row})
        self._located[parameter] = found
        self.deltas.append(self._placed(delta, Place(place.tensor), found))
        return True

    def _copy(
        self, parameter: str, name: str, copy: TensorRef | None, *, only_if_other: bool = False
    ) -> None:
        """Keep what the base's own parameter was in the training, if that differs from this base's."""
        n_rows = self._use.differing.get(parameter, 0)
        is_other = n_rows > 0 or (copy is not None and copy.shape != self._model.source(name).shape)
        if copy is None or (only_if_other and not is_other):
            return
        self.copies[name] = copy
        if n_rows:
            n_all = min(copy.shape[0], self._model.source(name).shape[0])
            sentence = (
                f"is a copy of the base's {name} from the training, and {n_rows} of {n_all} rows differ from "
                "this base; the output gets the adapter's rows, as in PEFT"
            )
            hint = "check that --base is the model that was trained"
            self.issues.append(warning("other-base", copy.name, sentence, hint))

    def _whole_place(self, parameter: str, replacement: Replacement) -> str | None:
        """Return the name under which the base stores a parameter whole; None, and an issue, where it does not."""
        try:
            found = self._model.locate(parameter, replacement.ref.shape)
        except LayoutError as exc:
            self.issues.append(misplaced(parameter, exc))
            return None
        if found is None:
            self.issues.append(self._no_place(parameter, replacement))
            return None
        self._located[parameter] = found
        if found.whole is None:
            tensor = found.places[0].tensor
            sentence = (
                f"replaces a whole parameter, and the base stores that parameter in another form, in {tensor}"
            )
            self.issues.append(error("unsupported", replacement.ref.name, sentence, SAVE_ANEW))
        return found.whole

    def _replacement_problem(self, name: str, replacement: Replacement) -> Issue | None:
        """Return what keeps a parameter of the adapter from taking the place of the base's; None where nothing does."""
        ref, source = replacement.ref, self._model.source(name)
        # PEFT also saves embeddings that its config does not mention; the config must explain anything else.
        if not replacement.why and not self._is_resizable(name):
            sentence = (
                "is a whole weight that differs from the base's, and the config does not list it as trained"
            )
            hint = (
                "add its module to modules_to_save if it was trained; otherwise remove it (PEFT would load "
                "it without a message)"
            )
            return error("unexpected-tensor", ref.name, sentence, hint)
        if ref.dtype != source.dtype and not (ref.dtype in TORCH_NAMES and source.holds_floats):
            sentence = f"is stored as {ref.dtype}, the base's as {source.dtype}; expected BF16, F16 or F32"
            return error("bad-dtype", ref.name, sentence)
        # Another number of tokens is another number of rows.
        resized = ref.shape[1:] == source.shape[1:] and self._is_resizable(name)
        if ref.shape != source.shape and not resized:
            sentence = (
                f"has the shape {shape_text(ref.shape)}, the base's {name} has {shape_text(source.shape)}"
            )
            return error("shape-mismatch", ref.name, sentence, OTHER_MODEL)
        # A replacement is all or nothing, so another weight than 1 has no meaning.
        if self._use.weight != 1 and (replacement.why == "module" or not self._is_resizable(name)):
            hint = "give this adapter the weight 1"
            sentence = (
                f"replaces a whole parameter, so it cannot be scaled by the weight {self._use.weight:g}"
            )
            return error("weighted-replacement", ref.name, sentence, hint)
        return None

    def _is_resizable(self, name: str) -> bool:
        """Return True for a parameter with one row per token: an embedding, or the bias of the output embedding."""
        return self._model.is_embedding(name)

    def _no_place(self, parameter: str, replacement: Replacement) -> Issue:
        """Return the issue of a whole parameter that the base does not store, with the most likely reason."""
        # Names that transformers gives to heads of classifiers.
        if replacement.why == "module" and parameter.rpartition(".")[0].rpartition(".")[2] in {
            "score",
            "classifier",
            "qa_outputs",
            "summary",
        }:
            sentence = "is a trained head, and the base has no head"
            hint = (
                "set task_type in adapter_config.json to what it was trained for: SEQ_CLS, TOKEN_CLS or "
                "QUESTION_ANS; the output then gets the class with that head"
            )
            return error("unmatched-module", parameter, sentence, hint)
        if replacement.why == "saved":
            file = PurePosixPath(replacement.ref.file).name
            near = self._nearest(parameter)
            sentence = f"was read from {file}, and the base has no parameter {parameter}" + (
                f"; nearest: {near}" if near else ""
            )
            hint = f"merge into the base that it was trained on, or leave it out with --ignore-file {file}"
            return error("unmatched-module", replacement.ref.name, sentence, hint)
        return self._absent(parameter)

    def _absent(self, parameter: str) -> Issue:
        """Return the issue of a parameter that the base does not store, with the nearest name that it has."""
        module = parameter.rpartition(".")[0]
        near = self._nearest(parameter)
        sentence = f"the adapter changes this parameter, and the base has no {parameter}"
        hint = f"check --base; the base's nearest name is {near}" if near else OTHER_MODEL
        return error("unmatched-module", module, sentence, hint)

    def _all_absent(self, first: str) -> Issue:
        """Return the one issue of an adapter without a single parameter that the base has."""
        if _NESTED in f".{first}" and not any(_NESTED in f".{name}" for name in self._model.sources):
            sentence = "the adapter is for a multimodal model, and the base is only a language model"
            return error("wrong-prefix", first, sentence, "pass the multimodal model with --base")
        near = self._nearest(first)
        sentence = f"the base has none of the adapter's {len(self._adapter.modules)} modules"
        if near:
            hint = (
                "the names begin in another way: check that --base is the model that was trained, and that "
                "no tool has renamed the adapter's tensors"
            )
            return error("wrong-prefix", first, f"{sentence}; the base has {near}", hint)
        named = self._adapter.config.get("base_model_name_or_path")
        hint = f"the adapter belongs to another model{f': it names {named}' if named else ''}"
        return error("wrong-prefix", first, sentence, hint)

    def _nearest(self, parameter: str) -> str:
        """Return the stored name that shares the longest dotted ending with a parameter; empty if none shares two
        parts.
        """
        return next(
            (self._by_ending[end] for end in endings(parameter) if "." in end and end in self._by_ending), ""
        )

    @cached_property
    def _by_ending(self) -> dict[str, str]:
        """Dotted ending → the first stored name that has it."""
        found: dict[str, str] = {}
        for name in self._model.sources:
            for end in endings(name):
                found.setdefault(end, name)
        return found

    def _placed(self, delta: Delta, place: Place, found: Located) -> PlacedDelta:
        """Return a delta on a tensor of the output, with the region that it changes."""
        transposed = delta.transposed
        if found.by_boxes:
            # Both may be turned: by the adapter's format, and by how the base stores the part.
            transposed ^= place.transposed
            if len(place.at) == 2:  # of a bias, a row of the stack that the base has
                rows = {
                    role: replace(ref, shape=(1, *ref.shape)) if len(ref.shape) == 1 else ref
                    for role, ref in delta.factors.items()
                }
                delta = delta if delta.facts.has_factors else replace(delta, factors=rows)
        elif delta.facts.has_factors and not transposed:
            transposed = self._misfits.is_transposed(delta, self.shape(place.tensor))
        return delta.placed(
            place.tensor,
            Region(transposed, place.at),
            part=place.part,
            adapter=self._n,
            adapter_weight=self._use.weight,
            rule=found.rule,
        )


def named_parameters(adapter: Adapter) -> dict[str, tuple[int, ...] | None]:
    """Return parameter that an adapter names → the shape of its weight, or None where the adapter does not show it."""
    paths = (
        name.removeprefix(PREFIX).removesuffix(".weight") for name in adapter.peft_layers if PREFIX in name
    )
    by_layers = {f"{path.rpartition('.')[0]}.weight": None for path in paths}
    return {**by_layers, **{delta.parameter: delta.weight_shape() for delta in adapter.deltas}} | {
        parameter: replacement.ref.shape for parameter, replacement in adapter.replacements.items()
    }
