"""vt-ptq: post-training quantization for vision transformers with a ranking loss (Liu et al., NeurIPS 2021).

Symmetric uniform, one interval Δ per tensor (eq. 8, 9): weights of linear and conv layers, their inputs, both operands
of the attention's products. For every product O = X·Wᵀ the intervals are those with the least (eq. 11)

    γ·L_ranking − mean over samples of Γ(O, Ô),        Γ: Pearson correlation (eq. 12)

L_ranking (eq. 10), on the attention scores A = QKᵀ alone, is a hinge on every pair of keys of a query: the quantized
scores must differ by a margin θ, and in the order of the float ones. Search: ΔX fixed, ΔW among n candidates linear in
[α, β]·Δ0, then ΔX with ΔW fixed, and again, until the objective stops falling or 20 rounds; Δ0 = max|x|/(2ᵇ⁻¹ − 1), α =
0.5, β = 1.2. After every round the layer's bias takes up E[ŴX̂ − WX] (eq. 13–15). Mixed precision (section 3.3) comes
in through the bits: see :mod:`quantlens.allocation`. Each part of Table 3 can be switched off alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantlens.calibration import Calibration
from quantlens.calibration.products import Product
from quantlens.calibration.ranges.similarity import Objective, Operand, Ranking, alternate_pair
from quantlens.calibration.sampling import ProductSampler
from quantlens.formats import Quantizer
from quantlens.graph import Graph
from quantlens.methods._scale_search import (
    UNSIGNED,
    factors_of,
    operand,
    quantizer_of,
    search_options,
    settle_products,
)
from quantlens.methods.base import MATMUL_OPERANDS, Method, MethodInfo, Option, Run, Widths, matmul_operand_edges
from quantlens.qmodel import Plan
from quantlens.reconstruction.bias import LAYERS, corrected_layers, mean_output, subtract_from_biases

RANKED_ROWS = 64
"""Queries whose keys are compared in pairs."""

ALL_PAIRS = 256
"""Keys up to which all pairs are compared; beyond, as many are drawn."""

BETA = 1.2
WEIGHT, MARGIN = 1.0, 0.1
"""γ and θ, the latter in standard deviations of a query's scores."""


class VTPTQ(Method):
    info = MethodInfo(
        name="vt-ptq",
        title="VT-PTQ",
        paper="Post-Training Quantization for Vision Transformer",
        venue="NeurIPS",
        year=2021,
        url="https://arxiv.org/abs/2106.14156",
        quantizes=MATMUL_OPERANDS,
        summary="alternating scale search by Pearson similarity and the order of attention scores; bias correction",
        departures=(UNSIGNED,),
        readings=(
            "γ and θ are not published: L_ranking is the mean over pairs and rows, in units of the standard deviation "
            "σ of a query's scores, so that both mean the same at any sequence length and scale; θ = 0.1 σ, because a "
            "hinge without a margin does not see two scores that fall together, and γ = 1, which makes both terms "
            "relative errors",
            "100 candidates, and Δ itself, which wins a tie; a round that lowers the objective by less than a "
            "thousandth of it is the last, one that raises it is taken back",
            "a sample is one image for a layer, one (image, head) matrix for a product of the attention; the objective "
            "is measured on up to 32 of them: 512 tokens of a layer, 32 queries of each matrix, 64 queries for the "
            "ranking",
            "all pairs of keys are compared up to 256 keys, beyond that 32 640 pairs drawn with the seed",
            "layers that share a bias are left out of the bias correction",
            "the classifier, which the paper does not name, is quantized as every linear layer, the pixels at 8 bits; "
            "a convolution with groups, or with padding given as a word, has its operands matched separately",
        ),
        aliases=("vtptq", "liu2021"),
        options={
            **search_options(20),
            "similarity": Option(True, "search scales by Pearson similarity (Table 3)", (True, False)),
            "ranking": Option(True, "ranking loss on attention scores (Table 3)", (True, False)),
            "bias_correction": Option(True, "correct biases after each round (Table 3)", (True, False)),
        },
    )

    def build(self, graph: Graph, calibration: Calibration, bits: Widths, run: Run) -> Plan:
        search = _Search(graph, calibration, bits, run)
        settle_products(graph, calibration, bits, run, search.settle)
        subtract_from_biases(graph, search.shifts)
        done = [f"biases of {len(search.shifts)} layers take up the mean error of their outputs"]
        found = {e.key: search.quantizers[e.key] for e in matmul_operand_edges(graph) if e.key in search.quantizers}
        return Plan(found, done if search.shifts else [])


class _Search:
    """The scales of all products, found one after the other. quantizers: by edge key. shifts: E[ŴX̂ − WX] by layer."""

    def __init__(self, graph: Graph, calibration: Calibration, bits: Widths, run: Run):
        self.graph, self.images, self.bits, self.run = graph, calibration.count, bits, run
        self.factors, self.rounds = factors_of(run, BETA)
        self.generator = torch.Generator().manual_seed(run.seed)
        self.sampler = ProductSampler(self.generator)
        self.corrected = {site.name for site in corrected_layers(graph)} if run["bias_correction"] else set()
        self.quantizers: dict[str, Quantizer] = {}
        self.shifts: dict[str, Tensor] = {}

    def settle(self, product: Product, tensors: list[Sequence[Tensor]], wanted: set[str]) -> None:
        """Choose the scales of one product. tensors: its operands, in pieces. wanted: edges that are quantized."""
        pair = self.sampler.by_sample(product, tensors, self.images)
        if pair is None:
            values = self.sampler.each_alone(tensors)
        else:
            values = list(reversed(pair)) if product.site.kind in LAYERS else list(pair)
        sides = [
            operand(value, parts, self.bits.of(self.graph, edge), 1.0, self.run["unsigned"])
            if edge.key in wanted
            else Operand(value)
            for edge, parts, value in zip(product.quantized, tensors, values, strict=True)
        ]
        if pair is not None:
            sides = self._matched(product, tensors, sides)
        elif self.run["similarity"]:
            sides = [_alone(side, self.factors) for side in sides]
        for edge, side in zip(product.quantized, sides, strict=True):
            if side.scale is not None:
                self.quantizers[edge.key] = quantizer_of(side, self.bits.of(self.graph, edge))
        if product.site.name in self.corrected:
            self.shifts[product.site.name] = _layer_error(product, tensors, weight=sides[0], inputs=sides[1])

    def _matched(self, product: Product, tensors: list[Sequence[Tensor]], sides: list[Operand]) -> list[Operand]:
        """Both operands with the scales that their product asks for; as given where nothing asks for a search."""
        layer = product.site.kind in LAYERS
        left, right = reversed(sides) if layer else sides
        objective = _objective(product, left, right, self.run, self.generator)
        if objective is None:
            return sides

        def correct(a: Operand, b: Operand) -> Tensor:
            return _layer_error(product, tensors, weight=b, inputs=a).to(a.values.dtype)

        left, right, _ = alternate_pair(
            objective,
            left,
            right,
            self.factors,
            self.rounds,
            first="right" if layer else "left",
            correct=correct if product.site.name in self.corrected else None,
        )
        return [right, left] if layer else [left, right]


def _objective(
    product: Product, left: Operand, right: Operand, run: Run, generator: torch.Generator
) -> Objective | None:
    """What the scales of a product are searched by, ``None`` if nothing asks for a search."""
    expected = left.values @ right.values.mT
    ranking = None
    if run["ranking"] and product.site.kind == "scores" and expected.shape[-1] > 1:
        flat = expected.flatten(0, -2)
        rows = torch.randperm(len(flat), generator=generator)[:RANKED_ROWS].to(flat.device)
        unit = float(flat[rows].var(-1, correction=0).mean().sqrt())
        pairs = ALL_PAIRS * (ALL_PAIRS - 1) // 2 if flat.shape[-1] > ALL_PAIRS else None
        if unit > 0:
            ranking = Ranking.of(
                expected,
                MARGIN * unit,
                pairs=pairs,
                rows=rows,
                weight=WEIGHT / unit,
                generator=generator,
            )
    if ranking is None and not run["similarity"]:
        return None
    return Objective(expected, similarity=run["similarity"], ranking=ranking)


def _layer_error(product: Product, tensors: list[Sequence[Tensor]], *, weight: Operand, inputs: Operand) -> Tensor:
    """[out] float64 E[ŴX̂ − WX] of a layer over all calibration images (eq. 15)."""
    (float_weight,), pieces = tensors
    quantized = Operand(float_weight, weight.start, weight.scale, weight.low, weight.high).quantized()

    def through(x: Tensor) -> Tensor:
        return Operand(x, inputs.start, inputs.scale, inputs.low, inputs.high).quantized()

    expected = mean_output(product.site, pieces, float_weight)
    return mean_output(product.site, (through(x) for x in pieces), quantized) - expected


def _alone(side: Operand, factors: list[float]) -> Operand:
    """An operand [m, k] matched by itself: the output is the operand."""
    if side.scale is None:
        return side
    one = Operand(torch.eye(side.values.shape[-1]).to(side.values))
    whole = Operand(side.values[None], side.start, side.scale, side.low, side.high)
    found, _, _ = alternate_pair(Objective(whole.values), whole, one, factors, 1, first="left")
    return Operand(side.values, side.start, found.scale, side.low, side.high)
