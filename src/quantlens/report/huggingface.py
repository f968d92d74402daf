"""quantlens among the quantizers of transformers: ``from_pretrained(..., quantization_config=QuantlensConfig(...))``.

Importing this module registers it. The model that transformers returns is of its own class; its layers have made room
for the quantized model, ``model.quantized``, which computes what it returns.
"""

from types import MethodType
from typing import Any

import torch

from quantlens.api import quantize
from quantlens.errors import QuantlensError, UnsupportedError
from quantlens.methods.registry import DEFAULT
from quantlens.qmodel import QuantizedModel
from quantlens.qmodel.checkpoint import load
from quantlens.qmodel.hub import LIBRARY

try:
    from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as missing:
    raise UnsupportedError(
        "QuantlensConfig needs transformers 5 or later: run `pip install 'quantlens[hf]'`"
    ) from missing


@register_quantization_config(LIBRARY)
class QuantlensConfig(QuantizationConfigMixin):
    """How a float model is quantized while transformers loads it; all as for :func:`quantlens.quantize`.

    calibration: pixel values [N, 3, H, W] or a SOURCE. options: of the method. checkpoint: the file of a model that is
    quantized already, in the folder that is loaded (:func:`quantlens.push_to_hub` writes it so).
    """

    def __init__(
        self,
        bits: Any = "W8A8",
        method: str = DEFAULT,
        calibration: Any = None,
        seed: int = 0,
        checkpoint: str | None = None,
        **options: Any,
    ):
        options.pop("quant_method", None)
        self.quant_method: Any = LIBRARY
        self.bits, self.method, self.seed, self.checkpoint, self.options = bits, method, seed, checkpoint, options
        self.calibration = calibration

    def to_dict(self) -> dict[str, Any]:
        """Plain data; calibration images only where they are a SOURCE."""
        kept = {"quant_method": self.quant_method, "bits": str(self.bits), "method": self.method, "seed": self.seed}
        named = {"calibration": self.calibration} if isinstance(self.calibration, str) else {}
        return kept | named | ({"checkpoint": self.checkpoint} if self.checkpoint else {}) | self.options


@register_quantizer(LIBRARY)
class _Quantizer(HfQuantizer):
    """Quantizes once transformers has loaded the float weights, or reads a checkpoint in their place."""

    quantization_config: QuantlensConfig
    is_trainable = False

    def is_serializable(self) -> bool:
        return False  # save_pretrained writes its own metadata; `model.quantized` is saved and pushed by quantlens

    def validate_environment(self, *given: Any, device_map: Any = None, **more: Any) -> None:
        config = self.quantization_config
        if config.checkpoint is None and config.calibration is None:
            raise QuantlensError("QuantlensConfig takes calibration images: give calibration=SOURCE or pixel values")
        if device_map is not None and len({str(place) for place in dict(device_map or {}).values()}) > 1:
            raise UnsupportedError("a model that quantlens quantizes lies on one device; leave device_map out")

    def update_attn_implementation(self, config: Any) -> Any:
        """The first hook that sees the model's configuration: the weights are in the checkpoint. The configuration on
        disk does not say so, so that without quantlens loading fails, and nothing is made of random weights."""
        if self.quantization_config.checkpoint is not None:
            config.transformers_weights = self.quantization_config.checkpoint
        return config

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **more: Any) -> None:
        self.quantized: QuantizedModel | None = None
        if self.quantization_config.checkpoint is not None:
            self.quantized = load(checkpoint_files[0])
            _clear(model)
            model._keys_to_ignore_on_load_unexpected, model._keys_to_ignore_on_load_missing = {".*"}, {"anchor"}

    def _process_model_after_weight_loading(self, model: Any, **more: Any) -> None:
        config = self.quantization_config
        if self.quantized is None:
            made = quantize(model, config.calibration, config.method, config.bits, config.seed, **config.options)
            self.quantized = made
            _clear(model)
        model.quantized = self.quantized
        model.forward = MethodType(_forward, model)


def _clear(model: Any) -> None:
    for held in (model._modules, model._parameters, model._buffers):
        held.clear()
    model.anchor = torch.nn.Parameter(torch.empty(0), requires_grad=False)  # says device and type to transformers


def _forward(self: Any, *images: Any, **given: Any) -> Any:
    """What the float model returns; arguments that are None are not given."""
    named = {name: value for name, value in given.items() if value is not None}
    as_dict = named.pop("return_dict", True)
    if set(named) - {"pixel_values"}:
        extra = ", ".join(sorted(set(named) - {"pixel_values"}))
        raise UnsupportedError(f"a model quantized by quantlens takes pixel_values alone, not {extra}")
    found = self.quantized(*images, **named)
    return found if as_dict or not hasattr(found, "to_tuple") else found.to_tuple()
