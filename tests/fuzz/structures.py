"""What is fuzzed by structure: bytes become values of every type, in the fields of files that are otherwise as they should be."""

from __future__ import annotations

import json
import struct
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

from lora_merge import adapters
from lora_merge.batches.batch_file import read_batch
from lora_merge.conversion import draft, needs_base
from lora_merge.conversion.lora import Recipe
from lora_merge.core.adapter import Adapter, AdapterUse
from lora_merge.core.checkpoint import Checkpoint, MergedBefore
from lora_merge.core.shards import header_bytes
from lora_merge.core.tensor import TensorRecord
from lora_merge.formats.manifest import merged_before, parse_manifest
from lora_merge.formats.model_card import card_text
from lora_merge.formats.provenance import Provenance, manifest_text
from lora_merge.modeling.skeleton import build_skeleton
from lora_merge.peft_rules.kinds import NATIVE
from lora_merge.peft_rules.loose_ends import without_base
from lora_merge.planning import Policy, Reading, join, make_plan
from lora_merge.planning.locate import find
from lora_merge.planning.resolve import resolve_base
from lora_merge.requests.request_file import read_request
from lora_merge.serving import ENGINES, report
from lora_merge.serving.family import BaseFamily
from lora_merge.serving.traits import traits_of
from lora_merge.storage.paths import missing_hint
from lora_merge.storage.small_files import parse_json, read_json, write_text
from lora_merge.storage.user_paths import output_path
from tests.faults.odd_values import (
    BASE_TENSORS,
    CONFIG,
    CONFIG_FIELDS,
    FIELDS,
    LORA,
    LORA_TENSORS,
    MLX,
    MLX_FIELDS,
    MLX_TENSORS,
    SWIFT,
    VALUES,
    make_adapter,
    make_base,
    with_field,
    write_tensors,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_merge.core.plan import MergePlan

_MOST_ITEMS = 6
_DEEPEST = 4


@cache
def place(name: str) -> Path:
    """Return a directory of its own, in memory where there is such a thing."""
    memory = Path("/dev/shm")
    return Path(mkdtemp(prefix=f"fuzz-{name}-", dir=memory if memory.is_dir() else None))


class Draw:
    """Values out of bytes, one after the other; when the bytes end, all is zero.

    Args:
        data: from the fuzzer.
    """

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    @property
    def is_over(self) -> bool:
        """Return True when no byte is left."""
        return self._at >= len(self._data)

    def byte(self) -> int:
        """Return the next byte."""
        self._at += 1
        return self._data[self._at - 1] if self._at <= len(self._data) else 0

    def bytes(self, n: int) -> bytes:
        """Return the next bytes, n at most."""
        self._at += n
        return self._data[self._at - n : self._at]

    def text(self) -> str:
        """Return a text; bytes that are no UTF-8 are halves of characters in it, as in the names of files."""
        return self.bytes(self.byte()).decode("utf-8", "surrogateescape")

    def one_of(self, known: Any) -> Any:
        """Return one of several."""
        return known[self.byte() % len(known)]

    def value(self, depth: int = 0) -> Any:
        """Return a value of any type that JSON has."""
        kind = self.byte() % 12
        if kind < 6 or depth > _DEEPEST:
            return VALUES[self.byte() % len(VALUES)]
        if kind == 6:
            return [self.value(depth + 1) for _ in range(self.byte() % _MOST_ITEMS)]
        if kind == 7:
            return {self.text(): self.value(depth + 1) for _ in range(self.byte() % _MOST_ITEMS)}
        if kind == 8:
            return int.from_bytes(self.bytes(self.byte() % 40), "little", signed=True)
        if kind == 9:
            return struct.unpack("<d", self.bytes(8).ljust(8, b"\0"))[0]
        return self.text()

    def table(self, known: Mapping[str, Any], fields: Any) -> dict[str, Any]:
        """Return a table with some of its fields changed."""
        table = dict(known)
        for _ in range(1 + self.byte() % 4):
            name, value = self.one_of(fields), self.value()
            try:
                table = with_field(table, name, value)
            except (AttributeError, TypeError, ValueError, IndexError):
                continue  # what it would be in is something else by now
        return table


@cache
def _base() -> Checkpoint:
    return resolve_base(make_base(place("planned-base")))


@cache
def _warm() -> None:
    """Import transformers now, which takes as long as ten thousand plans: some of what is drawn asks it."""
    build_skeleton(CONFIG)


def _plan(adapter: Adapter, base: Checkpoint, **options: Any) -> MergePlan:
    return make_plan(join(base, (AdapterUse(adapter, 1.0),), Reading()), Policy(**options))


def _read(name: str, tensors: Any, file: str, table: Mapping[str, Any]) -> Adapter:
    """Read an adapter; look at it, plan it and draft its conversion."""
    _warm()
    root = place(name)
    if not (root / file).exists():
        write_tensors(root / file, tensors)
    (root / "adapter_config.json").write_text(json.dumps(table))
    adapter = adapters.read(root)
    family = BaseFamily.of_adapter(adapter.config)
    traits = traits_of(adapter)
    for engine in ENGINES:
        report(engine, traits, "a", family=family)
    without_base(adapter)
    if not any(issue.severity == "error" for issue in adapter.issues):
        recipe = Recipe()
        if not needs_base(adapter, recipe):
            draft(adapter, recipe, None)
    if adapter.kind in NATIVE:  # PEFT plans the others
        _plan(adapter, _base())
    return adapter


def adapter_types(data: bytes) -> None:
    """Read a PEFT adapter with values of any type in its configuration."""
    _read("types", LORA_TENSORS, "adapter_model.safetensors", Draw(data).table(LORA, FIELDS))


def swift_types(data: bytes) -> None:
    """Read an adapter of ms-swift with values of any type in its configuration."""
    _read("swift", LORA_TENSORS, "adapter_model.safetensors", Draw(data).table(SWIFT, FIELDS))


def mlx_types(data: bytes) -> None:
    """Read an adapter of mlx-lm with values of any type in its configuration."""
    _read("mlx", MLX_TENSORS, "adapters.safetensors", Draw(data).table(MLX, MLX_FIELDS))


@cache
def _adapter() -> Adapter:
    return adapters.read(make_adapter(place("planned-adapter")))


def config_types(data: bytes) -> None:
    """Plan a merge into a base with values of any type in its configuration."""
    root = place("config-types")
    if not (root / "model.safetensors").exists():
        make_base(root)
    _warm()
    (root / "config.json").write_text(json.dumps(Draw(data).table(CONFIG, CONFIG_FIELDS)))
    _plan(_adapter(), resolve_base(root), dtype="float16")


def tensor_names(data: bytes) -> None:
    """Plan a merge into a base with other tensors beside its own, of any name and of many shapes; make their headers."""
    draw, root = Draw(data), place("names")
    more: dict[str, tuple[str, tuple[int, ...]]] = {}
    while not draw.is_over and len(more) < 20:
        shape = tuple(draw.byte() % 3 for _ in range(draw.byte() % 4))
        more[draw.text()] = (draw.one_of(("F32", "BF16", "I64", "U8", "F8_E4M3", "BOOL")), shape)
    if not (root / "config.json").exists():
        make_base(root)
    write_tensors(root / "model.safetensors", {**more, **BASE_TENSORS})
    plan = _plan(_adapter(), resolve_base(root), max_shard_size="1KB", dtype="float32")
    assert (
        parse_json(plan.index.encode("utf-8", "backslashreplace"))["weight_map"].keys() >= BASE_TENSORS.keys()
    )
    for file in plan.files:
        assert len(header_bytes(file)) == min((slot.start for slot in file.slots), default=file.nbytes)


def paths(data: bytes) -> None:
    """Find what a text names."""
    text = data.decode("utf-8", "surrogateescape")
    output_path(text)
    missing_hint(text, "adapter")
    find(text, "base")


def request_text(data: bytes) -> None:
    """Read a request file."""
    path = place("request") / "request.yaml"
    path.write_bytes(data)
    read_request(str(path), {})


def batch_text(data: bytes) -> None:
    """Read a batch file."""
    path = place("batch") / "batch.yaml"
    path.write_bytes(data)
    read_batch(str(path))


@cache
def _planned() -> MergePlan:
    return _plan(_adapter(), _base())


def manifest_written(data: bytes) -> None:
    """Write the manifest and the card of a merge of anything, and read the manifest again."""
    draw = Draw(data)
    config = draw.table(LORA, FIELDS)
    (place("written") / "config.json").write_text(json.dumps(config))
    config = read_json(place("written") / "config.json")  # as readers let it through
    adapter = Adapter(
        root="a", format="peft", config=config, deltas=(), modules=frozenset(), issues=(), digest="xxh3_128:0"
    )
    path = _path(draw)
    provenance = Provenance(
        base=_path(draw), adapters=(adapter,), adapter_paths=(path,), out_name=_path(draw), options={},
        versions={"lora-merge": "0"}, merged_before=(MergedBefore(_path(draw), "xxh3_128:1"),),
    )  # fmt: skip
    plan = _planned()
    records = [
        TensorRecord(slot.name, slot.file, slot.nbytes, "xxh3_128:2", finite=True)
        for step in plan.steps
        for slot in step.slots
    ]
    root = place("written")
    write_text(root / "README.md", card_text(provenance, plan, {}))
    write_text(root / "merge_manifest.json", manifest_text(provenance, plan, records, {}))
    card = (root / "README.md").read_bytes().decode("utf-8")
    assert card.count("\n---\n") == 1
    table = read_json(root / "merge_manifest.json")
    assert parse_manifest(table).adapters[0].path == path
    assert [one.digest for one in merged_before(table)] == ["xxh3_128:1", "xxh3_128:0"]
    assert repr(table["adapters"][0]["config"]) == repr(config)


def _path(draw: Draw) -> str:
    """Return a path as the system has them: any bytes but NUL."""
    return draw.bytes(draw.byte()).replace(b"\0", b"").decode("utf-8", "surrogateescape") or "x"


STRUCTURES = (
    adapter_types, swift_types, mlx_types, config_types, tensor_names, paths, request_text, batch_text, manifest_written,
)  # fmt: skip
