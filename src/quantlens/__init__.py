"""quantlens: quantize a vision transformer after training, and see what every bit costs.

>>> import quantlens as ql
>>> model = ql.load_model("deit_tiny_patch16_224", weights="deit_tiny.safetensors")  # doctest: +SKIP
>>> qmodel = ql.quantize(model, calibration, method="repq-vit", bits="W4A4")  # doctest: +SKIP
>>> ql.evaluate(qmodel, id="imagenet:val", ood={"textures": "images:dtd"}).to_dict()  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from quantlens._version import __version__

if TYPE_CHECKING:
    from quantlens.allocation import Allocation as Allocation
    from quantlens.allocation import Inspection as Inspection
    from quantlens.api import allocate as allocate
    from quantlens.api import inspect as inspect
    from quantlens.api import quantize as quantize
    from quantlens.deploy.artefact import Artefact as Artefact
    from quantlens.deploy.checkpoint import load as load
    from quantlens.deploy.checkpoint import save as save
    from quantlens.deploy.export import export as export
    from quantlens.errors import QuantlensError as QuantlensError
    from quantlens.models import Model as Model
    from quantlens.models import load_model as load_model
    from quantlens.quantizers import QuantizedModel as QuantizedModel
    from quantlens.studies.evaluate import evaluate as evaluate

_HOMES = {
    "load_model": "quantlens.models",
    "Model": "quantlens.models",
    "quantize": "quantlens.api",
    "allocate": "quantlens.api",
    "inspect": "quantlens.api",
    "Allocation": "quantlens.allocation",
    "Inspection": "quantlens.allocation",
    "QuantizedModel": "quantlens.quantizers",
    "save": "quantlens.deploy.checkpoint",
    "export": "quantlens.deploy.export",
    "Artefact": "quantlens.deploy.artefact",
    "load": "quantlens.deploy.checkpoint",
    "evaluate": "quantlens.studies.evaluate",
    "QuantlensError": "quantlens.errors",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    """Load what is asked for when it is asked for: importing quantlens alone must not import torch."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'quantlens' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
