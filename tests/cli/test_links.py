"""`--link`: weight files that nothing changes may share their bytes with the base's."""

from __future__ import annotations

import errno
import os
import re
import shutil

import pytest

from lora_merge.cli import exits
from lora_merge.formats.side_files import MANIFEST_FILE
from lora_merge.storage.folder import Folder


@pytest.fixture
def inputs(pico, pico_adapter):
    """A base of several shards, and an adapter for one module of it."""
    base = pico(max_shard_size="40KB")
    return base, pico_adapter(base, target_modules=["model.layers.0.self_attn.q_proj"])


def merged(cli, inputs, out, *options):
    base, adapter = inputs
    result = cli("--base", base, "--adapter", adapter, "--out", out, *options)
    assert result.exit_code == 0, result.stderr
    return result


def shards(root):
    return {path.name: path for path in sorted(root.glob("*.safetensors"))}


def test_hard_links_are_second_names_of_the_bases_files_and_changed_files_are_new(cli, inputs, tmp_path):
    merged(cli, inputs, tmp_path / "linked", "--link", "hard", "--verify", "full")
    merged(cli, inputs, tmp_path / "copied", "--link", "copy")
    base, linked, copied = shards(inputs[0]), shards(tmp_path / "linked"), shards(tmp_path / "copied")
    assert len(base) > 2
    same = [name for name in base if linked[name].samefile(base[name])]
    changed = [name for name in base if linked[name].read_bytes() != base[name].read_bytes()]
    assert len(changed) == 1
    assert sorted(same + changed) == sorted(base)
    for name, path in copied.items():
        assert path.read_bytes() == linked[name].read_bytes()
        assert not path.samefile(base[name])
        assert path.stat().st_nlink == 1
    manifests = [(tmp_path / out / MANIFEST_FILE).read_text() for out in ("linked", "copied")]
    assert manifests[0] == manifests[1]


def test_the_base_is_as_it_was_after_its_linked_files_were_replaced(cli, inputs, tmp_path):
    before = {name: path.read_bytes() for name, path in shards(inputs[0]).items()}
    merged(cli, inputs, tmp_path / "out", "--link", "hard")
    merged(cli, inputs, tmp_path / "out", "--link", "copy", "--overwrite")
    assert {name: path.read_bytes() for name, path in shards(inputs[0]).items()} == before


def test_a_link_to_the_bases_file_is_followed(cli, inputs, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for path in inputs[0].iterdir():
        if path.suffix == ".safetensors":
            (base / path.name).symlink_to(path)
        else:
            shutil.copy(path, base)
    merged(cli, (base, inputs[1]), tmp_path / "out", "--link", "hard")
    linked = shards(tmp_path / "out")
    assert not any(path.is_symlink() for path in linked.values())
    assert sum(path.samefile(inputs[0] / name) for name, path in linked.items()) == len(linked) - 1


@pytest.mark.parametrize("how", ["hard", "reflink"])
def test_a_disk_that_cannot_link_copies_and_says_so_where_links_were_asked_for(
    how, cli, inputs, tmp_path, monkeypatch
):
    def refuse(source, target, how, *, dir_fd):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr("lora_merge.storage.folder.link", refuse)
    result = merged(cli, inputs, tmp_path / "out", "--link", how)
    n_copied = len(shards(inputs[0])) - 1
    assert f"note: {tmp_path}" in result.stderr
    assert (
        f"links are not supported here (Invalid cross-device link); copied {n_copied} file" in result.stderr
    )
    for name, path in shards(tmp_path / "out").items():
        assert path.stat().st_size == (inputs[0] / name).stat().st_size
    assert "links" not in merged(cli, inputs, tmp_path / "silent").stderr


def test_a_reflink_that_the_filesystem_does_not_know_leaves_no_file_behind(tmp_path, monkeypatch):
    import fcntl

    def refuse(*arguments):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    (tmp_path / "old").write_bytes(b"text")
    monkeypatch.setattr(fcntl, "ioctl", refuse)
    with pytest.raises(OSError, match="not supported"):
        Folder.of(tmp_path).link(tmp_path / "old", "new", "reflink")
    assert not (tmp_path / "new").exists()


def test_files_that_are_laid_out_anew_are_no_links(cli, inputs, tmp_path):
    merged(cli, inputs, tmp_path / "out", "--link", "hard", "--max-shard-size", "1GB")
    (path,) = shards(tmp_path / "out").values()
    assert path.stat().st_nlink == 1


def test_a_file_whose_header_is_other_text_is_no_link(cli, inputs, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(inputs[0], base)
    turned = {
        name: re.subn(rb'("dtype":"\w+"),("shape":[^]]*])', rb"\2,\1", path.read_bytes())
        for name, path in shards(base).items()
    }
    for name, (data, n_rows) in turned.items():
        assert n_rows >= 1
        (base / name).write_bytes(data)
    merged(cli, (base, inputs[1]), tmp_path / "out", "--link", "hard", "--verify", "full")
    assert all(path.stat().st_nlink == 1 for path in shards(tmp_path / "out").values())


def test_another_word_is_usage(cli):
    result = cli("--adapter", "x", "--out", "y", "--link", "soft")
    assert result.exit_code == exits.USAGE
    assert "'soft' is not a known way to link, expected copy, reflink or hard" in result.stderr
