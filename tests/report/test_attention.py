"""The report's section of the attention lens: its figures are the store's, its pictures are drawn from it, and what is
missing or hostile does no harm."""

from __future__ import annotations

import base64
import copy
import io
import re

import numpy as np
import pytest
from PIL import Image

from quantlens.attention import metrics, pictures
from quantlens.plots import FIGURES
from quantlens.report import attention as lens
from quantlens.report.build import render
from quantlens.studies.board import collect
from quantlens.studies.drift import drift_of, links

MODELS = ("deit_tiny_patch16_224", "vit_tiny_patch16_224.augreg_in21k_ft_in1k")


@pytest.fixture
def store(attention_store):
    return attention_store


@pytest.fixture
def few(store):
    """One model, one method, two precisions."""
    wanted = {"model": MODELS[:1], "bits": ("FP32", "W4A4"), "method": ("fp32", "minmax")}
    return type(store)([cell for cell in store.cells() if all(cell.spec[key] in of for key, of in wanted.items())])


def _section(store):
    board = collect(store.cells(), store.study())
    return board, lens.attention(board)


def test_studies_without_attention_have_no_section(small_store):
    board, section = _section(small_store)
    assert section is None
    page = render(board)
    assert 'id="attention"' not in page
    assert 'href="#attention"' not in page


@pytest.mark.slow
def test_a_gallery_for_every_image_and_a_picture_for_every_cell(store):
    board, section = _section(store)
    assert [g["key"] for g in section["pictures"]["shown"]] == [
        "id-id-0",
        "id-id-7",
        "ood-textures-0",
        "ood-textures-7",
    ]
    page = render(board)
    classes = re.findall(r'class="table gallery( alt)?"', page)
    assert classes == ["", " alt", " alt", " alt"], "the first is shown, the others can be chosen"
    gallery = section["pictures"]["shown"][0]
    assert {len(shots) for *_, shots in gallery["maps"]} == {len(board.precisions)}
    assert [(method, model) for method, model, _ in gallery["maps"]] == [(g.method, g.model) for g in board.groups]
    fp32 = board.groups[0].fp32["attention_examples"][0]
    shot = gallery["maps"][0][2][0]
    drawn = Image.open(io.BytesIO(base64.b64decode(shot["uri"].removeprefix("data:image/webp;base64,")))).convert("RGB")
    values = pictures.relative(np.reshape(fp32["rollout"], (4, 4)))
    expected = pictures.overlay(pictures.from_webp(fp32["thumbnail"]), values, section["pictures"]["scale"])
    assert np.abs(np.asarray(drawn, float) - np.asarray(expected, float)).mean() < 12
    assert (shot["label"], shot["probability"], shot["changed"]) == ("tench", "90 %", False)
    lowest = gallery["maps"][0][2][-1]
    assert lowest["changed"]
    assert "&lt;b&gt;otter" in page
    assert "<b>otter" not in page
    assert page.count('data-picture="') == 4
    assert "img-src data:" in page
    assert len(page) < 15_000_000


def test_tables_and_curves_are_the_stores_means(store):
    board, section = _section(store)
    table = section["tables"][0]
    row = table["rows"][0]
    results = board.groups[0].cells["W4A4"]
    at = board.precisions.index("W4A4")
    expected = np.mean([r["attention"]["id"]["outliers"] for r in results])
    assert float(row["cells"][at]["text"]) == pytest.approx(expected, abs=0.06)
    assert row["cells"][0]["text"] == "20.0"
    ood = np.mean([np.mean([s["row_kl"] for s in r["attention"]["ood"].values()]) for r in results])
    assert drift_of("ood", metrics.KL, board.groups[0], "W4A4").mean == pytest.approx(ood)
    curves = FIGURES["drift"][1](board)
    assert len(curves) == 3, "both, weights alone, activations alone"
    assert all(len(row.panels) % 6 == 0 for row in curves)


def test_correlation_has_one_point_per_quantized_cell(store):
    board, section = _section(store)
    cells = 2 * 2 * 5 * 2
    first = dict(zip(lens.LINK_COLUMNS, section["links"][0], strict=True))
    assert first["Cells"] == f"{cells} (20 conditions)"
    assert float(first["Spearman"].replace("−", "-")) < -0.5, "the made-up metric falls as the made-up drift grows"
    low, high = (float(t.replace("−", "-")) for t in first["95 % interval"].split(" to "))
    assert low <= float(first["Spearman"].replace("−", "-")) < high
    pairs = links(board)[0].pairs
    group, x, y = next((group, x, y) for group, bits, seed, x, y in pairs if (bits, seed) == ("W4A4", "13"))
    result = group.cells["W4A4"][1]
    assert x == pytest.approx(1 - result["attention"]["id"]["rollout_spearman"])
    assert y == pytest.approx(100 * result["change"]["ood_mean"]["far"]["msp"]["aupr_out"])
    (row,) = FIGURES["drift-aupr"][1](board)
    assert [len(panel.rows) for panel in row.panels] == [cells] * 4


def test_few_cells_give_no_correlation(few):
    board, section = _section(few)
    assert section["links"][0][3:] == ["–"] * 4
    assert "too few cells" in FIGURES["drift-aupr"][1](board)[0].panels[0].detail


@pytest.mark.slow
def test_models_without_the_lens_say_why(store):
    for cell in store.cells():
        if cell.spec["model"] == MODELS[1]:
            cell.result["attention"] = {"unavailable": "attention is computed in <windows>"}
            del cell.result["attention_examples"]
    board, section = _section(store)
    assert len(section["reasons"]) == 1
    assert "&lt;windows&gt;" in render(board)
    assert {model for _, model, _ in section["pictures"]["shown"][0]["maps"]} == {MODELS[0]}
    for cell in store.cells():
        cell.result["attention"] = {"unavailable": "no"}
    assert "Attention maps and drift" in render(_section(store)[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    [
        {"thumbnail": "AAAA"}, {"rollout": [1, 2]}, {"rollout": "x"}, {"grid": [0, 0]}, {"grid": None},
        {"norms": {"blocks.1": [float("nan")] * 16}}, {"norms": None}, {"class_name": None, "probability": None},
    ],
)  # fmt: skip
def test_damaged_examples_do_no_harm(few, damage):
    for cell in few.cells():
        for example in cell.result["attention_examples"]:
            example.update(copy.deepcopy(damage))
    assert 'id="attention"' in render(_section(few)[0])


def test_too_many_pictures_are_left_out_and_counted(few, monkeypatch):
    _, whole = _section(few)
    first = whole["pictures"]["shown"][0]
    size = sum(len(s["uri"]) for rows in (first["maps"], first["norms"]) for *_, cells in rows for s in cells)
    monkeypatch.setattr(lens, "PICTURE_BYTES", int(2.5 * size))
    board, section = _section(few)
    assert (len(section["pictures"]["shown"]), section["pictures"]["left_out"]) == (2, 2)
    assert "2 further images" in render(board)
