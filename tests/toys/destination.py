"""A destination: outputs are named ``shelf://NAME``, and get there file by file."""

from __future__ import annotations

from pathlib import Path

from lora_merge.storage.local_output import LocalDestination


class Shelf(LocalDestination):
    root_of_all = Path()

    @staticmethod
    def path(text):
        return str(Shelf.root_of_all / text.removeprefix("shelf://"))

    def finish_file(self, name):
        super().finish_file(name)
        with (Shelf.root_of_all / "arrived").open("a") as stream:
            stream.write(f"{name}\n")
