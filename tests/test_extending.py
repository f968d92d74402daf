"""docs/extending.md, word for word: its files, its command lines, its entry points."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

import quantlens as ql
from plugin_state import forget
from quantlens import plugins
from quantlens.cli import main

PAGE = Path(__file__).resolve().parents[1] / "docs" / "extending.md"
BLOCKS = [
    (kind, f"# {title}\n{text}" if title else text)
    for kind, title, text in re.findall(
        r"```(\w+)(?: title=\"(.*?)\")?\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S
    )
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with the files of the page; what they register is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for kind, text in BLOCKS:
        if kind == "python":
            name = re.match(r"# (\w+\.py)\n", text)[1]
            (tmp_path / name).write_text(text, encoding="utf-8")
    forget()
    yield tmp_path
    forget()


def commands():
    lines = "\n".join(text for kind, text in BLOCKS if kind == "console").replace("\\\n", " ").splitlines()
    return [shlex.split(line.removeprefix("$ ")) for line in lines if line.strip()]


def test_the_page_shows_all_four(folder):
    own = {"my_method.py", "my_format.py", "my_score.py", "my_transform.py"}
    assert {p.name for p in folder.iterdir()} == own | {"weights_only.py"}
    assert {kind for kind, _ in BLOCKS} == {"python", "console", "toml"}
    assert {c[1] for c in commands()} == {"methods", "quantize", "evaluate"}


@pytest.mark.slow
def test_the_command_lines_run(folder, capsys, monkeypatch):
    """Each as in a process of its own: what the one before it loaded is forgotten."""
    monkeypatch.setenv("COLUMNS", "120")
    for program, *arguments in commands():
        assert program == "quantlens"
        assert main.run(arguments) == 0, arguments
        forget()
    shown = capsys.readouterr().out
    assert "plugin: my_method.py" in shown
    assert "margin" in shown
    assert (folder / "moments.safetensors").is_file()
    assert main.run(["evaluate", "mu-law.safetensors", "--id", "embedded:digits-test"]) == 2
    error = capsys.readouterr().err
    assert "'mu-law'" in error
    assert "--plugin" in error
    assert error.count("\n") == 1


def test_the_first_method_is_a_method(folder, loaded, pictures):
    """On another architecture than the page's, and with the change that the page asks for."""
    ql.load_plugin("weights_only.py")
    model = loaded["swin"]
    qmodel = ql.quantize(model, pictures, method="weights-only", bits="W8A32")
    assert float((qmodel(pictures) - model(pictures)).abs().max()) < 0.1 * float(model(pictures).abs().max())
    assert all(q.symmetric for q in qmodel.plan.quantizers.values())
    code = (folder / "weights_only.py").read_text(encoding="utf-8")
    changed = code.replace("import minmax,", "import mse,").replace("minmax(seen)", "mse(seen, width)")
    assert changed.count("mse") == 2
    (folder / "changed.py").write_text(changed.replace("weights-only", "weights-by-mse"), encoding="utf-8")
    ql.load_plugin("changed.py")

    searched = ql.quantize(model, pictures, method="weights-by-mse", bits="W3A32").plan.quantizers
    whole = ql.quantize(model, pictures, method="weights-only", bits="W3A32").plan.quantizers
    assert searched.keys() == whole.keys()
    assert all((searched[key].scale <= whole[key].scale * 1.0001).all() for key in whole), "ranges only shrink"
    assert any((searched[key].scale < whole[key].scale).any() for key in whole)


def test_the_method_works_everywhere(folder, loaded, pictures):
    """Any architecture, any width, its option, mixed precision."""
    ql.load_plugin("my_method.py")
    model = loaded["swin"]
    expected = model(pictures)

    def error(bits, **options):
        got = ql.quantize(model, pictures, method="moments", bits=bits, **options)(pictures)
        return float((got - expected).square().mean())

    assert error("W8A8") < error("W6A6") < error("W4A4")
    assert error("W8A8") < error("W8A8", k=1.0)
    mixed = ql.quantize(model, pictures, method="moments", bits={"default": "W8A8", "layers.0": "W4A4"})
    assert mixed.plan.quantizers["layers.0.blocks.0.mlp.fc1.weight"].bits == 4


def test_the_format_is_saved_and_loaded(folder, loaded, pictures):
    module = ql.load_plugin("my_format.py")
    x = torch.linspace(-2, 2, 401, requires_grad=True)
    for bits in (2, 4, 8):
        quantizer = module.MuLaw(torch.tensor(1.5), bits)
        values = quantizer(x)
        assert torch.equal(values, quantizer.decode(quantizer.encode(x)))
        assert float(values.detach().abs().max()) == 1.5
    qmodel = ql.quantize(loaded["vit"], pictures, method="mu-law-weights", bits="W6A32")
    path = qmodel.save(folder / "m.safetensors")
    assert torch.equal(ql.load(path)(pictures), qmodel(pictures))


def test_the_score_is_the_margin(folder):
    ql.load_plugin("my_score.py")
    from quantlens.metrics import available_scores, make_scorer

    assert make_scorer("margin")(np.array([[1.0, 5.0, 2.0], [0.0, 0.0, -1.0]])).tolist() == [3.0, 0.0]
    assert "margin" in available_scores()
    assert "margin" not in available_scores(own=True)


def test_the_transform_is_exact_and_in_the_plan(folder, loaded, pictures):
    ql.load_plugin("my_transform.py")
    from quantlens import transforms
    from quantlens.graph import graph_of

    model = loaded["plain"]
    graph = graph_of(model).clone()
    (said,) = transforms.available()["fold-norms"](graph)
    assert said.startswith("4 LayerNorms")
    torch.testing.assert_close(graph(pictures), model(pictures), rtol=1e-4, atol=1e-5)
    qmodel = ql.quantize(model, pictures, method="folded-minmax", bits="W8A8")
    assert said in qmodel.plan.rewrites


@pytest.mark.process
def test_the_entry_points_work_on_the_command_line(folder):
    """A distribution as an installer leaves it: its modules, and a .dist-info with the page's entry points."""
    (toml,) = (text for kind, text in BLOCKS if kind == "toml")
    groups = tomllib.loads(toml)["project"]["entry-points"]
    assert set(groups) == set(plugins.GROUPS)
    info = folder / "my_extension-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-extension\nVersion: 1.0\n")
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()) for group, points in groups.items()]
    (info / "entry_points.txt").write_text("".join(lines))
    path = os.pathsep.join([str(folder), str(Path(ql.__file__).parents[1])])

    def quantlens(line):
        command = [sys.executable, "-m", "quantlens", *shlex.split(line)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
        assert done.returncode == 0, done.stderr
        assert "warning" not in done.stderr
        return done.stdout

    listed = quantlens("methods")
    assert re.search(r"moments .*my-extension 1.0", listed)
    assert "folded-minmax" in listed  # of the transform's module
    quantlens(
        "quantize digits-vit --method mu-law-weights --calibration embedded:digits-calibration --out m.safetensors"
    )
    shown = quantlens("evaluate m.safetensors --id embedded:digits-test --ood letters=embedded:letters --scores margin")
    assert "margin" in shown
