"""Verifies an output on disk, years later too: from its manifest, and from base and adapter if they are available."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lora_merge.checks import CHECKS, Evidence
from lora_merge.checks.choosing import has_formula
from lora_merge.checks.evidence import Elsewhere
from lora_merge.checks.gate import RULES
from lora_merge.checks.placed import placed
from lora_merge.checks.reckoners import reckoners
from lora_merge.checks.recorded import recorded
from lora_merge.core.identity import Inputs
from lora_merge.core.plan import Copy, Merge, MergePlan
from lora_merge.core.report import Finding, Issue, Observer, Proof, Silence, error, warning
from lora_merge.core.tensor import Survival
from lora_merge.errors import CheckpointError, PlanError, RequestError, ResolveError
from lora_merge.executors.crew import Crew
from lora_merge.formats.manifest import Manifest, parse_manifest
from lora_merge.formats.side_files import MANIFEST_FILE
from lora_merge.merging.headline import Work, announce, merge_headline, model_words
from lora_merge.merging.unchanged_inputs import check_names
from lora_merge.merging.worker import TorchLoading, short_switch_interval
from lora_merge.native.library import library
from lora_merge.planning import Joined, Policy, Reading, make_plan
from lora_merge.planning.locate import Place
from lora_merge.planning.run import InputTexts, chosen_adapter, join_inputs
from lora_merge.requests.parsing import parse_values
from lora_merge.requests.request import Request, VerifyRequest
from lora_merge.runtime.clock import Clock
from lora_merge.runtime.machine import usable_cores
from lora_merge.runtime.shortage import MORE, translate_out_of_memory
from lora_merge.storage.hub import Access
from lora_merge.storage.input_files import watching
from lora_merge.storage.shown import by_url, errors_by_url
from lora_merge.storage.small_files import read_json
from lora_merge.storage.user_paths import is_directory, user_path
from lora_merge.verification.existing_output import Existing, find_output
from lora_merge.verification.looking import Digests, Seen, asks_torch, look
from lora_merge.verification.recorded_inputs import (
    check_asked,
    is_there,
    other_adapters,
    place_text,
    weighted,
)
from lora_merge.verification.records import Records
from lora_merge.verification.unrecorded import check_rounding, other_rounding, plan_as_stored
from lora_merge.words import counted

if TYPE_CHECKING:
    from lora_merge.core.comparison import Comparison
    from lora_merge.formats.written_checkpoint import Output

_READING, _POLICY = (
    tuple(field.name for field in fields(group) if not field.name.startswith("allow_"))
    for group in (Reading, Policy)
)
"""Options of a manifest that shape the output: those of `Reading`, and those of `Policy`."""


def prove(request: VerifyRequest, *, observer: Observer | None = None) -> Proof:
    """Return the findings of every check of an output.

    Raises:
        RequestError: the engine is not installed, or a comparison is requested with the level ``structure``.
        ResolveError: there is no such output, or a base or adapter that the request names cannot be read.
        PlanError: a base and adapter that the request names do not fit, or cannot be run.
    """
    _check_level(request)
    if request.engine:
        from lora_merge.verification.engines.vllm import find_python

        # Before anything takes time.
        find_python(request.engine_python)
    watch = observer or Silence()
    with translate_out_of_memory("verifying", MORE), errors_by_url():
        existing = find_output(request.out, Access(request.token, request.offline), watch)
        # All reads of an output in a store are of one version of each file.
        one_version = watching(is_noting=False) if existing.copy is not None else nullcontext()
        with one_version:
            return by_url(_Verification(request, watch, Clock(), existing).proof())


def _check_level(request: VerifyRequest) -> None:
    """Raise an error if a comparison is requested together with the level ``structure``."""
    compared = {
        "--base": request.base,
        "--adapter": request.adapter,
        "--rounding": request.rounding,
        "--forward": request.forward,
        "--engine": request.engine,
    }
    given = [option for option, value in compared.items() if value]
    if request.stream_base and not request.base:
        # Nothing is read from a hub because a manifest names it.
        sentence = "needs --base, which names the repo on the Hub"
        raise RequestError("", 0, "stream_base", sentence, hint="add --base ORG/NAME")
    if request.level == "structure" and given:
        sentence = f"is structure, which compares nothing, but {' and '.join(given)} asks for a comparison"
        raise RequestError("", 0, "level", sentence, hint=f"leave out --level structure, or {given[0]}")


@dataclass(frozen=True, slots=True)
class _Again:
    """The merge, planned a second time from the inputs that are available now."""

    joined: Joined
    plan: MergePlan
    placed: MergePlan
    """With the places of the output as it is."""

    misplaced: tuple[Issue, ...]
    policy: Policy
    inputs: Inputs

    places: tuple[Place, ...]
    """Where they are: local copies of what is in a store are kept for as long as this."""


@dataclass(slots=True)
class _Verification:
    """One verification: the request, the output and what the checks share."""

    request: VerifyRequest
    watch: Observer
    clock: Clock
    existing: Existing
    digest: Digests = field(default_factory=Digests)
    """Shared by all checks."""

    @property
    def output(self) -> Output:
        """What is verified."""
        return self.existing.output

    def proof(self) -> Proof:
        """Run all checks and return their findings."""
        headline = f"{self.request.out}: {model_words(self.output.config or {}, self.output.weights())}"
        announce(self.watch, Work(headline))
        if self.request.level == "structure":
            return Proof(self.output.root, "", (), (self._loadable(),), (), self.clock.seconds, headline)
        # What needs neither torch nor, for most of its time, the interpreter.
        with short_switch_interval():
            read = self._manifest()
            manifest = read if isinstance(read, Manifest) else None
            loading = TorchLoading() if self._will_need_torch(manifest) else None
            loadable = self._loadable()
            again, planned = self._planned(manifest)
            if loading is None and again is not None and asks_torch(again.plan.steps):
                loading = TorchLoading()
            with self.clock("recorded"), Crew(usable_cores()) as crew:
                self.watch.phase("comparing digests", 0)
                seen = self._seen(again, crew, loading)
                as_recorded = self._recorded(read, crew) if isinstance(read, Manifest) else read
        findings = [loadable, as_recorded, planned]
        comparisons: tuple[Comparison, ...] = ()
        if again is not None:
            findings += self._held_to(again, manifest, seen, loading)
        if self.request.forward or self.request.engine:
            forward, comparisons = self._forward(again, planned)
            findings += forward
        if again is not None:
            # The inputs may have changed while the checks ran.
            check_names(again.inputs)
        if manifest is None and again is None:
            findings += _nothing_compared(findings)
        base, adapters = ("", ()) if again is None else (again.plan.base, again.plan.adapters)
        if again is not None:
            headline = merge_headline(again.joined.base, again.joined.uses, again.plan)
        return Proof(
            self.output.root, base, adapters, tuple(findings), comparisons, self.clock.seconds, headline
        )

    def _forward(
        self, again: _Again | None, planned: Finding
    ) -> tuple[list[Finding], tuple[Comparison, ...]]:
        """Run the models, and return what came of it.

        Raises:
            ResolveError: there is nothing to compare with.
        """
        if again is None:
            raise ResolveError(
                f"{self.request.out}: forward passes need base and adapter, but {planned.detail}",
                hint="pass --base and --adapter",
            )
        from lora_merge.verification.forward_check import check_readable, compare_forward

        check_readable(self.existing.label, again.plan, self.output)
        with self.clock("forward"):
            self.watch.phase("running the models", 0)
            return compare_forward(self.request, again.joined, again.plan, self.output)

    def _loadable(self) -> Finding:
        """Return the gate's finding: can engines load it? Here it also checks every parameter of the model."""
        with self.clock("loadable"):
            self.watch.phase("checking files", 0)
            issues = tuple(issue for rule in RULES.values() for issue in rule(self.output))
        return Finding(
            "loadable",
            f"{counted(len(self.output.tensors()), 'tensor')} in {counted(len(self.output.files), 'file')}",
            issues,
        )

    def _manifest(self) -> Manifest | Finding:
        """Return the manifest, or a finding that says why there is none."""
        path = Path(self.output.root, MANIFEST_FILE)
        if MANIFEST_FILE not in self.output.names:
            issue = warning("no-manifest", MANIFEST_FILE, "is missing, so it is unknown what the merge wrote")
            return Finding("recorded", f"there is no {MANIFEST_FILE}", (issue,), asked=False)
        try:
            manifest = parse_manifest(read_json(path))
        except (CheckpointError, ValueError) as exc:
            text = str(exc) if isinstance(exc, CheckpointError) else f"is not a known manifest ({exc})"
            issue = error("broken-manifest", MANIFEST_FILE, text)
            return Finding("recorded", "the manifest cannot be read", (issue,))
        check_rounding(self.request.rounding, manifest)
        return manifest

    def _recorded(self, manifest: Manifest, crew: Crew) -> Finding:
        """Return the finding on whether the output is as recorded."""
        issues = tuple(recorded(self.output, manifest, self.digest, crew))
        n_tensors, n_files = len(manifest.tensors), len(manifest.side_files)
        detail = f"{counted(n_tensors, 'tensor')} and {counted(n_files, 'other file')}, by their digests"
        return Finding("recorded", detail, issues)

    def _will_need_torch(self, manifest: Manifest | None) -> bool:
        """Return whether torch is surely needed: not all matrices are plain bfloat16, and none has kept its scales."""
        if manifest is not None and manifest.options.get("out_storage") == "base":
            return False
        dtypes = {ref.dtype for ref in self.output.tensors().values() if len(ref.shape) > 1}
        return library() is None or dtypes != {"BF16"}

    def _seen(self, again: _Again | None, crew: Crew, loading: TorchLoading | None) -> Mapping[str, Seen]:
        """Return what one reading of base and output tells, of the tensors for which it is enough."""
        if again is None or self.request.level == "full":
            return {}
        with watching(again.inputs, is_noting=False):
            seen = look(
                again.placed.steps, self.output, crew, lambda: loading is not None and loading.is_ready
            )
        for one in seen.values():
            self.digest.take(one)
        return seen

    def _planned(self, manifest: Manifest | None) -> tuple[_Again | None, Finding]:
        """Plan the merge again from the available base and adapter; return it with the finding.

        Raises:
            ResolveError: a base or adapter that the request names cannot be read.
            PlanError: those that the request names do not fit.
        """
        named = bool(self.request.base or self.request.adapter)
        if manifest is None and not self.request.adapter:
            return None, Finding("planned", "there is neither a manifest nor an --adapter", asked=False)
        is_offline = self.request.offline
        try:
            texts, reading, policy = self._asked_again(manifest)
            is_offline = texts.access.offline
            with self.clock("plan"):
                found = join_inputs(texts, reading, self.watch)
                plan = make_plan(found.joined, policy)
                if manifest is None:
                    plan, policy = plan_as_stored(found.joined, plan, policy, self.output)
        except RequestError as exc:
            # The user's own options were parsed before, so the manifest is at fault.
            issue = error("broken-manifest", MANIFEST_FILE, f"describes a merge that is not possible ({exc})")
            return None, Finding("planned", "the merge cannot be planned again from the manifest", (issue,))
        except ResolveError as exc:
            if named:
                if is_offline and not self.request.offline:
                    exc.add_note(
                        "pass --base and --adapter: repos that only the manifest names are not downloaded"
                    )
                raise
            # Inputs that the manifest alone names may be gone by now. That is not a fault of the output.
            hint = "pass --base and --adapter to recompute what was merged"
            issue = warning("not-recomputed", "", f"the deltas were not recomputed: {exc}", hint)
            return None, Finding("planned", f"{exc}", (issue,), asked=False)
        except PlanError as exc:
            if named:
                raise
            return None, Finding("planned", "base and adapter no longer fit", tuple(exc.issues))
        issues = tuple(other_adapters(manifest, found.joined.uses, named=bool(self.request.adapter)))
        n_merged = sum(isinstance(step.op, Merge) for step in plan.steps)
        finding = Finding(
            "planned", f"{counted(n_merged, 'merged tensor')}, planned again from base and adapter", issues
        )
        places = (found.base, *found.adapters)
        here, misplaced = placed(plan, self.output)
        return _Again(found.joined, plan, here, tuple(misplaced), policy, found.inputs, places), finding

    def _asked_again(self, manifest: Manifest | None) -> tuple[InputTexts, Reading, Policy]:
        """Return how the merge was made, by its manifest, with the inputs of this request in place of recorded ones.

        Permissions (``allow_untie`` …) are not recorded. All are granted here: the merge was made, so it had them.
        """
        recorded_options = manifest.options if manifest is not None else {"rounding": self.request.rounding}
        options = {name: recorded_options[name] for name in (*_READING, *_POLICY) if name in recorded_options}
        near = Path(self.output.root).parent
        base, adapters = self.request.base, self.request.adapter
        offline = self.request.offline
        if manifest is not None:
            recorded = [] if base else [manifest.base]
            recorded += [] if adapters else manifest.adapters
            check_asked(recorded)
            # A stranger may have written the manifest, so nothing that it names is fetched from a hub.
            offline = offline or not all(is_directory(user_path(place_text(one, near))) for one in recorded)
            base = base or place_text(manifest.base, near)
            adapters = adapters or tuple(
                weighted(place_text(one, near), one.weight) for one in manifest.adapters
            )
        noted = recorded_options.get("ignore_file", ())
        ignored = self.request.ignore_file or tuple(
            name
            for name in parse_values(Request, {"ignore_file": noted})["ignore_file"] or ()
            if is_there(name, adapters)
        )
        given = {
            "adapter": adapters,
            "base": base,
            **options,
            "token": self.request.token,
            "ignore_file": ignored,
        }
        parsed = parse_values(Request, {name: value for name, value in given.items() if value is not None})
        texts = InputTexts(
            tuple(map(chosen_adapter, parsed["adapter"])),
            parsed.get("base"),
            parsed["ignore_file"],
            Access(parsed.get("token"), offline, self.request.stream_base),
        )
        read = {name: parsed[name] for name in _READING if name in parsed}
        decided = {name: parsed[name] for name in _POLICY if name in parsed}
        return (
            texts,
            Reading(**read, allow_svd=True),
            Policy(**decided, allow_untie=True, allow_again=True),
        )

    def _held_to(
        self, again: _Again, manifest: Manifest | None, seen: Mapping[str, Seen], loading: TorchLoading | None
    ) -> list[Finding]:
        """Return the findings of the checks that a merge runs on its own output, with the base's bytes as evidence."""
        with self.clock("load"):
            if loading is not None:
                self.watch.phase("loading torch", 0)
                loading.wait()
        # Nothing that is read here may be of another version than what was planned.
        with (
            self.clock("recomputed"),
            reckoners(usable_cores(), has_torch=loading is not None) as crew,
            watching(again.inputs, is_noting=False),
        ):
            plan, issues = again.placed, again.misplaced
            self.watch.phase("recomputing", 0)
            level: Literal["sample", "full"] = "full" if self.request.level == "full" else "sample"
            kept = manifest.survival if manifest is not None else dict[str, Survival]().get
            found_again = Records(self.output, self.digest, kept, is_projecting=level != "full", seen=seen)
            records = tuple(crew.each(found_again.of, plan.steps))
            where = Elsewhere(self.output.elsewhere, self.existing.stored)
            evidence = Evidence(plan, Path(self.output.root), records, level, {}, self.digest, where, crew)
            n_copied = sum(isinstance(step.op, Copy) for step in plan.steps)
            n_formulas = sum(isinstance(step.op, Merge) and has_formula(step.op) for step in plan.steps)
            n_seen = evidence.n_projected
            rows = f"part of {counted(n_seen, 'row')} by projection, " if n_seen else ""
            how = "all rows in float64" if level == "full" else f"{rows}some rows in float64"
            n_layers = len(plan.steps) - n_copied - n_formulas
            details = {
                "untouched": f"{counted(n_copied, 'tensor')}, byte for byte equal to base or adapter",
                "finite": counted(len(plan.steps) - n_copied, "merged tensor"),
                "recompute": f"{counted(n_formulas, 'merged tensor')}, {how}",
            } | ({"layers": f"{counted(n_layers, 'tensor')} of PEFT's own layers"} if n_layers else {})
            found = [Finding("placed", f"{counted(len(plan.steps), 'tensor')} of the plan", issues)]
            for name, detail in details.items():
                # At the full level this check needs digests of merged tensors, which are not recorded here.
                asked = replace(evidence, level="sample") if name == "untouched" else evidence
                wrong = tuple(CHECKS[name](asked))
                if name == "recompute" and manifest is None:
                    wrong = (*other_rounding(again.joined, again.policy, evidence, wrong), *wrong)
                found.append(Finding(name, detail, wrong))
        return found


def _nothing_compared(findings: list[Finding]) -> list[Finding]:
    """Return the finding that the output was compared with nothing; none if another check failed already."""
    if any(found.state == "failed" for found in findings):
        return []
    sentence = "only the structure of the output was checked: nothing says which values its weights must have"
    hint = "pass --base and --adapter, or --level structure if the structure is enough"
    issue = error("nothing-compared", "", sentence, hint)
    return [Finding("compared", "there is neither a manifest nor a base and an adapter", (issue,))]
