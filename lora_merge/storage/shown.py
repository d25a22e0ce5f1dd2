"""Values with paths of local copies → the same values with the URLs of what was copied: temporary paths mean nothing to others."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

from lora_merge.errors import LoraMergeError
from lora_merge.storage.local_copies import homes
from lora_merge.storage.objects.urls import is_store_url

if TYPE_CHECKING:
    from collections.abc import Iterator

T = TypeVar("T")

_FETCHED = re.compile(r"\bdownload\b(?! it and)")
"""What a hint says of an incomplete directory. Of a store it is whoever filled it who can complete it."""


def by_url(value: T) -> T:
    """Return a value with URLs in place of the paths of local copies, in every text that it has."""
    known = homes()
    return cast("T", _renamed(value, known)) if known else value


@contextlib.contextmanager
def errors_by_url() -> Iterator[None]:
    """Let errors of the block name URLs in place of the paths of local copies.

    Raises:
        LoraMergeError: the same as in the block.
    """
    try:
        yield
    except LoraMergeError as exc:
        exc.args = by_url(exc.args)
        for name, attribute in exc.__dict__.items():
            setattr(exc, name, by_url(attribute))
        if is_store_url(str(exc)):
            exc.hint = _FETCHED.sub("upload", exc.hint)
        raise


def _renamed(value: Any, known: Mapping[str, str]) -> Any:
    match value:
        case str():
            for home, url in known.items():
                value = value.replace(home, url)
            return value
        case tuple() | list() | frozenset() | set() if type(value) in {tuple, list, frozenset, set}:
            return type(value)(_renamed(item, known) for item in value)
        case Mapping():
            return {_renamed(key, known): _renamed(item, known) for key, item in value.items()}
    if not is_dataclass(value) or isinstance(value, type):
        return value
    # Only what differs is replaced: most parts of an adapter hold no path.
    old = {field.name: getattr(value, field.name) for field in fields(value) if field.init}
    new = {name: _renamed(part, known) for name, part in old.items()}
    return replace(value, **new) if new != old else value
