"""Every figure of a study: its data are the results', and it is written as PDF, PNG and SVG."""

from __future__ import annotations

import io
import statistics
import xml.etree.ElementTree as ElementTree

import pytest
from PIL import Image

import quantlens as ql
from quantlens.errors import QuantlensError, StorageError
from quantlens.plots import FIGURES, available, cells as of_cells, draw
from quantlens.studies.board import board_of, collect

DEIT, VIT = "deit_tiny_patch16_224", "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
METHODS = ("minmax", "percentile", "repq-vit")


@pytest.fixture(scope="module")
def board(full_store):
    return collect(full_store.cells(), full_store.study())


def panels(board, figure):
    return [panel for row in FIGURES[figure][1](board) for panel in row.panels]


def of(store, model, method, bits):
    """Results of a group at a precision, in order of seed."""
    wanted = {"model": model, "method": "fp32" if bits == "FP32" else method, "bits": bits}
    return [c.result for c in store.cells() if c.result and wanted.items() <= c.spec.items()]


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_opens_as_svg(rich, name, tmp_path):
    figure = ql.plot(rich, figure=name)
    root = ElementTree.fromstring(figure.save(tmp_path / "figure.svg").read_text(encoding="utf-8"))
    assert root.tag.endswith("svg")
    assert len(root.findall(".//{*}path")) > 10
    assert figure.to_dict()["params"][0] == {"name": "score", "value": "msp"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "latency" else pytest.mark.slow) for n in FIGURES])
def test_every_figure_opens_as_pdf_and_png(rich, name, tmp_path):
    figure = ql.plot(rich, figure=name)
    pdf = figure.save(tmp_path / "figure.pdf").read_bytes()
    assert pdf.startswith(b"%PDF-")
    assert b"/Page" in pdf
    image = Image.open(io.BytesIO(figure.save(tmp_path / "figure.png").read_bytes()))
    assert image.width > 600
    assert image.height > 300
    assert len(image.convert("RGB").getcolors(1 << 24)) > 20, "more is drawn than paper"


def test_aupr_shows_means_and_deviations_of_the_results(board, full_store):
    rows = FIGURES["aupr"][1](board)
    assert [row.heading for row in rows] == ["Far and near sets", "Every OOD set"]
    assert [p.caption for p in rows[1].panels] == ["textures", "places", "flowers"]
    shown = rows[1].panels[2].rows
    assert len(shown) == 10 * 6 * 6, "scores × groups × precisions"
    for method in METHODS:
        for bits in ("FP32", "W8A4", "W4A4"):
            values = [100 * r["ood"]["flowers"]["knn"]["aupr_out"] for r in of(full_store, VIT, method, bits)]
            name = f"{VIT} · {method}"
            point = next(r for r in shown if (r["line"], r["x"], r["score"]) == (name, bits, "knn"))
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            assert point["mean"] == pytest.approx(statistics.fmean(values))
            assert point["high"] - point["mean"] == pytest.approx(spread)
            assert point["mean"] - point["low"] == pytest.approx(spread)
    chance = [layer["data"]["values"] for layer in rows[0].panels[0].spec()["layer"] if "data" in layer]
    assert {(round(r["chance"], 9), r["said"]) for rows in chance for r in rows} == {(20.0, "chance 20.0")}


def test_the_chosen_score_and_precision_are_shown(board):
    spec = draw(board, "changes", score="vim", bits="W8A4").to_dict()
    assert {p["name"]: p["value"] for p in spec["params"]} == {"score": "vim", "bits": "W8A4", "hidden": []}
    with pytest.raises(QuantlensError, match="unknown score of this study 'vimm'; did you mean 'vim'"):
        draw(board, "aupr", score="vimm")
    with pytest.raises(QuantlensError, match="unknown precision of this study 'W1A1'"):
        draw(board, "changes", bits="W1A1")


def test_sensitivity_says_what_is_missing(board):
    together, weights, activations = FIGURES["sensitivity"][1](board)
    assert together.note == "Measured at 4, 6 and 8 bits; 2, 3, 5 and 7 bits are not in the store."
    assert weights.note == "Measured at 4 and 8 bits; 2, 3, 5, 6 and 7 bits are not in the store."
    assert [p.caption for p in activations.panels] == [
        "Top-1", "NLL", "AUPR-out, mean of the far sets", "AUPR-out, mean of the near sets",
    ]  # fmt: skip
    assert [r["x"] for r in together.panels[0].rows[:4]] == ["4", "6", "8", "FP32"]


def test_sensitivity_of_one_width_is_words_only(make):
    make_cells, _, _ = make
    cells = make_cells(models=(DEIT,), methods=("minmax",), bits=("FP32", "W4A4"))
    rows = FIGURES["sensitivity"][1](collect(cells, {}))
    assert rows[0].note.startswith("No curve: only W4A4 is in the store")
    assert not any(r.panels for r in rows)


def test_changes_are_quantized_less_fp32(board, full_store):
    top1, nll, far, near = panels(board, "changes")
    assert (top1.caption, nll.detail, near.detail) == ("Δ top-1 ↑", "nats", "points · mean of the near sets")
    point = next(r for r in top1.rows if (r["line"], r["bits"]) == (f"{DEIT} · minmax", "W4A8"))
    before = of(full_store, DEIT, "minmax", "FP32")[0]["id"]["top1"]
    after = [r["id"]["top1"] for r in of(full_store, DEIT, "minmax", "W4A8")]
    assert point["mean"] == pytest.approx(100 * (statistics.fmean(after) - before))
    assert {r["score"] for r in far.rows} == set(board.scores)


def test_a_missing_value_is_a_gap_and_one_seed_has_no_error_bar(make):
    make_cells, _, _ = make
    cells = make_cells(models=(DEIT,), methods=("minmax",), bits=("FP32", "W8A8", "W4A4"), seeds=(0,))
    cells[1].result["ood"]["places"]["msp"]["aupr_out"] = float("nan")
    panel = next(p for p in panels(collect(cells, {}), "aupr") if p.caption == "places")
    rows = [r for r in panel.rows if r["score"] == "msp"]
    assert [r["mean"] is None for r in rows] == [False, True, False]
    assert rows[0]["low"] == rows[0]["mean"] == rows[0]["high"]


def test_many_models_and_methods_have_a_panel_per_model_with_one_range(make):
    make_cells, _, _ = make
    cells = make_cells(models=(DEIT, VIT), methods=("a", "b", "c", "d", "e"), bits=("FP32", "W4A4"), seeds=(0,))
    first, second = [p for p in panels(collect(cells, {}), "aupr") if p.caption == "textures"]
    assert (first.detail, second.detail) == (f"{DEIT} · far", f"{VIT} · far")
    assert {r["line"] for r in first.rows} == set("abcde")
    ghosts = [layer["data"]["values"] for layer in first.spec()["layer"] if layer["mark"].get("opacity") == 0]
    assert len(ghosts) == 2
    assert all(len(rows) == len(first.rows) + len(second.rows) for rows in ghosts)


def test_histograms_have_the_shares_of_the_stored_counts(board, full_store):
    panel = next(p for p in panels(board, "histograms") if (p.caption, p.detail) == ("minmax · places", DEIT))
    wanted = {"kind": "OOD", "precision": "quantized", "bits": "W4A4", "score": "vim"}
    row = next(r for r in panel.rows if wanted.items() <= r.items())
    stored = of(full_store, DEIT, "minmax", "W4A4")[0]["histograms"]["vim"]
    edges, counts = stored["edges"], stored["ood"]["places"]
    assert row["edge"][1:] == pytest.approx(edges, rel=1e-4)
    assert row["height"][0] == row["height"][-1] == 0
    for height, n, low, high in zip(row["height"][1:], counts, edges, edges[1:], strict=False):
        assert height * (high - low) == pytest.approx(n / sum(counts), rel=1e-3)


def test_too_many_histograms_are_left_out_and_named(make, monkeypatch):
    make_cells, _, _ = make
    cells = make_cells(methods=("minmax",), bits=("FP32", "W8A8", "W4A4"), seeds=(0,), scores=("msp", "knn", "vim"))
    monkeypatch.setattr(of_cells, "HISTOGRAMS", 4 * 6 * 4)
    (row,) = of_cells.histograms(collect(cells, {}))
    kept = {(r["score"], r["bits"]) for p in row.panels for r in p.rows}
    assert kept == {("msp", "W4A4"), ("msp", "W8A8"), ("knn", "W4A4"), ("vim", "W4A4")}, "MSP comes first"
    assert row.note == "Left out to keep the file small: KNN at W8A8, ViM at W8A8; the store has them."


def test_reliability_has_the_filled_bins(board, full_store):
    panel = next(p for p in panels(board, "reliability") if (p.caption, p.detail) == ("repq-vit", VIT))
    stored = of(full_store, VIT, "repq-vit", "W6A6")[0]["id"]
    rows = [r for r in panel.rows if r["bits"] == "W6A6"]
    filled = [i for i, n in enumerate(stored["reliability"]["count"]) if n]
    accuracy = [100 * stored["reliability"]["accuracy"][i] for i in filled]
    assert [r["accuracy"] for r in rows] == pytest.approx(accuracy, abs=1e-3)
    assert sum(r["share"] for r in rows) == pytest.approx(100, abs=0.01)
    assert rows[0]["ece"] == f"ECE W6A6 {100 * stored['ece']:.1f} %"


def test_drift_and_its_pairs_are_those_of_the_cells(rich, attention_store):
    board = board_of(rich)
    of_seeds = [c for c in attention_store.cells() if c.key.startswith(f"{DEIT}/minmax/W4A4/")]
    kl = next(
        p for p in panels(board, "drift") if p.caption.startswith("Attention rows KL") and p.detail == "ID images"
    )
    name = f"{DEIT} · minmax"
    drawn = next(r for r in kl.rows if (r["line"], r["x"]) == (name, "4"))
    assert drawn["mean"] == pytest.approx(statistics.fmean(c.result["attention"]["id"]["row_kl"] for c in of_seeds))
    scatter = panels(board, "drift-aupr")[0]
    result = next(c.result for c in of_seeds if c.spec["seed"] == 13)
    found = next(r for r in scatter.rows if r["said"].startswith(f"{name}, W4A4, seed 13:"))
    assert found["x"] == pytest.approx(1 - result["attention"]["id"]["rollout_spearman"])
    assert found["y"] == pytest.approx(100 * result["change"]["ood_mean"]["far"]["msp"]["aupr_out"])
    assert "Spearman −" in scatter.detail


def test_mixed_precision_layers_and_latency(rich):
    board = board_of(rich)
    (widths,), (front,), (layers,) = (panels(board, name) for name in ("widths", "fronts", "layers"))
    assert [r["said"] for r in widths.rows][:2] == ["blocks.0.attention: 8 bits", "blocks.0.MLP: 4 bits"]
    assert widths.detail == "sqnr; 2.50 of 3.00 MB, 1.5 s"
    assert [(r["line"], r["x"], r["y"]) for r in front.rows if r["line"] != "Pareto front"] == [
        ("one width everywhere", 1.2, 0.9), ("one width everywhere", 4.0, 0.001), ("MP4", 2.0, 0.1),
    ]  # fmt: skip
    assert [(r["line"], r["y"]) for r in layers.rows] == [
        ("linear and convolution layers", 40.0), ("attention products", 12.5), ("other sites", 30.0),
    ]  # fmt: skip
    top1, aupr = panels(board, "latency")
    assert [(r["number"], r["x"], r["y"]) for r in top1.rows] == [(1, 5.0, 70.0), (2, 9.0, 60.0)]
    assert [r["line"] for r in aupr.rows] == ["on the Pareto front", "not on it, or not evaluated"]


def test_unknown_names_and_missing_data_say_what_there_is(board, tmp_path):
    with pytest.raises(
        QuantlensError, match="unknown figure 'nothing'; choose one of aupr, changes, corruptions, drift"
    ):
        draw(board, "nothing")
    with pytest.raises(QuantlensError, match="this study holds no data for the figure 'widths'"):
        draw(board, "widths")
    assert list(available(board)) == ["aupr", "sensitivity", "changes", "histograms", "reliability"]
    with pytest.raises(StorageError, match=r"holds no store\.sqlite"):
        ql.plot(tmp_path, figure="aupr")
    with pytest.raises(QuantlensError, match="unknown format of a figure 'gif'; choose one of pdf, png, svg"):
        draw(board, "changes").save(tmp_path / "a.gif")
    assert list(tmp_path.iterdir()) == []


def test_hostile_names_stay_text(make):
    make_cells, _, _ = make
    evil = "</text><script>alert(1)</script>"
    board = collect(
        make_cells((evil,), (evil, "minmax"), bits=("FP32", "W4A4"), seeds=(0,), sets={evil: "far"}, scores=("msp",)),
        {},
    )
    for name in available(board):
        assert not ElementTree.fromstring(draw(board, name).to_bytes("svg")).findall(".//{*}script")
