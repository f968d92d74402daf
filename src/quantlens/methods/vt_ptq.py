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

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from quantlens.calibration.ranges.similarity import Objective, Operand, Ranking, alternate_pair
from quantlens.calibration.sampling import Product, ProductSampler
from quantlens.formats import Quantizer
from quantlens.methods._scale_search import (
    UNSIGNED,
    factors_of,
    operand,
    quantizer_of,
    search_options,
    settle_products,
)
from quantlens.methods.base import MATMUL_OPERANDS, Calibration, Graph, Method, MethodInfo, Option, Plan, Run, Widths
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
        factors = factors_of(run, BETA)
        generator = torch.Generator().manual_seed(run.seed)
        sampler = ProductSampler(generator)
        corrected = {site.name for site in corrected_layers(graph)} if run["bias_correction"] else set()
        shifts: dict[str, Tensor] = {}

        def settle(product: Product, tensors: list[Sequence[Tensor]]) -> list[Quantizer | None]:
            layer = product.site.kind in LAYERS
            swap = slice(None, None, -1 if layer else 1)  # a layer is inputs·weightᵀ, and its weight is searched first
            pair = sampler.by_sample(product, tensors, calibration.count)
            values = sampler.each_alone(tensors)[swap] if pair is None else pair
            widths = [bits.of(graph, edge) for edge in product.quantized][swap]
            sides = [
                operand(value, parts, width, 1.0, run["unsigned"])
                for value, parts, width in zip(values, tensors[swap], widths, strict=True)
            ]

            def correct(inputs: Operand, weight: Operand) -> Tensor:
                return _layer_error(product, tensors, inputs, weight).to(inputs.values.dtype)

            if pair is not None:
                left, right = sides
                objective = _objective(product, left, right, run, generator)
                if objective is not None:
                    found = alternate_pair(
                        objective,
                        left,
                        right,
                        factors,
                        run["rounds"],
                        first="right" if layer else "left",
                        correct=correct if product.site.name in corrected else None,
                    )
                    sides = list(found[:2])
            elif run["similarity"]:
                sides = [_alone(side, factors) for side in sides]
            if product.site.name in corrected:
                shifts[product.site.name] = _layer_error(product, tensors, *sides)
            return [quantizer_of(side, width) for side, width in zip(sides, widths, strict=True)][swap]

        plan = settle_products(graph, calibration, bits, run, settle)
        subtract_from_biases(graph, shifts)
        if shifts:
            plan.rewrites.append(f"biases of {len(shifts)} layers take up the mean error of their outputs")
        return plan


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
                expected, MARGIN * unit, pairs=pairs, rows=rows, weight=WEIGHT / unit, generator=generator
            )
    if ranking is None and not run["similarity"]:
        return None
    return Objective(expected, similarity=run["similarity"], ranking=ranking)


def _layer_error(product: Product, tensors: list[Sequence[Tensor]], inputs: Operand, weight: Operand) -> Tensor:
    """[out] float64 E[ŴX̂ − WX] of a layer over all calibration images (eq. 15)."""
    (float_weight,), pieces = tensors
    quantized = replace(weight, values=float_weight).quantized()
    got = mean_output(product.site, (replace(inputs, values=x).quantized() for x in pieces), quantized)
    return got - mean_output(product.site, pieces, float_weight)


def _alone(side: Operand, factors: list[float]) -> Operand:
    """An operand [m, k] matched by itself: the output is the operand."""
    one, whole = Operand(torch.eye(side.values.shape[-1]).to(side.values)), replace(side, values=side.values[None])
    found, _, _ = alternate_pair(Objective(whole.values), whole, one, factors, 1, first="left")
    return replace(side, scale=found.scale)
