"""The page on what in training decides: its tables and figures say what is in a file of results, here a made-up one."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from quantlens.zoo.designs import load_experiment
from quantlens.zoo.experiment.mediators import MEASURED
from quantlens.zoo.experiment.rows import MEDIATORS, measurements

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.fixture(scope="module")
def finding():
    spec = importlib.util.spec_from_file_location("docs_finding", DOCS / "finding.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["docs_finding"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["docs_finding"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The experiment with results, in which augmentation saves 5 points of top-1, carried by the margin, and nothing
    else does anything; of the screening registers are measured, and save 20."""
    path = tmp_path_factory.mktemp("made")
    shutil.copy(DOCS.parent / "research" / "training-factors" / "experiment.yaml", path)
    experiment, rng, lines = load_experiment(path / "experiment.yaml"), np.random.default_rng(0), []
    for run in experiment.runs():
        if run.cell.family == "screening" and "registers" not in run.name:
            continue
        margin = 2 * (run.cell.levels["augmentation"] == "augmented") + 0.2 * rng.normal()
        for m in measurements(experiment, run):
            change = 0.0 if m.method == "fp32" else -0.2 + 0.025 * margin + 0.2 * ("registers" in run.name)
            change += 0.001 * rng.normal() - (m.step or 0) * 1e-5 * (m.method != "fp32")
            found = {"auroc": 0.8 + 0.01 * rng.normal()}
            metrics = {"id": {"top1": 0.7 + change}, "ood_mean": {"near": {"msp": found}, "far": {"msp": found}}}
            if m.method == MEDIATORS:
                values = {name: float(np.exp(0.1 * rng.normal())) for name in MEASURED} | {"margin": margin}
                metrics = {MEDIATORS: values}
            lines.append(json.dumps({"key": m.key(experiment), **m.named(), "metrics": metrics}))
    (path / "results.jsonl").write_text("\n".join(lines) + "\n")
    return path


def table(head, rows):
    assert {len(row) for row in rows} == {len(head)}
    return "\n".join("|".join(row) for row in rows)


def test_without_results_the_command_is_told(finding, folder, tmp_path):
    shutil.copy(folder / "experiment.yaml", tmp_path)
    assert finding.finding(tmp_path) is None
    assert finding.draw(tmp_path, tmp_path) == []
    some = (folder / "results.jsonl").read_text().splitlines()[:300]
    (tmp_path / "results.jsonl").write_text("\n".join(some))
    finding.finding.cache_clear()
    assert finding.finding(tmp_path) is None, "a part is no finding"
    assert "`python -m quantlens.zoo.experiment research/training-factors/experiment.yaml" in finding.MISSING


@pytest.fixture(scope="module")
def made(finding, folder):
    return finding.finding(folder)


@pytest.fixture
def marks(finding, made, monkeypatch):
    monkeypatch.setattr(finding, "finding", lambda folder=None: made)
    return finding.marks(table)


def test_tables_have_effects_with_verdicts_and_what_was_expected(made, marks):
    effects = {tuple(line.split("|")[:2]): line.split("|")[2:] for line in marks["training-effects"]().splitlines()}
    assert len(effects) == 9
    for told in effects["augmentation", "top-1"][1:]:
        low, high = (float(one) for one in re.findall(r"\+([\d.]+)", told)[1:])
        assert told.startswith("**+")
        assert low < 5 < high
    assert effects["augmentation", "top-1"][0] == "+"
    assert effects["pretraining", "top-1"][0] == "none"
    assert all(told.endswith(", without effect") for told in effects["end rate", "top-1"][1:])
    carried = {tuple(line.split("|")[:2]): line.split("|")[2:] for line in marks["training-mediators"]().splitlines()}
    assert [key for key, told in carried.items() if told[0].startswith("**")] == [("augmentation", "logit margin")]
    arms = {tuple(line.split("|")[:2]): line.split("|")[2:] for line in marks["training-arms"]().splitlines()}
    names = ["longer (like pretrained-augmented-decayed)", "registers (like scratch-augmented-decayed)"]
    assert {name for name, _ in arms} == set(names)
    assert len(arms) == 6
    settings = len(made.experiment.judged_settings)
    saved = [float(told.split()[0].removeprefix("**+")) for told in arms[names[1], "top-1"]]
    assert saved == pytest.approx([20] * settings, abs=2)
    cells = [line.replace("−", "-").split("|") for line in marks["training-cells"]().splitlines()]
    assert len(cells) == 24
    assert cells[0][:2] == ["top-1", "scratch, plain, decayed"]
    for row, expected in ((cells[0], [70, *[-20] * settings]), (cells[8], [80, *[0] * settings])):
        assert [float(value.split(" ± ")[0]) for value in row[2:]] == pytest.approx(expected, abs=3)
    assert marks["training-status"]() == ""


@pytest.mark.slow
def test_figures_are_drawn_and_linked(finding, marks, tmp_path):
    drawn = finding.draw(images=tmp_path)
    assert [path.name for path in drawn] == [
        "training-effects.svg",
        "training-trajectory.svg",
        "training-mediators.svg",
    ]
    effects, trajectory, mediators = (path.read_text(encoding="utf-8") for path in drawn)
    for text, words in ((effects, "AUROC, near OOD"), (trajectory, "steps of the last phase"), (mediators, "margin")):
        assert words in text
    for mark in finding.FIGURES:
        assert f"](images/{finding.image(mark)})" in marks[mark]()


def test_every_mark_of_the_page_is_known(finding):
    page = (DOCS / "training-factors.md").read_text(encoding="utf-8")
    assert re.findall(r"<!-- generated: ([\w-]+) -->", page) == [
        "training-status",
        "training-effects-figure",
        "training-effects",
        "training-cells",
        "training-arms",
        "training-trajectory-figure",
        "training-mediators-figure",
        "training-mediators",
    ]
    assert {*finding.marks(table)} == {*re.findall(r"<!-- generated: ([\w-]+) -->", page)}
