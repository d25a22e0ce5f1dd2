"""A LoRA that is to be made and written, as a value: what a conversion and an extraction plan, and what is carried out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_merge.conversion import Draft
from lora_merge.conversion.lora import Recipe
from lora_merge.conversion.reading_back import OnBase
from lora_merge.core.adapter import Adapter
from lora_merge.core.checkpoint import ADAPTER_CONFIG, Checkpoint
from lora_merge.core.identity import Inputs
from lora_merge.core.report import Issue
from lora_merge.errors import ConvertError
from lora_merge.formats.repo_files import CONVERSION_MANIFEST

if TYPE_CHECKING:
    from collections.abc import Sequence


MARKS = (ADAPTER_CONFIG, CONVERSION_MANIFEST)
"""Files that show that a directory is an adapter."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """A LoRA to be made and written, wherever its modules come from."""

    source: str
    """What it is made of, as the user named it."""

    adapter: Adapter
    """Its configuration, side files and format; of an extraction, an empty one."""

    found: Draft
    recipe: Recipe
    base: Checkpoint | None
    """Where it is at hand."""

    on_base: OnBase | None
    """Where the output is read back on the base; None where it is not at hand."""

    out: Path
    serving: str | None
    """The engine that the output has to please."""

    overwrite: bool
    strict: bool
    inputs: tuple[Path, ...]
    read: Inputs
    """The files that planning read, and what it found in them."""

    provenance: Mapping[str, object]
    issues: tuple[Issue, ...]

    home: Path | None = None
    """A folder among the inputs that the output may be in: an adapter may hold other forms of itself."""

    def read_files(self) -> tuple[Path, ...]:
        """Return the directories and the weight files that it is made of."""
        names = {*self.adapter.files, *(ref.file for ref in (self.base.tensors() if self.base else ()))}
        return (*self.inputs, *map(Path, sorted(names)))


def raise_unconvertible(issues: Sequence[Issue]) -> None:
    """Raise the errors among some issues, if there are any.

    Raises:
        ConvertError: there are.
    """
    errors = [issue for issue in issues if issue.severity == "error"]
    if errors:
        raise ConvertError(errors)
