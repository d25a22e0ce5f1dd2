"""adapter → draft → factors → files → read back → publish."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_merge._version import __version__
from lora_merge.adapters.mlx_spelling import in_names_of
from lora_merge.convert import (
    Draft,
    Joined,
    Maker,
    adapter_config,
    draft,
    module_paths,
    needs_base,
)
from lora_merge.core.adapter import Adapter
from lora_merge.core.checkpoint import Checkpoint
from lora_merge.core.choices import ServingEngine
from lora_merge.core.identity import Inputs
from lora_merge.core.loose_ends import without_base
from lora_merge.core.lora import ConvertReport, Keep, Lora, LoraModule, Made, Recipe, Written
from lora_merge.core.report import Issue, Observer, Silence, Verdict, error, note
from lora_merge.core.shortage import memory_for
from lora_merge.core.tensor import DTYPE_CODES
from lora_merge.errors import ConvertError, RequestError, VerifyError, WriteError
from lora_merge.io import files, staging
from lora_merge.io.hub import Access
from lora_merge.io.input_files import watching
from lora_merge.io.needed import ADAPTER_CONFIG, CONVERSION_MANIFEST
from lora_merge.io.safetensors import load
from lora_merge.io.signs import sample_digest
from lora_merge.io.spool import Spool
from lora_merge.locate import check_ignored, find, locate_adapter
from lora_merge.pipeline.changes import change_of
from lora_merge.pipeline.clock import Clock
from lora_merge.pipeline.families import left_for, seen_by_engines, serving_issues
from lora_merge.pipeline.inputs import check
from lora_merge.pipeline.planning import check_strict, plan_request
from lora_merge.pipeline.reading_back import Join, read_back
from lora_merge.plan import raise_errors
from lora_merge.requests.recording import record_of
from lora_merge.requests.request import ConvertRequest, Request
from lora_merge.resolve import resolve_adapter
from lora_merge.serving import ENGINES, Need, needs_of
from lora_merge.transforms import BakeScale, PadRank, Pair, ReduceRank, Transform
from lora_merge.words import of_several
from lora_merge.writers import ADAPTER_WRITERS, check_gguf, check_ready

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from lora_merge.io.folder import Folder

MARKS = (ADAPTER_CONFIG, CONVERSION_MANIFEST)
"""Files that show that a directory is an adapter."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """A LoRA to be made and written, wherever its modules come from."""

    source: str
    """What it is made of, as the user named it."""

    adapter: Adapter
    """Its configuration, side files and format; of an extraction, an empty one."""

    found: Draft
    recipe: Recipe
    base: Checkpoint | None
    """Where it is at hand."""

    join: Join | None
    """Puts another adapter on the same base, in the same way."""

    out: Path
    serving: ServingEngine | None
    """The engine that the output has to please."""

    overwrite: bool
    strict: bool
    inputs: tuple[Path, ...]
    read: Inputs
    """The files that planning read, and what it found in them."""

    provenance: Mapping[str, object]
    issues: tuple[Issue, ...]

    home: Path | None = None
    """A folder among the inputs that the output may be in: an adapter may hold other forms of itself."""

    def read_files(self) -> tuple[Path, ...]:
        """Return the directories and the weight files that it is made of."""
        names = {*self.adapter.files, *(ref.file for ref in (self.base.tensors() if self.base else ()))}
        return (*self.inputs, *map(Path, sorted(names)))


def convert_adapter(request: ConvertRequest, *, observer: Observer | None = None) -> ConvertReport:
    """Rewrite an adapter.

    Raises:
        LoraMergeError: see `lora_merge.errors`. Nothing stands under the output's name then, but what stood there
            before.
    """
    watch, clock = observer or Silence(), Clock()
    with clock("plan"), memory_for("planning"):
        job = plan_conversion(request, watch)
    return carry_out(job, watch, clock)


def plan_conversion(request: ConvertRequest, watch: Observer) -> Conversion:
    """Locate and resolve, and draft what is to be written.

    Raises:
        ChangedError: a file changed while it was read.
        LoraMergeError: it cannot be converted.
    """
    with watching() as seen:
        job = _plan(request, watch)
    return replace(job, read=seen.inputs())


def _plan(request: ConvertRequest, watch: Observer) -> Conversion:
    """Locate and resolve, and draft what is to be written."""
    access = Access(request.token, request.offline)
    found_adapter = find(request.adapter, "adapter")
    place = locate_adapter(found_adapter, request.adapter, access, watch, request.ignore_file)
    check_ignored([place], request.ignore_file)
    raise_errors(place.issues)
    adapter = resolve_adapter(place.whole(), place.ignored)
    recipe = recipe_of(request, adapter)
    joined, issues = None, (*place.issues, *adapter.issues, *without_base(adapter))
    if request.base is not None or needs_base(adapter, recipe):
        joined = _join(request, watch)
        issues = joined.plan.issues
        adapter = in_names_of(adapter, joined.base.config)
        recipe = recipe_of(request, adapter, joined)
    raise_errors(issues)
    if recipe.format == "gguf" and joined is not None:
        check_ready(joined.base.config)
    if request.serving is not None:
        about = serving_issues(request.serving, adapter, joined)
        _raise(about)
        issues = (*issues, *about)
    found = draft(adapter, recipe, joined)
    _raise([*found.issues, *_unsaid(found.modules, recipe)])
    inputs = (Path(adapter.root), *([Path(joined.base.root)] if joined else []))
    provenance = {
        "adapter": {
            "path": place.text,
            "digest": adapter.digest,
            "config": files.text_digest(json.dumps(dict(adapter.config), sort_keys=True)),
            "format": adapter.format,
        },
        **({"base": _of_base(joined.base)} if joined else {}),
        "options": record_of(request),
    }
    join = None
    if joined is not None:
        base = joined.base.root

        def join(root: Path) -> Joined:
            return _join(replace(request, adapter=str(root), base=base, ignore_file=()), Silence())

    return Conversion(
        source=request.adapter, adapter=adapter, found=found, recipe=recipe, base=joined.base if joined else None, join=join,
        out=files.output_path(request.out), serving=request.serving, overwrite=request.overwrite, strict=request.strict,
        inputs=inputs, read=Inputs(), provenance=provenance, issues=issues, home=Path(adapter.root),
    )  # fmt: skip


def _of_base(base: Checkpoint) -> dict[str, str]:
    """Return what the manifest says of a base: where it was, and digests of its configuration and of some of its bytes."""
    return {
        "path": base.root,
        "config": files.text_digest(json.dumps(dict(base.config), sort_keys=True)),
        "sample": sample_digest(list(base.tensors())),
    }


def _join(request: ConvertRequest, watch: Observer) -> Joined:
    """Plan a merge into the base: whatever does not fit is refused here."""
    planned = plan_request(
        Request(
            adapter=(request.adapter,), out="", base=request.base, base_is=request.base_is,
            expert_layout=request.expert_layout, ignore_file=request.ignore_file, allow_svd=request.allow_svd, allow_untie=True, allow_again=True,
            token=request.token, offline=request.offline,
        ),
        watch,
    )  # fmt: skip
    return Joined(planned.checkpoint, planned.plan, planned.uses[0].unchanged)


def recipe_of(request: ConvertRequest, adapter: Adapter, joined: Joined | None = None) -> Recipe:
    """Return what is done to an adapter: what the user asks for, and what its format, the output's and an engine need.

    Args:
        request: the user's.
        adapter: from its headers.
        joined: the adapter on its base, once that is known.

    Raises:
        RequestError: the engine reads another format than the one that is asked for.
    """
    needs: frozenset[Need] = frozenset()
    allowed: tuple[int, ...] = ()
    kind = request.format
    if request.serving is not None:
        needs = needs_of(request.serving, *seen_by_engines(adapter, joined))
        engine = ENGINES[request.serving]
        if kind not in {"peft", engine.format}:
            sentence = f"is {kind}, and {engine.name} reads {engine.format}"
            raise RequestError("", 0, "format", sentence, hint="leave one of the two out")
        kind = engine.format
        allowed = engine.ranks.allowed if engine.ranks.by_padding else ()
    is_foreign = adapter.format == "mlx"
    has_keep = request.rank is not None or request.energy is not None
    return Recipe(
        to_lora=request.to_lora
        or "to-lora" in needs
        or adapter.kind == "ADALORA"
        or bool(adapter.config.get("use_bdlora")),
        keep=Keep(request.rank, request.energy) if has_keep else None,
        bake=request.bake_scale or is_foreign or "bake-scale" in needs,
        uniform=request.pad_rank is not None
        or kind == "mlx"
        or "pad-rank" in needs
        or bool(allowed and has_keep),
        ranks=allowed if request.pad_rank is None else (request.pad_rank,),
        explicit=request.expand_targets or is_foreign or "expand-targets" in needs,
        every_layer=kind == "mlx" or "every-layer" in needs,
        every_name="every-name" in needs,
        packed="packed" in needs,
        without_copies=request.serving is not None
        and any(one.why == "embedding" for one in adapter.replacements.values()),
        naming=request.rename or ("v4" if "rename-v4" in needs else None),
        experts=request.experts or ("split" if "split-experts" in needs else None),
        dtype=None if request.dtype is None else DTYPE_CODES[request.dtype],
        format=kind,
    )


def _unsaid(modules: Sequence[LoraModule], recipe: Recipe) -> list[Issue]:
    """Return an issue where a change has to be taken apart, and nobody said how much of it to keep."""
    unfactored = [module.path for module in modules if not module.is_exact]
    if recipe.keep is not None or not unfactored:
        return []
    sentence = of_several(
        len(unfactored),
        "has no factors, and LoRA of a lower rank is not all of its change",
        "have no factors, and LoRA of a lower rank is not all of their change",
    )
    return [error("no-rank", unfactored[0], sentence, "say how much to keep: --rank N or --energy SHARE")]


def carry_out(job: Conversion, watch: Observer, clock: Clock) -> ConvertReport:
    """Make the factors of every module, write them, read them back, and give them their name.

    Raises:
        ChangedError: an input is not what it was.
        LoraMergeError: the output cannot be written, or is not what was meant.
    """
    check_strict(job.issues, strict=job.strict)
    staging.check_replaceable(
        job.out, overwrite=job.overwrite, inputs=job.read_files(), home=job.home, marks=MARKS
    )
    staging.check_writable(job.out)
    place = staging.staging(job.out, overwrite=job.overwrite, marks=MARKS, inputs=job.read_files())
    with place as stage, memory_for("writing the adapter"), watching(job.read) as seen:
        with clock("make"), Spool.open(stage.home) as spool:
            watch.phase("making factors", _nbytes(job.found.modules))
            made = _make(job, spool, watch)
        lora = _lora(job, made)
        with clock("write"):
            watch.phase("writing", 0)
            names = ADAPTER_WRITERS[job.recipe.format](stage.folder, lora, _padded)
            names += _write_beside(job, lora, stage.folder, names)
        with clock("verify"):
            watch.phase("reading back", 0)
            _check(job, lora, stage)
        check(seen.inputs(), {})
        with clock("publish"):
            staging.publish(stage)
    notes = _kept_ranks(job.recipe, lora)
    written = tuple(_written(one) for one in lora.made)
    nbytes = sum((job.out / name).stat().st_size for name in names)
    return ConvertReport(
        source=job.source, out=str(job.out), format=job.recipe.format, files=tuple(sorted(names)), nbytes=nbytes,
        transforms=job.recipe.names(), modules=written, n_whole=len(lora.whole), issues=(*job.issues, *notes),
        seconds=clock.seconds,
    )  # fmt: skip


def _check(job: Conversion, lora: Lora, stage: staging.Stage) -> None:
    """Read back what is staged: again, where it changed meanwhile, since a network filesystem sets times late.

    Raises:
        VerifyError: it is not what was meant.
        ConvertError: the engine that it is for has no use for it.
        WriteError: it changes each time.
    """
    for _ in range(2):
        before = stage.folder.listing()
        if job.recipe.format == "gguf":
            verdict = Verdict("full", len(lora.made), 0, tuple(check_gguf(stage.output, lora, _padded)))
        else:
            verdict = read_back(stage.output, lora, job.join)
        if not verdict.ok:
            raise VerifyError(verdict)
        _raise(_left_for(job, stage.output))
        if stage.folder.listing() == before:
            return
    hint = "run again when nothing else writes to it"
    raise WriteError(f"{stage.output}: changed while it was read back", hint=hint)


def _kept_ranks(recipe: Recipe, lora: Lora) -> list[Issue]:
    """Return a note when a rank was asked for that no module has: it is a limit, and adds nothing."""
    wanted = recipe.keep.rank if recipe.keep is not None and recipe.keep.energy is None else None
    largest = max((one.rank for one in lora.made), default=0)
    if wanted is None or not 0 < largest < wanted or not all(one.module.is_exact for one in lora.made):
        return []  # of a change without factors, no more than its matrix has
    sentence = f"is {wanted}, which is a limit, and no module has more than rank {largest}: no rank was changed by it"
    sentence += f"; --pad-rank {wanted} gives every module the rank {wanted}, with zeros"
    return [note("rank-kept", "rank", sentence)]


def _raise(issues: Sequence[Issue]) -> None:
    """Raise the errors among some issues, if there are any.

    Raises:
        ConvertError: there are.
    """
    errors = [issue for issue in issues if issue.severity == "error"]
    if errors:
        raise ConvertError(errors)


def _left_for(job: Conversion, root: Path) -> list[Issue]:
    """Return what an engine still stumbles over in the output that was made for it."""
    if job.serving is None or job.recipe.format != "peft":
        return []
    left = left_for(job.serving, resolve_adapter(root), job.base, job.adapter, job.source)
    return [
        error("unsupported", one.trait, f"{one.sentence}, whatever is done to the adapter", one.cures[-1])
        for one in left.obstacles
        if one.effect in {"refused", "wrong"}
    ]


def _make(job: Conversion, spool: Spool, watch: Observer) -> list[Made]:
    """Make the factors of every module; they wait in the spool."""
    recipe = job.recipe
    transforms: list[Transform] = []
    if recipe.keep is not None:
        transforms.append(ReduceRank(recipe.keep))
    if recipe.is_rescaled:
        transforms.append(BakeScale())
    maker = Maker(change_of, recipe, transforms, _own_dtype(job.adapter))
    made = []
    for module in job.found.modules:
        pair, loss = maker(module)
        a, b = spool.add(f"{module.path}:A", pair.a), spool.add(f"{module.path}:B", pair.b)
        made.append(Made(module, a, b, pair.scale, loss))
        watch.advance(_nbytes([module]))
        watch.done(module.path)
    return made


def _lora(job: Conversion, made: Sequence[Made]) -> Lora:
    """Return what is to be written, once every rank is known.

    Raises:
        RequestError: a rank is larger than the one that all are to have.
    """
    recipe = job.recipe
    if recipe.uniform:
        largest = max(made, key=lambda one: one.rank)
        rank = min(
            (rank for rank in recipe.ranks if rank >= largest.rank),
            default=0 if recipe.ranks else largest.rank,
        )
        if not rank:
            wanted = ", ".join(map(str, recipe.ranks))
            sentence = f"is {wanted}, and {largest.module.path} has rank {largest.rank}"
            raise RequestError(
                "", 0, "pad_rank", sentence, hint=f"add --rank {max(recipe.ranks)} to keep less of it"
            )
        made = [replace(one, padded=rank) for one in made]
    modules = module_paths(job.base.by_name()) if job.base else ()
    config = adapter_config(job.adapter, made, recipe, modules, job.found.whole)
    base_config = job.base.config if job.base else {}
    return Lora(tuple(made), config, job.found.whole, base_config)


def _padded(made: Made) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors of a module as they are written."""
    pair = PadRank(made.rank)(Pair(load(made.a), load(made.b), made.scale))
    return pair.a, pair.b


def _write_beside(job: Conversion, lora: Lora, folder: Folder, written: Sequence[str]) -> tuple[str, ...]:
    """Write what goes with the factors: tokenizer files that the adapter carried, and where it came from.

    Args:
        job: what is carried out.
        lora: what is written.
        folder: where.
        written: the files that are there already.
    """
    for side_file in job.adapter.side_files:
        folder.copy_in(Path(side_file.source), side_file.name)
    beside = tuple(file.name for file in job.adapter.side_files)
    manifest = {
        "lora_merge_version": __version__,
        **job.provenance,
        "files": {name: files.file_digest(folder.path / name) for name in sorted({*written, *beside})},
        "format": job.recipe.format,
        "transforms": list(job.recipe.names()),
        "modules": {
            one.module.path: {"rank": one.rank, **({"lost": one.loss.relative} if one.loss else {})}
            for one in lora.made
        },
    }
    folder.write_text(CONVERSION_MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return (CONVERSION_MANIFEST, *beside)


def _written(made: Made) -> Written:
    return Written(made.module.path, made.module.rank, made.rank, made.scale, made.a.dtype, made.loss)


def _own_dtype(adapter: Adapter) -> str:
    """Return the dtype that most of an adapter's factors are stored in; float32 where it has none."""
    sizes: dict[str, int] = {"F32": 0}
    refs = [ref for delta in adapter.deltas for ref in delta.factors.values()]
    refs += [ref for pair in adapter.stacked for ref in pair.tensors.values()]
    for ref in refs:
        sizes[ref.dtype] = sizes.get(ref.dtype, 0) + ref.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def _nbytes(modules: Sequence[LoraModule]) -> int:
    """Return about how many bytes of factors will be made."""
    return sum(4 * module.rank * (module.shape[0] + module.shape[-1]) for module in modules)
