"""repq-vit: RepQ-ViT, scale reparameterization for post-training quantization of vision transformers (Li et al., ICCV
2023).

Complex quantizers are calibrated, simple ones are shipped (section 3):

* LayerNorm outputs get a scale and zero point per channel; an exact rewrite of the LayerNorm and of the linear layer
  after it (section 3.2, eq. 9–13) turns them into one scale s̃ and zero point z̃ for the tensor: with r = s/s̃ and t
  = s̃(z̃ − z), γ ← γ/r, β ← β/r − t, W ← W·diag(r), bias ← bias + W·t (the new W).
* softmax outputs get log√2 codes (section 3.3), which shift and add can run.
* everything else: weights per output channel and activations per tensor, asymmetric uniform; all ranges are quantile
  ranges (orders 0.999, 0.9999, 0.99999) with the least squared error.

Calibration is sequential (each layer sees activations as the quantized layers before it make them), 32 images, the
image itself at 8 bits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantlens.calibration import (
    REPQ_QUANTILES,
    Calibration,
    CalibrationPass,
    EdgeView,
    Observation,
    Replacement,
    affine,
    log_by_quantile,
    quantile_mse,
)
from quantlens.formats import Uniform, affine_parameters, is_constant
from quantlens.methods.base import (
    MATMUL_OPERANDS,
    Edge,
    Graph,
    Method,
    MethodInfo,
    Option,
    Plan,
    Run,
    Widths,
    quantized_edges,
)
from quantlens.transforms import NormGroup, find_norm_groups, rescale_norm

TAIL = 1.0 - min(REPQ_QUANTILES)


@dataclass(frozen=True)
class Reparameterization:
    """How one LayerNorm's channels become one tensor: LN' = LN/r − t, W' = W·diag(r) (eq. 11–13).

    scale [C]: r. shift [C]: t. layer: the tensor-wise quantizer of LN'. channel: the channel-wise quantizer of LN,
    the same codes up to an offset.
    """

    scale: Tensor
    shift: Tensor
    layer: Uniform
    channel: Uniform


Norms = dict[str, tuple[NormGroup, Reparameterization]]
"""LayerNorms that are reparameterized, by name."""


class RepQViT(Method):
    info = MethodInfo(
        name="repq-vit",
        title="RepQ-ViT",
        paper="RepQ-ViT: Scale Reparameterization for Post-Training Quantization of Vision Transformers",
        venue="ICCV",
        year=2023,
        url="https://arxiv.org/abs/2212.08254",
        quantizes=MATMUL_OPERANDS,
        version=3,
        summary="LayerNorm outputs from channel- to tensor-wise by exact rewriting; log√2 softmax; MSE quantile ranges",
        readings=(
            "the layer-wise zero point is the rounded mean of the channels', an integer that is a code; theirs is not",
            "a layer is rewritten when it is reached; theirs calibrate once more in a second pass",
            "log√2: zero is one of the 2^b codes, where theirs has 2^b + 1",
            "candidate ranges of large tensors are judged on 2^19 of the values and on all extreme ones, those of "
            "softmax outputs on the former alone; theirs on all values",
            "a channel that is constant (LayerNorm weight 0), where theirs divides by zero, is represented exactly and "
            "does not take part in the mean scale",
            "the products' operands are quantized wherever the model scales them; theirs scales Swin's q before",
            "the last norm, before the classifier, is left alone, as theirs",
        ),
        aliases=("repq", "repqvit"),
        options={
            "layernorm": Option(
                "reparameterized",
                "LayerNorm outputs: reparameterized (the paper), tensor or channel (its ablations, Table 3)",
                ("reparameterized", "tensor", "channel"),
            ),
            "softmax": Option(
                "log-sqrt2",
                "softmax outputs: log-sqrt2 (the paper), log2 or uniform",
                ("log-sqrt2", "log2", "uniform"),
            ),
        },
    )

    def build(self, graph: Graph, calibration: Calibration, bits: Widths, run: Run) -> Plan:
        groups = norm_groups(graph) if run["layernorm"] != "tensor" else {}
        rewritten = run["layernorm"] == "reparameterized"
        plan, norms = Plan(), Norms()

        def on_edge(edge: Edge, view: EdgeView) -> Replacement:
            width, group = bits.of(graph, edge), groups.get(edge.site)
            name = "" if group is None else group.norm.name
            if edge.is_weight and rewritten and name in norms:
                scale = norms[name][1].scale
                weight = graph.tensor(str(edge.value.target)) * scale
                made = bits.weights(*quantile_mse(Observation.of(weight, TAIL), width), width)
                plan.quantizers[edge.key], value = made, made(weight) / scale
                return lambda _: value
            if group is not None and not edge.is_weight:
                if not rewritten or name not in norms:
                    norms[name] = group, reparameterize(*quantile_mse(view(axis=-1, tail=TAIL), width), width)
                found = norms[name][1]
                plan.quantizers[edge.key] = found.layer if run["layernorm"] != "channel" else found.channel
                return found.channel
            if edge.is_weight:
                made = bits.weights(*quantile_mse(view(axis=0, tail=TAIL), width), width)
            elif edge.key.endswith(".probs.output") and run["softmax"] != "uniform":
                made = log_by_quantile(view(tail=TAIL), width, steps=2 if run["softmax"] == "log-sqrt2" else 1)
            else:
                made = affine(*quantile_mse(view(tail=TAIL), width), width)
            plan.quantizers[edge.key] = made
            return made

        shown = CalibrationPass(graph, calibration, sequential=True, seed=run.seed)
        shown.run(quantized_edges(graph, bits), on_edge, run.progress)
        plan.rewrites = rescale_norms(graph, norms) if rewritten else []
        return plan


def norm_groups(graph: Graph) -> dict[str, NormGroup]:
    """The LayerNorms that are reparameterized, by the names of the linear layers after them; not the classifier's."""
    heads = {site.name for site in graph.sites.head}
    groups = [g for g in find_norm_groups(graph) if not any(linear.name in heads for linear in g.linears)]
    return {linear.name: group for group in groups for linear in group.linears}


def rescale_norms(graph: Graph, norms: Norms) -> list[str]:
    """Rewrite LayerNorms, by name; sentences for the plan."""
    for group, found in norms.values():
        rescale_norm(graph, group, found.scale, found.shift)
    return [f"LayerNorm outputs reparameterized from channel- to layer-wise at {len(norms)} norms"] if norms else []


def reparameterize(low: Tensor, high: Tensor, bits: int) -> Reparameterization:
    """From the channels' ranges [C] to one scale and zero point (section 3.2).

    s̃ = mean(s), z̃ = round(mean(z)) over the channels that vary; r = s/s̃, t = s̃(z̃ − z). z̃ is brought into the
    range of codes: t makes up for any choice of it. A constant channel keeps r = 1 and is shifted to 0, which is exact.
    """
    scale, zero = affine_parameters(low, high, bits)
    alive = ~is_constant(low, high, bits)
    if not bool(alive.any()):
        alive = torch.ones_like(alive)
    layer_scale = scale[alive].double().mean()
    layer_zero = zero[alive].double().mean().round().clamp(0, 2**bits - 1)
    ratio = torch.where(alive, scale.double() / layer_scale, 1.0)
    shift = torch.where(alive, layer_scale * (layer_zero - zero.double()), low.double())
    layer = Uniform(layer_scale.float(), layer_zero, bits, signed=False)
    channel = Uniform(scale, zero, bits, signed=False, granularity="channel", axis=-1)
    return Reparameterization(ratio.float(), shift.float(), layer, channel)
