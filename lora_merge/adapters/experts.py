"""LoRA on experts as large trainers and RL stacks store it: all experts of a layer in one tensor.

Tinker, SGLang and Megatron-Bridge: A ``[experts, r, in]`` and B ``[experts, out, r]`` of one projection; a factor that all
experts share is ``[1, r, in]`` or ``[1, out, r]``, or a matrix beside those of single experts. They become LoRA on each
expert, under the names that Hugging Face gives experts. NeMo Automodel: gate and up in one, and both factors the other
way round; they stay LoRA on the parameter that holds all experts.

References:
    ``tinker_cookbook.weights._merge`` and ``_adapter`` (tinker-cookbook 0.3, 2026-08), which merge as is done here;
    sgl-project/sglang#21466 and NVIDIA-NeMo/Megatron-Bridge#5588 for shared factors;
    ``nemo_automodel.components._peft.lora_experts.GroupedExpertsLoRA`` and
    ``MoESplitExpertsStateDictMixin._convert_lora_to_paramwrapper`` (NeMo Automodel, 2026-08).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lora_merge.core.adapter import StackedPair
from lora_merge.core.report import Issue, error, note
from lora_merge.core.tensor import TensorRef, shape_text
from lora_merge.peft_rules.hints import INCOMPLETE
from lora_merge.peft_rules.kinds import PREFIX
from lora_merge.peft_rules.targets import is_listed

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_HEAD = re.compile(
    rf"^({re.escape(PREFIX)})(?:model\.)?(?:language_model\.)?(?:unembed_tokens|lm_head)(?=\.)"
)
"""Tinker's output embedding, whose path is under ``model`` there."""

_ATTENTION = re.compile(r"(?<=\.)attn(?=\.[qkvo]_proj\.)")
"""Tinker's attention of gpt-oss, ``self_attn`` elsewhere."""

_TINKER = re.compile(r"\.(unembed_tokens|experts\.w[123])\.lora_[AB]\.weight$")

_STACK = re.compile(r"(?P<block>.+\.experts)\.(?P<projection>[a-z]\w*)\.lora_(?P<role>[AB])\.weight")
_ONE = re.compile(r"(?P<block>.+\.experts)\.(?P<n>\d+)\.(?P<projection>\w+)\.lora_(?P<role>[AB])\.weight")

_PROJECTIONS: Mapping[str, str] = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_UNGATED: Mapping[str, str] = {"w1": "up_proj", "w2": "down_proj"}
"""Of experts without a gate, as Nemotron's: Tinker leaves w3 empty there."""

_EXPERT = re.compile(r"experts\.\d+\.\w+$")

_GROUPED = re.compile(r"(?P<module>.+)\.lora_(?P<which>gate_and_up|down)_(?P<role>[AB])")


@dataclass(slots=True)
class Experts:
    """An adapter's tensors, once a tensor that held all experts is one tensor per expert."""

    refs: tuple[TensorRef, ...]
    issues: list[Issue] = field(default_factory=list)
    pairs: tuple[StackedPair, ...] = ()
    """Of NeMo's grouped experts."""

    targets: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Last word of a target → what it is called now, where that changed."""

    is_renamed: bool = False
    """True where some tensors got new names, so that the targets may need new ones too."""

    def config(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return PEFT's configuration with the targets that these tensors have now."""
        listed = config.get("target_modules")
        # To such a trainer "all-linear" means more than to PEFT (output embedding, experts in one parameter), and
        # less where routers are linear layers. It means the modules with tensors.
        if self.is_renamed and str(listed).lower() == "all-linear":
            return {**config, "target_modules": list(dict.fromkeys(map(_target, self.refs)))}
        if not isinstance(listed, list) or not (self.targets or self.pairs):
            return config
        # What meant all experts means each of them, and no other module of the name (shared experts, dense layers).
        entries = (word for entry in map(str, listed) for word in self._targets_of(entry))
        return {**config, "target_modules": list(dict.fromkeys(entries))}

    def _targets_of(self, entry: str) -> tuple[str, ...]:
        """Return what one entry of ``target_modules`` is called now; nothing for NeMo's pairs, which are parameters."""
        if any(
            is_listed(pair.module, (entry,)) or entry.startswith(f"{pair.module}.") for pair in self.pairs
        ):
            return ()
        # Trainers write the path or its last word.
        word = entry.rpartition(".")[2]
        if word == "experts" and self.targets:
            return tuple(name for names in self.targets.values() for name in names)
        return self.targets.get(word, (entry,))


def _target(ref: TensorRef) -> str:
    """Return a factor's module as an entry of the targets: an expert by the end of its path, any other whole."""
    module = ref.name.removeprefix(PREFIX).partition(".lora_")[0]
    expert = _EXPERT.search(module)
    return expert[0] if expert else module


def taken_apart(refs: tuple[TensorRef, ...], file: str) -> Experts:
    """Return an adapter's tensors, with those that hold all experts of a layer as one tensor per expert.

    Args:
        refs: every tensor of the file, under PEFT's names.
        file: its name.
    """
    found = Experts(refs)
    _named_as_published(found, file)
    _grouped(found)
    stacks: dict[str, dict[str, dict[str, TensorRef]]] = {}
    singles: dict[tuple[str, str, str], dict[int, TensorRef]] = {}
    for ref in found.refs:
        if match := _ONE.fullmatch(ref.name):
            singles.setdefault((match["block"], match["projection"], match["role"]), {})[int(match["n"])] = (
                ref
            )
        elif match := _STACK.fullmatch(ref.name):
            roles = stacks.setdefault(match["block"], {}).setdefault(match["projection"], {})
            roles[match["role"]] = ref
    if not stacks:
        return found
    gone: set[str] = set()
    made: list[TensorRef] = []
    # A layer at a time: whether its tensors are stacks shows only when all of them are known.
    for block, projections in stacks.items():
        block_found = _Block(block, projections, singles)
        if not block_found.is_stacked:
            continue
        made += block_found.experts(found)
        gone |= {ref.name for roles in projections.values() for ref in roles.values()}
    found.refs = (*(ref for ref in found.refs if ref.name not in gone), *made)
    found.is_renamed |= bool(made)
    return found


def _named_as_published(found: Experts, file: str) -> None:
    """Rename tensors with Tinker's names as Hugging Face names them, and note it."""
    if not any(_TINKER.search(ref.name) for ref in found.refs):
        return
    renamed = []
    for ref in found.refs:
        name = _ATTENTION.sub("self_attn", _HEAD.sub(r"\1lm_head", ref.name))
        renamed.append(ref if name == ref.name else replace(ref, name=name))
    found.refs, found.is_renamed = tuple(renamed), True
    found.targets["unembed_tokens"] = ("lm_head",)
    found.issues.append(
        note("spelling", file, "its tensors have Tinker's names; they were read as Hugging Face's")
    )


class _Block:
    """The stacked experts of one layer.

    Args:
        path: of the module that holds them, with PEFT's prefix.
        projections: their tensors, by projection and role.
        singles: tensors of single experts, by block, projection and role.
    """

    def __init__(
        self,
        path: str,
        projections: Mapping[str, Mapping[str, TensorRef]],
        singles: Mapping[tuple[str, str, str], Mapping[int, TensorRef]],
    ) -> None:
        self._path, self._projections = path, projections
        self._singles = {key[1:]: tensors for key, tensors in singles.items() if key[0] == path}
        counts = {ref.shape[0] for ref in self._refs() if len(ref.shape) == 3}
        counts |= {max(tensors) + 1 for tensors in self._singles.values()}
        # A shared factor counts 1, so the largest count is that of the experts.
        self._n = max(counts, default=0)

    @property
    def is_stacked(self) -> bool:
        """True when one tensor has the factors of several experts, or several experts share one factor."""
        return any(len(ref.shape) == 3 for ref in self._refs()) or bool(self._singles)

    def _refs(self) -> Iterable[TensorRef]:
        return (ref for roles in self._projections.values() for ref in roles.values())

    def experts(self, found: Experts) -> list[TensorRef]:
        """Return the factors of every expert under its own names; faults are added to the issues."""
        made: list[TensorRef] = []
        names = _PROJECTIONS
        if (
            all(0 in ref.shape for ref in self._projections.get("w3", {}).values())
            and "w3" in self._projections
        ):
            names = _UNGATED
        for projection, roles in self._projections.items():
            # Tinker writes empty tensors for a gate that the model does not have.
            if roles and all(0 in ref.shape for ref in roles.values()):
                continue
            issue = self._problem(projection, roles)
            if issue is not None:
                found.issues.append(issue)
                continue
            # Mixtral's own modules are called w1, w2 and w3.
            own = projection if "block_sparse_moe" in self._path else names.get(projection, projection)
            for role, ref in roles.items():
                made += self._spread(ref, role, own)
            if own != projection or own == "gate_up_proj":
                words = ("gate_proj", "up_proj") if own == "gate_up_proj" else (own,)
                names_now = tuple(f"experts.{n}.{word}" for n in range(self._n) for word in words)
                found.targets[projection] = tuple(
                    dict.fromkeys((*found.targets.get(projection, ()), *names_now))
                )
        return made

    def _problem(self, projection: str, roles: Mapping[str, TensorRef]) -> Issue | None:
        """Return what keeps the factors of a projection from being split; None where nothing does."""
        subject = f"{self._path}.{projection}".removeprefix(PREFIX)
        if self._n < 2:
            sentence = (
                "all experts share these factors, and no tensor in the file shows how many experts there are"
            )
            return error(
                "unsupported", subject, sentence, "save the adapter again with a factor for each expert"
            )
        for role, ref in roles.items():
            n_found = ref.shape[0] if len(ref.shape) == 3 else 1
            if len(ref.shape) not in {2, 3} or n_found not in {1, self._n}:
                sentence = (
                    f"lora_{role} is {shape_text(ref.shape)}, expected one factor, or one for each of "
                    f"{self._n} experts"
                )
                return error("bad-shape", subject, sentence)
        # One factor may be shared and the other stored expert by expert.
        for role in {"A", "B"} - roles.keys():
            if self._singles.get((projection, role), {}).keys() != set(range(self._n)):
                sentence = (
                    f"has a lora_{'B' if role == 'A' else 'A'} shared by all experts, and no lora_{role} for "
                    "each expert"
                )
                return error(f"missing-{role}", subject, sentence, INCOMPLETE)
        if projection == "gate_up_proj" and (len(roles) < 2 or roles["B"].shape[-2] % 2):
            sentence = "combines gate and up, and lora_B cannot be split into two equal halves"
            return error("bad-shape", subject, sentence)
        return None

    def _spread(self, ref: TensorRef, role: str, projection: str) -> list[TensorRef]:
        """Return one tensor per expert; of gate and up in one, two, gate's rows first."""
        made = []
        for n in range(self._n):
            # A shared factor is the same bytes under each expert's name.
            one = ref if len(ref.shape) == 2 else ref.entry(n if ref.shape[0] > 1 else 0)
            parts = {projection: one}
            if projection == "gate_up_proj":
                half = one.shape[0] // 2
                # Both halves read the same inputs, so A is common and B has gate's rows first.
                parts = {"gate_proj": one, "up_proj": one}
                if role == "B":
                    parts = {
                        "gate_proj": one.rows(0, half, (half, one.shape[1])),
                        "up_proj": one.rows(half, 2 * half, (half, one.shape[1])),
                    }
            made += [
                replace(part, name=f"{self._path}.{n}.{name}.lora_{role}.weight")
                for name, part in parts.items()
            ]
        return made


def _grouped(found: Experts) -> None:
    """Take NeMo Automodel's grouped experts out of an adapter's tensors.

    Their factors belong to the parameters as transformers has them in memory: gate and up ``[experts, 2 · inner, hidden]``
    (or its transpose), down ``[experts, hidden, inner]``.

    Shapes:
        gate_and_up_A: ``[experts, hidden, r]``, gate_and_up_B: ``[experts, r, 2 · inner]``;
        down_A: ``[experts, inner, r]``, down_B: ``[experts, r, hidden]``.
    """
    groups: dict[tuple[str, str], dict[str, TensorRef]] = {}
    for ref in found.refs:
        match = _GROUPED.fullmatch(ref.name)
        if match:
            groups.setdefault((match["module"], match["which"]), {})[match["role"]] = ref
    pairs = []
    for (module, which), roles in groups.items():
        path = module.removeprefix(PREFIX)
        a, b = roles.get("A"), roles.get("B")
        if a is None or b is None:
            lack = "A" if a is None else "B"
            found.issues.append(error(f"missing-{lack}", path, f"has no lora_{which}_{lack}", INCOMPLETE))
        elif not (
            len(a.shape) == len(b.shape) == 3 and a.shape[0] == b.shape[0] and a.shape[2] == b.shape[1]
        ):
            shapes = f"lora_{which}_A is {shape_text(a.shape)}, lora_{which}_B is {shape_text(b.shape)}"
            found.issues.append(
                error("bad-shape", path, f"{shapes}, expected (experts, in, r) and (experts, r, out)")
            )
        else:
            n, n_in, rank = a.shape
            # NeMo multiplies x A B, PEFT B A x: the two change places. The bytes stay, only the shapes are read
            # otherwise.
            tensors = {
                "A": replace(b, shape=(n * rank, b.shape[2])),
                "B": replace(a, shape=(n_in, n * rank)),
            }
            parameter = "gate_up_proj" if which == "gate_and_up" else "down_proj"
            pairs.append(StackedPair(path, 0, tensors, parameter, packing="by-expert", inward=True))
    found.pairs = tuple(pairs)
    if groups:
        taken = {ref.name for roles in groups.values() for ref in roles.values()}
        found.refs = tuple(ref for ref in found.refs if ref.name not in taken)
