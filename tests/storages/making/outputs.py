"""What llm-compressor and transformers make of a dense checkpoint, and what they read in a configuration. Runs in the oracles'
environment.

``python -m tests.storages.making.outputs SCHEME=DENSE=OURS=THEIRS…`` writes each of the last, and prints a JSON line: the
last → what its configuration and ours mean to the library.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.storages.making import encoders
from tests.storages.making.quantisers import RECIPES

UNREAD = ("version", "quantization_status", "global_compression_ratio", "ignore")
"""Of compressed-tensors: what is no setting; and names, which the other has as patterns."""


def make(scheme: str, dense: Path, out: Path) -> None:
    """Write the library's output."""
    if scheme == "fp8":
        encoders.fp8(dense, out)
    else:
        encoders.compressed_tensors(dense, out, **RECIPES[scheme])


def meaning(root: Path) -> Any:
    """Return what the library reads in a checkpoint's configuration, with all of its defaults."""
    settings = json.loads((root / "config.json").read_text())["quantization_config"]
    if settings["quant_method"] == "fp8":
        from transformers import FineGrainedFP8Config

        return FineGrainedFP8Config.from_dict(settings).to_dict()
    from compressed_tensors.quantization import QuantizationConfig

    found = QuantizationConfig.model_validate(settings).model_dump(mode="json")
    for group in found["config_groups"].values():
        for part in ("weights", "input_activations"):
            # How a scale was found, which means nothing to what reads it.
            (group[part] or {}).pop("observer", None)
    return {key: value for key, value in found.items() if key not in UNREAD}


def main(*texts: str) -> None:
    found = {}
    for text in texts:
        scheme, dense, ours, theirs = text.split("=")
        make(scheme, Path(dense), Path(theirs))
        found[theirs] = [meaning(Path(theirs)), meaning(Path(ours))]
    print("\n" + json.dumps(found))  # noqa: T201 - libraries print as well; this is the last line


if __name__ == "__main__":
    main(*sys.argv[1:])
