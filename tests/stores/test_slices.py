"""Slices of published models: really merged on a disk and from bucket to bucket, verified completely, the same bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.scripts.conftest import SCRIPTS
from tests.stores.conftest import BUCKET

assert SCRIPTS  # where the modules below are found

from benchmarks.buckets import Server  # noqa: E402
from benchmarks.measure import RunError  # noqa: E402
from hollows import slices  # noqa: E402
from hollows.models import MODELS  # noqa: E402

pytestmark = [pytest.mark.system, pytest.mark.loopback]

SMALL = {
    "DeepSeek-V3": replace(MODELS["DeepSeek-V3"].slice(), hidden=256, narrow=128, heads=2, vocab=512),
    "Kimi-K2-Thinking": replace(
        MODELS["Kimi-K2-Thinking"].slice(), hidden=256, narrow=128, heads=2, vocab=512
    ),
    "gpt-oss-120b": replace(MODELS["gpt-oss-120b"].slice(), hidden=256, heads=4, kv_heads=2, vocab=512),
}


@pytest.fixture
def server(moto, moto_endpoint):
    return Server(moto_endpoint, BUCKET, moto)


@pytest.mark.parametrize("name", SMALL)
def test_a_slice_is_merged_into_the_same_bytes_on_a_disk_and_in_a_store(name, server, tmp_path):
    rows = list(slices.rows(SMALL[name], tmp_path / "work", ("disk", "s3"), [("all", "base")], server))
    assert [(row["place"], row.get("level")) for row in rows] == [("disk", "full"), ("s3", None)]
    assert all(row["tensors"] > 20 and row["out_bytes"] == row["nbytes"] > 1_000_000 for row in rows)
    assert not (tmp_path / "work").exists()


def test_an_output_that_differs_is_an_error(server, tmp_path, monkeypatch):
    digests = slices.Bucket.digests
    monkeypatch.setattr(slices.Bucket, "digests", lambda self: digests(self) | {"config.json": "another"})
    with pytest.raises(RunError, match=r"the output in s3 differs: config\.json"):
        list(
            slices.rows(
                SMALL["DeepSeek-V3"],
                tmp_path / "work",
                ("disk", "s3"),
                [("attention", "base")],
                server=server,
            )
        )


def test_a_place_that_is_missing_is_named_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(slices, "unusable", lambda place: "not installed" if place == "ray" else "")
    rows = list(
        slices.rows(
            SMALL["gpt-oss-120b"], tmp_path / "work", ("disk", "ray"), [("attention", "base")], None, "sample"
        )
    )
    assert [row.get("skipped") for row in rows] == [None, "not installed"]
