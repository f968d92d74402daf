"""The report's section on the operating point: numbers of the outputs, pictures of the flips, hostile names."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from quantlens.data import open_source
from quantlens.evaluation import outputs as kept
from quantlens.report import operating as page
from quantlens.report.operating import section
from quantlens.report.tables import class_tables
from quantlens.studies.board import Board, Group

COLOURS = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (0, 250, 250), (250, 0, 250)]
LABELS = np.array([0, 0, 0, 1, 1, 1])
FP32 = np.array([0, 0, 1, 1, 1, 0])
W4A4 = np.array([0, 1, 0, 1, 0, 0])  # images 1 and 4 are lost, image 2 is gained
HOSTILE = "<script>alert(1)</script>, <b>"


def outputs(predicted: np.ndarray, source, bits: str, level: float) -> kept.Outputs:
    logits = level * np.eye(2)[predicted] + np.linspace(0, 0.1, 6)[:, None] * np.eye(2)[predicted]
    found = kept.of_images(logits, LABELS, False, ["crane, bird", HOSTILE])
    msp = found["confidence"]
    about = {"model": "m", "method": "minmax", "bits": bits, "seed": 0, "n_bins": 15, "id": {"fingerprint": "f"}}
    return kept.Outputs(
        **found,
        names=list(source.names),
        id_scores={"msp": msp},
        ood_scores={"textures": {"msp": msp[:4] - 0.05}},
        about=about | {"ood": {"textures": {"fingerprint": "t", "group": "far"}}},
    )


@pytest.fixture
def board(tmp_path: Path) -> Board:
    for k, colour in enumerate(COLOURS):
        path = tmp_path / "images" / f"class{LABELS[k]}" / f"<i>{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (200, 100), colour).save(path)
    source = open_source(f"imagefolder:{tmp_path / 'images'}")
    results = {}
    for bits, predicted, level in (("FP32", FP32, 3.0), ("W4A4", W4A4, 2.0)):
        path = kept.path_of(tmp_path, bits)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(kept.pack(outputs(predicted, source, bits, level)))
        hits = predicted == LABELS
        listed = [{"class": c, "name": str(c), "n": 3, "top1": float(hits[c == LABELS].mean())} for c in (0, 1)]
        part = {"source": source.spec, "fingerprint": source.fingerprint(), "n": 6, "top1": 0.5, "per_class": listed}
        ood = {"textures": {"group": "far", "msp": {"aupr_out": 0.5}}}
        results[bits] = {"model": "m", "seed": 0, "id": part, "ood": ood, "cell_key": bits}
    group = Group("m", "minmax", {}, cells={"W4A4": [results["W4A4"]]}, fp32=results["FP32"], fp32_own=True)
    return Board([group], [], [], {}, directory=tmp_path)


def test_flips_are_shown_with_their_pictures_and_answers(board: Board) -> None:
    shown = section(board)
    assert shown is not None
    ((*names, n, lost, gained, other, same),) = shown["flips"].rows
    assert (names[-2:], n, lost, gained, other, same) == (["W4A4", "1"], "6", "2", "1", "0", "50.0")
    (gallery,) = shown["galleries"]
    assert [cell["flip"].index for cell in gallery["cells"]] in ([1, 4, 2], [4, 1, 2])
    for cell in gallery["cells"]:
        picture = Image.open(io.BytesIO(base64.b64decode(cell["uri"].partition(",")[2]))).convert("RGB")
        assert picture.size == (96, 48)
        pixel = np.array(picture.getpixel((48, 24)))
        assert np.abs(pixel - np.array(COLOURS[cell["flip"].index])).max() < 40, "the picture of another image"
    first = {cell["flip"].index: cell for cell in gallery["cells"]}[1]
    assert first["said"]["truth"] == "crane"
    assert first["said"]["before"].startswith("crane 9")
    assert first["said"]["change"].startswith("−")
    assert shown["pictures"] == ""


def test_tables_hold_every_metric_with_both_settings(board: Board) -> None:
    shown = section(board)
    assert shown is not None
    assert [row[3] for row in shown["confidence"].rows] == ["coverage ↑", "selective accuracy ↑"]
    ((score, table),) = shown["scores"]
    assert (score, [row[3] for row in table.rows]) == ("msp", ["false alarms ↓", "misses ↓, textures"])
    coverage = shown["confidence"].rows[0]
    assert len(coverage) == len(shown["confidence"].columns) == 11
    assert coverage[4] == "100.0"  # 90 % of six images are six
    assert coverage[5] == "0.0", "every confidence fell below the cut of FP32"
    assert coverage[8] == "100.0"
    assert shown["confidence"].rows[1][4:9] == ["66.7", "–", "–", "–", "50.0"]


def test_classes_get_intervals_that_say_few(board: Board) -> None:
    shown = section(board)
    assert shown is not None
    (table,) = class_tables(board, shown["losses"])
    assert table["intervals"]
    assert all(row[-1].endswith("(few images)") for row in table["rows"])
    (bare,) = class_tables(board)
    assert [row[:-1] for row in table["rows"]] == bare["rows"]


def test_pictures_are_bounded_and_their_absence_has_a_reason(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "PICTURE_BYTES", 1)
    shown = section(board)
    assert shown is not None
    assert [bool(cell["uri"]) for cell in shown["galleries"][0]["cells"]] == [True, False, False]
    assert shown["pictures"] == "2 images are shown without a picture: so that this file stays small."
    monkeypatch.undo()
    assert board.directory is not None
    (board.directory / "images" / "class0" / "<i>0.png").unlink()
    shown = section(board)
    assert shown is not None
    assert not any(cell["uri"] for cell in shown["galleries"][0]["cells"])
    assert "does not hold the images that were evaluated" in shown["pictures"]


def test_a_name_that_is_no_text_is_written_out_and_found(board: Board) -> None:
    name = b"class0/\xff.png".decode("utf-8", "surrogateescape")
    from quantlens.evaluation.operating import printable

    assert printable(name) == "class0/\\udcff.png"
    shown = section(board)
    assert shown is not None
    flip = shown["galleries"][0]["cells"][0]["flip"]
    moved = ["skipped", *open_source(shown and board.groups[0].fp32["id"]["source"]).names]
    assert page._place(moved, flip) == flip.index + 1


@pytest.mark.slow
def test_names_are_escaped_in_the_page(board: Board) -> None:
    from quantlens.report.page import render

    shown = section(board)
    text = render("operating.html.j2", operating=shown, scores=[("msp", "MSP")])
    assert HOSTILE not in text
    assert "<i>" not in text
    assert "&lt;i&gt;1.png" in text
    assert text.count("<img") == 3
