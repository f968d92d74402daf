"""Published methods of calibration and closed form: each better than what it starts from, and than its ablations."""

from __future__ import annotations

from typing import Any

import torch

import quantlens as ql
from benchmarks.quality.case import Case, Quantity
from benchmarks.quality.subjects import (
    calibration,
    digits,
    held_out,
    loaded,
    noise,
    pictures,
    ratio,
    small,
    small_network,
    small_sqnr,
)
from quantlens.methods import registry

QUICK: dict[str, dict[str, Any]] = {
    **{name: {"iterations": 4} for name in ("qdrop", "fima-q", "i-and-s-vit")},
    "quantlens-best": {"iterations": 4},
    "aphq-vit": {"iterations": 4, "mlp_iterations": 10},
    "aocq": {"scale_iterations": 4},
    "vt-ptq": {"rounds": 2},
}
"""Fewer steps where a method trains or searches: these cases ask whether it works at all."""

DEAD = {"repq-vit": 9, "i-and-s-vit": 9, "gptq": 9, "erq": 9, "adalog": 11, "ptq4vit": 17, "fq-ptq": 7}
"""dB of the logits at W8A8 of a model with dead channels, 19 for the others. log√2 codes have steps of 41 % at any
width, and log2 codes (fq-ptq, i-and-s-vit) are coarser still; ptq4vit has one scale per weight tensor."""

GAP = {"i-and-s-vit": 1}
"""dB between 6 and 4 bits, 3 for the others: its softmax exponents are whole numbers, as coarse at any width."""


def _figures(seed: int, **options: Any) -> tuple[float, float]:
    """top-1 and NLL of the shipped model on the held-out images, quantized where options are given."""
    images, labels, logits = held_out()
    if options:
        with torch.inference_mode():
            logits = ql.quantize(digits(), calibration(seed), seed=seed, **options)(images)
    right = float((logits.argmax(1) == labels).double().mean())
    return right, float(torch.nn.functional.cross_entropy(logits.double(), labels))


def _lost(method: str) -> Quantity:
    """NLL that W8A8 adds."""
    return lambda seed: _figures(seed, method=method, bits="W8A8")[1] - _figures(seed)[1]


def _lost_top1(method: str) -> Quantity:
    return lambda seed: _figures(seed)[0] - _figures(seed, method=method, bits="W8A8")[0]


def _gap(method: str) -> Quantity:
    """dB from 6 to 4 bits."""
    options = {"method": method, **QUICK.get(method, {})}
    return lambda seed: (
        small_sqnr("swin", seed, bits="W6A6", **options) - small_sqnr("swin", seed, bits="W4A4", **options)
    )


def _dead(method: str) -> Quantity:
    """dB at W8A8 of a model with LayerNorm channels of weight 0."""

    def quantity(seed: int) -> float:
        network: Any = small_network("vit", seed)
        network.blocks[0].norm1.weight.data[[2, 9]] = 0.0
        network.blocks[0].norm1.bias.data[9] = 0.0
        network.blocks[1].mlp.fc1.weight.data[:, 4] = 0.0
        return noise(loaded(network), pictures(seed), method=method, bits="W8A8", **QUICK.get(method, {}))

    return quantity


def _difference(one: dict[str, Any], other: dict[str, Any], kind: str = "vit", **common: Any) -> Quantity:
    """dB of ``one`` above ``other`` on a small model."""
    return lambda seed: small_sqnr(kind, seed, **common, **one) - small_sqnr(kind, seed, **common, **other)


def _uneven_norms(one: str, other: str) -> Quantity:
    """repq-vit at W8A4 with LayerNorm outputs of very different size: dB of one treatment above another."""

    def quantity(seed: int) -> float:
        network: Any = small_network("vit", seed)
        generator = torch.Generator().manual_seed(seed)
        for block in network.blocks:
            for norm, linear in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
                factor = torch.exp(1.5 * torch.randn(32, generator=generator))
                norm.weight.data *= factor
                norm.bias.data *= factor
                linear.weight.data /= factor
        model, images = loaded(network), pictures(seed)
        found = [noise(model, images, method="repq-vit", bits="W8A4", layernorm=how, seed=seed) for how in (one, other)]
        return found[0] - found[1]

    return quantity


def _massive(seed: int) -> float:
    """KL with the massive channel split off to KL with it kept."""
    network: Any = small_network("vit", seed)
    network.blocks[1].mlp.fc1.bias.data[9] = 600.0
    network.blocks[1].mlp.fc2.weight.data[:, 9] *= 0.005
    model, images = loaded(network), pictures(seed)
    expected = model(images).double().log_softmax(1)
    found = []
    for how in ("split", "keep"):
        qmodel = ql.quantize(model, images, method="minmax", bits="W8A5", outlier_channels=how, seed=seed)
        found.append(float((expected.exp() * (expected - qmodel(images).double().log_softmax(1))).sum(1).mean()))
    return found[0] / found[1]


def _gradient(method: str, bits: str) -> Quantity:
    """Cosine of the quantized model's image gradients with the float one's."""

    def quantity(seed: int) -> float:
        model, found = small("vit", seed), []
        for one in (ql.quantize(model, pictures(seed), method=method, bits=bits, seed=seed), model):
            images = pictures(seed).clone().requires_grad_(True)
            one(images).square().sum().backward()
            found.append(images.grad.flatten())
        return float(torch.nn.functional.cosine_similarity(*found, dim=0))

    return quantity


def _class_activation(kind: str) -> Quantity:
    from quantlens.attention.maps import class_activation

    def quantity(seed: int) -> float:
        model, images = small(kind, seed), pictures(seed)
        quantized = ql.quantize(model, images, method="minmax", bits="W8A8", seed=seed)
        maps = [class_activation(one, images).flatten() for one in (model, quantized)]
        return float(torch.nn.functional.cosine_similarity(*maps, dim=0))

    return quantity


def _search_pays(**options: Any) -> Quantity:
    off = {"similarity": False, "ranking": False, "bias_correction": False}
    return _difference(options, off, method="vt-ptq", bits="W5A5")


LAYERNORM = {"method": "repq-vit", "bits": "W3A3"}
SHORT = {"method": "adalog", "bits": "W3A3", "rounds": 1, "steps": 1, "candidates": 32}
W4A4 = {"bits": "W4A4"}

CASES = (
    Case(
        "erq/repq", "KL to repq-vit's, W3A3", ratio({"method": "erq"}, {"method": "repq-vit"}, bits="W3A3"), below=0.6
    ),
    Case("adalog/repq", "KL to repq-vit's, W3A3, short search", ratio(SHORT, LAYERNORM), below=0.7),
    Case(
        "repq/percentile",
        "KL to percentile's, W4A4",
        ratio({"method": "repq-vit"}, {"method": "percentile"}, **W4A4),
        below=0.3,
    ),
    Case(
        "percentile/minmax",
        "KL to minmax's, W4A4",
        ratio({"method": "percentile"}, {"method": "minmax"}, **W4A4),
        below=0.85,
    ),
    *(
        Case(
            f"repq/{how}",
            f"KL with LayerNorm outputs {how} to one scale, W3A3",
            ratio({"layernorm": how}, {"layernorm": "tensor"}, **LAYERNORM),
            below=0.95,
        )
        for how in ("reparameterized", "channel")
    ),
    Case(
        "repq/uneven",
        "dB of reparameterized above one scale, uneven norms",
        _uneven_norms("reparameterized", "tensor"),
        above=3,
    ),
    Case(
        "repq/uneven-channel",
        "dB of a scale per channel above reparameterized, uneven norms",
        _uneven_norms("channel", "reparameterized"),
        below=2,
    ),
    Case(
        "minmax/four-bits",
        "top-1 at W4A4: four bits must show",
        lambda seed: _figures(seed, method="minmax", bits="W4A4")[0],
        below=0.95,
    ),
    *(
        Case(f"{method}/eight-bits", "NLL that W8A8 adds", _lost(method), below=0.02)
        for method in ("minmax", "percentile", "repq-vit")
    ),
    *(
        Case(f"{method}/eight-bits-top1", "top-1 that W8A8 costs", _lost_top1(method), below=0.01)
        for method in ("minmax", "percentile", "repq-vit")
    ),
    Case(
        "percentile/symmetric",
        "dB of asymmetric above symmetric, W6A6",
        _difference({"format": "asymmetric"}, {"format": "symmetric"}, method="percentile", bits="W6A6"),
        above=1,
    ),
    Case(
        "vt-ptq/similarity",
        "dB of the search by similarity above none, W5A5",
        _search_pays(ranking=False, bias_correction=False),
        above=0,
    ),
    Case("vt-ptq/all", "dB of all parts above none, W5A5", _search_pays(), above=0.5),
    Case(
        "fq/softmax",
        "dB of a uniform softmax above powers of two, W8A10",
        _difference({"lis": False}, {"lis": True}, method="fq-ptq", bits="W8A10"),
        above=6,
    ),
    Case(
        "fq/float-layernorm",
        "dB of a float LayerNorm above an integer one, W8A8",
        _difference({"integer_layernorm": False}, {"integer_layernorm": True}, method="fq-ptq", bits="W8A8", lis=False),
        below=2,
    ),
    Case("massive/split", "KL with the massive channel split off to kept, W8A5", _massive, below=0.6),
    Case("gradients/repq", "cosine of image gradients, W6A6 and float", _gradient("repq-vit", "W6A6"), above=0.7),
    Case("gradients/fq", "cosine of image gradients, W8A8 and float", _gradient("fq-ptq", "W8A8"), above=0.6),
    *(
        Case(
            f"gradients/cam-{kind}",
            "cosine of class activation maps, W8A8 and float",
            _class_activation(kind),
            above=0.9,
        )
        for kind in ("vit", "swin")
    ),
    *(
        Case(f"gap/{name}", "dB that 6 bits have above 4, small Swin", _gap(name), above=GAP.get(name, 3))
        for name in sorted(registry.available())
    ),
    *(
        Case(
            f"dead/{name}",
            "dB at W8A8 with dead LayerNorm channels, small ViT",
            _dead(name),
            above=DEAD.get(name, 19),
        )
        for name in sorted(registry.available())
    ),
)
