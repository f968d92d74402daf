"""quantlens: quantize a vision transformer after training, and see what every bit costs.

>>> import quantlens as ql
>>> model = ql.load_model("deit_tiny_patch16_224", weights="deit_tiny.safetensors")  # doctest: +SKIP
>>> qmodel = ql.quantize(model, calibration, method="repq-vit", bits="W4A4")  # doctest: +SKIP
>>> ql.evaluate(qmodel, id="imagenet:val", ood={"textures": "images:dtd"}).to_dict()  # doctest: +SKIP
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from quantlens import _moved
from quantlens._version import __version__

if TYPE_CHECKING:
    from quantlens import attention, calibration, export, formats, graph, methods, qmodel, transforms
    from quantlens.allocation import Allocation
    from quantlens.api import allocate, inspect, quantize
    from quantlens.errors import QuantlensError
    from quantlens.evaluation.foreign import open_foreign
    from quantlens.evaluation.run import evaluate
    from quantlens.export.exported import Artefact
    from quantlens.export.verify import verify
    from quantlens.models import Model, load_model
    from quantlens.plots import plot
    from quantlens.plugins import load_plugin
    from quantlens.qmodel import QuantizedModel
    from quantlens.qmodel.checkpoint import load, save
    from quantlens.report.card import card
    from quantlens.report.hub import push_to_hub
    from quantlens.report.huggingface import QuantlensConfig
    from quantlens.sensitivity import Inspection
    from quantlens.studies.bench import bench
    from quantlens.studies.compare import compare
    from quantlens.studies.recommend import recommend
    from quantlens.studies.reproduce import reproduce
    from quantlens.studies.results import results

__all__ = [
    "Allocation",
    "Artefact",
    "Inspection",
    "Model",
    "QuantizedModel",
    "QuantlensConfig",
    "QuantlensError",
    "__version__",
    "allocate",
    "attention",
    "bench",
    "calibration",
    "card",
    "compare",
    "evaluate",
    "export",
    "formats",
    "graph",
    "inspect",
    "load",
    "load_model",
    "load_plugin",
    "methods",
    "open_foreign",
    "plot",
    "push_to_hub",
    "qmodel",
    "quantize",
    "recommend",
    "reproduce",
    "results",
    "save",
    "transforms",
    "verify",
]

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
    "verify": "quantlens.export.verify",
    "load": "quantlens.qmodel.checkpoint",
    "evaluate": "quantlens.evaluation.run",
    "open_foreign": "quantlens.evaluation.foreign",
    "bench": "quantlens.studies.bench",
    "compare": "quantlens.studies.compare",
    "recommend": "quantlens.studies.recommend",
    "reproduce": "quantlens.studies.reproduce",
    "results": "quantlens.studies.results",
    "plot": "quantlens.plots",
    "card": "quantlens.report.card",
    "push_to_hub": "quantlens.report.hub",
    "QuantlensConfig": "quantlens.report.huggingface",
    "QuantlensError": "quantlens.errors",
    "load_plugin": "quantlens.plugins",
}
"""Where the names are; the others are packages."""

_moved.install()


def __getattr__(name: str) -> Any:
    """Load what is asked for when it is asked for: importing quantlens alone must not import torch."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in __all__ or f"quantlens.{name}" in _moved.PACKAGES:
        return import_module(f"quantlens.{name}")
    raise AttributeError(f"module 'quantlens' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
