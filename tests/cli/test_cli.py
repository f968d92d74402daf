"""The command line from outside: what it prints, where, and how it ends."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quantlens.cli import _common
from quantlens.data import load_images
from quantlens.errors import QuantlensError

COMMANDS = (
    *("demo", "quantize", "allocate", "evaluate", "attention", "export", "verify", "predict", "bench"),
    *("study", "report", "methods", "models", "sources"),
)


def program(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "quantlens", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "100", **environment},
    )


# ---- help ------------------------------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy() -> None:
    """Which is why it is quick (benchmarks/quality, cli/help)."""
    code = (
        "import sys\n"
        "from quantlens.cli import main\n"
        "assert main.run(['--help']) == 0\n"
        "heavy = {'torch', 'timm', 'numpy', 'scipy', 'sklearn', 'pydantic', 'yaml', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for command in COMMANDS:
        assert command in run.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_examples(run, command: str) -> None:
    code, out, err = run(command, "--help")
    assert (code, err) == (0, "")
    assert "Examples" in out
    assert f"    quantlens {command}" in out


def test_version(run) -> None:
    from quantlens import __version__

    assert run("--version") == (0, f"quantlens {__version__}\n", "")


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["stdy"], "No such command 'stdy'"),
        (["demo", "--sedes", "1"], "--sedes"),
        (["demo", "--seeds", "one"], "--seeds 'one': write whole numbers"),
        (["demo", "--methods", "repq-vitt"], "did you mean 'repq-vit'"),
        (["demo", "--bits", "W1A8"], "2 to 10"),
        (["evaluate", "digits-vit"], "Missing option '--id'"),
        (["evaluate", "digits-vit", "--id", "x", "--ood", "letters"], "--ood 'letters': write --ood NAME=SOURCE"),
        (["evaluate", "digits-vit", "--id", "x", "--ood", "a=b", "--ood", "a=c"], "gives 'a' twice"),
        (["evaluate", "digits-vit", "--id", "x", "--near", "far"], "unknown OOD set 'far'"),
        (["evaluate", "digits-vit", "--id", "x", "--shift", "a=b", "--shift", "a=c"], "--shift gives 'a' twice"),
        (["evaluate", "digits-vit", "--id", "x", "--scores", "mps"], "did you mean 'msp'"),
        (["evaluate", "absent.safetensors", "--id", "x"], "absent.safetensors does not exist"),
        (["evaluate", "digits-vit", "--id", "x", "--device", "gpu"], "unknown device 'gpu'"),
        (["evaluate", "deit_tinny_patch16_224", "--id", "x"], "did you mean 'deit_tiny_patch16_224'"),
        (["quantize", "digits-vit", "--calibration", "embedded:digits-tset"], "did you mean 'digits-test'"),
        (["quantize", "digits-vit", "--calibration", "embedded:letters", "--n", "9999"], "asks for 9999 images"),
        (["quantize", "digits-vit", "--calibration", "embedded:letters?n=3", "--n", "4"], "leave one of them out"),
        (["quantize", "digits-vit", "--calibration", "embedded:letters", "--bits", "4"], "bits '4' not understood"),
        (["quantize", "digits-vit", "--calibration", "embedded:letters", "-o", "k"], "--option 'k': write --option"),
        (["quantize", "digits-vit", "--calibration", "embedded:letters", "-o", "hed_bits=3"], "'head_bits'"),
        (["quantize", "d.safetensors", "--calibration", "embedded:letters"], "d.safetensors is a file or folder"),
        (["quantize", "digits-vit", "--calibration", "embedded:letters", "--out", "q.txt"], "end in .safetensors"),
        (["quantize", "digits-vit", "--calibration", "embedded:letters", "--device", "meta"], "unknown device 'meta'"),
        (["quantize", "digits-vit", "--calibration", "embedded:letters", "--weights", ""], "weights is an empty text"),
        (["quantize", "digits-vit", "--calibration", "embedded:letters", "--bits", "4" * 5000], "…44444"),
        (["recommend", "model.onnx", "--id", "embedded:letters", "-q"], "model.onnx is a file or folder"),
        (["study", "absent.yaml"], "absent.yaml does not exist"),
        (["report", "absent"], "absent holds no store.sqlite"),
        (["methods", "adaround-ish"], "unknown method"),
        (["models", "--filter", "nothing_like_this*"], "no model matches"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line_and_exit_code_2(run, tmp_path, monkeypatch, arguments: list[str], said: str) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert said in err
    assert list(tmp_path.iterdir()) == []  # nothing was begun


@pytest.mark.slow
def test_misspelt_key_of_a_study(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text("modles: [digits-vit]\nbits: [W4A4]\n")
    run = program("study", str(tmp_path / "study.yaml"))
    assert run.returncode == 2
    assert run.stderr.startswith("error: study file ")
    assert run.stderr.endswith("unknown key 'modles'; did you mean 'models'?\n")
    assert "Traceback" not in run.stderr
    shown = program("study", str(tmp_path / "study.yaml"), QUANTLENS_DEBUG="1")
    assert "Traceback" in shown.stderr
    assert shown.returncode == 2


def fails(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make `quantlens sources` raise."""

    def broken() -> None:
        raise error

    monkeypatch.setattr("quantlens.data.available_sources", broken)


def test_ctrl_c(run, monkeypatch: pytest.MonkeyPatch) -> None:
    from quantlens.studies.runner import StudyInterrupted

    fails(monkeypatch, KeyboardInterrupt())
    code, _, err = run("sources")
    assert (code, err.strip()) == (130, "stopped by Ctrl-C")
    fails(monkeypatch, StudyInterrupted("stopped; 3 of 9 cells are finished"))
    code, _, err = run("sources")
    assert (code, err.strip()) == (130, "stopped; 3 of 9 cells are finished")


def test_full_disk(run, monkeypatch: pytest.MonkeyPatch) -> None:
    fails(monkeypatch, OSError(28, "No space left on device", "/big/file"))
    code, _, err = run("sources")
    assert code == 2
    assert err == "error: the disk is full (/big/file); free some space and run the same command again\n"
    fails(monkeypatch, OSError(5, "Input/output error"))
    with pytest.raises(OSError, match="Input/output"):
        run("sources")


def test_messages_are_one_line(run, monkeypatch: pytest.MonkeyPatch) -> None:
    fails(monkeypatch, QuantlensError("two\nlines"))
    assert run("sources")[2] == "error: two lines\n"


@pytest.mark.slow
def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m quantlens models --filter '*' | head -n 1; exit ${{PIPESTATUS[0]}}"
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")


# ---- lists -----------------------------------------------------------------------------------------------------------


def test_methods(run) -> None:
    from quantlens.methods import registry

    code, out, err = run("methods")
    assert (code, err) == (0, "")
    for name in registry.available():
        assert name in out
    code, out, _ = run("methods", "repq")
    assert "repq-vit" in out
    assert "head_bits" in out
    _, out, _ = run("methods", "qdrop")
    assert "departs from its paper: steps per block" in out
    assert "(iterations=80, the paper's form 20000)" in out


def test_methods_as_json(run) -> None:
    import json

    from quantlens.methods import registry

    code, out, err = run("methods", "--json")
    assert (code, err) == (0, "")
    told = {method["name"]: method for method in json.loads(out)}
    assert told.keys() == registry.available().keys()
    for name, info in registry.available().items():
        assert [option["name"] for option in told[name]["options"]] == list(info.options)
        assert told[name]["quantizes"] in ("partially", "fully")
        assert told[name]["citation"]
    _, out, _ = run("methods", "repq", "--json")
    assert json.loads(out) == told["repq-vit"]


def test_what_every_method_takes() -> None:
    assert _common.method_settings(["p=0.5"], head_bits=8, image=None) == {"p": 0.5, "head_bits": 8}
    with pytest.warns(DeprecationWarning, match="write --head-bits"):
        assert _common.method_settings(["head-bits=4"], head_bits=None) == {"head_bits": 4}


def test_models(run) -> None:
    code, out, _ = run("models")
    assert code == 0
    assert "digits-vit" in out
    assert "--filter" in out
    code, out, _ = run("models", "--filter", "deit_tiny_patch16*", "--tags")
    assert out.split() == ["deit_tiny_patch16_224.fb_in1k"]
    assert run("models", "--filter", "digits*")[1].split() == ["digits-vit"]


def test_sources(run) -> None:
    from quantlens.data import CORRUPTIONS, available_embedded, available_sources
    from quantlens.data.ood_sets import OOD_SETS

    code, out, _ = run("sources")
    assert code == 0
    for name in (
        *(f"{kind}:" for kind in available_sources()),
        *available_embedded(),
        *CORRUPTIONS,
        "KIND:PATH?corrupt=fog:3",
        *OOD_SETS,
        "KIND:PATH[a:b]",
        "KIND:PATH[a:b:s]",
    ):
        assert name in out


def test_examples_are_planned(run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("QUANTLENS_DATA", "IMAGENET", "OOD"):
        monkeypatch.setenv(name, "/data")
    for file, cells in (("paper-study", 64), ("shared-data-study", 94), ("sensitivity-study", 127)):
        path = Path(__file__).parents[2] / "examples" / f"{file}.yaml"
        code, out, _ = run("study", str(path), "--dry-run")
        assert (code, out.splitlines()[-1]) == (0, f"{cells} cells")


# ---- values ----------------------------------------------------------------------------------------------------------


def test_option_values() -> None:
    given = ["a=1", "b=0.5", "c=true", "d=none", "e=log-sqrt2", "f-g=[1, 2]", "h=x=y"]
    assert _common.settings(given) == {
        "a": 1, "b": 0.5, "c": True, "d": None, "e": "log-sqrt2", "f_g": [1, 2], "h": "x=y",
    }  # fmt: skip
    assert _common.names(["a,b", " c "]) == ["a", "b", "c"]
    assert _common.names(None) == []
    assert _common.whole_numbers(["0,13", "37"], "--seeds") == [0, 13, 37]


# ---- the embedded model, from end to end -----------------------------------------------------------------------------


def test_quantize_evaluate(run, tmp_path: Path) -> None:
    import json

    file, result = tmp_path / "q.safetensors", tmp_path / "r.json"
    code, out, err = run(
        "quantize", "digits-vit", "--calibration", "embedded:digits-calibration", "--n", "16",
        "--method", "minmax", "--bits", "w4a8", "--out", str(file),
    )  # fmt: skip
    assert code == 0, err
    size = f"{file.stat().st_size / 1e6:.2f} MB"
    said = (
        rf"q\.safetensors: digits-vit minmax W4A8, {size} \(weights and scales [\d.]+ MB, 0\.\d+ of FP32\), calibrated"
    )
    assert re.search(said, out)
    code, out, err = run(
        "evaluate", str(file), "--weights", "pretrained", "--id", "embedded:digits-test[0:100]",
        "--ood", "letters=embedded:letters[0:40]", "--ood", "8-9=embedded:digits-held-out[0:40]", "--near", "letters",
        "--scores", "msp,energy", "--json", str(result),
    )  # fmt: skip
    assert code == 0, err
    assert "top-1 %" in out
    assert "quantized − FP32" in out
    data = json.loads(result.read_text())
    assert (data["method"], data["bits"], data["seed"]) == ("minmax", "W4A8", 0)
    assert data["ood"]["letters"]["group"] == "near"
    assert data["change"]["id"]["nll"] == pytest.approx(data["id"]["nll"] - data["fp32"]["id"]["nll"])
    import quantlens as ql

    known = ql.evaluate(ql.load(file), id="embedded:digits-test[0:100]", cache_dir=False).to_dict()
    assert data["id"]["top1"] == known["id"]["top1"]

    code, out, _ = run("evaluate", "digits-vit", "--id", "embedded:digits-test[0:100]", "--json", "-")
    assert code == 0
    assert json.loads(out)["id"]["top1"] == data["fp32"]["id"]["top1"]
    code, _, err = run("evaluate", str(file), "--weights", str(file), "--id", "embedded:digits-test[0:10]")
    assert code == 2


@pytest.mark.slow
def test_python_and_the_command_line_draw_the_same_images(run, tmp_path: Path) -> None:
    import quantlens as ql

    file, source = tmp_path / "q.safetensors", "embedded:digits-calibration"
    settings = ("--method", "minmax", "--seed", "3", "--out", str(file))
    assert run("quantize", "digits-vit", "--calibration", source, *settings)[0] == 0
    made = ql.quantize(ql.load_model("digits-vit"), source, method="minmax", seed=3)
    written = ql.load(file)
    assert made.calibration == written.calibration
    assert made.calibration["n"] == 32
    images = load_images("embedded:digits-test[0:8]", made.preprocess, cache_dir=False).tensor()
    assert torch.equal(made(images), written(images))
    assert ql.quantize(ql.load_model("digits-vit"), f"{source}?n=5", method="minmax").calibration["n"] == 5


def test_the_names_of_scores_are_in_the_help(run) -> None:
    from quantlens.metrics import available_scores

    code, out, _ = run("evaluate", "--help")
    assert code == 0
    assert [name for name in available_scores(own=True) if not re.search(rf"\b{name}\b", out)] == []


@pytest.mark.slow
def test_demo_in_small(run, tmp_path: Path) -> None:
    out_dir = tmp_path / "demo"
    arguments = ("demo", "--out", str(out_dir), "--methods", "minmax", "--bits", "W4A4", "--seeds", "0,1",
                 "--scores", "msp", "--workers", "1")  # fmt: skip
    code, out, err = run(*arguments)
    assert code == 0, err
    assert "3 of 3 cells done (3 in this run)" in out
    assert "W4A4" in out
    assert "[3/3] digits-vit minmax W4A4 seed 1" in err
    assert (out_dir / "report.html").stat().st_size > 10_000
    code, out, _ = run(*arguments)
    assert "(0 in this run)" in out
    code, out, _ = run("report", str(out_dir), "--out", str(tmp_path / "r.html"))
    assert (code, (tmp_path / "r.html").exists()) == (0, True)
