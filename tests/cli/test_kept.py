"""What a batch keeps is what it would make: whatever is damaged, missing, or of other inputs is found and said."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import yaml

from lora_merge.batches import up_to_date
from lora_merge.cli import exits
from lora_merge.storage.staging import staging_path
from tests.tampering import edit_json, edit_tensors

INDEX, MANIFEST, CARD = "model.safetensors.index.json", "merge_manifest.json", "README.md"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
"""Merged."""

GATE_PROJ = "model.layers.0.mlp.gate_proj.weight"
"""Copied."""


@pytest.fixture
def place(pico, pico_adapter, tmp_path, monkeypatch):
    """Copies of a base in shards and of an adapter, which may be changed."""
    base = pico("llama", "bfloat16", "60KB")
    shutil.copytree(base, tmp_path / "base")
    shutil.copytree(pico_adapter(base), tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def again(cli, place):
    """Return a function: options → the exit code, the only job of the report, and what was said beside it."""

    def run(*options, **job):
        job = {"base": "base", "adapter": "adapter", "out": "out", **job}
        job = {key: value for key, value in job.items() if value is not None}
        Path("batch.yaml").write_text(yaml.safe_dump({"jobs": [job]}))
        result = cli("batch", "batch.yaml", "--json", *options)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, json.loads(result.stdout)["jobs"][0], result.stderr

    assert run()[0] == exits.OK
    return run


def contents(root):
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def flip(path, at, *, n=1):
    """Change some bytes of a file."""
    data = bytearray(path.read_bytes())
    for k in range(n):
        data[at + k] ^= 0x10
    path.write_bytes(data)


def with_times_of_before(path, change):
    """Change a file, and put the time of its modification back, as an archive or ``cp -p`` does."""
    status = path.stat()
    change(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def zero(path, n=2000):
    data = path.read_bytes()
    path.write_bytes(data[:-n] + bytes(n))


def hole(path):
    """Lose the second half of a file, as a crash before it was flushed does."""
    nbytes = path.stat().st_size
    os.truncate(path, nbytes // 2)
    os.truncate(path, nbytes)


def shard_of(root, name):
    return root / json.loads((root / INDEX).read_text())["weight_map"][name]


def within(path, name):
    """Return where a tensor's bytes begin in a file, and end."""
    length = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + length])
    first, last = header[name]["data_offsets"]
    return 8 + length + first, 8 + length + last


def flip_in(root, name, *, put_back=True):
    """Change one byte in the middle of a tensor."""
    path = shard_of(root, name)
    first, last = within(path, name)
    change = lambda path: flip(path, (first + last) // 2)  # noqa: E731 - one of two ways to call it
    with_times_of_before(path, change) if put_back else change(path)


def first_shard(root):
    return min(root.glob("*.safetensors"))


def swapped(out):
    one, other = sorted(out.glob("*.safetensors"))[:2]
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


DAMAGE = {
    "config.json is gone": (lambda out: (out / "config.json").unlink(), "config.json: is missing"),
    "config.json is a folder": (
        lambda out: ((out / "config.json").unlink(), (out / "config.json").mkdir()),
        "config.json: is missing",
    ),
    "config.json was edited": (
        lambda out: edit_json(out / "config.json", rope_theta=5.0),
        "config.json: has changed since it was written",
    ),
    "the index is gone": (lambda out: (out / INDEX).unlink(), f"{INDEX}: is missing"),
    "the index is another one": (
        lambda out: (out / INDEX).write_text("{}"),
        f"{INDEX}: has changed since it was written",
    ),
    "the tokenizer is gone": (lambda out: (out / "tokenizer.json").unlink(), "tokenizer.json: is missing"),
    "the tokenizer is cut off": (
        lambda out: os.truncate(out / "tokenizer.json", 100),
        "tokenizer.json: has changed since it was written",
    ),
    "a template is gone": (
        lambda out: (out / "chat_template.jinja").unlink(),
        "chat_template.jinja: is missing",
    ),
    "the card is gone": (lambda out: (out / CARD).unlink(), f"{CARD}: is missing"),
    "the card is empty": (lambda out: (out / CARD).write_text(""), f"{CARD}: is damaged"),
    "the card is cut off": (lambda out: os.truncate(out / CARD, 100), f"{CARD}: is damaged"),
    "the card was never flushed": (lambda out: (out / CARD).write_bytes(bytes(900)), f"{CARD}: is damaged"),
    "the manifest is broken": (lambda out: (out / MANIFEST).write_text("{"), f"{MANIFEST}: is damaged"),
    "the manifest is another's": (
        lambda out: edit_json(out / MANIFEST, tensors={}),
        "would now give other tensors",
    ),
    "a shard is gone": (lambda out: first_shard(out).unlink(), "safetensors: is missing"),
    "a shard is a pipe": (
        lambda out: ((path := first_shard(out)).unlink(), os.mkfifo(path)),
        "safetensors: is missing",
    ),
    "a shard is cut off": (lambda out: os.truncate(first_shard(out), 1000), "has 1000 bytes, expected"),
    "a shard is longer": (
        lambda out: os.truncate(first_shard(out), first_shard(out).stat().st_size + 1),
        "bytes, expected",
    ),
    "a header is damaged": (
        lambda out: with_times_of_before(first_shard(out), lambda path: flip(path, 20)),
        "its header has changed since it was written",
    ),
    "two shards are swapped": (swapped, "bytes, expected"),
    "a shard ends in zeros": (lambda out: zero(first_shard(out)), "has changed since it was written"),
    "a shard ends in zeros, at the old time": (
        lambda out: with_times_of_before(first_shard(out), zero),
        "has changed since it was written",
    ),
    "a shard has a hole": (
        lambda out: with_times_of_before(first_shard(out), hole),
        "has changed since it was written",
    ),
    "a byte of a merged tensor": (
        lambda out: flip_in(out, Q_PROJ),
        f"{Q_PROJ} has changed since it was written",
    ),
    "a byte of a copied tensor": (
        lambda out: flip_in(out, GATE_PROJ),
        f"{GATE_PROJ} has changed since it was written",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_an_output_that_is_damaged_is_not_kept_and_is_replaced_only_when_that_is_said(what, again, place):
    out, (damage, words) = place / "out", DAMAGE[what]
    whole = contents(out)
    damage(out)
    damaged = contents(out)

    code, job, said = again()

    assert (code, job["state"]) == (exits.BATCH, "failed"), said
    assert words in job["message"]
    assert "already exists" in job["message"]
    assert "pass --overwrite to replace it" in job["hint"]
    assert contents(out) == damaged
    code, job, said = again("--overwrite")
    assert (code, job["state"]) == (exits.OK, "done"), said
    assert words in said
    assert "out of date, so it is made again" in said
    assert contents(out) == whole
    assert again()[1]["state"] == "kept"


CHANGES = {
    "a merged tensor of the base": (lambda place: flip_in(place / "base", Q_PROJ), "the base has changed"),
    "a copied tensor of the base": (lambda place: flip_in(place / "base", GATE_PROJ), "the base has changed"),
    "all of a shard of the base": (
        lambda place: with_times_of_before(
            first_shard(place / "base"),
            lambda path: edit_tensors(path, lambda found: [one.mul_(2) for one in found.values()]),
        ),
        "the base has changed",
    ),
    "the base's configuration": (
        lambda place: with_times_of_before(
            place / "base" / "config.json", lambda path: edit_json(path, rms_norm_eps=1e-3)
        ),
        "config.json: would have another content now",
    ),
    "the base's tokenizer": (
        lambda place: with_times_of_before(
            place / "base" / "tokenizer_config.json", lambda path: edit_json(path, padding_side="left")
        ),
        "tokenizer_config.json: would have another content now",
    ),
    "a tokenizer file of the base that is gone": (
        lambda place: (place / "base" / "chat_template.jinja").unlink(),
        "chat_template.jinja: is no longer part of the output",
    ),
    "the adapter's weights": (
        lambda place: with_times_of_before(
            place / "adapter" / "adapter_model.safetensors", lambda path: flip(path, path.stat().st_size - 9)
        ),
        "other adapters, or the adapters have changed",
    ),
    "the adapter's configuration": (
        lambda place: with_times_of_before(
            place / "adapter" / "adapter_config.json", lambda path: edit_json(path, lora_alpha=12)
        ),
        "other adapters, or the adapters have changed",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_an_output_of_inputs_that_were_changed_at_an_older_time_is_not_kept(what, again, place):
    change, words = CHANGES[what]
    change(place)

    code, job, said = again()

    assert (code, job["state"]) == (exits.BATCH, "failed"), said
    assert words in job["message"]
    code, job, said = again("--overwrite")
    assert (code, job["state"]) == (exits.OK, "done"), said
    assert again()[1]["state"] == "kept"


def copied_anew(root):
    """Have other files in the place of all that are there, of the same bytes and later times."""
    shutil.copytree(root, root.with_name("copy"), copy_function=shutil.copy)
    shutil.rmtree(root)
    root.with_name("copy").rename(root)


SAME = {
    "the base was written anew": lambda place: copied_anew(place / "base"),
    "the base has another mode": lambda place: [path.chmod(0o600) for path in (place / "base").iterdir()],
    "the base is of a time to come": lambda place: [
        os.utime(path, (4e9, 4e9)) for path in (place / "base").iterdir()
    ],
    "the adapter was written anew": lambda place: copied_anew(place / "adapter"),
    "the output was copied": lambda place: copied_anew(place / "out"),
    "the output has other times": lambda place: [
        os.utime(path, (1e9, 1e9)) for path in (place / "out").iterdir()
    ],
}


@pytest.mark.parametrize("what", SAME)
def test_what_has_other_times_and_the_same_bytes_is_kept_and_looked_at_once(what, again, place, monkeypatch):
    monkeypatch.setattr(up_to_date, "WORTH_A_NOTE_BYTES", 1)  # as of a large model
    SAME[what](place)
    before = contents(place / "out")
    times = [path.stat().st_mtime_ns for path in sorted((place / "out").iterdir())]
    assert again("--dry-run")[1]["state"] == "kept"
    assert [path.stat().st_mtime_ns for path in sorted((place / "out").iterdir())] == times
    with monkeypatch.context() as patch:
        patch.setattr(up_to_date, "WORTH_A_NOTE_BYTES", 1 << 60)
        assert again()[1]["state"] == "kept"
    assert [path.stat().st_mtime_ns for path in sorted((place / "out").iterdir())] == times

    code, job, said = again()

    assert (code, job["state"]) == (exits.OK, "kept"), said
    assert contents(place / "out") == before
    with monkeypatch.context() as patch:
        patch.setattr(up_to_date.executors, "pick", None)  # nothing is read as a whole again
        assert again()[1]["state"] == "kept"
    times = [path.stat().st_mtime_ns for path in sorted((place / "out").iterdir())]
    assert again()[1]["state"] == "kept"
    assert [path.stat().st_mtime_ns for path in sorted((place / "out").iterdir())] == times


@pytest.mark.parametrize("name", [Q_PROJ, GATE_PROJ])
def test_what_no_time_tells_is_found_by_pages_or_by_reading_all_of_it(name, again, place):
    later = time.time() + 1000
    path = shard_of(place / "out", name)
    first, last = within(path, name)
    flip(path, (first + last) // 2)
    os.utime(place / "out" / MANIFEST, (later, later))

    assert again()[1]["state"] == "kept"  # as an error of the disk would be
    code, job, _ = again(verify="full")
    assert (code, job["state"]) == (exits.BATCH, "failed")
    assert f"{name} has changed since it was written" in job["message"]

    data = bytearray(path.read_bytes())
    data[last - 5000 : last] = bytes(5000)
    path.write_bytes(data)
    code, job, _ = again()
    assert (code, job["state"]) == (exits.BATCH, "failed")
    assert f"{name} has changed since it was written" in job["message"]


def test_a_card_that_was_edited_and_files_of_the_user_are_left_as_they_are(again, place):
    out = place / "out"
    (out / CARD).write_text((out / CARD).read_text() + "\nEvaluated on my own data.\n")
    (out / "eval.json").write_text("{}")
    before = contents(out)

    code, job, said = again("--overwrite")

    assert (code, job["state"]) == (exits.OK, "kept")
    assert f"warning: out: {CARD}: was edited; the edited file is kept" in said
    assert contents(out) == before


@pytest.mark.parametrize("staged", [(), ("config.json", "model.safetensors"), ("model.safetensors",)])
def test_what_a_killed_run_left_beside_an_output_that_it_made_is_removed_but_not_what_another_began(
    staged, again, place
):
    left = staging_path(place / "out")
    (left / "output").mkdir(parents=True)
    (left / "journal.jsonl").write_text("{}\n[]\n")
    for name in staged:
        (left / "output" / name).write_text("{}")

    assert again("--dry-run")[1]["state"] == "kept"
    assert left.exists()
    assert again()[1]["state"] == "kept"

    assert left.exists() == (staged == ("model.safetensors",))


# ---------------------------------------------------------------------------- conversions


@pytest.fixture
def converted(again):
    """Return `again` for a conversion."""

    def run(*options):
        return again(*options, convert="adapter", adapter=None, rank=2, dtype="float32", out="small")

    assert run()[0] == exits.OK
    return run


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "conversion.json"])
@pytest.mark.parametrize("what", ["gone", "damaged", "cut off"])
def test_a_conversion_that_is_damaged_is_not_kept(what, name, converted, place):
    path = place / "small" / name
    whole = contents(place / "small")
    if what == "gone":
        path.unlink()
    elif what == "cut off":
        os.truncate(path, 10)
    else:
        with_times_of_before(path, lambda path: flip(path, path.stat().st_size // 2, n=3))

    code, job, said = converted()

    assert (code, job["state"]) == (exits.BATCH, "failed"), said
    assert name in job["message"] or "already exists" in job["message"]
    code, job, said = converted("--overwrite")
    assert (code, job["state"]) == (exits.OK, "done"), said
    assert contents(place / "small") == whole
    assert converted()[1]["state"] == "kept"


CONVERSION_CHANGES = {
    "the adapter's weights": lambda place: with_times_of_before(
        place / "adapter" / "adapter_model.safetensors", lambda path: flip(path, path.stat().st_size - 9)
    ),
    "its configuration": lambda place: with_times_of_before(
        place / "adapter" / "adapter_config.json", lambda path: edit_json(path, lora_alpha=12)
    ),
    "the base": lambda place: with_times_of_before(
        first_shard(place / "base"),
        lambda path: edit_tensors(path, lambda found: [one.mul_(2) for one in found.values()]),
    ),
    "the base's configuration": lambda place: with_times_of_before(
        place / "base" / "config.json", lambda path: edit_json(path, rms_norm_eps=1e-3)
    ),
}


@pytest.mark.parametrize("what", CONVERSION_CHANGES)
def test_a_conversion_of_inputs_that_were_changed_at_an_older_time_is_not_kept(what, converted, place):
    CONVERSION_CHANGES[what](place)

    code, job, said = converted()

    assert (code, job["state"]) == (exits.BATCH, "failed"), said
    assert "it was made from another" in job["message"]
