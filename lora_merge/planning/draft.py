"""The join of a base and its adapters, as it grows: what each output tensor is, and what is done to it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lora_merge.core.checkpoint import INPUT_NAMES, OUTPUT_NAMES, ConfigPatch, owner_name, patched_config
from lora_merge.core.report import Issue, error, note
from lora_merge.modeling.skeleton import same_layers
from lora_merge.peft_rules.injection import need_peft
from lora_merge.peft_rules.patterns import TargetError
from lora_merge.planning.beside import left_out, side_files_of
from lora_merge.planning.change import Change, alike, with_one_base
from lora_merge.planning.fitting import Fitting, named_parameters
from lora_merge.planning.heads import NOTHING_LOADED, with_head
from lora_merge.planning.joined import Joined
from lora_merge.planning.mlx_conventions import origin_issues
from lora_merge.planning.model import Model
from lora_merge.planning.mutating_init import mutating_init_issues, uses_peft_layers
from lora_merge.planning.outline import Outline, layer_order, layer_stem, replicated, replication_patch
from lora_merge.planning.peft_layers import peft_layer_deltas
from lora_merge.planning.shared_changes import Separation
from lora_merge.planning.sizes import other_size
from lora_merge.planning.stored_otherwise import turned_matrices
from lora_merge.planning.ties import Tie, ensures_tie, find_tie, untie_patch, untied_note
from lora_merge.planning.views import view_for
from lora_merge.planning.vocabulary import resized

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_merge.core.adapter import Adapter, AdapterUse, PlacedDelta
    from lora_merge.core.checkpoint import Checkpoint
    from lora_merge.planning.settings import Reading

_HEADS_WITH_BIAS = frozenset({"decoder", "predictions", "lm_head"})
"""Last parts of the paths of what holds the bias of an output embedding."""


def join(
    base: Checkpoint,
    uses: Sequence[AdapterUse],
    reading: Reading,
    twins: frozenset[frozenset[str]] = frozenset(),
) -> Joined:
    """Return where each change of some adapters belongs on a base. Whatever does not fit is among its issues.

    Args:
        base: what they change.
        uses: the adapters, in the order in which they are applied.
        reading: how they are read where their files do not say it.
        twins: pairs of an input and an output embedding with equal values, where base or adapter hold both.
    """
    uses = tuple(uses)
    draft = _Draft(base, uses, reading, twins)
    of_base = (*base.issues, *turned_matrices(base))
    of_adapters = [issue for use in uses for issue in (*use.adapter.issues, *use.issues)]
    # With a base or an adapter that could not be read, further issues would follow from that alone.
    is_base_read = all(issue.severity != "error" for issue in of_base)
    are_read = all(use.adapter.is_read for use in uses)
    if is_base_read and (are_read or all(issue.severity != "error" for issue in of_adapters)):
        draft.join()
    side_files, of_files = side_files_of(base, uses)
    return Joined(
        base=base,
        uses=uses,
        reading=reading,
        outline=draft.outline,
        changes=draft.changes,
        config_patch=draft.config_patch,
        tie=draft.tie,
        is_untied=draft.is_untied,
        side_files=side_files,
        issues_of_base=of_base,
        issues_of_adapters=tuple(of_adapters),
        issues_of_fit=tuple(draft.issues),
        issues_of_files=(*of_files, *left_out(base)),
        is_whole=draft.is_whole,
    )


class _Draft:
    """A join as it grows: each adapter is fitted, then changes that concern shared tensors are settled."""

    def __init__(
        self,
        base: Checkpoint,
        uses: tuple[AdapterUse, ...],
        reading: Reading,
        twins: frozenset[frozenset[str]],
    ) -> None:
        self._base, self._uses, self._reading, self._twins = base, uses, reading, twins
        self._model = Model(Outline.of(base), base.config)
        self._is_flag_cleared = False
        """True when the output's config no longer says that anything is tied."""
        self.outline = self._model.outline
        """Names of the output, and the stored tensors behind them."""
        self.changes: dict[str, Change] = {}
        self.config_patch: dict[str, Any] = {}
        self.is_untied = False
        self.issues: list[Issue] = []
        self.is_whole = False
        """True once every question was asked."""

    @property
    def tie(self) -> Tie | None:
        """The tie of the embeddings, once it was looked for."""
        return self._model.tie

    def join(self) -> None:
        """Fit every adapter, then settle ties and shared weights; faults are added to the issues.

        Raises:
            PackageError: a package that one of the adapters needs cannot be used here.
        """
        for use in self._uses:
            if uses_peft_layers(use.adapter, self._reading):
                need_peft(use.adapter.kind)
        # Layers and head first: they decide which parameters the base has at all.
        self.issues += self._replicate() + self._add_head()
        # Every tensor would be called missing.
        if any(issue.code == NOTHING_LOADED for issue in self.issues):
            return
        self._find_tie()
        for n, use in enumerate(self._uses):
            self._fit(use, n)
        if self.tie is not None:
            self.issues += self._settle_tie(self.tie)
        if self._may_share():
            self.issues += self._settle_shared()
        # Whatever was separated from a tie or a shared weight has a source by now.
        lost = [name for name in self.changes if name not in self.outline.sources]
        sentence = "the adapter changes this parameter, and the base does not have it"
        self.issues += [error("unmatched-module", name, sentence) for name in lost]
        if not lost:
            self.issues += self._resized() + self._unused_biases()
            # Only here: what follows from missing tensors would be wrong or said twice.
            self.is_whole = True

    def _fit(self, use: AdapterUse, n: int) -> None:
        """Find the places of what one adapter changes, and add that to the changes."""
        self.issues += mutating_init_issues(use.adapter, self._reading)
        self.issues += origin_issues(use.adapter, self._base.config)
        peft_layers: tuple[PlacedDelta, ...] = ()
        # PEFT's layers and the formulas here never share an adapter's factors.
        by_layers = uses_peft_layers(use.adapter, self._reading)
        model, issues = view_for(named_parameters(use.adapter), self._model, parts=not by_layers)
        self.issues += issues
        if by_layers:
            peft_layers, issues = peft_layer_deltas(use, model)
            self.issues += issues
            use = replace(use, adapter=_without_factors(use.adapter))
        fitting = Fitting(use, n, model, self._reading).fit(peft_layers)
        # Said before what follows from it in every module.
        self.issues += other_size(use.adapter, model, fitting.issues) + fitting.issues
        self.issues += self._take(fitting)

    def _replicate(self) -> list[Issue]:
        """Repeat layers of the base, where an adapter was trained on a model with repeated layers."""
        if not any(use.adapter.config.get("layer_replication") for use in self._uses):
            return []
        stem = layer_stem(self.outline)
        if not stem:
            sentence = (
                "the adapter repeats layers, and the names of the base's tensors do not "
                "show which layer they belong to"
            )
            return [error("unsupported", "layer_replication", sentence)]
        layers = {
            name[len(stem) + 1 :].partition(".")[0]
            for name in self.outline.names
            if name.startswith(f"{stem}.")
        }
        try:
            # An adapter without repeated layers has an empty order, so it differs from those with them.
            orders = {layer_order(use.adapter.config, len(layers)) for use in self._uses}
        except TargetError as exc:
            return [exc.issue]
        if len(orders) > 1:
            return [
                error(
                    "unsupported",
                    "layer_replication",
                    "the adapters need different layers",
                )
            ]
        (order,) = orders
        patch = replication_patch(self._base.config, order, len(layers))
        patched = patched_config(self._base.config, ConfigPatch(patch))
        # A layer whose attention depends on its number would compute something else in another place.
        if not same_layers(self._base.config, patched, stem, order):
            sentence = (
                "the adapter repeats layers, and in this model the type of a layer "
                "depends on its position, or is unknown"
            )
            hint = (
                "repeat the layers of the base in transformers, save it, and remove layer_replication from "
                "adapter_config.json"
            )
            return [error("unsupported", "layer_replication", sentence, hint)]
        self.outline = replicated(self.outline, order)
        self.config_patch |= patch
        self._model = Model(self.outline, patched)
        sentence = f"the adapter repeats layers: the output has {len(order)} layers, the base {len(layers)}"
        return [note("replicated", "layer_replication", sentence)]

    def _add_head(self) -> list[Issue]:
        """Take the class of the head that an adapter brings, where the base has none."""
        headed = with_head([use.adapter for use in self._uses], self._model)
        if headed is None:
            return []
        self.outline = headed.outline
        self.config_patch |= headed.config_patch
        self._model = Model(
            self.outline, patched_config(self._model.config, ConfigPatch(headed.config_patch))
        )
        return list(headed.issues)

    def _find_tie(self) -> None:
        """Look for the tie of the embeddings, if an adapter touches one of them."""
        # Asking may take transformers (seconds), so it is asked only then.
        touched = any(touches_embeddings(use) for use in self._uses)
        tie = find_tie(self._model, self._twins) if touched else None
        if tie is not None:
            self._model = self._model.with_tie(tie)

    def _take(self, fitting: Fitting) -> list[Issue]:
        """Add what one adapter changes to what those before it change."""
        issues = []
        for name in dict.fromkeys((*fitting.replacements, *fitting.copies)):  # in this order in every process
            change = self.changes.get(name, Change())
            if change.source is not None:
                sentence = "two adapters replace this parameter as a whole"
                issues.append(error("two-replacements", name, sentence, "merge only one of them"))
            own, copy = fitting.replacements.get(name), fitting.copies.get(name)
            self.changes[name] = replace(change, own=own, copy=copy)
        deltas: dict[str, list[PlacedDelta]] = {}
        for delta in fitting.deltas:
            deltas.setdefault(delta.tensor, []).append(delta)
        for name, more in deltas.items():
            change = self.changes.get(name, Change())
            self.changes[name] = replace(change, deltas=(*change.deltas, *more))
        return issues

    def _settle_tie(self, tie: Tie) -> list[Issue]:
        """Keep a tie whose ends change alike, and take apart one whose ends do not."""
        embedding, head = self.changes.pop(tie.embedding, None), self.changes.pop(tie.head, None)
        # PEFT may train the head along with the embedding, even if the files do not show it.
        if embedding is not None:
            head = self._following(tie.embedding, embedding, head or Change())
        embedding, head = with_one_base(embedding, head)
        if embedding is None and head is None:
            return []
        # transformers ties such a copy to the embedding only while the two are equal.
        for name in self._model.copies_of(tie):
            sentence = f"is stored a second time as {name}; changing only one copy would untie the two"
            hint = f"remove {name} from the base: transformers ties it to {tie.embedding}"
            return [error("stored-copy", tie.embedding, sentence, hint)]
        if embedding is not None and head is not None and alike(embedding, head, self._twins):
            # Both names may be stored: they stay equal.
            self.changes |= dict.fromkeys(tie.stored, embedding)
            return []
        self.is_untied = True
        for name, change in ((tie.embedding, embedding), (tie.head, head)):
            if name not in self.outline.sources:
                # The end that the base does not store gets its own tensor.
                self.outline = self.outline.with_twin(tie.source, name)
            if change is not None:
                self.changes[name] = change
        patch = untie_patch(self._base.config)
        self.config_patch |= patch
        self._is_flag_cleared = bool(patch)
        return [untied_note(self._base.config, tie)]

    def _may_share(self) -> bool:
        """Return True when a changed tensor may have several users."""
        # Cheap signs only: asking transformers takes seconds.
        head_bias = any(
            change.copy is not None and name.endswith(".bias") and owner_name(name) in _HEADS_WITH_BIAS
            for name, change in self.changes.items()
        )
        unstored = not self.changes.keys() <= self.outline.sources.keys()
        return head_bias or unstored or self._model.may_share or any(map(touches_embeddings, self._uses))

    def _settle_shared(self) -> list[Issue]:
        """Give users of a shared weight that do not change alike a tensor each."""
        separation = Separation(
            self._model,
            self.outline,
            self.changes,
            follow=self._following,
            alike=lambda one, other: alike(one, other, self._twins),
        )
        issues = separation.settle(write_all=self._is_flag_cleared)
        self.outline, self.changes = separation.outline, separation.changes
        return issues

    def _following(self, name: str, embedding: Change, head: Change) -> Change | None:
        """Return the head's change, with what PEFT makes it share with the embedding.

        Args:
            name: of the input embedding.
            embedding: what is done to it.
            head: what is done to the output embedding, or to another user of the same weight.

        Reference:
            ``peft.utils.other.set_additional_trainable_modules`` and
            ``peft.tuners.lora.model.LoraModel._add_targets_to_tie`` (PEFT 0.21.2).
        """
        ensured = [ensures_tie(use.adapter, name) for use in self._uses]
        # With ensure_weight_tying PEFT trains both ends as one.
        if all(ensured) and (embedding.own or embedding.deltas):
            return embedding
        whole = embedding.own is not None or head.own is not None
        deltas: list[PlacedDelta] = []
        for n, is_ensured in enumerate(ensured):
            theirs = [delta for delta in embedding.deltas if delta.adapter == n]
            own = [delta for delta in head.deltas if delta.adapter == n]
            # PEFT trains one set of token rows for both ends, unless an end is adapted otherwise.
            only_tokens = not own and not whole and all(delta.facts.replaces_rows for delta in theirs)
            deltas += theirs if is_ensured or only_tokens else own
        return Change(head.own, tuple(deltas), head.copy) if deltas or head.source is not None else None

    def _resized(self) -> list[Issue]:
        """Settle what a vocabulary of another size changes: all embeddings, and the config."""
        shapes = {name: change.source.shape for name, change in self.changes.items() if change.source}
        found = resized(self._model, self.outline, shapes)
        self.config_patch |= found.patch
        for name, ref in found.cut.items():
            self.changes[name] = replace(self.changes.get(name, Change()), copy=ref)
        return found.issues

    def _unused_biases(self) -> list[Issue]:
        """Return an issue for each bias that PEFT leaves out of the forward pass, since rows of its head were trained.

        Reference:
            ``peft.tuners.trainable_tokens.layer.TrainableTokensLayer.forward_adapters`` (PEFT 0.21.2).
        """
        trained = {
            name
            for name, change in self.changes.items()
            if any(one.facts.replaces_rows for one in change.deltas)
        }
        tie = self._model.tie
        # The head reads the trained rows through the tie.
        if tie is not None and not trained.isdisjoint(tie.stored) and tie.head not in self.changes:
            trained.add(tie.head)
        biases = [name.removesuffix("weight") + "bias" for name in sorted(trained)]
        sentence = (
            "PEFT ignores this bias in its forward pass, because rows of the weight were trained; the merged "
            "model would apply it"
        )
        hint = "train the whole output embedding (modules_to_save), or only rows of an untied input embedding"
        return [error("unsupported", name, sentence, hint) for name in biases if self._model.has(name)]


def _without_factors(adapter: Adapter) -> Adapter:
    """Return an adapter with its trained rows only: PEFT's layers merge everything else."""
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
        or any(part in names for name in use.adapter.peft_layers for part in name.split("."))
    )
