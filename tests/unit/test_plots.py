"""Pictures of an inspection: what they show, whatever the modules are called."""

from __future__ import annotations

import pickle
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from lora_merge.errors import RequestError, WriteError
from lora_merge.inspection import plots
from lora_merge.inspection.facts import Inspection, ModuleFacts
from lora_merge.inspection.plots.colours import VIRIDIS

HOSTILE = "</td><script>alert(1)</script>--> $x^2$ & \"'\n\u202e漢\ud800"


def module(path, rank=16, delta=None, weight=None, kind="low_rank", scale=2.0):
    return ModuleFacts(path, kind, rank, scale, (64, 64), 4096, delta, weight)


def inspection(*modules, adapter="out/adapter"):
    return Inspection(adapter, "peft", "LORA", "", "org/base", True, "xxh3_128:0", 4096, "", tuple(modules))


def layers(numbers, *names, **facts):
    return [module(f"model.layers.{n}.{name}", **facts) for n in numbers for name in names]


class Page(HTMLParser):
    """Tables of a page as ``[panel][row label][column label] → (text, attributes)``, and all its tags."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.panels, self.titles = [], [], []
        self._columns, self._row, self._open = [], None, None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self._open = (tag, dict(attributes))
        if tag == "table":
            self.panels.append({})
            self._columns = []
        if tag == "td":
            self._row[self._columns[len(self._row)]] = ("", dict(attributes))

    def handle_endtag(self, tag):
        self._open = None

    def handle_data(self, text):
        tag, attributes = self._open or ("", {})
        if tag == "th" and attributes.get("scope") == "col":
            self._columns.append(text)
        elif tag == "th" and attributes.get("scope") == "row":
            self._row = self.panels[-1].setdefault(text, {})
        elif tag == "td":
            column = list(self._row)[-1]
            self._row[column] = (text, attributes)
        elif tag == "h2":
            self.titles.append(text)


def page(tmp_path, *modules, **facts):
    plots.draw(inspection(*modules, **facts), tmp_path / "x.html")
    return Page((tmp_path / "x.html").read_text(encoding="utf-8"))


class Drawing:
    """An SVG file: its texts, and how many cells each panel has."""

    def __init__(self, path):
        builder = ET.TreeBuilder(insert_comments=True)
        root = ET.fromstring(path.read_bytes(), ET.XMLParser(target=builder))
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        self.texts = [unescape(node.text.strip()) for node in root.iter() if node.tag is ET.Comment]
        groups = [node for node in root.iter() if node.get("id", "").startswith("PolyCollection")]
        self.n_cells = [sum(child.tag.endswith("}path") for child in group) for group in groups]


def drawing(tmp_path, *modules, **facts):
    plots.draw(inspection(*modules, **facts), tmp_path / "x.svg")
    return Drawing(tmp_path / "x.svg")


@pytest.mark.slow
def test_a_png_is_a_picture_with_colours(tmp_path):
    matplotlib_image = pytest.importorskip("matplotlib.image")
    path = tmp_path / "x.PNG"

    plots.draw(inspection(*layers(range(32), "mlp.up_proj", delta=1.0, weight=2.0)), path)

    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = matplotlib_image.imread(path)
    height, width, _ = pixels.shape
    assert width > height > 100
    yellow = [round(channel / 255, 3) for channel in (0xFD, 0xE7, 0x25)]
    assert (abs(pixels[..., :3] - yellow) < 1 / 255).all(axis=-1).sum() > 10_000


def test_an_svg_has_a_cell_for_each_module_its_names_and_a_legend(tmp_path):
    pytest.importorskip("matplotlib")
    found = drawing(
        tmp_path,
        *layers(range(3), "mlp.up_proj", "mlp.down_proj", rank=24, delta=1.0, weight=8.0),
        module("lm_head", 8, 3.0, 8.0),
    )

    assert found.n_cells == [7, 7]
    assert {"mlp.up_proj", "mlp.down_proj", "lm_head", "layer", "0", "1", "2", "other"} <= {*found.texts}
    assert {"out/adapter", "LORA, 7 modules, base org/base", "blank: no such module"} <= {*found.texts}
    assert {"rank", "12", "24", "relative change ‖Δ‖ / ‖W‖", "0.188", "0.375"} <= {*found.texts}


@pytest.mark.parametrize("n_layers", [2, 32, 80])
def test_every_layer_has_its_number_up_to_eighty_of_them(tmp_path, n_layers):
    pytest.importorskip("matplotlib")
    names = [f"mlp.{name}" for name in "abcdefg"]

    texts = drawing(tmp_path, *layers(range(n_layers), *names)).texts

    assert {str(n) for n in range(n_layers)} <= {*texts}
    assert {*names} <= {*texts}


def test_a_page_has_every_layer_and_the_exact_numbers_in_its_tooltips(tmp_path):
    delta, weight = 0.1234567890123, 7.000000000000001

    found = page(
        tmp_path, *layers(range(12), "self_attn.q_proj", delta=delta, weight=weight), module("lm_head", 8)
    )

    rank, relative = found.panels
    assert list(rank["self_attn.q_proj"]) == [*map(str, range(12)), "other"]
    text, attributes = rank["self_attn.q_proj"]["11"]
    assert text == "16"
    assert attributes["title"].split("\n") == [
        "model.layers.11.self_attn.q_proj", "low_rank", "rank 16", "scale 2.0",
        f"‖Δ‖ {delta!r}", f"‖W‖ {weight!r}", f"‖Δ‖ / ‖W‖ {delta / weight!r}",
    ]  # fmt: skip
    assert relative["self_attn.q_proj"]["11"][0] == "0.0176"


def test_a_page_loads_nothing_and_runs_nothing(tmp_path):
    found = page(tmp_path, *layers(range(2), "x"))
    text = (tmp_path / "x.html").read_text(encoding="utf-8")

    assert not {"script", "link", "img", "iframe", "object"} & {*found.tags}
    assert not any(word in text for word in ("http:", "https:", "url(", "@import", "//"))
    assert "default-src &#x27;none&#x27;" in text
    assert "prefers-color-scheme: dark" in text


def test_a_page_needs_no_matplotlib(tmp_path):
    program = (
        "import sys; from pathlib import Path; from lora_merge.inspection import plots\n"
        "from lora_merge.inspection.facts import Inspection, ModuleFacts\n"
        "one = ModuleFacts('layers.0.x', 'low_rank', 4, 1.0, (), 0)\n"
        "it = Inspection('a', 'peft', 'LORA', '', '', False, '', 0, '', (one,))\n"
        "plots.draw(it, Path(sys.argv[1])); print(sorted({'matplotlib', 'numpy'} & {*sys.modules}))"
    )

    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "x.html"], capture_output=True, text=True, check=True
    )

    assert done.stdout == "[]\n"


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".png", ".svg", ".html"])
def test_the_same_inspection_gives_the_same_bytes_whatever_the_users_settings(tmp_path, suffix):
    mpl = pytest.importorskip("matplotlib")
    shown = inspection(*layers(range(3), "a", "b", delta=1.0, weight=3.0), module("c", 0))
    plots.draw(shown, tmp_path / f"one{suffix}")

    with mpl.rc_context({"font.size": 30, "text.usetex": True, "savefig.transparent": True}):
        plots.draw(shown, tmp_path / f"two{suffix}")
        assert mpl.rcParams["font.size"] == 30
    program = (
        "import pickle, sys; from pathlib import Path; from lora_merge.inspection import plots\n"
        "plots.draw(pickle.load(sys.stdin.buffer), Path(sys.argv[1]))"
    )
    subprocess.run(
        [sys.executable, "-c", program, tmp_path / f"three{suffix}"], input=pickle.dumps(shown), check=True
    )

    bytes_of = {(tmp_path / f"{name}{suffix}").read_bytes() for name in ("one", "two", "three")}
    assert len(bytes_of) == 1


def test_names_of_strangers_are_shown_and_do_nothing(tmp_path):
    found = page(tmp_path, module(f"model.layers.0.{HOSTILE}", kind=HOSTILE), adapter=HOSTILE)

    assert "script" not in found.tags
    assert found.tags.count("td") == 1
    shown = "</td><script>alert(1)</script>--> $x^2$ & \"'\\n\\u202e漢\\ud800"
    (row,) = found.panels[0].items()
    assert row[0] == shown
    assert row[1]["0"][1]["title"].split("\n")[:2] == [f"model.layers.0.{shown}", shown]


def test_names_of_strangers_are_drawn_as_they_are(tmp_path):
    pytest.importorskip("matplotlib")

    found = drawing(tmp_path, *layers(range(2), HOSTILE, kind=HOSTILE), adapter=HOSTILE)

    assert found.n_cells == [2]
    assert any("</script>" in text and "$x^2$" in text and "\\u6f22" in text for text in found.texts)


def test_a_name_is_no_formula(tmp_path):
    pytest.importorskip("matplotlib")
    formula = r"$\unheard_of{$"

    texts = drawing(tmp_path, module(f"layers.0.{formula}"), adapter=f"my {formula}").texts

    assert {formula, f"my {formula}"} <= {*texts}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "n_layers", "n_others"), [("a", 600, 1), ("x" * 5000, 3, 300)])
def test_an_image_stays_small_enough_to_be_opened(tmp_path, name, n_layers, n_others):
    image = pytest.importorskip("matplotlib.image")
    modules = [*layers(range(n_layers), name), *(module(f"other_{n}") for n in range(n_others))]

    plots.draw(inspection(*modules), tmp_path / "x.png")

    height, width, _ = image.imread(tmp_path / "x.png").shape
    assert height < 5_000
    assert width < 7_000


def test_layers_are_in_the_order_of_their_numbers_and_rows_in_that_of_the_adapter(tmp_path):
    found = page(tmp_path, *layers([10, 9, 2, 100], "z", "a")).panels[0]

    assert list(found) == ["z", "a"]
    assert list(found["a"]) == ["2", "9", "10", "100"]


@pytest.mark.parametrize(
    ("path", "row", "column"),
    [
        ("model.layers.7.self_attn.q_proj", "self_attn.q_proj", "7"),
        ("base_model.model.model.layers.7.mlp.up_proj", "mlp.up_proj", "7"),
        ("transformer.h.7.attn.c_attn", "attn.c_attn", "7"),
        ("bert.encoder.layer.7.output.dense", "output.dense", "7"),
        ("transformer.blocks.7.ffn", "ffn", "7"),
        ("encoder.block.7.layer.0.SelfAttention.q", "layer.0.SelfAttention.q", "7"),
        ("layers.7", "layers", "7"),
        ("model.players.7.x", "model.players.7.x", "other"),
        ("layers.99999999999999999999.x", "layers.99999999999999999999.x", "other"),
        ("lm_head", "lm_head", "other"),
    ],
)
def test_a_path_gives_its_layer_and_its_row(tmp_path, path, row, column):
    found = page(tmp_path, module(path)).panels[0]

    assert [(name, *cells) for name, cells in found.items()] == [(row, column)]


def test_what_the_paths_to_all_layers_begin_with_is_left_out(tmp_path):
    paths = ["model.text.layers.0.q", "model.vision.blocks.0.q", "model.embed", "lm_head"]

    assert list(page(tmp_path, *map(module, paths)).panels[0]) == [
        "text.layers.q", "vision.blocks.q", "embed", "lm_head",
    ]  # fmt: skip


def test_experts_are_one_row_with_their_mean(tmp_path):
    experts = [
        module(f"model.layers.0.mlp.experts.{n}.up_proj", 8 + 8 * (n % 2), delta=1.0 + n, weight=10.0)
        for n in range(128)
    ]

    rank, relative = page(tmp_path, *experts).panels

    text, attributes = rank["mlp.experts.*.up_proj"]["0"]
    assert text == "12"
    assert attributes["title"].split("\n") == [
        "model.layers.0.mlp.experts.*.up_proj", "128 modules", "low_rank", "rank 8 to 16, mean 12.0", "scale 2.0",
        "‖Δ‖ 1.0 to 128.0, mean 64.5", "‖W‖ 10.0", "‖Δ‖ / ‖W‖ 0.1 to 12.8, mean 6.45",
    ]  # fmt: skip
    assert relative["mlp.experts.*.up_proj"]["0"][0] == "6.45"


def test_what_is_not_there_is_blank_and_what_has_no_value_is_not(tmp_path):
    modules = [*layers([0, 1], "a", delta=0.0, weight=1.0), *layers([1], "b", rank=0)]

    rank, relative = page(tmp_path, *modules).panels

    assert rank["b"]["0"] == ("", {})
    assert relative["b"]["0"] == ("", {})
    assert rank["b"]["1"][0] == "–"
    assert rank["b"]["1"][1]["class"] == "neutral"
    assert "no rank" in rank["b"]["1"][1]["title"]
    assert relative["a"]["0"][0] == "0"
    assert relative["a"]["0"][1]["style"].startswith("background:#440154")


def test_norms_that_are_no_numbers_have_no_colour_and_spoil_no_other(tmp_path):
    pytest.importorskip("matplotlib")
    modules = [
        module("layers.0.a", delta=float("nan"), weight=1.0),
        module("layers.1.a", delta=1e308, weight=1e-300),
        module("layers.2.a", delta=1.0, weight=2.0),
    ]

    relative = page(tmp_path, *modules).panels[1]["a"]

    assert [relative[n][0] for n in "012"] == ["nan", "inf", "0.5"]
    assert [relative[n][1].get("class") for n in "012"] == ["neutral", "neutral", None]
    assert relative["2"][1]["style"].startswith("background:#fde725")
    assert drawing(tmp_path, *modules).n_cells == [3, 3]


@pytest.mark.parametrize(
    ("facts", "titles"),
    [
        ({}, ["rank, 16 everywhere"]),
        ({"delta": 2.0}, ["rank, 16 everywhere", "change ‖Δ‖, 2 everywhere"]),
        ({"delta": 2.0, "weight": 0.0}, ["rank, 16 everywhere", "change ‖Δ‖, 2 everywhere"]),
        (
            {"delta": 2.0, "weight": 4.0},
            ["rank, 16 everywhere", "relative change ‖Δ‖ / ‖W‖, 0.5 everywhere"],
        ),
    ],
)
def test_norms_are_drawn_as_far_as_they_are_known(tmp_path, facts, titles):
    assert page(tmp_path, *layers(range(2), "a", **facts)).titles == titles


def test_a_mean_of_different_ranks_is_not_called_the_same_everywhere(tmp_path):
    experts = [module(f"layers.{layer}.experts.{n}.a", 8 * (n + 1)) for layer in range(2) for n in range(2)]

    assert page(tmp_path, *experts).titles == ["rank"]


def test_numbers_stand_in_cells_as_long_as_there_is_room(tmp_path):
    assert page(tmp_path, *layers(range(16), "a")).panels[0]["a"]["15"][0] == "16"
    assert page(tmp_path, *layers(range(17), "a")).panels[0]["a"]["15"][0] == ""


def test_the_colours_are_those_of_viridis():
    mpl = pytest.importorskip("matplotlib")
    from matplotlib.colors import to_hex

    viridis = mpl.colormaps["viridis"]
    assert [f"#{colour:06x}" for colour in VIRIDIS] == [
        to_hex(viridis(round(n / 10 * 255))) for n in range(11)
    ]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("x.jpg", "plot: x.jpg is a .jpg file, expected .png, .svg or .html"),
        ("plot", "plot: plot has no suffix, expected .png, .svg or .html"),
        ("s3://models/x.png", "plot: s3:/models/x.png is a URL, and pictures are written to a disk only"),
    ],
)
def test_another_suffix_is_refused_before_anything_is_drawn(name, sentence):
    for ask in (lambda: plots.check(Path(name)), lambda: plots.draw(inspection(module("a")), Path(name))):
        with pytest.raises(RequestError) as caught:
            ask()
        assert str(caught.value) == sentence


def test_an_adapter_without_modules_has_no_picture(tmp_path):
    with pytest.raises(RequestError, match="plot: out/adapter changes no module"):
        plots.draw(inspection(), tmp_path / "x.html")

    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_without_matplotlib_the_hint_says_how_to_get_it_and_what_needs_none(tmp_path, suffix, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # how Python itself marks what cannot be imported

    with pytest.raises(RequestError, match=f"a {suffix} file is drawn by matplotlib") as caught:
        plots.draw(inspection(module("a")), tmp_path / f"x{suffix}")

    assert caught.value.hint == 'pip install "lora-merge[plot]", or name an .html file'
    plots.draw(inspection(module("a")), tmp_path / "x.html")


@pytest.mark.parametrize("suffix", [".png", ".svg", ".html"])
def test_a_file_that_cannot_be_written_has_its_sentence(tmp_path, suffix):
    if suffix != ".html":
        pytest.importorskip("matplotlib")
    (tmp_path / f"x{suffix}").mkdir()

    with pytest.raises(WriteError, match=f"x{suffix}: cannot be written"):
        plots.draw(inspection(module("a")), tmp_path / f"x{suffix}")
