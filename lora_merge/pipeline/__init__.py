"""The composition root: only these modules know every stage; the stages do not know each other.

`planning` makes a plan, `merging` carries it out, `proving` holds an output to it, years later too; `inspecting`,
`converting` and `extracting` are about adapters. Here are the public verbs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

from lora_merge.core.inputs import path_text
from lora_merge.core.report import Observer, Silence
from lora_merge.core.request import (
    ConvertRequest,
    ExtractRequest,
    InspectRequest,
    Request,
    VerifyRequest,
    parse_fields,
    parse_request,
)
from lora_merge.errors import RequestError
from lora_merge.pipeline.merging import run
from lora_merge.pipeline.planning import explain, plan_request
from lora_merge.pipeline.proving import prove

if TYPE_CHECKING:
    from lora_merge.core.choices import (
        AdapterFormat,
        BaseIs,
        CombineMethod,
        Engine,
        ExpertForm,
        Link,
        Naming,
        OutputDtype,
        ServingEngine,
        VerifyLevel,
    )
    from lora_merge.core.inspection import Inspection
    from lora_merge.core.lora import ConvertReport
    from lora_merge.core.plan import MergePlan
    from lora_merge.core.report import Proof, Report

__all__ = [
    "convert",
    "explain",
    "extract",
    "inspect",
    "merge",
    "plan",
    "prove",
    "run",
    "verify",
]

AdapterPath = str | PathLike[str]
AdapterPaths = AdapterPath | Mapping[AdapterPath, float] | Sequence[AdapterPath | tuple[AdapterPath, float]]
"""One adapter or several, as `merge` takes them; a table and a pair give each its weight."""


def merge(  # noqa: PLR0913 - the options of the command, each by its name
    *,
    adapter: AdapterPaths,
    out: str | PathLike[str],
    base: str | PathLike[str] | None = None,
    base_is: BaseIs | None = None,
    expert_layout: str | Sequence[str] = (),
    ignore_file: str | Sequence[str] = (),
    combine: CombineMethod = "linear",
    density: float = 0.5,
    seed: int = 0,
    allow_untie: bool = False,
    allow_svd: bool = False,
    allow_again: bool = False,
    dtype: OutputDtype | None = None,
    device: str = "auto",
    workers: int | None = None,
    memory_limit: str | int | None = None,
    link: Link | None = None,
    max_shard_size: str | int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    verify: VerifyLevel = "sample",
    strict: bool = False,
    token: str | None = None,
    offline: bool = False,
    observer: Observer | None = None,
) -> Report:
    """Merge an adapter into a base and write a checkpoint that loads without LoRA support.

    Args:
        adapter: adapter directory or repo (``org/name``, ``org/name/folder@revision``, ``ms://org/name``), or
            several; each may have ``:WEIGHT`` behind it. A table gives weights too: ``{"style": 0.7, "facts": 1}``.
        out: directory to create.
        base: base checkpoint directory or repo; default: the adapter's ``base_model_name_or_path``.
        base_is: what the base is to an adapter whose initialisation changed it (PiSSA, OLoRA, CorDA, LoftQ,
            LoRA-GA): the model as published, or what that left of it.
        expert_layout: what cannot be seen of stacked experts: ``out-in`` or ``in-out``, how the base stores a
            square one in the adapter's terms; ``unsloth``, B packed expert by expert.
        ignore_file: files in the adapters' folders that are not read though they may hold weights.
        combine: how the changes of several adapters become one.
        density: share of the values that ``ties`` and ``dare`` keep, above 0 and at most 1.
        seed: of what ``dare`` drops at random.
        allow_untie: untie the embeddings even of a family that engines tie whatever its config says.
        allow_svd: merge methods that decompose the base anew (OSF, PSOFT, AdaMSS).
        allow_again: merge an adapter into a base that has it merged into it already.
        dtype: storage of the output; default: the base's, tensor by tensor.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        workers: worker threads, at most; default: the usable cores, up to eight, as memory allows.
        memory_limit: what the process may hold in memory, for example ``"2GB"``; default: what is free.
        link: how weight files that the merge leaves as they are come into the output: ``copy``, ``reflink`` or
            ``hard``; default: ``reflink`` where the filesystem has it, else ``copy``.
        max_shard_size: for example ``"5GB"``; default: the base's own shards.
        overwrite: replace an existing output, once the new one is whole.
        resume: go on where an interrupted run to the same output stopped, if it was the same merge; what it has written
            is checked first.
        verify: how much of the output to check before it gets its name.
        strict: treat warnings as errors.
        token: for private and gated repos of the Hub; default: ``HF_TOKEN``, or the login.
        offline: take what is in the local cache, and ask no hub.
        observer: hears of phases and bytes.

    Raises:
        LoraMergeError: with a sentence and a ``hint``; nothing stands under ``out`` then, but what stood
            there before.
    """
    request = _request(
        adapter=adapter, out=_path("out", out), base=base, base_is=base_is, expert_layout=expert_layout,
        ignore_file=_names(ignore_file), combine=combine,
        density=density, seed=seed, allow_untie=allow_untie, allow_svd=allow_svd, allow_again=allow_again,
        dtype=dtype, device=device, workers=workers, memory_limit=memory_limit, link=link, max_shard_size=max_shard_size, overwrite=overwrite,
        resume=resume, verify=verify, strict=strict, token=token, offline=offline,
    )  # fmt: skip
    return run(request, observer=observer)


def plan(  # noqa: PLR0913 - as `merge`
    *,
    adapter: AdapterPaths,
    base: str | PathLike[str] | None = None,
    base_is: BaseIs | None = None,
    expert_layout: str | Sequence[str] = (),
    ignore_file: str | Sequence[str] = (),
    combine: CombineMethod = "linear",
    density: float = 0.5,
    seed: int = 0,
    allow_untie: bool = False,
    allow_svd: bool = False,
    allow_again: bool = False,
    dtype: OutputDtype | None = None,
    max_shard_size: str | int | None = None,
    token: str | None = None,
    offline: bool = False,
) -> MergePlan:
    """Return what `merge` would read, compute and write; writes nothing. The arguments are those of `merge`.

    Raises:
        ResolveError: base or adapter cannot be found or read.
        PlanError: they do not fit.
    """
    request = _request(
        adapter=adapter, out="", base=base, base_is=base_is, expert_layout=expert_layout,
        ignore_file=_names(ignore_file), combine=combine,
        density=density, seed=seed, allow_untie=allow_untie, allow_svd=allow_svd, allow_again=allow_again,
        dtype=dtype, max_shard_size=max_shard_size, token=token, offline=offline,
    )  # fmt: skip
    return plan_request(request, Silence()).plan


def verify(  # noqa: PLR0913 - the options of the command, each by its name
    out: str | PathLike[str],
    *,
    base: str | PathLike[str] | None = None,
    adapter: AdapterPaths = (),
    level: Literal["structure", "sample", "full"] = "sample",
    forward: bool = False,
    engine: Engine | None = None,
    engine_python: str | PathLike[str] | None = None,
    prompt: str | Sequence[str] = (),
    n_tokens: int = 8,
    tolerance: float | None = None,
    ignore_file: str | Sequence[str] = (),
    dtype: OutputDtype = "float32",
    trust_remote_code: bool = False,
    token: str | None = None,
    offline: bool = False,
    observer: Observer | None = None,
) -> Proof:
    """Verify a merged checkpoint, now or years later; `Proof.ok` says whether it passed.

    Args:
        out: its directory.
        base: what it was merged into; default: what its manifest names.
        adapter: what was merged into it; default: what its manifest names.
        level: ``sample`` recomputes some rows of each merged tensor, ``full`` all; ``structure`` compares nothing.
        forward: run base and adapter unmerged, and the merged checkpoint, and compare.
        engine: ask this engine too.
        engine_python: the interpreter that has it; default: this one.
        prompt: texts to ask; default: a few built-in ones, and tokens drawn from the vocabulary.
        n_tokens: how many tokens each is answered with.
        tolerance: largest difference of two logits that passes; default: what rounding explains, measured.
        ignore_file: as for `merge`; default: what the manifest says was left out.
        dtype: what the models compute in.
        trust_remote_code: run code that the checkpoint carries, where transformers has no class for the model.
        token: for private and gated repos of the Hub.
        offline: take what is in the local cache, and ask no hub.
        observer: hears of phases.

    Raises:
        ResolveError: there is no such output, or a base or adapter named here cannot be read.
        PlanError: those named here do not fit, or the model cannot be run.
    """
    fields = {
        "out": _path("out", out), "base": base, "adapter": None if adapter == () else adapter,
        "level": level, "forward": forward, "engine": engine,
        "engine_python": engine_python,
        "prompt": _names(prompt), "n_tokens": n_tokens,
        "tolerance": tolerance, "ignore_file": _names(ignore_file), "dtype": dtype, "trust_remote_code": trust_remote_code, "token": token,
        "offline": offline,
    }  # fmt: skip
    parsed = parse_fields(fields)
    return prove(VerifyRequest(**{**parsed, "adapter": parsed["adapter"] or ()}), observer=observer)


def inspect(  # noqa: PLR0913 - the options of the command, each by its name
    adapter: str | PathLike[str],
    *,
    base: str | PathLike[str] | None = None,
    base_is: BaseIs | None = None,
    expert_layout: str | Sequence[str] = (),
    ignore_file: str | Sequence[str] = (),
    engine: ServingEngine | None = None,
    plot: str | PathLike[str] | None = None,
    strict: bool = False,
    token: str | None = None,
    offline: bool = False,
    observer: Observer | None = None,
) -> Inspection:
    """Describe an adapter, from its headers: every module, where it comes from, what engines make of it.

    Args:
        adapter: directory or repo.
        base: what to hold it against; then ‖Δ‖ and ‖W‖ of every module are measured.
        base_is: as for `merge`.
        expert_layout: as for `merge`.
        ignore_file: as for `merge`.
        engine: report on this one only.
        plot: file to draw a heat map into: ``.png``, ``.svg`` or ``.html``.
        strict: treat warnings as errors.
        token: for private and gated repos of the Hub.
        offline: take what is in the local cache, and ask no hub.
        observer: hears of phases.

    Raises:
        ResolveError: it cannot be found or read.
    """
    fields = {
        "adapter": adapter, "base": base, "base_is": base_is, "expert_layout": _names(expert_layout),
        "ignore_file": _names(ignore_file), "serving": engine, "plot": plot, "strict": strict, "token": token, "offline": offline,
    }  # fmt: skip
    from lora_merge.pipeline.inspecting import inspect_adapter

    return inspect_adapter(parse_request(InspectRequest, fields), observer=observer)


def convert(  # noqa: PLR0913 - the options of the command, each by its name
    adapter: str | PathLike[str],
    out: str | PathLike[str],
    *,
    base: str | PathLike[str] | None = None,
    format: AdapterFormat = "peft",  # noqa: A002 - as the option is called
    engine: ServingEngine | None = None,
    expand_targets: bool = False,
    bake_scale: bool = False,
    rank: int | None = None,
    energy: float | None = None,
    pad_rank: int | None = None,
    to_lora: bool = False,
    rename: Naming | None = None,
    experts: ExpertForm | None = None,
    dtype: OutputDtype | None = None,
    base_is: BaseIs | None = None,
    expert_layout: str | Sequence[str] = (),
    ignore_file: str | Sequence[str] = (),
    allow_svd: bool = False,
    overwrite: bool = False,
    strict: bool = False,
    token: str | None = None,
    offline: bool = False,
    observer: Observer | None = None,
) -> ConvertReport:
    """Rewrite an adapter: for an engine, in another format, with another rank.

    Args:
        adapter: directory or repo.
        out: directory to create.
        base: what it belongs to; default, where a transform needs it: what the adapter names.
        format: what to write.
        engine: do whatever this one needs, and check that it is enough.
        expand_targets: list the modules in place of a regex, layers and exclusions.
        bake_scale: fold rsLoRA, α and its patterns into B.
        rank: keep so many singular values of each module's change, at most.
        energy: keep as many as make up this share of the sum of their squares.
        pad_rank: give every module this rank, with zeros.
        to_lora: make plain LoRA of any other kind.
        rename: name modules as transformers 4 or 5 does.
        experts: ``split`` them, or ``fuse`` them.
        dtype: of the factors; default: the adapter's, where it holds them exactly, else float32.
        base_is: as for `merge`.
        expert_layout: as for `merge`.
        ignore_file: as for `merge`.
        allow_svd: as for `merge`.
        overwrite: replace an existing output, once the new one is whole.
        strict: treat warnings as errors.
        token: for private and gated repos of the Hub.
        offline: take what is in the local cache, and ask no hub.
        observer: hears of phases and bytes.

    Raises:
        LoraMergeError: with a sentence and a ``hint``; nothing stands under ``out`` then, but what stood there before.
    """
    fields = {
        "adapter": adapter, "out": out, "base": base, "format": format, "serving": engine,
        "expand_targets": expand_targets, "bake_scale": bake_scale, "rank": rank, "energy": energy,
        "pad_rank": pad_rank, "to_lora": to_lora, "rename": rename, "experts": experts, "dtype": dtype,
        "base_is": base_is, "expert_layout": _names(expert_layout), "ignore_file": _names(ignore_file), "allow_svd": allow_svd, "overwrite": overwrite,
        "strict": strict, "token": token, "offline": offline,
    }  # fmt: skip
    from lora_merge.pipeline.converting import convert_adapter

    return convert_adapter(parse_request(ConvertRequest, fields), observer=observer)


def extract(  # noqa: PLR0913 - the options of the command, each by its name
    base: str | PathLike[str],
    tuned: str | PathLike[str],
    out: str | PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    target: str | Sequence[str] = (),
    save_modules: bool = False,
    dtype: OutputDtype | None = None,
    overwrite: bool = False,
    strict: bool = False,
    token: str | None = None,
    offline: bool = False,
    observer: Observer | None = None,
) -> ConvertReport:
    """Take a full fine-tune apart: a PEFT LoRA of what it changed in its base.

    Args:
        base: what was trained: directory or repo.
        tuned: what came of it.
        out: directory to create.
        rank: of every module, at most; this or ``energy`` has to be given.
        energy: share of each module's change that is kept, at least.
        target: ends of the paths of the modules to take; default: all that LoRA can hold.
        save_modules: carry the rest whole: embeddings, norms, biases.
        dtype: of the factors; default: float32.
        overwrite: replace an existing output, once the new one is whole.
        strict: treat warnings as errors.
        token: for private and gated repos of the Hub.
        offline: take what is in the local cache, and ask no hub.
        observer: hears of phases and bytes.

    Raises:
        LoraMergeError: with a sentence and a ``hint``; nothing stands under ``out`` then, but what stood there before.
    """
    fields = {
        "base": base, "tuned": tuned, "out": out, "rank": rank, "energy": energy,
        "target": _names(target), "save_modules": save_modules, "dtype": dtype, "overwrite": overwrite,
        "strict": strict, "token": token, "offline": offline,
    }  # fmt: skip
    from lora_merge.pipeline.extracting import extract_adapter

    return extract_adapter(parse_request(ExtractRequest, fields), observer=observer)


def _names(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _path(key: str, value: object) -> str:
    """Return an argument that is a path, as text.

    Raises:
        RequestError: it is none.
    """
    try:
        return path_text(value)
    except ValueError as exc:
        raise RequestError("", 0, key, str(exc)) from exc


def _request(
    *,
    adapter: AdapterPaths,
    base: str | PathLike[str] | None,
    expert_layout: str | Sequence[str],
    **fields: Any,
) -> Request:
    """Return the request of a call, its values parsed."""
    given = {"adapter": adapter, "base": base, "expert_layout": _names(expert_layout), **fields}
    if adapter is None:
        raise RequestError("", 0, "adapter", "is None, expected an adapter")
    return Request(**parse_fields(given))
