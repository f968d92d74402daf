"""gptq: GPTQ, accurate post-training quantization for generative pre-trained transformers (Frantar et al., ICLR 2023).

The weights of each layer are rounded column by column (input channel by input channel), all output channels together.
What a column's rounding does to the layer's output is taken up, as well as it can be, by the columns not yet rounded:

* H = 2·X̄X̄ᵀ over the calibration tokens, plus λ on its diagonal, λ = 1 % of the diagonal's mean (``damping``);
* the Cholesky factor of H⁻¹ gives every step's update at once (section 3.3, step 3);
* columns are taken 128 at a time, and a block's errors reach the others in one product (step 2).

``act_order=true``, a later addition of the authors' code: columns in the order of falling H diagonal, so that the
inputs with the most energy are rounded while all others can still make up for it.

Floating-point formats (``bits="MXFP4"``): activations as minmax's; of a weight the scales of all blocks are found first
and kept, and its columns rounded to what they allow.
"""

from dataclasses import replace

from quantlens.calibration import Calibration, Observation, minmax, quantile_mse
from quantlens.formats import Quantizer
from quantlens.methods._floating import BLOCK_SCALE, SEARCH, floating_weight
from quantlens.methods.base import MATMUL_OPERANDS, Departure, Graph, Method, MethodInfo, Option, Plan, Run, Widths
from quantlens.methods.composition import Fitted, Layer, fit_layers
from quantlens.methods.minmax import MinMax
from quantlens.methods.repq_vit import TAIL, RepQViT
from quantlens.reconstruction.closed_form import grid_of, round_columns


class GPTQ(Method):
    info = MethodInfo(
        name="gptq",
        title="GPTQ",
        paper="GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
        venue="ICLR",
        year=2023,
        url="https://arxiv.org/abs/2210.17323",
        quantizes=MATMUL_OPERANDS,
        version=4,
        summary="weights column by column, each one's error taken up by the rest; activations as repq-vit",
        departures=(
            Departure(
                "weight_range", "quantile", "minmax", "ranges of weights have the least squared error, as repq-vit's"
            ),
        ),
        readings=(
            "the paper quantizes weights alone; activations, LayerNorm rewrites, softmax and the order of calibration "
            "are those of repq-vit, so that the difference between the two methods is the weights",
            "a convolution is fitted on its patches; one with groups, or padding given as a word, is rounded to "
            "nearest",
            "layers that share one weight get that of the first",
            "with a floating-point format anywhere, all activations are quantized as minmax does, nothing is rewritten",
        ),
        floating=True,
        options={
            **RepQViT.info.options,
            "act_order": Option(
                False,
                "columns in the order of falling mean square of their inputs (else as they stand)",
                (True, False),
            ),
            "damping": Option(0.01, "λ, as a multiple of the inputs' mean square", above=0),
            "block_scale": BLOCK_SCALE,
        },
    )

    def build(self, graph: Graph, calibration: Calibration, bits: Widths, run: Run) -> Plan:
        def fit(layer: Layer) -> Fitted:
            moments = layer.moments(network=True)
            if moments is None:
                return Fitted(plan.quantizers[f"{layer.site.name}.weight"])
            gram, quantizer = moments.second, grid(layer)
            order = gram.diagonal().argsort(descending=True) if run["act_order"] else None
            levels = grid_of(quantizer, layer.stored)
            return Fitted(quantizer, round_columns(layer.weight, gram, levels, damping=run["damping"], order=order))

        def grid(layer: Layer) -> Quantizer:
            edge = layer.site.edges["weight"]
            name = bits.format_of(graph, edge)
            if name:
                return floating_weight(name, layer.site, edge, layer.stored, search=run["block_scale"] == SEARCH)
            seen = Observation.of(layer.weight, TAIL)
            low, high = minmax(seen) if run["weight_range"] == "minmax" else quantile_mse(seen, layer.width)
            return bits.weights(low, high, layer.width)

        start = MinMax() if bits.bits.floating else RepQViT()
        plan = start.build(graph, calibration, bits, replace(run, progress=None))
        count = fit_layers(graph, calibration, bits, plan, fit, run, sequential=True)
        plan.rewrites.append(f"weights of {count} layers replaced by their rounded values, errors taken up by columns")
        return plan
