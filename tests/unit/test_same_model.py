"""Whether two names are those of one model: pairs as adapters and bases really have them."""

from __future__ import annotations

import pytest

from lora_merge.storage.same_model import cached_repo, is_repo, same_model

SAME = [
    ("meta-llama/Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-8B"),
    ("meta-llama/Meta-Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
    ("/home/x/models/Llama-3-8B", "meta-llama/Meta-Llama-3-8B"),
    ("C:\\models\\Llama-3-8B", "meta-llama/Meta-Llama-3-8B"),
    ("/home/x/models/Llama-3-8B/", "./llama3-8b"),
    ("unsloth/llama-3-8b-bnb-4bit", "meta-llama/Meta-Llama-3-8B"),
    ("unsloth/Qwen2.5-7B-Instruct-unsloth-bnb-4bit", "Qwen/Qwen2.5-7B-Instruct"),
    ("mlx-community/Qwen3-8B-4bit", "Qwen/Qwen3-8B"),
    ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", "Qwen/Qwen2.5-7B-Instruct"),
    ("Qwen/Qwen3-8B-FP8", "Qwen/Qwen3-8B"),
    ("unsloth/gpt-oss-20b-BF16", "openai/gpt-oss-20b"),
    ("TheBloke/Llama-2-13B-fp16", "meta-llama/Llama-2-13b-hf"),
    ("huggyllama/llama-7b", "decapoda-research/llama-7b-hf"),
    ("LLM-Research/Meta-Llama-3-8B-Instruct", "meta-llama/Meta-Llama-3-8B-Instruct"),
    ("/root/.cache/modelscope/hub/models/Qwen/Qwen2___5-7B-Instruct", "Qwen/Qwen2.5-7B-Instruct"),
    ("/c/hub/models--Qwen--Qwen3-8B/snapshots/0a1b2c", "Qwen/Qwen3-8B"),
    ("/data/Llama-3-8B/hf", "meta-llama/Meta-Llama-3-8B"),
    ("openai-community/gpt2", "gpt2"),
    ("ms://Qwen/Qwen3-8B@master", "Qwen/Qwen3-8B"),
]
DIFFERENT = [
    ("meta-llama/Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-8B-Instruct"),
    ("google/gemma-2b", "google/gemma-2b-it"),
    ("google/gemma-3-4b-pt", "google/gemma-3-4b-it"),
    ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-chat-hf"),
    ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B-Base"),
    ("Qwen/Qwen2.5-7B", "Qwen/Qwen2-57B"),
    ("Qwen/Qwen2-7B", "Qwen/Qwen2.5-7B"),
    ("Qwen/Qwen2-7B-Instruct", "Qwen/Qwen2-VL-7B-Instruct"),
    ("meta-llama/Meta-Llama-3-8B", "meta-llama/Llama-3.1-8B"),
    ("mistralai/Mistral-7B-v0.1", "mistralai/Mistral-7B-v0.3"),
    ("deepseek-ai/DeepSeek-V3", "deepseek-ai/DeepSeek-V3-0324"),
    ("mistralai/Mistral-7B-v0.1", "HuggingFaceH4/zephyr-7b-beta"),
    ("acme/alpha", "acme/beta"),
    ("/data/Llama-3-8B-Instruct", "meta-llama/Meta-Llama-3-8B"),
    ("/data/sft-Llama-3-8B/checkpoint-500", "meta-llama/Meta-Llama-3-8B"),
    ("/c/hub/models--Qwen--Qwen3-8B-Base/snapshots/0a1b2c", "Qwen/Qwen3-8B"),
]
UNKNOWN = [
    ("./base", "meta-llama/Meta-Llama-3-8B"),
    ("/home/x/models/base", "Qwen/Qwen3-8B"),
    ("models/base", "Qwen/Qwen3-8B"),
    ("/out/checkpoint-500", "Qwen/Qwen3-8B"),
    ("llama3", "meta-llama/Meta-Llama-3-8B"),
    ("/data/my-sft", "Qwen/Qwen3-8B"),
    ("models/llama", "Qwen/Qwen3-8B"),
    ("unsloth/mistral-7b-bnb-4bit", "mistralai/Mistral-7B-v0.1"),
    ("", "Qwen/Qwen3-8B"),
    ("/0123456789abcdef0123456789abcdef01234567", "Qwen/Qwen3-8B"),
]


@pytest.mark.parametrize(
    ("one", "other", "answer"),
    [
        (*pair, answer)
        for pairs, answer in ((SAME, True), (DIFFERENT, False), (UNKNOWN, None))
        for pair in pairs
    ],
)
def test_names_are_compared_by_what_they_say_of_the_model(one, other, answer):
    assert same_model(one, other) is answer
    assert same_model(other, one) is answer


def test_a_place_in_the_cache_tells_repo_and_commit():
    assert cached_repo("/h/models--org--a-b/snapshots/abc/") == ("org/a-b", "abc")
    assert cached_repo("/h/models--gpt2") == ("gpt2", "")
    assert cached_repo("/h/org/name") is None


def test_a_path_is_no_repo():
    names = ("org/name", "./org/name", "~/org", "out/name", "a/b/c", "/a/b", "name")

    assert [is_repo(name) for name in names] == [True, *[False] * 6]
