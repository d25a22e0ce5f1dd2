from __future__ import annotations

import pytest

from lora_merge.errors import RequestError
from lora_merge.storage.objects.urls import StoreUrl, parse_store_url


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("s3://models/llama", StoreUrl("s3", "models", "llama")),
        ("gs://models/a/b/", StoreUrl("gs", "models", "a/b")),
        ("az://container/a b", StoreUrl("az", "container", "a b")),
        ("file:///data/base/", StoreUrl("file", "", "data/base")),
        ("s3://my.bucket-1/ü", StoreUrl("s3", "my.bucket-1", "ü")),
    ],
)
def test_a_url_is_parsed_and_its_text_parses_to_the_same(text, url):
    assert parse_store_url(text) == url
    assert parse_store_url(str(url)) == url
    assert url.child("x.json") == f"{url!s}/x.json"


@pytest.mark.parametrize(
    "text", ["org/name", "hf://org/name", "/data/base", "./s3", "https://host/a", "s3:/a/b", ""]
)
def test_other_texts_are_none_of_a_store(text):
    assert parse_store_url(text) is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("s3://", "has no bucket"),
        ("s3:///a", "has no bucket"),
        ("s3://models", "names a whole bucket"),
        ("s3://models/", "names a whole bucket"),
        ("s3://bucket:9000/a", "bucket:9000 is not the name of a bucket, expected at least 3 letters"),
        ("s3://m/a", "m is not the name of a bucket, expected at least 3 letters"),
        ("s3://models/a/../b", "has .. in its path"),
        ("s3://models/./b", "has . in its path"),
        ("s3://models/a//b", "has an empty step in its path"),
        ("s3://models/a?versionId=3", "has a query"),
        ("s3://models/a#b", "has # in its path"),
        ("s3://models/a\nb", "cannot be printed"),
        ("file://host/a", "names the machine host"),
        ("file:///", "names no folder"),
    ],
)
def test_a_wrong_url_is_refused_in_one_sentence_with_a_hint(text, says):
    with pytest.raises(RequestError) as error:
        parse_store_url(text)
    assert says in str(error.value)
    assert error.value.hint
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("s3://models/a#b", "rename the folder"),
        ("s3://models/a?b", "folders with ? in their name are not read"),
        ("s3://host:9000/a", "name another server in the environment"),
    ],
)
def test_the_hint_is_about_what_is_wrong(text, hint):
    with pytest.raises(RequestError) as error:
        parse_store_url(text)
    assert hint in error.value.hint


@pytest.mark.parametrize(
    "text", ["s3://AKIA1:s3cr3ts3cr3t@models/a", "az://c/a?sig=s3cr3ts3cr3t&se=1", "s3://:s3cr3ts3cr3t@/"]
)
def test_a_secret_in_a_url_is_not_repeated(text):
    with pytest.raises(RequestError) as error:
        parse_store_url(text)
    assert "s3cr3t" not in f"{error.value}{error.value.hint}{error.value.__dict__}"
