"""Where outputs go: one destination for each kind of storage, named by the scheme of the output's text.

Another kind is one module with a class, and one line in `DESTINATIONS`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.io.local_output import LocalDestination

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lora_merge.io.destination import Destination, Wish

DESTINATIONS: Mapping[str, Callable[[Wish], Destination]] = {"file": LocalDestination.open}
"""By the scheme of a URL; a path has ``file``."""


def open_destination(wish: Wish) -> Destination:
    """Take the place of an output.

    Raises:
        WriteError: another run or another user holds it, it cannot be made, or the output's name is taken.
    """
    scheme, colon, _ = str(wish.out).partition("://")
    return DESTINATIONS[scheme if colon and scheme in DESTINATIONS else "file"](wish)
