"""The rooms keep their order: a room never imports a higher one (docs/architecture.md)."""

from __future__ import annotations

import ast
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
    "quantizers",
    "ranges",
    "calibration",
    "reconstruction",
    "methods",
    "allocation",
    "attention",
    "deploy",
    "studies",
    "report",
    "cli",
)
BELOW_ALL = {"errors", "files", "_version"}
THROUGH_THE_REGISTRY = {("models", "zoo"), ("data", "zoo")}
"""The shipped models sit on data and are found by name from the loading code (docs/architecture.md)."""


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {n.split(".")[1] for n in names if n.startswith("quantlens.")}
    return found


@pytest.mark.parametrize("room", ORDER)
def test_no_room_imports_a_higher_one(room):
    higher = set(ORDER[ORDER.index(room) + 1 :])
    for path in (PACKAGE / room).rglob("*.py"):
        for target in _imports(path) & (higher | {"zoo", "api"}):
            if target in ("zoo", "api"):
                assert (room, "zoo") in THROUGH_THE_REGISTRY or room in ("studies", "report", "cli"), (
                    f"{path} imports {target}"
                )
            else:
                raise AssertionError(f"{path.relative_to(PACKAGE)} imports the higher room {target}")


def test_what_all_rooms_share_knows_none_of_them():
    for name in BELOW_ALL:
        assert _imports(PACKAGE / f"{name}.py") <= BELOW_ALL, name


def test_metrics_know_nothing_of_models():
    for path in (PACKAGE / "metrics").rglob("*.py"):
        assert _imports(path) <= {"errors", "metrics"}, path


def test_importing_quantlens_is_light():
    code = (
        "import quantlens, quantlens.cli.main, sys;"
        "print([m for m in ('torch', 'timm', 'scipy', 'sklearn') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
