"""The sdist and the wheel: the one is the whole project, the other installs into an empty environment and works."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow
OWN = ("PYTHONPATH", "PYTHONHOME", "PIP_CONSTRAINT", "VIRTUAL_ENV", "QUANTLENS_CACHE", "QUANTLENS_PLUGINS")
CLEAN = {name: value for name, value in os.environ.items() if name not in OWN}


def call(*command, **options):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=CLEAN, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with the sdist, and the wheel that is built from it."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("package")
    reached = subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder / "probe"), "setuptools>=77"],
        capture_output=True,
        env=CLEAN,
    )
    if reached.returncode:
        pytest.skip("no package registry can be reached")
    left = shutil.ignore_patterns(".git", ".venv*", "site", "build", "dist", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, folder / "project", ignore=left)
    call(sys.executable, "-m", "build", "--outdir", folder / "dist", folder / "project")
    return folder / "dist"


def test_the_sdist_is_the_whole_project(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = ("constraints.txt", "Makefile", "mkdocs.yml", "README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE")
    files = ("docs/index.md", "docs/results.json", "docs/generate.py", "docs/images/report.png", "tests/conftest.py")
    more = ("examples/four-bits.yaml", "research/README.md", "benchmarks/README.md", "src/quantlens/py.typed")
    assert {*wanted, *files, *more} <= names
    kept = {p.relative_to(ROOT).as_posix() for p in (ROOT / "tests").rglob("*") if p.is_file()}
    assert {name for name in kept if "__pycache__" not in name} <= names, "the tests can be run"


def test_the_wheel_holds_the_package_and_its_data(built):
    (path,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(path).namelist())
    source = ROOT / "src"
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["quantlens"]
    files = {p.relative_to(source).as_posix() for pattern in data for p in (source / "quantlens").glob(pattern)}
    files |= {p.relative_to(source).as_posix() for p in (source / "quantlens").rglob("*.py")}
    assert any("weights" in name for name in files)
    assert {name for name in names if ".dist-info/" not in name} == {n for n in files if "__pycache__" not in n}


def test_the_demo_runs_in_an_empty_environment(built, tmp_path):
    """Installed with the newest versions there are: no constraints file. Takes minutes, most of them for torch."""
    (wheel,) = built.glob("*.whl")
    call(sys.executable, "-m", "venv", tmp_path / "venv")
    programs = tmp_path / "venv" / "bin"
    call(programs / "python", "-m", "pip", "install", "-q", wheel)
    once = ("--methods", "repq-vit", "--bits", "W8A8", "--seeds", "0", "--scores", "msp", "--workers", "1")
    shown = call(programs / "quantlens", "demo", "--out", "demo", *once, cwd=tmp_path)
    assert "2 of 2 cells done" in shown
    assert (tmp_path / "demo" / "report.html").stat().st_size > 100_000
