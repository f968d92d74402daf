"""Per-image outputs of a study, and the comparison of what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from study_fakes import FakeBackend, FakeModel, config, quantized

from quantlens.errors import QuantlensError, StorageError, UnknownNameError
from quantlens.evaluation import outputs as kept
from quantlens.evaluation.compare import ID_METRICS, OOD_METRICS, Wanted, point
from quantlens.evaluation.differences import NOT_SIGNIFICANT, SIGNIFICANT, UNCORRECTED
from quantlens.evaluation.run import evaluate
from quantlens.studies.compare import compare, match, open_side
from quantlens.studies.runner import run_study
from quantlens.studies.store import Store


def study(out: Path, **changes: object) -> Path:
    run_study(config(**changes), out, progress=False, backend=FakeBackend(out.parent / "log"))
    return out


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    ood = {"letters": {"source": "embedded:letters[0:40]", "group": "near"}, "other": "embedded:digits-held-out[0:40]"}
    return study(tmp_path_factory.mktemp("study") / "store", ood=ood)


# ---- outputs ---------------------------------------------------------------------------------------------------------


def test_every_cell_keeps_its_outputs_and_they_give_its_metrics(store: Path) -> None:
    cells = Store(store).cells()
    assert {p.stem for p in (store / "outputs").iterdir()} == {cell.key for cell in cells}
    for cell in cells:
        one = kept.read(kept.path_of(store, cell.key), logits=True)
        assert one.logits is not None
        assert one.logits.dtype == np.float16
        assert one.logits.shape == (100, 8)
        found = point(one, Wanted(("letters", "other"), ("msp", "energy")))
        for metric in ID_METRICS:
            assert found[f"id.{metric}"] == pytest.approx(cell.result["id"][metric], abs=1e-14)
        for name in ("letters", "other"):
            for score in ("msp", "energy"):
                for metric in OOD_METRICS:
                    expected = cell.result["ood"][name][score][metric]
                    assert found[f"ood.{name}.{score}.{metric}"] == pytest.approx(expected, abs=1e-14)
        mean = cell.result["ood_mean"]["near"]["msp"]["auroc"]
        assert found["ood_mean.near.msp.auroc"] == pytest.approx(mean, abs=1e-14)
        assert one.about["ood"]["letters"]["fingerprint"] == cell.result["ood"]["letters"]["fingerprint"]


def test_what_is_kept_changes_no_key_and_runs_nothing_again(tmp_path: Path) -> None:
    small = {"methods": ["minmax"], "bits": ["W8A8"], "seeds": [0]}
    out = study(tmp_path / "out", outputs=False, **small)
    keys = {cell.key for cell in Store(out).cells()}
    assert not (out / "outputs").exists()
    study(out, outputs="scores", **small)
    assert {cell.key for cell in Store(out).cells()} == keys
    assert not (out / "outputs").exists(), "finished cells were run again"
    other = study(tmp_path / "other", outputs="scores", **small)
    assert kept.read(next((other / "outputs").iterdir()), logits=True).logits is None
    with pytest.raises(QuantlensError, match="outputs"):
        config(outputs="logits")


def test_scores_stay_apart_and_large_logits_stay_finite(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 9)
    close = 1 - np.arange(9) * 1e-12
    scores = {"msp": close, "energy": np.arange(9.0)}
    about = {"model": "m", "method": "fp32", "bits": "FP32", "seed": 0, "n_bins": 15, "id": {}, "ood": {"o": {}}}
    logits = 1e6 * rng.normal(size=(9, 3)).astype(np.float32)
    one = kept.Outputs(
        **kept.of_images(logits, labels, True),
        id_scores=scores,
        ood_scores={"o": {name: values[:4] for name, values in scores.items()}},
        about=about,
    )
    (tmp_path / "o.npz").write_bytes(kept.pack(one))
    back = kept.read(tmp_path / "o.npz", logits=True)
    assert np.array_equal(back.id_scores["msp"], close)
    assert list(back.id_scores) == ["msp", "energy"]
    assert np.array_equal(back.ood_scores["o"]["msp"], close[:4])
    assert np.array_equal(back.logits, logits)


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "pickle", "shape", "newer"])
def test_damaged_files_are_named_with_a_cure(tmp_path: Path, store: Path, damage: str) -> None:
    source = next((store / "outputs").iterdir())
    path = tmp_path / "damaged.npz"
    content = source.read_bytes()
    with np.load(source) as file:
        arrays = {name: file[name] for name in file.files}
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage in ("empty", "text"):
        path.write_bytes(b"" if damage == "empty" else b"no zip at all")
    elif damage == "pickle":
        np.savez(path, **{**arrays, "rank": np.array([{}], dtype=object)})
    elif damage == "shape":
        np.savez(path, **{**arrays, "rank": arrays["rank"][:3]})
    else:
        about = json.loads(bytes(arrays["about"]).decode()) | {"format": 99}
        np.savez(path, **{**arrays, "about": np.frombuffer(json.dumps(about).encode(), np.uint8)})
    with pytest.raises(StorageError, match=r"newer quantlens" if damage == "newer" else "damaged.*another --out"):
        kept.read(path)
    with pytest.raises(StorageError, match=r"no per-image outputs.*--keep"):
        kept.read(tmp_path / "none.npz")


def test_means_are_over_the_sets_that_both_sides_saw(tmp_path: Path) -> None:
    small = {"methods": ["minmax"], "bits": ["W8A8"], "seeds": [0], "scores": ["msp"]}
    sets = {"a": "embedded:letters[0:20]", "b": "embedded:letters[20:40]", "c": "embedded:letters[40:60]"}
    first = study(tmp_path / "first", ood=sets, **small)
    second = study(tmp_path / "second", ood={**sets, "c": "embedded:letters[40:55]"}, **small)
    found = metrics(compare(first, second, resamples=300), 1)
    mean = found["ood_mean.far.msp.auroc"]
    assert mean.a == pytest.approx((found["ood.a.msp.auroc"].a + found["ood.b.msp.auroc"].a) / 2)
    assert (mean.difference, mean.low, mean.high) == (0, 0, 0)
    assert "ood.c.msp.auroc" not in found
    alone = compare(first, study(tmp_path / "third", ood={"a": sets["a"]}, **small), resamples=300)
    assert not any(path.startswith("ood_mean") for path in metrics(alone))


# ---- compare ---------------------------------------------------------------------------------------------------------


def metrics(comparison, group: int = 0):
    return {one.path: one for one in comparison.groups[group].metrics}


def test_a_against_itself_is_never_significant(store: Path) -> None:
    found = compare(store, store, scores=["all"], resamples=300)
    assert len(found.groups) == 5, "FP32 and 2 methods x 2 precisions"
    assert [len(group.seeds) for group in found.groups] == [1, 2, 2, 2, 2]
    assert not found.unpaired
    for group in found.groups:
        for one in group.metrics:
            assert (one.difference, one.low, one.high, one.p) == (0, 0, 0, 1)
            assert one.verdict == NOT_SIGNIFICANT
        assert any(one.path == "ood.other.energy.fpr95_id" for one in group.metrics)


def test_a_large_difference_is_significant_and_points_are_the_stores(store: Path) -> None:
    found = compare(f"{store}:bits=FP32", f"{store}:method=minmax,bits=W3A3", resamples=2000)
    (group,) = found.groups
    assert group.title == {"model": "fake", "method": "fp32 → minmax", "bits": "FP32 → W3A3"}
    assert group.seeds == [[0, 0], [0, 13]]
    nll = metrics(found)["id.nll"]
    cells = {(c.spec["method"], c.spec["bits"], c.spec["seed"]): c.result for c in Store(store).cells()}
    mean = np.mean([cells["minmax", "W3A3", s]["id"]["nll"] for s in (0, 13)])
    assert nll.a == cells["fp32", "FP32", 0]["id"]["nll"]
    assert nll.b == pytest.approx(mean)
    assert nll.difference == pytest.approx(nll.b - nll.a)
    assert nll.low < nll.difference < nll.high
    assert {one.verdict for one in group.metrics} <= {SIGNIFICANT, UNCORRECTED, NOT_SIGNIFICANT}
    back = compare(f"{store}:method=minmax,bits=W3A3", f"{store}:bits=FP32", resamples=2000)
    assert metrics(back)["id.nll"].low == pytest.approx(-nll.high)
    assert all(f.p_holm >= f.p for f in group.metrics)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["groups"][0]["metrics"][0]["verdict"]


def test_a_known_difference_is_found(tmp_path: Path) -> None:
    """A model whose classifier is noise against one that works."""
    sets = {"id": "embedded:digits-test[0:100]", "ood": {"letters": "embedded:letters[0:40]"}}
    noise = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    broken = FakeModel(weight=noise, method="minmax", bits="W8A8")
    results = {}
    for name, model in (("a", FakeModel()), ("b", broken), ("c", quantized(FakeModel(), "W16A16"))):
        results[name] = result = evaluate(
            model, **sets, scores=["msp"], keep="scores", cache_dir=False, reference=False
        )
        (tmp_path / f"{name}.npz").write_bytes(kept.pack(result.outputs))
        result.save_json(tmp_path / f"{name}.json")
        assert "outputs" not in result.to_dict()
    found = compare(tmp_path / "a.npz", tmp_path / "b.npz", resamples=2000)
    top1 = metrics(found)["id.top1"]
    assert top1.verdict == SIGNIFICANT
    assert top1.high < 0
    near = compare(tmp_path / "a.npz", tmp_path / "c.npz", resamples=2000)
    assert metrics(near)["id.top1"].verdict == NOT_SIGNIFICANT
    bare = compare(tmp_path / "a.json", tmp_path / "b.json")
    assert metrics(bare)["id.top1"].difference == pytest.approx(top1.difference)
    assert metrics(bare)["id.top1"].verdict is None
    assert "--keep" in bare.groups[0].without_interval
    held = compare(results["a"], results["b"], resamples=2000)
    assert metrics(held).keys() == metrics(found).keys()
    for path, one in metrics(held).items():
        numbers = (one.difference, one.low, one.high, one.p_holm)
        other = metrics(found)[path]
        assert numbers == pytest.approx((other.difference, other.low, other.high, other.p_holm)), path
    assert (held.a, held.b) == ("fake FP32", "fake minmax W8A8, seed 0")


def test_what_pairs_and_what_does_not(store: Path) -> None:
    def pairs(a: str, b: str) -> tuple[list[str], list[str]]:
        found, left = match(open_side(f"{store}{a}"), open_side(f"{store}{b}"))
        return [f"{x} / {y}" for one in found for x, y in one.pairs], left

    found, left = pairs(":method=minmax,bits=W3A3", ":method=percentile,bits=W3A3,seed=13")
    assert found == ["fake minmax W3A3 seed 13 / fake percentile W3A3 seed 13"]
    assert left == ["fake minmax W3A3 seed 0 (A)"]
    found, left = pairs(":method=minmax", ":method=percentile")
    assert len(found) == 4
    assert not left
    found, _ = pairs(":method=minmax,seed=0,bits=W3A3", ":method=minmax,seed=13,bits=W3A3")
    assert found == ["fake minmax W3A3 seed 0 / fake minmax W3A3 seed 13"]
    found, left = pairs(":bits=FP32", "")
    assert len(found) == 8
    found, left = pairs(":method=minmax,seed=0,seed=13", "")
    assert len(found) == 4
    assert len(left) == 5
    with pytest.raises(UnknownNameError, match="did you mean 'minmax'"):
        open_side(f"{store}:method=minmx")
    with pytest.raises(UnknownNameError, match="did you mean 'method'"):
        open_side(f"{store}:methods=minmax")
    with pytest.raises(QuantlensError, match="is all of"):
        open_side(f"{store}:bits=FP32,method=minmax")
    with pytest.raises(StorageError, match="no study in"):
        open_side(store / "nothing")


def test_cells_without_outputs_are_compared_without_intervals(store: Path, tmp_path: Path) -> None:
    small = {"methods": ["minmax"], "bits": ["W8A8"], "seeds": [0], "ood": {"letters": "embedded:letters[0:40]"}}
    bare = study(tmp_path / "bare", outputs=False, **small)
    found = compare(bare, bare)
    assert all("were not kept" in group.without_interval for group in found.groups)
    assert metrics(found)["id.top1"].difference == 0
    other = study(tmp_path / "other", id="embedded:digits-test[0:90]", **small)
    with pytest.raises(QuantlensError, match="different ID images"):
        compare(bare, other)
    sets = study(tmp_path / "sets", **{**small, "ood": {"letters": "embedded:letters[0:30]"}})
    found = compare(bare, sets)
    assert "OOD set letters" in found.notes[0]
    assert not any(path.startswith("ood") for path in metrics(found))


def test_too_few_resamples_for_many_figures_is_said(store: Path) -> None:
    found = compare(store, store, scores=["all"], resamples=100)
    assert "--resamples" in found.notes[-1]
