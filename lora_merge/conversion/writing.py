"""Carries out a conversion or an extraction: makes the factors, writes, reads back, publishes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_merge._version import __version__
from lora_merge.conversion import Maker, adapter_config, module_paths
from lora_merge.conversion.families import left_for
from lora_merge.conversion.job import MARKS, raise_unconvertible
from lora_merge.conversion.lora import ConvertReport, Lora, LoraModule, Made, Recipe, Written
from lora_merge.conversion.reading_back import read_back
from lora_merge.conversion.transforms import BakeScale, PadRank, Pair, ReduceRank, Transform
from lora_merge.conversion.writers import ADAPTER_WRITERS, check_gguf
from lora_merge.core.report import Issue, Observer, Verdict, error, note
from lora_merge.errors import RequestError, VerifyError, WriteError
from lora_merge.formats.repo_files import CONVERSION_MANIFEST
from lora_merge.formats.safetensors import load
from lora_merge.formats.weights import values_of
from lora_merge.merging.changes import change_of
from lora_merge.merging.unchanged_inputs import check
from lora_merge.planning.resolve import resolve_adapter
from lora_merge.planning.run import check_strict
from lora_merge.runtime.shortage import translate_out_of_memory
from lora_merge.storage import staging
from lora_merge.storage.digests import file_digest
from lora_merge.storage.input_files import watching
from lora_merge.storage.spool import Spool

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from lora_merge.conversion.job import Conversion
    from lora_merge.core.adapter import Adapter
    from lora_merge.core.tensor import TensorRef
    from lora_merge.runtime.clock import Clock
    from lora_merge.storage.folder import Folder


def carry_out(job: Conversion, watch: Observer, clock: Clock) -> ConvertReport:
    """Make the factors of every module, write them to staging, read them back, and give the output its name.

    Raises:
        ChangedError: an input changed since it was planned.
        LoraMergeError: the output cannot be written, or is not what was meant.
    """
    check_strict(job.issues, strict=job.strict)
    staging.check_replaceable(
        job.out, overwrite=job.overwrite, inputs=job.read_files(), home=job.home, marks=MARKS
    )
    staging.check_writable(job.out)
    place = staging.staging(job.out, overwrite=job.overwrite, marks=MARKS, inputs=job.read_files())
    with place as stage, translate_out_of_memory("writing the adapter"), watching(job.read) as seen:
        with clock("make"), Spool.open(stage.home) as spool:
            watch.phase("making factors", _nbytes(job.found.modules))
            made = _make(job, spool, watch)
            whole = {name: spool.add(name, values_of(weight)) for name, weight in job.found.decoded.items()}
        lora = _lora(job, made, whole)
        with clock("write"):
            watch.phase("writing", 0)
            names = ADAPTER_WRITERS[job.recipe.format](stage.folder, lora, _padded)
            names += _write_beside(job, lora, stage.folder, names)
        with clock("verify"):
            watch.phase("reading back", 0)
            _check(job, lora, stage)
        # The inputs once more, before the output gets its name.
        check(seen.inputs(), {})
        with clock("publish"):
            staging.publish(stage)
    notes = _kept_ranks(job.recipe, lora)
    written = tuple(_written(one) for one in lora.made)
    nbytes = sum((job.out / name).stat().st_size for name in names)
    return ConvertReport(
        source=job.source,
        out=str(job.out),
        format=job.recipe.format,
        files=tuple(sorted(names)),
        nbytes=nbytes,
        transforms=job.recipe.names(),
        modules=written,
        n_whole=len(lora.whole),
        issues=(*job.issues, *notes),
        seconds=clock.seconds,
    )


def _check(job: Conversion, lora: Lora, stage: staging.Stage) -> None:
    """Read back the staged output, and hold it to the rules of the engine that it is for.

    Raises:
        VerifyError: it is not what was meant.
        ConvertError: the engine cannot serve it.
        WriteError: it changes each time it is read.
    """
    # Once more if a file changed meanwhile: a network filesystem may set times late.
    for _ in range(2):
        before = stage.folder.listing()
        # No reader of adapters knows GGUF, so the package gguf reads it back.
        if job.recipe.format == "gguf":
            verdict = Verdict("full", len(lora.made), 0, tuple(check_gguf(stage.output, lora, _padded)))
        else:
            verdict = read_back(stage.output, lora, job.on_base)
        if not verdict.ok:
            raise VerifyError(verdict)
        raise_unconvertible(_left_for(job, stage.output))
        if stage.folder.listing() == before:
            return
    hint = "run again while no other program writes to it"
    raise WriteError(f"{stage.output}: changed while it was being read back", hint=hint)


def _kept_ranks(recipe: Recipe, lora: Lora) -> list[Issue]:
    """Return a note if ``--rank`` was larger than the rank of every module, since nothing was padded."""
    wanted = recipe.keep.rank if recipe.keep is not None and recipe.keep.energy is None else None
    largest = max((one.rank for one in lora.made), default=0)
    if wanted is None or not 0 < largest < wanted or not all(one.module.is_exact for one in lora.made):
        return []  # of a change without factors, no more than its matrix has
    sentence = f"is {wanted}, a limit that changed nothing: the largest rank of a module is {largest}"
    sentence += f"; --pad-rank {wanted} pads every module to rank {wanted} with zeros"
    return [note("rank-kept", "rank", sentence)]


def _left_for(job: Conversion, root: Path) -> list[Issue]:
    """Return errors for what the engine still cannot serve: there, a rule promised a cure that is none."""
    if job.serving is None or job.recipe.format != "peft":
        return []
    left = left_for(job.serving, resolve_adapter(root), job.base, job.adapter, job.source)
    return [
        error("unsupported", one.trait, f"{one.sentence}, and no conversion changes that", one.cures[-1])
        for one in left.obstacles
        if one.effect in {"refused", "wrong"}
    ]


def _make(job: Conversion, spool: Spool, watch: Observer) -> list[Made]:
    """Compute the factors of every module, and keep them in the spool: their ranks are known only then."""
    recipe = job.recipe
    # Padding is not among them: it needs the ranks of all modules, and is done when the file is written.
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


def _lora(job: Conversion, made: Sequence[Made], decoded: Mapping[str, TensorRef]) -> Lora:
    """Return the LoRA for the writer, with one rank for all modules where the recipe wants that.

    Args:
        job: what is carried out.
        made: its modules.
        decoded: what is carried whole beside the tensors of the draft, by their names in a PEFT file.

    Raises:
        RequestError: a rank is larger than the one that all are to have.
    """
    recipe = job.recipe
    if recipe.uniform:
        largest = max(made, key=lambda one: one.rank)
        rank = min(
            # The smallest allowed rank that holds every module.
            (rank for rank in recipe.ranks if rank >= largest.rank),
            default=0 if recipe.ranks else largest.rank,
        )
        if not rank:
            wanted = ", ".join(map(str, recipe.ranks))
            sentence = f"is {wanted}, but {largest.module.path} has rank {largest.rank}"
            raise RequestError(
                "", 0, "pad_rank", sentence, hint=f"add --rank {max(recipe.ranks)} to reduce the rank"
            )
        made = [replace(one, padded=rank) for one in made]
    modules = module_paths(job.base.parameters()) if job.base else ()
    whole = {**job.found.whole, **decoded}
    config = adapter_config(job.adapter, made, recipe, modules, whole)
    base_config = job.base.config if job.base else {}
    return Lora(tuple(made), config, whole, base_config)


def _padded(made: Made) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B of a module as they are written, loaded from the spool and padded."""
    pair = PadRank(made.rank)(Pair(load(made.a), load(made.b), made.scale))
    return pair.a, pair.b


def _write_beside(job: Conversion, lora: Lora, folder: Folder, written: Sequence[str]) -> tuple[str, ...]:
    """Write the other files of the output: tokenizer files that the adapter has, and the manifest. Return their names.

    Args:
        job: what is carried out.
        lora: what is written.
        folder: where.
        written: names of the files that exist already.
    """
    for side_file in job.adapter.side_files:
        folder.copy_in(side_file.source, side_file.name)
    beside = tuple(file.name for file in job.adapter.side_files)
    manifest = {
        "lora_merge_version": __version__,
        **job.provenance,
        "files": {name: file_digest(folder.path / name) for name in sorted({*written, *beside})},
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
    """Return the dtype code in which most bytes of an adapter's factors are stored; ``F32`` if it has none."""
    sizes: dict[str, int] = {"F32": 0}
    refs = [ref for delta in adapter.deltas for ref in delta.factors.values()]
    refs += [ref for pair in adapter.stacked for ref in pair.tensors.values()]
    for ref in refs:
        sizes[ref.dtype] = sizes.get(ref.dtype, 0) + ref.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def _nbytes(modules: Sequence[LoraModule]) -> int:
    """Return roughly how many bytes the factors have, in float32; for progress only."""
    return sum(4 * module.rank * (module.shape[0] + module.shape[-1]) for module in modules)
