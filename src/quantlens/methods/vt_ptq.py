"""vt-ptq: post-training quantization for vision transformers with a ranking loss (Liu et al., NeurIPS 2021).

Symmetric uniform, one interval Δ per tensor (eq. 8, 9): weights of linear and conv layers, their inputs, both operands
of the attention's products. For every product O = X·Wᵀ the intervals are those with the least (eq. 11)

    γ·L_ranking − mean over samples of Γ(O, Ô),        Γ: Pearson correlation (eq. 12)

L_ranking (eq. 10), on the attention scores A = QKᵀ alone, is a hinge on every pair of keys of a query: the quantized
scores must differ by a margin θ, and in the order of the float ones. Search: ΔX fixed, ΔW among n candidates linear in
[α, β]·Δ0, then ΔX with ΔW fixed, and again, until the objective stops falling or 20 rounds; Δ0 = max|x|/(2ᵇ⁻¹ − 1), α =
0.5, β = 1.2. After every round the layer's bias takes up E[ŴX̂ − WX] (eq. 13–15). Mixed precision (section 3.3) comes
in through the bits: see :mod:`quantlens.allocation`.

Each of the four parts of Table 3 can be switched off alone: ``similarity``, ``ranking``, ``bias_correction``, and bits
without mixed precision. Without similarity and ranking every Δ is Δ0, the conventional quantization.

Where the paper is silent, or this file differs from it:

1. γ and θ are not published. L_ranking is the mean over pairs and rows, not the sum, and in units of σ, the standard
   deviation of a query's scores; so γ and θ mean the same at any sequence length and for any scale of the scores. θ =
   0.1 σ: a hinge without a margin would not see two scores that fall together, and a margin much above the step of the
   grid asks for differences that the float scores do not have. γ = 1: both terms are then relative errors of the same
   order, a few thousandths at 6 bits.
2. The number of candidates: 100, and Δ itself, which wins a tie. A round that lowers the objective by less than a
   thousandth of it is the last; one that raises it is taken back.
3. A sample is one image for a layer, one (image, head) matrix for a product of the attention. The objective is
   measured on up to 32 of them: 512 tokens of a layer, 32 queries of each attention matrix against all keys, 64
   queries for the ranking. Δ0 and the bias correction use all images and tokens.
4. All pairs of keys are compared, exactly, up to 256 keys; beyond that 32 640 pairs drawn with the seed. The option
   ``ranking_pairs`` draws any other number.
5. All layers are searched on the float model's activations, as eq. 9 has it. The outputs of the next round are judged
   with the round's bias correction. The correction is layer-local too; layers that share a bias are left out.
6. Softmax outputs are never negative and get unsigned codes 0 … 2ᵇ − 1; ``nonnegative=signed`` is eq. 8 as written.
7. The classifier, which the paper does not name, is quantized as every linear layer; the pixels at 8 bits
   (``patch_bits``). A convolution with groups, or with padding given as a word, has its operands matched separately.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantlens.calibration import Calibration
from quantlens.calibration.products import Product
from quantlens.calibration.ranges.similarity import Objective, Operand, Ranking, alternate_pair, candidate_factors
from quantlens.calibration.sampling import ProductSampler
from quantlens.errors import QuantlensError
from quantlens.formats import Quantizer
from quantlens.graph import Graph
from quantlens.methods._scale_search import (
    SEARCH_OPTIONS,
    SearchSettings,
    operand,
    quantizer_of,
    visit_products,
)
from quantlens.methods.base import MATMUL_OPERANDS, Method, MethodInfo, Option, Run, Widths, matmul_operand_edges
from quantlens.qmodel import Plan
from quantlens.reconstruction.bias import LAYERS, corrected_layers, mean_output, subtract_from_biases

RANKED_ROWS = 64
"""Queries whose keys are compared in pairs."""

ALL_PAIRS = 256
"""Keys up to which all pairs are compared when ``ranking_pairs`` is not given."""


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
        departures="ranking loss as a mean in units of the scores' deviation (γ, θ unpublished); samples of tokens; "
        "unsigned codes for tensors without negative values",
        aliases=("vtptq", "liu2021"),
        options={
            **SEARCH_OPTIONS,
            "beta": Option(1.2, "end of the candidates, as alpha"),
            "rounds": Option(20, "most times that both scales of a layer are searched"),
            "similarity": Option(True, "search scales by Pearson similarity (Table 3)", (True, False)),
            "ranking": Option(True, "ranking loss on attention scores (Table 3)", (True, False)),
            "bias_correction": Option(True, "correct biases after each round (Table 3)", (True, False)),
            "ranking_weight": Option(1.0, "γ, weight of the ranking loss"),
            "ranking_margin": Option(0.1, "θ, margin of the ranking loss, in standard deviations of a query's scores"),
            "ranking_pairs": Option(
                None, f"pairs of keys compared per query (None: all up to {ALL_PAIRS} keys, as many drawn beyond)"
            ),
            "nonnegative": Option(
                "unsigned", "codes of tensors without negative values: unsigned or signed", ("unsigned", "signed")
            ),
        },
    )

    def build(self, graph: Graph, calibration: Calibration, bits: Widths, run: Run) -> Plan:
        settings = SearchSettings(
            float(run["alpha"]),
            float(run["beta"]),
            int(run["candidates"]),
            int(run["rounds"]),
            1.0,
            frozenset(),
            run["nonnegative"] == "unsigned",
        )
        settings.check()
        drawn = run["ranking_pairs"]
        if run["ranking_weight"] < 0 or run["ranking_margin"] < 0 or (drawn is not None and drawn < 1):
            raise QuantlensError(
                f"ranking_weight={run['ranking_weight']}, ranking_margin={run['ranking_margin']}, "
                f"ranking_pairs={run['ranking_pairs']}: give none below 0, and at least one pair (1.0, 0.1, None)"
            )
        factors = candidate_factors(settings.alpha, settings.beta, settings.candidates)
        generator = torch.Generator().manual_seed(run.seed)
        sampler = ProductSampler(generator)
        corrected = {site.name for site in corrected_layers(graph)} if run["bias_correction"] else set()
        quantizers: dict[str, Quantizer] = {}
        shifts: dict[str, Tensor] = {}

        def settle(product: Product, tensors: list[Sequence[Tensor]], wanted: set[str]) -> None:
            layer = product.site.kind in LAYERS
            values = sampler.by_sample(product, tensors, calibration.count)
            together = values is not None
            if values is None:
                flat = sampler.each_alone(tensors)
            else:
                flat = list(reversed(values)) if layer else list(values)
            sides = [
                operand(value, parts, bits.of(graph, edge), settings) if edge.key in wanted else Operand(value)
                for edge, parts, value in zip(product.quantized, tensors, flat, strict=True)
            ]

            def error(a: Operand, b: Operand) -> Tensor:
                return _layer_error(product, tensors, weight=b, inputs=a)

            if together:
                left, right = reversed(sides) if layer else sides
                objective = _objective(product, left, right, run, generator)
                correct = error if product.site.name in corrected else None
                if objective is not None:
                    left, right, _ = alternate_pair(
                        objective,
                        left,
                        right,
                        factors,
                        settings.rounds,
                        first="right" if layer else "left",
                        correct=None if correct is None else lambda a, b: error(a, b).to(a.values.dtype),
                    )
                sides = [right, left] if layer else [left, right]
            elif run["similarity"]:
                sides = [_alone(side, factors) for side in sides]
            for edge, side in zip(product.quantized, sides, strict=True):
                if side.scale is not None:
                    quantizers[edge.key] = quantizer_of(side, bits.of(graph, edge))
            if product.site.name in corrected:
                shifts[product.site.name] = error(sides[1], sides[0])

        visit_products(graph, calibration, bits, run, settle)
        subtract_from_biases(graph, shifts)
        done = [f"biases of {len(shifts)} layers take up the mean error of their outputs"] if shifts else []
        return Plan({e.key: quantizers[e.key] for e in matmul_operand_edges(graph) if e.key in quantizers}, done)


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
        pairs = None if run["ranking_pairs"] is None else int(run["ranking_pairs"])
        if pairs is None and flat.shape[-1] > ALL_PAIRS:
            pairs = ALL_PAIRS * (ALL_PAIRS - 1) // 2
        if unit > 0:
            ranking = Ranking.of(
                expected,
                float(run["ranking_margin"]) * unit,
                pairs=pairs,
                rows=rows,
                weight=float(run["ranking_weight"]) / unit,
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
