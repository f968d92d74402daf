"""The public face: ``quantize``, ``allocate`` and ``inspect`` (the rest is re-exported from the rooms)."""

import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from quantlens.allocation import Allocation, allocate as choose_widths, is_target, parse_target
from quantlens.ambient import isolated
from quantlens.calibration import Calibration
from quantlens.calibration.calls import Calls, called
from quantlens.data.given import peeked
from quantlens.errors import QuantlensError
from quantlens.graph import forget_if_changed
from quantlens.methods import Progress, registry
from quantlens.models import Model, load_model, model_for_tensors, state_sha256, unwrapped
from quantlens.models.modules import check_images
from quantlens.qmodel import Bits, QuantizedModel
from quantlens.sensitivity import Inspection, inspect as inspect_parts


@isolated
def quantize(
    model: Model | torch.nn.Module,
    calibration: Any,
    method: str = registry.DEFAULT,
    bits: str | Path | Bits | Allocation | Mapping[str, Any] = "W8A8",
    seed: int = 0,
    *,
    patch_bits: int | None = None,
    head_bits: int | None = None,
    outlier_channels: Literal["keep", "split"] | None = None,
    image: Literal["range", "pixels"] | None = None,
    target: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> QuantizedModel:
    """Quantize a float model after training.

    model: from :func:`load_model`, or an ``nn.Module`` (images [B, 3, H, W] -> logits [B, K]).
    calibration: float images [N, 3, H, W] prepared as the model wants them; PIL images, which are prepared so; a list,
    DataLoader or other iterable of either, with labels or not; a SOURCE or map-style data set, of which ``seed`` draws
    32 (``?n=64``: 64), as on the command line; None: images are made (:mod:`quantlens.data.made`). bits:
    ``W4A8``-style or ``FP32``; a floating-point format (``MXFP4``) or two (``WMXFP4AMXFP8``); for mixed precision a
    mapping from module names to widths with a "default", ``MP6`` (widths chosen by :func:`allocate` for the size of
    W6A6), an Allocation, or the .json file of one. patch_bits, head_bits, outlier_channels, image, target:
    :data:`quantlens.methods.base.SHARED_OPTIONS`; None is the method's default. options: the method's own (``quantlens
    methods`` lists them).

    Returns a :class:`~quantlens.qmodel.QuantizedModel`. Raises QuantlensError subclasses on anything the caller
    can mend.
    """
    (model, calibration), wanted = _loaded(model, calibration), read_bits(bits)
    options |= {
        "patch_bits": patch_bits,
        "head_bits": head_bits,
        "outlier_channels": outlier_channels,
        "image": image,
        "target": target,
    }
    allocation = None
    if not isinstance(wanted, Bits):
        registry.get(method).options(options)  # a mistake there is better told before the widths are chosen
        calibration = Calibration.of(calibration, model.preprocess, device=model.device, seed=seed)
        allocation = allocation_of(model, calibration, wanted, seed, progress=progress)
        wanted = allocation.bits()
    quantized = registry.get(method).apply(model, calibration, wanted, seed=seed, progress=progress, **options)
    if allocation is not None:
        quantized.plan.notes["allocation"] = allocation.summary()
    return quantized


@isolated
def allocate(
    model: Model | torch.nn.Module, calibration: Any, target: str | int = "MP6", **settings: Any
) -> Allocation:
    """Choose a width for the attention and the MLP of every block (mixed precision) under a budget.

    model, calibration: as for :func:`quantize`. target: ``MP6``, ``W6A6`` or 6, the uniform model whose size is the
    budget. settings: see :func:`quantlens.allocation.allocate`.

    >>> allocation = ql.allocate(model, images, "MP6", sensitivity="nuclear-norm", front=True)  # doctest: +SKIP
    >>> allocation.save("alloc.json")  # doctest: +SKIP
    >>> ql.quantize(model, images, method="easyquant", bits=allocation)  # doctest: +SKIP
    """
    return choose_widths(*_loaded(model, calibration), target, **settings)


@isolated
def inspect(
    model: Model | torch.nn.Module,
    images: Any,
    bits: str | Path | Bits | Allocation | Mapping[str, Any] = "W8A8",
    *,
    seed: int = 0,
    **settings: Any,
) -> Inspection:
    """Which layer hurts: what every site and every block does to the output when it alone is quantized, and the
    statistics of its weights and activations.

    model, images, bits: as for :func:`quantize`. settings: see :func:`quantlens.sensitivity.inspect`.

    >>> found = ql.inspect(model, images, bits="W8A8")  # doctest: +SKIP
    >>> found.ranked()[0].name  # doctest: +SKIP
    'blocks.7.mlp.fc2'
    """
    (model, images), wanted = _loaded(model, images), read_bits(bits)
    if not isinstance(wanted, Bits):
        images = Calibration.of(images, model.preprocess, device=model.device, seed=seed)
        wanted = allocation_of(model, images, wanted, seed).bits()
    return inspect_parts(model, images, wanted, seed=seed, **settings)


def read_bits(bits: str | Path | Bits | Allocation | Mapping[str, Any]) -> Bits | Allocation | str:
    """What ``bits`` says: widths, an allocation (of a .json file), or a target ``MP6`` to choose widths for. Raises
    QuantlensError for anything else."""
    if isinstance(bits, Allocation):
        return bits
    if is_target(bits):
        return f"MP{parse_target(str(bits))}"
    if isinstance(bits, Path) or (isinstance(bits, str) and bits.endswith(".json")):
        return Allocation.load(bits)
    return Bits.parse(bits)


def spelled(bits: Bits | Allocation | str) -> str:
    """How a person writes what :func:`read_bits` gave: ``W4A8``, ``MP6``."""
    return str(bits.bits() if isinstance(bits, Allocation) else bits)


def allocation_of(
    model: Model, calibration: Any, bits: Allocation | str, seed: int, *, progress: Progress | None = None
) -> Allocation:
    """The allocation itself, or one made for a target such as ``MP6`` (nuclear norm, size), which the model keeps for
    the next method on the same images. Raises QuantlensError for one that was made for another model."""
    if isinstance(bits, Allocation):
        bits.check(model)
        return bits
    images = Calibration.of(calibration, model.preprocess, device=model.device, seed=seed)
    key = f"allocation {bits}, seed {seed}, images {images.fingerprint}"
    if images.fingerprint is None or key not in model.derived:
        model.derived[key] = choose_widths(model, images, bits, front=True, seed=seed, progress=progress)
    return model.derived[key]


def _loaded(model: Model | torch.nn.Module, calibration: Any) -> tuple[Model, Any]:
    """A module as a Model, with the size of the calibration images, and these (of an iterator one has been read). A
    Model whose weights have changed since is another one."""
    if isinstance(model, torch.export.ExportedProgram):
        model = unwrapped(model)
    if not isinstance(model, torch.nn.Module):
        raise QuantlensError(
            f"a {type(model).__name__} was given where a model is wanted; give an nn.Module or what ql.load_model gives"
        )
    module = model.module if isinstance(model, Model) else unwrapped(model)
    check_images(module, type(module).__name__)
    if not isinstance(calibration, Calibration):
        calibration = called(calibration, module)
    calls = calibration if isinstance(calibration, Calls) else None
    if not isinstance(model, Model):
        size = None
        if not isinstance(calibration, Calibration):
            images, size = peeked(calibration.images if calls else calibration)
            calibration = calibration if calls else images
        model = load_model(model) if size is None else model_for_tensors(model, size)
        model.source = weakref.ref(module)
    elif forget_if_changed(model):
        model.checkpoint, model.checkpoint_sha256 = "memory", state_sha256(model.module.state_dict())
    if calls is not None:
        calibration = Calibration.of(calls.images, model.preprocess, device=model.device)
        calibration.others = calls.others
        if getattr(model, "example", None) is not None:
            model.derived.clear()  # it may have been called in another way
        model.example = calls.example
    return model, calibration
