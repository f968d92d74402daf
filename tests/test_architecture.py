"""The packages keep their order: one never imports a higher one (docs/architecture.md)."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "quantlens"
ORDER = (
    "data",
    "metrics",
    "models",
    "graph",
    "transforms",
    "formats",
    "qmodel",
    "calibration",
    "reconstruction",
    "methods",
    "sensitivity",
    "allocation",
    "api",
    "attention",
    "export",
    "evaluation",
    "studies",
    "plots",
    "report",
    "cli",
)
"""Packages, and one module: `api`, with which people quantize, and for which `attention` and all above it may ask."""
BELOW_ALL = {"ambient", "arguments", "boxes", "errors", "files", "plugins", "_version", "_moved", "yaml_files"}
THROUGH_THE_REGISTRY = {("models", "zoo")}
"""`zoo` holds the models and images that ship, and is built on `data` and `metrics`. `models` looks names up
in it, inside a function, when a person names one of them; nothing else of it is used there."""
ZOO_FROM = ORDER.index("studies")
"""From here on packages may use `zoo` as they like."""


def _imports(path: Path) -> set[str]:
    """Packages (or modules beside them) of quantlens that a file imports; "quantlens" for the bare package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written in full"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            names = [str(a.value) for a in node.args if isinstance(a, ast.Constant)]
        parts = [name.split(".") for name in names if name.split(".")[0] == "quantlens"]
        found |= {p[1] if len(p) > 1 else "quantlens" for p in parts}
    return {"_version" if name == "__version__" else name for name in found}


def test_every_package_is_in_the_order():
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert packages <= {*ORDER, "zoo"}
    assert {path.stem for path in PACKAGE.glob("*.py")} <= {*BELOW_ALL, "api", "__init__", "__main__"}


@pytest.mark.parametrize("package", ORDER)
def test_no_package_imports_a_higher_one(package):
    place = ORDER.index(package)
    allowed = {*ORDER[: place + 1], *BELOW_ALL}
    if place >= ZOO_FROM:
        allowed.add("zoo")
    for path in [*(PACKAGE / package).rglob("*.py"), *PACKAGE.glob(f"{package}.py")]:
        for target in _imports(path) - allowed:
            assert (package, target) in THROUGH_THE_REGISTRY, f"{path.relative_to(PACKAGE)} imports {target}"


def test_the_zoo_is_built_on_data_and_metrics():
    """But for the command that quantizes and measures what it trained, which nothing else of the zoo imports."""
    for path in (PACKAGE / "zoo").rglob("*.py"):
        allowed, experiment = {"zoo", "data", "metrics", *BELOW_ALL}, path.parent.name == "experiment"
        assert _imports(path) <= {*allowed, *(ORDER[:ZOO_FROM] if experiment else ())}, path
        assert experiment or "import quantlens.zoo.experiment" not in path.read_text(encoding="utf-8"), path
        assert experiment or "from quantlens.zoo.experiment" not in path.read_text(encoding="utf-8"), path


def test_what_all_packages_share_knows_none_of_them():
    for name in BELOW_ALL:
        assert _imports(PACKAGE / f"{name}.py") <= BELOW_ALL, name


def test_metrics_know_nothing_of_models():
    for path in (PACKAGE / "metrics").rglob("*.py"):
        assert _imports(path) <= {"_moved", "boxes", "errors", "metrics", "plugins"}, path


def test_plots_draw_and_the_report_does_not():
    """Altair and vl-convert are used in `plots` alone, but for the grids of pictures that an attention result writes,
    and for the script that vl-convert brings for a page."""
    for path in PACKAGE.rglob("*.py"):
        text, room = path.read_text(encoding="utf-8"), path.relative_to(PACKAGE).parts[0]
        if room != "plots" and path.name != "picture_grids.py":
            assert not re.search(r"^\s*(import|from) altair", text, re.M), path
            assert not re.search(r"<svg|<path|vegalite_to", text), path
            assert "vl_convert" not in text or path.relative_to(PACKAGE).as_posix() == "report/page.py", path


def test_importing_quantlens_is_light():
    code = (
        "import quantlens, quantlens.cli.main, sys;"
        "print([m for m in ('torch', 'timm', 'scipy', 'sklearn', 'altair', 'vl_convert') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


FILE_LINES, FUNCTION_LINES = 400, 60
LONG: dict[str, int] = {}
"""Files and functions (file::name) that may be longer, at most five, with their length."""


def test_files_and_functions_are_short():
    found: dict[str, int] = {}
    for path in PACKAGE.rglob("*.py"):
        text, name = path.read_text(encoding="utf-8"), str(path.relative_to(PACKAGE))
        if text.count("\n") > FILE_LINES:
            found[name] = text.count("\n")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > FUNCTION_LINES:
                    found[f"{name}::{node.name}"] = length
    assert len(LONG) <= 5
    assert {name for name, length in found.items() if length > LONG.get(name, 0)} == set()
