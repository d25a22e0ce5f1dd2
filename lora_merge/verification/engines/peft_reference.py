"""Puts an adapter on its base in PEFT, without merging: completely, or not at all.

PEFT drops tensors for which it has no module, with a warning at most. So what it loaded is compared with the file,
name by name and value by value. Names of other releases of transformers are translated first, if modules were only
renamed.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_merge.core.adapter import Adapter
from lora_merge.core.checkpoint import ADAPTER_CONFIG
from lora_merge.modeling.conversion import Conversion
from lora_merge.modeling.plain_config import plain_adapter_config
from lora_merge.peft_rules.kinds import PREFIX
from lora_merge.runtime.shortage import raise_if_out_of_memory
from lora_merge.storage.local_copies import local_path
from lora_merge.storage.small_files import read_json
from lora_merge.verification.engines.hf import Deferred, quiet
from lora_merge.words import listing

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Ingredients:
    """Everything from which the reference is made."""

    base: Path
    base_config: Mapping[str, Any]
    merged_config: Mapping[str, Any]
    """The base's config with the changes of the merge."""

    adapter: Adapter | None
    """The adapter, if there is one and its weight is 1; None for several adapters or a combination."""

    base_is_residual: bool
    """True if the base already has the change of the initialisation, so that PEFT must not repeat it."""

    old_experts: bool
    """True if the layout of stacked experts differs from that of PEFT 0.21."""

    n_rows: int | None
    """Rows of the embeddings after the merge, if their number changes."""

    touched: frozenset[str]
    """Stored tensors that the merge changes."""

    roundoff: float
    """Unit roundoff of the coarsest dtype in which merged values are stored."""

    longest: int
    """Most terms of a sum: the longest side of a merged tensor."""

    unrounded: Callable[[], Mapping[str, Deferred]]
    """Returns every tensor of the merged checkpoint; changed ones in float32."""

    decoded: Callable[[], Mapping[str, Deferred]] | None = None
    """Returns every weight of a base that is stored quantised, in float32; None where transformers loads the base."""


def obstacle(made_of: Ingredients) -> str:
    """Return why PEFT cannot compute the reference, as a sentence; empty if it may be tried."""
    if made_of.adapter is None:
        return "PEFT cannot run several adapters, or one with a weight, in a single forward pass"
    if made_of.adapter.format != "peft":
        return f"PEFT does not read the adapter's format, {made_of.adapter.format}"
    if len(made_of.adapter.files) > 1:
        return "PEFT reads one weight file, and this adapter has several"
    if made_of.old_experts:
        return "its stacked experts have the layout of an older PEFT release"
    return ""


def with_adapter(model: Any, made_of: Ingredients) -> tuple[Any | None, str]:
    """Return a model with the adapter on it, if PEFT loaded every tensor; otherwise None, and why not."""
    adapter = made_of.adapter
    assert adapter is not None
    if made_of.n_rows is not None:
        # Values of new rows do not matter: the adapter brings its own.
        model.resize_token_embeddings(made_of.n_rows, mean_resizing=False)
    with tempfile.TemporaryDirectory(prefix="lora-merge-adapter-") as folder, quiet():
        try:
            root, config = _spelled(model, made_of, adapter, Path(folder))
            from peft import PeftModel

            adapted = PeftModel.from_pretrained(model, root, config=config).eval()
        except (ValueError, KeyError, RuntimeError, TypeError, AttributeError, NotImplementedError) as exc:
            raise_if_out_of_memory(exc)
            first = (str(exc).splitlines() or [""])[0]
            return None, f"PEFT does not load the adapter ({first or type(exc).__name__})"[:200]
        difference = _difference(adapted, root)
    return (None, difference) if difference else (adapted, "")


def _spelled(model: Any, made_of: Ingredients, adapter: Adapter, folder: Path) -> tuple[Path, Any]:
    """Return an adapter's directory as PEFT can read it, and its configuration."""
    from peft import PeftConfig

    root = local_path(adapter.root)
    config = PeftConfig.from_peft_type(
        **PeftConfig.check_kwargs(**plain_adapter_config(read_json(root / ADAPTER_CONFIG)))
    )
    config.inference_mode = True
    if made_of.base_is_residual:
        config.init_lora_weights = True
    named = adapter.modules - {pair.module for pair in adapter.stacked}
    # A regex of ms-swift matches containers too, which PEFT refuses. So modules are listed by name.
    if isinstance(getattr(config, "target_modules", None), str) and named:
        config.target_modules = set(named)
    names = _todays_names(model, made_of, adapter)
    if not names or not _respell(root, names, folder):
        return root, config
    for pattern in ("rank_pattern", "alpha_pattern"):
        setattr(config, pattern, _respelled_pattern(getattr(config, pattern, None) or {}, names))
    config.target_modules = set(names.values())
    # The list of names replaces these.
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    (folder / "adapter_config.json").write_text(json.dumps(config.to_dict(), default=list))
    return folder, config


def _todays_names(model: Any, made_of: Ingredients, adapter: Adapter) -> dict[str, str]:
    """Return the adapter's name → transformers' name of each module; empty if no translation is needed or possible."""
    tree = {path for path, _ in model.named_modules()}
    other = adapter.modules - tree
    conversion = Conversion.of(made_of.base_config) if other else None
    is_plain = adapter.kind == "LORA" and not adapter.stacked and not adapter.config.get("layer_replication")
    if conversion is None or not is_plain:
        return {}
    found: dict[str, str] = {}
    for module in adapter.modules:
        parameter, pattern = conversion.canonical(f"{module}.weight")
        owner = parameter.removesuffix(".weight")
        if pattern is not None or owner not in tree:
            return {}
        found[module] = owner
    # Two modules with one name would overwrite each other's tensors.
    return found if len(set(found.values())) == len(found) else {}


def _respell(root: Path, names: Mapping[str, str], folder: Path) -> bool:
    """Write an adapter's tensors under the modules' other names; return False if one belongs to no module."""
    from peft import load_peft_weights
    from safetensors.torch import save_file

    spelled = {}
    for name, tensor in load_peft_weights(str(root), device="cpu").items():
        path = name.removeprefix(PREFIX)
        module = next((path[:at] for at in _dots(path) if path[:at] in names), None)
        if module is None:
            return False
        spelled[f"{PREFIX}{names[module]}{path[len(module) :]}"] = tensor.contiguous()
    save_file(spelled, folder / "adapter_model.safetensors")
    return True


def _dots(path: str) -> list[int]:
    """Return the positions of the dots in a path, the last one first."""
    return [match.start() for match in re.finditer(r"\.", path)][::-1]


def _respelled_pattern(pattern: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return ``rank_pattern`` or ``alpha_pattern`` for the modules' other names, one entry for each module."""
    from peft.utils.other import get_pattern_key

    # PEFT's own function decides which pattern applies to a module.
    found = {old: get_pattern_key(pattern.keys(), old) for old in names}
    return {f"^{re.escape(names[old])}": pattern[key] for old, key in found.items() if key in pattern}


def _difference(adapted: Any, root: Path) -> str:
    """Return a sentence about the tensors that PEFT lost, changed or initialised at random; empty if it loaded all."""
    from peft import load_peft_weights
    from peft.utils.save_and_load import get_peft_model_state_dict

    stored = load_peft_weights(str(root), device="cpu")
    taken = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    try:
        copies = get_peft_model_state_dict(adapted, save_embedding_layers=True)
    except NotImplementedError:
        # transformers knows no embedding of this model: it takes images or sound.
        copies = {}
    # Whole matrices that PEFT saved from the base are in the model itself; those below a resized embedding
    # are saved twice.
    has = adapted.state_dict() | copies | taken
    lost = sorted(name for name, tensor in stored.items() if not _same(has.get(name), tensor))
    # A tensor of PEFT's model that the file lacks was initialised at random.
    random = sorted(name for name in taken.keys() - stored.keys() if "lora_" in name)
    if lost:
        return f"PEFT does not load {listing(lost, 1, 'more of its tensors')}"
    return (
        f"the adapter has no tensor for {random[0]}, so PEFT fills it with random numbers" if random else ""
    )


def _same(one: torch.Tensor | None, other: torch.Tensor) -> bool:
    return one is not None and one.shape == other.shape and bool((one.cpu().float() == other.float()).all())


def adapted_modules(tree: Any) -> dict[str, Any]:
    """Return path → module for the outermost modules that PEFT wrapped."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    found: dict[str, Any] = {}
    for path, module in tree.named_modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            inside = any(path.startswith(f"{outer}.") for outer in found)
            if not inside:
                found[path] = module
    return found
