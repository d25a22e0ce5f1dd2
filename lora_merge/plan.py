"""Checkpoint + Adapter → MergePlan. Pure: opens nothing, and refuses everything at once."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from lora_merge.core.checkpoint import Checkpoint, SideFile, config_levels
from lora_merge.core.plan import Copy, Merge, MergePlan, Step
from lora_merge.core.report import Issue, error, note, warning
from lora_merge.core.shards import OutputFile, index_text, place, split
from lora_merge.core.skeleton import Skeleton, build_skeleton, may_hold_conv1d
from lora_merge.core.targets import TargetError, TargetRule
from lora_merge.core.tensor import DTYPE_CODES, TORCH_NAMES, Region, TensorRef, nbytes_of, shape_text
from lora_merge.errors import PlanError, UnsupportedError
from lora_merge.layouts import locate

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_merge.core.adapter import Adapter, DeltaSpec

_QUANTISED_NAMES = re.compile(
    r"\.(qweight|qzeros|weight_packed|weight_scale|weight_scale_inv|weight_scale_2|SCB|absmax|quant_map"
    r"|weight\.(absmax|quant_map|quant_state\..+))$|_(blocks|scales)$"
)
"""Names that only quantised storages have: GPTQ, AWQ, compressed-tensors, FP8, bitsandbytes, MXFP4."""

_OUTPUT_NAMES = frozenset({"lm_head", "embed_out"})


def make_plan(
    base: Checkpoint,
    adapter: Adapter,
    *,
    dtype: str | None = None,
    max_shard_bytes: int | None = None,
    own_side_files: frozenset[str] = frozenset(),
    unchanged: frozenset[str] = frozenset(),
) -> MergePlan:
    """Return the plan of a merge.

    Args:
        base: what to merge into.
        adapter: what to merge.
        dtype: storage of the output as torch spells it; None keeps the base's, tensor by tensor.
        max_shard_bytes: largest shard; None keeps the base's own files.
        own_side_files: names of the adapter's side files that differ from the base's.
        unchanged: whole parameters in the adapter that equal the base's.

    Raises:
        PlanError: adapter and base do not fit; every reason is in ``issues``.
        UnsupportedError: they may fit, but all that stands in the way is not built.
    """
    fitting = _Fitting(base, adapter)
    issues = [*_quantised(base), *adapter.issues, *_full_tensors(adapter, unchanged), *fitting.issues()]
    _raise_errors(issues)
    deltas = fitting.deltas_by_tensor()
    stored, cast_issues = _stored_as(base, dtype)
    files = _place(base, stored, max_shard_bytes)
    side_files, side_issues = _side_files(base, adapter, own_side_files)
    indexed = len(files) > 1 or (base.sharded and max_shard_bytes is None)
    return MergePlan(
        base=base.root,
        adapters=(adapter.root,),
        files=files,
        steps=_steps(base, files, deltas),
        side_files=side_files,
        config_patch=_dtype_patch(base, dtype),
        index=index_text(files, base.index_metadata) if indexed else "",
        issues=(
            *issues,
            *cast_issues,
            *side_issues,
            *(note("left-out", "", sentence) for sentence in base.notes),
        ),
    )


def _raise_errors(issues: list[Issue]) -> None:
    errors = [issue for issue in issues if issue.severity == "error"]
    if errors:
        unsupported = all(issue.code == "unsupported" for issue in errors)
        raise (UnsupportedError if unsupported else PlanError)(errors)


class _Fitting:
    """How one adapter lies on one base: the join of their names, shapes and rules."""

    def __init__(self, base: Checkpoint, adapter: Adapter) -> None:
        self._base = base
        self._adapter = adapter
        self._tensors = base.by_name()
        self._located = {
            delta.parameter: ref
            for delta in adapter.deltas
            if (ref := locate(delta.parameter, self._tensors)) is not None
        }

    @cached_property
    def _skeleton(self) -> Skeleton | None:
        return build_skeleton(self._base.config)

    def deltas_by_tensor(self) -> dict[str, tuple[DeltaSpec, ...]]:
        """Return the deltas of each stored tensor, with the region that each one owns."""
        joined: dict[str, tuple[DeltaSpec, ...]] = {}
        for delta in self._adapter.deltas:
            ref = self._located[delta.parameter]
            placed = replace(delta, region=Region(transposed=self._transposed(delta, ref)))
            joined[ref.name] = (*joined.get(ref.name, ()), placed)
        return joined

    def issues(self) -> list[Issue]:
        """Return everything that keeps the adapter off this base."""
        if not self._adapter.deltas:
            return []  # the adapter's own issues say why
        if not self._located:
            return [self._all_absent()]
        found: list[Issue] = []
        for delta in self._adapter.deltas:
            ref = self._located.get(delta.parameter)
            found += self._absent(delta) if ref is None else self._misfits(delta, ref)
        try:
            rule = TargetRule.parse(self._adapter.config)
        except TargetError as exc:
            return [*found, error("bad-field", exc.field, exc.sentence)]
        return found + self._rule_issues(rule)

    def _absent(self, delta: DeltaSpec) -> list[Issue]:
        """Return the issue of a delta whose parameter the base does not store."""
        if delta.module.rpartition(".")[2] in _OUTPUT_NAMES:
            sentence = "the adapter changes it, and the base stores none: it is tied to the input embedding"
            hint = "this version does not merge into tied embeddings; retrain without it, or untie the base"
            return [error("unsupported", delta.module, sentence, hint)]
        near = self._nearest(delta.parameter)
        sentence = f"the adapter changes it, the base has no {delta.parameter}"
        return [error("unmatched-module", delta.module, sentence, f"nearest: {near}" if near else "")]

    def _all_absent(self) -> Issue:
        """Return the one issue of an adapter that touches nothing at all."""
        first = self._adapter.deltas[0].parameter
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

        best = max(self._tensors, key=shared, default="")
        return best if best and shared(best) >= 2 else ""

    def _misfits(self, delta: DeltaSpec, ref: TensorRef) -> list[Issue]:
        """Return what keeps a delta from being added to the tensor it names."""
        if ref.dtype not in TORCH_NAMES:
            sentence = f"is stored as {ref.dtype}, expected BF16, F16 or F32"
            return [error("unsupported", ref.name, sentence, "merge into the full-precision model")]
        if self._is_tied_output(delta):
            sentence = "shares its storage with the input embedding (tie_word_embeddings)"
            hint = "this version does not merge into tied embeddings; untie the base first"
            return [error("unsupported", delta.module, sentence, hint)]
        a, b = delta.tensors["A"].shape, delta.tensors["B"].shape
        shape = (b[0], a[1])
        if self._transposed(delta, ref):
            shape = shape[::-1]
        if ref.shape == shape:
            return []
        if len(ref.shape) != 2:
            sentence = f"is {shape_text(ref.shape)} in the base, expected a linear weight [out, in]"
            return [error("shape-mismatch", ref.name, sentence)]
        return [self._shape_issue(delta, ref)]

    def _shape_issue(self, delta: DeltaSpec, ref: TensorRef) -> Issue:
        """Return the issue of factors that were made for a weight of another size."""
        a, b = delta.tensors["A"].shape, delta.tensors["B"].shape
        n_out, n_in = ref.shape[::-1] if self._transposed(delta, ref) else ref.shape
        parts = []
        if b[0] != n_out:
            parts.append(f"lora_B is {shape_text(b)}, the base needs {shape_text((n_out, b[1]))}")
        if a[1] != n_in:
            parts.append(f"lora_A is {shape_text(a)}, the base needs {shape_text((a[0], n_in))}")
        hint = "the adapter was trained on another, perhaps pruned, model"
        return error("shape-mismatch", delta.module, "; ".join(parts), hint)

    def _transposed(self, delta: DeltaSpec, ref: TensorRef) -> bool:
        """Return True when the tensor is stored ``[in, out]``: by class where it is known, else by shape."""
        product = (delta.tensors["B"].shape[0], delta.tensors["A"].shape[1])
        says_so = bool(self._adapter.config.get("fan_in_fan_out"))
        odd = ref.shape != product and ref.shape == product[::-1]
        if not (odd or says_so or may_hold_conv1d(self._base.config)):
            return False
        kind = self._skeleton.classes.get(delta.module) if self._skeleton else None
        if kind is not None:
            return kind == "Conv1D"
        return odd if product[0] != product[1] else says_so

    def _is_tied_output(self, delta: DeltaSpec) -> bool:
        """Return True for an output embedding that is the input embedding."""
        if delta.module.rpartition(".")[2] not in _OUTPUT_NAMES:
            return False
        flags = [level.get("tie_word_embeddings") for _, level in config_levels(self._base.config)]
        if any(flag is not None for flag in flags):
            return any(flags)
        return self._skeleton is not None and delta.parameter in self._skeleton.tied

    def _rule_issues(self, rule: TargetRule) -> list[Issue]:
        """Return where the configuration's targets and the adapter's tensors disagree."""
        allowed = self._skeleton.all_linear() if rule.all_linear and self._skeleton else None
        issues = []
        for module in sorted(self._adapter.modules):
            if not rule.matches(module) or (allowed is not None and module not in allowed):
                sentence = f"the adapter has tensors for it, and {_why_not(rule, module)}"
                hint = "PEFT would drop these tensors without a word; the config is not the one of training"
                issues.append(error("unexpected-tensor", module, sentence, hint))
        for entry in rule.unmatched_targets(self._adapter.modules | self._left_out(rule)):
            sentence = (
                f"the entry {entry!r} matches none of the adapter's {len(self._adapter.modules)} modules"
            )
            hint = "remove it from adapter_config.json if it was never trained"
            issues.append(error("unmatched-target", "target_modules", sentence, hint))
        return issues + self._missing_modules(rule)

    def _left_out(self, rule: TargetRule) -> frozenset[str]:
        """Return the base's modules that the rule does not match; an entry may stand for one of those.

        PEFT saves ``"all-linear"`` expanded, with the modules that ``exclude_modules`` takes out again.
        """
        modules = (name.removesuffix(".weight") for name in self._tensors if name.endswith(".weight"))
        return frozenset(module for module in modules if not rule.matches(module))

    def _missing_modules(self, rule: TargetRule) -> list[Issue]:
        """Return an issue for each linear layer that the configuration targets and the adapter lacks."""
        candidates = [
            module
            for ref in self._tensors.values()
            if ref.name.endswith(".weight") and len(ref.shape) == 2
            for module in [ref.name.removesuffix(".weight")]
            if module not in self._adapter.modules and rule.matches(module)
        ]
        if not candidates:
            return []
        if self._skeleton is None:
            sentence = (
                f"and {len(candidates) - 1} more are targeted by the config; the adapter has no tensors"
            )
            hint = "transformers has no class for this model, so whether they are linear layers is unknown"
            return [warning("missing-module", candidates[0], sentence, hint)] if not rule.all_linear else []
        targeted = self._skeleton.all_linear()
        sentence = "the config targets it, and the adapter has no tensors for it"
        hint = "the adapter file is incomplete; PEFT would leave the module as it is, with a warning"
        return [
            error("missing-module", module, sentence, hint)
            for module in candidates
            if (module in targeted if rule.all_linear else self._skeleton.is_linear(module))
        ]


def _why_not(rule: TargetRule, module: str) -> str:
    """Return which field of a rule leaves a module out."""
    if rule.excludes(module):
        return "exclude_modules leaves it out"
    if rule.all_linear:
        return 'target_modules="all-linear" does not cover it'
    if replace(rule, layers_to_transform=None).matches(module):
        return "layers_to_transform leaves its layer out"
    return "target_modules does not match it"


def _full_tensors(adapter: Adapter, unchanged: frozenset[str]) -> list[Issue]:
    """Return a note on each whole parameter that equals the base's, and an error for the others."""
    issues = []
    for parameter, ref in adapter.full_tensors.items():
        if parameter in unchanged:
            issues.append(note("full-tensor", ref.name, "was saved along and equals the base's"))
        else:
            sentence = "is a fully trained weight: not merged by this version"
            issues.append(error("unexpected-tensor", ref.name, sentence, "merge it with PEFT"))
    return issues


def _quantised(base: Checkpoint) -> list[Issue]:
    """Return an issue when the base is stored quantised."""
    parent = base.config.get("_name_or_path")
    hint = "merge into its full-precision parent: --base PARENT" + (f" (perhaps {parent})" if parent else "")
    for path, level in config_levels(base.config):
        settings = level.get("quantization_config")
        if settings:
            method = settings.get("quant_method", "unnamed") if isinstance(settings, dict) else "unnamed"
            subject = f"{path}.quantization_config" if path else "quantization_config"
            return [error("unsupported", subject, f"the base is stored quantised ({method})", hint)]
    for ref in base.tensors():
        low = ref.dtype.startswith(("F8_", "F6_", "F4")) and len(ref.shape) >= 2
        if low or _QUANTISED_NAMES.search(ref.name):
            sentence = f"the base is stored quantised (a {ref.dtype} tensor of this name)"
            return [error("unsupported", ref.name, sentence, hint)]
    return []


def _stored_as(base: Checkpoint, dtype: str | None) -> tuple[dict[str, TensorRef], list[Issue]]:
    """Return each tensor as the output stores it, and a note on those that keep their own dtype.

    A change of dtype is for the tensors in the checkpoint's main dtype, the one most of its bytes are in.
    What the base keeps apart on purpose (a float32 ``A_log`` among bfloat16) stays as it is.
    """
    refs = {ref.name: ref for ref in base.tensors()}
    main = _main_dtype(base)
    if dtype is None or main is None or DTYPE_CODES[dtype] == main:
        return refs, []
    code = DTYPE_CODES[dtype]
    apart = Counter(ref.dtype for ref in refs.values() if ref.dtype not in (main, code))
    issues = [
        note("dtype-kept", "", f"{count} tensors stay {kept}: the base keeps them apart from its {main}")
        for kept, count in apart.items()
        if kept in TORCH_NAMES
    ]
    for name, ref in refs.items():
        if ref.dtype == main:
            refs[name] = replace(ref, dtype=code, nbytes=nbytes_of(code, ref.shape))
    return refs, issues


def _main_dtype(base: Checkpoint) -> str | None:
    """Return the floating dtype that most bytes of a checkpoint are in."""
    sizes: Counter[str] = Counter()
    for ref in base.tensors():
        if ref.dtype in TORCH_NAMES:
            sizes[ref.dtype] += ref.nbytes
    return sizes.most_common(1)[0][0] if sizes else None


def _place(
    base: Checkpoint, stored: Mapping[str, TensorRef], max_shard_bytes: int | None
) -> tuple[OutputFile, ...]:
    """Return the output's weight files: the base's own, or shards of at most so many bytes."""
    if max_shard_bytes is None:
        return tuple(
            place(file.name, [stored[ref.name] for ref in file.tensors], file.metadata) for file in base.files
        )
    refs = [stored[ref.name] for ref in base.tensors()]
    metadata = base.files[0].metadata
    return tuple(place(name, shard, metadata) for name, shard in split(refs, max_shard_bytes))


def _steps(
    base: Checkpoint, files: tuple[OutputFile, ...], deltas: Mapping[str, tuple[DeltaSpec, ...]]
) -> tuple[Step, ...]:
    """Return one step per output tensor, in the order of the output's bytes."""
    sources = base.by_name()
    steps = []
    for slot in (slot for file in files for slot in file.slots):
        source = sources[slot.name]
        if slot.name in deltas or slot.dtype != source.dtype:
            steps.append(Step((slot,), Merge("dense", (source,), deltas.get(slot.name, ()))))
        else:
            steps.append(Step((slot,), Copy(source)))
    return tuple(steps)


def _side_files(
    base: Checkpoint, adapter: Adapter, own: frozenset[str]
) -> tuple[tuple[SideFile, ...], list[Issue]]:
    """Return the side files of the output: the base's, but for those that the adapter has its own of."""
    replacing = [file for file in adapter.side_files if file.name in own]
    kept = [file for file in base.side_files if file.name not in own]
    issues = [
        note("side-file", file.name, "comes from the adapter, whose copy differs from the base's")
        for file in replacing
    ]
    return tuple(sorted([*kept, *replacing], key=lambda file: file.name)), issues


def _dtype_patch(base: Checkpoint, dtype: str | None) -> dict[str, str]:
    """Return what a change of dtype changes in ``config.json``, at every level that names one."""
    main = _main_dtype(base)
    if dtype is None or main is None or DTYPE_CODES[dtype] == main:
        return {}
    patch = {
        f"{path}.{key}".lstrip("."): dtype
        for path, level in config_levels(base.config)
        for key in ("dtype", "torch_dtype")
        if key in level and (not path or level[key] == TORCH_NAMES[main])
    }
    return patch or {"torch_dtype": dtype}
