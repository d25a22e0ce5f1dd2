"""A base and a full fine-tune → the weights that differ → a LoRA of the difference."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lora_merge.conversion import Draft
from lora_merge.conversion.difference import Pairing, extracted, misfits
from lora_merge.conversion.job import Conversion, adapter_out, local_paths
from lora_merge.conversion.lora import ConvertReport, Keep, Recipe
from lora_merge.conversion.pushing import on_this_disk, pushed
from lora_merge.conversion.reading_back import OnBase
from lora_merge.conversion.writing import carry_out
from lora_merge.core.adapter import Adapter
from lora_merge.core.checkpoint import CONFIG_FILE
from lora_merge.core.identity import Inputs
from lora_merge.core.report import Observer, Silence
from lora_merge.core.tensor import DTYPE_CODES
from lora_merge.errors import RequestError
from lora_merge.formats.model_config import read_config
from lora_merge.formats.side_files import adapter_side_files
from lora_merge.formats.stored_weights import settings_files
from lora_merge.formats.weights import same_weights
from lora_merge.merging.headline import Work, announce, model_words
from lora_merge.modeling.skeleton import build_skeleton
from lora_merge.planning import Reading, raise_errors
from lora_merge.planning.locate import find, locate_base
from lora_merge.planning.resolve import counterpart, resolve_base, stored_in
from lora_merge.quantised import leftover, refusals
from lora_merge.requests.request import ExtractRequest
from lora_merge.runtime.clock import Clock
from lora_merge.runtime.shortage import translate_out_of_memory
from lora_merge.storage.hub import Access
from lora_merge.storage.input_files import watching
from lora_merge.storage.local_copies import local_path, without_copies
from lora_merge.storage.shown import by_url, errors_by_url
from lora_merge.storage.sources import is_local

if TYPE_CHECKING:
    from collections.abc import Collection

    from lora_merge.core.checkpoint import Checkpoint
    from lora_merge.core.weight import Weight
    from lora_merge.layouts import Stored
    from lora_merge.planning.locate import Place
    from lora_merge.requests.request import ExtractRequest


def extract_adapter(request: ExtractRequest, *, observer: Observer | None = None) -> ConvertReport:
    """Write a LoRA of what a full fine-tune changed in its base.

    Raises:
        RequestError: neither ``rank`` nor ``energy`` is given.
        LoraMergeError: see `lora_merge.errors`. The output's path is then as it was before.
    """
    watch, clock = observer or Silence(), Clock()
    if request.rank is None and request.energy is None:
        hint = "pass for example --rank 32, or --energy 0.9"
        raise RequestError(
            "",
            0,
            "rank",
            "neither rank nor energy is given, expected how much of each change to keep",
            hint=hint,
        )
    message = f"Extract the difference between {request.tuned} and {request.base}"
    with on_this_disk(request, message) as (placed, push):
        with clock("plan"), translate_out_of_memory("planning"), errors_by_url(), watching() as seen:
            job = _plan(placed, watch)
        made = carry_out(replace(job, read=without_copies(seen.inputs())), watch, clock)
        return pushed(made, placed, request, push, watch)


def _plan(request: ExtractRequest, watch: Observer) -> Conversion:
    out = adapter_out(request.out)
    access = Access(request.token, request.offline)
    places = [
        locate_base(find(text, role), text, access, watch)
        for text, role in ((request.base, "base"), (request.tuned, "tuned"))
    ]
    for place in places:
        # What small files show is refused before anything large is fetched.
        if place.is_remote:
            raise_errors(refusals(read_config(place.root / CONFIG_FILE), settings_files(place.root)))
    base, tuned = (resolve_base(place.whole(), place.prefix) for place in places)
    of_storage = [issue for checkpoint in (base, tuned) for issue in checkpoint.issues]
    raise_errors(of_storage)
    pairing = _paired(base, tuned)
    issues = [*(issue for place in places for issue in place.issues), *of_storage, *misfits(pairing)]
    raise_errors(issues)
    rank = f" r{request.rank}" if request.rank else ""
    model = model_words(base.config, base.parameters())
    announce(watch, Work(f"{model}: difference to {request.tuned} → PEFT LoRA{rank}"))
    # The two checks come before the comparison, which reads both models.
    found = extracted(
        pairing, _changed(pairing, watch), targets=request.target, save_modules=request.save_modules
    )
    raise_errors(found.issues)
    config = {**found.config, "base_model_name_or_path": request.base, "peft_type": "LORA"}
    # An adapter without tensors. Its config is the starting point of the one that is written.
    adapter = Adapter(str(tuned.root), "peft", config, (), frozenset(), (), digest="")
    if any(
        issue.code == "resized" for issue in found.issues
    ):  # the tokens that were added go with their rows
        adapter = replace(adapter, side_files=by_url(adapter_side_files(local_path(tuned.root))))
    dtype = None if request.dtype is None else DTYPE_CODES[request.dtype]

    return Conversion(
        source=request.tuned,
        adapter=adapter,
        found=Draft(tuple(found.modules), found.whole, decoded=found.decoded),
        recipe=Recipe(keep=Keep(request.rank, request.energy), explicit=True, dtype=dtype),
        base=base,
        # The base is on the disk by now, or in a store, so no hub is needed.
        on_base=OnBase(base.root, Reading(), Access(offline=is_local(base.root))),
        out=out,
        serving=None,
        overwrite=request.overwrite,
        strict=request.strict,
        inputs=local_paths((base.root, tuned.root, *sorted({ref.file for ref in tuned.tensors()}))),
        places=tuple(places),
        read=Inputs(),
        provenance={"base": _origin(places[0]), "tuned": _origin(places[1])},
        issues=(*issues, *found.issues),
    )


def _paired(base: Checkpoint, tuned: Checkpoint) -> Pairing:
    """Return the weights of both checkpoints under the names of either.

    Where only one of them stores both ends of a tie, the other's missing end has the values of the end that it stores.
    """
    before, after = _weights(base, tuned)
    missing = {
        name: weight
        for names, checkpoint in ((after.keys() - before.keys(), base), (before.keys() - after.keys(), tuned))
        for stored in [stored_in(checkpoint)]
        for name in names
        for weight in [counterpart(name, stored, checkpoint)]
        if weight is not None
    }
    known, stored = build_skeleton(base.config), stored_in(tuned)
    tied = (build_skeleton(tuned.config) or known).tied if known is not None else {}
    ends = [(stored.disk_name(end), stored.disk_name(source)) for end, source in tied.items()]
    # Ends of a tie that neither checkpoint stores.
    twins = {
        end: source
        for one, another in ends
        for end, source in ((one, another), (another, one))
        if source in after and end not in after and end not in before
    }
    before, after = missing | before, missing | after
    spelled = _spelled({*before, *after, *twins}, stored_in(base))
    return Pairing(base, tuned, known, before, after, twins, spelled)


def _weights(*checkpoints: Checkpoint) -> list[dict[str, Weight]]:
    """Return the weights of checkpoints by name, without what means nothing where weights are not quantised."""
    found = [checkpoint.parameters() for checkpoint in checkpoints]
    if all(weight.plain is not None for weights in found for weight in weights.values()):
        return found
    return [{name: weight for name, weight in weights.items() if not leftover(name)} for weights in found]


def _spelled(names: Collection[str], stored: Stored) -> dict[str, str]:
    """Return stored name → transformers' name, where they differ. PEFT drops names that it does not know."""
    conversion = stored.conversion
    found = {}
    for name in names if conversion is not None else ():
        assert conversion is not None
        canonical, pattern = conversion.canonical(name)
        if canonical != name and pattern is None and conversion.shape(canonical) is not None:
            found[name] = canonical
    return found


def _changed(pairing: Pairing, watch: Observer) -> frozenset[str]:
    """Return the names of the weights whose values differ. Reads both checkpoints."""
    before, after = pairing.before, pairing.after
    common = before.keys() & after.keys()
    watch.phase("comparing", sum(before[name].nbytes for name in common))
    changed = set()
    # In the order of the base's files: sequential reads.
    for name in (name for name in before if name in common):
        if not same_weights(before[name], after[name]):
            changed.add(name)
        watch.advance(before[name].nbytes)
    return frozenset(changed)


def _origin(place: Place) -> dict[str, str]:
    return {"path": place.text, **({"commit": place.origin.commit} if place.origin else {})}
