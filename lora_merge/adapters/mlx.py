"""mlx-lm's adapters: ``adapter_config.json`` and ``adapters.safetensors``.

The factors are the transposes of PEFT's, and the scale is a separate field. The `Adapter` has PEFT's fields:
the last ``num_layers`` layers become ``layers_to_transform``, the keys ``target_modules``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lora_merge.adapters.mlx_vlm import as_mlx_lm, is_mlx_vlm
from lora_merge.adapters.non_finite import non_finite
from lora_merge.core.adapter import Adapter, Delta, Replacement
from lora_merge.core.checkpoint import ADAPTER_CONFIG, INPUT_NAMES
from lora_merge.core.report import Issue, error
from lora_merge.core.tensor import TORCH_NAMES, TensorRef, shape_text
from lora_merge.deltas import DoraFacts, LowRankFacts
from lora_merge.formats.repo_files import ADAPTER_PICKLE, ADAPTER_WEIGHTS, MLX_WEIGHTS
from lora_merge.formats.safetensors import read_header
from lora_merge.formats.side_files import adapter_side_files
from lora_merge.peft_rules.hints import INCOMPLETE, NEWER, OTHER_CONFIG
from lora_merge.peft_rules.patterns import TargetError
from lora_merge.peft_rules.scaling import number
from lora_merge.storage.digests import file_digest
from lora_merge.storage.small_files import read_json
from lora_merge.words import quoted

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
    from pathlib import Path


_LEAVES = frozenset({"lora_a", "lora_b", "m"})

_LAYER = re.compile(r"(?:.+?\.)?(?P<index>\d+)\.(?P<key>.+)")
"""A module of a layer: ``model.layers.3.self_attn.q_proj``."""

_STACK = re.compile(r"(?P<block>.+)\.(?:switch_mlp|experts)\.(?P<projection>[^.]+)")
"""A stack of the experts that Hugging Face stores one by one: ``experts`` in mlx-lm's ``dots1``, else ``switch_mlp``."""

Group = Mapping[str, TensorRef]


def read_mlx(root: Path, ignored: Collection[str] = ()) -> Adapter | None:
    """Return an adapter of mlx-lm, or None when the directory holds none.

    Args:
        root: the directory.
        ignored: files that the user wants left out; nothing but the adapter's own file is read.

    Raises:
        ResolveError: its files are broken.

    Reference:
        ``mlx_lm.tuner.utils.load_adapters`` (mlx-lm 0.32.2).
    """
    del ignored
    if not ((root / ADAPTER_CONFIG).is_file() and (root / MLX_WEIGHTS).is_file()):
        return None
    config = read_json(root / ADAPTER_CONFIG)
    if not is_mlx(config, root):
        return None
    refs = read_header(root / MLX_WEIGHTS).tensors
    issues = non_finite(refs) if refs else [error("empty", MLX_WEIGHTS, "contains no tensors")]
    # One of three kinds of training; anything else is refused below.
    kind = _kind(config)
    content: dict[str, Any] = {"config": {"peft_type": "FULL"}}
    try:
        # mlx-vlm's own format becomes mlx-lm's first, so that there is one reader.
        if is_mlx_vlm(config, refs):
            config, refs = as_mlx_lm(config, refs)
        if kind == "full":
            content |= {"replacements": _whole(refs, issues)}
        elif kind in ("lora", "dora"):  # it may be a list, which no set takes
            content = _Reading(config, refs, issues, dora=kind == "dora").content()
        else:
            sentence = f"is {quoted(kind)}, expected 'lora', 'dora' or 'full'"
            issues.append(error("unsupported", "fine_tune_type", sentence, NEWER))
    except TargetError as exc:
        issues.append(exc.issue)
    # These of mlx-lm's own fields are kept beside PEFT's.
    kept = {
        name: config[name] for name in ("fine_tune_type", "lora_parameters", "num_layers") if name in config
    }
    content["config"] |= kept | {"base_model_name_or_path": config.get("model")}
    return Adapter(
        root=str(root),
        format="mlx",
        digest=file_digest(root / MLX_WEIGHTS),
        side_files=adapter_side_files(root),
        issues=tuple(issues),
        files=(str(root / MLX_WEIGHTS),),
        **({"deltas": (), "modules": frozenset()} | content),
    )


def is_mlx(config: Mapping[str, Any], root: Path) -> bool:
    """Return True for a configuration of mlx-lm."""
    if not config.keys() & {"peft_type", "swift_type"}:
        return True
    # mlx-lm's loader looks at ``lora_parameters`` and at no field that names another type, so both may be there.
    has_peft_weights = any((root / name).is_file() for name in (ADAPTER_WEIGHTS, ADAPTER_PICKLE))
    return isinstance(config.get("lora_parameters"), dict) and not has_peft_weights


def _kind(config: Mapping[str, Any]) -> object:
    """Return the kind of training: ``"lora"``, ``"dora"`` or ``"full"``; or another text from the configuration."""
    # Before there was a field for it, DoRA was a switch.
    return config.get("fine_tune_type", "dora" if config.get("use_dora") else "lora")


def _whole(refs: Iterable[TensorRef], issues: list[Issue]) -> dict[str, Replacement]:
    """Return the parameters of a full training of some layers; a factor among them is an issue."""
    found: dict[str, Replacement] = {}
    for ref in refs:
        module, _, parameter = ref.name.rpartition(".")
        # ``m`` may be a model's own parameter.
        if parameter in _LEAVES and parameter != "m":
            sentence = "is a LoRA factor, and fine_tune_type is 'full'"
            hint = OTHER_CONFIG
            issues.append(error("unexpected-tensor", ref.name, sentence, hint))
        elif _STACK.fullmatch(module) and len(ref.shape) > 1:
            # mlx-lm stacks experts that Hugging Face stores one by one.
            for n, path in enumerate(_experts(module, ref.shape[0])):
                found[f"{path}.{parameter}"] = Replacement(ref.entry(n), "saved")
        else:
            found[ref.name] = Replacement(ref, "saved")
    return found


class _Reading:
    """One adapter of factors; faults are added to a list of issues."""

    def __init__(
        self, config: Mapping[str, Any], refs: Iterable[TensorRef], issues: list[Issue], *, dora: bool
    ) -> None:
        self._issues, self._dora = issues, dora
        settings = config.get("lora_parameters")
        if not isinstance(settings, dict):
            raise TargetError(
                "lora_parameters", f"is {quoted(settings)}, expected a table of rank, scale and keys"
            )
        refs = tuple(refs)
        is_recent = _ignores_alpha(config, refs)
        self._scale, self._rank = _scale(settings, is_recent=is_recent), _required(settings, "rank")
        self._keys = _keys(settings)
        self._n_layers = _n_layers(config)
        self._groups = self._sorted(refs)
        self._targets: dict[str, None] = {}
        self._layers: set[int] = set()

    def content(self) -> dict[str, Any]:
        """Return the fields of `Adapter`, PEFT's configuration included."""
        deltas = [delta for module, group in self._groups.items() for delta in self._deltas(module, group)]
        unmatched = self._unmatched() if deltas else []
        config = {
            "peft_type": "LORA",
            "r": self._rank,
            "use_dora": self._dora,
            "target_modules": [*self._targets, *unmatched],
            "layers_to_transform": self._last_layers(),
            # mlx-lm reads an embedding's factors at both ends of a tie.
            "ensure_weight_tying": any(_is_embedding(module) for module in self._groups),
        }
        return {
            "config": config,
            "deltas": tuple(deltas),
            "modules": frozenset(delta.module for delta in deltas),
        }

    def _sorted(self, refs: Iterable[TensorRef]) -> dict[str, dict[str, TensorRef]]:
        """Return module → leaf (``lora_a``, ``lora_b``, ``m``) → tensor; any other tensor is an issue."""
        groups: dict[str, dict[str, TensorRef]] = {}
        for ref in refs:
            module, _, leaf = ref.name.rpartition(".")
            if leaf not in _LEAVES or not module:
                hint = "check the file: mlx-lm would refuse it too; fine_tune_type 'full' is for whole parameters"
                self._issues.append(
                    error("unexpected-tensor", ref.name, "is not a tensor of an mlx-lm LoRA", hint)
                )
            else:
                groups.setdefault(module, {})[leaf] = ref
        return groups

    def _deltas(self, module: str, group: Group) -> list[Delta]:
        """Return the deltas of one group of tensors; none where they cannot be multiplied (an issue says so)."""
        problem = self._stray(module, group) or self._misfit(module, group)
        if problem is not None:
            self._issues.append(problem)
            return []
        a, b = group["lora_a"], group["lora_b"]
        paths = _experts(module, a.shape[0]) if len(a.shape) == 3 else [module]
        # Targets are collected while tensors are read: mlx-lm's configuration may name none of them.
        self._note_target(module, paths)
        if len(a.shape) == 3:
            return [
                Delta(f"{path}.weight", LowRankFacts(), {"A": a.entry(n), "B": b.entry(n)}, self._scale)
                for n, path in enumerate(paths)
            ]
        is_embedding = _is_embedding(module)  # mlx-lm's [vocabulary, r] and [r, dim] are B and A as they are
        facts = (DoraFacts if self._dora else LowRankFacts)(stored_transposed=not is_embedding)
        factors = {"A": b, "B": a} if is_embedding else {"A": a, "B": b}
        if self._dora:
            factors["magnitude"] = group["m"]
        return [Delta(f"{module}.weight", facts, factors, self._scale)]

    def _stray(self, module: str, group: Group) -> Issue | None:
        """Return the first tensor that is there, or missing, against the configuration; None where all is as it says."""
        for have, lack in (("lora_a", "lora_b"), ("lora_b", "lora_a")):
            if lack not in group:
                code = "missing-A" if lack == "lora_a" else "missing-B"
                what = f"has {have} and no {lack}" if have in group else f"has no {lack}"
                return error(code, module, what, INCOMPLETE)
        if self._dora and "m" not in group:
            return error("missing-magnitude", module, "has no m, and fine_tune_type is 'dora'", INCOMPLETE)
        hint = "use the adapter_config.json of the training"
        if not self._dora and "m" in group:
            return error("unexpected-tensor", module, "has DoRA's m, and fine_tune_type is not 'dora'", hint)
        layer = _LAYER.fullmatch(module)
        # Without keys mlx-lm adapts the linear layers of the last layers, and nothing outside of layers.
        named = (
            module in self._keys or (layer is not None and layer["key"] in self._keys)
            if self._keys
            else layer is not None
        )
        if not named:
            sentence = "the adapter has tensors for it, and lora_parameters.keys does not list it"
            return error("unexpected-tensor", module, sentence, hint)
        return None

    def _misfit(self, module: str, group: Group) -> Issue | None:
        """Return what keeps the factors of a module from being multiplied; None where nothing does."""
        a, b = group["lora_a"].shape, group["lora_b"].shape
        for ref in group.values():
            if ref.dtype not in TORCH_NAMES:
                return error("bad-dtype", ref.name, f"is stored as {ref.dtype}, expected BF16, F16 or F32")
        rank = a[1] if len(a) > 1 else 0
        flat = len(a) == len(b) == 2 and b[0] == rank
        # Factors of stacked experts are not transposed: A [experts, r, in], B [experts, out, r].
        stacked = len(a) == len(b) == 3 and a[0] == b[0] and b[2] == rank
        shapes = f"lora_a is {shape_text(a)}, lora_b is {shape_text(b)}"
        if not (flat or stacked) or rank == 0:
            wanted = "(in, r) and (r, out), or (experts, r, in) and (experts, out, r), of one rank r > 0"
            return error("bad-shape", module, f"{shapes}, expected {wanted}")
        if rank != self._rank:
            sentence = f"has rank {rank}, the config says {self._rank:g} (lora_parameters.rank)"
            return error("rank-mismatch", module, sentence, OTHER_CONFIG)
        if stacked and self._dora:
            return error("unsupported", module, "is DoRA on stacked experts, which mlx-lm does not support")
        if stacked and not _STACK.fullmatch(module):
            sentence = f"{shapes}: the way this model stores its experts is not supported"
            hint = "use mlx_lm.fuse; experts are supported where mlx-lm calls them switch_mlp"
            return error("unsupported", module, sentence, hint)
        return None

    def _note_target(self, module: str, paths: list[str]) -> None:
        """Remember the entry of ``target_modules`` for a module, and its layer."""
        layer = _LAYER.fullmatch(module)
        if layer is None or module in self._keys:
            self._targets |= dict.fromkeys(paths)
            return
        # A module of a layer is named by its path in the layer: mlx-lm's keys are that, too.
        self._layers.add(int(layer["index"]))
        start = layer.start("key")
        self._targets |= dict.fromkeys(path[start:] for path in paths)

    def _last_layers(self) -> list[int] | None:
        """Return the numbers of the layers that were trained; None for all of them."""
        if not self._layers or self._n_layers <= 0:
            return None
        if len(self._layers) > self._n_layers:
            sentence = f"is {self._n_layers}, and the adapter has tensors in {len(self._layers)} layers"
            hint = OTHER_CONFIG
            self._issues.append(error("unmatched-target", "num_layers", sentence, hint))
            return sorted(self._layers)
        # The base's number of layers is not known here. mlx-lm trains the last ones, so the last one with tensors
        # counts as the last.
        last = max(self._layers)
        return list(range(max(0, last - self._n_layers + 1), last + 1))

    def _unmatched(self) -> list[str]:
        """Return the keys that match no module, as targets; only the base tells whether that is a fault."""
        return [
            path
            for key in self._keys
            if not any(module == key or module.endswith(f".{key}") for module in self._groups)
            # Without tensors the number of experts is not known: one of them stands for all.
            for path in (_experts(key, 1) if _STACK.fullmatch(key) else [key])
        ]


def _ignores_alpha(config: Mapping[str, Any], refs: Iterable[TensorRef]) -> bool:
    """Return True when an adapter shows that its mlx-lm did not read ``alpha``.

    Reference:
        commits 57b16724, e9882d4d, 13bb6dca and 191d81d1 of ml-explore/mlx-lm.
    """
    # mlx-lm multiplied ``scale`` by alpha/rank until 2024-06-02. Its default configuration kept ``alpha`` until
    # 2025-04-02 without reading it. In between came LoRA on embeddings (2024-08-16), and ``num_layers`` in place of
    # ``lora_layers`` together with ``fine_tune_type`` (2024-09-29): each of them shows a later release.
    has_embedding = any(_is_embedding(ref.name.rpartition(".")[0]) for ref in refs)
    return "fine_tune_type" in config or "num_layers" in config or has_embedding


def _scale(settings: Mapping[str, Any], *, is_recent: bool) -> float:
    """Return the scale of all deltas, which is the whole factor: nothing is divided by a rank.

    Args:
        settings: the table of ``lora_parameters``.
        is_recent: True where ``alpha`` was not read in training.

    Raises:
        TargetError: it is not a number, or it is not known whether ``alpha`` was read.
    """
    scale = _required(settings, "scale")
    if scale == 0:
        raise TargetError("lora_parameters.scale", "is 0, so the adapter changes nothing")
    alpha = settings.get("alpha")
    # With α equal to the rank both releases compute the same.
    if is_recent or alpha is None or alpha == settings.get("rank"):
        return scale
    rank = settings.get("rank")
    both = f"{scale:g} x {alpha}/{rank}" if isinstance(alpha, int | float) else f"{scale:g} times alpha/rank"
    sentence = (
        f"is {quoted(alpha)}: mlx-lm multiplied scale by alpha/rank until June 2024 and ignores alpha since "
        "then; the config does not show which release trained the adapter"
    )
    advice = (
        f"remove alpha from adapter_config.json, and set scale to {both} for a training before June 2024, or "
        f"keep it at {scale:g}"
    )
    raise TargetError("lora_parameters.alpha", f"{sentence}; {advice}")


def _required(settings: Mapping[str, Any], field: str) -> float:
    """Return a number of ``lora_parameters`` that must be there.

    Raises:
        TargetError: it is missing, or no number.
    """
    if field not in settings:
        raise TargetError(f"lora_parameters.{field}", "is missing, expected a number")
    try:
        return number(settings, field, 0)
    except TargetError as exc:
        raise TargetError(f"lora_parameters.{field}", exc.sentence) from exc


def _keys(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the entries of ``lora_parameters.keys``; empty when all linear layers were trained.

    Raises:
        TargetError: the field does not hold a list of names.
    """
    keys = settings.get("keys")
    if keys is None:
        return ()
    if not isinstance(keys, list) or not keys or not all(isinstance(key, str) for key in keys):
        raise TargetError("lora_parameters.keys", f"is {quoted(keys)}, expected a list of names")
    return tuple(keys)


def _n_layers(config: Mapping[str, Any]) -> int:
    """Return how many layers, counted from the last, were trained; all of them when it is not positive.

    Raises:
        TargetError: it is missing, or no whole number.
    """
    # ``lora_layers`` was its name until September 2024.
    value = config.get("num_layers", config.get("lora_layers"))
    if isinstance(value, bool) or not isinstance(value, int):
        raise TargetError("num_layers", f"is {quoted(value)}, expected a whole number")
    return value


def _is_embedding(module: str) -> bool:
    return module.rpartition(".")[2] in INPUT_NAMES


def _experts(module: str, n_experts: int) -> list[str]:
    """Return a path for each expert of a stack, with mlx-lm's name of the projection.

    The base's own name of the projection comes later, when the base is known (`lora_merge.adapters.mlx_spelling`).

    Example:
        >>> _experts("model.layers.0.mlp.switch_mlp.up_proj", 2)
        ['model.layers.0.mlp.experts.0.up_proj', 'model.layers.0.mlp.experts.1.up_proj']
    """
    match = _STACK.fullmatch(module)
    assert match is not None
    return [f"{match['block']}.experts.{n}.{match['projection']}" for n in range(n_experts)]
