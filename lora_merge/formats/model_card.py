"""The model card of an output, ``README.md``: what it was made from, how it is used, and what its storage keeps.

It names no time, machine or process, so the same merge writes the same bytes.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from lora_merge.core.plan import Merge
from lora_merge.formats.front_matter import front_matter, licences
from lora_merge.formats.markdown import code, name, strong
from lora_merge.quantised import describe
from lora_merge.storage.same_model import cached_repo, is_repo
from lora_merge.storage.source import Origin, parse_source
from lora_merge.words import listing, printable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_merge.core.plan import MergePlan
    from lora_merge.formats.provenance import Provenance

_TAGS = ("lora-merge", "merged")

_CARD = """\
---
{front_matter}
---

# {title}

The weights of {base} with {adapters} merged into them. A plain Hugging Face checkpoint: it
needs no LoRA support to load.
{licences}{usage}
## How it was made

| | |
| --- | --- |
| base | {base_path}{base_commit} |
{rows}| kind | {kind} |
| tensors | {n_merged} merged, {n_other} as in the base |
| made by | lora-merge {version} |

`merge_manifest.json` beside this file lists every tensor with its digest.

## What the output keeps of the adapter

{kept}
"""

_USAGE = """
## Use

```python
from transformers import {model_class}{tokenizer}

model = {model_class}.from_pretrained("{path}", dtype="auto"){tokens}
```
"""
_TOKENIZER = ", AutoTokenizer"
_TOKENS = '\ntokenizer = AutoTokenizer.from_pretrained("{path}")'
_SERVE = """
```sh
vllm serve {path}
```
"""

_NOTHING = 1e-6
"""A share that is not worth a sentence; the manifest has six digits."""

_CLASS = re.compile(r"[A-Z][A-Za-z0-9_]{2,99}")
_PLAIN_PATH = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)


def card_text(provenance: Provenance, plan: MergePlan, deltas: Mapping[str, Mapping[str, float]]) -> str:
    """Return the text of the model card: Markdown with YAML front matter, names made harmless.

    Args:
        provenance: what the merge was made from.
        plan: what was promised.
        deltas: what the manifest says of the delta of each tensor, by its name; see `provenance.delta_table`.
    """
    actions = [step.action for step in plan.steps]
    names = [
        strong(_short_name(path, origin)) + (f" × {weight:g}" if weight != 1 else "")
        for path, origin, weight in zip(
            provenance.adapter_paths, provenance.origins, plan.weights, strict=True
        )
    ]
    rows = "".join(
        f"| adapter | {code(path, in_table=True)}{_commit(origin)} |\n| adapter digest | `{adapter.digest}` |\n"
        for path, origin, adapter in zip(
            provenance.adapter_paths, provenance.origins, provenance.adapters, strict=True
        )
    )
    n_as_in_base = actions.count("copied") + actions.count("cast")
    return _CARD.format(
        front_matter=_front_matter(provenance),
        base=strong(base_name(provenance)),
        title=name(provenance.out_name),
        adapters=f"the adapter {names[0]}" if len(names) == 1 else f"the adapters {', '.join(names)}",
        licences=_licences(provenance),
        usage=_usage(provenance),
        base_path=code(provenance.base, in_table=True),
        base_commit=_commit(provenance.base_origin),
        rows=rows,
        kind=_kind(provenance, plan),
        n_merged=len(actions) - n_as_in_base,
        n_other=n_as_in_base,
        version=provenance.versions["lora-merge"],
        kept=_kept(plan, deltas),
    )


def _front_matter(provenance: Provenance) -> str:
    adapters = [
        _short_name(path, origin)
        for path, origin in zip(provenance.adapter_paths, provenance.origins, strict=True)
    ]
    fields: dict[str, Any] = {
        # The Hub links the card to the base by this name.
        "base_model": printable(base_name(provenance)),
        # Also of a quantised output: on the Hub "quantized" is the same model in fewer bits, and "merge" one of several
        # models. Adapters of one base make neither.
        "base_model_relation": "finetune",
        "adapters": [printable(one) for one in adapters],
    }
    return front_matter(fields, provenance.base_card, provenance.adapter_cards, _TAGS)


def _licences(provenance: Provenance) -> str:
    """Return a paragraph about licences that differ; empty where they do not."""
    if len(licences([provenance.base_card, *provenance.adapter_cards])) < 2:
        return ""
    cards = [("base", provenance.base_card), *(("adapter", card) for card in provenance.adapter_cards)]
    said = [f"that of the {role} is {code(card.licence)}" for role, card in cards if card.licence]
    return (
        f"\nThe licences of base and adapter differ: {', '.join(said)}. Both apply to parts of this model.\n"
    )


def _usage(provenance: Provenance) -> str:
    """Return how the checkpoint is loaded and served; empty where the base names no class of transformers."""
    architecture = provenance.architecture
    if not _CLASS.fullmatch(architecture):
        return ""
    path = provenance.out_name if _PLAIN_PATH.fullmatch(provenance.out_name) else "path/to/this/folder"
    is_causal = architecture.endswith("ForCausalLM")
    usage = _USAGE.format(
        model_class="AutoModelForCausalLM" if is_causal else architecture,
        tokenizer=_TOKENIZER if is_causal else "",
        tokens=_TOKENS.format(path=path) if is_causal else "",
        path=path,
    )
    return usage + (
        _SERVE.format(path=path) if architecture.endswith(("ForCausalLM", "ForConditionalGeneration")) else ""
    )


def _kind(provenance: Provenance, plan: MergePlan) -> str:
    summary = plan.summary()
    kinds = " + ".join(dict.fromkeys(adapter.kind for adapter in provenance.adapters))
    return kinds + "".join(
        f", {what} {', '.join(values)}"
        for what, values in (("rank", summary.ranks), ("scale", summary.scales))
        if values
    )


def _kept(plan: MergePlan, deltas: Mapping[str, Mapping[str, float]]) -> str:
    """Return what rounding to the stored numbers leaves of the adapter's changes, as it was measured."""
    import statistics  # takes long to import

    ops = {step.main.name: step.op for step in plan.steps if isinstance(step.op, Merge)}
    known = {tensor: deltas[tensor] for tensor in ops if tensor in deltas}
    changed = {tensor: delta for tensor, delta in known.items() if delta["relative_norm"]}
    if not changed:
        return "No weight that was merged changes." if known else "It was not measured."
    storages = Counter(describe(ops[tensor].target) for tensor in changed)
    stored = listing([storage for storage, _ in storages.most_common()], 3)
    off = [delta["lost_share"] for delta in changed.values()]
    if max(off) < _NOTHING:
        return f"The merged weights are stored as {stored}, and rounding to that loses nothing of the adapter's deltas."
    text = (
        f"The merged weights are stored as {stored}. Rounding to that changes an adapter's delta by "
        f"{_share(statistics.median(off))} of its size in the median tensor, and by {_share(max(off))} at most\n"
        "(‖Δ′ - Δ‖ / ‖Δ‖, from a sample of rows)."
    )
    kept = [delta["kept_share"] for delta in changed.values() if "kept_share" in delta]
    if kept:
        text += (
            f" In the direction of the delta, {_share(statistics.median(kept))} of it arrives in the median tensor,\n"
            f"and {_share(min(kept))} at least."
        )
    return text


def _share(value: float) -> str:
    """Return a share as per cent, with as many digits as say something.

    Example:
        >>> _share(0.9876), _share(0.00004), _share(0.0)
        ('98.8%', '0.004%', '0%')
    """
    return f"{value:.1%}" if abs(value) >= 0.01 else f"{100 * value:.2g}%"


def base_name(provenance: Provenance) -> str:
    """Return the base's repo, or the last part of its path; with an owner where an adapter names a repo of the same
    name.

    What an adapter merely mentions is not what it was merged into.
    """
    if provenance.base_origin is not None:
        return provenance.base_origin.source.repo
    cached = cached_repo(provenance.base)
    if cached is not None:
        return cached[0]
    last = _last_part(provenance.base)
    recorded = [adapter.config.get("base_model_name_or_path") for adapter in provenance.adapters]
    repos = [repo for repo in recorded if isinstance(repo, str) and is_repo(repo) and parse_source(repo)]
    return next((repo for repo in repos if _last_part(repo).lower() == last.lower()), last)


def _short_name(path: str, origin: Origin | None) -> str:
    """Return an adapter's repo, or the last part of its path."""
    if origin is not None:
        return origin.source.repo
    # The last part of a path into the Hub's cache is a commit.
    cached = cached_repo(path)
    return cached[0] if cached is not None else _last_part(path)


def _commit(origin: Origin | None) -> str:
    return f", commit {code(origin.commit, in_table=True)}" if origin is not None and origin.commit else ""


def _last_part(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2] or path
