"""An adapter's directory: what its own files say, and whole parameters in files beside them → `Adapter`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from lora_merge.adapters.swift_extra_states import saved_beside
from lora_merge.core.adapter import Adapter, Replacement
from lora_merge.core.report import Issue, error
from lora_merge.formats.repo_files import TRAINER_CONFIG
from lora_merge.formats.safetensors import same_values
from lora_merge.formats.side_files import adapter_side_files
from lora_merge.peft_rules.kinds import TRAINER_FIELDS
from lora_merge.storage.digests import files_digest

if TYPE_CHECKING:
    from pathlib import Path


def assemble(
    files: tuple[Path, ...],
    name: str,
    config: Mapping[str, Any],
    content: Mapping[str, Any],
    issues: list[Issue],
    ignored: Collection[str] = (),
) -> Adapter:
    """Return the adapter in a directory, with the whole parameters that were saved in files beside its own.

    Args:
        files: its own, one or more.
        name: of the format.
        config: PEFT's.
        content: fields of `Adapter`.
        issues: what was found wrong so far.
        ignored: files that the user wants left out.

    Raises:
        ResolveError: a file beside it is broken.
    """
    root = files[0].parent
    # ms-swift also saves plain PEFT adapters; its other file, or its fields, tell.
    by_swift = name == "ms-swift" or (root / TRAINER_CONFIG).is_file() or bool(config.keys() & TRAINER_FIELDS)
    saved = saved_beside(root, ignored)
    own = dict(content.get("replacements", {}))
    fields = {"deltas": (), "modules": frozenset()} | dict(content)
    # Where both hold a parameter, their values are equal, or an issue refuses the adapter.
    fields["replacements"] = own | saved.replacements
    return Adapter(
        root=str(root),
        format=name,
        config=config,
        digest=files_digest([*files, *saved.files]),
        side_files=adapter_side_files(root),
        issues=(*issues, *saved.issues, *_stored_twice(own, saved.replacements, files[0].name)),
        trainer="ms-swift" if by_swift else "",
        files=tuple(str(path) for path in (*files, *saved.files)),
        **fields,
    )


def _stored_twice(own: Mapping[str, Replacement], saved: Mapping[str, Replacement], name: str) -> list[Issue]:
    """Return an issue for each parameter with other values in a file beside the adapter's own."""
    # Trainers that save all trained parameters without ``lora_`` in their names save ``modules_to_save`` a second
    # time.
    return [
        error(
            "duplicate-tensor",
            own[parameter].ref.name,
            f"has different values in {name} and in a second file",
        )
        for parameter in saved.keys() & own.keys()
        if not same_values(own[parameter].ref, saved[parameter].ref)
    ]
