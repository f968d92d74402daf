"""i-and-s-vit: I&S-ViT, an inclusive and stable method for pushing the limit of post-training quantization of vision
transformers (Zhong et al., arXiv 2311.10126, 2023).

* Shift-uniform-log2 quantizer for softmax outputs (section 3.2): see :mod:`quantlens.formats.log`. η is
  the one of eleven with the least squared error.
* Smooth optimisation strategy (section 3.3), block by block, by squared error towards the float model's output:

  1. weights in float, LayerNorm outputs quantized per channel, all other activations per tensor. The float weights are
     trained, straight through the activations' quantizers, on float inputs;
  2. LayerNorm outputs from channel- to layer-wise, by RepQ-ViT's exact rewriting;
  3. weights quantized per channel, trained again, now straight through their own quantizer, on the output of the
     quantized blocks before. Rounding is to the nearest; it is not learned.
"""

from quantlens.methods._reconstruction import (
    FULL,
    GUARDED,
    HOURS,
    activation_quantizers,
    step_options,
    steps,
    train,
    weight_quantizers,
)
from quantlens.methods.base import MATMUL_OPERANDS, Calibration, Departure, Graph, Method, MethodInfo, Plan, Run, Widths
from quantlens.methods.repq_vit import rescale_norms
from quantlens.reconstruction import Settings

SMOOTH, QUANTIZED = "smooth", "quantized"
"""Stages 1 and 3."""

RATES = {SMOOTH: 0.002, QUANTIZED: 0.02}
"""Learning rates (Adam), in standard deviations of the weight (stage 1) or its scale (stage 3)."""


class IAndSViT(Method):
    info = MethodInfo(
        name="i-and-s-vit",
        title="I&S-ViT",
        paper="I&S-ViT: An Inclusive & Stable Method for Pushing the Limit of Post-Training ViTs Quantization",
        venue="arXiv",
        year=2023,
        url="https://arxiv.org/abs/2311.10126",
        quantizes=MATMUL_OPERANDS,
        version=2,
        summary="shift-uniform-log2 softmax; float weights trained first for channel-wise, then for layer-wise "
        "quantized activations and quantized weights",
        departures=(
            Departure(
                "iterations", 80, 1000, f"steps per block and stage, here fewer in proportion below {FULL} images"
            ),
            Departure("batch_size", 8, 64, "images per step"),
            GUARDED,
        ),
        readings=(
            "the images are those that are given, theirs 1024; the learning rate is in units of the weight's scale "
            "(stage 3) or standard deviation (stage 1), theirs is 4e-5",
            "the target of both stages is the model as it was given: stage 1 changes the float weights, so that it is "
            "no longer the float model of the quantized one",
            "2^b softmax codes. Their forward pass has 2^b + 1, one more than b bits hold, their search 2^b",
            "η does not change once chosen; they store it as a parameter to be trained",
            "activation ranges have the least squared error, LayerNorm outputs RepQ-ViT's quantile ranges; so have the "
            "weights in stage 3 (theirs: nine percentiles)",
            "biases and LayerNorm parameters are not trained",
            "the zero point after the rewriting is an integer, as in our repq-vit; the reduction layers of Swin are "
            "rewritten too",
        ),
        because=HOURS,
        aliases=("i&s-vit", "ias-vit"),
        options=step_options(1000, 64),
    )

    def build(self, graph: Graph, calibration: Calibration, bits: Widths, run: Run) -> Plan:
        original, plan, told = graph.clone(share=True), Plan(), {}
        activations, norms = activation_quantizers(graph, calibration, bits, run, by_head=False, shifted=True)
        for number, stage in enumerate(RATES):
            if stage == SMOOTH:
                by_channel = {x.name: found.channel for group, found in norms.values() for x in group.linears}
                plan.quantizers = activations | {f"{name}.input": q for name, q in by_channel.items()}
            else:
                plan.rewrites = rescale_norms(graph, norms)
                plan.quantizers = activations | weight_quantizers(graph, bits)
            settings = Settings(
                ("weights",),
                inputs="float" if stage == SMOOTH else "quantized",
                iterations=steps(run, calibration.count),
                batch_size=run["batch_size"],
                lr_weights=RATES[stage],
                float_weights=stage == SMOOTH,
                guarded=run["guarded"],
            )
            part = number, len(RATES)
            told[stage] = train(graph, plan, calibration, run, settings, reference=original, stage=stage, part=part)
        plan.notes["reconstruction"] = told
        return plan
