"""``--copies``: what no delta touches stays in the store, and the output is what it would have been."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest

from lora_merge import api
from lora_merge.errors import ChangedError, RequestError
from lora_merge.storage.objects import StoreUrl, store_at
from lora_merge.words import size_text
from tests.conftest import write_tokenizer
from tests.stores.merging import Merge, bytes_of

s3_upload = pytest.importorskip("lora_merge.storage.objects.s3_upload", reason="needs boto3")
pytestmark = pytest.mark.loopback
MIB = 1 << 20


@pytest.fixture(scope="session")
def merge(tmp_path_factory):
    """Return a merge of a base with 40 MB of embeddings, which its adapter leaves alone."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("large")
    torch.manual_seed(3)
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=40_000, tie_word_embeddings=False))
    model.to(torch.bfloat16).save_pretrained(root / "base", max_shard_size="23MB")
    write_tokenizer(root / "base")
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2)
    adapted.save_pretrained(root / "adapter")
    return Merge(root / "base", root / "adapter", {})


@pytest.fixture(params=["s3_url", pytest.param("seaweed_url", marks=pytest.mark.slow)])
def url(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def base(merge, url, upload):
    found = StoreUrl(url.scheme, url.bucket, f"{url.prefix}-base")
    upload(merge.base, found)
    return found


@pytest.fixture
def moved(monkeypatch):
    """Count the bytes that are sent, and those that the store copies."""
    found = Counter()
    send, copy = s3_upload.CopyingUpload._send_part, s3_upload.CopyingUpload._copy_part

    def sent(self, number, content):
        found["sent"] += len(content)
        return send(self, number, content)

    def copied(self, number, url, version, start, nbytes):
        found["copied"] += nbytes
        return copy(self, number, url, version, start, nbytes)

    monkeypatch.setattr(s3_upload.CopyingUpload, "_send_part", sent)
    monkeypatch.setattr(s3_upload.CopyingUpload, "_copy_part", copied)
    return found


def merged(merge, base, url, **options):
    return api.merge(base=str(base), adapter=str(merge.adapter), out=str(url), **options)


def weights(url):
    return {name: data for name, data in bytes_of(store_at(url)).items() if name.endswith(".safetensors")}


@pytest.mark.parametrize("copies", ["auto", "store"])
def test_the_store_copies_what_no_delta_touches_and_the_bytes_are_the_same(copies, merge, base, url, moved):
    report = merged(merge, base, url, copies=copies)
    assert report.verdict.ok
    by_store = dict(moved)
    # Of each run up to 5 MiB are sent, together with what is before it.
    assert by_store["copied"] <= report.store_copied_bytes <= by_store["copied"] + 2 * 5 * MIB
    streamed = StoreUrl(url.scheme, url.bucket, f"{url.prefix}-streamed")
    merged(merge, base, streamed, copies="stream")
    assert weights(url) == weights(streamed)
    total = sum(map(len, weights(url).values()))
    assert by_store["copied"] > 10 * MIB
    assert by_store["copied"] + by_store.get("sent", 0) <= total
    assert moved["copied"] == by_store["copied"], "--copies stream copies nothing"


def test_the_manifest_says_which_digests_are_the_stores_and_verify_holds_the_files_to_them(
    merge, base, url, cli
):
    merged(merge, base, url, copies="store")
    manifest = json.loads(store_at(url).get("merge_manifest.json"))
    digests = {name: entry["digest"] for name, entry in manifest["tensors"].items()}
    assert digests["lm_head.weight"].startswith("crc64nvme:")
    assert digests["model.layers.0.self_attn.q_proj.weight"].startswith("xxh3_128:")
    done = cli("verify", url, "--base", base, "--adapter", merge.adapter)
    assert done.exit_code == 0, done.output

    name = manifest["tensors"]["lm_head.weight"]["file"]
    data = bytearray(store_at(url).get(name))
    data[len(data) // 2] ^= 1
    store_at(url).put(name, bytes(data))
    done = cli("verify", url)
    assert done.exit_code
    assert "has changed since it was written" in done.output


def test_the_command_says_how_much_the_store_copied(merge, base, url, cli):
    arguments = merge.arguments(url, base=base)
    part = cli(*arguments, "--part", "1/1")
    said = re.search(r"wrote .*, part 1 of 1 \(.*\), ([\d.]+ MB) of it copied by the store; in", part.stderr)
    assert said, part.stderr
    sealed = cli(*arguments, "--seal", "--json")
    assert size_text(json.loads(sealed.stdout)["store_copied_bytes"]) == said[1]
    streamed = cli(*arguments, "--overwrite", "--copies", "stream")
    assert streamed.exit_code == 0
    assert "copied by the store" not in streamed.stderr


def test_every_value_is_read_where_all_of_it_is_verified(merge, base, url):
    report = merged(merge, base, url, copies="store", verify="full")
    assert report.verdict.level == "full"
    assert report.verdict.ok


def test_a_base_that_changes_meanwhile_is_noticed(merge, base, url, monkeypatch):
    copy = s3_upload.CopyingUpload.copy

    def late(self, source, start, nbytes):
        name = source.rpartition("/")[2]
        store_at(base).put(name, bytes(reversed(store_at(base).get(name))))
        return copy(self, source, start, nbytes)

    monkeypatch.setattr(s3_upload.CopyingUpload, "copy", late)
    with pytest.raises(ChangedError):
        merged(merge, base, url, copies="store")
    assert not store_at(url).entries()


def test_a_store_that_cannot_copy_is_refused_by_name(merge, tmp_path):
    with pytest.raises(RequestError, match="cannot copy by itself, or states no checksums"):
        merged(merge, merge.base, f"file://{tmp_path}/out", copies="store")
    with pytest.raises(RequestError, match="cannot copy by itself"):
        merged(merge, merge.base, tmp_path / "out", copies="store")


def test_a_base_on_the_disk_is_sent(merge, url, moved):
    merged(merge, merge.base, url, copies="store")
    assert not moved["copied"]
