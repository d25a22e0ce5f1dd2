"""PEFT adapters: ``adapter_config.json`` and ``adapter_model.safetensors``, or else ``adapter_model.bin``.

The tensors say what is changed; the configuration gives the scale and is checked against them. Faults are collected in
``issues``, not raised, so that a user sees all of them at once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypedDict

from lora_merge.adapters.adalora import AdaLora
from lora_merge.adapters.directory import assemble
from lora_merge.adapters.experts import taken_apart
from lora_merge.adapters.non_finite import non_finite, unequal
from lora_merge.adapters.spelling import canonical
from lora_merge.adapters.tensor_names import NESTED, Wholes, outside, plain, reason, sort_out
from lora_merge.adapters.token_rows import token_rows
from lora_merge.adapters.unread import shard_issues
from lora_merge.core.adapter import Adapter, Delta, StackedPair
from lora_merge.core.checkpoint import ADAPTER_CONFIG
from lora_merge.core.report import Issue, error
from lora_merge.core.tensor import TORCH_NAMES, TensorRef, shape_text
from lora_merge.deltas import AdditionFacts, DoraFacts, LowRankFacts
from lora_merge.formats.repo_files import ADAPTER_WEIGHTS, TRAINER_CONFIG
from lora_merge.formats.weight_files import adapter_entries, read_adapter
from lora_merge.peft_rules.hints import incomplete
from lora_merge.peft_rules.kinds import (
    NATIVE,
    PEFT_LAYERS,
    PREFIX,
    TRAINER_FIELDS,
    check_types,
    field_issues,
    kind_issues,
    mutating_init,
)
from lora_merge.peft_rules.patterns import TargetError
from lora_merge.peft_rules.scaling import Scaling
from lora_merge.peft_rules.targets import TargetRule, is_listed
from lora_merge.storage.small_files import read_json
from lora_merge.words import quoted

if TYPE_CHECKING:
    from pathlib import Path

OTHER_MARKS = frozenset({"fine_tune_type", "lora_parameters"})
"""Fields of an ``adapter_config.json`` that is not PEFT's, if it has no ``peft_type``."""

_OUT_PROJ = ".base_layer.out_proj"
"""How PEFT names the output projection of an ``nn.MultiheadAttention``, whose other weight is ``in_proj_weight``."""

Group = Mapping[str, TensorRef]


class _Blocks(TypedDict, total=False):
    """How many blocks the block-diagonal factor of a BD-LoRA has; empty for any other LoRA."""

    blocks_a: int
    blocks_b: int


def read_peft(root: Path, ignored: Collection[str] = ()) -> Adapter | None:
    """Return a PEFT adapter, or None when the directory holds none.

    Args:
        root: the directory; the tensors may be in shards.
        ignored: files in it that the user wants left out.

    Raises:
        ResolveError: its files are broken.
    """
    if not (root / ADAPTER_CONFIG).is_file():
        return None
    names = {path.name for path in root.iterdir() if path.is_file()}
    entry = next((name for name in adapter_entries(names) if name not in ignored), None)
    if entry is None:
        return None
    config = read_json(root / ADAPTER_CONFIG)
    # mlx-lm's and ms-swift's readers take these.
    if "peft_type" not in config and config.keys() & OTHER_MARKS:
        return None
    if "swift_type" in config:
        return None
    check_types(config, str(root / ADAPTER_CONFIG))
    stored, files = read_adapter(root, entry)
    refs, issues = canonical(stored, entry)
    issues += _trainer_issues(root)
    # Before any shape is judged: a part of a tensor would be called wrong in every module.
    parts = shard_issues(refs, config, entry)
    if parts:
        return assemble(files, "peft", config, {}, [*parts, *issues], ignored)
    experts = taken_apart(refs, entry)
    issues += experts.issues
    config = experts.config(config)
    content = read_tensors(experts.refs, config, issues, entry, experts.pairs)
    return assemble(files, "peft", config, content, issues, ignored)


def read_tensors(
    refs: tuple[TensorRef, ...],
    config: Mapping[str, Any],
    issues: list[Issue],
    file: str = ADAPTER_WEIGHTS,
    pairs: tuple[StackedPair, ...] = (),
) -> dict[str, Any]:
    """Return what the tensors of an adapter change, as fields of `Adapter`. ms-swift's reader uses it too.

    Args:
        refs: under PEFT's names.
        config: PEFT's.
        issues: what is wrong is added here.
        file: name of the file that they are in.
        pairs: factors that were read already, since their names are not PEFT's (NeMo Automodel).
    """
    issues += kind_issues(config)
    if config.get("peft_type") in NATIVE:
        paired = [ref for pair in pairs for ref in pair.tensors.values()]
        issues += field_issues(config) + non_finite((*refs, *paired))
        content = _read_lora(refs, config, issues, file) if refs or not pairs else {}
        return _with_pairs(content, pairs, issues)
    if config.get("peft_type") in PEFT_LAYERS:
        issues += non_finite(refs)
        return _read_peft_layers(refs, config, issues, file)
    return {}


def _with_pairs(
    content: dict[str, Any], pairs: tuple[StackedPair, ...], issues: list[Issue]
) -> dict[str, Any]:
    """Return the fields of `Adapter` with pairs that were read before; a pair that cannot be multiplied is an issue."""
    if not pairs:
        return content
    problems = [_pair_problem(pair.module, pair.tensors, {}) for pair in pairs]
    issues += [problem for problem in problems if problem is not None]
    return {
        **content,
        "stacked": (*content.get("stacked", ()), *pairs),
        "modules": content.get("modules", frozenset()) | {pair.module for pair in pairs},
    }


def _trainer_issues(root: Path) -> list[Issue]:
    """Return an issue for each unknown field in ms-swift's own file beside PEFT's."""
    path = root / TRAINER_CONFIG
    return field_issues(read_json(path), TRAINER_FIELDS) if path.is_file() else []


def _read_peft_layers(
    refs: tuple[TensorRef, ...], config: Mapping[str, Any], issues: list[Issue], file: str
) -> dict[str, Any]:
    """Return the fields of `Adapter` for a method that PEFT's own layers merge: tensors by name, and whole
    parameters.
    """
    peft_layers: dict[str, TensorRef] = {}
    wholes = Wholes()
    for ref in refs:
        module, _, parameter = ref.name.removeprefix(PREFIX).rpartition(".")
        # Names of such methods are not known here, so a whole parameter is one that the configuration explains.
        is_whole = ref.name.startswith(PREFIX) and reason(plain(module), parameter, config)
        if not (is_whole and wholes.add(ref, config)):
            peft_layers[ref.name] = ref
    issues += outside(refs, file, shared="base_model.")
    replacements = wholes.replacements()
    issues += unequal(wholes.repeats())
    return {"peft_layers": peft_layers, "replacements": replacements}


def _read_lora(
    refs: tuple[TensorRef, ...], config: Mapping[str, Any], issues: list[Issue], file: str
) -> dict[str, Any]:
    """Return the fields of `Adapter` for LoRA, AdaLoRA and trained tokens: deltas, whole parameters, stacked pairs."""
    found = sort_out(refs, config, file)
    replacements = found.wholes.replacements()
    issues += found.issues + unequal(found.repeats)
    # Trained rows alone are not a LoRA; `token_rows` reads them.
    groups = {module: group for module, group in found.groups.items() if set(group) != {"tokens"}}
    modules = frozenset(plain(module.removesuffix(_OUT_PROJ)) for module in groups)
    content = {"modules": modules, "replacements": replacements}
    # The base may have to be changed again before the merge, which only PEFT's own layers do.
    if config.get("kasa_config") or mutating_init(config):
        content["peft_layers"] = {ref.name: ref for group in groups.values() for ref in group.values()}
    try:
        reader = AdaLora(config, issues) if config.get("peft_type") == "ADALORA" else _Lora(config, issues)
        stacked = [module for module in groups if _is_stacked(module, config)]
        deltas = [
            delta
            for module, group in groups.items()
            if module not in stacked
            # Whether a module is attention shows only in the names of all its tensors.
            for delta in _attention(module, groups, reader.deltas(module, group))
        ]
        deltas += token_rows(found.groups, config, issues)
        # α = 0 and ranks that never moved are facts about all modules.
        issues += reader.finish(modules)
    except TargetError as exc:
        issues.append(exc.issue)
        return {**content, "deltas": ()}
    pairs = [_stacked_pair(module, groups[module], issues) for module in stacked]
    return {
        **content,
        "deltas": tuple(deltas),
        "stacked": tuple(pair for pair in pairs if pair is not None),
    }


class _Lora:
    """Groups of tensors of a LoRA configuration → deltas; faults are added to a list of issues."""

    def __init__(self, config: Mapping[str, Any], issues: list[Issue]) -> None:
        self._config, self._issues = config, issues
        self._scaling = Scaling(config)
        self._is_mica = config.get("init_lora_weights") == "mica"

    def deltas(self, module: str, group: Group) -> list[Delta]:
        """Return the deltas of one group of tensors: the weight's, and the bias's; none where they cannot be
        multiplied.

        A group that disagrees with the configuration is still a delta, so that planning can judge the rest of it.
        """
        embedding = "embedding_A" in group or "embedding_B" in group
        roles = {"embedding_A": "A", "embedding_B": "B"} if embedding else {"A": "A", "B": "B"}
        pair = {short: group[role] for role, short in roles.items() if role in group}
        blocks = self._blocks(module, pair)
        found = [self._stray_role(module, group, embedding=embedding), _pair_problem(module, pair, blocks)]
        problems = [problem for problem in found if problem is not None]
        if problems:
            self._issues += problems
            return []
        path = plain(module)
        # PEFT's patterns see the attention module, not the projection inside it.
        scale, issues = self._scaling.of(plain(module.removesuffix(_OUT_PROJ)), pair["A"].shape[0])
        self._issues += issues
        if "magnitude" in group:
            pair = {**pair, "magnitude": group["magnitude"]}
            made = Delta(f"{path}.weight", DoraFacts(**blocks), pair, scale, transposed=embedding)
        else:
            # PEFT rounds these to the weight's dtype before it adds them; of all others float32 is added.
            rounded = embedding or bool(blocks) or self._is_mica
            made = Delta(
                f"{path}.weight", LowRankFacts(**blocks), pair, scale, transposed=embedding, rounded=rounded
            )
        if "bias" not in group:
            return [made]
        return [made, Delta(f"{path}.bias", AdditionFacts(), {"addend": group["bias"]}, scale)]

    def _blocks(self, module: str, pair: Group) -> _Blocks:
        """Return which factor of a BD-LoRA pair is block-diagonal, and in how many blocks.

        Reference:
            ``peft.tuners.lora.variants.BdLoraLinearVariant.init`` (PEFT 0.21.2).

        Raises:
            TargetError: the settings have values that PEFT could not use.
        """
        settings = self._config.get("use_bdlora")
        if not isinstance(settings, dict) or not {"A", "B"} <= pair.keys():
            return {}
        n_blocks = settings.get("nblocks", 1)
        if not isinstance(n_blocks, int) or n_blocks < 1:
            raise TargetError(
                "use_bdlora", f"has nblocks {quoted(n_blocks)}, expected a positive whole number"
            )
        named = {axis: _parts_of_names(settings, f"target_modules_bd_{axis.lower()}") for axis in ("A", "B")}
        # PEFT looks for these parts of names anywhere in the path.
        found = next((axis for axis, parts in named.items() if any(part in module for part in parts)), None)
        return {"blocks_a": n_blocks} if found == "A" else {"blocks_b": n_blocks} if found else {}

    def _stray_role(self, module: str, group: Group, *, embedding: bool) -> Issue | None:
        """Return the first tensor that is there, or missing, against the configuration; None where all is as it says."""
        dora, has = bool(self._config.get("use_dora")), "magnitude" in group
        if dora and not has:
            hint = incomplete("would use the norms of the base's weights")
            return error(
                "missing-magnitude", module, "has no lora_magnitude_vector, and use_dora is set", hint
            )
        if has and not dora:
            hint = (
                "use the adapter_config.json of the training: this one does not match, and PEFT would drop "
                "the tensor without a message"
            )
            return error("unexpected-tensor", module, "has a DoRA magnitude, and use_dora is not set", hint)
        if "bias" in group and not self._config.get("lora_bias"):
            hint = (
                "use the adapter_config.json of the training: this one does not match, and PEFT would drop "
                "the tensor without a message"
            )
            return error("unexpected-tensor", module, "has a bias of lora_B, and lora_bias is not set", hint)
        if self._config.get("lora_bias") and "B" in group and "bias" not in group:
            hint = incomplete("would use zeros")
            return error("missing-bias", module, "has no bias of lora_B, and lora_bias is set", hint)
        known = {"embedding_A", "embedding_B"} if embedding else {"A", "B"}
        # KaSA's diagonal is the only further tensor that a LoRA may have.
        strange = sorted(group.keys() - known - {"magnitude", "bias", "tokens"})
        if strange and not (strange == ["diagonal"] and self._config.get("kasa_config")):
            return error("unexpected-tensor", group[strange[0]].name, "is not a tensor of this kind of LoRA")
        return None

    def finish(self, modules: Collection[str]) -> list[Issue]:
        """Return issues that concern all modules together: a scale of 0."""
        return self._scaling.zeros(modules or ("",))


def _parts_of_names(settings: Mapping[str, Any], field: str) -> list[str]:
    """Return a list of parts of modules' names from BD-LoRA's settings; empty where it is absent.

    Raises:
        TargetError: it is something else.
    """
    value = settings.get(field)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise TargetError("use_bdlora", f"has {field} {quoted(value)}, expected a list of strings")
    return value


def _pair_problem(module: str, pair: Group, blocks: _Blocks) -> Issue | None:
    """Return what keeps an A and a B from being multiplied; None where nothing does."""
    for have, lack in (("A", "B"), ("B", "A")):
        if lack not in pair:
            hint = incomplete("would merge noise or nothing here")
            return error(f"missing-{lack}", module, f"has lora_{have} and no lora_{lack}", hint)
    a, b = pair["A"].shape, pair["B"].shape
    if not (a and b):
        sentence = f"lora_A is {shape_text(a)}, lora_B is {shape_text(b)}, expected matrices"
        return error("bad-shape", module, sentence)
    # A block-diagonal B is stored [out, r / n]: its blocks one above the other.
    rank_of_b = b[1] * blocks.get("blocks_b", 1) if len(b) > 1 else 0
    for axis, shape, n_blocks in (("A", a, blocks.get("blocks_a", 1)), ("B", b, blocks.get("blocks_b", 1))):
        if shape[0] % n_blocks:
            sentence = f"lora_{axis} is {shape_text(shape)}, expected rows for {n_blocks} blocks (use_bdlora)"
            return error("bad-shape", module, sentence)
    # B of a convolution has a kernel of ones.
    flat = len(a) == len(b) == 2 or (len(a) == len(b) in {3, 4, 5} and set(b[2:]) == {1})
    if not flat or a[0] != rank_of_b or a[0] == 0:
        shapes = f"lora_A is {shape_text(a)}, lora_B is {shape_text(b)}"
        return error("bad-shape", module, f"{shapes}, expected (r, in) and (out, r) with the same rank r > 0")
    for ref in pair.values():
        if ref.dtype not in TORCH_NAMES:
            return error("bad-dtype", ref.name, f"is stored as {ref.dtype}, expected BF16, F16 or F32")
    return None


def _attention(module: str, groups: Mapping[str, Group], deltas: list[Delta]) -> list[Delta]:
    """Return the deltas of a module, changed to those of an ``nn.MultiheadAttention`` if it is one.

    Reference:
        ``peft.tuners.lora.layer.MultiheadAttention.merge`` (PEFT 0.21.2).
    """
    # The output projection gets its delta twice, since PEFT's forward pass merges it twice. The first time it is
    # rounded, as is that of the input projections.
    if module.endswith(_OUT_PROJ):
        return [
            twice
            for delta in deltas
            # PEFT multiplies the factors as they are stored here, so a block-diagonal one does not fit and is refused.
            for twice in (
                replace(delta, facts=type(delta.facts)(), rounded=True, round_before_next=True),
                delta,
            )
        ]
    if f"{module}{_OUT_PROJ}" in groups:
        return [replace(delta, parameter=f"{module}.in_proj_weight", rounded=True) for delta in deltas]
    return deltas


def _is_stacked(module: str, config: Mapping[str, Any]) -> bool:
    """Return True when a group belongs to one of ``target_parameters``.

    Raises:
        TargetError: a field has a value that PEFT could not use.
    """
    # An entry that is only a parameter's name may mean any module; then it is one that target_modules does not mean.
    owners = {str(entry).rpartition(".")[0] for entry in config.get("target_parameters") or ()}
    path = plain(module)
    if is_listed(path, owners - {""}):
        return True
    return "" in owners and not TargetRule.parse(config).matches(path)


def _stacked_pair(module: str, group: Group, issues: list[Issue]) -> StackedPair | None:
    """Return a pair of ``target_parameters``; None, and an issue, where it cannot be multiplied."""
    pair = {role: group[role] for role in ("A", "B") if role in group}
    problem = _pair_problem(module, pair, {})
    if problem is not None:
        issues.append(problem)
        return None
    return StackedPair(plain(module), module.count(NESTED), pair)
