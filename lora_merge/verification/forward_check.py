"""Forward passes: compares what the merged checkpoint computes with base and adapter, engine by engine."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_merge.core.checkpoint import CONFIG_FILE, ConfigPatch, patched_config
from lora_merge.core.comparison import Comparison
from lora_merge.core.plan import Copy, Merge, MergePlan
from lora_merge.core.report import Finding, Issue, error, note
from lora_merge.core.tensor import TORCH_TYPES
from lora_merge.core.weight import WEIGHT
from lora_merge.deltas import RowsFacts
from lora_merge.errors import CheckpointError, LoraMergeError, RequestError, UnsupportedError
from lora_merge.formats.model_config import read_config
from lora_merge.formats.safetensors import load
from lora_merge.formats.weights import values_of
from lora_merge.merging.changes import merged_in_float32
from lora_merge.modeling.cut_off import cut_off
from lora_merge.peft_rules.kinds import peft_version
from lora_merge.planning.resolve import resolve_base
from lora_merge.quantised import plain_config
from lora_merge.runtime.packages import require
from lora_merge.runtime.shortage import raise_if_out_of_memory
from lora_merge.storage.local import why_no_file
from lora_merge.storage.source import is_hub_text
from lora_merge.storage.sources import is_local
from lora_merge.verification.engines.hf import Deferred, Loader, scores
from lora_merge.verification.engines.peft_reference import Ingredients
from lora_merge.verification.engines.prompts import choose
from lora_merge.verification.engines.reference import PEFT, Reference, refer
from lora_merge.verification.engines.vllm import ask_vllm, find_python
from lora_merge.verification.forward_comparison import compare, compare_logprobs
from lora_merge.verification.grid_noise import noise_of
from lora_merge.words import counted, of_several

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lora_merge.core.weight import Weight
    from lora_merge.formats.written_checkpoint import Output
    from lora_merge.planning import Joined
    from lora_merge.requests.request import VerifyRequest


def check_readable(label: str, plan: MergePlan, output: Output) -> None:
    """Check that libraries can read the files: those of this machine, and regular ones. They would wait for a named
    pipe for ever.

    Args:
        label: of the output.
        plan: of the merge, which names the base.
        output: the output.

    Raises:
        RequestError: the output or its base is in a store.
        CheckpointError: the output holds something other than regular files.
    """
    for place in (label, plan.base):
        if not is_local(place):
            where = "read from the Hub" if is_hub_text(place) else "in an object store"
            sentence = f"runs models from local directories only, and {place} is {where}"
            raise RequestError("", 0, "forward", sentence, hint="download it, and pass its folder")
    for name in output.broken:
        path = Path(output.root, name)
        if why := why_no_file(path):
            raise CheckpointError(str(path), "", why, hint="remove it: forward passes read all files")


@cut_off()
def compare_forward(
    request: VerifyRequest, joined: Joined, plan: MergePlan, output: Output
) -> tuple[list[Finding], tuple[Comparison, ...]]:
    """Return how far the merged checkpoint's outputs are from those of base and adapter.

    Models are loaded one after the other. No hub is reachable meanwhile.

    Raises:
        UnsupportedError: transformers has no class for the model.
        RequestError: there is no tokenizer for the user's texts, or the engine is not installed.
        PackageError: transformers or PEFT cannot be used here.
    """
    for package in ("transformers", "peft"):
        require(package, "a comparison of forward passes")
    # A missing engine is reported before any model is loaded.
    python = find_python(request.engine_python) if request.engine else ""
    base_config = read_config(Path(plan.base) / CONFIG_FILE)
    made_of = _ingredients(joined, plan, base_config)
    prompts = choose(
        Path(output.root),
        made_of.merged_config,
        request.prompt,
        _trained(plan),
        request.n_tokens,
        trust_remote_code=request.trust_remote_code,
    )
    reference = refer(
        made_of, prompts, request.n_tokens, request.dtype, trust_remote_code=request.trust_remote_code
    )
    if reference.unsteady:
        return [_not_comparable(reference)], ()
    if request.tolerance is not None:
        reference = replace(reference, tolerance=request.tolerance)
    is_quantised = made_of.decoded is not None or any(
        isinstance(step.op, Merge) and not step.op.target.is_dense for step in plan.steps
    )
    finding, comparisons = _in_transformers(request, reference, output, is_quantised=is_quantised)
    findings = [finding]
    if request.engine:
        finding, more = _in_vllm(request, reference, output, python)
        findings.append(finding)
        comparisons += more
    return findings, tuple(comparisons)


def _not_comparable(reference: Reference) -> Finding:
    sentence = (
        f"the forward check is not possible: two runs of base and adapter ({reference.how}) with the same seed differ by "
        f"up to {reference.unsteady:.2g} per logit"
    )
    hint = "leave out --forward: the tensors are recomputed without it"
    return Finding("forward", "nothing was compared", (error("not-comparable", "", sentence, hint),))


def _in_transformers(
    request: VerifyRequest, reference: Reference, output: Output, *, is_quantised: bool
) -> tuple[Finding, list[Comparison]]:
    """Return the finding on the merged checkpoint in transformers, and its comparisons.

    Args:
        request: how it is run.
        reference: what it is compared with.
        output: the checkpoint.
        is_quantised: True where some of its weights may be stored quantised.
    """
    root = Path(output.root)
    comparisons: list[Comparison] = []
    issues: list[Issue] = list(_said_of(reference))
    try:
        with _loaded(request, root, output, is_quantised=is_quantised) as (model, missing):
            issues += [
                error("forward", name, "transformers finds no tensor for this parameter in the output")
                for name in missing
            ]
            for wanted in reference.answers:
                # The reference was not asked what comes after its last token.
                got = scores(model, wanted.prompt, wanted.tokens[:-1])
                comparisons.append(compare("transformers", wanted, got, reference.tolerance))
            comparisons += _alone(model, reference)
    except (
        LoraMergeError,
        OSError,
        RuntimeError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        ImportError,
    ) as exc:
        # A checkpoint that transformers cannot run is a finding, unless memory was the reason.
        raise_if_out_of_memory(exc)
        sentence = f"transformers cannot run the merged checkpoint ({type(exc).__name__}: {exc})"[:400]
        issues.append(error("forward", output.root, sentence))
    issues += _failures(comparisons)
    n = len(reference.answers)
    # The comparisons after the first n are of modules that were run alone: no logits.
    largest = max((one.max_difference for one in comparisons[:n]), default=float("nan"))
    bound = f"|Δlogit| up to {largest:.2g}, at most {reference.tolerance:.2g} expected from rounding"
    detail = f"transformers, {counted(n, 'prompt')}: {bound}" if n else "transformers"
    if reference.alone:
        detail += f"; {counted(len(reference.alone), 'module')} that no prompt uses, run separately"
    return Finding("forward", f"{detail}; compared with {reference.how}", tuple(issues)), comparisons


@contextlib.contextmanager
def _loaded(
    request: VerifyRequest, root: Path, output: Output, *, is_quantised: bool
) -> Iterator[tuple[Any, tuple[str, ...]]]:
    """Yield the merged model, and the parameters for which it has no tensor. What is stored quantised is decoded here.

    Raises:
        LoraMergeError: transformers has no class for the model, or it cannot be read.
    """
    config: Mapping[str, Any] = output.config or {}
    weights = resolve_base(root).parameters() if is_quantised else {}
    has_codes = any(weight.plain is None for weight in weights.values())
    config = _without_quantisation(config) if has_codes else config
    loader = Loader(config, root, request.dtype, trust_remote_code=request.trust_remote_code)
    with loader.tensors(_decoded(weights)) if has_codes else loader.directory(root) as loaded:
        yield loaded


def _without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration that says nothing of quantised weights, at any level."""
    return patched_config(config, ConfigPatch(delete=plain_config(config)))


def _decoded(weights: Mapping[str, Weight]) -> dict[str, Deferred]:
    """Return everything that a checkpoint stores, to be read when it is needed: floating-point weights in float32."""
    return {
        name: Deferred(
            partial(values_of, weight) if weight.holds_floats else partial(load, weight.parts[WEIGHT])
        )
        for name, weight in weights.items()
        if weight.holds_floats or weight.dtype in TORCH_TYPES
    }


def _alone(model: Any, reference: Reference) -> Iterator[Comparison]:
    """Yield a comparison for each module that no prompt reaches."""
    modules = dict(model.named_modules())
    for one in reference.alone:
        module = modules.get(one.path)
        off, explained = (float("inf"), 0.0) if module is None else one.difference(module)
        yield Comparison("transformers", one.path, off, explained)


def _in_vllm(
    request: VerifyRequest, reference: Reference, output: Output, python: str
) -> tuple[Finding, list[Comparison]]:
    """Return the finding on the merged checkpoint in vLLM, and its comparisons of log-probabilities."""
    answers = [wanted for wanted in reference.answers if wanted.is_text and wanted.tokens]
    if not answers:
        sentence = "the model does not generate text, so vLLM cannot be compared"
        raise UnsupportedError([error("unsupported", output.root, sentence, "leave out --engine")])
    heard = ask_vllm(
        python,
        Path(output.root),
        tuple(wanted.prompt for wanted in answers),
        request.n_tokens,
        trust_remote_code=request.trust_remote_code,
    )
    name = f"vLLM {heard.version}".strip()
    if heard.refusal:
        issue = error(
            "forward", output.root, f"{name} cannot run the merged checkpoint ({heard.refusal})"[:600]
        )
        return Finding("vllm", name, (issue,)), []
    comparisons = [
        # A log-probability is a logit minus the log of a sum, so it differs by twice as much as a logit at
        # most.
        compare_logprobs(name, wanted, spoken.tokens, spoken.logprobs, 2 * reference.tolerance)
        for wanted, spoken in zip(answers, heard.answers, strict=True)
    ]
    largest = max(one.max_difference for one in comparisons)
    bound = f"|Δ log p| up to {largest:.2g}, at most {2 * reference.tolerance:.2g} expected from rounding"
    detail = f"{name}, {counted(len(answers), 'prompt')}: {bound}"
    return Finding("vllm", detail, tuple(_failures(comparisons))), comparisons


def _failures(comparisons: list[Comparison]) -> list[Issue]:
    return [
        error("forward", f"{one.engine}, {one.prompt}", one.sentence()) for one in comparisons if not one.ok
    ]


def _said_of(reference: Reference) -> Iterator[Issue]:
    """Yield notes about the reference: whether it is PEFT's, random numbers, modules that were not run."""
    if reference.how != PEFT:
        yield note("reference", "", f"compared with {reference.how}, because {reference.why}")
    if reference.draws:
        yield note("random", "", "the model uses random numbers; both runs had the same seed")
    if reference.silent:
        sentence = of_several(
            len(reference.silent),
            "no prompt uses it and it cannot be run separately; only its values were recomputed",
            "no prompt uses them and they cannot be run separately; only their values were recomputed",
        )
        yield note("not-asked", reference.silent[0], sentence)


def _ingredients(joined: Joined, plan: MergePlan, base_config: dict[str, Any]) -> Ingredients:
    """Return everything from which the reference is made."""
    uses = joined.uses
    changed = [step for step in plan.steps if step.action != "copied"]
    noises = [noise_of(step.op) for step in changed if isinstance(step.op, Merge)]
    weights = joined.base.parameters()
    has_codes = any(weight.plain is None for weight in weights.values())
    merged = _without_quantisation(patched_config(base_config, plan.config_patch))
    # A merge that resizes embeddings sets the size of the vocabulary at every level of the config.
    rows = {value for key, value in plan.config_patch.set.items() if key.endswith("vocab_size")}
    combined = any(isinstance(step.op, Merge) and step.op.combination for step in plan.steps)
    # Several adapters, weights and combinations have no single forward pass in PEFT.
    alone = len(uses) == 1 and uses[0].weight == 1 and not combined
    return Ingredients(
        base=Path(plan.base),
        base_config=_without_quantisation(base_config),
        merged_config=merged,
        adapter=uses[0].adapter if alone else None,
        base_is_residual=joined.reading.base_is == "residual",
        old_experts=any(
            use.adapter.stacked and _has_other_layout(joined, use.adapter.config) for use in uses
        ),
        n_rows=max(rows, default=None),
        touched=frozenset(step.name for step in changed),
        roundoff=max(noises, default=0.0),
        longest=max((max(step.shape, default=1) for step in changed), default=1),
        unrounded=lambda: dict(_unrounded(joined, plan)),
        decoded=partial(_decoded, weights) if has_codes else None,
    )


def _has_other_layout(joined: Joined, config: Any) -> bool:
    """Return True if the layout of stacked experts may differ from that of PEFT 0.19.1 and later."""
    version = peft_version(config)
    return bool(joined.reading.expert_layout) or version is None or version <= (0, 19, 0)


def _trained(plan: MergePlan) -> frozenset[int]:
    """Return the ids of tokens whose embeddings the adapter trained."""
    return frozenset(
        index
        for step in plan.steps
        if isinstance(step.op, Merge)
        for delta in step.op.deltas
        if isinstance(delta.facts, RowsFacts)
        for index in delta.facts.indices
    )


def _unrounded(joined: Joined, plan: MergePlan) -> Iterator[tuple[str, Deferred]]:
    """Yield every weight of the merged checkpoint; changed ones in float32, before rounding."""
    coded = {name: weight for name, weight in joined.outline.sources.items() if weight.plain is None}
    parts = {ref for weight in coded.values() for ref in weight.parts.values()}
    for step in plan.steps:
        # What is carried as it is stored is copied part by part.
        if isinstance(step.op, Copy) and step.op.source in parts:
            continue
        coded.pop(step.name, None)
        if isinstance(step.op, Merge):
            yield step.name, Deferred(partial(merged_in_float32, step))
        elif step.op.source.dtype in TORCH_TYPES:
            yield step.name, Deferred(partial(load, step.op.source))
    yield from _decoded(coded).items()
