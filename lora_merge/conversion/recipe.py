"""Decides what is done to an adapter: what the user asked for, and what formats and the engine need."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.conversion.families import seen_by_engines
from lora_merge.conversion.lora import Keep, Recipe
from lora_merge.core.report import Issue, error
from lora_merge.core.tensor import DTYPE_CODES
from lora_merge.errors import RequestError
from lora_merge.serving import ENGINES, Need, needs_of
from lora_merge.words import of_several

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_merge.conversion.lora import LoraModule
    from lora_merge.core.adapter import Adapter
    from lora_merge.planning import Joined
    from lora_merge.requests.request import ConvertRequest


def recipe_of(request: ConvertRequest, adapter: Adapter, joined: Joined | None = None) -> Recipe:
    """Return what is done to an adapter.

    Called twice where a base is read: first to learn whether a base is needed, then with the traits that only the base
    shows.

    Args:
        request: the user's.
        adapter: from its headers.
        joined: the adapter on its base, once it is known.

    Raises:
        RequestError: the engine reads another format than the requested one.
    """
    needs: frozenset[Need] = frozenset()
    allowed: tuple[int, ...] = ()
    kind = request.format
    if request.serving is not None:
        needs = needs_of(request.serving, *seen_by_engines(adapter, joined))
        engine = ENGINES[request.serving]
        if kind not in {"peft", engine.format}:
            sentence = f"is {kind}, but {engine.name} reads {engine.format}"
            raise RequestError("", 0, "format", sentence, hint="leave out --format or --for")
        kind = engine.format
        allowed = engine.ranks.allowed if engine.ranks.by_padding else ()
    is_foreign = adapter.format == "mlx"
    has_keep = request.rank is not None or request.energy is not None
    return Recipe(
        # AdaLoRA and BD-LoRA have factors, but not those of a plain LoRA.
        to_lora=request.to_lora
        or "to-lora" in needs
        or adapter.kind == "ADALORA"
        or bool(adapter.config.get("use_bdlora")),
        keep=Keep(request.rank, request.energy) if has_keep else None,
        bake=request.bake_scale or is_foreign or "bake-scale" in needs,
        # mlx-lm's configuration has one rank for all modules.
        uniform=request.pad_rank is not None
        or kind == "mlx"
        or "pad-rank" in needs
        or bool(allowed and has_keep),
        ranks=allowed if request.pad_rank is None else (request.pad_rank,),
        explicit=request.expand_targets or is_foreign or "expand-targets" in needs,
        # mlx-lm wraps the same modules in all layers.
        every_layer=kind == "mlx" or "every-layer" in needs,
        every_name="every-name" in needs,
        packed="packed" in needs,
        # Engines refuse or drop saved embeddings, even those that equal the base's.
        without_copies=request.serving is not None
        and any(one.why == "embedding" for one in adapter.replacements.values()),
        naming=request.rename or ("v4" if "rename-v4" in needs else None),
        experts=request.experts or ("split" if "split-experts" in needs else None),
        dtype=None if request.dtype is None else DTYPE_CODES[request.dtype],
        format=kind,
    )


def unsaid(modules: Sequence[LoraModule], recipe: Recipe) -> list[Issue]:
    """Return an error if a change has to be decomposed, and neither a rank nor an energy says how much to keep."""
    unfactored = [module.path for module in modules if not module.is_exact]
    if recipe.keep is not None or not unfactored:
        return []
    sentence = of_several(
        len(unfactored),
        "has no factors, so LoRA of a lower rank can only approximate its change",
        "have no factors, so LoRA of a lower rank can only approximate their change",
    )
    return [
        error("no-rank", unfactored[0], sentence, "pass --rank N or --energy SHARE to say how much to keep")
    ]
