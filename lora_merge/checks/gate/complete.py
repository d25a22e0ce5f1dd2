"""Does every parameter of the model have a tensor? vLLM and LMDeploy do not check, and serve random values."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.checks.gate.parts import grouped
from lora_merge.checks.gate.scheme import side_files
from lora_merge.core.checkpoint import CONFIG_FILE
from lora_merge.core.report import error, note
from lora_merge.errors import CheckpointError
from lora_merge.modeling.conversion import Conversion
from lora_merge.modeling.plain_config import fetched_part
from lora_merge.quantised import Surroundings, identify
from lora_merge.storage.reading import stream_of
from lora_merge.storage.sources import open_source

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lora_merge.core.report import Issue
    from lora_merge.core.tensor import TensorRef
    from lora_merge.formats.written_checkpoint import Output


def complete(output: Output) -> Iterator[Issue]:
    """Yield an issue for each parameter of transformers' model that the stored tensors do not fill.

    Models that transformers has no class for are passed over. Where a part of the model would have to be fetched, a
    note says so. Imports transformers, which takes seconds.
    """
    part = fetched_part(output.config or {})
    if part is not None:
        sentence = (
            f"{part}; nothing is fetched for it, so whether every parameter has a tensor was not looked at"
        )
        yield note("not-fetched", CONFIG_FILE, sentence)
        return
    conversion = Conversion.of(output.config or {})
    if conversion is None:
        return
    shapes = _shapes(output)
    if shapes is None:
        sentence = "weights are quantised in a way that is not known, so whether every parameter has a tensor was not looked at"
        yield note("not-identified", CONFIG_FILE, sentence)
        return
    for parameter, why in conversion.missing(shapes).items():
        sentence = f"the model has this parameter, and {why}"
        hint = "engines leave such a one at random without a word; fetch the base again, and merge again"
        yield error("missing-parameter", parameter, sentence, hint)


def _shapes(output: Output) -> dict[str, tuple[int, ...]] | None:
    """Return the shape of each stored parameter; of a quantised one the shape that the model has it in. None where some
    of them cannot be told.
    """
    tensors = output.tensors()
    codes = {module.codes.name for module in grouped(tensors).values() if module.codes is not None}
    if not codes:
        return {name: ref.shape for name, ref in tensors.items()}
    metadata = {key: value for file in output.files.values() for key, value in file.metadata.items()}
    around = Surroundings(output.config or {}, _content, side_files(output), metadata)
    try:
        found = identify(tensors.values(), around)
    except CheckpointError:
        return None
    others = {ref.name: ref.shape for ref in found.others}
    return (
        None if codes & others.keys() else {name: one.shape for name, one in found.weights.items()} | others
    )


def _content(ref: TensorRef) -> bytes:
    with open_source(ref.file) as source, stream_of(source) as stream:
        stream.seek(ref.start)
        return stream.read(ref.nbytes)
