"""erq: ERQ, error reduction for post-training quantization of vision transformers (Zhong et al., ICML 2024).

On top of RepQ-ViT's calibration (ranges, LayerNorm rewrites, log√2 softmax), the weights of each layer are fitted in
closed form, on the float network's inputs X and what the layer's own quantizer makes of them, X̄:

* activation error (section 4.1): the weight that brings the output on X̄ closest to the float output W·X, by ridge
  regression: least ‖W'X̄ − WX‖² + λ‖W' − W‖², the bias along with it;
* weight error (section 4.2): half of the input channels are rounded; their rounding is refined by flips of single
  weights to the neighbour on the other side; the channels that remain take up the error by ridge regression; and so on
  with half of what remains. At last the bias takes up the mean.

Weights get quantile ranges of least squared error, from ten candidates instead of RepQ-ViT's three (the authors' code).

Where the authors' code differs from this file, or is silent:

1. λ. Theirs is one number, 1000 or 2000, for the Gram matrices of all layers, which grow with the inputs and the
   number of images; here it is ``activation_damping`` and ``weight_damping`` times the mean of the matrix's diagonal,
   0.1 (the best by KL of a few tried on DeiT-Tiny, 234 images). Their bias is one more column under the same λ; here
   it is free, and the moments are taken about their means.
2. They invert a matrix per half. All halves follow from one Cholesky factor
   (:mod:`quantlens.reconstruction.closed_form`), for all output channels at once: 32 images of DeiT-Tiny take seconds.
3. A flip is judged by the error that is left once the other channels have taken up what they can; theirs by the half's
   own error. Every flip is the one that lowers it most; they flip where the gradient is largest, and revert and stop
   when the error has risen.
4. The halves are in the order of the channels, as in their code; the paper sorts them by error.
   ``weight_error=columns`` rounds channel by channel instead (as GPTQ does).
5. The patch embedding is treated as every layer, on patches, and reads the image at ``patch_bits``; theirs reads it
   in float, with ten times the λ and no refinement.
6. The dual uniform quantizer of the journal version (TPAMI 2025: a second scale per row for 5 % of the columns of qkv
   and fc1) is not here.
7. Layers without a bias get one. Layers that share a bias keep it. The graph's weights are replaced by the fitted ones,
   which the quantizer reproduces code by code.
"""

from __future__ import annotations

from torch import Tensor

from quantlens.calibration import Calibration, Observation
from quantlens.calibration.ranges import quantile_mse
from quantlens.errors import QuantlensError
from quantlens.graph import Graph
from quantlens.methods._layer_fit import Fitted, fit_layers
from quantlens.methods.base import MATMUL_OPERANDS, Method, MethodInfo, Option, Run, Widths
from quantlens.methods.repq_vit import RepQViT
from quantlens.qmodel import Plan
from quantlens.reconstruction.closed_form import (
    FLIPS,
    Grid,
    Moments,
    output_shift,
    ridge,
    round_columns,
    round_halves,
)

QUANTILES = (0.97, 0.98, 0.99, 0.995, 0.9995, 0.9997, 0.9999, 0.99995, 0.99999, 1.0)
"""Candidates of the authors' code for weights."""


class ERQ(Method):
    info = MethodInfo(
        name="erq",
        title="ERQ",
        paper="ERQ: Error Reduction for Post-Training Quantization of Vision Transformers",
        venue="ICML",
        year=2024,
        url="https://arxiv.org/abs/2407.06794",
        quantizes=MATMUL_OPERANDS,
        version=2,
        summary="weights by ridge regression on quantized inputs, rounded half by half, the rest taking up the error",
        departures="λ relative to the inputs; flips judged by the error that is left; no dual weight quantizer",
        options={
            **RepQViT.info.options,
            "activation_error": Option(
                "ridge",
                "the activations' error: ridge (weights and bias take it up, the paper), bias (its mean alone) or none",
                ("ridge", "bias", "none"),
            ),
            "weight_error": Option(
                "halves",
                "the weights' error: halves (the paper), columns (one by one, as GPTQ) or none (rounded to nearest)",
                ("halves", "columns", "none"),
            ),
            "flips": Option(FLIPS, "most flips per output channel and half (0: none)"),
            "activation_damping": Option(0.1, "λ of the activations' error, as a multiple of the inputs' mean square"),
            "weight_damping": Option(0.1, "λ of the weights' error, as a multiple of the inputs' mean square"),
        },
    )

    def build(self, graph: Graph, calibration: Calibration, bits: Widths, run: Run) -> Plan:
        first, second = float(run["activation_damping"]), float(run["weight_damping"])
        if not (first > 0 and second > 0) or int(run["flips"]) < 0:
            raise QuantlensError(
                f"erq: activation_damping={first}, weight_damping={second}, flips={run['flips']}: both dampings above "
                "0 and no negative number of flips (0.1, 0.1 and 100)"
            )

        def fit(weight: Tensor, moments: Moments, width: int, free_bias: bool) -> Fitted:
            shifts = free_bias and run["activation_error"] != "none"
            return _fit(weight, moments if shifts else moments.uncentred(), bits, width, shifts, run)

        plan = RepQViT().build(graph, calibration, bits, Run(run.options, run.seed))
        count = fit_layers(graph, calibration, plan, fit, run, network=False)
        plan.rewrites.append(f"weights of {count} layers fitted to the float outputs on quantized inputs, and rounded")
        return plan


def _fit(weight: Tensor, moments: Moments, bits: Widths, width: int, shifts: bool, run: Run) -> Fitted:
    """One layer: weight [out, in]; its quantizer, its values on the grid, and (``shifts``) what its bias is off by."""
    second = float(run["weight_damping"])
    fitted = weight
    if run["activation_error"] == "ridge":
        fitted = ridge(weight, moments, float(run["activation_damping"]))
    low, high = quantile_mse(Observation.of(fitted, 1 - QUANTILES[0]), width, QUANTILES)
    quantizer = bits.weights(low, high, width)
    grid = Grid.of(quantizer)
    if run["weight_error"] == "halves":
        value = round_halves(fitted, moments.gram, grid, damping=second, flips=int(run["flips"]))
    elif run["weight_error"] == "columns":
        value = round_columns(fitted, moments.gram, grid, damping=second)
    else:
        value = grid.round(fitted)
    return Fitted(quantizer, value, output_shift(weight, value, moments) if shifts else None)
