"""Options that were renamed still work, with a warning; options that are gone say where their record is."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import yaml

import quantlens as ql
from quantlens.errors import QuantlensError
from quantlens.methods import registry
from quantlens.methods._former_options import REMOVED_OPTIONS, RENAMED_OPTIONS

ROOT = Path(__file__).resolve().parents[2]
REMOVED = [(method, name) for method, names in REMOVED_OPTIONS.items() for name in names]
RENAMED = [(method, old, new) for method, names in RENAMED_OPTIONS.items() for old, new in names.items()]


@pytest.mark.parametrize(("method", "name"), REMOVED)
def test_a_removed_option_names_the_page_with_its_record(method, name):
    page = REMOVED_OPTIONS[method][name]
    with pytest.raises(QuantlensError, match=f"option {name} of {method} was removed in quantlens 0.3; {page} tells"):
        registry.get(method).options({name: 1})
    assert f"`{name}" in (ROOT / page).read_text(encoding="utf-8"), "the page names the option"
    assert page.removeprefix("research/") in (ROOT / "research" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("method", "old", "new"), RENAMED)
def test_a_renamed_option_is_the_new_one(method, old, new):
    options = registry.get(method).options
    described = registry.get(method).info.options[new]
    other = 32 if described.type == "int" else 0.25
    value = next(c for c in described.choices if c != described.default) if described.choices else other
    with pytest.warns(DeprecationWarning, match=f"option {old} of {method} is {new} now; quantlens 0.4 drops"):
        found = options({old: value})
    assert found == options({new: value})
    with pytest.raises(QuantlensError, match=f"{old} is the old name of {new}"):
        options({old: value, new: value})


def test_tables_and_methods_agree():
    for method, info in registry.available().items():
        old = REMOVED_OPTIONS.get(method, {}).keys() | RENAMED_OPTIONS.get(method, {}).keys()
        assert not old & info.options.keys(), method
        assert set(RENAMED_OPTIONS.get(method, {}).values()) <= info.options.keys(), method
    assert REMOVED_OPTIONS.keys() | RENAMED_OPTIONS.keys() <= registry.available().keys()


def test_a_study_that_names_a_removed_option_says_so():
    from quantlens.studies.backend import Backend

    with pytest.raises(QuantlensError, match="option distillation of quantlens-best was removed"):
        Backend().method("best", {"distillation": 60})


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_examples_name_options_of_today(path):
    for spec in yaml.safe_load(path.read_text(encoding="utf-8"))["methods"]:
        if isinstance(spec, dict) and spec["name"] in registry.available():
            given = spec.get("options", {})
            assert given.keys() <= registry.get(spec["name"]).info.options.keys()


def test_the_warning_names_the_line_that_calls(tmp_path):
    script = tmp_path / "old.py"
    script.write_text(
        "from quantlens.methods import registry\n\nregistry.get('best').options({'vectors': False})\n", encoding="utf-8"
    )
    with pytest.warns(DeprecationWarning, match="quantlens: option vectors of quantlens-best") as told:
        runpy.run_path(str(script), run_name="__main__")
    assert (str(script), 3) in [(one.filename, one.lineno) for one in told]


def test_the_call_takes_both_names(loaded, pictures):
    with pytest.warns(DeprecationWarning, match="views_per_image"):
        q = ql.quantize(loaded["vit"], pictures, "best", "W8A8", iterations=0, views=0)
    assert q.plan.info["options"]["views_per_image"] == 0
    assert "views" not in q.plan.info["options"]
