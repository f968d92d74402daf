"""aphq-vit: APHQ-ViT, average perturbation Hessian based reconstruction for vision transformers (Wu et al., CVPR 2025).

Block reconstruction as in QDrop (:mod:`quantlens.methods.qdrop`: AdaRound, LSQ, random dropping), with

1. a loss that weights the squared error of every element of a block's output by its average perturbation Hessian
   (section 3.3): the difference of the gradients of the model's output divergence, the block's output perturbed one way
   and the other, averaged over the images; see :func:`quantlens.reconstruction.block_metrics.perturbation_metrics`. At
   the logits the loss is the divergence itself. Softmax temperature 20;
2. MLP reconstruction (section 3.4), before anything is quantized: GELU becomes ReLU, and the two linear layers are
   refitted to their former output, with the hidden values as they are and clipped at a quantile of the positive ones;
   see :mod:`quantlens.reconstruction.mlp`.
"""

from torch import Tensor

from quantlens.methods._reconstruction import (
    DEPARTURES,
    HOURS,
    READINGS,
    drop_and_reconstruct,
    portion,
    started,
    step_options,
    steps,
)
from quantlens.methods.base import (
    MATMUL_OPERANDS,
    Calibration,
    Departure,
    Graph,
    Method,
    MethodInfo,
    Option,
    Plan,
    Run,
    Widths,
)
from quantlens.reconstruction import Fit, Metric, MetricLoss, find_mlps, find_units, perturbation_metrics, replace_gelu

QUANTILES = {2: 0.98, 3: 0.99, 4: 0.98}
"""Where hidden values are clipped, by width of the second layer's input."""


class APHQViT(Method):
    info = MethodInfo(
        name="aphq-vit",
        title="APHQ-ViT",
        paper="APHQ-ViT: Post-Training Quantization with Average Perturbation Hessian Based Reconstruction for Vision "
        "Transformers",
        venue="CVPR",
        year=2025,
        url="https://arxiv.org/abs/2504.02508",
        quantizes=MATMUL_OPERANDS,
        version=4,
        summary="GELU made ReLU and MLPs refitted; block reconstruction with random dropping, weighted by a "
        "perturbation Hessian",
        departures=(*DEPARTURES, Departure("mlp_iterations", 100, 20_000, "steps per MLP")),
        readings=(
            *READINGS,
            "the perturbation has random signs and 0.01 standard deviations of the output. The authors' code adds 1e-6 "
            "to every element: float32 cannot add this to values above 16, and any one number added to all channels of "
            "a token is taken away again by every later LayerNorm",
            "an MLP's second layer starts from ridge regression",
            "the target of all blocks is the model with GELU, as it was given",
            "hidden values are clipped at the quantile 0.98, at 3 bits 0.99, as in their configurations, and 0.99 at "
            "all widths that they do not name",
            "no scale for every token position; their configuration for 2 bits has it",
            "an MLP whose hidden values something else reads (outlier_channels=split) keeps its GELU",
        ),
        because=HOURS,
        aliases=("aphq",),
        options={
            "mlp_iterations": Option(100, "steps per MLP of 1024 tokens (the paper: 20000 of 32 images)", least=0),
            **step_options(20_000, 32),
        },
    )

    def build(self, graph: Graph, calibration: Calibration, bits: Widths, run: Run) -> Plan:
        original, mlps = graph.clone(share=True), find_mlps(graph)
        metrics = perturbation_metrics(graph, calibration, seed=run.seed, outputs=run.outputs)
        rewrites, notes = [], {}
        if mlps:
            width = bits.of(graph, mlps[0].second.edges["input"])
            fit = Fit(steps(run, calibration.count, "mlp_iterations"), quantile=QUANTILES.get(width, 0.99))
            weights, told = block_weights(graph, metrics), portion(run.progress, 0, 2)
            errors = replace_gelu(graph, calibration, fit, weights, seed=run.seed, progress=told)
            rewrites = [f"GELU replaced by ReLU and the layers refitted in {len(errors)} MLPs (not exact)"]
            notes = {"mlp": {name: [round(e, 6) for e in pair] for name, pair in errors.items()}}
        plan = started(graph, calibration, bits, run)
        plan.rewrites[:0], plan.notes = rewrites, notes
        drop_and_reconstruct(
            graph, plan, calibration, run, MetricLoss(metrics, run.outputs), reference=original, part=(1, 2)
        )
        return plan


def block_weights(graph: Graph, metrics: dict[str, Metric]) -> dict[str, Tensor]:
    """The metric's diagonal for the output of each MLP, by name of its second layer, mean 1: that of its block, whose
    output is the MLP's plus what does not depend on it."""
    unit_of = {edge.site: unit for unit in find_units(graph) for edge in unit.edges}
    found: dict[str, Tensor] = {}
    for mlp in find_mlps(graph):
        unit = unit_of[mlp.second.name]
        metric, shape = metrics.get(unit.name), mlp.second.node.meta["shape"]
        if metric is not None and shape[1:] == tuple(metric.diagonal.shape[1:]):
            found[mlp.second.name] = metric.diagonal / metric.diagonal.mean()
    return found
