"""What runtimes compute as integers: a target keeps a quantized model inside it from the start, so that the model that
is measured is the model that ships, and is fast.

A CPU target quantizes weights and inputs of linear and convolution layers and leaves the rest in float: the attention's
own products gain nothing at a few hundred tokens, and LayerNorm, softmax, GELU and sums cost both time and fidelity.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from quantlens.errors import UnknownNameError, UnsupportedError
from quantlens.formats import Quantizer, Uniform, affine_parameters, symmetric_parameters


@dataclass(frozen=True)
class Target:
    """A runtime's integers.

    edges: (site kind, edge) pairs that it computes in integers. weights, activations: widths it has kernels for;
    weights of 5 to 7 bits are stored and multiplied as 8 (with 7 or fewer, a sum of two products fits 16 bits:
    :mod:`quantlens.export.processor`). symmetric_weights: whether weights must have zero point 0.
    """

    name: str
    summary: str
    edges: frozenset[tuple[str, str]]
    weights: tuple[int, ...] = (8, 7, 6, 5, 4)
    activations: tuple[int, ...] = (8,)
    symmetric_weights: bool = True

    def takes(self, kind: str, edge: str) -> bool:
        """Whether an edge of a site of this kind becomes integers."""
        return (kind, edge) in self.edges

    def check_width(self, width: int, *, weight: bool) -> None:
        """Raises UnsupportedError for a width without kernels."""
        allowed = self.weights if weight else self.activations
        if width not in (*allowed, 32):
            what = "weights" if weight else "activations"
            choices = ", ".join(map(str, allowed[:-1])) + " or " * (len(allowed) > 1) + str(allowed[-1])
            raise UnsupportedError(
                f"{self.name} has no kernels for {width}-bit {what}: choose {choices} "
                f"(for example W8A8{', W4A8' if 4 in self.weights else ''}), or leave the target out to simulate"
            )

    def conform(self, key: str, quantizer: Quantizer, weight: Tensor | None = None) -> Quantizer:
        """The quantizer inside the target: symmetric where it must be, zero points among the codes.

        weight: the tensor that it quantizes, None for an activation. A symmetric range covers the largest value that
        the quantizer makes of it (not the quantizer's own range, which is 256 times the value where a row has a single
        one). Raises UnsupportedError for a format that is not uniform, or per channel on an activation.
        """
        if type(quantizer) is not Uniform:
            raise UnsupportedError(
                f"{key} has the format {quantizer.kind!r}, which {self.name} has no kernels for; choose a method with "
                "uniform formats (`quantlens methods`), or leave the target out to simulate"
            )
        if weight is not None:
            if not self.symmetric_weights or quantizer.symmetric:
                return quantizer
            values = quantizer(weight).abs()
            largest = values.amax() if quantizer.axis is None else values.movedim(quantizer.axis, 0).flatten(1).amax(1)
            return self.symmetric(largest, quantizer)
        low = (quantizer.qmin - quantizer.zero_point) * quantizer.scale
        high = (quantizer.qmax - quantizer.zero_point) * quantizer.scale
        if quantizer.axis is not None:
            raise UnsupportedError(
                f"{key} has one scale per {quantizer.granularity}, {self.name} one per tensor; choose another method "
                "or option, or leave the target out to simulate"
            )
        if quantizer.qmin <= int(quantizer.zero_point) <= quantizer.qmax and not quantizer.signed:
            return quantizer
        scale, zero = affine_parameters(low.clamp_max(0), high.clamp_min(0), quantizer.bits)
        return Uniform(scale, zero, quantizer.bits, signed=False)

    def symmetric(self, largest: Tensor, like: Uniform) -> Uniform:
        """Weights in ±largest ([] or [n]), with the granularity of another quantizer."""
        scale = symmetric_parameters(largest, like.bits)
        return Uniform(scale, None, like.bits, signed=True, granularity=like.granularity, axis=like.axis)


LINEAR = frozenset({("linear", "input"), ("linear", "weight"), ("conv", "input"), ("conv", "weight")})

TARGETS = {
    t.name: t
    for t in (
        Target("openvino-cpu", "OpenVINO on x86 CPUs: linear and conv layers, int8 weights per output channel", LINEAR),
        Target("onnxruntime-cpu", "ONNX Runtime on x86 CPUs: the same placement", LINEAR),
        Target(
            "tensorrt",
            "TensorRT: linear and conv layers and the attention's products, symmetric weights",
            LINEAR | {("scores", "q"), ("scores", "k"), ("probs", "output"), ("context", "v")},
            weights=(8,),
        ),
    )
}


def target_named(name: str | Target | None) -> Target | None:
    """A target by name. Raises UnknownNameError."""
    if name is None or isinstance(name, Target):
        return name
    if name not in TARGETS:
        raise UnknownNameError("target", name, TARGETS)
    return TARGETS[name]
