"""The report in headless Chromium: no console errors, visible plots, sorting, selectors, phone, dark mode."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from quantlens.report import write_report

ATTENTION_BITS = ("FP32", "W8A8", "W6A6", "W4A8", "W8A4", "W4A4")

DEIT = "deit_tiny_patch16_224"
POINTS = """[...document.querySelectorAll('#ood .chart [aria-roledescription="point"]')]
    .map(e => e.getAttribute('aria-label')).join('; ')"""
"""What the marks of the first figure are, as a screen reader has it."""

EVIL = '"><script>alert(1)</script>'

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="Chromium and chromedriver are not installed"),
]


class Browser:
    """A headless Chromium with the few verbs that these tests need."""

    def __init__(self):
        webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(DRIVER))

    def run(self, script: str, *args):
        return self.driver.execute_script(script, *args)

    def open(self, path: Path, width: int = 1280, *, dark: bool = False) -> None:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        command = self.driver.execute_cdp_cmd
        command("Emulation.setDeviceMetricsOverride", size)
        command("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.get(path.as_uri())
        self.wait(
            "![...document.querySelectorAll('.js [data-chart]')].some(e => e.checkVisibility() && !e.matches('.drawn'))"
        )

    def wait(self, condition: str) -> None:
        """Until a condition of the page holds, such as that every chart that is displayed is drawn."""
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, 120).until(lambda _: self.run(f"return {condition}"))

    def problems(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def column(self, table: str, index: int) -> list[str]:
        """The texts of a column's visible cells."""
        script = """return [...document.querySelectorAll(arguments[0] + ' tbody tr')].filter(r => !r.hidden)
                    .map(r => r.cells[arguments[1]].textContent.trim())"""
        return self.run(script, table, index)

    def shown(self, selector: str) -> list[dict[str, float]]:
        """The boxes of the elements that are displayed and take up room."""
        return self.run(
            """return [...document.querySelectorAll(arguments[0])].filter(e => e.checkVisibility())
               .map(e => e.getBoundingClientRect()).filter(b => b.width && b.height)
               .map(b => ({width: b.width, height: b.height}))""",
            selector,
        )


@pytest.fixture(scope="module")
def browser():
    opened = Browser()
    yield opened
    opened.driver.quit()


@pytest.fixture(scope="module")
def report(make, tmp_path_factory) -> Path:
    """Two models, three methods, six precisions, three seeds, three OOD sets, four scores."""
    make_cells, _, fake_store = make
    store = fake_store(make_cells(scores=("msp", "energy", "knn", "vim")))
    return write_report(store, tmp_path_factory.mktemp("report") / "full.html")


def number(text: str) -> float:
    return float(text.split(" ")[0].replace("−", "-"))


def test_opens_without_errors_and_shows_its_plots(browser, report):
    browser.open(report)
    assert browser.problems() == []
    for kind in ("lines", "bars", "hist", "reliability"):
        boxes = browser.shown(f".chart.{kind} svg")
        assert len(boxes) >= 3, kind
        assert all(b["width"] > 200 and b["height"] > 30 for b in boxes), kind
    assert browser.run("return document.querySelector('h1').getBoundingClientRect().height") > 20
    colours = browser.run(
        """return [...document.querySelectorAll('#ood [aria-roledescription="line mark"]')]
               .map(e => getComputedStyle(e).stroke)"""
    )
    assert len(set(colours)) >= 3


def test_tables_sort_by_number_and_by_text(browser, report):
    """The ECE column at W4A4 holds 9.3 beside 27.1, so sorting by text would give another order."""
    browser.open(report)
    table = "document.querySelectorAll('#accuracy table')[1]"
    header = f"{table}.querySelectorAll('thead tr:last-child th')"

    def column(index: int) -> list[str]:
        return browser.run(f"return [...{table}.tBodies[0].rows].map(r => r.cells[{index}].textContent)")

    def press(index: int) -> str:
        script = f"{header}[{index}].querySelector('button').click(); return {header}[{index}].ariaSort"
        return browser.run(script)

    before = [number(t) for t in column(7)]
    assert press(7) == "ascending"
    assert [number(t) for t in column(7)] == sorted(before) != before
    assert sorted(before) != [number(t) for t in sorted(column(7))]
    assert press(7) == "descending"
    assert [number(t) for t in column(7)] == sorted(before, reverse=True)
    assert press(0) == "ascending"
    assert column(0) == sorted(column(0))
    sorted_by = browser.run(f"return [...{header}].map(h => h.ariaSort).filter(s => s !== 'none')")
    assert sorted_by == ["ascending"]


def test_sorting_by_keyboard_with_missing_figures_last(browser, report):
    from selenium.webdriver.common.keys import Keys

    browser.open(report)
    button = browser.driver.find_element("css selector", "#set-table th:nth-child(9) button")
    for order in (False, True):
        button.send_keys(Keys.ENTER)
        texts = browser.column("#set-table", 8)
        values = [number(t) for t in texts if t != "–"]
        assert values == sorted(values, reverse=order)
        assert min(values) < 0 < max(values)
        assert set(texts[len(values) :]) == {"–"}, "FP32 rows have no delta and come last"


def test_score_selector_switches_everything(browser, report):
    browser.open(report)
    before, points = browser.column("#delta-table", 7), browser.run(f"return {POINTS}")
    assert set(browser.column("#set-table", 5)) == {"MSP"}
    browser.run("""const s = document.getElementById('choose-score'); s.value = 'vim';
                   s.dispatchEvent(new Event('change'))""")
    visible = browser.run("""return [...document.querySelectorAll('figure[data-score]')]
                             .filter(e => e.checkVisibility()).map(e => e.dataset.score)""")
    assert set(visible) == {"vim"}
    browser.wait(f"{POINTS} !== {json.dumps(points)}")
    assert f"{DEIT} · minmax" in browser.run(f"return {POINTS}")
    assert browser.column("#delta-table", 7) != before
    assert set(browser.column("#set-table", 5)) == {"ViM"}
    assert set(browser.run("return [...document.querySelectorAll('[data-score-name]')].map(e => e.textContent)")) == {
        "ViM"
    }


def test_precision_selector_and_filters(browser, report):
    browser.open(report)
    browser.run("""const s = document.getElementById('choose-bits'); s.value = 'W8A4';
                   s.dispatchEvent(new Event('change'))""")
    browser.wait("document.querySelector('#distributions .reliability svg').textContent.includes('ECE W8A4')")
    assert set(browser.run("return [...document.querySelectorAll('[data-bits-name]')].map(e => e.textContent)")) == {
        "W8A4"
    }
    browser.driver.find_element("id", "search").send_keys("flowers w4a4 repq")
    assert browser.column("#set-table", 2) == ["W4A4", "W4A4"]
    assert set(browser.column("#set-table", 3)) == {"flowers"}
    assert browser.driver.find_element("id", "shown").text == "2 of 864 rows"


def test_the_image_selector_switches_the_maps(browser, attention_store, tmp_path):
    """One image's maps are shown at a time, and drawn: the photograph and a map for every precision."""
    browser.open(write_report(attention_store, tmp_path / "attention.html"))
    shown = """const figures = [...document.querySelectorAll('figure.gallery')].filter(e => e.checkVisibility());
               return Promise.all(figures.map(async e => {
                 const images = [...e.querySelectorAll('img')].filter(i => i.checkVisibility());
                 for (const i of images) i.loading = 'eager';
                 await Promise.all(images.map(i => i.decode()));
                 return [e.dataset.picture, images.filter(i => i.naturalWidth > 0).length];
               }));"""
    keys = browser.run("return [...document.querySelectorAll('#choose-picture option')].map(o => o.value)")
    assert len(keys) == 4
    first = browser.run(shown)
    assert len(first) == 1
    for key in keys:
        browser.run(
            """const s = document.getElementById('choose-picture'); s.value = arguments[0];
               s.dispatchEvent(new Event('change'))""",
            key,
        )
        found = browser.run(shown)
        assert [name for name, _ in found] == [key]
        assert found[0][1] > len(ATTENTION_BITS)
    assert browser.problems() == []


def test_legend_hides_a_line_and_classes_unfold(browser, report):
    browser.open(report)
    assert f"{DEIT} · minmax" in browser.run(f"return {POINTS}")
    browser.run("document.querySelector('.legend button').click()")
    browser.wait(f"!{POINTS}.includes('{DEIT} · minmax')")
    assert f"{DEIT} · percentile" in browser.run(f"return {POINTS}")
    rows = "details.classes[open] tbody tr"
    assert len(browser.shown(rows)) == 10
    browser.run("document.querySelector('button.more').click()")
    assert len(browser.shown(rows)) == 40


def test_a_mark_says_its_value_when_pointed_at(browser, report):
    from selenium.webdriver import ActionChains

    browser.open(report)
    mark = browser.driver.find_element("css selector", '#ood .chart [aria-roledescription="point"]')
    browser.run("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", mark)
    ActionChains(browser.driver).move_to_element(mark).perform()
    browser.wait("document.querySelector('#vg-tooltip-element.visible') !== null")
    text = browser.driver.find_element("id", "vg-tooltip-element").text
    assert DEIT in text or "vit_tiny" in text
    assert re.search(r"AUPR-out %:? *\d+\.\d( ± \d+\.\d)? %", text), text
    assert browser.problems() == []


def test_phone_has_no_sideways_scroll(browser, report):
    browser.open(report, 360)
    assert browser.problems() == []
    assert browser.run("return document.documentElement.scrollWidth") <= 360
    outside = browser.run("""return [...document.querySelectorAll('main *')].filter(e => e.checkVisibility()
        && !e.closest('.scroll') && e.getBoundingClientRect().right > 361)
        .map(e => e.outerHTML.slice(0, 80))""")
    assert outside == []
    assert all(b["width"] > 250 for b in browser.shown(".chart svg"))
    size = browser.run("""const t = document.querySelector('#ood .chart .role-axis-label text');
        return t.getBoundingClientRect().height""")
    assert size > 9, "axis labels stay legible"


def test_dark_mode_follows_the_system_and_the_button(browser, report):
    script = """const css = getComputedStyle(document.body); const light = c => c.match(/\\d+/g).slice(0, 3)
        .reduce((a, b) => a + Number(b), 0) / 3; return [light(css.backgroundColor), light(css.color)]"""
    browser.open(report, dark=True)
    background, ink = browser.run(script)
    assert background < 60
    assert ink > 180
    words = "return getComputedStyle(document.querySelector('#ood .chart .role-axis-label text')).fill"
    lines = "return getComputedStyle(document.querySelector('#ood .chart [aria-roledescription=\"line mark\"]')).stroke"
    dark = browser.run(words), browser.run(lines)
    browser.run("document.getElementById('theme').click()")
    background, ink = browser.run(script)
    assert background > 230
    assert ink < 80
    assert all(light != there for light, there in zip((browser.run(words), browser.run(lines)), dark, strict=True))
    browser.run("localStorage.clear()")
    browser.open(report)
    assert browser.run(script)[0] > 230


def test_layers_show_and_sort(browser, make, tmp_path):
    """The section "Which layer hurts" of a real store: no errors, also where the model's name is hostile."""
    from quantlens.report.inspection import write_inspection
    from quantlens.sensitivity import Inspection
    from quantlens.sensitivity.alone import Effect
    from quantlens.sensitivity.inspection import Part
    from quantlens.sensitivity.statistics import EdgeStatistics
    from quantlens.studies.store import INSPECTION, Store

    def site(name: str, sqnr: float, kurtosis: float) -> Part:
        edge = EdgeStatistics(f"{name}.input", "input", False, 8, -1.0, 1.0, kurtosis, 40.0, 4, 1.5, (2,))
        return Part(name, "linear", "blocks.0", "W8A8", Effect(sqnr, 0.01 / sqnr, 0.0), (edge,))

    sites = (site("blocks.0.a", 40.0, 9.5), site("blocks.0.b", 12.5, 10000.0), site("blocks.0.c", 30.0, 25.0))
    blocks = (Part("blocks.0", "block", "blocks.0", "W8A8", Effect(12.0, 0.03, 0.1)),)
    found = Inspection(EVIL, "sha", "minmax", "W8A8", 0, {"site": sites, "block": blocks}, {"n": 4})
    with Store(tmp_path) as store:
        for cell in make[0](("deit_tiny_patch16_224",), ("minmax",), ("FP32", "W8A8"), (0,)):
            store.put(cell.key, cell.spec, "done", cell.result)
        store.put(f"{INSPECTION}x", {"model": EVIL, "inspects": True}, "done", {"inspection": found.to_dict()})
    browser.open(write_inspection(found, tmp_path / "page.html"), 380)
    assert browser.problems() == []
    assert browser.shown(".chart.effects svg")
    sites_table = "table:has(th:nth-child(8))"
    assert browser.column(sites_table, 0) == ["blocks.0.b", "blocks.0.c", "blocks.0.a"]
    browser.run(f"document.querySelectorAll('{sites_table} th')[7].querySelector('button').click()")
    assert browser.column(sites_table, 7) == ["9.5", "25", "10000"]
    browser.open(write_report(tmp_path), 380)
    assert browser.problems() == []
    assert browser.run("return document.documentElement.scrollWidth") <= 380
    assert browser.run("return document.querySelector('#layers h3').textContent") == EVIL
    assert browser.shown("#layers .chart svg")
    table = "#layers > .scroll table"
    assert browser.column(table, 0) == ["blocks.0.b", "blocks.0.c", "blocks.0.a"]
    browser.run(f"document.querySelectorAll('{table} th')[7].querySelector('button').click()")
    assert browser.column(table, 7) == ["9.5", "25", "10000"]
    assert "1 dead channel" in browser.column(table, 10)[0]


def test_readable_without_scripts(browser, report, tmp_path):
    """The file as a reader sees it who runs no scripts: what stands in it, without them (switching them off in the
    browser takes effect too late on a busy machine)."""
    text, removed = re.subn(r"<script\b.*?</script>", "", report.read_text(), flags=re.S)
    assert removed
    bare = tmp_path / "bare.html"
    bare.write_text(text)
    browser.open(bare)
    assert "js" not in browser.run("return document.documentElement.className")
    assert len(browser.shown("#set-table tbody tr")) == 864
    said = browser.run("return getComputedStyle(document.querySelector('#ood .chart'), '::before').content")
    assert "needs JavaScript; the tables hold its values" in said
    assert browser.shown("#choose-score") == []


@pytest.mark.parametrize("case", ["one cell", "no OOD", "FP32 only", "all failed", "hostile"])
def test_edge_cases_open_without_errors(browser, make, tmp_path, case):
    make_cells, fake_cell, fake_store = make
    model, evil = "deit_tiny_patch16_224", EVIL
    failed = fake_cell("k", {"model": evil, "bits": "W4A4"}, "failed", None, evil)
    cells = {
        "one cell": lambda: make_cells((model,), ("repq-vit",), ("W4A4",), (0,)),
        "no OOD": lambda: make_cells((model,), ("minmax", "repq-vit"), sets={}),
        "FP32 only": lambda: make_cells((model,), (), ("FP32",)),
        "all failed": lambda: [failed],
        "hostile": lambda: [
            *make_cells((evil,), (evil,), seeds=(0,), sets={evil: "far"}, scores=("msp", evil)),
            failed,
        ],
    }[case]()
    browser.open(write_report(fake_store(cells), tmp_path / "r.html"), 380)
    assert browser.problems() == []
    assert browser.run("return document.documentElement.scrollWidth") <= 380
    if case not in ("all failed", "no OOD"):
        assert browser.shown(".chart.lines svg")
