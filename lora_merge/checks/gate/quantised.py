"""Do the parts of quantised weights belong together, and do modules that engines load as one agree?"""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from typing import TYPE_CHECKING

from lora_merge.checks.gate.grids import grid_of, wanted_grids
from lora_merge.checks.gate.parts import Module, grouped
from lora_merge.checks.gate.scheme import Scheme
from lora_merge.core.checkpoint import CONFIG_FILE
from lora_merge.core.report import error
from lora_merge.core.tensor import shape_text
from lora_merge.errors import CheckpointError
from lora_merge.storage.reading import stream_of
from lora_merge.storage.sources import open_source
from lora_merge.words import listing

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from lora_merge.core.report import Issue
    from lora_merge.core.tensor import TensorRef
    from lora_merge.formats.written_checkpoint import Output

_FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
"""Modules that engines load as one matrix."""

_EXPERTS = re.compile(r"^(.*\.experts)\.\d+\.(.+)$")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_MOST_NAMED = 3


def quantised(output: Output) -> Iterator[Issue]:
    """Yield an issue for each weight whose parts do not fit together, and for modules that disagree with their mates."""
    modules = grouped(output.tensors())
    if not any(module.parts for module in modules.values()):
        return
    scheme = Scheme.of(output)
    for module in modules.values():
        yield from _fit(module, scheme)
    known = [module for module in modules.values() if module.scales is not None and module.codes is not None]
    if not known:
        return
    if not scheme.tables:
        sentence = f"has no settings of a quantisation, but {known[0].name} is quantised: engines would read codes as weights"
        yield error(
            "missing-quantisation", CONFIG_FILE, sentence, "copy the settings from the original model"
        )
        return
    yield from _excepted(known, scheme)
    yield from _left_dense(modules, scheme)
    yield from _mates(modules)
    yield from _shared_scales(modules)


def _fit(module: Module, scheme: Scheme) -> Iterator[Issue]:
    """Yield an issue for parts that are missing, that are too many, or whose shapes do not fit."""
    codes, scales, dense = module.codes, module.scales, module.dense
    if dense is not None and module.parts:
        named = listing([ref.name for ref in module.parts], _MOST_NAMED)
        sentence = f"is stored in full precision, but also has parts of a quantised weight: {named}"
        hint = "remove one of the two: engines differ in which they read"
        yield error("dense-and-quantised", dense.name, sentence, hint)
    elif codes is not None and scales is None:
        # Integers in a matrix may be something else; floats of eight bits are weights.
        if scheme.tables or codes.dtype.startswith("F8_") or not codes.name.endswith(".weight"):
            yield error("codes-without-scales", codes.name, "holds codes, but their scales are missing")
    elif scales is not None and codes is None:
        yield error("scales-without-codes", scales.name, "holds scales, but their codes are missing")
    elif codes is not None and scales is not None and scheme.tables:
        wanted = wanted_grids(module, scheme)
        if wanted and grid_of(scales) not in wanted:
            expected = listing([shape_text(shape) for shape in sorted(wanted)], _MOST_NAMED)
            sentence = f"has the shape {shape_text(scales.shape)}, expected {expected} for {codes.name} {shape_text(codes.shape)}"
            hint = "quantise it again: each block or group needs one scale, ⌈size / block⌉ along each axis"
            yield error("wrong-scales", scales.name, sentence, hint)


def _excepted(known: Sequence[Module], scheme: Scheme) -> Iterator[Issue]:
    """Yield an issue for each quantised module that the settings name as one in full precision."""
    left = set(scheme.left)
    for module in known:
        if module.name in left:
            sentence = "is quantised, but the settings list it as a module in full precision"
            yield error("wrong-exception", module.name, sentence, "remove it from that list")


def _left_dense(modules: Mapping[str, Module], scheme: Scheme) -> Iterator[Issue]:
    """Yield an issue for each dense module whose like are quantised in other layers, where no setting excepts it."""
    alike: dict[str, list[Module]] = defaultdict(list)
    for module in modules.values():
        alike[_NUMBER.sub("#", module.name)].append(module)
    for found in alike.values():
        example = next((one for one in found if one.codes is not None and one.scales is not None), None)
        for module in found if example is not None else ():
            if module.dense is not None and module.is_whole and not scheme.excepts(module.name):
                assert example is not None
                sentence = f"is in full precision, but {example.name} is quantised and no setting excepts this module"
                hint = (
                    "add it to the list of modules that are not quantised: engines would look for its scales"
                )
                yield error("not-excepted", module.name, sentence, hint)


def _mates(modules: Mapping[str, Module]) -> Iterator[Issue]:
    """Yield an issue for each set of modules that engines load as one and that are not stored alike."""
    for mates in _fused(modules):
        yield from _unlike(mates, [_manner(mate) for mate in mates])
    layers: dict[str, list[Module]] = defaultdict(list)
    for module in modules.values():
        if module.is_whole and (match := _EXPERTS.match(module.name)):
            layers[match[1]].append(module)
    for experts in layers.values():
        # Projections of an expert differ in their inputs, so only names and dtypes are compared.
        yield from _unlike(experts, [_manner(expert)[:4] for expert in experts])


def _fused(modules: Mapping[str, Module]) -> Iterator[list[Module]]:
    """Yield the modules that engines load as one matrix, those of a set that are there."""
    for module in modules.values():
        path, _, last = module.name.rpartition(".")
        for names in _FUSED:
            if last == names[0]:
                found = [modules[f"{path}.{name}"] for name in names if f"{path}.{name}" in modules]
                # A module that is wrong by itself is reported separately.
                found = [one for one in found if one.is_whole]
                if len(found) > 1 and not any(map(_is_loaded_alone, found)):
                    yield found


def _is_loaded_alone(module: Module) -> bool:
    """Return True for storages whose engines fuse nothing: MLX and bitsandbytes, where each module has its own bits."""
    codes, scales = module.codes, module.scales
    is_own = scales is not None and scales.name.endswith((".absmax", ".SCB"))
    return is_own or (codes is not None and codes.dtype == "U32")


def _unlike(mates: Sequence[Module], manners: Sequence[tuple[object, ...]]) -> Iterator[Issue]:
    for mate, manner in zip(mates, manners, strict=True):
        if manner != manners[0]:
            sentence = f"is stored differently from {mates[0].name}, but engines load both as one matrix"
            yield error(
                "mates-differ",
                mate.name,
                sentence,
                "store all of them in the same way, or all in full precision",
            )
            return


def _manner(module: Module) -> tuple[object, ...]:
    """Return how a module is stored: ends and dtypes of its parts, then sizes that do not depend on its outputs."""
    codes, scales = module.codes, module.scales
    if codes is None or scales is None:
        return ("", "", "", "")
    ends = (codes.name.removeprefix(module.name), scales.name.removeprefix(module.name))
    manner = (ends[0], codes.dtype, ends[1], scales.dtype)
    # GPTQ and AWQ store the inputs first.
    axis = 0 if ends[0] == ".qweight" else -1
    return (*manner, len(scales.shape), codes.shape[axis], scales.shape[axis] if scales.shape else 1)


def _shared_scales(modules: Mapping[str, Module]) -> Iterator[Issue]:
    """Yield an issue for each set of fused modules whose NVFP4 scales for the whole weight differ: engines take one of
    them for all.
    """
    sets = [[mate.shared for mate in mates if mate.shared is not None] for mates in _fused(modules)]
    contents = _contents([ref for found in sets for ref in found])
    for found in sets:
        for ref in found[1:]:
            if contents and contents[ref.name] != contents[found[0].name]:
                sentence = f"differs from {found[0].name}, but engines use one scale for both weights"
                hint = "quantise both weights together: the scales of their groups are relative to it"
                yield error("shared-scale", ref.name, sentence, hint)


def _contents(refs: Iterable[TensorRef]) -> dict[str, bytes]:
    """Return the bytes of small tensors by name; none where a file cannot be read, which another rule says."""
    by_file: dict[str, list[TensorRef]] = defaultdict(list)
    for ref in refs:
        by_file[ref.file].append(ref)
    found = {}
    with contextlib.suppress(CheckpointError):
        for file, own in by_file.items():
            with open_source(file) as source, stream_of(source) as stream:
                for ref in own:
                    stream.seek(ref.start)
                    found[ref.name] = stream.read(ref.nbytes)
        return found
    return {}
