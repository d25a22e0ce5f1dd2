"""The join of a base and its adapters, as it grows: what each output tensor is, and what is done to it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lora_merge.core.checkpoint import INPUT_NAMES, OUTPUT_NAMES, owner_name, patched_config
from lora_merge.core.patterns import TargetError
from lora_merge.core.plan import Combination, Copy, Merge, Step, View
from lora_merge.core.report import Issue, error, note, warning
from lora_merge.core.skeleton import same_layers
from lora_merge.plan.change import Change, alike, combined_rank, with_one_base
from lora_merge.plan.fitting import Fitting, named_parameters
from lora_merge.plan.heads import NOTHING_LOADED, with_head
from lora_merge.plan.initial import initial_issues, is_layered
from lora_merge.plan.layered import layered_deltas
from lora_merge.plan.model import Model
from lora_merge.plan.origins import origin_issues
from lora_merge.plan.outline import Outline, layer_order, layer_stem, replicated, replication_patch
from lora_merge.plan.shared_changes import Separation
from lora_merge.plan.sizes import other_size
from lora_merge.plan.ties import Tie, ensures_tie, find_tie, untie_issue, untie_patch
from lora_merge.plan.views import view_for
from lora_merge.plan.vocabulary import resized
from lora_merge.words import of_several

if TYPE_CHECKING:
    from lora_merge.core.adapter import Adapter, AdapterUse, PlacedDelta
    from lora_merge.core.checkpoint import Checkpoint
    from lora_merge.core.facts import Reach
    from lora_merge.core.shards import OutputFile
    from lora_merge.core.tensor import TensorRef
    from lora_merge.requests.request import Request


_HEADS_WITH_BIAS = frozenset({"decoder", "predictions", "lm_head"})
"""Last parts of the paths of what holds the bias of an output embedding."""


class Draft:
    """The join of a base and its adapters.

    Args:
        base: what to merge into.
        uses: the adapters, in the order in which they are applied.
        request: how.
        twins: pairs of an input and an output embedding with equal values.
    """

    def __init__(
        self,
        base: Checkpoint,
        uses: tuple[AdapterUse, ...],
        request: Request,
        twins: frozenset[frozenset[str]],
    ) -> None:
        self._base, self._uses, self._request, self._twins = base, uses, request, twins
        self._model = Model(Outline.of(base), base.config)
        self._changes: dict[str, Change] = {}
        self._first_of_tie: dict[str, str] = {}
        self._is_flag_cleared = False
        """True when the output's config no longer says that anything is tied."""
        self.outline = self._model.outline
        """Names of the output, and the stored tensors behind them."""
        self.config_patch: dict[str, Any] = {}

    def join(self) -> list[Issue]:
        """Fit every adapter, then settle what they do to each other; return what is wrong."""
        issues = self._replicate() + self._add_head()
        if any(issue.code == NOTHING_LOADED for issue in issues):
            return issues
        tie = self._model.tie = self._tie()
        for n, use in enumerate(self._uses):
            issues += initial_issues(use.adapter, self._request)
            issues += origin_issues(use.adapter, self._base.config)
            layered: tuple[PlacedDelta, ...] = ()
            by_layers = is_layered(use.adapter, self._request)
            model, view_issues = view_for(named_parameters(use.adapter), self._model, parts=not by_layers)
            issues += view_issues
            if by_layers:
                layered, layer_issues = layered_deltas(use, model)
                issues += layer_issues
                use = replace(use, adapter=_without_factors(use.adapter))  # noqa: PLW2901 - what is left of it
            fitting = Fitting(use, n, model, self._request).fit(layered)
            issues += other_size(use.adapter, model, fitting.issues) + fitting.issues
            issues += self._take(fitting)
        if tie is not None:
            issues += self._settle_tie(tie)
        if self._may_share():
            issues += self._settle_shared()
        lost = [name for name in self._changes if name not in self.outline.sources]
        sentence = "the adapter changes it, the base does not have it"
        issues += [error("unmatched-module", name, sentence) for name in lost]
        if lost:
            return issues
        issues += self._resized() + self._unused_biases()
        return issues + self._in_turn() + self._rankless() + self._in_parts()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the parameters that are the adapters' own."""
        return {name: change.source.shape for name, change in self._changes.items() if change.source}

    def steps(self, files: tuple[OutputFile, ...]) -> tuple[Step, ...]:
        """Return one step per output tensor, in the order of the output's bytes."""
        return tuple(self._step(slot) for file in files for slot in file.slots)

    def _step(self, slot: TensorRef) -> Step:
        change = self._changes.get(slot.name, Change())
        source = change.source or self.outline.sources[slot.name]
        deltas = self._settled(change.deltas)
        if not deltas and (slot.dtype == source.dtype or source.nbytes == 0):  # nothing is there to be cast
            return Step((slot,), Copy(source), replaced=change.source is not None)
        combination = self._combination(slot.name, deltas) if len(slot.shape) > 1 else None
        reaches: set[Reach] = {delta.reach for delta in deltas}
        reach: Reach = (
            "tensor" if combination or "tensor" in reaches else "columns" if "columns" in reaches else "rows"
        )
        view = View.of(
            slot.shape, stacked=any(delta.facts.is_stacked or delta.region.box for delta in deltas)
        )
        merge = Merge("dense", (source,), deltas, view, reach, combination)
        return Step((slot,), merge, replaced=change.source is not None)

    def _settled(self, deltas: list[PlacedDelta]) -> tuple[PlacedDelta, ...]:
        """Return the deltas of one tensor as they are applied, one after the other.

        Sums take the user's weight into their scale; where there are several, nothing is rounded in between.
        """
        several = len({delta.adapter for delta in deltas}) > 1
        if self._request.combine != "linear":
            return tuple(map(_unrounded, deltas))
        if not (several or any(delta.adapter_weight != 1 for delta in deltas)):
            return tuple(deltas)
        return tuple(
            replace(delta, scale=delta.scale * delta.adapter_weight, adapter_weight=1.0)
            if delta.facts.is_scaled
            else delta
            for delta in map(_unrounded, deltas)
        )

    def _combination(self, name: str, deltas: tuple[PlacedDelta, ...]) -> Combination | None:
        """Return how the adapters' changes of one tensor become one; None for a sum."""
        request = self._request
        if not deltas or request.combine == "linear":
            return None
        rank = combined_rank(deltas)
        rng_key = self._first_of_tie.get(name, name)
        return Combination(request.combine, request.density, request.seed, rank, rng_key)

    def _replicate(self) -> list[Issue]:
        """Repeat layers, where an adapter was trained on a model with repeated layers."""
        if not any(use.adapter.config.get("layer_replication") for use in self._uses):
            return []
        stem = layer_stem(self.outline)
        if not stem:
            sentence = "repeats layers, and the base's layers cannot be told by their names"
            return [error("unsupported", "layer_replication", sentence)]
        layers = {
            name[len(stem) + 1 :].partition(".")[0]
            for name in self.outline.names
            if name.startswith(f"{stem}.")
        }
        try:
            orders = {layer_order(use.adapter.config, len(layers)) for use in self._uses}
        except TargetError as exc:
            return [error("bad-field", exc.field, exc.sentence)]
        if len(orders) > 1:
            return [
                error("unsupported", "layer_replication", "repeats layers, and the adapters differ in it")
            ]
        (order,) = orders
        patch = replication_patch(self._base.config, order, len(layers))
        patched = patched_config(self._base.config, patch)
        if not same_layers(self._base.config, patched, stem, order):
            sentence = (
                "repeats layers, and what a layer of this model is depends on its place or is not known"
            )
            hint = "repeat the layers of the base in transformers, save it, and remove layer_replication"
            return [error("unsupported", "layer_replication", sentence, hint)]
        self.outline = replicated(self.outline, order)
        self.config_patch |= patch
        self._model = Model(self.outline, patched)
        sentence = f"repeats layers: the output has {len(order)}, the base {len(layers)}"
        return [note("replicated", "layer_replication", sentence)]

    def _add_head(self) -> list[Issue]:
        """Take over the class of the head that an adapter brings, where the base has none."""
        headed = with_head([use.adapter for use in self._uses], self._model)
        if headed is None:
            return []
        self.outline = headed.outline
        self.config_patch |= headed.config_patch
        self._model = Model(self.outline, patched_config(self._model.config, headed.config_patch))
        return list(headed.issues)

    def _tie(self) -> Tie | None:
        """Return the tie of the embeddings, if an adapter touches one of them."""
        if not any(touches_embeddings(use) for use in self._uses):
            return None
        return find_tie(self._model, self._twins)

    def _take(self, fitting: Fitting) -> list[Issue]:
        """Take over what one adapter changes."""
        issues = []
        for name in fitting.replacements.keys() | fitting.copies.keys():
            change = self._changes.setdefault(name, Change())
            if change.source is not None:
                sentence = "is replaced as a whole by two adapters"
                issues.append(error("two-replacements", name, sentence, "merge one of them only"))
            change.own, change.copy = fitting.replacements.get(name), fitting.copies.get(name)
        for delta in fitting.deltas:
            self._changes.setdefault(delta.tensor, Change()).deltas.append(delta)
        return issues

    def _settle_tie(self, tie: Tie) -> list[Issue]:
        """Keep a tie whose ends change alike, take apart one whose ends do not."""
        embedding, head = self._changes.pop(tie.embedding, None), self._changes.pop(tie.head, None)
        if embedding is not None:
            head = self._following(tie.embedding, embedding, head or Change())
        embedding, head = with_one_base(embedding, head)
        if embedding is None and head is None:
            return []
        for name in self._model.copies_of(tie):
            sentence = f"is stored a second time, as {name}, and a change of one would untie the two"
            hint = f"remove {name} from the base: transformers ties it to {tie.embedding}"
            return [error("stored-copy", tie.embedding, sentence, hint)]
        if embedding is not None and head is not None and alike(embedding, head, self._twins):
            self._changes |= dict.fromkeys(tie.stored, embedding)
            self._first_of_tie = dict.fromkeys(tie.stored, tie.source)
            return []
        for name, change in ((tie.embedding, embedding), (tie.head, head)):
            if name not in self.outline.sources:
                self.outline = self.outline.with_twin(tie.source, name)
            if change is not None:
                self._changes[name] = change
        patch = untie_patch(self._base.config)
        self.config_patch |= patch
        self._is_flag_cleared = bool(patch)
        return [untie_issue(self._base.config, tie, allowed=self._request.allow_untie)]

    def _may_share(self) -> bool:
        """Return True when a changed tensor may have several users; asking transformers takes seconds."""
        head_bias = any(
            change.copy is not None and name.endswith(".bias") and owner_name(name) in _HEADS_WITH_BIAS
            for name, change in self._changes.items()
        )
        unstored = not self._changes.keys() <= self.outline.sources.keys()
        return head_bias or unstored or self._model.may_share or any(map(touches_embeddings, self._uses))

    def _settle_shared(self) -> list[Issue]:
        """Write apart the users of a shared weight that do not all change alike."""
        separation = Separation(
            self._model,
            self.outline,
            self._changes,
            follow=self._following,
            alike=lambda one, other: alike(one, other, self._twins),
        )
        issues = separation.settle(write_all=self._is_flag_cleared)
        self.outline = separation.outline
        return issues

    def _following(self, name: str, embedding: Change, head: Change) -> Change | None:
        """Return the head's change with those of the embedding that it shares, whatever the files say of it.

        Args:
            name: of the input embedding.
            embedding: what is done to it.
            head: what is done to the output embedding, or to another user of the same weight.

        Reference:
            ``peft.utils.other.set_additional_trainable_modules`` and
            ``peft.tuners.lora.model.LoraModel._add_targets_to_tie`` (PEFT 0.21.2).
        """
        ensured = [ensures_tie(use.adapter, name) for use in self._uses]
        if all(ensured) and (embedding.own or embedding.deltas):
            return embedding
        whole = embedding.own is not None or head.own is not None
        deltas: list[PlacedDelta] = []
        for n, is_ensured in enumerate(ensured):
            theirs = [delta for delta in embedding.deltas if delta.adapter == n]
            own = [delta for delta in head.deltas if delta.adapter == n]
            only_tokens = not own and not whole and all(delta.facts.replaces_rows for delta in theirs)
            deltas += theirs if is_ensured or only_tokens else own
        return Change(head.own, deltas, head.copy) if deltas or head.source is not None else None

    def _resized(self) -> list[Issue]:
        """Settle what a vocabulary of another size changes: every end of it, and the config."""
        found = resized(self._model, self.outline, self.shapes)
        self.config_patch |= found.patch
        for name, ref in found.cut.items():
            self._changes.setdefault(name, Change()).copy = ref
        return found.issues

    def _unused_biases(self) -> list[Issue]:
        """Return an issue for each bias of a head whose rows were trained: PEFT leaves it out of the forward pass.

        Reference:
            ``peft.tuners.trainable_tokens.layer.TrainableTokensLayer.forward_adapters`` (PEFT 0.21.2).
        """
        trained = {
            name
            for name, change in self._changes.items()
            if any(one.facts.replaces_rows for one in change.deltas)
        }
        tie = self._model.tie
        if tie is not None and not trained.isdisjoint(tie.stored) and tie.head not in self._changes:
            trained.add(tie.head)
        biases = [name.removesuffix("weight") + "bias" for name in sorted(trained)]
        sentence = (
            "is left out by PEFT where rows of its weight are trained, so that the merged model would differ"
        )
        hint = "train the output embedding whole (modules_to_save), or rows of an untied input embedding only"
        return [error("unsupported", name, sentence, hint) for name in biases if self._model.has(name)]

    def _in_turn(self) -> list[Issue]:
        """Return a note when the order of the adapters counts."""
        if self._request.combine != "linear":
            return []
        names = [
            name
            for name, change in self._changes.items()
            if len({delta.adapter for delta in change.deltas}) > 1
            and not all(delta.facts.is_sum for delta in change.deltas)
        ]
        if not names:
            return []
        why = (
            "changed by several adapters, and not all of them only add to it (DoRA, trained rows, PEFT's own "
            "layers): each works on what the one before it left, in the order given"
        )
        sentence = of_several(len(names), f"is {why}", f"are {why}")
        return [note("in-turn", min(names), sentence)]

    def _shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor of the output."""
        return self.shapes.get(name, self.outline.sources[name].shape)

    def _in_parts(self) -> list[Issue]:
        """Return a warning when a combination looks at a stored tensor that is several of the adapters' weights."""
        if self._request.combine == "linear":
            return []
        names = [
            name
            for name, change in self._changes.items()
            if any(delta.region.box or delta.facts.is_stacked for delta in change.deltas)
        ]
        if not names:
            return []
        why = (
            f"several weights (experts, fused projections), which --combine {self._request.combine} takes as one: "
            "on a base that stores them apart it gives another result"
        )
        sentence = of_several(len(names), f"holds {why}", f"hold {why}")
        return [
            warning(
                "combined-whole", min(names), sentence, "combine with linear, which does not depend on it"
            )
        ]

    def _rankless(self) -> list[Issue]:
        """Return an issue for each weight that ``--combine svd`` has no rank for."""
        if self._request.combine != "svd":
            return []
        sentence = (
            "--combine svd keeps the largest rank of the adapters, and none that changes this weight has one"
        )
        return [
            error("no-rank", name, sentence, "combine these adapters with linear, ties or dare")
            for name, change in self._changes.items()
            if change.deltas
            and len(self._shape(name)) > 1
            and max(delta.rank for delta in change.deltas) == 0
        ]


def _unrounded(delta: PlacedDelta) -> PlacedDelta:
    return replace(delta, rounded=False, round_before_next=False)


def _without_factors(adapter: Adapter) -> Adapter:
    """Return what PEFT's layers leave of an adapter: trained rows stand beside them, whatever they merge."""
    return replace(adapter, deltas=tuple(delta for delta in adapter.deltas if delta.facts.replaces_rows))


def touches_embeddings(use: AdapterUse) -> bool:
    """Return True when an adapter may change an input or output embedding."""
    names = INPUT_NAMES | OUTPUT_NAMES
    return (
        any(
            delta.transposed or delta.facts.replaces_rows or owner_name(delta.parameter) in names
            for delta in use.adapter.deltas
        )
        or any(
            owner_name(parameter) in names and parameter not in use.unchanged
            for parameter in use.adapter.replacements
        )
        or any(part in names for name in use.adapter.layered for part in name.split("."))
    )
