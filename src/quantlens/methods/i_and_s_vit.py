"""i-and-s-vit: I&S-ViT, an inclusive and stable method for pushing the limit of post-training quantization of vision
transformers (Zhong et al., arXiv 2311.10126, 2023).

* Shift-uniform-log2 quantizer for softmax outputs (section 3.2): see :mod:`quantlens.formats.shifted_log`. η is
  the one of eleven with the least squared error.
* Smooth optimisation strategy (section 3.3), block by block, by squared error towards the float model's output:

  1. weights in float, LayerNorm outputs quantized per channel, all other activations per tensor. The float weights are
     trained, straight through the activations' quantizers, on float inputs;
  2. LayerNorm outputs from channel- to layer-wise, by RepQ-ViT's exact rewriting;
  3. weights quantized per channel, trained again, now straight through their own quantizer, on the output of the
     quantized blocks before. Rounding is to the nearest; it is not learned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from quantlens.calibration import Calibration
from quantlens.formats import Quantizer
from quantlens.graph import Graph
from quantlens.methods._reconstruction import (
    CHECKPOINT,
    FULL,
    START_OPTIONS,
    activation_quantizers,
    portion,
    rewrite,
    steps,
    weight_quantizers,
)
from quantlens.methods.base import MATMUL_OPERANDS, Method, MethodInfo, Option, Run, Widths
from quantlens.methods.repq_vit import Reparameterization
from quantlens.qmodel import Plan
from quantlens.reconstruction import Settings, reconstruct
from quantlens.transforms import NormGroup

DEPARTURES = (
    "80 steps per block and stage, in batches of 8, on what images are given, instead of 1000 (200 at 6 bits) in "
    "batches of 64 with 1024 images; the learning rate is in units of the weight's scale (stage 3) or standard "
    "deviation (stage 1), theirs is 4e-5",
    "the target of both stages is the model as it was given: stage 1 changes the float weights, so that it is no "
    "longer the float model of the quantized one",
    "2^b softmax codes. Their forward pass has 2^b + 1, one more than b bits hold, their search 2^b",
    "η does not change once chosen; they store it as a parameter to be trained",
    "activation ranges have the least squared error, LayerNorm outputs RepQ-ViT's quantile ranges; so have the "
    "weights in stage 3 (theirs: nine percentiles)",
    "biases and LayerNorm parameters are not trained",
    "a unit whose loss on all calibration images did not fall keeps its start",
    "the zero point after the rewriting is an integer, as in our repq-vit; the reduction layers of Swin are rewritten "
    "too",
)


class IAndSViT(Method):
    info = MethodInfo(
        name="i-and-s-vit",
        title="I&S-ViT",
        paper="I&S-ViT: An Inclusive & Stable Method for Pushing the Limit of Post-Training ViTs Quantization",
        venue="arXiv",
        year=2023,
        url="https://arxiv.org/abs/2311.10126",
        quantizes=MATMUL_OPERANDS,
        summary="shift-uniform-log2 softmax; float weights trained first for channel-wise, then for layer-wise "
        "quantized activations and quantized weights",
        departures=DEPARTURES,
        aliases=("i&s-vit", "ias-vit"),
        options={
            **START_OPTIONS,
            "attention": replace(START_OPTIONS["attention"], default="tensor"),
            "softmax": replace(START_OPTIONS["softmax"], default="shifted-log2"),
            "smooth": Option(True, "stage 1, on float weights and channel-wise activations (the paper)", (True, False)),
            "iterations": Option(
                80, f"steps per block and stage, with {FULL} or more calibration images (the paper: 1000, with 1024)"
            ),
            "batch_size": Option(8, "images per step (the paper: 64)"),
            "lr_float": Option(0.002, "learning rate (Adam) of stage 1, in standard deviations of the weight"),
            "lr_weights": Option(0.02, "learning rate (Adam) of stage 3, in scales of the weight"),
            "checkpoint": CHECKPOINT,
        },
    )

    def build(self, graph: Graph, calibration: Calibration, bits: Widths, run: Run) -> Plan:
        original, plan, reports = graph.clone(share=True), Plan(), {}
        activations, norms = activation_quantizers(graph, calibration, bits, run)
        stages = ["smooth", "quantized"] if run["smooth"] else ["quantized"]
        for number, stage in enumerate(stages):
            plan.quantizers = dict(activations)
            if stage == "smooth":
                plan.quantizers |= channelwise(norms)
            else:
                plan.rewrites = rewrite(graph, norms)
                plan.quantizers |= weight_quantizers(graph, bits)
            reports[stage] = reconstruct(
                graph,
                plan,
                calibration,
                stage_settings(stage, calibration.count, run),
                seed=run.seed,
                reference=original,
                progress=portion(run.progress, number, len(stages)),
                checkpoint=f"{run['checkpoint']}/{stage}" if run["checkpoint"] else None,
            )
        plan.notes["reconstruction"] = {name: report.info() for name, report in reports.items()}
        return plan


def stage_settings(stage: str, images: int, run: Run) -> Settings:
    """Settings of stage 1 ("smooth") or 3 ("quantized")."""
    smooth = stage == "smooth"
    return Settings(
        ("weights",),
        inputs="float" if smooth else "quantized",
        iterations=steps("i-and-s-vit", run, images),
        batch_size=run["batch_size"],
        lr_weights=float(run["lr_float" if smooth else "lr_weights"]),
        float_weights=smooth,
    )


def channelwise(norms: Mapping[str, tuple[NormGroup, Reparameterization]]) -> dict[str, Quantizer]:
    """Quantizers per channel for the inputs of the linear layers after LayerNorms."""
    return {f"{linear.name}.input": found.channel for group, found in norms.values() for linear in group.linears}
