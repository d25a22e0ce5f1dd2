"""Run by a separate interpreter: commands of lora-merge, one after the other, where some packages cannot be imported.

Standard input has JSON: ``hidden`` (top packages that must not be importable) and ``commands`` (lists of arguments).
Standard output gets JSON: for each command its exit code and what it printed, the hidden packages that something tried
to import, and those that are loaded at the end.
"""

from __future__ import annotations

import json
import sys


class Hiding:
    """A finder that comes first and refuses some packages, as Python does for one that is not installed."""

    def __init__(self, hidden):
        self.hidden, self.asked = frozenset(hidden), set()

    def find_spec(self, name, path=None, target=None):
        del path, target
        if name.partition(".")[0] in self.hidden:
            self.asked.add(name)
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def main():
    job = json.load(sys.stdin)
    hiding = Hiding(job["hidden"])
    sys.meta_path.insert(0, hiding)
    from click.testing import CliRunner

    from lora_merge.cli import main as command

    runs = []
    for arguments in job["commands"]:
        result = CliRunner().invoke(command, arguments, prog_name="lora-merge")
        runs.append({"code": result.exit_code, "output": result.output, "asked": sorted(hiding.asked)})
        hiding.asked.clear()
    loaded = sorted({"accelerate", "peft", "transformers"} & set(sys.modules))
    json.dump({"runs": runs, "loaded": loaded}, sys.__stdout__)


if __name__ == "__main__":
    main()
