"""The evidence of a finished file: what its storage said of it, and the records of its tensors. Small JSON files."""

from __future__ import annotations

import contextlib
import json
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

from lora_merge.core.tensor import TensorRecord
from lora_merge.storage.journal import record_of
from lora_merge.storage.objects.store import Receipt

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lora_merge.storage.objects.store import Entry


@dataclass(frozen=True, slots=True)
class Finished:
    """A file that is whole: what the storage said of it, and the evidence of its tensors."""

    file: str
    receipt: Receipt
    records: tuple[TensorRecord, ...]

    def is_there(self, entries: Mapping[str, Entry]) -> bool:
        """Return True when the storage still has this version of the file."""
        entry = entries.get(self.file)
        return entry is not None and (entry.nbytes, entry.version) == (
            self.receipt.nbytes,
            self.receipt.version,
        )


def evidence_text(merge: str, receipt: Receipt, records: Sequence[TensorRecord]) -> bytes:
    """Return the evidence of a file as it is stored.

    Args:
        merge: the fingerprint of the run.
        receipt: what the storage said of the file.
        records: of its tensors.
    """
    table = {
        "merge": merge,
        "nbytes": receipt.nbytes,
        "version": receipt.version,
        "checksum": receipt.checksum,
        "records": list(map(astuple, records)),
    }
    return json.dumps(table).encode()


def evidence_of(file: str, content: bytes, merge: str) -> Finished | None:
    """Return the evidence of a file; None where it is of another merge, or broken."""
    with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
        table: dict[str, Any] = json.loads(content)
        if table["merge"] == merge:
            records = tuple(map(record_of, table["records"]))
            if all(record is not None for record in records):
                receipt = Receipt(int(table["nbytes"]), str(table["version"]), str(table["checksum"]))
                return Finished(file, receipt, tuple(one for one in records if one is not None))
    return None
