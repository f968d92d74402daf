"""erq: ERQ, error reduction for post-training quantization of vision transformers (Zhong et al., ICML 2024).

On top of RepQ-ViT's calibration (ranges, LayerNorm rewrites, log√2 softmax), the weights of each layer are fitted in
closed form, on the float network's inputs X and what the layer's own quantizer makes of them, X̄:

* activation error (section 4.1): the weight that brings the output on X̄ closest to the float output W·X, by ridge
  regression: least ‖W'X̄ − WX‖² + λ‖W' − W‖², the bias along with it;
* weight error (section 4.2): half of the input channels are rounded; their rounding is refined by flips of single
  weights to the neighbour on the other side; the channels that remain take up the error by ridge regression; and so on
  with half of what remains. At last the bias takes up the mean.

Weights get quantile ranges of least squared error, from ten candidates instead of RepQ-ViT's three (the authors' code).
"""

from dataclasses import replace

from quantlens.calibration import Calibration, Observation, quantile_mse
from quantlens.methods._scale_search import IMAGE
from quantlens.methods.base import MATMUL_OPERANDS, Departure, Graph, Method, MethodInfo, Option, Plan, Run, Widths
from quantlens.methods.composition import Fitted, Layer, fit_layers
from quantlens.methods.repq_vit import RepQViT
from quantlens.reconstruction.closed_form import Grid, output_shift, ridge, round_halves

QUANTILES = (0.97, 0.98, 0.99, 0.995, 0.9995, 0.9997, 0.9999, 0.99995, 0.99999, 1.0)
"""Candidates of the authors' code for weights."""


READINGS = (
    "λ, a hyperparameter whose value depends on the inputs' size and number, is given relative to the mean of the Gram "
    "matrix's diagonal, 0.1 for both; the bias is free, the moments are taken about their means",
    "all halves follow from one Cholesky factor, for all output channels at once",
    "every flip is the one that lowers the error most; the authors' code flips where the gradient is largest",
    "the patch embedding is treated as every layer, on patches; theirs reads the image in float, without refinement",
    "the dual uniform quantizer of the journal version (TPAMI 2025) is not here",
    "layers without a bias get one; layers that share a bias keep it",
)


class ERQ(Method):
    info = MethodInfo(
        name="erq",
        title="ERQ",
        paper="ERQ: Error Reduction for Post-Training Quantization of Vision Transformers",
        venue="ICML",
        year=2024,
        url="https://arxiv.org/abs/2407.06794",
        quantizes=MATMUL_OPERANDS,
        version=4,
        summary="weights by ridge regression on quantized inputs, rounded half by half, the rest taking up the error",
        departures=(
            IMAGE,
            Departure(
                "judged_by_rest",
                True,
                False,
                "a flip is judged by the error that is left once the other channels have taken up what they can; the "
                "paper's by the half's own error",
            ),
            Departure(
                "sorted_columns", False, True, "the halves are in the order of the channels, not of their errors"
            ),
        ),
        readings=READINGS,
        options={
            **RepQViT.info.options,
            "activation_damping": Option(
                0.1, "λ of the activations' error, as a multiple of the inputs' mean square", above=0
            ),
            "weight_damping": Option(0.1, "λ of the weights' error, as a multiple of the inputs' mean square", above=0),
        },
    )

    def build(self, graph: Graph, calibration: Calibration, bits: Widths, run: Run) -> Plan:
        def fit(layer: Layer) -> Fitted:
            moments = layer.moments(network=False)
            if moments is None:
                return Fitted(plan.quantizers[f"{layer.site.name}.weight"])
            moments = moments if layer.free else moments.uncentred()
            target = ridge(layer.weight, moments, run["activation_damping"])
            low, high = quantile_mse(Observation.of(target, 1 - QUANTILES[0]), layer.width, QUANTILES)
            quantizer = bits.weights(low, high, layer.width)
            grid, order, own = Grid.of(quantizer), None, not run["judged_by_rest"]
            if run["sorted_columns"]:
                order = (grid.round(target) - target).square().sum(0).argsort(descending=True)
            value = round_halves(target, moments.gram, grid, damping=run["weight_damping"], order=order, own=own)
            return Fitted(quantizer, value, output_shift(layer.weight, value, moments) if layer.free else None)

        plan = RepQViT().build(graph, calibration, bits, replace(run, progress=None))
        count = fit_layers(graph, calibration, bits, plan, fit, run, sequential=False)
        plan.rewrites.append(f"weights of {count} layers fitted to the float outputs on quantized inputs, and rounded")
        return plan
