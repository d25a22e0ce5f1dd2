"""Names of strangers in a model card are names."""

from __future__ import annotations

import html.parser
import shutil

import pytest
import yaml

import lora_merge
from lora_merge.formats.markdown import code, name, scalar, strong

HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "[a](http://evil.example)",
    "![a](http://evil.example/a.png)",
    "http://evil.example",
    "www.evil.example",
    "a@evil.example",
    "a | b",
    "a`b``c",
    "`",
    "# title",
    "a\n---\nlicense: mit",
    "a: b",
    "- a",
    "*a*",
    "__a__",
    "~~a~~",
    "&lt;b&gt;",
    "\\",
    "\u202eevil",
    "\x1b[31m",
    "{base}",
    "$x$",
    "null",
    "1e3",
    "2001-01-01",
    "",
    " ",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_scalar_is_the_text_and_nothing_else(text):
    from lora_merge.words import printable

    line = f"key: {scalar(text)}"

    assert "\n" not in line
    assert yaml.safe_load(line) == {"key": printable(text)}


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("make", [code, name, strong])
def test_a_name_that_means_something_is_code(text, make):
    made = make(text)

    assert made.isprintable()
    if text not in {"null", "1e3", "2001-01-01"} or make is code:
        fence = made[: len(made) - len(made.lstrip("`"))]
        assert fence
        assert made.endswith(fence)
        assert fence not in made[len(fence) : -len(fence)]


@pytest.mark.parametrize("text", ["org/my-lora_v1.5", "out", "Llama 3 8B", "Größe", "a-b/c_d"])
def test_a_plain_name_stays(text):
    assert name(text) == text
    assert strong(text) == f"**{text}**"


class Tags(html.parser.HTMLParser):
    """The tags of a text; those in code are not read as such by Markdown."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append(tag)


def test_a_card_has_no_more_keys_tags_links_or_cells_for_the_names_in_it(pico, pico_adapter, tmp_path):
    import re

    bad = "a`|[b](http:evil)<img src=x>\n---\nlicense: mit #"
    base = shutil.copytree(pico(), tmp_path / f"base{bad}")
    adapter = shutil.copytree(pico_adapter(pico()), tmp_path / f"adapter{bad}")
    out = tmp_path / f"out{bad}"

    lora_merge.merge(base=base, adapter=adapter, out=out)

    card = (out / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front).keys() == {
        "base_model",
        "base_model_relation",
        "adapters",
        "library_name",
        "tags",
    }
    outside = re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "CODE", text)
    assert Tags(outside).found == []
    assert "](" not in outside
    rows = [line for line in outside.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {3}
    assert all(line.isprintable() for line in card.split("\n"))
