"""Old import paths lead to the new places, with a warning that names both and the release that drops them."""

from __future__ import annotations

import importlib
import importlib.util
import runpy
import sys
import warnings

import pytest

from quantlens import _moved


@pytest.mark.parametrize("old", sorted(_moved.MODULES))
def test_an_old_module_is_the_new_one_by_another_name(old):
    for name in [n for n in sys.modules if n == old]:
        del sys.modules[name]
    with pytest.warns(DeprecationWarning, match=f"{old} is {_moved.MODULES[old]} now; quantlens {_moved.DROPPED}"):
        module = importlib.import_module(old)
    new = importlib.import_module(_moved.MODULES[old])
    for name, value in vars(new).items():
        if not name.startswith("__") and f"{old}.{name}" not in _moved.RENAMED:
            assert getattr(module, name) is value


OLD_NAMES = [
    ("quantlens.quantizers", "Uniform", "quantlens.formats"),
    ("quantlens.quantizers", "QuantizedModel", "quantlens.qmodel"),
    ("quantlens.ranges", "Observation", "quantlens.calibration"),
    ("quantlens.ranges", "affine", "quantlens.calibration.ranges"),
    ("quantlens.deploy", "save", "quantlens.qmodel.checkpoint"),
    ("quantlens.graph", "fold_norm", "quantlens.transforms"),
    ("quantlens.reconstruction", "rotate_values", "quantlens.transforms"),
    ("quantlens.allocation", "inspect", "quantlens.sensitivity"),
    ("quantlens.allocation.allocation", "allocate", "quantlens.allocation.choosing"),
    ("quantlens.studies", "Result", "quantlens.evaluation.result"),
    ("quantlens.studies.bootstrap", "holm", "quantlens.metrics.bootstrap"),
    ("quantlens.studies.bootstrap", "replicate", "quantlens.evaluation.compare"),
    ("quantlens.studies.flat", "numbers", "quantlens.evaluation.result"),
    ("quantlens.studies.flat", "write_csv", "quantlens.studies.results"),
    ("quantlens.studies.evaluate", "Result", "quantlens.evaluation.result"),
    ("quantlens.studies.evaluate", "choose_scores", "quantlens.metrics"),
    ("quantlens.studies.evaluate", "measurable", "quantlens.evaluation.run"),
    ("quantlens.evaluation.compare", "SIGNIFICANT", "quantlens.evaluation.differences"),
    ("quantlens.report.attention", "write_drift", "quantlens.plots.precisions"),
    ("quantlens.attention.lookup", "survey", "quantlens.attention.image_sets"),
    ("quantlens.attention.lookup", "look_at", "quantlens.attention.image_sets"),
    ("quantlens.attention.lookup", "maps_of", "quantlens.attention.maps"),
    ("quantlens.attention.lookup", "evenly", "quantlens.attention.image_sets"),
]


@pytest.mark.parametrize(("package", "name", "new"), OLD_NAMES)
def test_an_old_name_of_a_package_is_found(package, name, new):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        module = importlib.import_module(package)
    with pytest.warns(DeprecationWarning, match=f"{package}.{name} is {new}.{name} now"):
        found = getattr(module, name)
    assert found is getattr(importlib.import_module(new), name)


@pytest.mark.parametrize("old", sorted(_moved.RENAMED))
def test_a_renamed_name_is_found(old):
    module, _, name = old.rpartition(".")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        package = importlib.import_module(module)
    with pytest.warns(DeprecationWarning, match=f"{old} is {_moved.RENAMED[old]} now"):
        found = getattr(package, name)
    place, _, new = _moved.RENAMED[old].rpartition(".")
    assert found is getattr(importlib.import_module(place), new)


def test_a_name_that_never_was_is_refused():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        importlib.import_module("quantlens.graph").nothing  # noqa: B018
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("quantlens.quantizers.nothing")


@pytest.mark.parametrize("name", sorted(_moved.REMOVED))
def test_what_is_gone_says_so(name):
    package, _, last = name.rpartition(".")
    with pytest.raises(ImportError, match=r"removed in quantlens 0\.3"):
        exec(f"from {package} import {last}")
    assert importlib.util.find_spec(package) is not None


def test_a_module_that_is_gone_says_so():
    with pytest.raises(ModuleNotFoundError, match=r"research/2026-11-29-distillation\.md tells"):
        importlib.import_module("quantlens.reconstruction.distillation")


def test_the_warning_names_the_line_that_imports(tmp_path):
    script = tmp_path / "old.py"
    script.write_text("import quantlens\nfrom quantlens.quantizers import Uniform\n", encoding="utf-8")
    with pytest.warns(DeprecationWarning, match=r"quantlens: quantlens\.quantizers\.Uniform") as told:
        runpy.run_path(str(script), run_name="__main__")
    assert (str(script), 2) in [(one.filename, one.lineno) for one in told]
