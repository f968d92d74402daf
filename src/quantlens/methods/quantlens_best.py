"""quantlens-best: quantlens-fast, then every block trained for some hundred steps.

1. :mod:`quantlens.methods.quantlens_fast` rotates the network, finds ranges and fits the weights in closed form, here
   without rounding them for good, on the first :data:`FITTED` images.
2. Block after block, the rounding of the weights (AdaRound's parameters, straight through the rounded direction), the
   scales of the activations, biases and LayerNorms are trained towards the output of the float block, on inputs of
   which half the elements are the quantized network's and half the float one's (QDrop). The loss weighs the squared
   error by the average perturbation Hessian (APHQ-ViT, Wu et al., CVPR 2025, section 3.2); at the classifier it is
   the divergence of the predictions.
3. Beside every calibration image stand views of it (:mod:`quantlens.calibration.images`): crops, and
   out-of-distribution images made of it. Blocks that see a few hundred images alone overfit them.
"""

from dataclasses import replace

from quantlens.calibration.images import with_views
from quantlens.methods._reconstruction import CHECKPOINT, FULL, portion, steps, train
from quantlens.methods.base import (
    MATMUL_OPERANDS,
    Calibration,
    Graph,
    Method,
    MethodInfo,
    Option,
    Plan,
    Run,
    Widths,
    matmul_operand_edges,
)
from quantlens.methods.quantlens_fast import QuantlensFast
from quantlens.reconstruction import MetricLoss, Settings, perturbation_metrics

FITTED = 64
"""Images that ranges, the closed form and the perturbation Hessian are made on, at most."""

STEPS, LONG, NARROW = 160, 400, 3
"""Steps per block, and where a width is of so few bits."""

FAST = QuantlensFast.info.options
"""Options of the start; those of them that are no options here have their defaults."""


class QuantlensBest(Method):
    info = MethodInfo(
        name="quantlens-best",
        title="quantlens-best",
        paper="quantlens: quantlens-fast, then short block reconstruction on images and views of them",
        venue="quantlens",
        year=2026,
        url="docs/methods.md",
        quantizes=MATMUL_OPERANDS,
        summary="quantlens-fast, then every block trained for a short time, on the images and views of them",
        aliases=("best",),
        arguments=QuantlensFast.info.arguments,
        version=11,
        options={
            "activation_granularity": FAST["activation_granularity"],
            "softmax": FAST["softmax"],
            "iterations": Option(
                None,
                f"steps per block, with {FULL} or more calibration images; 0: none (None: {STEPS}, or {LONG} where a "
                f"weight or an activation has {NARROW} bits or fewer)",
                type="int",
                least=0,
            ),
            "batch_size": Option(8, "images per step of a block", least=1),
            "train_norms_and_biases": Option(
                True, "biases and LayerNorms' parameters are trained with every block", (True, False)
            ),
            "views_per_image": Option(
                1.0, "views that blocks are trained on beside every calibration image (0: none)", least=0
            ),
            "ood_view_share": Option(
                0.5,
                "share of the views that are out-of-distribution images made of the image; the rest are crops",
                least=0,
                most=1,
            ),
            "checkpoint": CHECKPOINT,
        },
    )

    def build(self, graph: Graph, calibration: Calibration, bits: Widths, run: Run) -> Plan:
        if run["iterations"] is None:
            narrow = any(bits.of(graph, edge) <= NARROW for edge in matmul_operand_edges(graph))
            run = replace(run, options={**run.options, "iterations": LONG if narrow else STEPS})
        iterations, fitted = steps(run, calibration.count), calibration.head(FITTED)
        options = {name: option.default for name, option in FAST.items()} | run.options
        start = replace(run, options=options, progress=portion(run.progress, 0, 2 if iterations else 1), seen=None)
        fast = QuantlensFast()
        plan = Plan({}, fast.rewrite(graph, fitted, bits, start))
        original = graph.clone(share=True)
        metrics = perturbation_metrics(graph, fitted, seed=run.seed, sigmoid=run.sigmoid) if iterations else {}
        fast.calibrate(graph, fitted, bits, plan, start, rounded=iterations == 0)
        if iterations:
            settings = Settings(
                optimise=("rounding", "scales", *(("vectors",) if run["train_norms_and_biases"] else ())),
                loss=MetricLoss(metrics, run.sigmoid),
                inputs="mixed",
                input_drop=0.5,
                iterations=iterations,
                batch_size=run["batch_size"],
                lr_rounding=0.03,
                lr_scales=0.01,
                straight_through=True,
            )
            views = round(run["views_per_image"] * calibration.count)
            images = with_views(calibration, views, run["ood_view_share"], run.seed)
            told = train(graph, plan, images, run, settings, reference=original, part=(1, 2))
            plan.notes |= {"reconstruction": told, "iterations": iterations}
        return plan
