"""A planned conversion or extraction, as a value: everything that carrying it out needs."""

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
from lora_merge.errors import ConvertError, ResolveError
from lora_merge.formats.repo_files import CONVERSION_MANIFEST
from lora_merge.planning.locate import Place
from lora_merge.storage.objects.urls import is_store_url, path_here
from lora_merge.storage.user_paths import local_output_path

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


MARKS = (ADAPTER_CONFIG, CONVERSION_MANIFEST)
"""Files by which a directory is recognised as an adapter, which ``--overwrite`` may replace."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """A LoRA to be made and written, from an adapter or from two checkpoints."""

    source: str
    """The adapter or the tuned model, as the user named it."""

    adapter: Adapter
    """Gives the configuration, the side files and the format. An extraction has one without tensors."""

    found: Draft
    recipe: Recipe
    base: Checkpoint | None
    """None if the conversion needs no base and none was given."""

    on_base: OnBase | None
    """The base on which the output is read back; None without a base."""

    out: Path
    serving: str | None
    """The engine whose rules the output has to keep (``--for``)."""

    overwrite: bool
    strict: bool
    inputs: tuple[Path, ...]
    read: Inputs
    """The files that planning read, and what it found in them."""

    provenance: Mapping[str, object]
    issues: tuple[Issue, ...]

    home: Path | None = None
    """A folder among the inputs that the output may be in: an adapter may hold other forms of itself."""

    places: tuple[Place, ...] = ()
    """Where the inputs are: local copies of what is in a store are kept for as long as this."""

    def read_files(self) -> tuple[Path, ...]:
        """Return the input directories, and the weight files of adapter and base, as far as they are on this machine."""
        names = {*self.adapter.files, *(ref.file for ref in (self.base.tensors() if self.base else ()))}
        return (*self.inputs, *local_paths(sorted(names)))


def local_paths(texts: Iterable[str]) -> tuple[Path, ...]:
    """Return the paths on this machine that some texts mean."""
    return tuple(path for path in map(path_here, texts) if path is not None)


def adapter_out(text: str) -> Path:
    """Return the path of an adapter that is to be written.

    Raises:
        ResolveError: it cannot be a path, or is in a store.
    """
    if is_store_url(text):
        sentence = f"{text}: is in an object store, and adapters are written to local directories only"
        raise ResolveError(sentence, hint="write to a directory, and copy it to the store")
    return local_output_path(text)


def raise_unconvertible(issues: Sequence[Issue]) -> None:
    """Raise all errors among some issues at once; do nothing if there are none.

    Raises:
        ConvertError: there are errors.
    """
    errors = [issue for issue in issues if issue.severity == "error"]
    if errors:
        raise ConvertError(errors)
