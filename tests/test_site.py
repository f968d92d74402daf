"""The docs site: what its pages show runs, it builds without a warning, and it needs no network.

A block of Python runs, as do the lines of a console block that call quantlens; a block whose title is the name of a
file is written to it. Blocks titled "With your own …" need what is not here: of these, options and commands must exist.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer

from plugin_state import forget
from quantlens.cli import main

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
FENCE = re.compile(r"^```(\w+)(?: title=\"([^\"]*)\")?\n(.*?)^```$", re.S | re.M)
NOT_HERE = ("With your own", "Examples")
OTHERS = {"make", "pip", "source", "ray", "export", "python", "git"}  # programs that the tests do not start
FAST = {"concepts.md", "install.md", "methods.md", "models.md"}
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


@pytest.fixture(scope="module")
def generate():
    pytest.importorskip("mkdocs")
    sys.path.insert(0, str(DOCS))
    try:
        spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(DOCS))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QUANTLENS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "120")
    forget()
    yield tmp_path
    forget()


def blocks(text):
    return [(kind, title or "", code) for kind, title, code in FENCE.findall(text)]


def commands(code):
    """The command lines of a console block, as lists of words."""
    lines = re.findall(r"^\$ (.*)$", re.sub(r"\\\n\s*", "", code), re.M)
    return [shlex.split(line, comments=True) for line in lines]


def known(words):
    """A command of quantlens and options that it has."""
    if words[0] != "quantlens":
        return words[0] in OTHERS
    program = typer.main.get_command(main.app)
    if words[1].startswith("-"):
        return words[1] in ("--help", "--version")
    own = {option for parameter in program.commands[words[1]].params for option in parameter.opts}
    return all(word.split("=")[0] in own | {"--help"} for word in words[2:] if re.match(r"--?[a-z]", word))


def run(text):
    """Everything in a page that can run here, in its order; how much that was."""
    scope: dict[str, object] = {}
    done = 0
    for kind, title, code in blocks(text):
        if title.startswith(NOT_HERE):
            continue
        if re.fullmatch(r"[\w-]+\.\w+", title):
            Path(title).write_text(code, encoding="utf-8")
        elif kind == "python":
            exec(compile(code, "a page", "exec"), scope)
            done += 1
        elif kind == "console":
            for program, *arguments in commands(code):
                if program == "quantlens":
                    assert main.run(arguments) == 0, arguments
                    done += 1
    return done


def runs(text):
    return any(kind in ("python", "console") and not title.startswith(NOT_HERE) for kind, title, _ in blocks(text))


def marked(page):
    return pytest.param(page, id=page.name, marks=() if page.name in FAST else pytest.mark.slow)


@pytest.mark.parametrize("page", [marked(p) for p in PAGES if runs(p.read_text()) and p.name != "extending.md"])
def test_what_a_page_shows_runs(page, folder):
    """(extending.md has a file of tests of its own.)"""
    assert run(page.read_text(encoding="utf-8")) >= (
        0 if page.name in ("results.md", "choosing.md", "scaling.md") else 1
    )


@pytest.mark.slow
def test_the_command_of_every_method_runs(folder, generate):
    for name in generate.in_words():
        assert run(generate.method_page(name)) == 1
        assert (folder / f"{name}.safetensors").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_exist(page, generate):
    text = generate.filled(page.read_text(encoding="utf-8"))
    for kind, _, code in blocks(text):
        for words in commands(code) if kind == "console" else []:
            assert known(words), words


def test_every_block_says_what_it_is():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert text.count("```") == 2 * len(blocks(text)), page
        assert {kind for kind, _, _ in blocks(text)} <= {"python", "console", "yaml", "toml", "text"}, page


def test_every_method_has_a_page_in_plain_words(generate):
    words = generate.in_words()
    assert set(words) == set(generate.methods())
    assert all({"idea", "weights", "activations", "take"} <= set(entry) for entry in words.values())
    page = generate.method_page("repq-vit")
    info = generate.methods()["repq-vit"]
    assert info.url in page
    assert all(f"| `{option}` |" in page for option in info.options)
    assert all(reading in page for reading in info.readings)


def test_a_page_on_a_method_has_its_departures(generate):
    departures = {name: info.departures for name, info in generate.methods().items() if info.departures}
    assert departures
    for name, list_ in departures.items():
        page = generate.method_page(name)
        assert all(departure.what.replace("|", "\\|") in page for departure in list_), name


def test_results_say_what_they_are(generate):
    data = generate.results()
    for row in data["rows"]:
        assert {"set", "model", "method", "options", "bits", "seeds", "date", "top1"} <= set(row)
        assert row["set"] in data["sets"]
        assert row["method"] is None or row["method"] in generate.methods()
        assert isinstance(row["top1"], float | int) == (row["seeds"] == 1), row
    for about in data["sets"].values():
        assert (ROOT / about["study"]).is_file()
        assert about["images"]
    assert json.loads((DOCS / "results.json").read_text(encoding="utf-8")) == data


def test_the_tables_show_the_results(generate):
    shown = generate.filled((DOCS / "results.md").read_text(encoding="utf-8"))
    shown = shown.replace("\u00a0", " ").replace("\u2011", "-")
    of_deit = [part.partition("\n\n")[0] for part in shown.split("**DeiT-Tiny**\n\n")[1:]]
    assert any(
        "| [`repq-vit`](methods/repq-vit.md) | W4A4 | 59.8 ± 1.2 | 2.18 ± 0.04 | −10.5 | 3.3 |" in table
        for table in of_deit
    )
    assert any("| FP32 | FP32 | 76.75 |" in table for table in of_deit)
    assert shown.count("\n## ") == len(generate.results()["sets"]) + 3
    rows = [{"model": "m", "method": None, "aupr_out": {"a": 50.0, "b": 60.0}}]
    row = {"model": "m", "method": "x", "aupr_out": {"a": [49.0, 1.0], "b": 58.0}}
    assert generate.aupr_change(row, rows) == "−1.5"


def test_a_top1_has_a_place_for_its_model_method_and_calibration_images(generate):
    shown = generate.calibration_images_table().replace("\u2011", "-")
    for row in generate.results()["calibration_images"]:
        head, *lines = [one for one in shown.partition(f"**{row['model']}**")[2].partition("**")[0].splitlines() if one]
        assert row["method"] or f"(FP32 {row['top1']})" in head
        cells = {tuple(one.split(" | ")[:2]): one.strip("| ").split(" | ") for one in lines}
        if row["method"]:
            place = lines[0].strip("| ").split(" | ").index(row["images"])
            assert cells[f"| `{row['method']}`", row["bits"]][place] == str(row["top1"])


def test_floating_formats_are_beside_fp32_once_they_are_measured(generate, monkeypatch):
    fp32 = {"model": "m", "format": "FP32", "method": "", "top1": 78.0, "ece": 2.0, "aupr_out": 89.9, "corrupted": 58.1}
    fp32 |= {"nll": 0.89, "size_mb": 22.9}
    row = fp32 | {"format": "MXFP4", "method": "minmax", "top1": 72.5, "aupr_out": 88.4, "size_mb": 3.5}
    monkeypatch.setattr(generate, "results", lambda: {"floating_formats": [fp32, row]})
    lines = generate.floating_formats_section().splitlines()
    assert lines[0].startswith("## ")
    assert "| MXFP4 | [`minmax`](methods/minmax.md) | 72.5 | 0.89 | 2.0 | −1.5 | 58.1 | 3.5 |" in lines
    assert "| FP32 | – | 78.0 | 0.89 | 2.0 | – | 58.1 | 22.9 |" in lines
    monkeypatch.setattr(generate, "results", dict)
    assert generate.floating_formats_section() == ""


def test_races_are_shown_once_they_are_run(generate, monkeypatch):
    latency = {"1 on 2": {"median_ms": 5.25, "speedup": 2.77, "front": True}}
    row = {"label": "m.onnx", "integers": "saturate", "top1": 78.0, "nll": 0.89, "sqnr_db": 21.5, "latency": latency}
    fp32 = {**row, "label": "FP32", "integers": None, "latency": {"1 on 2": {"median_ms": 14.5, "speedup": 1.0}}}
    race = {"cpu": "P", "vnni": False, "model": "M", "date": "2026-12-01", "versions": {"torch": "2"}}
    monkeypatch.setattr(generate, "results", lambda: {"races": [race | {"rows": [fp32, row]}]})
    lines = generate.races_section().replace("\u00a0", " ").replace("\u2011", "-").splitlines()
    assert "**M** on P without VNNI, 2026-12-01; torch 2" in lines
    assert "|  | top-1 % | NLL | SQNR dB | ms, batch 1, threads 2 |" in lines
    assert "| FP32 | 78.0 | 0.89 | 21.5 | 14.5 (1.0×) |" in lines
    assert "| m.onnx (integers saturate) | 78.0 | 0.89 | 21.5 | 5.25 (2.77×) ● |" in lines
    monkeypatch.setattr(generate, "results", dict)
    assert generate.races_section() == ""


def test_the_readme_shows_results_of_the_file(generate):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 120
    rows = [row for row in generate.results()["rows"] if row["set"] == "validation"]
    table = text.partition("| W4A4 |")[2].partition("\n\n")[0]
    assert table.count("±") == 6
    for row in rows:
        if row["bits"] == "W4A4" and row["seeds"] == 3 and "outlier_channels" not in row["options"]:
            change = generate.aupr_change(row, rows)
            assert f"{generate.number(row['top1'])} | {change} |".replace("\u00a0", " ") in table, row


@pytest.mark.parametrize("there", [None, object()])
def test_the_finding_is_in_the_navigation_once_it_has_results(generate, monkeypatch, there):
    monkeypatch.setattr(generate.finding, "finding", lambda: there)
    config = SimpleNamespace(nav=[{"Home": "index.md"}, {"Guides": [{"One": "one.md"}]}, {"Methods": "methods.md"}])
    guides = generate.on_config(config).nav[1]["Guides"]
    assert [page for one in guides for page in one.values()] == [
        "one.md",
        *["training-factors.md"][: there is not None],
    ]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_words(page):
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"\b(behind|figures|learn\w* by heart|refused in words)\b", text), page
    assert not re.search(r"\b(differences?|changes?|metrics?|it|they) stands?\b", text), page


def test_the_research_log_has_every_page():
    index = (ROOT / "research" / "README.md").read_text(encoding="utf-8")
    pages = {page.name for page in (ROOT / "research").glob("2*.md")}
    assert pages == set(re.findall(r"\(([^()]+\.md)\)", index))


def test_the_citation_is_of_this_version():
    from quantlens import __version__

    assert f"version: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs")
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


@pytest.mark.slow
def test_the_site_builds_and_needs_no_network(site, generate):
    pages = {page.relative_to(site).as_posix(): page.read_text(encoding="utf-8") for page in site.rglob("*.html")}
    assert {"index.html", "cli.html", "api.html", "results.html", "research/index.html"} <= set(pages)
    assert {f"methods/{name}.html" for name in generate.in_words()} <= set(pages)
    loaded = re.compile(r"<(?:script|img|iframe|link)\b[^>]*(?:src|href)=\"(?:https?:)?//[^\"]*\"")
    for name, page in pages.items():
        assert not loaded.search(page), name
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet
    assert all(f'id="quantlens.{name}"' in pages["api.html"] for name in ("quantize", "evaluate", "load_model"))
    assert "generated:" not in pages["cli.html"] + pages["results.html"] + pages["methods.html"]
