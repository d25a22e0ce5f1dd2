"""Every error a user can meet, in one tree.

    LoraMergeError                everything a user can fix; has .hint
    ├── ResolveError              cannot find or read a base or adapter
    │   ├── CheckpointError       index, shard or header is broken (file, subject, got, wanted)
    │   │   └── ChangedError      an input changed while it was read
    │   └── UnknownFormatError    no adapter format matches (tried)
    ├── RequestError              a request file does not parse (file, line, key)
    │   └── PackageError          an optional package is missing, too old or broken
    ├── PlanError                 adapter and base do not fit (issues: all of them)
    │   ├── UnsupportedError      understood, not mergeable (issues: what, and what to do instead)
    │   ├── TargetError           a field of the adapter's configuration has an unusable value
    │   └── ConvertError          an adapter cannot be converted as requested (issues: all of them)
    ├── WriteError                output exists, disk full, rename failed
    │   ├── OutOfMemoryError      the machine has no memory left
    │   ├── AlreadyThereError     an object of a store exists already
    │   ├── ConflictError         something else writes to the same repo of the Hub
    │   └── UnansweredError       the Hub is busy
    │       └── UnreachedError    the Hub gives no answer at all
    ├── VerifyError               the output is not what the plan promised (verdict)
    └── BugError                  a bug in lora-merge that one job of a batch met (traceback)

Classes carry data; ``__str__`` builds the sentence: subject first, got before wanted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_merge.redaction import fit, without_secrets
from lora_merge.words import CAUSE, counted, cut, listing, told

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_merge.core.report import Issue, Verdict

_SHOWN_CHARACTERS = 200  # of the text of an error that is a bug
_LISTED = 12  # kinds of issue that are printed; the rest are counted (-v and --json have them all)


class LoraMergeError(Exception):
    """Base of every error that the user can fix.

    ``hint`` says what to do, and is empty if the sentence says it already. Both may be printed: access tokens are
    removed, and text from files or names cannot control a terminal or look like a separate line.

    Args:
        sentence: what went wrong.
        lines: further lines after it.
        hint: what to do about it.
    """

    def __init__(self, sentence: str, *lines: str, hint: str = "") -> None:
        super().__init__("\n".join(map(fit, (sentence, *lines))))
        self.hint = fit(hint)

    @property
    def without_hint(self) -> str:
        """The sentence and its further lines, without the line of the hint."""
        return str(self).removesuffix(f"\nhint: {self.hint}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the finished sentence and the attributes."""
        # A subclass's constructor takes other arguments than the sentence, so it cannot be called again.
        return _arrived, (type(self), self.args, dict(self.__dict__))


def _arrived(kind: type[LoraMergeError], args: tuple[object, ...], data: dict[str, Any]) -> LoraMergeError:
    """Return an error that was raised in another process, without calling its constructor."""
    error = kind.__new__(kind, *args)
    error.__dict__.update(data)
    return error


class ResolveError(LoraMergeError):
    """A base or an adapter cannot be found or read."""


class CheckpointError(ResolveError):
    """An index, a shard or a header is broken.

    Args:
        file: the file at fault, as the user would name it.
        subject: the tensor or field in it; empty for the file as a whole.
        got: what was found.
        wanted: what the format demands; empty if ``got`` says enough.
    """

    def __init__(self, file: str, subject: str, got: str, wanted: str = "", *, hint: str = "") -> None:
        self.file, self.subject, self.got, self.wanted = file, subject, got, wanted
        where = f"{file}: {subject}" if subject else file
        super().__init__(f"{where}: {got}, expected {wanted}" if wanted else f"{where}: {got}", hint=hint)


class ChangedError(CheckpointError):
    """An input changed after the merge was planned."""


class UnknownFormatError(ResolveError):
    """No known adapter format matches a directory.

    Args:
        root: the directory.
        found: file names that are there.
        tried: what each known format looks for.
        what: what the directory is instead, if that is known; the end of a sentence.
        hint: what to do then.
    """

    def __init__(
        self, root: str, found: Sequence[str], tried: Sequence[str], what: str = "", hint: str = ""
    ) -> None:
        self.root, self.found, self.tried = root, tuple(found), tuple(tried)
        there = listing(found, 8) if found else "nothing"
        sentence = what or f"not an adapter: found {there}, expected {' or '.join(tried)}"
        super().__init__(
            f"{root}: {sentence}",
            hint=hint or "pass the folder with adapter_config.json and the adapter's weights",
        )


class RequestError(LoraMergeError):
    """A request (a configuration file, or an option's value) does not parse.

    Args:
        file: the request file; empty when the value came from elsewhere.
        line: 1-based line of the key at fault; 0 when unknown.
        key: the key at fault.
        sentence: what is wrong with it.
    """

    def __init__(self, file: str, line: int, key: str, sentence: str, *, hint: str = "") -> None:
        self.file, self.line, self.key, self.sentence = file, line, key, without_secrets(sentence)
        where = f"{file}:{line}" if line else file
        super().__init__(": ".join(part for part in (where, key, sentence) if part), hint=hint)


class PackageError(RequestError):
    """An optional package is needed, and cannot be used here.

    Args:
        sentence: what needs it, and why it cannot be used.
        hint: how to install it.
    """

    def __init__(self, sentence: str, hint: str) -> None:
        super().__init__("", 0, "", sentence, hint=hint)


class PlanError(LoraMergeError):
    """Adapter and base do not fit; carries every issue found, not only the first."""

    verb = "the adapter cannot be merged"
    """The line before a list of several issues."""

    def __init__(self, issues: Sequence[Issue]) -> None:
        self.issues = tuple(issues)
        hint = self.issues[0].hint if len(self.issues) == 1 else ""
        super().__init__(*_issue_list(self.issues, self.verb), hint=hint)


class UnsupportedError(PlanError):
    """The adapter or base is understood, but cannot be merged (yet). Each issue says what to do instead."""


class ConvertError(PlanError):
    """An adapter cannot be converted as requested; carries every issue found, not only the first."""

    verb = "the adapter cannot be converted"


class WriteError(LoraMergeError):
    """The output cannot be written: it exists, the disk is full, a rename failed."""


class OutOfMemoryError(WriteError):
    """The machine, or the process's limit, has no memory left.

    Args:
        doing: what needed it: ``merging model.layers.0.mlp.up_proj.weight``.
        where: whose memory: ``"the machine"``, ``"the GPU"``.
        hint: what to do about it; empty: the hint for a merge.
    """

    def __init__(self, doing: str, where: str = "the machine", hint: str = "") -> None:
        hint = hint or "pass --memory-limit 2GB, or fewer --workers"
        super().__init__(f"{doing}: {where} has no memory left", hint=hint)


class VerifyError(LoraMergeError):
    """The output is not what the plan promised. It is not published under the output's name."""

    def __init__(self, verdict: Verdict) -> None:
        self.verdict = verdict
        # Values that are too large would be so in another run, too; their hints say what to do.
        is_input = all(issue.code == "non-finite" for issue in verdict.errors)
        hint = "no output was created"
        if not is_input:
            hint = f"run again, and report this if it happens again; {hint}"
        super().__init__(*_issue_list(verdict.errors, "the output failed verification"), hint=hint)


class BugError(LoraMergeError):
    """A bug in lora-merge. A batch reports it for one job and continues with the others.

    Args:
        kind: class name of the original error.
        text: its message; a long one is shortened.
        traceback: as Python prints it.
    """

    def __init__(self, kind: str, text: str, traceback: str) -> None:
        self.traceback = traceback
        shown = " ".join(text.split())
        shown = shown if len(shown) <= _SHOWN_CHARACTERS else f"{shown[:_SHOWN_CHARACTERS]}…"
        super().__init__(
            f"internal error in lora-merge: {kind}{f': {shown}' if shown else ''}",
            hint="report this bug, with the traceback that -v prints and --log-file writes",
        )


def _issue_list(issues: Sequence[Issue], verb: str) -> list[str]:
    """Return one issue as a sentence, or several as a numbered list in which similar ones are grouped."""
    if len(issues) == 1:
        return str(issues[0]).split("\n")
    groups, n_left = told(issues, _LISTED)
    lines = [f"{verb}: {len(issues)} problems"]
    # The cause comes first, unnumbered; the others follow from it.
    has_cause = groups[0].first.code == CAUSE
    if has_cause:
        lines = [
            *str(groups.pop(0)).split("\n"),
            f"  {counted(len(issues) - 1, 'problem')} {'follows' if len(issues) == 2 else 'follow'} from it:",
        ]
    for n, group in enumerate(groups, 1):
        first, *hints = str(group).split("\n")
        # What follows from the cause needs no cure.
        lines += [f"  {n}. {first}", *(f"     {hint}" for hint in hints if not has_cause)]
    left = cut(len(groups), len(groups) + n_left, "other kinds", "-v and --json list them all")
    return lines + ([f"  {left}"] if left else [])
