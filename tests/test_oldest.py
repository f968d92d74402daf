"""constraints-oldest.txt holds the lowest versions that pyproject.toml allows, and nothing else."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
# The tests run none of these, and a checker's findings change with its version.
CHECKERS = {"ruff", "mypy", "types-pyyaml", "types-psutil"}


def release(version: str) -> tuple[int, ...]:
    """A version as numbers, without zeros at the end: 2.6 and 2.6.0 are one."""
    numbers = [int(part) for part in version.split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def floors(requirements: list[str]) -> dict[str, tuple[int, ...]]:
    """Package -> lowest version allowed; requirements on this package itself are left out."""
    found = {}
    for requirement in requirements:
        if requirement.startswith("quantlens["):
            continue
        match = re.fullmatch(r"([A-Za-z0-9._-]+)>=([0-9.]+)(?:,<[0-9.]+)?", requirement)
        assert match, f"{requirement}: this test reads NAME>=VERSION and NAME>=VERSION,<VERSION only"
        name, version = match[1].lower().replace("_", "-"), release(match[2])
        assert found.setdefault(name, version) == version, f"{name} has two lowest versions"
    return found


def test_constraints_are_the_lowest_versions_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = floors(project["dependencies"] + [r for extra in project["optional-dependencies"].values() for r in extra])
    assert wanted.keys() >= CHECKERS
    lines = [line for line in (ROOT / "constraints-oldest.txt").read_text().splitlines() if line and line[0] != "#"]
    pinned = {}
    for line in lines:
        name, _, version = line.partition("==")
        assert name.lower() not in pinned, f"{name} stands twice"
        pinned[name.lower()] = release(version)
    assert pinned == {name: version for name, version in wanted.items() if name not in CHECKERS}
