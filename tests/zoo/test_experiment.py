"""Experiments on training: what their file says, what is done and what is missing, and the effects that are found."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from quantlens.errors import QuantlensError, StorageError
from quantlens.metrics.factors import factorial_effects
from quantlens.zoo import experiment as module
from quantlens.zoo.designs import load_experiment, merged
from quantlens.zoo.experiment import Laboratory, Results, checked, effects_on, main, measurements, table

FILE = {
    "recipe": {
        "model": {"depth": 1, "width": 16, "heads": 2, "patch": 8},
        "images": {"source": "embedded:digits-train?n=96"},
        "steps": 3,
        "batch_size": 16,
        "schedule": {"rate": 1e-3},
        "averages": {"ema": 0.9},
    },
    "factors": {
        "augmentation": {"plain": {}, "moved": {"augmentation": {"crop": 2}}},
        "rate": {"slow": {}, "fast": {"schedule": {"rate": 2e-3}}},
    },
    "arms": {"longer": {"like": {"augmentation": "moved", "rate": "slow"}, "changes": {"steps": 4}}},
    "seeds": [0, 1],
    "readouts": ["weights", "ema"],
    "methods": ["minmax"],
    "bits": ["W8A8", "W4A4"],
    "calibration": {"n": 8, "seeds": [0, 1]},
    "id": {"source": "embedded:digits-test[0:64]"},
    "fit": {"source": "embedded:digits-fit"},
    "ood": {"letters": {"source": "embedded:letters[0:30]", "group": "far"}},
    "shift": ["fog:3"],
    "bound": 0.03,
    "hypotheses": [{"factor": "rate", "outcome": "id.top1", "sign": -1, "why": "a guess"}],
}


def written(folder: Path, **changes) -> Path:
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump({**FILE, **changes}, sort_keys=False))
    return path


def test_cells_are_all_levels_and_the_arms(tmp_path):
    found = load_experiment(written(tmp_path))
    names = ["plain-slow", "plain-fast", "moved-slow", "moved-fast", "longer"]
    assert [cell.name for cell in found.cells()] == names
    assert [run.name for run in found.runs()] == [f"{name}-s{seed}" for seed in (0, 1) for name in names]
    recipes = {run.name: run.recipe for run in found.runs()}
    assert (recipes["moved-fast-s1"].augmentation.crop, recipes["moved-fast-s1"].schedule.rate) == (2, 2e-3)
    assert (recipes["moved-fast-s1"].seed, recipes["moved-fast-s1"].steps) == (1, 3)
    assert (recipes["longer-s0"].steps, recipes["longer-s0"].augmentation.crop) == (4, 2)
    assert len(list(measurements(found, next(found.runs())))) == 2 * (1 + 2 * 2)


def test_changes_are_merged_key_by_key():
    told = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert merged(told, {"a": {"c": {"d": 4}}, "e": None}) == {"a": {"b": 1, "c": {"d": 4}}, "e": None}
    assert told == {"a": {"b": 1, "c": {"d": 2}}, "e": 3}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"factor": {}}, "unknown key 'factor'; did you mean 'factors'"),
        ({"factors": {"rate": {"slow": {}}}, "arms": {}}, "factor rate has 1 levels"),
        ({"factors": {"a": {"x": {}, "y": {}}, "b": {"x": {}, "z": {}}}, "arms": {}}, "two levels are called 'x'"),
        ({"arms": {"far": {"like": {"rate": "slow"}, "changes": {}}}}, "give one of each factor"),
        (
            {"arms": {"far": {"like": {"rate": "slower", "augmentation": "plain"}, "changes": {}}}},
            "rate has no level 'slower'; they are slow, fast",
        ),
        (
            {"arms": {"far": {"like": {"augmentation": "plain", "rate": "slow"}, "changes": {"stepz": 1}}}},
            "cell far: unkn",
        ),
        ({"hypotheses": [{**FILE["hypotheses"][0], "factor": "luck"}]}, "'luck', which is no factor"),
        ({"recipe": {**FILE["recipe"], "steps": 0}}, r"cell plain-slow: `steps`"),
        ({"seeds": [0, 0]}, "two trainings are called plain-slow-s0"),
        ({"methods": ["minimax"]}, "unknown method 'minimax'"),
        ({"bits": ["W4"]}, "W4"),
        ({"bits": ["FP32"]}, "FP32 is always measured"),
        ({"scores": ["mps"]}, "mps"),
        ({"shift": ["frog:3"]}, "frog"),
    ],
)
def test_a_mistake_in_the_file_is_told_before_anything_is_trained(tmp_path, changes, said):
    path = written(tmp_path, **changes)
    with pytest.raises(QuantlensError, match=said):
        checked(load_experiment(path))


def test_a_measurement_is_known_by_what_it_depends_on(tmp_path):
    def keys(**changes):
        found = load_experiment(written(tmp_path, **changes))
        return {
            (m.run.name, m.readout, m.method, m.bits, m.calibration_seed): m.key(found)
            for run in found.runs()
            for m in measurements(found, run)
        }

    plain = keys()
    assert len(set(plain.values())) == len(plain) == 10 * 10
    more = keys(bits=["W8A8", "W4A4", "W3A3"])
    assert plain.items() < more.items(), "another precision leaves all that was measured"
    other = keys(factors={**FILE["factors"], "rate": {"slow": {}, "fast": {"schedule": {"rate": 3e-3}}}})
    changed = {name for name, key in plain.items() if other[name] != key}
    assert {run for run, *_ in changed} == {"plain-fast-s0", "plain-fast-s1", "moved-fast-s0", "moved-fast-s1"}
    assert not set(keys(id={"source": "embedded:digits-test[0:32]"}).values()) & set(plain.values())


# ---- what is missing is done -----------------------------------------------------------------------------------------


@pytest.fixture
def laboratory(tmp_path, monkeypatch):
    """One that trains, and does not measure."""
    done: list[str] = []
    found = load_experiment(written(tmp_path))

    def fake(recipe, out, **_):
        done.append(f"train {out.name}")
        out.mkdir(parents=True)
        (out / "weights.safetensors").write_bytes(b"")

    def measure(self, one):
        done.append(f"{one.run.name} {one.readout} {one.method} {one.bits} {one.calibration_seed}")
        return {"key": one.key(found), **one.named(), "metrics": {"id": {"top1": 0.5}}}

    monkeypatch.setattr(module, "train", fake)
    monkeypatch.setattr(Laboratory, "measure", measure)
    return Laboratory(found, tmp_path / "runs"), done


def test_an_experiment_is_done_in_parts_and_nothing_twice(laboratory, tmp_path):
    lab, done = laboratory
    runs = list(lab.experiment.runs())
    assert not lab.run(Results(tmp_path / "r.jsonl"), runs[:1], limit=4)
    assert done == [
        "train plain-slow-s0",
        *(f"plain-slow-s0 weights {w}" for w in ("fp32 FP32 0", "minmax W8A8 0", "minmax W8A8 1")),
    ]
    calls = 0
    while not lab.run(Results(tmp_path / "r.jsonl"), runs, limit=7):
        calls += 1
    assert calls == (10 * 11 - 4) // 7
    assert len(done) == len({*done}) == 10 * 11
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert len(rows) == 100
    assert rows[0]["levels"] == {"augmentation": "plain", "rate": "slow"}
    (tmp_path / "runs" / "plain-slow-s0" / "weights.safetensors").unlink()
    assert lab.run(Results(tmp_path / "r.jsonl"), runs), "weights are not needed where all is measured"
    assert len(done) == 110


def test_the_command_lists_and_limits(laboratory, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["small.yaml", "--limit", "3", "--only", "longer-*"])
    assert capsys.readouterr().out.splitlines() == [
        "longer-s0 weights fp32 FP32: top-1 50.0 %",
        "longer-s0 weights minmax W8A8: top-1 50.0 %",
        "more is missing: call again",
    ]
    main(["small.yaml", "--list", "--only", "*-s0"])
    listed = capsys.readouterr().out.splitlines()
    assert listed[0] == "plain-slow-s0: not trained, 0 of 10 measured"
    assert Path("small-runs/longer-s0").is_dir()
    assert listed[-1] == "longer-s0: trained, 2 of 10 measured"
    for arguments, said in (
        (["none.yaml"], "experiment none.yaml does not exist"),
        (["small.yaml", "--only", "x"], "no training is called 'x'"),
        (["small.yaml", "--effects"], "plain-slow-s0 is not measured at fp32 FP32 (weights); run the experiment first"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert said in capsys.readouterr().err
    (tmp_path / "results.jsonl").write_text("{half")
    with pytest.raises(StorageError, match=r"results\.jsonl cannot be read"):
        Results(tmp_path / "results.jsonl")


# ---- effects ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def made_up(tmp_path):
    """Results in which moving pictures adds 0.04 to what four bits take, and the longer training 0.1."""
    found, results = load_experiment(written(tmp_path, seeds=[0, 1, 2])), Results(tmp_path / "made.jsonl")
    rng, rows = np.random.default_rng(0), {}
    for run in found.runs():
        fp32 = {
            readout: 0.8 + 0.1 * (run.cell.levels["rate"] == "fast") + 0.01 * rng.normal() for readout in found.readouts
        }
        for m in measurements(found, run):
            lost = 0.0 if m.method == "fp32" else 0.1 + 0.04 * (m.run.cell.levels["augmentation"] == "moved")
            lost += 0.1 * (m.method != "fp32" and run.cell.name == "longer")
            noise = 0.002 * (m.calibration_seed - 0.5) if m.method != "fp32" else 0
            rows[m.key(found)] = {**m.named(), "metrics": {"id": {"top1": fp32[m.readout] - lost + noise}}}
    results.rows = rows
    return found, results


def test_effects_are_those_of_the_change_and_arms_are_against_their_cells(made_up):
    found, results = made_up
    effects = {e.name: e for e in effects_on(found, results, "id.top1", "minmax", "W4A4")}
    assert list(effects) == ["augmentation", "rate", "augmentation x rate", "longer (like moved-slow)"]
    assert [e.estimate for e in effects.values()] == pytest.approx([-0.04, 0, 0, -0.1])
    assert [e.verdict for e in effects.values()] == ["effect", "without effect", "without effect", "effect"]
    fp32 = {e.name: e for e in effects_on(found, results, "id.top1", "fp32", "FP32", "ema")}
    assert fp32["rate"].estimate == pytest.approx(0.1, abs=0.02)
    values = table(found, results, "id.top1", "fp32", "FP32", "ema")
    assert values.shape == (3, 5)
    signs = [[-1, -1], [-1, 1], [1, -1], [1, 1]]
    assert effects_on(found, results, "id.top1", "fp32", "FP32", "ema")[:3] == factorial_effects(
        values[:, :4], signs, ["augmentation", "rate"], 0.03
    )
    relative = table(found, results, "relative_loss", "minmax", "W8A8", "weights")
    reference = table(found, results, "id.top1", "fp32", "FP32", "weights")
    np.testing.assert_allclose(relative[:, 0], 0.1 / (1 - reference[:, 0]))
    equal = effects_on(found, results, "id.top1", "minmax", "W4A4", equal="id.top1")
    assert equal[0].estimate == pytest.approx(-0.04)
    with pytest.raises(QuantlensError, match=r"plain-slow-s0 has no metric 'id\.top9'"):
        effects_on(found, results, "id.top9", "minmax", "W4A4")


# ---- for real --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_small_experiment_from_training_to_measurement(tmp_path, capsys):
    torch.set_num_threads(1)
    path = written(tmp_path, arms={}, seeds=[0], bits=["W4A4"], calibration={"n": 8}, scores=["msp", "rmahalanobis"])
    arguments = [str(path), "--out", str(tmp_path / "runs"), "--only", "plain-slow-*"]
    main(arguments)
    assert capsys.readouterr().out.splitlines()[-1] == "all is measured"
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(row["readout"], row["method"], row["bits"]) for row in rows] == [
        ("weights", "fp32", "FP32"),
        ("weights", "minmax", "W4A4"),
        ("ema", "fp32", "FP32"),
        ("ema", "minmax", "W4A4"),
    ]
    assert {"top1", "nll", "ece"} <= rows[0]["metrics"]["id"].keys()
    assert rows[0]["metrics"]["ood_mean"]["far"].keys() == {"msp", "rmahalanobis"}
    assert rows[0]["metrics"]["ood"]["letters"]["msp"].keys() == {"auroc", "aupr_out"}
    assert rows[0]["metrics"]["shift"].keys() == {"fog:3"}
    assert rows[0]["checkpoint_sha256"] == rows[1]["checkpoint_sha256"] != rows[2]["checkpoint_sha256"]
    assert rows[0]["metrics"] != rows[1]["metrics"]
    main(arguments)
    assert capsys.readouterr().out.splitlines() == ["all is measured"]
    changed = written(tmp_path, arms={}, seeds=[0], recipe={**FILE["recipe"], "steps": 4})
    with pytest.raises(SystemExit, match="2"):
        main([str(changed), "--out", str(tmp_path / "runs"), "--only", "plain-slow-*"])
    assert "is of another recipe: the file was changed; move" in capsys.readouterr().err
