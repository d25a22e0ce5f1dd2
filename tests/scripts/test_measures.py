"""Every measure of `scripts/measures.py` finds what it is there for, and nothing else, in packages made for it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import measures
import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "measures.py"

FINE = "def double(x: int) -> int:\n    return 2 * x\n"


def body(n_lines: int) -> str:
    """A function of so many lines."""
    return "def long() -> None:\n" + "    print()\n" * n_lines


@pytest.fixture
def house(tmp_path):
    """Measures a package of the files that it is given."""

    def build(**files: str) -> measures.House:
        for name, text in {"__init__": "", "core/__init__": "", "fine": FINE, **files}.items():
            path = tmp_path / "lora_merge" / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return measures.House(tmp_path)

    return build


def found(house: measures.House) -> list[tuple[str, str, str]]:
    return [(one.measure, one.place, one.found) for one in house.excesses()]


def test_a_house_within_its_bounds_has_no_excess(house):
    assert found(house()) == []


def test_core_that_grows_is_found_and_blank_lines_do_not_count(house):
    lines = "x = 1\n\n" * 300
    files = {f"core/part{n}": "def f() -> None: ...\n" + lines for n in range(5)}
    excesses = [one for one in found(house(**files)) if one[0].startswith("lines of core/")]
    assert excesses == [("lines of core/ that are not blank", "lora_merge/core", "1505")]


def test_a_long_file_is_found(house):
    assert found(house(long=FINE * 201)) == [("lines of a file", "lora_merge/long.py", "402")]


@pytest.mark.parametrize("entry", ['"{n}"', "Family('{n}', refused={{'a': 1 - 2}})", "Rules.FIRST"])
def test_a_long_table_is_no_long_file(house, entry):
    rows = "".join(f"    {entry.format(n=n)},\n" for n in range(450))
    assert found(house(table=f"ROWS = (\n{rows})\n")) == []


@pytest.mark.parametrize("entry", ["lambda: {n}", "[n for n in x]", "a if b else {n}"])
def test_a_table_that_computes_is_a_long_file(house, entry):
    rows = "".join(f"    {entry.format(n=n)},\n" for n in range(450))
    assert [one[0] for one in found(house(table=f"ROWS = (\n{rows})\n"))] == ["lines of a file"]


def test_code_beside_a_table_is_a_long_file(house):
    rows = "".join(f"    {n},\n" for n in range(200))
    assert [one[0] for one in found(house(mixed=f"ROWS = (\n{rows})\n{FINE * 150}"))] == ["lines of a file"]


def test_a_long_function_is_found_wherever_it_is(house):
    nested = "class A:\n    def f(self):\n" + "        print()\n" * 61
    many_short = FINE * 30
    place = "lora_merge/long.py:2 f"
    assert found(house(long=nested, others=many_short)) == [("lines of a function", place, "61")]


def test_a_docstring_is_no_part_of_a_functions_length():
    text = 'def f() -> None:\n    """One.\n\n    Two.\n    """\n    # why\n    print()\n\n    print()\n'
    (function,) = ast.parse(text).body
    assert isinstance(function, ast.FunctionDef)
    assert measures.length(function) == 3


def test_functions_that_are_long_as_a_rule_are_found(house):
    mostly = {f"m{n}": body(21) for n in range(8)}
    assert found(house(**mostly)) == [("lines of nine functions of ten", "lora_merge", "21")]
    rarely = {f"s{n}": FINE * 10 for n in range(8)}
    assert found(house(**mostly, **rarely)) == []


def test_modules_that_load_each_other_are_found(house):
    files = {
        "a": "from lora_merge.core import b\n",
        "core/b": "import lora_merge.core.c\n",
        "core/c": "if True:\n    from lora_merge.a import x\n",
    }
    circle = "lora_merge.a → lora_merge.core.b → lora_merge.core.c → lora_merge.a"
    rooms = "lora_merge.a → lora_merge.core → lora_merge.a"
    assert [one[2] for one in found(house(**files))] == [circle, rooms]


def test_folders_that_load_each_other_are_found_though_no_two_modules_do(house):
    files = {
        "one/a": "import lora_merge.two.a\n",
        "one/b": "",
        "two/a": "",
        "two/b": "import lora_merge.one.b\n",
    }
    assert [one[2] for one in found(house(**files))] == ["lora_merge.one → lora_merge.two → lora_merge.one"]


@pytest.mark.parametrize(
    "way_back",
    [
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import lora_merge.a\n",
        "def f() -> None:\n    import lora_merge.a\n",
    ],
)
def test_imports_that_do_not_run_at_the_top_make_no_circle(house, way_back):
    assert found(house(a="import lora_merge.b\n", b=way_back)) == []


@pytest.mark.parametrize("mark", ["# fmt: skip", "#fmt:off"])
def test_a_place_that_is_not_formatted_is_found(house, mark):
    where = ("places that are not formatted", "lora_merge/odd.py:1", mark)
    assert found(house(odd=f"x = [1,2]  {mark}\ny = '# fmt: skip'\n")) == [where]


def wide(name: str, n: int) -> str:
    names = ", ".join(f"p{i}" for i in range(n))
    return f"def {name}({names}) -> None: ...\n"


def test_a_public_function_with_many_parameters_is_found(house):
    method = "class A:\n    def m(self, a, b, c, d, e, f, g, h, i, j, /, k, *l, m, **n) -> None: ...\n"
    excesses = found(house(many=wide("f", 13) + method, most=wide("f", 12)))
    assert [one[1:] for one in excesses] == [
        ("lora_merge/many.py:1 f", "13"),
        ("lora_merge/many.py:3 m", "14"),
    ]


def test_functions_that_nobody_else_calls_may_have_more_parameters(house):
    inner = "def outer() -> None:\n    " + wide("f", 13)
    assert found(house(own=wide("_f", 13), inner=inner)) == []


def test_a_file_is_generated_where_the_script_that_it_names_is_there(house, tmp_path):
    text = "# Generated by scripts/table.py\n" + wide("f", 30)
    assert [one[0] for one in found(house(made=text))] == ["parameters of a public function"]
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "table.py").write_text("")
    assert found(house(made=text)) == []


def test_shares_of_comments_and_docstrings_are_said(house):
    text = '# why\ndef f() -> None:\n    """Return the f."""  # and why\ndef g() -> None:\n    """Say g."""\n'
    lines = list(house(said=text).lines())
    assert "lines with a comment: 28.6% of 7 (aim: 3 to 6 %)" in lines
    assert '2 docstrings of functions: 50% begin with "Return", 50% with "Return the"' in lines


def run(root: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--root", str(root), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_script_names_each_excess_and_fails_only_when_asked_to_check(house, tmp_path):
    house(long=FINE * 201)
    plain, checked = run(tmp_path), run(tmp_path, "--check")
    assert (plain.returncode, plain.stderr) == (0, "")
    assert checked.returncode == 1
    assert checked.stderr == "beyond the bound: lines of a file, at most 400\n  lora_merge/long.py: 402\n"
    assert checked.stdout == plain.stdout


def test_the_script_is_content_with_a_house_within_its_bounds(house, tmp_path):
    house()
    assert run(tmp_path, "--check").returncode == 0
