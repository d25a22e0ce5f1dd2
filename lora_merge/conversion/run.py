"""Converts an adapter: locate and read it, draft the output, then write it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

from lora_merge.adapters.mlx_spelling import in_names_of
from lora_merge.conversion import draft, needs_base
from lora_merge.conversion.families import serving_issues
from lora_merge.conversion.job import Conversion, adapter_out, local_paths, raise_unconvertible
from lora_merge.conversion.pushing import on_this_disk, pushed
from lora_merge.conversion.reading_back import OnBase
from lora_merge.conversion.recipe import recipe_of, unsaid
from lora_merge.conversion.writers import check_ready
from lora_merge.conversion.writing import carry_out
from lora_merge.core.identity import Inputs
from lora_merge.core.report import Observer, Silence
from lora_merge.formats.stored_versions import versions_of
from lora_merge.merging.headline import Work, adapter_headline, announce
from lora_merge.peft_rules.loose_ends import without_base
from lora_merge.planning import Joined, Reading, check_fit, raise_errors
from lora_merge.planning.locate import check_ignored, find, locate_adapter
from lora_merge.planning.resolve import resolve_adapter
from lora_merge.planning.run import InputTexts, JoinedInputs, join_inputs
from lora_merge.requests.recording import record_of
from lora_merge.runtime.clock import Clock
from lora_merge.runtime.shortage import translate_out_of_memory
from lora_merge.serving import ENGINES
from lora_merge.storage.digests import text_digest
from lora_merge.storage.hub import Access
from lora_merge.storage.input_files import watching
from lora_merge.storage.local_copies import without_copies
from lora_merge.storage.objects.urls import path_here
from lora_merge.storage.shown import by_url, errors_by_url
from lora_merge.storage.signs import sample_digest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_merge.conversion.lora import ConvertReport
    from lora_merge.core.adapter import Adapter
    from lora_merge.core.checkpoint import Checkpoint
    from lora_merge.planning.locate import Place
    from lora_merge.requests.choices import AdapterFormat
    from lora_merge.requests.request import ConvertRequest


_FORMATS: Mapping[AdapterFormat, str] = {"peft": "PEFT", "gguf": "GGUF", "mlx": "MLX"}
"""Format of the output → its name."""


def convert_adapter(request: ConvertRequest, *, observer: Observer | None = None) -> ConvertReport:
    """Rewrite an adapter.

    Raises:
        LoraMergeError: see `lora_merge.errors`. The output's path is then as it was before.
    """
    watch, clock = observer or Silence(), Clock()
    with on_this_disk(request, f"Convert {request.adapter}") as (placed, push):
        with clock("plan"), translate_out_of_memory("planning"):
            job = plan_conversion(placed, watch)
        announce(watch, Work(f"{adapter_headline(job.adapter)} → {_wanted(job)}"))
        return pushed(carry_out(job, watch, clock), placed, request, push, watch)


def _wanted(job: Conversion) -> str:
    """Return what is made of the adapter: its format, its rank where that changes, and the engine."""
    keep = job.recipe.keep
    rank = f" r{keep.rank}" if keep is not None and keep.rank else ""
    engine = f" for {ENGINES[job.serving].name}" if job.serving else ""
    return f"{_FORMATS[job.recipe.format]} LoRA{rank}{engine}"


def plan_conversion(request: ConvertRequest, watch: Observer) -> Conversion:
    """Locate and read the inputs, and draft the output. Writes nothing.

    Raises:
        ChangedError: a file changed while it was read.
        LoraMergeError: it cannot be converted.
    """
    with watching() as seen, errors_by_url():
        job = _plan(request, watch)
    read = without_copies(seen.inputs())
    return replace(job, read=read, provenance=_with_versions(job, read))


def _with_versions(job: Conversion, read: Inputs) -> Mapping[str, object]:
    """Return the record of the inputs with the versions of a base's files, where those are in a store."""
    versions = versions_of(job.base, read) if job.base is not None else {}
    base = job.provenance.get("base")
    if not versions or not isinstance(base, dict):
        return job.provenance
    return {**job.provenance, "base": {**base, "versions": versions}}


def _plan(request: ConvertRequest, watch: Observer) -> Conversion:
    out = adapter_out(request.out)
    access = Access(request.token, request.offline)
    found_adapter = find(request.adapter, "adapter")
    place = locate_adapter(found_adapter, request.adapter, access, watch, request.ignore_file)
    check_ignored([place], request.ignore_file)
    raise_errors(place.issues)
    adapter = by_url(resolve_adapter(place.whole(), place.ignored))
    recipe = recipe_of(request, adapter)
    found_places: tuple[Place, ...] = ()
    joined, issues = None, (*place.issues, *adapter.issues, *without_base(adapter))
    if request.base is not None or needs_base(adapter, recipe):
        found = _on_base(request, watch)
        joined, issues = found.joined, found.issues
        found_places = (found.base, *found.adapters)
        # An adapter of mlx-lm is read under the names of its base.
        adapter = in_names_of(adapter, joined.base.config)
        # Only the base shows some traits (excluded modules, copies of embeddings), and with them what an
        # engine needs.
        recipe = recipe_of(request, adapter, joined)
    raise_errors(issues)
    # An unknown family or a missing package is reported before anything is computed.
    if recipe.format == "gguf" and joined is not None:
        check_ready(joined.base.config)
    if request.serving is not None:
        about = serving_issues(request.serving, adapter, joined)
        raise_unconvertible(about)
        issues = (*issues, *about)
    drafted = draft(adapter, recipe, joined)
    raise_unconvertible([*drafted.issues, *unsaid(drafted.modules, recipe)])
    return Conversion(
        source=request.adapter,
        adapter=adapter,
        found=drafted,
        recipe=recipe,
        base=joined.base if joined else None,
        on_base=OnBase(joined.base.root, joined.reading, access) if joined else None,
        out=out,
        serving=request.serving,
        overwrite=request.overwrite,
        strict=request.strict,
        inputs=local_paths((adapter.root, *([joined.base.root] if joined else []))),
        read=Inputs(),
        provenance=_provenance(request, place, adapter, joined),
        issues=issues,
        home=path_here(adapter.root),
        places=(place, *found_places),
    )


def _on_base(request: ConvertRequest, watch: Observer) -> JoinedInputs:
    """Return the adapter on its base, together with what was read.

    Raises:
        PlanError: it does not fit.
    """
    texts = InputTexts(
        ((request.adapter, 1.0),),
        request.base,
        request.ignore_file,
        Access(request.token, request.offline),
    )
    reading = Reading(request.base_is, request.expert_layout, request.allow_svd)
    found = join_inputs(texts, reading, watch)
    check_fit(found.joined)
    return found


def _provenance(
    request: ConvertRequest, place: Place, adapter: Adapter, joined: Joined | None
) -> dict[str, object]:
    """Return the manifest's record of the inputs and options."""
    return {
        "adapter": {
            "path": place.text,
            "digest": adapter.digest,
            "config": text_digest(json.dumps(dict(adapter.config), sort_keys=True)),
            "format": adapter.format,
        },
        **({"base": _of_base(joined.base)} if joined else {}),
        "options": record_of(request),
    }


def _of_base(base: Checkpoint) -> dict[str, str]:
    """Return the manifest's record of a base: its path, and digests of its config and of a sample of its bytes."""
    return {
        "path": base.root,
        "config": text_digest(json.dumps(dict(base.config), sort_keys=True)),
        # A sample, since a conversion need not read the weights of its base.
        "sample": sample_digest(list(base.tensors())),
    }
