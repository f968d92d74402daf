"""gptq: GPTQ, accurate post-training quantization for generative pre-trained transformers (Frantar et al., ICLR 2023).

The weights of each layer are rounded column by column (input channel by input channel), all output channels together.
What a column's rounding does to the layer's output is taken up, as well as it can be, by the columns not yet rounded:

* H = 2·X̄X̄ᵀ over the calibration tokens, plus λ on its diagonal, λ = 1 % of the diagonal's mean (``damping``);
* the Cholesky factor of H⁻¹ gives every step's update at once (section 3.3, step 3);
* columns are taken ``block`` (128) at a time, and a block's errors reach the others in one product (step 2).

``act_order=true``, a later addition of the authors' code: columns in the order of falling H diagonal, so that the
inputs with the most energy are rounded while all others can still make up for it.

GPTQ is about weights alone; here the paper is silent on all else:

1. Activations, LayerNorm rewrites, log√2 softmax and the order of calibration are those of ``repq-vit``, whose two
   options this method has too, so that the difference between the two methods is the weights.
2. X̄ are the inputs as the layer reads them: through its quantizer, behind quantized and already fitted layers, as
   in the paper, where weights are all that is quantized. ``inputs=float``: the float network's inputs through the
   layer's own quantizer.
3. Ranges of weights: theirs are min-max per output channel (or group) of the weight as it is when its turn comes.
   ``weight_range``: quantile (of least squared error, as repq-vit's; the default), mse or minmax.
4. A convolution is fitted on its patches; one with groups, or with padding given as a word, is rounded to nearest.
5. The biases stay. The graph's weights are replaced by the rounded ones, which the quantizer reproduces code by code.
   Layers that share one weight get that of the first.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from quantlens.calibration import Calibration, Observation
from quantlens.calibration.ranges import minmax, mse, quantile_mse
from quantlens.errors import QuantlensError
from quantlens.graph import Graph
from quantlens.methods._layer_fit import Fitted, fit_layers
from quantlens.methods.base import MATMUL_OPERANDS, Method, MethodInfo, Option, Run, Widths
from quantlens.methods.repq_vit import TAIL, RepQViT
from quantlens.qmodel import Plan
from quantlens.reconstruction.closed_form import BLOCK, Grid, Moments, round_columns

RANGES: dict[str, Callable[[Observation, int], tuple[Tensor, Tensor]]] = {
    "quantile": quantile_mse,
    "mse": mse,
    "minmax": lambda seen, _: minmax(seen),
}


class GPTQ(Method):
    info = MethodInfo(
        name="gptq",
        title="GPTQ",
        paper="GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
        venue="ICLR",
        year=2023,
        url="https://arxiv.org/abs/2210.17323",
        quantizes=MATMUL_OPERANDS,
        version=2,
        summary="weights column by column, each one's error taken up by the rest; activations as repq-vit",
        departures="activations quantized too, as in repq-vit; quantile ranges for weights",
        options={
            **RepQViT.info.options,
            "act_order": Option(
                False,
                "columns in the order of falling mean square of their inputs (else as they stand)",
                (True, False),
            ),
            "damping": Option(0.01, "λ, as a multiple of the inputs' mean square"),
            "block": Option(BLOCK, "columns whose errors reach the others together (speed alone)"),
            "inputs": Option(
                "network",
                "what weights are fitted on: inputs as the quantized network makes them (network, the paper), or the "
                "float network's through the layer's own quantizer (float)",
                ("network", "float"),
            ),
            "weight_range": Option("quantile", "ranges of weights: quantile, mse or minmax (the paper)", tuple(RANGES)),
        },
    )

    def build(self, graph: Graph, calibration: Calibration, bits: Widths, run: Run) -> Plan:
        damping, block = float(run["damping"]), int(run["block"])
        if not damping > 0 or block < 1:
            raise QuantlensError(
                f"gptq: damping={damping}, block={block}: damping above 0 and at least one column (0.01 and 128)"
            )

        def fit(weight: Tensor, moments: Moments, width: int, _: bool) -> Fitted:
            low, high = RANGES[run["weight_range"]](Observation.of(weight, TAIL), width)
            quantizer = bits.weights(low, high, width)
            gram = moments.second
            order = gram.diagonal().argsort(descending=True) if run["act_order"] else None
            value = round_columns(weight, gram, Grid.of(quantizer), damping=damping, order=order, block=block)
            return Fitted(quantizer, value)

        plan = RepQViT().build(graph, calibration, bits, Run(run.options, run.seed))
        count = fit_layers(graph, calibration, plan, fit, run, network=run["inputs"] == "network")
        plan.rewrites.append(f"weights of {count} layers replaced by their rounded values, errors taken up by columns")
        return plan
