"""quantlens-best: quantlens-fast, then every block, or the whole of a detector, trained for some hundred steps.

Rounding of the weights (AdaRound, from where they are rounded), static scales of activations, biases and LayerNorms are
trained towards the float block's output, on QDrop's mixed inputs, by the average perturbation Hessian (APHQ-ViT, Wu et
al., CVPR 2025, section 3.2), at the classifier by the divergence of the predictions, on the images and views of them.
Every eighth image and its views are held out: what training made of a block, and then of the network, is kept
where these gain by it.

A detector is trained as a whole, since every layer adds to the error of its boxes: the weights themselves, straight
through their quantizers, towards the float model's logits and boxes, on images and compositions of them.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from quantlens.calibration import CHUNK
from quantlens.calibration.images import composed, draw, with_views
from quantlens.formats import Quantizer
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
from quantlens.metrics.divergence import damage
from quantlens.reconstruction import DetectionLoss, MetricLoss, Settings, perturbation_metrics
from quantlens.reconstruction.units import frozen_hook, whole_network

FITTED = 64
"""Images that ranges, the closed form and the perturbation Hessian are made on, at most."""

STEPS, LONG, NARROW = 160, 400, 3
"""Steps per block, and where a width is of so few bits."""

WHOLE_STEPS, WHOLE_BATCH, WHOLE_IMAGES = 600, 16, 512
"""Steps and images per step of a detector; images and views of them that it is trained on, by default."""

HELD = 8
"""One of so many images is held out."""

FAST = QuantlensFast.info.options
"""Options of the start; those of them that are no options here have their defaults."""


def logits_of(graph: Graph, quantizers: Mapping[str, Quantizer], images: Tensor) -> Tensor:
    """What the quantized graph makes of images: [N, K]."""
    unit, end = whole_network(graph), graph.output
    hook = frozen_hook(graph, unit, quantizers)
    chunks = images.split(CHUNK)
    with torch.no_grad():
        return torch.cat([graph.run(unit.nodes, {graph.input: x}, hook=hook, keep=(end,))[end] for x in chunks])


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
        version=15,
        options={
            "activation_granularity": FAST["activation_granularity"],
            "softmax": FAST["softmax"],
            "iterations": Option(
                None,
                f"steps per block, with {FULL} or more calibration images; 0: none (None: {STEPS}, or {LONG} where a "
                f"weight or an activation has {NARROW} bits or fewer; of a detector, as a whole, {WHOLE_STEPS})",
                type="int",
                least=0,
            ),
            "batch_size": Option(None, f"images per step (None: 8, of a detector {WHOLE_BATCH})", type="int", least=1),
            "train_norms_and_biases": Option(
                True, "biases and LayerNorms' parameters are trained with every block", (True, False)
            ),
            "views_per_image": Option(
                None,
                "views that are trained on beside every calibration image; 0: none (None: 1, of a detector as many as "
                f"make {WHOLE_IMAGES} images)",
                type="float",
                least=0,
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
        whole, count = graph.boxes is not None, calibration.count
        narrow = any(bits.of(graph, edge) <= NARROW for edge in matmul_operand_edges(graph))
        defaults = {
            "iterations": WHOLE_STEPS if whole else LONG if narrow else STEPS,
            "batch_size": WHOLE_BATCH if whole else 8,
            "views_per_image": max(WHOLE_IMAGES / count - 1, 0) if whole else 1.0,
        }
        given = {name: value for name, value in run.options.items() if value is not None}
        run = replace(run, options={**run.options, **defaults, **given})
        iterations, fitted = steps(run, count), calibration.head(FITTED)
        options = {name: option.default for name, option in FAST.items()} | run.options
        start = replace(run, options=options, progress=portion(run.progress, 0, 2 if iterations else 1), seen=None)
        fast = QuantlensFast()
        plan = Plan({}, fast.rewrite(graph, fitted, bits, start))
        original = graph.clone(share=True)
        blocks = iterations > 0 and not whole
        metrics = perturbation_metrics(graph, fitted, seed=run.seed, outputs=run.outputs) if blocks else {}
        unrounded = fast.calibrate(graph, fitted, bits, plan, start)
        if not iterations:
            return plan
        views = round(run["views_per_image"] * count)
        held = [] if whole else [n for n in range(count + views) if n % count % HELD == HELD - 1]
        settings = (
            self.whole(run, iterations) if whole else self.blocks(run, iterations, MetricLoss(metrics, run.outputs))
        )
        view = composed if whole else lambda seen, generator: draw(seen, run["ood_view_share"], generator)
        images = with_views(calibration, views, run.seed, view)
        settings, begun = replace(settings, held_out=tuple(held)), (graph.clone(share=True), dict(plan.quantizers))
        told = train(graph, plan, images, run, settings, reference=original, part=(1, 2), unrounded=unrounded)
        plan.notes |= {"reconstruction": told, "iterations": iterations}
        if held:
            chunks = ([n - i * CHUNK for n in held if n // CHUNK == i] for i in range(images.pieces))
            seen = torch.cat([images.chunk(i)[numbers] for i, numbers in enumerate(chunks)])
            networks: list[tuple[Graph, dict[str, Quantizer]]] = [(original, {}), begun, (graph, plan.quantizers)]
            expected, *found = (logits_of(one, quantizers, seen) for one, quantizers in networks)
            before, after = (float(damage(expected, got, run.outputs)) for got in found)
            plan.notes["held_out"] = {"images": len(held), "before": before, "after": after}
            if not after < before:
                for name, tensor in begun[0].tensors().items():
                    graph.set_tensor(name, tensor)
                plan.quantizers = begun[1]
        return plan

    def blocks(self, run: Run, iterations: int, loss: MetricLoss) -> Settings:
        """How every block is trained."""
        return Settings(
            optimise=("rounding", "scales", *(("vectors",) if run["train_norms_and_biases"] else ())),
            loss=loss,
            inputs="mixed",
            input_drop=0.5,
            iterations=iterations,
            batch_size=run["batch_size"],
            lr_rounding=0.03,
            lr_scales=0.01,
            straight_through=True,
        )

    def whole(self, run: Run, iterations: int) -> Settings:
        """How a detector is trained."""
        return Settings(
            optimise=("weights", *(("vectors",) if run["train_norms_and_biases"] else ())),
            whole=True,
            loss=DetectionLoss(run.outputs),
            inputs="quantized",
            iterations=iterations,
            batch_size=run["batch_size"],
            lr_weights=0.02,
            lr_vectors=0.001,
        )
