"""The modules of an adapter for mlx-lm: in its names, and tied where its models are tied."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lora_merge.adapters.mlx_names import MlxFamily, MlxNameError, family_of, hf_name, is_expert, mlx_name
from lora_merge.conversion.lora import Changed, Difference, Form, Given, LoraModule
from lora_merge.core.checkpoint import OUTPUT_NAMES
from lora_merge.core.report import Issue, error
from lora_merge.words import quoted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_merge.planning.joined import Joined

_MERGE = "merge it, and convert the merged model with mlx_lm.convert"


def for_mlx(modules: Sequence[LoraModule], joined: Joined) -> tuple[list[LoraModule], list[Issue]]:
    """Return the modules that mlx-lm has, named as in transformers 5, and an error for each that it lacks."""
    family = family_of(joined.base.config)
    if family is None:
        model_type = str(joined.base.config.get("model_type"))
        sentence = f"is {quoted(model_type)}, a family whose module names in mlx-lm are not known"
        return list(modules), [error("unsupported", "model_type", sentence, _MERGE)]
    found, issues = _tied(modules, family, joined)
    named: list[LoraModule] = []
    for module in found:
        try:
            named.append(replace(module, path=_canonical(module.path, family, joined)))
        except MlxNameError as exc:
            issues.append(error("unsupported", module.path, str(exc), _MERGE))
    return named, issues


def _canonical(path: str, family: MlxFamily, joined: Joined) -> str:
    """Return a path as a reader of mlx-lm's file would spell it in transformers' names."""
    # mlx-lm starts from the names of published checkpoints, so the base's names count, not the adapter's.
    stored = joined.stored.disk_name(f"{path}.weight").removesuffix(".weight")
    name = mlx_name(stored, family)
    if not is_expert(stored):
        return hf_name(name, family)
    block, _, rest = stored.partition(".experts.")
    stem, _, _ = hf_name(f"{block}.experts.{rest}", family).partition(".experts.")
    return f"{stem}.experts.{rest}"


def _tied(
    modules: Sequence[LoraModule], family: MlxFamily, joined: Joined
) -> tuple[list[LoraModule], list[Issue]]:
    """Return the modules, with a tied embedding written once.

    Reference:
        ``mlx_lm.tuner.lora.LoRAEmbedding.as_linear`` (mlx-lm 0.32.2).
    """
    inputs = {module.path for module in modules if module.form == "embedding"}
    found: list[LoraModule] = []
    issues: list[Issue] = []
    for module in modules:
        is_head = module.path.rpartition(".")[2] in OUTPUT_NAMES
        if not (is_head or module.path in inputs):
            found.append(module)
            continue
        # mlx-lm uses the factors of an embedding at both ends. So one pair is written if both ends have the
        # same change, and a change of one end alone is refused.
        twin = joined.kept_twin(module.path)
        if twin is None and (joined.is_tied(module.path) or (family.lacking.get("lm_head") and not is_head)):
            issues.append(_one_end(module.path))
        elif twin is None or not is_head:
            found.append(module)
        elif twin not in inputs:
            found.append(_turned(module, twin))
    return found, issues


def _one_end(path: str) -> Issue:
    sentence = "is one end of tied embeddings, but mlx-lm would use its factors at both ends"
    return error("unsupported", path, sentence, _MERGE)


def _turned(module: LoraModule, path: str) -> LoraModule:
    """Return LoRA on the tied output as LoRA on the embedding: transposed, under the other path."""
    assert isinstance(module.origin, Given | Changed | Difference)
    form: Form = "embedding"
    origin = replace(module.origin, turned=not module.origin.turned)
    return replace(module, path=path, form=form, origin=origin, shape=module.shape[::-1])
