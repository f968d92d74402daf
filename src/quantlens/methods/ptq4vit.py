"""ptq4vit: PTQ4ViT, twin uniform quantization with a Hessian-guided metric (Yuan et al., ECCV 2022).

* Twin uniform formats (section 3.2): softmax outputs have a fine range [0, s] and a coarse one (s, 1], GELU outputs a
  step for negative values and one for the others; see :mod:`quantlens.formats.uniform`. Everything else is symmetric
  uniform with signed codes: weights and inputs of layers per tensor (the three parts of qkv each on its own, the patch
  embedding per output channel), q, k and v per head.
* Hessian-guided metric (section 3.3): the error of a product's output is weighted by the squared gradient there,
  Σ (g ∘ (O − Ô))².
* Search (section 3.4): candidates Δ0·(α + i(β − α)/n), Δ0 = max|x|/(2ᵇ⁻¹ − ½), α = 0.01, β = 1.2, n = 100; s = 2⁻ⁱ, i =
  0 … 19. For every product the weight's scale (the left operand's) given the other one's, then the input's (the right
  operand's); 3 rounds. All products on the float model's tensors, none waits for another.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from quantlens.calibration import Product, ProductSampler, sample_products
from quantlens.calibration.ranges.guided import HEADS, Side, alternate, search
from quantlens.formats import Quantizer, Twin
from quantlens.graph import SCALINGS, VIEWS, op_name, origin
from quantlens.methods._scale_search import (
    IMAGE,
    factors_of,
    grouped_uniform,
    quantized_products,
    search_options,
    starting_scale,
)
from quantlens.methods.base import (
    FLOAT,
    MATMUL_OPERANDS,
    Calibration,
    Departure,
    Edge,
    Graph,
    Method,
    MethodInfo,
    Option,
    Plan,
    Run,
    Widths,
)
from quantlens.metrics.divergence import OutputKind, fisher_noise

SPLITS = 20
"""Candidates 2⁰, 2⁻¹ … for the end of the first range of softmax outputs."""

GELU_MINIMUM = 0.16997124254703522
"""−min GELU(x)."""


ALPHA, BETA = 0.01, 1.2


def fisher(logits: Tensor, reference: Tensor, generator: torch.Generator, outputs: OutputKind = "softmax") -> Tensor:
    """A linear function of the logits whose gradient v at them is :func:`.fisher_noise`. At any value before the
    logits, the squared gradient is then the Fisher matrix's diagonal in expectation."""
    return (logits * fisher_noise(reference, outputs, generator)).sum()


class PTQ4ViT(Method):
    info = MethodInfo(
        name="ptq4vit",
        title="PTQ4ViT",
        paper="PTQ4ViT: Post-Training Quantization for Vision Transformers with Twin Uniform Quantization",
        venue="ECCV",
        year=2022,
        url="https://arxiv.org/abs/2111.12293",
        version=2,
        quantizes=MATMUL_OPERANDS,
        summary="twin uniform formats for softmax and GELU; alternating scale search weighted by squared gradients",
        departures=(
            IMAGE,
            Departure(
                "floor",
                1.0,
                0.0,
                "squared gradients are raised by so many times their layer's mean, which adds plain squared error: the "
                "expansion that the metric comes from holds for small errors",
            ),
            Departure(
                "aligned_steps",
                True,
                False,
                "the two steps of GELU outputs are a power of two apart, as the paper asks of its hardware; in the "
                "authors' code, whose results it reports, the negative one is fixed at 0.17/2^(b−1)",
            ),
        ),
        readings=(
            "the authors' gradient is that of KL(float ‖ model) at the float model itself, where it is zero: what they "
            "store is rounding. Here it is that of a random linear function of the logits whose squared gradients are, "
            "in expectation, the diagonal of the Fisher matrix, the Hessian of that KL",
            "the two ranges of softmax outputs are disjoint, as in the paper; the code adds what it makes of both. The "
            "boundary is half way between the ranges' neighbouring levels",
            "candidates are judged on a sample: 512 rows of a layer's input, 1024 query rows of an attention product, "
            "at most 64 of one image, drawn in proportion to their squared gradients and weighted by the inverse. "
            "Rounds after the first try the 10 candidates on either side of the chosen one",
            "their first search of s has v in float; here v is at Δ0",
            "a convolution with groups, or with padding given as a word, has its operands matched alone",
        ),
        aliases=("ptq4-vit",),
        options={
            "weight_granularity": Option(
                "tensor",
                "weights of linear layers: one scale per tensor, three for qkv (the paper), or per output channel",
                ("tensor", "channel"),
            ),
            **search_options(3),
        },
    )

    def build(self, graph: Graph, calibration: Calibration, bits: Widths, run: Run) -> Plan:
        factors = torch.tensor(factors_of(run, BETA, ALPHA), dtype=torch.float64)
        products, fused, plan = quantized_products(graph, bits), fused_projections(graph), Plan()
        sampler = ProductSampler(torch.Generator().manual_seed(run.seed))
        samples = sample_products(
            graph, calibration, products, sampler, partial(fisher, outputs=run.outputs), floor=run["floor"]
        )
        for done, product in enumerate(products, 1):
            sample = samples.pop(product.site.name)
            widths = [bits.of(graph, edge) for edge in product.quantized]
            sides = [
                operand_side(product, edge, values, sample.largest[read.key], width, fused, factors, run)
                for edge, read, values, width in zip(
                    product.quantized, product.read, sample.operands, widths, strict=True
                )
            ]
            if sample.joined:
                sides = list(alternate(sides[0], sides[1], sample.gradient, run["rounds"]))
            else:
                sides = [search(s, Side(torch.eye(s.values.shape[-1]).to(s.values)), None) for s in sides]
            for edge, side, width in zip(product.quantized, sides, widths, strict=True):
                if side.current is not None:
                    plan.quantizers[edge.key] = quantizer_of(edge, side, width)
            if run.progress is not None:
                run.progress(done, len(products))
        return plan


# -- formats --------------------------------------------------------------------------------------------------------
def quantizer_of(edge: Edge, side: Side, bits: int) -> Quantizer:
    """The quantizer of an operand with the parameters found."""
    found: Tensor = side.current
    if edge.name == "output":
        return Twin.by_magnitude(int(found), bits)
    if after_gelu(edge):
        return Twin.by_sign(found[0, 0], found[0, 1], bits)
    return grouped_uniform(side.groups, found[:, 0], torch.zeros_like(found[:, 0]), bits, signed=True)


def operand_side(
    product: Product,
    edge: Edge,
    values: Tensor,
    largest: Tensor,
    bits: int,
    fused: set[str],
    factors: Tensor,
    run: Run,
) -> Side:
    """One operand with the candidates of its format's parameters.

    values [..., rows, k]; largest: largest magnitude, [] or [heads]. fused: names of the qkv layers. factors [C]: what
    Δ0 is multiplied by.
    """
    if bits == FLOAT:
        return Side(values)
    if edge.name == "output":
        # split by magnitude at 2⁻ⁱ; at first, where range 1 has about the step of 2b − 1 bits
        shifts = torch.arange(SPLITS, dtype=torch.float32, device=values.device)[:, None, None]
        return _twin_side(values, lambda shift: Twin.by_magnitude(int(shift), bits), shifts, shifts[bits])
    groups: str | Tensor | None = None
    rows = torch.arange(len(values), device=values.device)
    if edge.is_weight and (product.site.kind == "conv" or run["weight_granularity"] == "channel"):
        groups = rows
    elif edge.is_weight and product.site.name in fused and len(rows) % 3 == 0:
        groups = rows // (len(rows) // 3)
    elif edge.name in ("q", "k", "v") and largest.dim() == 1:
        groups = HEADS
    if isinstance(groups, Tensor):
        by_row = values.abs().amax(1)
        largest = by_row.new_zeros(int(groups[-1]) + 1).scatter_reduce(0, groups, by_row, "amax")
    elif groups is None:
        largest = largest.amax().reshape(1)
    half = 2 ** (bits - 1)
    start = starting_scale(largest, half - 0.5)
    steps = factors.to(start)[:, None] * start
    if after_gelu(edge):
        pairs, first = (gelu_steps(p, bits, aligned=run["aligned_steps"]) for p in (steps[:, 0], start))
        return _twin_side(values, partial(Twin.by_sign, bits=bits), pairs, first[0])

    def uniform(x: Tensor, step: Tensor) -> Tensor:
        return (x / step).round_().clamp_(-half, half - 1).mul_(step)

    return Side(values, uniform, steps[..., None], start[:, None], groups)


def _twin_side(values: Tensor, make: Callable[..., Twin], candidates: Tensor, first: Tensor) -> Side:
    """An operand in twin formats, each made of its parameters."""

    def twin(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.stack([make(*one)(x) for one in zip(*(p.flatten() for p in parameters), strict=True)])

    return Side(values, twin, candidates, first)


def gelu_steps(positive: Tensor, bits: int, *, aligned: bool) -> Tensor:
    """Candidates for the two steps of GELU outputs, float32 [n, 1, 2]: negative and positive, from positive ones [C].

    The negative step just covers [min GELU, 0] with its 2ᵇ⁻¹ codes; aligned: it is the positive one times 2^(−m), once
    with the largest m that covers the whole range, once with m + 1 (half the step, half the range).
    """
    full = GELU_MINIMUM / 2 ** (bits - 1)
    if not aligned:
        return torch.stack([torch.full_like(positive, full), positive], -1)[:, None]
    shift = torch.floor(torch.log2(positive.double() / full))
    pairs = [torch.stack([positive * torch.exp2(-shift - more).float(), positive], -1) for more in (0, 1)]
    return torch.stack(pairs, 1).reshape(-1, 1, 2)


def after_gelu(edge: Edge) -> bool:
    """Whether a layer's input is a GELU's output, moved at most."""
    return edge.name == "input" and op_name(origin(edge.value)) == "aten.gelu.default"


def fused_projections(graph: Graph) -> set[str]:
    """Names of the linear layers whose output is cut into queries, keys and values."""
    linears = {site.node: site.name for site in graph.sites.of_kind("linear")}
    read = [("scores", "q"), ("scores", "k"), ("context", "v")]
    made = [{origin(s.edges[name].value, VIEWS | SCALINGS) for s in graph.sites.of_kind(kind)} for kind, name in read]
    return {linears[node] for node in set.intersection(*made) if node in linears}
