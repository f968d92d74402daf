"""The report's figures are those of the store; whatever is missing, strange or hostile, it is written."""

from __future__ import annotations

import base64
import copy
import gzip
import html
import json
import math
import re
import statistics
from html.parser import HTMLParser

import pytest

from quantlens.errors import QuantlensError, StorageError
from quantlens.plots import FIGURES
from quantlens.report import write_report
from quantlens.report.build import render
from quantlens.report.page import content_policy, library
from quantlens.report.summary import sentences
from quantlens.report.tables import class_tables, delta_table, set_rows, table_1
from quantlens.studies.board import collect
from quantlens.studies.text import percent

DEIT, VIT = "deit_tiny_patch16_224", "vit_tiny_patch16_224.augreg_in21k_ft_in1k"


class Page(HTMLParser):
    """The elements with their attributes, the ids, and the text that a reader sees."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.ids: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.inside = tag
        self.tags.append((tag, dict(attrs)))
        self.ids += [v for k, v in attrs if k == "id" and v]

    def handle_data(self, data):
        if self.inside not in ("script", "style"):
            self.text.append(data)

    @property
    def words(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.text))


def board_of(store):
    return collect(store.cells(), store.study())


@pytest.fixture(scope="module")
def full_page(full_store) -> str:
    return render(board_of(full_store))


def results(store, model, method, bits):
    return [c.result for c in store.cells() if c.result and (c.spec["model"], c.spec["method"],
    c.spec["bits"]) == (model, method, bits)]  # fmt: skip


# ---- numbers --------------------------------------------------------------------------------


def test_table_1_has_the_stores_means_and_deviations(full_store):
    table = table_1(board_of(full_store))[0]
    assert table["heads"][0] == ("Top-1 % ↑", ["FP32", "W8A8", "W6A6", "W4A8", "W8A4", "W4A4"])
    row = next(r for r in table["rows"] if (r["group"].model, r["group"].method) == (VIT, "repq-vit"))
    assert row["seeds"] == "3"
    for column, (bits, key) in enumerate((b, k) for k in ("top1", "nll") for b in table["heads"][0][1]):
        found = results(full_store, VIT, "fp32" if bits == "FP32" else "repq-vit", bits)
        values = [r["id"][key] * (100 if key == "top1" else 1) for r in found]
        digits = 1 if key == "top1" else 3
        value = row["cells"][column]
        assert value["text"] == f"{statistics.fmean(values):.{digits}f}"
        assert value["spread"] == ("" if bits == "FP32" else f"{statistics.stdev(values):.{digits}f}")


def test_the_best_method_of_each_model_is_marked(full_store):
    table = table_1(board_of(full_store))[0]
    column = table["heads"][0][1].index("W4A4")
    for model in (DEIT, VIT):
        rows = [r for r in table["rows"] if r["group"].model == model]
        best = max(rows, key=lambda r: float(r["cells"][column]["text"]))
        assert [r for r in rows if r["cells"][column]["best"]] == [best]


def test_set_rows_equal_the_store(full_store):
    rows = set_rows(board_of(full_store))
    assert len(rows) == 10 * (3 + 3) * 6 * 6  # scores × (sets and means) × groups × precisions
    row = next(r for r in rows if r[:6] == [DEIT, "minmax", "W4A4", "flowers", "near", "KNN"])
    stored = [r["ood"]["flowers"]["knn"] for r in results(full_store, DEIT, "minmax", "W4A4")]
    changes = [r["change"]["ood"]["flowers"]["knn"]["aupr_out"] for r in results(full_store, DEIT, "minmax", "W4A4")]

    def shown(values, sign=""):
        values = [100 * v for v in values]
        return f"{statistics.fmean(values):{sign}.1f} ± {statistics.stdev(values):.1f}".replace("-", "−")

    keys = ("aupr_out", "aupr_in", "auroc", "fpr95_id", "fpr95_ood")
    texts = [shown([s[k] for s in stored]) for k in keys]
    assert row[6:] == ["3", texts[0], shown(changes, "+"), *texts[1:], "20.0", "80.0", "400", "100"]


def test_changes_are_sorted_by_loss_and_follow_the_score(full_store):
    table = delta_table(board_of(full_store))
    firsts = [float(r[4].split(" ")[0].replace("−", "-")) for r in table["rows"]]
    assert firsts == sorted(firsts), "the largest loss of top-1 is the most negative change"
    assert firsts[0] < 0
    row = table["rows"][0]
    stored = [r["change"]["ood_mean"]["far"]["vim"]["aupr_out"] for r in results(full_store, row[0], row[1], row[2])]
    assert table["by_score"]["vim"][0][0].startswith(percent(statistics.fmean(stored), sign=True))
    assert row[-2:] == table["by_score"]["msp"][0]


@pytest.mark.parametrize("carried", [True, False])
def test_a_change_is_computed_from_the_metrics_and_never_read(make, carried):
    """The cell carries the FP32 metrics, or there is an FP32 cell; what is stored as a difference is passed over."""
    make_cells, _, fake_store = make
    cells = make_cells(models=(DEIT,), methods=("minmax",), bits=("FP32", "W4A4"), seeds=(0,))
    quantized = cells[1].result
    expected = quantized["id"]["top1"] - cells[0].result["id"]["top1"]
    quantized["delta"] = quantized["change"] = {"id": {"top1": 0.123}}
    if not carried:
        del quantized["fp32"]
    row = delta_table(board_of(fake_store(cells)))["rows"][0]
    assert row[4] == percent(expected, sign=True)
    assert expected < 0


def test_classes_worst_first(full_store):
    tables = class_tables(board_of(full_store))
    table = next(t for t in tables if (t["group"].model, t["group"].method) == (VIT, "minmax"))
    lowest = [float(r[-2]) for r in table["rows"]]
    assert lowest == sorted(lowest)
    worst = int(table["rows"][0][0])
    stored = [r["id"]["per_class"][worst]["top1"] for r in results(full_store, VIT, "minmax", "W4A4")]
    assert table["rows"][0][-2] == percent(statistics.fmean(stored))


def test_summary_states_the_largest_and_least_loss(full_store):
    board = board_of(full_store)
    losses = {}
    for model in (DEIT, VIT):
        for method in ("minmax", "percentile", "repq-vit"):
            stored = [r["change"]["id"]["top1"] for r in results(full_store, model, method, "W4A4")]
            losses[model, method] = -statistics.fmean(stored)
    worst = max(losses, key=losses.__getitem__)
    text = " ".join(sentences(board))
    assert f"the largest loss of top-1 is {percent(losses[worst])} points: {worst[0]} · {worst[1]} falls" in text
    assert "repq-vit loses least top-1 at W4A4 for every model" in text
    assert percent(losses[DEIT, "repq-vit"]) in text
    assert "AUPR-out by MSP (mean of the far sets)" in text


# ---- grouping --------------------------------------------------------------------------------


def test_options_and_weights_tell_groups_apart(make):
    make_cells, _, fake_store = make
    first = make_cells(models=(DEIT,), methods=("percentile",), bits=("FP32", "W4A4"), seeds=(0, 1))
    second = copy.deepcopy(first[1:])
    for cell in second:
        cell.spec["options"] = cell.result["options"] = {"percentile": 99.9}
    third = copy.deepcopy(first)
    for cell in third:
        cell.spec["checkpoint_sha256"] = cell.result["checkpoint_sha256"] = "ff" * 32
    board = board_of(fake_store([*first, *second, *third]))
    names = {(g.model, g.method) for g in board.groups}
    base = f"{DEIT} [{'0' * 8}]"
    assert names == {(base, "percentile (percentile=99.99)"), (base, "percentile (percentile=99.9)"),
                     (f"{DEIT} [ffffffff]", "percentile")}  # fmt: skip
    assert all(len(g.cells["W4A4"]) == 2 for g in board.groups)


def test_seeds_that_draw_their_own_calibration_images_are_one_group(make):
    make_cells, _, fake_store = make
    cells = make_cells(models=(DEIT,), methods=("minmax",), bits=("W4A4",))
    for cell in cells:
        cell.result["calibration"]["source"] = f"imagenet:data?n=32&seed={cell.spec['seed']}"
    board = board_of(fake_store(cells))
    assert len(board.groups) == 1
    assert len(board.groups[0].cells["W4A4"]) == 3


def test_the_newest_of_equal_cells_counts(make):
    make_cells, _, fake_store = make
    old, new = (make_cells(models=(DEIT,), methods=("minmax",), bits=("W4A4",), seeds=(0,))[0] for _ in range(2))
    new.created, new.result["id"]["top1"] = "2026-12-01T00:00:00", 0.123
    board = board_of(fake_store([new, old]))
    assert board.groups[0].first("W4A4")["id"]["top1"] == 0.123


# ---- missing pieces --------------------------------------------------------------------------------


def words_of(store) -> str:
    return Page(render(board_of(store))).words


def test_one_cell_only(make):
    make_cells, _, fake_store = make
    words = words_of(fake_store(make_cells(models=(DEIT,), methods=("repq-vit",), bits=("W4A4",), seeds=(0,))))
    assert "There is one seed (0), so no spread over seeds is given." in words
    assert "FP32" in words, "the FP32 figures that the cell carries are shown"


def test_fp32_missing_altogether(make):
    make_cells, _, fake_store = make
    cells = make_cells(models=(DEIT,), methods=("minmax", "repq-vit"), bits=("W4A4",))
    for cell in cells:
        cell.result["fp32"] = cell.result["change"] = None
    words = words_of(fake_store(cells))
    assert "The FP32 metrics are missing" in words
    assert "No FP32 metrics are in the store, so no change can be drawn." in words


def test_fp32_only(make):
    make_cells, _, fake_store = make
    words = words_of(fake_store(make_cells(models=(DEIT,), methods=(), bits=("FP32",))))
    assert "the store holds FP32 cells only" in words


def test_no_ood_sets(make):
    make_cells, _, fake_store = make
    words = words_of(fake_store(make_cells(models=(DEIT,), methods=("minmax",), sets={})))
    assert "without out-of-distribution sets" in words
    assert "This study has no out-of-distribution sets" in words


def test_only_failed_cells(make):
    _, fake_cell, fake_store = make
    error = 'Traceback (most recent call last):\n  File "x"\n'
    error += "quantlens.errors.BadImageError: <img src=x onerror=1>"
    cell = fake_cell("k", {"model": "<b>m</b>", "method": "minmax", "bits": "W4A4", "seed": 0}, "failed", None, error)
    page = render(board_of(fake_store([cell])))
    assert "No cell of this study has finished" in page
    assert "BadImageError: &lt;img src=x onerror=1&gt;" in page
    assert "<img" not in page


def test_missing_scores_nan_and_none(make):
    make_cells, _, fake_store = make
    cells = make_cells(models=(DEIT,), methods=("minmax",), bits=("FP32", "W8A8", "W4A4"), seeds=(0, 13))
    for cell in cells[1:3]:
        del cell.result["ood"]["textures"]["knn"]
        cell.result["ood"]["places"]["msp"]["aupr_out"] = math.nan
        cell.result["id"]["nll"] = None
        cell.result["histograms"] = {}
        cell.result["seconds"] = cell.result["preprocess"] = cell.result["environment"] = None
        cell.result["id"]["per_class"] = cell.result["id"]["reliability"] = None
    board = board_of(fake_store(cells))
    assert not any(r[2] == "W8A8" and r[3] == "textures" and r[5] == "KNN" for r in set_rows(board))
    assert next(r for r in set_rows(board) if r[2:4] == ["W8A8", "places"])[7] == "–"
    text = render(board)
    assert not re.search(r"\bnan\b|\bNone\b|\binf\b|undefined", Page(text).words)


def test_a_result_without_anything(make):
    _, fake_cell, fake_store = make
    cells = [
        fake_cell("k", {}, result={}),
        fake_cell("l", {"model": "m", "method": "minmax", "bits": "W4A4"}, result={}),
    ]
    assert "W4A4" in render(board_of(fake_store(cells)))


def test_plan_not_finished(make):
    make_cells, _, fake_store = make
    cells = make_cells(models=(DEIT,), methods=("minmax",), bits=("FP32", "W4A4"))
    store = fake_store(cells)
    board = collect(cells, store.study() | {"planned": 19})
    assert "4 done" in render(board)
    assert "15 still to run" in render(board)


# ---- the file --------------------------------------------------------------------------------


def test_hostile_names_are_escaped_everywhere(make):
    make_cells, _, fake_store = make
    evil = "\"><script>alert(1)</script><b title='x"
    cells = make_cells(models=(evil,), methods=("</script>" + evil, "minmax"), sets={evil + "s": "far"},
    scores=("msp", evil), bits=("FP32", "W8A8", "W4A4"), seeds=(0, 1))  # fmt: skip
    for cell in cells:
        cell.result["id"]["per_class"][0]["name"] = evil
        cell.result["scores_unavailable"] = {"knn": evil}
    store = fake_store(cells, {"note": evil}, evil)
    text = render(board_of(store), title=evil)
    page = Page(text)
    scripts = [attrs for tag, attrs in page.tags if tag == "script"]
    kinds = [{"type": "application/json", "id": "data"}, {"type": "application/gzip", "id": "charts"}]
    assert scripts == [{}, *kinds]
    assert not [tag for tag, _ in page.tags if tag == "b" and dict(_).get("title")]
    assert text.count("alert(1)") > 20
    data = re.search(r'id="data">(.*?)</script>', text, re.S)[1]
    assert not set("<>&") & set(data)
    assert set(json.loads(data)["deltas"]) == {"msp", evil}


def test_nothing_is_loaded_from_anywhere(full_page):
    page = Page(full_page)
    for tag, attrs in page.tags:
        assert tag not in {"iframe", "object", "embed", "img", "base"}
        assert "style" not in attrs, "inline styles are outside the content policy"
        assert not any(name.startswith("on") for name in attrs)
        for name in ("src", "href", "action"):
            value = attrs.get(name)
            assert value is None or value.startswith(("#", "data:"))
    assert not re.search(r"@import|url\(", re.search(r"<style>(.*?)</style>", full_page, re.S)[1])


def test_policy_pins_the_very_style_and_script(full_page):
    policy = html.unescape(re.search(r'Content-Security-Policy" content="(.*?)"', full_page)[1])
    style = re.search(r"<style>(.*?)</style>", full_page, re.S)[1]
    script = re.search(r"<script>(.*?)</script>", full_page, re.S)[1]
    assert policy == content_policy(style, script, library())
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy


def test_ids_are_unique_and_links_lead_somewhere(full_page):
    page = Page(full_page)
    assert len(page.ids) == len(set(page.ids))
    targets = {attrs["href"][1:] for tag, attrs in page.tags if tag == "a"}
    assert targets <= set(page.ids)


def test_the_charts_of_the_page_are_the_figures_of_the_study(full_store, full_page):
    """Each is in the file with Vega, in the colours of the page's theme, and has an element to be drawn in."""
    block = re.search(r'<script type="application/gzip" id="charts">(.*?)</script>', full_page, re.S)[1]
    found = json.loads(gzip.decompress(base64.b64decode(block)))
    assert found["library"] == library()
    figures = [panel for _, make in FIGURES.values() for row in make(board_of(full_store)) for panel in row.panels]
    expected = sorted(json.dumps(panel.rows) for panel in figures)
    drawn = [json.dumps(spec["data"]["values"]) for spec in found["specs"]]
    assert sorted(drawn) == sorted(rows.replace("#0b62a4", "var(--c0)") for rows in expected) or len(drawn) == len(
        figures
    )
    numbers = re.findall(r'data-chart="(\d+)"', full_page)
    assert [int(n) for n in numbers] == list(range(len(figures)))
    assert "var(--c0)" in json.dumps(found["specs"])
    assert "#0b62a4" not in json.dumps(found["specs"])


def test_size_of_a_usual_report(full_page):
    assert len(full_page.encode()) < 3_000_000


def test_write_report_makes_the_file(small_store, tmp_path):
    out = write_report(small_store, tmp_path / "deep" / "r.html", title="Mine")
    assert out == tmp_path / "deep" / "r.html"
    assert "<title>Mine · quantlens</title>" in out.read_text(encoding="utf-8")
    assert [p.name for p in out.parent.iterdir()] == ["r.html"], "no temporary file is left"


@pytest.mark.slow
def test_same_store_same_file(full_store, full_page):
    assert render(board_of(full_store)) == full_page


def test_errors_say_what_to_do(make, tmp_path):
    _, _, fake_store = make
    with pytest.raises(QuantlensError, match="quantlens study"):
        write_report(fake_store([]), tmp_path / "r.html")
    with pytest.raises(StorageError, match=r"store\.sqlite"):
        write_report(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write the report"):
        write_report(fake_store(make[0](models=(DEIT,), methods=("minmax",), bits=("W4A4",), seeds=(0,),
        scores=("msp",))), tmp_path / "file" / "r.html")  # fmt: skip
    with pytest.raises(QuantlensError, match="out="):
        write_report(fake_store(make[0](models=(DEIT,), methods=(), bits=("FP32",), scores=("msp",))))


def test_the_real_store(make, tmp_path):
    store_module = pytest.importorskip("quantlens.studies.store")
    cells = make[0](models=(DEIT,), methods=("repq-vit",), bits=("FP32", "W4A4"), seeds=(0, 13))
    with store_module.Store(tmp_path) as store:
        for cell in cells:
            store.put(cell.key, cell.spec, "done", cell.result, None, 1.0)
        store.put(
            "bad",
            {"model": DEIT, "method": "repq-vit", "bits": "W2A2", "seed": 0},
            "failed",
            None,
            "ValueError: no",
        )
    out = write_report(tmp_path)
    assert out == tmp_path / "report.html"
    text = out.read_text(encoding="utf-8")
    stored = statistics.fmean(c.result["id"]["top1"] for c in cells[1:])
    assert f'<td title="2 seeds">{percent(stored)}<span' in text
    assert "ValueError: no" in text
