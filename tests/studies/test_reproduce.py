"""`reproduce`: the same cell comes out the same, what was tampered with does not, and the report says the command."""

from __future__ import annotations

import json
import shlex

import pytest

import quantlens as ql
from quantlens.cli.main import run
from quantlens.errors import QuantlensError
from quantlens.qmodel import Provenance
from quantlens.studies.compare import open_side
from quantlens.studies.reproduce import quantize_command
from quantlens.studies.runner import run_study
from quantlens.studies.store import Store

STUDY = {
    "models": ["digits-vit"],
    "methods": ["minmax", {"name": "percentile", "options": {"p": 0.99}}],
    "bits": ["W4A4"],
    "seeds": [0, 3],
    "calibration": {"source": "embedded:digits-calibration", "n": 8},
    "id": "embedded:digits-test[:60]",
    "ood": {"letters": "embedded:letters[:40]"},
    "scores": ["msp"],
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    run_study(STUDY, folder, progress=False)
    return folder


@pytest.mark.slow
def test_a_cell_comes_out_identical(directory) -> None:
    (found,) = ql.reproduce(f"{directory}:method=percentile,bits=W4A4,seed=3", progress=False)
    assert found.identical
    assert found.agrees
    assert not found.differs
    assert {"id.top1", "id.nll", "ood.letters.msp.aupr_out"} <= {metric.path for metric in found.metrics}


@pytest.mark.slow
def test_fp32_comes_out_identical(directory) -> None:
    (found,) = ql.reproduce(f"{directory}:bits=FP32", progress=False)
    assert found.identical


@pytest.mark.slow
def test_a_selection_of_several_cells_is_measured_cell_by_cell(directory) -> None:
    found = ql.reproduce(f"{directory}:method=minmax", progress=False)
    assert [one.title for one in found] == [f"digits-vit minmax W4A4 seed {seed}" for seed in (0, 3)]
    assert all(one.identical for one in found)


@pytest.mark.slow
def test_a_number_that_was_changed_does_not_agree(directory, tmp_path) -> None:
    with Store(directory) as store:
        cell = next(c for c in store.cells() if c.spec["method"] == "minmax" and c.spec["seed"] == 0)
        result = json.loads(json.dumps(cell.result))
    result["id"]["top1"] += 0.3
    file = tmp_path / "result.json"
    file.write_text(json.dumps(result))
    (found,) = ql.reproduce(file, draws=2, progress=False)
    assert not found.agrees
    assert [metric.path for metric in found.metrics if not metric.agrees] == ["id.top1"]
    assert run(["reproduce", str(file), "--quiet"]) == 1


@pytest.mark.slow
def test_a_result_file_is_made_again(tmp_path) -> None:
    model = ql.load_model("digits-vit")
    source = "embedded:digits-calibration?n=8&seed=0"
    made = ql.quantize(model, source, method="minmax", bits="W4A8", seed=0, patch_bits=4)
    sets = {
        "ood": {"letters": "embedded:letters[:30]"},
        "shift": {"corrupt": "fog:3", "more": "embedded:digits-fit[:9]"},
    }
    result = ql.evaluate(made, "embedded:digits-test[:50]", **sets, scores=["msp"])
    file = tmp_path / "result.json"
    file.write_text(json.dumps(result.to_dict()))
    (found,) = ql.reproduce(file, progress=False)
    assert found.identical
    assert {"shift.fog:3.nll", "shift.more.top1", "ood.letters.msp.auroc"} <= {metric.path for metric in found.metrics}


@pytest.mark.slow
def test_a_result_of_features_is_made_again_without_the_classifier(tmp_path) -> None:
    model = ql.load_model("digits-vit", task="features")
    made = ql.quantize(model, "embedded:digits-calibration?n=4&seed=0", method="minmax", bits="W4A8")
    result = ql.evaluate(made, "embedded:digits-test[:30]", fit="embedded:digits-fit[:60]").to_dict()
    file = tmp_path / "result.json"
    file.write_text(json.dumps(result))
    (found,) = ql.reproduce(file, progress=False)
    assert found.identical
    assert {metric.path for metric in found.metrics} == {"id.knn1", "id.linear1"}
    file.write_text(json.dumps({**result, "text_embeddings": {"n": 8}}))
    with pytest.raises(QuantlensError, match="against text embeddings, which a study does not take"):
        ql.reproduce(file, progress=False)


@pytest.mark.parametrize(
    ("about", "size", "words"),
    [
        ({"model": "hf:./vit", "checkpoint": "model.safetensors"}, 96, "hf:./vit --input-size 96 --calibration"),
        ({"model": "hf:./vit", "checkpoint": "a.pth"}, 96, "hf:./vit --weights a.pth --input-size 96 --calibration"),
        ({"model": "deit_tiny_patch16_224"}, 224, "deit_tiny_patch16_224 --calibration"),
        ({"model": "deit_tiny_patch16_224"}, 384, "deit_tiny_patch16_224 --input-size 384 --calibration"),
        ({"model": "digits-vit", "task": "features"}, 32, "digits-vit --task features --calibration"),
    ],
)
def test_the_command_of_a_checkpoint_says_what_its_name_does_not(about, size, words) -> None:
    found = Provenance(**about, calibration={"source": "images:x?n=8&seed=0"}, method="minmax", bits="W8A8")
    assert f"quantlens quantize {words} 'images:x" in quantize_command(found, "o.safetensors", (3, size, size))


def test_what_no_study_draws_is_told(tmp_path) -> None:
    model = ql.load_model("digits-vit")
    made = ql.quantize(model, _noise(), method="minmax", bits="W4A4")
    file = tmp_path / "result.json"
    file.write_text(json.dumps(ql.evaluate(made, "embedded:digits-test[:20]", reference=False).to_dict()))
    with pytest.raises(QuantlensError, match="calibrated on tensor"):
        ql.reproduce(file, progress=False)


def _noise():
    import torch

    size = ql.load_model("digits-vit").preprocess.input_size
    return torch.randn(4, *size, generator=torch.Generator().manual_seed(0))


def test_every_row_of_a_report_has_a_command_that_works(directory) -> None:
    from quantlens.report.runinfo import again
    from quantlens.studies.board import board_of

    board = board_of(directory)
    commands = dict(again(board))
    assert set(commands) == {"digits-vit FP32", *(group.name for group in board.groups)}
    for command in commands.values():
        program, name, row = shlex.split(command)
        assert (program, name) == ("quantlens", "reproduce")
        assert open_side(row).entries


@pytest.mark.slow
def test_other_images_are_not_compared(directory, tmp_path) -> None:
    with Store(directory) as store:
        result = next(c for c in store.cells() if c.spec["bits"] == "FP32").result
    result = json.loads(json.dumps(result))
    result["ood"]["letters"]["fingerprint"] = "0" * 16
    file = tmp_path / "result.json"
    file.write_text(json.dumps(result))
    with pytest.raises(QuantlensError, match="letters is not the one that was measured"):
        ql.reproduce(file, progress=False)


def test_a_place_that_is_not_there_is_told(tmp_path) -> None:
    with pytest.raises(QuantlensError, match="there is no file or folder"):
        ql.reproduce(tmp_path / "nope.json", progress=False)
