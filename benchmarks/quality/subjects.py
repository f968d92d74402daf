"""What the cases measure on: the shipped model with calibration images drawn by the seed, and small random models."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import quantlens as ql

HELD_OUT = 256


@functools.cache
def digits() -> Any:
    """The shipped model, trained on digits. Nobody may change it."""
    return ql.load_model("digits-vit")


@functools.cache
def _all(source: str) -> Any:
    from quantlens import zoo
    from quantlens.data import load_images, open_source

    return load_images(open_source(source), zoo.available()["digits-vit"].preprocess, cache_dir=False)


@functools.cache
def calibration(seed: int, count: int = 32) -> Tensor:
    """Calibration images of the shipped model."""
    return _all(f"embedded:digits-calibration?n={count}&seed={seed}").tensor()


def letters(seed: int, count: int = 32) -> Tensor:
    """Letters, none of which the shipped model knows."""
    return _all(f"embedded:letters?n={count}&seed={seed}").tensor()


def one_class(seed: int, count: int = 32) -> Tensor:
    """Digits of one class."""
    everything = _all("embedded:digits-calibration")
    labels = torch.as_tensor(everything.labels)
    return everything.tensor()[labels == seed % int(labels.max() + 1)][:count]


@functools.cache
def held_out() -> tuple[Tensor, Tensor, Tensor]:
    """Images that nothing is calibrated on, their labels, and the shipped model's logits."""
    found = _all("embedded:digits-test")
    images = found.tensor()[:HELD_OUT]
    with torch.inference_mode():
        return images, torch.as_tensor(found.labels)[:HELD_OUT], digits()(images).clone()


def kl(expected: Tensor, got: Tensor) -> float:
    """Divergence of the probabilities of ``got`` from those of ``expected``, nats, mean of the images."""
    expected, got = expected.double().log_softmax(-1), got.double().log_softmax(-1)
    return float((expected.exp() * (expected - got)).sum(-1).mean())


def sqnr(expected: Tensor, got: Tensor) -> float:
    """Signal to quantization noise, dB."""
    return float(10 * torch.log10(expected.square().sum() / (got - expected).square().sum()))


def distance(qmodel: Any) -> float:
    """KL of a quantized shipped model on the held-out images."""
    images, _, expected = held_out()
    with torch.inference_mode():
        return kl(expected, qmodel(images))


@functools.cache
def _cost(seed: int, model: Any, images: int, options: tuple[tuple[str, Any], ...]) -> float:
    return distance(ql.quantize(model, calibration(seed, images), seed=seed, **dict(options)))


def cost(seed: int, *, model: Any = None, images: int = 32, **options: Any) -> float:
    """KL of the shipped model (or one of the same function) quantized with ``options``; measured once for each."""
    return _cost(seed, model or digits(), images, tuple(sorted(options.items())))


def ratio(one: dict[str, Any], other: dict[str, Any], **common: Any) -> Callable[[int], float]:
    """The quantity cost(one) / cost(other)."""
    return lambda seed: cost(seed, **{**common, **one}) / cost(seed, **{**common, **other})


@functools.cache
def uneven(channels: int, *, heads: bool) -> Any:
    """The shipped model with some channels of every LayerNorm made 16 times as large and undone in the layer behind
    it, and with ``heads`` those of q and k too: the same function."""
    model = ql.load_model("digits-vit")
    for block in model.module.blocks:
        width = block.attn.qkv.in_features
        for norm, linear in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
            norm.weight[:channels] *= 16
            norm.bias[:channels] *= 16
            linear.weight[:, :channels] /= 16
        for first, factor in ((0, 16), (width, 1 / 16)) if heads else ():
            block.attn.qkv.weight[first : first + channels] *= factor
            block.attn.qkv.bias[first : first + channels] *= factor
    return model


def small_network(kind: str, seed: int) -> nn.Module:
    """A random network of two blocks (``vit``) or two stages (``swin``) whose norms and biases are not trivial."""
    from timm.models import swin_transformer, vision_transformer

    size: dict[str, Any] = {"img_size": 32, "num_classes": 10}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "vit":
            model: nn.Module = vision_transformer.VisionTransformer(
                **size, patch_size=8, embed_dim=32, depth=2, num_heads=2
            )
        else:
            model = swin_transformer.SwinTransformer(
                **size, patch_size=2, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4)
            )
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.data += 0.2 * torch.randn_like(parameter)
            elif "pos" not in name:
                parameter.data = torch.randn_like(parameter) * parameter[0].numel() ** -0.5 * 1.5
    return model.eval().requires_grad_(False)


def loaded(network: nn.Module) -> Any:
    return ql.load_model(network, input_size=(3, 32, 32))


@functools.cache
def small(kind: str, seed: int) -> Any:
    """:func:`small_network`, loaded. Nobody may change it."""
    return loaded(small_network(kind, seed))


@functools.cache
def pictures(seed: int) -> Tensor:
    """[8, 3, 32, 32] smooth random images."""
    generator = torch.Generator().manual_seed(7 + seed)
    coarse = torch.randn(8, 3, 8, 8, generator=generator)
    noise = torch.randn(8, 3, 32, 32, generator=generator)
    return nn.functional.interpolate(coarse, size=32, mode="bicubic") + 0.1 * noise


@functools.cache
def _small_sqnr(kind: str, seed: int, options: tuple[tuple[str, Any], ...]) -> float:
    model = small(kind, seed)
    return noise(model, pictures(seed), seed=seed, **dict(options))


def noise(model: Any, images: Tensor, **options: Any) -> float:
    """SQNR of a model's logits, quantized, on the images it is calibrated on, dB."""
    qmodel = ql.quantize(model, images, **options)
    with torch.inference_mode():
        return sqnr(model(images), qmodel(images))


def small_sqnr(kind: str, seed: int, **options: Any) -> float:
    """:func:`noise` of a small model; measured once for each."""
    return _small_sqnr(kind, seed, tuple(sorted(options.items())))
