"""What may carry an effect of training on what bits cost: properties of float weights, measured on ID images."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from quantlens.allocation.sensitivity import hessian_samples
from quantlens.ambient import isolated
from quantlens.attention.drift import outlier_tokens, token_norms
from quantlens.calibration import Calibration, CalibrationPass, EdgeView
from quantlens.graph import Edge, Graph
from quantlens.metrics.divergence import sqnr_db
from quantlens.qmodel import QuantizedModel
from quantlens.sensitivity.statistics import by_channel

PIECE = 32


class Mediator(NamedTuple):
    """title: in words. log: whether it is its logarithm that is compared, as it has no upper end."""

    title: str
    log: bool = False


MEASURED = {
    "channel_ratio": Mediator("largest ÷ median channel maximum", log=True),
    "kurtosis": Mediator("kurtosis of activations", log=True),
    "outlier_tokens": Mediator("outlier tokens, share"),
    "margin": Mediator("logit margin"),
    "sqnr_db": Mediator("SQNR of the logits, dB"),
    "hessian_trace": Mediator("trace of the Hessian", log=True),
}


@isolated
def mediators(
    quantized: QuantizedModel, module: nn.Module, images: Tensor, *, prefix: int, probes: int
) -> dict[str, float]:
    """The values of :data:`MEASURED` for a float model `module`, on images [B, 3, H, W] as the model wants them.

    channel_ratio, kurtosis: means over all activations that `quantized`, made of it without a change of its graph,
    quantizes; of the float model. outlier_tokens: share of the patch tokens after all blocks (:func:`.outlier_tokens`),
    without the first `prefix`. margin: the largest logit less the second, mean. sqnr_db: of the logits of `quantized`.
    hessian_trace: :func:`hessian_trace`.
    """
    images = images.to(quantized.device)
    with torch.no_grad():
        logits, tokens = _float_pass(quantized.graph, images)
        noise = logits - torch.cat([quantized(piece) for piece in images.split(PIECE)]).double()
        norms = torch.stack([token_norms(one, prefix) for one in tokens])
        top = logits.topk(2, dim=1).values
        ratio, kurtosis = _of_activations(quantized, images)
    sqnr = sqnr_db(float(logits.square().sum()), float(noise.square().sum()))
    assert sqnr is not None
    return {
        "channel_ratio": ratio,
        "kurtosis": kurtosis,
        "outlier_tokens": float(outlier_tokens(norms).double().mean()),
        "margin": float((top[:, 0] - top[:, 1]).mean()),
        "sqnr_db": sqnr,
        "hessian_trace": hessian_trace(module, images, probes),
    }


def _float_pass(graph: Graph, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits [B, K], float64, and the tokens [B, N, C] after every block."""
    calls = [node for node in graph.fx.nodes if node.op == "call_function"]
    wanted = [graph.output, *(block.result for block in graph.sites.blocks)]
    pieces = [graph.run(calls, {graph.input: piece}, keep=wanted) for piece in images.split(PIECE)]
    logits, *tokens = (torch.cat([found[node] for found in pieces]) for node in wanted)
    return logits.double(), tokens


def _of_activations(quantized: QuantizedModel, images: Tensor) -> tuple[float, float]:
    """Means over activations of the largest channel maximum over the median one (of those that have channels, and whose
    median is not 0), and of the kurtosis."""
    graph, ratios, kurtoses = quantized.graph, list[float](), list[float]()

    def on_edge(edge: Edge, view: EdgeView) -> None:
        values = list(view.tensors())
        channels = [by_channel(edge, graph.sites[edge.site].kind, value) for value in values]
        maxima = [seen.abs().flatten(0, -2).amax(0) for seen in channels if seen is not None]
        if maxima and (middle := float(torch.stack(maxima).amax(0).median())) > 0:
            ratios.append(float(torch.stack(maxima).max()) / middle)
        flat = torch.cat([value.flatten() for value in values]).double()
        centred = flat - flat.mean()
        variance = float(centred.square().mean())
        if variance > 0:
            kurtoses.append(float(centred.pow(4).mean()) / variance**2)

    wanted = [e for key, e in graph.sites.edges.items() if key in quantized.plan.quantizers and not e.is_weight]
    calibration = Calibration.of(images, quantized.preprocess, device=graph.device)
    CalibrationPass(graph, calibration, sequential=False).run(wanted, on_edge)
    return sum(ratios) / len(ratios), sum(kurtoses) / len(kurtoses)


def hessian_trace(module: nn.Module, images: Tensor, probes: int, seed: int = 0) -> float:
    """Trace, over all parameters, of the Hessian of the mean cross-entropy against the model's own softmax, which is
    its Gauss-Newton matrix (:func:`.hessian_samples`): no labels are needed, and no sample is below zero. Hutchinson's
    estimate from `probes` on every 32 images [B, 3, H, W]."""
    generator, total = torch.Generator(images.device).manual_seed(seed), 0.0
    leaves = {name: parameter.detach().clone().requires_grad_() for name, parameter in module.named_parameters()}
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        for piece in images.split(PIECE):
            logits = functional_call(module, leaves, (piece,))
            for values in hessian_samples(logits, list(leaves.values()), probes, generator):
                total += float(torch.stack(values).sum())
    return total / (probes * len(images))
