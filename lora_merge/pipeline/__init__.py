"""The composition root: only these modules know every stage; the stages do not know each other.

`planning` makes a plan, `merging` carries it out, `proving` holds an output to it, years later too. Here are the public verbs.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

from lora_merge.core.report import Observer, Silence
from lora_merge.core.request import Request, parse_fields
from lora_merge.pipeline.merging import run
from lora_merge.pipeline.planning import explain, plan_request

if TYPE_CHECKING:
    from lora_merge.core.plan import MergePlan
    from lora_merge.core.report import Report
    from lora_merge.core.request import BaseIs, CombineMethod, OutputDtype, VerifyLevel

__all__ = ["explain", "merge", "plan", "run"]

AdapterPaths = str | PathLike[str] | Sequence[str | PathLike[str]]
"""One adapter or several, as `merge` takes them."""


def merge(  # noqa: PLR0913 - the options of the command, each by its name
    *,
    adapter: AdapterPaths,
    out: str | PathLike[str],
    base: str | PathLike[str] | None = None,
    base_is: BaseIs | None = None,
    expert_layout: str | Sequence[str] = (),
    combine: CombineMethod = "linear",
    density: float = 0.5,
    seed: int = 0,
    allow_untie: bool = False,
    allow_svd: bool = False,
    dtype: OutputDtype | None = None,
    device: str = "auto",
    workers: int | None = None,
    max_shard_size: str | int | None = None,
    overwrite: bool = False,
    verify: VerifyLevel = "sample",
    strict: bool = False,
    token: str | None = None,
    offline: bool = False,
    observer: Observer | None = None,
) -> Report:
    """Merge an adapter into a base and write a checkpoint that loads without LoRA support.

    Args:
        adapter: adapter directory or repo (``org/name``, ``org/name/folder@revision``, ``ms://org/name``), or
            several; each may have ``:WEIGHT`` behind it.
        out: directory to create.
        base: base checkpoint directory or repo; default: the adapter's ``base_model_name_or_path``.
        base_is: what the base is to an adapter whose initialisation changed it (PiSSA, OLoRA, CorDA, LoftQ,
            LoRA-GA): the model as published, or what that left of it.
        expert_layout: what cannot be seen of stacked experts: ``out-in`` or ``in-out``, how the base stores a
            square one in the adapter's terms; ``unsloth``, B packed expert by expert.
        combine: how the changes of several adapters become one.
        density: share of the values that ``ties`` and ``dare`` keep, above 0 and at most 1.
        seed: of what ``dare`` drops at random.
        allow_untie: untie the embeddings even of a family that engines tie whatever its config says.
        allow_svd: merge methods that decompose the base anew (OSF, PSOFT, AdaMSS).
        dtype: storage of the output; default: the base's, tensor by tensor.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        workers: worker threads; default: the number of usable cores.
        max_shard_size: for example ``"5GB"``; default: the base's own shards.
        overwrite: replace an existing output, once the new one is whole.
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
        adapter=adapter, out=str(out), base=base, base_is=base_is, expert_layout=expert_layout, combine=combine,
        density=density, seed=seed, allow_untie=allow_untie, allow_svd=allow_svd, dtype=dtype, device=device,
        workers=workers, max_shard_size=max_shard_size, overwrite=overwrite, verify=verify, strict=strict,
        token=token, offline=offline,
    )  # fmt: skip
    return run(request, observer=observer)


def plan(  # noqa: PLR0913 - as `merge`
    *,
    adapter: AdapterPaths,
    base: str | PathLike[str] | None = None,
    base_is: BaseIs | None = None,
    expert_layout: str | Sequence[str] = (),
    combine: CombineMethod = "linear",
    density: float = 0.5,
    seed: int = 0,
    allow_untie: bool = False,
    allow_svd: bool = False,
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
        adapter=adapter, out="", base=base, base_is=base_is, expert_layout=expert_layout, combine=combine,
        density=density, seed=seed, allow_untie=allow_untie, allow_svd=allow_svd, dtype=dtype,
        max_shard_size=max_shard_size, token=token, offline=offline,
    )  # fmt: skip
    return plan_request(request, Silence()).plan


def _request(
    *,
    adapter: AdapterPaths,
    base: str | PathLike[str] | None,
    expert_layout: str | Sequence[str],
    **fields: Any,
) -> Request:
    """Return the request of a call, its values parsed."""
    words = (expert_layout,) if isinstance(expert_layout, str) else tuple(expert_layout)
    given = {
        "adapter": _texts(adapter), "base": None if base is None else str(base), "expert_layout": words, **fields
    }  # fmt: skip
    return Request(**parse_fields(given))


def _texts(adapter: AdapterPaths) -> list[str]:
    """Return the adapters of a call as a command line would name them."""
    return [str(adapter)] if isinstance(adapter, str | PathLike) else [str(path) for path in adapter]
