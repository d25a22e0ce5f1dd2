"""How an output stores each parameter: as the base does, all dense, or dense where it changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lora_merge.codecs import WRITTEN_BY_DEFAULT
from lora_merge.core.checkpoint import ConfigPatch
from lora_merge.core.report import Issue, note
from lora_merge.core.tensor import DTYPE_CODES, TORCH_NAMES, nbytes_of
from lora_merge.core.weight import DENSE, Storage
from lora_merge.planning.mates import with_mates
from lora_merge.quantised import SIDE_FILES, describe, excepting, leftover, plain_config, stored_dtype
from lora_merge.words import counted, listing, size_text

if TYPE_CHECKING:
    from collections.abc import Collection

    from lora_merge.core.checkpoint import Checkpoint
    from lora_merge.planning.change import Change
    from lora_merge.planning.outline import Outline
    from lora_merge.planning.quantising import Targets
    from lora_merge.planning.settings import Policy

DENSE_SHARD = "5GB"
"""Files of a decoded base are split at this size, as ``save_pretrained`` does: they grow two to four times."""


@dataclass(frozen=True, slots=True)
class Storing:
    """How an output stores its parameters, and what follows for the rest of it."""

    storages: Mapping[str, Storage]
    """Of each parameter."""

    decoded: frozenset[str]
    """Parameters that are stored quantised in the base, and dense in the output."""

    dtype: str
    """Of decoded weights, as torch spells it; empty for a base that is stored plain."""

    is_plain: bool
    """True where the base has quantised weights and the output none: nothing of its settings stays."""

    leftovers: frozenset[str] = frozenset()
    """Tensors of the base that mean nothing without its quantisation; they are left out."""

    config_patch: ConfigPatch = field(default_factory=ConfigPatch)
    dropped_files: frozenset[str] = frozenset()
    """Side files that say how weights are quantised."""

    issues: tuple[Issue, ...] = ()

    numbers: Mapping[str, int] = field(default_factory=dict)
    """Of weights that are quantised in the base, see `lora_merge.core.report.Summary.quantised`."""


def storing_of(
    base: Checkpoint,
    outline: Outline,
    changes: Mapping[str, Change],
    main: str | None,
    policy: Policy,
    targets: Targets | None = None,
) -> Storing:
    """Return how an output stores its parameters.

    Args:
        base: what it is made from.
        outline: the output's parameters and their sources.
        changes: what is done to some of them.
        main: code of the dtype that most bytes of the base's plain tensors are in.
        policy: the dtype that is wanted, and how quantised weights are to be stored.
        targets: what is quantised; None for nothing.
    """
    if targets is None:
        return _unquantised(base, outline, changes, main, policy)
    # What is quantised is decoded first, if it is stored in another way.
    plain = _unquantised(base, outline, changes, main, replace(policy, out_storage="dense"))
    settings = {"quantization_config": targets.config}
    deleted = tuple(key for key in plain.config_patch.delete if key not in settings)
    return replace(
        plain,
        storages={**plain.storages, **dict.fromkeys(targets.weights, targets.scheme.storage)},
        config_patch=replace(plain.config_patch, set={**plain.config_patch.set, **settings}, delete=deleted),
        issues=(*plain.issues, *targets.issues, _said_quantised(outline, targets)),
        numbers={**plain.numbers, "quantised": len(targets.weights)},
    )


def _unquantised(
    base: Checkpoint, outline: Outline, changes: Mapping[str, Change], main: str | None, policy: Policy
) -> Storing:
    """Return how an output stores its parameters where --quantize is not given."""
    storages, issues = _plain_storages(outline, main, policy.dtype)
    quantised = frozenset(name for name in outline.names if outline.sources[name].plain is None)
    if not quantised:
        return Storing(storages, frozenset(), "", is_plain=False, issues=tuple(issues))
    code = DTYPE_CODES[policy.dtype] if policy.dtype else stored_dtype(base.quantisation, base.config)
    # Those of a toy codec in the tests are written as they are stored.
    touched = frozenset(
        name
        for name in quantised & changes.keys()
        if policy.out_storage == "base" or outline.sources[name].storage.codec not in WRITTEN_BY_DEFAULT
    )
    mates = with_mates(touched, quantised)
    is_dense = policy.out_storage == "dense" or (touched and policy.out_storage is None)
    if policy.out_storage == "base":
        # What the adapter brings itself, a whole weight or trained rows, was never on the base's grid.
        replaced = frozenset(name for name in touched if _is_replaced(changes[name]))
        decoded = with_mates(replaced, quantised)
    else:
        decoded = quantised if is_dense else mates
    for name in quantised:
        storages[name] = Storage(DENSE, code) if name in decoded else outline.sources[name].storage
    requantised = len(touched - decoded) if policy.out_storage == "base" else 0
    numbers = {
        "decoded": len(decoded),
        "kept": len(quantised) - len(decoded) - requantised,
        "dense_bytes": _nbytes(outline, quantised, code),
        "mixed_bytes": _nbytes(outline, mates, code),
        "base_bytes": _nbytes(outline, (), code),
        "requantised": requantised,
    }
    issues.append(_said(outline, quantised, decoded, mates, code, numbers))
    storing = Storing(
        storages,
        decoded,
        TORCH_NAMES[code],
        is_plain=decoded == quantised,
        issues=tuple(issues),
        numbers=numbers,
    )
    if storing.is_plain:
        return replace(
            storing,
            leftovers=frozenset(filter(leftover, outline.names)),
            config_patch=ConfigPatch(delete=plain_config(base.config)),
            dropped_files=SIDE_FILES,
        )
    return replace(storing, config_patch=_with_exceptions(base, outline, decoded)) if decoded else storing


def _is_replaced(change: Change) -> bool:
    """Return True where values of an adapter take the place of the base's."""
    return change.source is not None or any(delta.facts.replaces_rows for delta in change.deltas)


def _plain_storages(
    outline: Outline, main: str | None, dtype: str | None
) -> tuple[dict[str, Storage], list[Issue]]:
    """Return how the output stores each parameter that the base stores plain, and a note on those that keep their own
    dtype.

    Args:
        outline: the output's parameters and their sources.
        main: code of the main dtype, the one that most bytes of the checkpoint are in.
        dtype: the wanted dtype as torch spells it; None keeps the base's, tensor by tensor.
    """
    code = main if dtype is None else DTYPE_CODES[dtype]
    changing = main is not None and code != main
    storages = {}
    apart: Counter[str] = Counter()
    for name in outline.names:
        source = outline.sources[name]
        # What the base keeps apart on purpose (a float32 A_log among bfloat16) stays as it is.
        is_changed = changing and code and source.storage == Storage(DENSE, main or "")
        storages[name] = Storage(DENSE, code) if is_changed and code else source.storage
        if changing and source.dtype not in (main, code):
            apart[source.dtype] += 1
    issues = [
        note(
            "dtype-kept",
            "",
            f"{counted(count, 'tensor')} not converted: the base stores them in {kept}, apart from its {main}",
        )
        for kept, count in apart.items()
        if kept in TORCH_NAMES
    ]
    return storages, issues


def _with_exceptions(base: Checkpoint, outline: Outline, decoded: frozenset[str]) -> ConfigPatch:
    """Return the patch that adds decoded weights to what the configuration leaves dense, wherever it says so."""
    modules = [name.removesuffix(".weight") for name in outline.names if name in decoded]
    edits, side = excepting(base.quantisation, modules, base.weights), {file.name for file in base.side_files}
    return ConfigPatch(
        set={place: table for place, table in edits.items() if place not in side},
        files={place: table for place, table in edits.items() if place in side},
    )


def _said_quantised(outline: Outline, targets: Targets) -> Issue:
    """Return a note on what is quantised, and how small it becomes."""
    n = sum(outline.sources[name].nbytes for name in targets.weights)
    size = sum(
        nbytes_of(dtype, shape) for one in targets.weights.values() for _, dtype, shape in one.parts.values()
    )
    sentence = (
        f"quantised to {targets.scheme.words}: {counted(len(targets.weights), 'weight')}, {size_text(size)} "
        f"({size_text(n)} in the base); load it in {targets.scheme.engines}"
    )
    return note("storage", "", sentence)


def _said(
    outline: Outline,
    quantised: frozenset[str],
    decoded: frozenset[str],
    mates: frozenset[str],
    dtype: str,
    numbers: Mapping[str, int],
) -> Issue:
    """Return a note on what becomes of quantised weights, with the bytes of each ``--out-storage``."""
    kinds = Counter(describe(outline.sources[name].storage) for name in quantised)
    weights = f"{counted(len(quantised), 'weight')} ({listing([kind for kind, _ in kinds.most_common()])})"
    dense, mixed, base = (
        f"--out-storage {one}: {size_text(numbers[f'{one}_bytes'])}" for one in ("dense", "mixed", "base")
    )
    if not decoded and any(outline.sources[name].storage.codec in WRITTEN_BY_DEFAULT for name in quantised):
        sentence = f"{weights}: kept as the base stores them ({dense})"
    elif numbers["requantised"]:
        sentence = f"{numbers['requantised']} of {weights}: re-encoded on the base's own scales"
        if decoded:
            sentence += (
                f"; {len(decoded)} decoded to {dtype}, because an adapter replaces them, or rows of them"
            )
        sentence += f" ({base}; {mixed}; {dense})"
    elif not decoded:
        # Nothing is decoded, so that a mixed output is the base as it is.
        now = size_text(numbers["mixed_bytes"])
        sentence = f"{weights}: copied as they are stored, because nothing changes them; {now} ({dense})"
    elif decoded == quantised:
        sentence = f"{weights}: decoded to {dtype}"
        if mates != quantised:
            sentence += (
                f"; {len(mates)} of them change, or are loaded together with one that changes ({dense}; "
                f"{mixed}; {base})"
            )
        else:
            sentence += f" ({dense}; {base})"
    else:
        sentence = (
            f"{len(decoded)} of {weights}: decoded to {dtype}; the others are copied as they are stored "
            f"({mixed}; {dense}; {base})"
        )
    return note("storage", "", sentence)


def _nbytes(outline: Outline, decoded: Collection[str], dtype: str) -> int:
    """Return the bytes of all weights where some are decoded."""
    sources = ((name, outline.sources[name]) for name in outline.names)
    return sum(
        nbytes_of(dtype, source.shape) if name in decoded else source.nbytes for name, source in sources
    )
