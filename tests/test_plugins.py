"""Plugins: where they are found, and what is said of those that do not work."""

from __future__ import annotations

import os
import sys
import textwrap

import pytest

import quantlens as ql
from plugin_state import forget
from quantlens import formats, plugins, transforms
from quantlens.cli import main
from quantlens.errors import QuantlensError, UnknownNameError
from quantlens.methods import registry
from quantlens.metrics import available_scores, make_scorer

METHOD = """
from quantlens.methods import MATMUL_OPERANDS, Method, MethodInfo
from quantlens.qmodel import Plan

class {cls}(Method):
    info = MethodInfo("{name}", "A method", "", "", 2026, "", MATMUL_OPERANDS, "nothing")

    def build(self, graph, calibration, bits, run):
        {body}
"""


@pytest.fixture(autouse=True)
def forgotten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    forget()
    yield
    forget()


@pytest.fixture
def write(tmp_path):
    def made(name, text):
        (tmp_path / name).write_text(textwrap.dedent(text), encoding="utf-8")
        return name

    return made


@pytest.fixture
def install(tmp_path, write, monkeypatch):
    """A distribution of that name with these entry points: {group: {name: value}}."""

    def made(name, points):
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = [f"[{g}]\n" + "".join(f"{k} = {v}\n" for k, v in p.items()) for g, p in points.items()]
        (info / "entry_points.txt").write_text("".join(lines))
        monkeypatch.syspath_prepend(str(tmp_path))

    return made


def method(name="mine", cls="Mine", body="return Plan({})"):
    return METHOD.format(name=name, cls=cls, body=body)


# ---- finding ---------------------------------------------------------------------------------------------------------


def test_a_file_is_a_plugin(write):
    """Its methods are found without being registered one by one; a neighbour can be imported."""
    write("beside.py", "WORD = 'a word'\n")
    module = ql.load_plugin(write("mine.py", "from __future__ import annotations\nimport beside\n" + method()))
    assert registry.get("Mine").info.name == "mine"
    assert registry.place("mine") == "mine.py"
    assert module.beside.WORD == "a word"
    assert registry.place("minmax") == ""
    assert plugins.given() == [os.path.abspath("mine.py")]


def test_a_module_is_a_plugin(write, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    write("my_module_plugin.py", method())
    ql.load_plugin("my_module_plugin")
    assert registry.get("mine").info.title == "A method"
    assert registry.place("mine") == plugins.given()[0] == "my_module_plugin"


def test_a_file_is_run_again_where_it_has_changed(write, capsys):
    path = write("mine.py", "print('run')\n" + method())
    for _ in range(2):
        ql.load_plugin(path)
    assert capsys.readouterr().out == "run\n"
    write("mine.py", method(body="return None"))
    ql.load_plugin(path)
    ql.load_plugin(write("other.py", method(name="another")))
    assert sorted(set(registry.available()) - set(OWN)) == ["another", "mine"]


def test_the_environment_names_plugins(write, monkeypatch):
    files = [write("one.py", method("one", "One")), write("two.py", method("two", "Two"))]
    monkeypatch.setenv("QUANTLENS_PLUGINS", os.pathsep.join(files))
    assert registry.get("two").info.name == "two"
    assert "one" in registry.available()


def test_own_names_are_found_without_running_anything_else(write, install, capsys):
    install("told", {"quantlens.methods": {"mine": "told_module"}})
    write("told_module.py", "print('told')\n" + method())
    registry.get("minmax")
    formats.restore({"kind": "log", "bits": 4, "steps": 1}, {"delta": __import__("torch").tensor(1.0)})
    assert set(available_scores(own=True))
    assert capsys.readouterr().out == ""
    with pytest.raises(UnknownNameError, match="did you mean 'mine'"):
        registry.get("mone")
    assert capsys.readouterr().out == "told\n"
    assert registry.place("mine") == "mine of told 1.0 (told_module)"


def test_an_entry_point_may_name_the_thing_itself(write, install):
    write("things.py", method() + "def low(logits):\n    'The least logit.'\n    return logits.min(1)\n")
    write("steps.py", "def nothing(graph):\n    return []\n")
    install(
        "things-dist",
        {
            "quantlens.methods": {"mine": "things:Mine"},
            "quantlens.scores": {"low": "things:low"},
            "quantlens.transforms": {"nothing": "steps:nothing"},
        },
    )
    assert registry.get("mine").info.name == "mine"
    assert make_scorer("low")([[3.0, 1.0]]).tolist() == [1.0]
    assert available_scores()["low"].title == "The least logit"
    assert transforms.get("nothing")(None) == []


OWN = list(registry.available())


# ---- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (
            "import nothing_of_that_name\n",
            "ModuleNotFoundError: No module named 'nothing_of_that_name' (bad.py, line 1)",
        ),
        ("\n1 / 0\n", "ZeroDivisionError: division by zero (bad.py, line 2)"),
        ("def f(:\n", "SyntaxError"),
        ("raise SystemExit(3)\n", "SystemExit: 3"),
        ("from quantlens.methods import register\n@register\ndef f(): ...\n", "f is no method"),
    ],
)
def test_a_broken_file_is_told_in_one_sentence(write, capsys, monkeypatch, text, cause):
    write("bad.py", text)
    monkeypatch.setenv("QUANTLENS_DEBUG", "0")
    assert main.run(["methods", "--plugin", "bad.py"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: plugin bad.py cannot be loaded: ")
    assert cause in said.err
    assert (said.err.count("\n"), said.out) == (1, "")
    monkeypatch.setenv("QUANTLENS_DEBUG", "1")
    assert main.run(["methods", "--plugin", "bad.py"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_plugin_that_is_not_there(write):
    write("mine.py", "")
    for where, said in (("mine", "mine.py for the file"), ("no.py", "no plugin no.py"), ("./", "no plugin ./")):
        with pytest.raises(QuantlensError, match=said):
            ql.load_plugin(where)


def test_a_name_that_is_taken_is_refused_with_both_places(write, install):
    with pytest.raises(
        QuantlensError, match=r"'minmax' is taken by MinMax \(quantlens.methods.minmax\).*Mine \(a.py\)"
    ):
        ql.load_plugin(write("a.py", method("minmax") + "from quantlens.methods import register\nregister(Mine)\n"))
    ql.load_plugin(write("b.py", method("minmax", "MinMax")))
    with pytest.raises(QuantlensError, match=r"plugin b.py cannot be loaded: .*give MinMax \(b.py\) another"):
        registry.get("minmax")
    assert registry.get("minmax").info.venue == "CVPR"
    text = "from quantlens.formats import Uniform\nclass Mine(Uniform):\n    kind = 'uniform'\n"
    with pytest.raises(QuantlensError, match=r"number format name 'uniform' is taken by Uniform .*Mine \(c.py\)"):
        ql.load_plugin(write("c.py", text))
    text = "from quantlens.metrics import *\n@register_score(ScoreInfo('msp', '', ''))\ndef f(x): ...\n"
    with pytest.raises(QuantlensError, match=r"OOD score name 'msp' is taken"):
        ql.load_plugin(write("d.py", text))
    text = "from quantlens import transforms\n@transforms.register('t')\ndef {}(graph): ...\n"
    ql.load_plugin(write("e.py", text.format("f")))
    with pytest.raises(QuantlensError, match=r"'t' is taken by f \(e.py\); give g \(f.py\)"):
        ql.load_plugin(write("f.py", text.format("g")))


def test_an_installed_plugin_that_is_broken_does_not_keep_others_from_work(write, install, capsys):
    points = {"mine": "works", "gone": "is_not_there", "minmax": "taken"}
    install("mixed", {"quantlens.methods": points})
    write("works.py", method())
    write("taken.py", method("minmax"))
    assert main.run(["methods"]) == 0
    said = capsys.readouterr()
    assert "mine of mixed 1.0" in said.out.replace("\n", "")
    warnings = sorted(said.err.splitlines())
    assert [w.startswith("warning: plugin ") for w in warnings] == [True, True]
    assert "gone of mixed 1.0 (is_not_there) cannot be loaded: ModuleNotFoundError" in warnings[0]
    assert "'minmax' is taken by MinMax (quantlens.methods.minmax)" in warnings[1]
    assert main.run(["methods"]) == 0
    assert capsys.readouterr().err == ""  # told once
    assert main.run(["methods", "gone"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: unknown method 'gone'")
    assert "is_not_there) cannot be loaded" in line


def test_a_plugin_that_fails_at_work_is_told_in_one_sentence(write, capsys, monkeypatch):
    write("bad.py", method(body="return {}['key']"))
    write("empty.py", method("empty", "Empty", body="pass"))
    quantize = ["quantize", "digits-vit", "--calibration", "embedded:digits-calibration", "--method"]
    assert main.run([*quantize, "mine", "--plugin", "bad.py"]) == 2
    expected = "error: plugin bad.py failed: KeyError: 'key' (bad.py, line 9); QUANTLENS_DEBUG=1 shows the traceback\n"
    assert capsys.readouterr().err == expected
    assert main.run([*quantize, "empty", "--plugin", "empty.py"]) == 2
    assert capsys.readouterr().err == "error: the method empty gave NoneType; its `build` returns a Plan\n"

    def broken(*arguments, **options):
        raise KeyError("our own mistake")

    monkeypatch.setattr("quantlens.methods.registry.available", broken)
    with pytest.raises(KeyError, match="our own"):
        main.run(["methods"])


def test_a_score_of_the_wrong_shape(write):
    text = "from quantlens.metrics import *\n@register_score(ScoreInfo('flat', '', ''))\ndef f(x):\n    return x\n"
    ql.load_plugin(write("flat.py", text))
    with pytest.raises(QuantlensError, match="must be 1 numbers"):
        make_scorer("flat")([[1.0, 2.0]])


# ---- studies ---------------------------------------------------------------------------------------------------------


@pytest.mark.process
def test_the_workers_of_a_study_load_its_plugins(write, tmp_path):
    from study_fakes import FakeBackend, config

    from quantlens.studies.config import load_config, parse_config
    from quantlens.studies.measuring import Worker
    from quantlens.studies.runner import run_study

    note = "import os\nwith open('{}', 'a') as file:\n    file.write(f'{{os.getpid()}}\\n')\n"
    ql.load_plugin(write("here.py", note.format("here")))
    study = parse_config({**PLAIN, "plugins": [write("named.py", note.format("named"))]})
    assert study.plugins == (str(tmp_path / "named.py"),)
    run_study(study, tmp_path / "out", workers=2, progress=False, backend=FakeBackend(tmp_path / "log"))
    for name in ("here", "named"):
        pids = set((tmp_path / name).read_text().split())
        # a worker that starts late finds no cell left, and need not start
        assert {str(os.getpid())} < pids, name
    forget()
    Worker(study, FakeBackend(tmp_path / "log"), 1, {}).start()
    assert plugins.given() == [str(tmp_path / "named.py")]
    write("study.yaml", "plugins: [a.module]\nmodels: [m]\nbits: [FP32]\nid: embedded:digits-test\n")
    assert load_config(tmp_path / "study.yaml").plugins == ("a.module",)
    assert config().plugins == ()


PLAIN = {
    "models": ["fake"],
    "methods": ["minmax"],
    "bits": ["W8A8"],
    "calibration": {"source": "embedded:digits-calibration", "n": 16},
    "id": "embedded:digits-test",
}
