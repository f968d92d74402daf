"""quantlens: quantize a vision transformer after training, and see what every bit costs.

>>> import quantlens as ql
>>> model = ql.load_model("deit_tiny_patch16_224", weights="deit_tiny.safetensors")  # doctest: +SKIP
>>> qmodel = ql.quantize(model, calibration, method="repq-vit", bits="W4A4")  # doctest: +SKIP
>>> ql.evaluate(qmodel, id="imagenet:val", ood={"textures": "images:dtd"}).to_dict()  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from quantlens import _moved
from quantlens._version import __version__

if TYPE_CHECKING:
    from quantlens import attention as attention
    from quantlens import export as export
    from quantlens import formats as formats
    from quantlens import methods as methods
    from quantlens.allocation import Allocation as Allocation
    from quantlens.api import allocate as allocate
    from quantlens.api import inspect as inspect
    from quantlens.api import quantize as quantize
    from quantlens.errors import QuantlensError as QuantlensError
    from quantlens.evaluation import evaluate as evaluate
    from quantlens.export.exported import Artefact as Artefact
    from quantlens.models import Model as Model
    from quantlens.models import load_model as load_model
    from quantlens.plots import plot as plot
    from quantlens.plugins import load_plugin as load_plugin
    from quantlens.qmodel import QuantizedModel as QuantizedModel
    from quantlens.qmodel.checkpoint import load as load
    from quantlens.qmodel.checkpoint import save as save
    from quantlens.sensitivity import Inspection as Inspection
    from quantlens.studies.compare import compare as compare
    from quantlens.studies.recommend import recommend as recommend
    from quantlens.studies.results import results as results

_HOMES = {
    "load_model": "quantlens.models",
    "Model": "quantlens.models",
    "quantize": "quantlens.api",
    "allocate": "quantlens.api",
    "inspect": "quantlens.api",
    "Allocation": "quantlens.allocation",
    "Inspection": "quantlens.sensitivity",
    "QuantizedModel": "quantlens.qmodel",
    "save": "quantlens.qmodel.checkpoint",
    "Artefact": "quantlens.export.exported",
    "load": "quantlens.qmodel.checkpoint",
    "evaluate": "quantlens.evaluation",
    "compare": "quantlens.studies.compare",
    "recommend": "quantlens.studies.recommend",
    "results": "quantlens.studies.results",
    "plot": "quantlens.plots",
    "QuantlensError": "quantlens.errors",
    "load_plugin": "quantlens.plugins",
}

_PACKAGES = frozenset({"attention", "calibration", "export", "formats", "graph", "methods", "qmodel", "transforms"})
"""Packages that people use by their names; ``quantlens.export`` can be called, too."""

__all__ = ["__version__", *sorted({*_HOMES, *_PACKAGES})]

_moved.install()


def __getattr__(name: str) -> Any:
    """Load what is asked for when it is asked for: importing quantlens alone must not import torch."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _PACKAGES or f"quantlens.{name}" in _moved.PACKAGES:
        return import_module(f"quantlens.{name}")
    raise AttributeError(f"module 'quantlens' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_PACKAGES})
