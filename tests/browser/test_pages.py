"""Pages of --report in a real browser: they load alone, say what the JSON says, and serve keyboards, small screens and paper."""

from __future__ import annotations

import dataclasses
import json
import os
import re

import pytest

import lora_merge
from lora_merge.core.tensor import Survival
from tests.tampering import edit_tensors

pytestmark = pytest.mark.system

NAMES = (
    "merge",
    "plan",
    "verification",
    "failed-verification",
    "inspection",
    "failed-merge",
    "batch",
)

CONTRASTS = """() => {
  const parse = (text) => { const m = text.match(/[\\d.]+/g); return m ? m.map(Number) : null; };
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c && (c.length < 4 || c[3] > 0)) return c;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const details of document.querySelectorAll("details")) details.open = true;
  for (const e of document.querySelectorAll("body *")) {
    if (["SCRIPT", "STYLE", "title"].includes(e.tagName)) continue;
    if (![...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())) continue;
    const style = getComputedStyle(e);
    if (style.visibility === "hidden" || !e.getClientRects().length) continue;
    const isSvg = e instanceof SVGElement;
    const rect = isSvg && e.parentElement.querySelector(":scope > rect");
    const fill = rect && getComputedStyle(rect).fill;
    const ink = parse(isSvg ? style.fill : style.color);
    const paper = fill && fill !== "none" ? parse(fill) : behind(isSvg ? e.ownerSVGElement.parentElement : e);
    const [low, high] = [light(ink), light(paper)].sort((a, b) => a - b);
    found.push([(high + 0.05) / (low + 0.05), e.tagName + "." + e.getAttribute("class") + ": " + e.textContent.slice(0, 40)]);
  }
  return found;
}"""


def values_of(page, chart):
    """Return path of a module → value of its cell, and the value as the table beside the chart shows it."""
    cells = page.eval_on_selector_all(
        f"#{chart} .cells g[role]",
        "all => all.map(one => [one.getAttribute('aria-label').split(':')[0], one.dataset.value, one.dataset.r, one.dataset.c])",
    )
    rows = page.eval_on_selector_all(
        f"#{chart} tbody tr",
        "all => all.map(one => [...one.querySelectorAll('td')].map(td => td.textContent))",
    )
    return {path: (float(value) if value else None, rows[int(r)][int(c)]) for path, value, r, c in cells}


def per_cent(value):
    return f"{100 * value:.1f} %"


@pytest.mark.parametrize("name", NAMES)
def test_a_page_loads_alone_and_has_its_landmarks(name, pages, opened):
    page = opened(pages[name][0])

    assert page.locator("h1").count() == 1
    for landmark in ("header", "main", "footer"):
        assert page.locator(landmark).count() == 1
    assert page.evaluate("document.documentElement.lang") == "en"
    ids = page.eval_on_selector_all("[id]", "all => all.map(one => one.id)")
    assert len(ids) == len(set(ids))
    targets = page.eval_on_selector_all("nav a", "all => all.map(one => one.hash.slice(1))")
    assert set(targets) <= set(ids)
    sections = page.eval_on_selector_all(
        "section", "all => all.map(one => one.getAttribute('aria-labelledby'))"
    )
    assert sections
    assert set(sections) <= set(ids)
    unnamed = page.eval_on_selector_all("[tabindex='0']:not([aria-label])", "all => all.length")
    assert unnamed == 0
    assert json.loads(page.locator("#report-data").text_content())["ok"] == pages[name][1]["ok"]


@pytest.mark.parametrize(
    "name", ["merge", "plan", "verification", "failed-verification", "inspection", "batch"]
)
def test_a_page_carries_the_json_of_its_run(name, pages, opened):
    path, document = pages[name]

    assert json.loads(opened(path).locator("#report-data").text_content()) == document


def test_charts_of_a_merge_have_the_values_of_its_json(pages, opened):
    path, document = pages["merge"]
    page = opened(path)
    survival = {name.removesuffix(".weight"): one for name, one in document["survival"].items()}

    sizes, kept, noise = (values_of(page, chart) for chart in ("map-size", "map-kept", "map-noise"))

    assert sizes.keys() == kept.keys() == noise.keys() == survival.keys()
    assert len(survival) == 5
    for module, one in survival.items():
        relative = one["delta_norm"] / one["weight_norm"]
        assert sizes[module] == (relative, f"{relative:#.3g}")
        effect = 1 - one["effect_error"] / one["effect_norm"]
        assert kept[module] == (effect, per_cent(effect))
        off = one["error_norm"] / one["delta_norm"]
        assert noise[module] == (off, per_cent(off))
    figures = page.locator(".figures").inner_text()
    assert str(document["summary"]["n_merged"]) in figures


def test_charts_of_an_inspection_have_the_values_of_its_json(pages, opened):
    path, document = pages["inspection"]
    page = opened(path)

    sizes = values_of(page, "map-size")

    relative = {one["path"]: one["relative"] for one in document["modules"]}
    assert sizes == {
        path: (value, "–" if value is None else f"{value:#.3g}") for path, value in relative.items()
    }
    assert sum(value is not None for value in relative.values()) == 5
    marks = page.eval_on_selector_all(
        "#engines tbody tr",
        "all => all.map(one => [one.cells[0].innerText.slice(1).trim(), one.cells[1].innerText])",
    )
    assert marks == [[one["verdict"], f"{one['engine']} {one['version']}"] for one in document["engines"]]


def test_a_failed_verification_marks_what_is_wrong_and_not_by_colour_alone(pages, opened):
    path, document = pages["failed-verification"]
    page = opened(path)

    assert "Verification failed" in page.locator(".verdict").inner_text()
    marked = page.eval_on_selector_all(
        "#map-size .marked", "all => all.map(one => [one.textContent, one.ariaLabel])"
    )
    assert [text for text, _ in marked] == ["✕"]
    assert marked[0][1].startswith("model.layers.1.mlp.down_proj:")
    states = page.eval_on_selector_all(
        "#checks tbody tr", "all => all.map(one => [one.cells[2].innerText, one.cells[0].innerText])"
    )
    signs = {"passed": "✓", "failed": "✕"}
    assert states == [[one["check"], f"{signs[one['state']]} {one['state']}"] for one in document["findings"]]
    first = page.locator(".notice").first
    assert "error" in first.get_attribute("class")


def test_a_batch_shows_every_job_and_opens_those_that_failed(pages, opened):
    path, document = pages["batch"]
    page = opened(path)

    words = {"done": "done", "kept": "up to date", "failed": "failed"}
    states = page.eval_on_selector_all(
        "#jobs tbody tr",
        "all => all.map(one => [one.cells[0].innerText.slice(1).trim(), one.cells[1].innerText])",
    )
    assert states == [[words[job["state"]], job["out"]] for job in document["jobs"]]
    assert [job["state"] for job in document["jobs"]] == ["kept", "done", "failed"]
    is_open = page.eval_on_selector_all("details.job", "all => all.map(one => one.open)")
    assert is_open == [False, False, True]
    page.locator("details.job").nth(1).locator("> summary").click()
    survival = document["jobs"][1]["report"]["survival"]
    sizes = values_of(page, "job-1-size")
    assert {path: value for path, (value, _) in sizes.items()} == {
        name.removesuffix(".weight"): one["delta_norm"] / one["weight_norm"] for name, one in survival.items()
    }


def test_a_failed_merge_names_every_error_with_its_hint(pages, opened):
    path, document = pages["failed-merge"]

    shown = opened(path).locator("#messages").inner_text()

    assert document["issues"] or document["message"]
    for issue in document["issues"]:
        assert issue["sentence"] in shown
        assert f"hint: {issue['hint']}" in shown or not issue["hint"]


def test_the_map_is_walked_with_the_keyboard(pages, opened):
    page = opened(pages["merge"][0])
    page.locator("#map-size .cells g[tabindex='0']").focus()

    def here():
        return page.evaluate(
            "[document.activeElement.dataset.r, document.activeElement.dataset.c].map(Number)"
        )

    start = here()
    assert start == [0, 0]
    page.keyboard.press("ArrowRight")
    assert here() == [start[0], start[1] + 1]
    page.keyboard.press("ArrowDown")
    assert here() == [start[0] + 1, start[1] + 1]
    page.keyboard.press("Home")
    assert here() == [start[0] + 1, 0]
    page.keyboard.press("End")
    assert here()[1] == 1
    page.keyboard.press("ArrowUp")
    label = page.evaluate("document.activeElement.ariaLabel")
    assert page.locator("[data-for='map-size']").inner_text() == label
    assert (
        page.evaluate("getComputedStyle(document.activeElement.querySelector('rect')).strokeWidth") == "3px"
    )
    # One stop for the whole map: the next one is the table beside it.
    assert page.locator("#map-size .cells g[tabindex='0']").count() == 1
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "SUMMARY"
    page.keyboard.press("Enter")
    assert page.locator("#map-size details").get_attribute("open") is not None


def test_the_first_stop_skips_to_the_report(pages, opened):
    page = opened(pages["merge"][0])
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.hash") == "#main"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"


@pytest.mark.parametrize("name", NAMES)
def test_a_narrow_screen_scrolls_down_only(name, pages, opened):
    page = opened(pages[name][0], width=320)
    page.eval_on_selector_all("details", "all => all.forEach(one => { one.open = true })")

    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    wide = page.evaluate(
        """() => [...document.querySelectorAll("body *")].filter((one) =>
          one.getBoundingClientRect().right > 321 && !one.closest(".scroll") && !one.closest(".skip")).length"""
    )
    assert wide == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", NAMES)
def test_every_text_can_be_read_in_both_themes(name, scheme, pages, opened):
    page = opened(pages[name][0], color_scheme=scheme)

    found = page.evaluate(CONTRASTS)

    assert len(found) > 10
    assert [one for one in found if one[0] < 4.5] == []


def test_the_theme_follows_the_system_until_it_is_chosen(pages, opened):
    page = opened(pages["merge"][0], color_scheme="dark")
    paper = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(paper)

    page.emulate_media(color_scheme="light")
    light = page.evaluate(paper)
    assert light != dark
    button = page.locator("#theme")
    assert button.inner_text() == "Theme: system"
    seen = []
    for _ in range(3):
        button.click()
        seen.append((button.inner_text(), page.evaluate(paper)))
    assert seen == [("Theme: light", light), ("Theme: dark", dark), ("Theme: system", light)]


def test_paper_is_white_and_has_no_buttons(pages, opened):
    page = opened(pages["batch"][0], color_scheme="dark")
    assert page.locator("#theme").is_visible()

    page.emulate_media(media="print")

    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(252, 251, 248)"
    for gone in ("#theme", "nav", ".readout >> nth=0"):
        assert not page.locator(gone).is_visible()
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details.job:not([open])").count() == 0
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert page.locator("details.job:not([open])").count() == 2
    assert page.pdf().startswith(b"%PDF")


@pytest.mark.parametrize("media", ["screen", "print"])
def test_labels_of_rows_are_beside_their_cells(media, pages, opened):
    page = opened(pages["merge"][0], width=700)
    page.emulate_media(media=media)

    middles = page.evaluate(
        """() => {
          const middle = (one) => { const r = one.getBoundingClientRect(); return r.top + r.height / 2; };
          const labels = [...document.querySelectorAll("#map-size .labels text")].map(middle);
          return labels.map((y, n) => [y, middle(document.querySelector(`#map-size g[data-r="${n}"] rect`))]);
        }"""
    )

    assert len(middles) == 3
    for label, cell in middles:
        assert abs(label - cell) < 4


def test_tables_become_lists_on_a_narrow_screen(pages, opened):
    page = opened(pages["failed-verification"][0], width=320)

    first = page.locator("#checks tbody tr").first
    boxes = [cell.bounding_box() for cell in first.locator("td").all()]
    assert [box["x"] for box in boxes] == [boxes[0]["x"]] * 4
    assert max(box["x"] + box["width"] for box in boxes) <= 320
    told = page.eval_on_selector_all(
        "#checks tbody tr:first-child td", "all => all.map(one => getComputedStyle(one, '::before').content)"
    )
    assert told == ['"Result"', '"Question"', '"Check"', '"How much"']


def test_a_page_is_whole_without_scripts(pages, opened):
    page = opened(pages["merge"][0], java_script_enabled=False)

    assert not page.locator("#theme").is_visible()
    page.locator("#map-size summary").click()
    assert page.locator("#map-size table").is_visible()


HOSTILE = "</script><img src=x onerror=window.owned=1>"


def test_hostile_names_are_shown_and_do_nothing(base, adapter, cli, tampered, opened, tmp_path_factory):
    root = tmp_path_factory.mktemp("pages-")
    odd = f"\u202e\x1b]0;{HOSTILE}"
    strange = tampered(adapter, "strange")
    edit_tensors(
        strange / "adapter_model.safetensors",
        lambda tensors: tensors.update(
            {f"base_model.model.{odd}.lora_A.weight": tensors[next(iter(tensors))].clone()}
        ),
    )
    out = root / os.fsdecode(b"\xff<") / HOSTILE.partition("/")[2]
    out.parent.mkdir()
    pages = [root / "failed.html", root / "inspected.html", root / "merged.html"]
    assert cli("--base", base, "--adapter", strange, "--out", root / "m", "--report", pages[0]).exit_code == 4
    assert cli("inspect", strange, "--report", pages[1]).exit_code in {0, 4}
    merged = cli("--base", base, "--adapter", adapter, "--out", out, "--report", pages[2])
    assert merged.exit_code == 0, merged.output

    for path in pages:
        text = path.read_text(encoding="utf-8")
        assert "\u202e" not in text
        assert "\x1b" not in text
        page = opened(path)
        assert page.evaluate("window.owned") is None
        assert page.locator("img").count() == 0
        assert "script><img src=x onerror=window.owned=1>" in page.locator("body").inner_text()
        json.loads(page.locator("#report-data").text_content())


def test_the_largest_models_fit_on_a_page(base, adapter, opened, tmp_path_factory, tmp_path):
    report = lora_merge.merge(base=base, adapter=adapter, out=tmp_path / "merged")
    attention = [f"self_attn.{one}_proj" for one in "qkvo"]
    experts = [f"mlp.experts.{n}.{one}_proj" for n in range(128) for one in ("gate", "up", "down")]
    names = [f"model.layers.{layer}.{one}.weight" for layer in range(94) for one in (*attention, *experts)]
    survival = {
        name: Survival(1.0, 0.001 * (1 + n % 7), 0.0001, 0.1, 1.0 - 0.001 * (n % 9))
        for n, name in enumerate(names)
    }
    path = tmp_path_factory.mktemp("pages-") / "page.html"

    lora_merge.write_report(dataclasses.replace(report, survival=survival), path)

    assert path.stat().st_size < 2_000_000
    page = opened(path, width=1000)
    assert page.locator("#map-size .cells g[role]").count() == 94 * 7
    assert page.evaluate("document.documentElement.scrollWidth") <= 1000
    label = page.locator("#map-size .cells g[role]").first.get_attribute("aria-label")
    assert re.match(r"model\.layers\.0\.mlp\.experts\.\*\.down_proj: 128 modules", label)
    data = json.loads(page.locator("#report-data").text_content())
    assert data["left_out"]["survival"] == len(names)
