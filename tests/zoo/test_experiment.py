"""Experiments on training: what their file says, what is done and what is missing, and the effects that are found."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import quantlens as ql
from quantlens.errors import QuantlensError, StorageError
from quantlens.metrics.factors import factorial_effects
from quantlens.zoo.designs import load_experiment, merged
from quantlens.zoo.experiment import laboratory as module
from quantlens.zoo.experiment.command import checked, main
from quantlens.zoo.experiment.effects import effects_on, mediations_on, table
from quantlens.zoo.experiment.laboratory import Laboratory
from quantlens.zoo.experiment.mediators import MEASURED, hessian_trace, mediators
from quantlens.zoo.experiment.rows import Results, measurements
from quantlens.zoo.recipes import parse_recipe

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
        ({"judged": {"methods": ["erq"], "bits": ["W4A4"]}}, "must be among methods and bits"),
        ({"trajectory": {"methods": ["minmax"], "bits": ["W2A2"]}}, "must be among methods and bits"),
        (
            {"screening": {"like": {"rate": "slow"}, "changes": {"far": {}}}},
            r"arm screening\.far is like a level of \['rate'\]; give one of each factor",
        ),
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


WHOLE = {
    "recipe": {**FILE["recipe"], "steps": 4, "checkpoints": 1},
    "screening": {"like": {"augmentation": "plain", "rate": "slow"}, "changes": {"wide": {"model": {"width": 32}}}},
    "judged": {"methods": ["minmax"], "bits": ["W4A4"]},
    "trajectory": {"methods": ["minmax"], "bits": ["W4A4"], "images": 20},
    "mediators": {"images": 16, "probes": 1},
    "costs": {"step": 36, "measurement": 18, "trajectory": 9, "mediators": 3.6},
}


def test_screening_and_the_trajectory_are_measured_at_what_they_ask_for(tmp_path):
    found = load_experiment(written(tmp_path, **WHOLE))
    runs = {run.name: run for run in found.runs()}
    assert [cell.family for cell in found.cells()] == ["", "", "", "", "arms", "screening"]
    wide = runs["screening.wide-s0"]
    assert (wide.recipe.model.width, wide.recipe.augmentation.crop, wide.cell.levels["rate"]) == (32, 0, "slow")
    assert [(m.readout, m.method, m.bits, m.step) for m in measurements(found, wide)] == [
        (readout, method, bits, None)
        for readout in ("weights", "ema")
        for method, bits in (("fp32", "FP32"), *[("minmax", "W4A4")] * 2)
    ]
    every = [(m.readout, m.method, m.bits, m.step) for m in measurements(found, runs["longer-s0"])]
    assert every[-4:] == [
        ("step-000002", "fp32", "FP32", 2),
        ("step-000002", "minmax", "W4A4", 2),
        ("weights", "fp32", "FP32", 4),
        ("weights", "minmax", "W4A4", 4),
    ]
    assert every[5] == ("weights", "mediators", "FP32", None)
    keys = {m.key(found): m for m in measurements(found, runs["longer-s0"])}
    assert len(keys) == len(every) == 16
    for changes, concerned in (
        ({"trajectory": {**WHOLE["trajectory"], "images": 21}}, lambda m: m.step is not None),
        ({"mediators": {"images": 16, "probes": 2}}, lambda m: m.method == "mediators"),
        ({"shift": ["fog:4"]}, lambda m: m.step is None and m.method != "mediators"),
    ):
        other = load_experiment(written(tmp_path, **{**WHOLE, **changes}))
        kept = {m.key(other) for m in measurements(other, next(r for r in other.runs() if r.name == "longer-s0"))}
        assert all((key not in kept) == concerned(m) for key, m in keys.items())


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
    assert listed[4:] == [
        "longer-s0: trained, 2 of 10 measured",
        "factorial: 4 trainings, 12 steps, 40 measurements",
        "arms: 1 trainings, 4 steps, 10 measurements",
    ]
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


def test_hours_are_told_and_patterns_may_leave_out(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = {"images": FILE["recipe"]["images"], "steps": 3, "schedule": {"rate": 1e-3}}
    written(tmp_path, **{**WHOLE, "recipe": {**WHOLE["recipe"], "pretraining": own}})
    main(["small.yaml", "--list", "--only", "!*-s1"])
    listed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in listed[:-3]] == [
        *("plain-slow-s0", "plain-fast-s0", "moved-slow-s0", "moved-fast-s0", "longer-s0", "screening.wide-s0")
    ]
    # two pretrainings (plain, moved), as rates differ after them alone; 10 s of measuring a training, 4 on the way
    hours = (2 * 3 + 4 * 4) * 36 + 4 * (10 * 18 + 4 * 9 + 2 * 3.6)
    told = f"factorial: 4 trainings, 22 steps, 64 measurements, about {hours / 3600:.1f} hours"
    assert listed[-3] == f"{told}, {hours / 3600:.1f} of them missing"
    hours = (3 + 4) * 2 * 36 + 6 * 18
    assert listed[-1].startswith(f"screening: 1 trainings, 7 steps, 6 measurements, about {hours / 3600:.1f} hours")
    main(["small.yaml", "--list", "--only", "!screening.*"])
    assert "screening" not in capsys.readouterr().out


# ---- effects ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def made_up(tmp_path, request):
    """Results in which moving pictures adds 0.04 to what four bits take, and the longer training 0.1."""
    found = load_experiment(written(tmp_path, seeds=[0, 1, 2], **getattr(request, "param", {})))
    rng, rows = np.random.default_rng(0), {}
    for run in found.runs():
        carried = rng.normal() + 2 * (run.cell.levels["augmentation"] == "moved")
        fp32 = {
            readout: 0.8 + 0.1 * (run.cell.levels["rate"] == "fast") + 0.01 * rng.normal() for readout in found.readouts
        }
        for m in measurements(found, run):
            if m.method == "mediators":
                values = {name: np.exp(rng.normal()) for name in MEASURED}
                rows[m.key(found)] = {**m.named(), "metrics": {"mediators": {**values, "kurtosis": np.exp(carried)}}}
                continue
            lost = 0.0 if m.method == "fp32" else 0.1 + 0.04 * (m.run.cell.levels["augmentation"] == "moved")
            lost += 0.02 * carried * (m.method != "fp32" and m.bits == "W8A8" and found.mediators is not None)
            lost += 0.1 * (m.method != "fp32" and run.cell.name == "longer")
            noise = 0.002 * (m.calibration_seed - 0.5) if m.method != "fp32" else 0
            rows[m.key(found)] = {**m.named(), "metrics": {"id": {"top1": fp32.get(m.readout, 0.8) - lost + noise}}}
    return found, rows


def test_effects_are_those_of_the_change_and_arms_are_against_their_cells(made_up):
    (found, rows), fp32_ema = made_up, ("fp32", "FP32", "ema")
    effects = {e.name: e for e in effects_on(found, rows, "id.top1", ("minmax", "W4A4", "weights"))}
    assert list(effects) == ["augmentation", "rate", "augmentation x rate", "longer (like moved-slow)"]
    assert [e.estimate for e in effects.values()] == pytest.approx([-0.04, 0, 0, -0.1])
    assert [e.verdict for e in effects.values()] == ["effect", "without effect", "without effect", "effect"]
    fp32 = {e.name: e for e in effects_on(found, rows, "id.top1", fp32_ema)}
    assert fp32["rate"].estimate == pytest.approx(0.1, abs=0.02)
    values = table(found, rows, "id.top1", fp32_ema)
    assert values.shape == (3, 4)
    signs = [[-1, -1], [-1, 1], [1, -1], [1, 1]]
    assert effects_on(found, rows, "id.top1", fp32_ema)[:3] == factorial_effects(
        values, signs, ["augmentation", "rate"], 0.03
    )
    relative = table(found, rows, "relative_loss", ("minmax", "W8A8", "weights"))
    reference = table(found, rows, "id.top1", ("fp32", "FP32", "weights"))
    np.testing.assert_allclose(relative[:, 0], 0.1 / (1 - reference[:, 0]))
    equal = effects_on(found, rows, "id.top1", ("minmax", "W4A4", "weights"), equal="id.top1")
    assert equal[0].estimate == pytest.approx(-0.04)
    with pytest.raises(QuantlensError, match=r"plain-slow-s0 has no metric 'id\.top9'"):
        effects_on(found, rows, "id.top9", ("minmax", "W4A4", "weights"))


@pytest.mark.parametrize("made_up", [WHOLE], indirect=True)
def test_arms_that_are_not_measured_are_left_out_and_mediators_carry_what_they_carry(made_up):
    found, rows = made_up
    setting = ("minmax", "W4A4", "weights")
    names = [e.name for e in effects_on(found, rows, "id.top1", setting)]
    assert names[3:] == ["longer (like moved-slow)", "screening.wide (like plain-slow)"]
    assert len(effects_on(found, rows, "id.top1", ("minmax", "W8A8", "weights"))) == 4, "screening is at W4A4 alone"
    rows = {key: row for key, row in rows.items() if row["cell"] != "screening.wide" or row["seed"] != 2}
    assert [e.name for e in effects_on(found, rows, "id.top1", setting)] == names[:4]
    way = table(found, rows, "id.top1", setting, checkpoint=0)
    assert way.shape == (3, 4)
    carried = mediations_on(found, rows, "id.top1", ("minmax", "W8A8", "weights"))
    assert len(carried) == 2 * 6
    kurtosis = next(m for m in carried if (m.factor, m.mediator) == ("augmentation", MEASURED["kurtosis"].title))
    assert kurtosis.slope == pytest.approx(-0.02, abs=0.001), "of its logarithm"
    assert (kurtosis.verdict, kurtosis.direct.estimate) == ("effect", pytest.approx(-0.04, abs=0.002))
    with pytest.raises(QuantlensError, match=r"plain-slow-s0 is not measured at mediators FP32"):
        mediations_on(found, {k: r for k, r in rows.items() if r["method"] != "mediators"}, "id.top1", setting)


# ---- mediators -------------------------------------------------------------------------------------------------------


def test_the_trace_of_the_hessian_is_that_by_hand():
    torch.manual_seed(0)
    module, x = torch.nn.Linear(3, 4), torch.randn(64, 3)
    p = module(x).detach().softmax(-1)
    exact = float(((p * (1 - p)).sum(-1) * (1 + x.square().sum(-1))).mean())
    assert hessian_trace(module, x, probes=200) == pytest.approx(exact, rel=0.1)


@pytest.mark.slow
def test_mediators_are_those_of_the_float_model():
    recipe = parse_recipe({**FILE["recipe"], "name": "m"})
    torch.manual_seed(0)
    module = recipe.build(8).eval()
    images = torch.randn(40, 3, 32, 32)

    def measured(bits="W4A4"):
        model = ql.load_model(module, preprocess=recipe.preprocess)
        return mediators(ql.quantize(model, images[:8], "minmax", bits), module, images, prefix=1, probes=2)

    found = measured()
    assert found.keys() == MEASURED.keys()
    with torch.no_grad():
        top = module(images).topk(2).values
        assert found["margin"] == pytest.approx(float((top[:, 0] - top[:, 1]).mean()), rel=1e-4)
        eight = measured("W8A8")
        assert eight["sqnr_db"] > found["sqnr_db"] + 10
        assert {k: v for k, v in eight.items() if k != "sqnr_db"} == {k: v for k, v in found.items() if k != "sqnr_db"}
        module.blocks[0].norm1.weight[3] *= 50
        other = measured()
    assert other["channel_ratio"] > 2 * found["channel_ratio"]
    assert other["kurtosis"] > 1.5 * found["kurtosis"]
    assert 0 <= found["outlier_tokens"] < 0.2


# ---- for real --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_small_experiment_from_training_to_measurement(tmp_path, capsys):
    torch.set_num_threads(1)
    one = {"arms": {}, "bits": ["W4A4"], "calibration": {"n": 8}, "scores": ["msp", "rmahalanobis"]}
    path = written(tmp_path, **{**WHOLE, "screening": None, **one}, seeds=[0])
    arguments = [str(path), "--out", str(tmp_path / "runs"), "--only", "plain-slow-*"]
    main(arguments)
    assert capsys.readouterr().out.splitlines()[-1] == "all is measured"
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(row["readout"], row["method"], row["bits"]) for row in rows] == [
        ("weights", "fp32", "FP32"),
        ("weights", "minmax", "W4A4"),
        ("weights", "mediators", "FP32"),
        ("ema", "fp32", "FP32"),
        ("ema", "minmax", "W4A4"),
        ("ema", "mediators", "FP32"),
        ("step-000002", "fp32", "FP32"),
        ("step-000002", "minmax", "W4A4"),
        ("weights", "fp32", "FP32"),
        ("weights", "minmax", "W4A4"),
    ]
    assert [row.get("step") for row in rows[6:]] == [2, 2, 4, 4]
    assert [row["n"] for row in rows] == [64, 64, 16, 64, 64, 16, 20, 20, 20, 20]
    assert "shift" not in rows[6]["metrics"]
    assert rows[8]["checkpoint_sha256"] == rows[0]["checkpoint_sha256"] != rows[6]["checkpoint_sha256"]
    assert rows[2]["metrics"]["mediators"].keys() == MEASURED.keys()
    assert {"top1", "nll", "ece"} <= rows[0]["metrics"]["id"].keys()
    assert rows[0]["metrics"]["ood_mean"]["far"].keys() == {"msp", "rmahalanobis"}
    assert rows[0]["metrics"]["ood"]["letters"]["msp"].keys() == {"auroc", "aupr_out"}
    assert rows[0]["metrics"]["shift"].keys() == {"fog:3"}
    assert rows[0]["checkpoint_sha256"] == rows[1]["checkpoint_sha256"] != rows[3]["checkpoint_sha256"]
    assert rows[0]["metrics"] != rows[1]["metrics"]
    main(arguments)
    assert capsys.readouterr().out.splitlines() == ["all is measured"]
    changed = written(tmp_path, arms={}, seeds=[0], recipe={**FILE["recipe"], "steps": 5})
    with pytest.raises(SystemExit, match="2"):
        main([str(changed), "--out", str(tmp_path / "runs"), "--only", "plain-slow-*"])
    assert "is of another recipe: the file was changed; move" in capsys.readouterr().err


@pytest.mark.slow
def test_a_training_is_checked_by_doing_it_again(tmp_path, capsys):
    """The same twice; and what is not the same is told."""
    torch.set_num_threads(1)
    factors = {"augmentation": FILE["factors"]["augmentation"]}
    small = {"arms": {}, "factors": factors, "hypotheses": [], "readouts": ["weights"], "calibration": {"n": 8}}
    path = written(tmp_path, **small, bits=["W4A4"], shift=[], ood={}, scores=["msp"], primary=["id.top1", "id.nll"])
    arguments = [str(path), "--out", str(tmp_path / "runs")]
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--check", "plain-s0"])
    assert "plain-s0 is not measured at fp32 FP32 (weights); run the experiment first" in capsys.readouterr().err
    main(arguments)
    capsys.readouterr()
    main([*arguments, "--check", "plain-s0"])
    head, *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[:3] for line in lines] == [
        [method, bits, f"id.{outcome}"]
        for method, bits in (("fp32", "FP32"), ("minmax", "W4A4"))
        for outcome in ("top1", "nll")
    ]
    assert all(line.split("\t")[3] == line.split("\t")[4] and line.endswith("yes") for line in lines)
    assert (head.count("\t"), last) == (6, "all are within 3 standard deviations over seeds")
    results = tmp_path / "results.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    rows[1]["metrics"]["id"]["nll"] += 50
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit, match="1"):
        main([*arguments, "--check", "plain-s0", "--within", "0.5"])
    told = capsys.readouterr()
    assert [line.split("\t")[-1] for line in told.out.splitlines()[1:]] == ["yes", "yes", "yes", "no"]
    assert "1 outcomes are more than 0.5 standard deviations over seeds away" in told.err
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--check", "plain-*"])
    assert "--check is of one training, and 2 are called so" in capsys.readouterr().err


def test_two_processes_add_to_one_file(tmp_path):
    """Each opened it before the other wrote."""
    one, two = Results(tmp_path / "r.jsonl"), Results(tmp_path / "r.jsonl")
    for number, results in enumerate((one, two, one, two)):
        results.add({"key": str(number), "metrics": {}})
    assert set(Results(tmp_path / "r.jsonl").rows) == {"0", "1", "2", "3"} == set(two.rows)
