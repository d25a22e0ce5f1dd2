"""Values as Python, YAML and the command line hand them over: a plain meaning, or a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

import lora_merge
from lora_merge.errors import RequestError
from lora_merge.requests.inputs import adapter_texts
from lora_merge.requests.parsing import parse_values
from lora_merge.requests.request import Request
from lora_merge.requests.sizes import parse_size
from lora_merge.requests.table import OPTIONS


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        ("a", ("a",)),
        (Path("a/b"), ("a/b",)),
        (["a", Path("b")], ("a", "b")),
        ({"a": 0.5, Path("b"): 2}, ("a:0.5", "b:2")),
        ([("a", 0.5), {"b": -1}, "c:0.25"], ("a:0.5", "b:-1", "c:0.25")),
        ({"org/name@v1": 1e-05}, ("org/name@v1:1e-05",)),
    ],
)
def test_adapters_are_paths_and_weights_in_any_form_that_has_one_meaning(value, texts):
    assert adapter_texts(value) == texts
    assert parse_values(Request, {"adapter": value}) == {"adapter": texts}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({}, "names no adapter"),
        ({"a": "0.5"}, "'a' has the weight '0.5', expected a number"),
        ({"a": True}, "'a' has the weight True"),
        ({"a": None}, "'a' has the weight None"),
        ({"a": 0}, "'a:0' has the weight 0, so it would change nothing"),
        ({"a": float("nan")}, "has the weight nan"),
        ({3: 0.5}, "3 is not an adapter"),
        (("a", 0.5), "0.5 is not an adapter; write a weight together with its path: {'PATH': 0.5}"),
        (0.5, "0.5 is not an adapter"),
        (b"a", "b'a' is not an adapter"),
        ([["a"]], "a list is not an adapter"),
        ("a:0.0", "'a:0.0' has the weight 0"),
        ("a:-inf", "'a:-inf' has the weight -inf"),
    ],
)
def test_what_names_no_adapter_or_a_weight_without_meaning_is_refused(value, words):
    with pytest.raises(RequestError) as caught:
        parse_values(Request, {"adapter": value})

    assert words in str(caught.value)


def test_a_weight_in_a_table_is_the_weight_of_the_merge(pico, pico_adapter):
    base = pico()
    adapter = pico_adapter(base)

    plain, table, pair = (
        lora_merge.plan(base=base, adapter=value)
        for value in (f"{adapter}:0.5", {adapter: 0.5}, [(adapter, 0.5)])
    )

    assert plain.weights == (0.5,)
    assert table == plain
    assert pair == plain


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: lora_merge.merge(adapter="a", out=None), "out: is None, expected a path"),
        (lambda: lora_merge.merge(adapter="a", out=""), "out: is empty"),
        (lambda: lora_merge.merge(adapter="a", out=b"o"), "out: is b'o'"),
        (lambda: lora_merge.merge(adapter="a", out="o", base=5), "base: is 5, expected a path"),
        (lambda: lora_merge.merge(adapter="a", out="o", base=""), "base: is empty"),
        (lambda: lora_merge.merge(adapter="a", out="o", overwrite="no"), "overwrite: is 'no', expected true"),
        (lambda: lora_merge.merge(adapter="a", out="o", strict=1), "strict: is 1, expected true or false"),
        (lambda: lora_merge.merge(adapter=None, out="o"), "adapter: is None"),
        (lambda: lora_merge.plan(adapter="a", workers=0.5), "workers"),
        (lambda: lora_merge.convert("a", None), "out: is None"),
        (lambda: lora_merge.convert({"a": 1}, "o"), "adapter: is a table, expected a path"),
        (lambda: lora_merge.convert("a", "o", rank=2.0), "2.0 is not a rank"),
        (lambda: lora_merge.convert("a", "o", rank=10**9), "expected a whole number from 1 to 65536"),
        (lambda: lora_merge.extract(None, "t", "o", rank=4), "base: is None"),
        (lambda: lora_merge.extract("b", "", "o", rank=4), "tuned: is empty"),
        (lambda: lora_merge.inspect(""), "adapter: is empty"),
        (lambda: lora_merge.verify(None), "out: is None"),
    ],
)  # fmt: skip
def test_arguments_of_python_are_not_turned_into_texts_unseen(call, words):
    with pytest.raises((RequestError, TypeError)) as caught:
        call()

    assert words in str(caught.value)


@pytest.mark.parametrize("text", [5, "5", 2, "2048", 999_999, "0.5", 5.5])
def test_a_small_number_without_a_unit_is_no_size(text):
    with pytest.raises(ValueError, match="has no unit"):
        parse_size(text)


@pytest.mark.parametrize("text", ["9" * 400 + "GB", "-5GB", "0GB", "nan", "1e9", "5 5GB", True, "5,5GB"])
def test_what_is_no_size_is_a_sentence(text):
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


def test_sizes_with_a_unit_and_large_numbers_of_bytes_are_what_they_say():
    texts = ("5GB", "5 gb", "1KiB", "100B", "2.5M", 1_000_000, "2000000000")

    assert [parse_size(text) for text in texts] == [5e9, 5e9, 1024, 100, 2.5e6, 1e6, 2e9]


def parser_of(name):
    """Return the parser that the table has for an option."""
    return next(option.kind.parse for option in OPTIONS if option.name == name)


@pytest.mark.parametrize("key", ["workers", "rank", "pad_rank", "n_tokens", "seed"])
@pytest.mark.parametrize("value", ["-1", "1.5", "9" * 5000, True, "many", ""])
def test_what_is_no_whole_number_in_range_is_a_sentence(key, value):
    with pytest.raises(ValueError, match="expected a whole number from"):
        parser_of(key)(value)
