"""Outputs that tasks on a cluster make: the bytes of one worker."""

from __future__ import annotations

from typing import Any, NamedTuple
from uuid import uuid4

import pytest

import lora_merge
from lora_merge.storage.objects import parse_store_url, store_at
from tests.parity import building
from tests.parity.kinds import KINDS
from tests.storages import dense
from tests.stores.conftest import BUCKET
from tests.stores.merging import bytes_of

pytestmark = pytest.mark.loopback


class Row(NamedTuple):
    """A base with adapters, and options of the merge."""

    base: str
    options: dict[str, Any] = {}  # noqa: RUF012 - never written
    adapter: str = "LoRA"


REQUANTISED = {"out_storage": "base", "allow_loss": True}
ROWS = {
    "dense": Row("llama"),
    "tied embeddings": Row("llama_tied", {}, "LoRA on a tied embedding"),
    "transposed": Row("gpt2"),
    "experts": Row("qwen3_moe", {}, "LoRA on stacked experts (target_parameters), one parameter"),
    "DoRA": Row("llama", {}, "DoRA on an embedding"),
    "several adapters": Row("llama", {"combine": "ties", "density": 0.5}, "two"),
    "FP8 to FP8": Row("fp8-block", {**REQUANTISED, "rounding": "adapter"}),
    "INT4": Row("ct-int4-asymmetric", {**REQUANTISED, "rounding": "stochastic"}),
    "MXFP4": Row("gptoss-mxfp4", REQUANTISED),
    "NVFP4": Row("ct-nvfp4", REQUANTISED),
    "made NVFP4": Row("tall", {"quantize": "nvfp4"}),
    "of another dtype": Row("llama", {"dtype": "float32"}),
}


@pytest.fixture(scope="module")
def inputs(case, tmp_path_factory):
    """Return a function: row → base and adapters."""
    root = tmp_path_factory.mktemp("inputs")
    kinds = {kind.name: kind for kind in KINDS}

    def find(row):
        if row.base == "tall":
            base = dense.build(root / "tall", **dense.TALL)
            return base, (dense.lora(base, root / "tall-lora"),)
        if row.base not in building.MODELS:
            found = case(row.base)
            return found.base, (found.adapter,)
        names = ("LoRA", "LoRA on an untied output embedding") if row.adapter == "two" else (row.adapter,)
        found = [building.case(root, kinds[name], row.base, "bfloat16") for name in names]
        return found[0].base, tuple(one.adapter for one in found)

    return find


def merged(inputs, row, out, **more):
    base, adapters = inputs(row)
    return lora_merge.merge(
        base=base,
        adapter=adapters,
        out=out,
        **{"max_shard_size": "60KB", "strict": False, **row.options, **more},
    )


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_tasks_write_what_one_worker_writes(inputs, row, connected, tmp_path):
    merged(inputs, row, tmp_path / "one" / "out", executor="serial")
    report = merged(inputs, row, tmp_path / "many" / "out", executor="ray", ray_address=connected)
    assert report.verdict.ok
    assert dense.content(tmp_path / "many" / "out") == dense.content(tmp_path / "one" / "out")
    assert [path.name for path in (tmp_path / "many").iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["dense", "FP8 to FP8", "experts"])
def test_tasks_write_the_same_into_a_store(inputs, name, connected, moto, tmp_path):
    row, folder = ROWS[name], uuid4().hex
    merged(inputs, row, tmp_path / folder, executor="serial")
    url = f"s3://{BUCKET}/{folder}"
    assert merged(inputs, row, url, executor="ray", ray_address=connected, verify="full").verdict.ok
    assert bytes_of(store_at(parse_store_url(url))) == {
        path.relative_to(tmp_path / folder).as_posix(): path.read_bytes()
        for path in (tmp_path / folder).rglob("*")
        if path.is_file()
    }


def test_inputs_that_are_in_a_store_are_read_there_by_each_node(inputs, connected, moto, tmp_path):
    row, folder = ROWS["several adapters"], uuid4().hex
    base, adapters = inputs(row)
    urls = []
    for n, root in enumerate((base, *adapters)):
        urls.append(f"s3://{BUCKET}/{folder}/{n}")
        for path in root.iterdir():
            store_at(parse_store_url(urls[-1])).put(path.name, path.read_bytes())
    made = {}
    for name, more in {"one": {}, "many": {"executor": "ray", "ray_address": connected}}.items():
        out = f"s3://{BUCKET}/{folder}/{name}/out"
        lora_merge.merge(
            base=urls[0], adapter=urls[1:], out=out, max_shard_size="60KB", **row.options, **more
        )
        made[name] = bytes_of(store_at(parse_store_url(out)))
    assert made["many"] == made["one"]
    assert len([name for name in made["one"] if name.endswith(".safetensors")]) > 1
