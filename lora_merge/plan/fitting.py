"""How one adapter lies on one base: the join of their names, shapes and rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

from lora_merge.core.report import Issue, error, note
from lora_merge.core.scaling import Scaling
from lora_merge.core.skeleton import Skeleton, may_hold_conv1d
from lora_merge.core.targets import TargetError
from lora_merge.core.tensor import TORCH_NAMES, Region, TensorRef, shape_text
from lora_merge.layouts import locate
from lora_merge.plan.rules import rule_issues
from lora_merge.plan.stacked import stacked_delta

if TYPE_CHECKING:
    from lora_merge.core.adapter import AdapterUse, DeltaSpec, Replacement
    from lora_merge.plan.outline import Outline
    from lora_merge.plan.ties import Tie


class Fitting:
    """One adapter on one base.

    Args:
        use: the adapter.
        outline: the names of the output, and the stored tensors behind them.
        config: the base's ``config.json``.
        skeleton: builds the model's skeleton, which takes seconds; it is asked only where names cannot decide.
        tie: of the embeddings, if there is one and the adapter touches it.
    """

    def __init__(
        self,
        use: AdapterUse,
        outline: Outline,
        config: Mapping[str, Any],
        skeleton: Callable[[], Skeleton | None],
        tie: Tie | None,
    ) -> None:
        self._use, self._adapter = use, use.adapter
        self._config, self._skeleton, self._tie = config, skeleton, tie
        self._sources = outline.sources
        self.issues: list[Issue] = []
        self.replacements: dict[str, TensorRef] = {}
        """Parameters of the output that are the adapter's own tensors."""
        self.deltas: list[DeltaSpec] = []
        """What changes, by the name in the output; regions are filled in."""

    def fit(self, layered: tuple[DeltaSpec, ...] = ()) -> Fitting:
        """Join everything, and collect what does not fit.

        Args:
            layered: deltas that PEFT's own layers make, already joined.
        """
        for parameter, replacement in self._adapter.replacements.items():
            self._replace(parameter, replacement)
        deltas = [*self._adapter.deltas, *self._stacked_deltas()]
        if deltas and not any(self._located(delta.parameter) for delta in deltas):
            self.issues.append(self._all_absent(deltas[0].parameter))
            return self
        for delta in deltas:
            name = self._located(delta.parameter)
            if name is None:
                self.issues.append(self._absent(delta.parameter))
            elif (problem := self._misfit(delta, name)) is not None:
                self.issues.append(problem)
            else:
                self.deltas.append(self._placed(delta, name))
        self.deltas += layered
        if deltas or not (layered or self._adapter.replacements):
            try:
                self.issues += rule_issues(self._adapter, self._sources, self._skeleton, self._tie)
            except TargetError as exc:
                self.issues.append(error("bad-field", exc.field, exc.sentence))
        return self

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape that a parameter has in the output."""
        if name in self.replacements:
            return self.replacements[name].shape
        return self._source(name).shape

    def _source(self, name: str) -> TensorRef:
        if name in self._sources:
            return self._sources[name]
        assert self._tie is not None
        return self._sources[self._tie.source]

    def _located(self, parameter: str) -> str | None:
        """Return the name of a parameter in the output; an end of a tie has one, stored or not."""
        name = locate(parameter, self._sources)
        if name is None and self._tie is not None and parameter in {self._tie.embedding, self._tie.head}:
            return parameter
        return name

    def _stacked_deltas(self) -> list[DeltaSpec]:
        """Return the deltas on ``target_parameters``, which only the model can name."""
        found = []
        for pair in self._adapter.stacked:
            try:
                delta, issues = stacked_delta(pair, self._adapter, self._sources, self._skeleton)
            except TargetError as exc:
                delta, issues = None, [error("bad-field", exc.field, exc.sentence)]
            self.issues += issues
            found += [delta] if delta is not None else []
        if len(found) == len(self._adapter.stacked) > 0:
            paths = self._adapter.modules | {delta.parameter for delta in found}
            self.issues += Scaling(self._adapter.config).unmatched(paths)
        return found

    def _replace(self, parameter: str, replacement: Replacement) -> None:
        """Take a whole parameter from the adapter, if it belongs there."""
        ref = replacement.ref
        if parameter in self._use.unchanged:
            self.issues.append(note("full-tensor", ref.name, "was saved along and equals the base's"))
            return
        name = self._located(parameter)
        if name is None:
            self.issues.append(self._no_place(parameter, replacement))
            return
        source = self._source(name)
        if not replacement.why:
            sentence = "is a whole weight that differs from the base's, and the config does not say that it was trained"
            hint = "PEFT would load it into the base without a word; add its module to modules_to_save if it is meant"
            self.issues.append(error("unexpected-tensor", ref.name, sentence, hint))
        elif not {ref.dtype, source.dtype} <= TORCH_NAMES.keys():
            sentence = f"is stored as {ref.dtype}, the base's as {source.dtype}; expected BF16, F16 or F32"
            self.issues.append(error("bad-dtype", ref.name, sentence))
        elif ref.shape != source.shape and not (
            replacement.why == "embedding" and ref.shape[1:] == source.shape[1:]
        ):
            sentence = f"is {shape_text(ref.shape)}, the base's {name} is {shape_text(source.shape)}"
            hint = "the adapter was trained on another model"
            self.issues.append(error("shape-mismatch", ref.name, sentence, hint))
        elif self._use.weight != 1:
            hint = "give this adapter the weight 1"
            sentence = f"replaces a whole parameter, which cannot be done by {self._use.weight:g}"
            self.issues.append(error("weighted-replacement", ref.name, sentence, hint))
        else:
            self.replacements[name] = ref

    def _no_place(self, parameter: str, replacement: Replacement) -> Issue:
        """Return the issue of a whole parameter that the base does not store."""
        if replacement.why == "module" and parameter.rpartition(".")[0].rpartition(".")[2] in {
            "score", "classifier", "qa_outputs", "summary",
        }:  # fmt: skip
            sentence = "is a trained head, and the base has none"
            hint = (
                "load the base once with the head's class (AutoModelForSequenceClassification, …) and save it"
            )
            return error("unmatched-module", parameter, sentence, hint)
        return self._absent(parameter)

    def _absent(self, parameter: str) -> Issue:
        """Return the issue of a parameter that the base does not store."""
        module = parameter.rpartition(".")[0]
        near = self._nearest(parameter)
        sentence = f"the adapter changes it, the base has no {parameter}"
        return error("unmatched-module", module, sentence, f"nearest: {near}" if near else "")

    def _all_absent(self, first: str) -> Issue:
        """Return the one issue of an adapter that touches nothing at all."""
        near = self._nearest(first)
        sentence = f"none of the adapter's {len(self._adapter.modules)} modules is in the base"
        if near:
            return error("wrong-prefix", first, f"{sentence}, which has {near}", "the prefixes differ")
        return error("wrong-prefix", first, sentence, "the adapter belongs to another model")

    def _nearest(self, parameter: str) -> str:
        """Return the stored name that shares the longest dotted ending with a parameter."""
        wanted = parameter.split(".")[::-1]

        def shared(name: str) -> int:
            parts = name.split(".")[::-1]
            pairs = zip(wanted, parts, strict=False)
            return next((n for n, (one, other) in enumerate(pairs) if one != other), len(parts))

        best = max(self._sources, key=shared, default="")
        return best if best and shared(best) >= 2 else ""

    def _placed(self, delta: DeltaSpec, name: str) -> DeltaSpec:
        """Return a delta under its name in the output, with the region that it owns."""
        region = delta.region
        if delta.kind in {"low_rank", "dora"} and not region.transposed:
            region = Region(transposed=self._transposed(delta, self.shape(name)))
        return replace(delta, parameter=name, region=region, weight=self._use.weight)

    def _misfit(self, delta: DeltaSpec, name: str) -> Issue | None:
        """Return what keeps a delta from being merged into the tensor it names."""
        dtype, shape = self._source(name).dtype, self.shape(name)
        if dtype not in TORCH_NAMES:
            sentence = f"is stored as {dtype}, expected BF16, F16 or F32"
            return error("unsupported", name, sentence, "merge into the full-precision model")
        match delta.kind:
            case "low_rank" | "dora":
                return self._low_rank_misfit(delta, name, shape)
            case "rows":
                return _rows_misfit(delta, name, shape)
            case "addition":
                ref = delta.tensors["addend"]
                if ref.shape != shape:
                    sentence = f"is {shape_text(ref.shape)}, the base's {name} is {shape_text(shape)}"
                    return error("shape-mismatch", ref.name, sentence)
        return None

    def _low_rank_misfit(self, delta: DeltaSpec, name: str, shape: tuple[int, ...]) -> Issue | None:
        """Return what keeps a product of two factors from being added to a weight."""
        a, b = _factor_shapes(delta)
        product = (b[0], *a[1:])
        if delta.region.transposed or (len(a) == 2 and self._transposed(delta, shape)):
            product = product[::-1]
        if delta.options.get("divisor") is not None and len(shape) > 2:  # AdaLoRA keeps a kernel flat
            shape = (shape[0], prod(shape[1:]))
        magnitude = delta.tensors.get("magnitude")
        if magnitude is not None and prod(magnitude.shape) != b[0]:
            sentence = f"has {prod(magnitude.shape)} values, expected {b[0]}, one per output"
            return error("bad-shape", magnitude.name, sentence)
        if shape == product:
            return None
        if len(shape) != len(product):
            wanted = "a linear weight [out, in]" if len(product) == 2 else "a convolution"
            sentence = f"is {shape_text(shape)} in the base, expected {wanted}"
            return error("shape-mismatch", name, sentence)
        if len(shape) > 2 and shape[0] == product[0] and shape[2:] == product[2:]:
            sentence = f"is a grouped convolution, {shape_text(shape)}; its adapter is {shape_text(product)}"
            return error("unsupported", name, sentence, "PEFT cannot merge it either")
        return self._shape_issue(delta, shape)

    def _shape_issue(self, delta: DeltaSpec, shape: tuple[int, ...]) -> Issue:
        """Return the issue of factors that were made for a weight of another size."""
        a, b = delta.shape("A"), delta.shape("B")
        transposed = delta.region.transposed or self._transposed(delta, shape)
        n_out, n_in = (shape[-1], shape[:-1]) if transposed else (shape[0], shape[1:])
        parts = []
        full_a, full_b = _factor_shapes(delta)
        if full_b[0] != n_out:
            parts.append(f"lora_B is {shape_text(b)}, the base needs {shape_text((n_out, *b[1:]))}")
        if full_a[1:] != n_in:
            parts.append(f"lora_A is {shape_text(a)}, the base needs {shape_text((a[0], *n_in))}")
        hint = "the adapter was trained on another, perhaps pruned, model"
        return error("shape-mismatch", delta.module, "; ".join(parts), hint)

    def _transposed(self, delta: DeltaSpec, shape: tuple[int, ...]) -> bool:
        """Return True when a weight is stored ``[in, out]``: by class where it is known, else by shape."""
        a, b = _factor_shapes(delta)
        product = (b[0], *a[1:])
        says_so = bool(self._adapter.config.get("fan_in_fan_out"))
        odd = shape != product and shape == product[::-1]
        if not (odd or says_so or may_hold_conv1d(self._config)):
            return False
        skeleton = self._skeleton()
        kind = skeleton.classes.get(delta.module) if skeleton else None
        if kind is not None:
            return kind == "Conv1D"
        return odd if product[0] != product[-1] else says_so


def _factor_shapes(delta: DeltaSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of A and B once blocks are laid out on their diagonals."""
    a, b = delta.shape("A"), delta.shape("B")
    return (a[0], a[1] * int(delta.options.get("blocks_A", 1)), *a[2:]), b


def _rows_misfit(delta: DeltaSpec, name: str, shape: tuple[int, ...]) -> Issue | None:
    """Return what keeps trained rows from being put into an embedding."""
    ref, indices = delta.tensors["rows"], delta.options["indices"]
    if len(shape) != 2 or ref.shape[1:] != shape[1:]:
        sentence = f"is {shape_text(ref.shape)}, the base's {name} is {shape_text(shape)}"
        return error("shape-mismatch", ref.name, sentence, "the adapter was trained on another model")
    outside = [index for index in indices if not 0 <= index < shape[0]]
    if outside:
        sentence = f"means token {outside[0]}, and the base's {name} has {shape[0]} rows"
        return error("token-mismatch", ref.name, sentence, "the vocabulary was resized; use that base")
    return None
