"""The model card of an output, read back by huggingface_hub's own classes."""

from __future__ import annotations

import json
import shutil
import statistics
import time

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData, metadata_load

from lora_merge.formats.front_matter import CardFacts, card_issues, front_matter, parse_card

BASE = """\
---
language:
- en
- no
license: llama3.1
license_link: https://www.llama.com/llama3_1/license/
library_name: transformers
pipeline_tag: text-generation
tags:
- facebook
- llama-3
- license:llama3.1
extra_gated_prompt: "### LLAMA 3.1 COMMUNITY LICENSE AGREEMENT"
extra_gated_fields:
  First Name: text
  Job title:
    type: select
    options: [Student, Other]
model-index:
- name: base
  results: []
---

## Model Information
"""

ADAPTER = """\
---
base_model: org/base
library_name: peft
license: other
pipeline_tag: text-generation
datasets: org/conversations
language: de
tags:
- base_model:adapter:org/base
- llama-factory
- lora
- transformers
- 4-bit
---

# adapter
"""

LICENCES = {
    "LLaMA-Factory's placeholder says nothing": ("apache-2.0", "other", {"license": "apache-2.0"}),
    "the same twice": ("mit", "MIT", {"license": "mit"}),
    "the adapter's alone": ("", "cc-by-nc-4.0", {"license": "cc-by-nc-4.0"}),
    "two that differ": ("apache-2.0", "cc-by-nc-4.0", {}),
    "none": ("", "", {}),
}


def with_card(root, text, place):
    copy = shutil.copytree(root, place)
    (copy / "README.md").write_text(text)
    return copy


def stating(licence):
    return f"---\nlicense: {licence}\n---\n" if licence else "# no front matter\n"


@pytest.fixture
def merge(pico, pico_adapter, cli, tmp_path):
    """Return a function that merges a base and an adapter with given cards: what was said, and the output."""

    def run(base_card, adapter_card, *options):
        base = with_card(pico(), base_card, tmp_path / "base")
        adapter = with_card(pico_adapter(pico()), adapter_card, tmp_path / "adapter")
        result = cli("--base", base, "--adapter", adapter, "--out", tmp_path / "my-model", *options)
        return result, tmp_path / "my-model"

    return run


def test_the_front_matter_has_what_is_still_true_of_base_and_adapter(merge):
    result, out = merge(BASE, ADAPTER)

    assert result.exit_code == 0, result.output
    wanted = {
        "base_model": "base",
        "base_model_relation": "finetune",
        "adapters": ["adapter"],
        "license": "llama3.1",
        "license_link": "https://www.llama.com/llama3_1/license/",
        "language": ["en", "no", "de"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "datasets": ["org/conversations"],
        "tags": ["lora-merge", "merged", "facebook", "llama-3", "llama-factory", "transformers"],
    }
    assert metadata_load(out / "README.md") == wanted
    card = ModelCard.load(out / "README.md")
    assert card.data.to_dict() == wanted
    assert ModelCard(str(card)).content == card.content
    assert "no model card" not in result.output


def test_the_front_matter_is_the_text_that_huggingface_hub_writes():
    names = {
        "base_model": "org/Grüße: 日本",
        "base_model_relation": "finetune",
        "adapters": ["a #1", "no", "1.0"],
    }
    cards = [parse_card(BASE.replace("facebook", "émoji 👀")), parse_card(ADAPTER)]
    text = front_matter(names, *cards[:1], cards[1:], ["merged"])
    card = ModelCardData(**yaml.safe_load(text))
    assert text == card.to_yaml(line_break="\n", original_order=list(yaml.safe_load(text)))
    assert list(yaml.safe_load(text))[:3] == list(names)
    assert "👀" in text


def test_the_card_shows_how_the_model_is_loaded_and_served(merge):
    _, out = merge(BASE, ADAPTER)
    text = (out / "README.md").read_text()
    assert 'AutoModelForCausalLM.from_pretrained("my-model", dtype="auto")' in text
    assert "\nvllm serve my-model\n" in text


def test_the_card_repeats_what_was_measured(merge):
    _, out = merge(BASE, ADAPTER)
    tensors = json.loads((out / "merge_manifest.json").read_text())["tensors"].values()
    lost = [tensor["delta"]["lost_share"] for tensor in tensors if "delta" in tensor]
    text = " ".join((out / "README.md").read_text().split())
    assert f"{statistics.median(lost):.2g}" != "0"

    def share(value):
        return f"{value:.1%}" if value >= 0.01 else f"{100 * value:.2g}%"

    assert (
        f"stored as BF16. Rounding to that changes an adapter's delta by {share(statistics.median(lost))} of its size in "
        f"the median tensor, and by {share(max(lost))} at most"
    ) in text


@pytest.mark.parametrize("name", LICENCES)
def test_a_licence_is_carried_where_base_and_adapter_do_not_differ(name, merge):
    base, adapter, wanted = LICENCES[name]
    result, out = merge(stating(base), stating(adapter))

    assert result.exit_code == 0, result.output
    data = metadata_load(out / "README.md")
    assert {key: data[key] for key in ("license", "license_name") if key in data} == wanted
    differ = name == "two that differ"
    said = "the base says apache-2.0 and the adapter says cc-by-nc-4.0" in " ".join(result.output.split())
    assert said is differ
    assert ("The licences of base and adapter differ" in (out / "README.md").read_text()) is differ


def test_licences_that_differ_stop_a_strict_merge(merge):
    result, out = merge(stating("mit"), stating("cc-by-nc-4.0"), "--strict")
    assert result.exit_code == 4
    assert not out.exists()


HOSTILE = {
    "aliases that stand for much": "---\na: &a [x, x]\nb: &b [*a, *a]\n---\n",
    "no table": "---\n- a\n- b\n---\n",
    "deep nesting": "---\nx: " + "[" * 30_000 + "\n---\n",
    "no YAML": "---\nlicense: [mit\n: :\n---\n",
    "keys that are no texts": "---\n1: x\n? [a]\n: b\n---\n",
    "an argument of the class": "---\nself: 1\n---\n",
    "an object of Python": "---\nlicense: !!python/object/apply:os.system ['echo']\n---\n",
    "more than anyone writes": "---\nx: |\n" + "  y\n" * 40_000 + "---\n",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_front_matter_that_cannot_be_read_costs_a_note_and_never_the_merge(name):
    found = parse_card(HOSTILE[name])
    assert found.problem
    assert len(found.problem) < 300
    assert found.licence == ""
    (issue,) = card_issues(found, [CardFacts()])
    assert issue.severity == "note"
    assert str(issue).isprintable()


@pytest.mark.parametrize("opening", ["[", "{a: ", "- ", "? "])
def test_front_matter_that_is_nested_deeply_is_refused_at_the_limit(opening):
    began = time.process_time()
    found = parse_card(f"---\n{opening * (90_000 // len(opening))}\n---\n")

    assert "nested more than 64 deep" in found.problem
    assert time.process_time() - began < 5  # minutes, where the parser sees all of it


def test_a_merge_says_that_a_card_could_not_be_read(merge):
    result, out = merge(HOSTILE["no table"], ADAPTER)
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert (
        "README.md: that of the base has front matter that cannot be read: it is not a table of names" in said
    )
    assert metadata_load(out / "README.md")["datasets"] == ["org/conversations"]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("# prose\n---\nlicense: mit\n---\n", CardFacts()),
        ("", CardFacts()),
        ("---\n---\n# empty\n", CardFacts()),
        ("\ufeff---\r\nlicense: mit\r\n---\r\n".replace("\r\n", "\n"), CardFacts(license="mit")),
        (
            "---\nlicense: [mit, x]\nlanguage: [1, en]\n---",
            CardFacts(license="mit", language=("en",)),
        ),
        (f"---\nlicense: {'x' * 201}\n---\n", CardFacts()),
        ('---\nlicense: "a\\nb\\x1b[31m"\n---\n', CardFacts(license="a\\nb\\x1b[31m")),
    ],
)
def test_only_texts_of_a_front_matter_count(text, wanted):
    assert parse_card(text) == wanted


def test_an_adapter_in_the_cache_of_the_hub_has_the_name_of_its_repo(pico, pico_adapter, cli, tmp_path):
    snapshot = tmp_path / "hub" / "models--org--my-lora" / "snapshots" / ("0123456789" * 4)
    shutil.copytree(pico_adapter(pico()), snapshot)
    result = cli("--base", pico(), "--adapter", snapshot, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert metadata_load(tmp_path / "out" / "README.md")["adapters"] == ["org/my-lora"]
