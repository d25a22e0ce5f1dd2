"""The table of options: every row keeps its promises, and one more row is all that an option needs."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
from dataclasses import MISSING, fields
from itertools import groupby
from pathlib import Path
from typing import get_args

import pytest

from lora_merge import api
from lora_merge.cli import main as app
from lora_merge.conversion.writers import ADAPTER_WRITERS
from lora_merge.errors import RequestError
from lora_merge.requests import choices, keywords
from lora_merge.requests.option import Option
from lora_merge.requests.parsing import REQUESTS, parse_keywords, parse_request
from lora_merge.requests.recording import record_of, recorded_options
from lora_merge.requests.request import ConvertRequest, Request
from lora_merge.requests.table import OPTIONS, default_of, fields_of, options_of

ROOT = Path(__file__).parents[2]
VERBS_IN_PYTHON = ("merge", "plan", "verify", "inspect", "convert", "extract")
EVERY_ROW = pytest.mark.parametrize("option", OPTIONS, ids=lambda row: f"{row.name}-{'-'.join(row.verbs)}")


@EVERY_ROW
def test_a_default_is_what_parsing_it_gives(option):
    if option.scope == "request" and option.default not in (None, ()) and not option.is_required:
        assert option.kind.parse is not None, option.name
        assert option.kind.parse(option.default) == option.default


@EVERY_ROW
def test_the_choices_that_the_command_completes_are_those_that_parse(option):
    words = option.kind.choices or (option.kind.names() if option.kind.is_completed else ())
    for word in words:
        assert option.kind.parse(word) in {word, (word,)}
    if words:
        with pytest.raises(ValueError, match="expected"):
            option.kind.parse("anything else")


@EVERY_ROW
def test_a_note_of_a_default_says_the_default(option):
    told = option.note.removeprefix("default: ")
    if told != option.note and option.default not in (None, ()):
        assert told.split(",")[0] == str(option.default)


@pytest.mark.parametrize("verb", app.commands)
def test_a_commands_options_are_the_rows_of_the_table_in_their_order(verb):
    shown = [parameter.name for parameter in app.commands[verb].params if parameter.name != "help"]

    assert shown == [option.name for option in options_of(verb)]


@pytest.mark.parametrize("verb", REQUESTS)
def test_rows_of_one_field_say_one_type_and_one_default(verb):
    rows = sorted((row for row in options_of(verb) if row.scope == "request"), key=lambda row: row.name)
    for name, same in groupby(rows, key=lambda row: row.name):
        assert len({(row.kind.type, str(row.default)) for row in same}) == 1, name


@pytest.mark.parametrize("verb", REQUESTS)
def test_a_request_has_the_fields_of_the_table(verb):
    rows = fields_of(verb)
    found = fields(REQUESTS[verb])

    assert [field.name for field in found] == [row.name for row in rows]
    for field, row in zip(found, rows, strict=True):
        assert field.default == (MISSING if row.is_required else row.default), field.name
        assert field.repr == (not row.is_secret), field.name


@pytest.mark.parametrize("verb", VERBS_IN_PYTHON)
def test_a_function_takes_the_keywords_of_the_table(verb):
    explicit = inspect.signature(getattr(api, verb)).parameters.keys() - {"options", "observer"}
    options = getattr(keywords, f"{verb.capitalize()}Options").__annotations__.keys()
    rows = {row.python_name: row for row in fields_of(verb) if row.in_python}

    assert not explicit & options
    assert explicit | options == rows.keys()
    assert all(rows[name].is_required for name in explicit)
    assert len(explicit) < 12


def test_every_choice_is_the_type_of_an_option_or_of_something_in_one():
    types = {word for row in OPTIONS for word in row.kind.type.split(" | ")}
    names = {name for name in vars(choices) if name[0].isupper()} - {"Literal"}

    assert names - types == {"ExpertLayout"}  # of a list, whose words the table completes


def test_every_format_that_can_be_named_has_a_writer():
    assert tuple(ADAPTER_WRITERS) == get_args(choices.AdapterFormat)


def test_an_unknown_keyword_is_an_error_of_the_call():
    with pytest.raises(TypeError, match=r"plan\(\) got an unexpected keyword argument 'workers'"):
        parse_keywords(Request, "plan", {"adapter": "a", "workers": 2}, {"out": ""})


def test_none_stands_for_the_default_of_every_field():
    nothing = dict.fromkeys((row.name for row in fields_of("merge")), None)

    assert parse_request(Request, {**nothing, "adapter": "a", "out": "o"}) == Request(("a",), "o")


def test_a_place_that_is_needed_is_asked_for_by_its_name():
    with pytest.raises(RequestError, match="out: is None, expected a path"):
        parse_request(ConvertRequest, {"adapter": "a"})


@pytest.mark.parametrize("verb", ["merge", "convert"])
def test_what_another_option_has_to_bring_is_recorded_with_one_that_is_recorded(verb):
    names = [row.name for row in recorded_options(verb)]
    for row in recorded_options(verb):
        assert set(row.recorded_with) <= set(names), row.name


def test_a_manifest_names_the_options_that_shape_the_output_in_one_order():
    plain = record_of(Request(("a",), "o", density=0.25, seed=7, workers=3, strict=True, allow_svd=True))
    combined = record_of(Request(("a", "b"), "o", combine="ties", expert_layout=("unsloth",)))

    at_random = record_of(Request(("a",), "o", rounding="stochastic", seed=7))
    quantised = record_of(Request(("a",), "o", quantize="fp8", ignore=("*.o_proj",)))

    assert list(at_random.items())[4:] == [("seed", 7), ("rounding", "stochastic")]
    assert list(quantised.items())[4:] == [("quantize", "fp8"), ("ignore", ["*.o_proj"])]
    assert list(plain) == ["dtype", "max_shard_size", "device", "base_is"]
    assert list(combined) == [*plain, "expert_layout", "combine", "density", "seed"]
    assert combined["expert_layout"] == ["unsloth"]
    assert combined["density"] == default_of("merge", "density")


def test_a_conversion_records_what_was_given_and_shapes_it():
    request = ConvertRequest("a", "o", base="b", format="gguf", serving="llamacpp", rank=8, overwrite=True)

    assert list(record_of(request).items()) == [("format", "gguf"), ("serving", "llamacpp"), ("rank", 8)]


def test_an_option_is_frozen_and_says_what_it_is_called_everywhere():
    serving = next(row for row in OPTIONS if row.name == "serving" and "convert" in row.verbs)

    assert (serving.flag, serving.key, serving.python_name) == ("--for", "for", "engine")
    with pytest.raises(AttributeError):
        serving.help = "another"
    assert isinstance(serving, Option)


TOY = """\
    Option("toy", _MERGES, kinds.SEED, "Plays with this.", "default: 0", default=0, recorded="given"),
"""

GENERATE = """\
import docs, request_types
for name, text in (("request", request_types.request_module()), ("keywords", request_types.keywords_module())):
    (request_types.FOLDER / f"{name}.py").write_text(text)
print(docs.cli_page())
"""

USE = """\
import json, sys
from pathlib import Path
from click.testing import CliRunner
from lora_merge.cli import main
import lora_merge

base, adapter, place = sys.argv[1:4]
found = {"home": lora_merge.__file__}

def command(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return f"{result.exit_code} {result.stdout}{result.stderr}"

def python(**keywords):
    try:
        return lora_merge.merge(base=base, adapter=adapter, out=f"{place}/out", **keywords).out
    except lora_merge.LoraMergeError as exc:
        return str(exc)

def file(name, text):
    Path(place, name).write_text(text)
    return Path(place, name)

found["help"] = command("merge", "--help")
found["wrong on the command line"] = command("--adapter", adapter, "--out", "o", "--toy", "x")
found["wrong in a file"] = command("--config", file("a.yaml", f"adapter: {adapter}\\nout: o\\ntoy: x\\n"))
found["wrong in Python"] = python(toy="x")
found["right in Python"] = python(toy=3)
found["manifest"] = json.loads(Path(place, "out", "merge_manifest.json").read_text())["options"]
for name, toy in (("the same", 3), ("another", 4)):
    job = f"base: {base}, adapter: {adapter}, out: {place}/out, toy: {toy}"
    found[name] = command("batch", file("b.yaml", "jobs: [{" + job + "}]"), "--dry-run")
print(json.dumps(found))
"""


def test_an_option_is_one_row_of_the_table(pico, pico_adapter, tmp_path):
    """A copy of the package gets a row, and is used by its command, its files and its functions."""
    for folder in ("lora_merge", "scripts"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    table = tmp_path / "lora_merge" / "requests" / "table.py"
    head, mark, tail = table.read_text().partition("_MERGING: tuple[Option, ...] = (\n")
    table.write_text(head + mark + TOY + tail)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}"}

    def run(*arguments):
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, env=environment, cwd=tmp_path / "scripts"
        ).stdout

    page = run("-c", GENERATE)
    found = json.loads(run("-c", USE, pico(), pico_adapter(pico()), tmp_path))

    assert found["home"].startswith(str(tmp_path))
    assert page.count("--toy N") == 3  # of the command without a name, of merge and of plan
    assert "--toy N  " in found["help"]
    assert "Plays with this.  [default: 0]" in found["help"]
    assert found["wrong on the command line"].startswith("2 ")
    assert "invalid value for '--toy': 'x' is not a seed" in found["wrong on the command line"]
    assert "a.yaml:3: toy: 'x' is not a seed" in found["wrong in a file"]
    assert found["wrong in Python"].startswith("toy: 'x' is not a seed")
    assert found["right in Python"] == f"{tmp_path}/out"
    assert found["manifest"]["toy"] == 3
    assert found["the same"].startswith("0 ")
    assert "it was made with other options (toy)" in found["another"]
    for name in ("request.py", "keywords.py"):
        text = (tmp_path / "lora_merge" / "requests" / name).read_text()
        assert "toy: int" in text
        assert "Plays with this. Default: 0." in text
