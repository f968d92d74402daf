"""adalog: AdaLog, post-training quantization for vision transformers with adaptive logarithm quantizer (Wu et al., ECCV
2024).

* Softmax outputs and GELU outputs have logarithmic codes whose base 2^(q/37) is searched
  (:mod:`quantlens.formats.adalog`, section 3.2). GELU outputs are shifted by 0.17 first, so that none is negative;
  after the layer the shift is one number per output channel, which goes into the bias.
* All other operands are asymmetric uniform: weights per output channel, q, k and v per head, other activations per
  tensor. LayerNorm outputs are made channel-wise first and rewritten to one scale, as in ``repq-vit``.
* The two parameters of a format (scale and zero point, scale and base) are found together, by fast progressive
  combining search (section 3.3, :mod:`quantlens.calibration.ranges.progressive`): a grid of 128 points, then ever
  finer steps around the best. First the operand's own squared error is made least, then that of the layer's
  output, for one operand and the other in turn (weight, input; q, k; softmax, v), three rounds.

All products are searched on the float network's tensors, none waits for another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from quantlens.calibration import Calibration
from quantlens.calibration.products import Product, patches
from quantlens.calibration.ranges.guided import HEADS, Side
from quantlens.calibration.ranges.progressive import (
    Grid,
    OutputError,
    adaptive,
    asymmetric,
    asymmetric_grid,
    progressive,
    ranked,
)
from quantlens.calibration.sampling import ProductSampler
from quantlens.errors import QuantlensError
from quantlens.formats import AdaLog as AdaLogFormat
from quantlens.formats import Quantizer, Uniform
from quantlens.graph import Edge, Graph
from quantlens.methods._scale_search import IMAGE, settle_products
from quantlens.methods.base import (
    MATMUL_OPERANDS,
    Departure,
    Method,
    MethodInfo,
    Option,
    Run,
    Widths,
    matmul_operand_edges,
)
from quantlens.methods.ptq4vit import GELU_MINIMUM, behind_gelu
from quantlens.methods.repq_vit import Reparameterization, norm_groups, reparameterize, rescale_norms
from quantlens.qmodel import Plan

ROWS = 2048
"""Rows of a layer's input that weights are judged on."""

FEWER = 256
"""Rows of them that the input itself is judged on."""

ELEMENTS = 1 << 18
"""Elements of the larger operand of an attention product that both are judged on."""

BASES = 8
"""Bases that go on from the first step of a GELU output's search, with 16 scales each."""


class AdaLog(Method):
    info = MethodInfo(
        name="adalog",
        title="AdaLog",
        paper="AdaLog: Post-Training Quantization for Vision Transformers with Adaptive Logarithm Quantizer",
        venue="ECCV",
        year=2024,
        url="https://arxiv.org/abs/2407.12951",
        quantizes=MATMUL_OPERANDS,
        summary="log formats with a searched base for softmax and GELU; scale and zero point together, by output error",
        departures=(
            IMAGE,
            Departure(
                "smallest_base",
                1,
                10,
                "q of the base 2^(q/37) goes up to 137 from here: at 6 and 8 bits the best is finer than 2^(10/37)",
            ),
        ),
        readings=(
            "the log format has 2^b codes in all; theirs 2^b magnitudes and zero. Its table of powers has 8 fractional "
            "bits; theirs multiples of 1/(2^(b+1) − 2)",
            "the shift stays in the quantizer, which subtracts it; folded into the bias, as theirs, it gives the same",
            "zero points of uniform grids lie around the one with which the codes cover the range that goes with the "
            "scale; theirs lie around the middle code",
            "layers are judged on 2048 tokens, attention products on 64 query rows of some images. Of a step's "
            "candidates the best eighth by the Gram matrix's diagonal is judged by the output, 8 are kept (theirs: "
            "all, 16), and a search ends when a step gains less than 0.5 %",
            "their LayerNorm rewrite is off where weights and activations differ in width, by a condition of their "
            "code",
            "their calibration images are augmented as for training; here they are as given",
        ),
        options={
            "rounds": Option(3, "most times that both operands of a product are searched"),
            "candidates": Option(128, "points of the first grid of scales and zero points"),
            "steps": Option(6, "most steps of a search, each finer than the one before"),
        },
    )

    def build(self, graph: Graph, calibration: Calibration, bits: Widths, run: Run) -> Plan:
        rounds, candidates, steps = int(run["rounds"]), int(run["candidates"]), int(run["steps"])
        if rounds < 1 or steps < 1 or candidates < 16:
            raise QuantlensError(
                f"adalog: rounds={rounds}, steps={steps}, candidates={candidates}: at least one round, one step and 16 "
                "candidates (3, 6 and 128)"
            )
        search = _Search(graph, bits, run)
        settle_products(graph, calibration, bits, run, search.settle)
        done = {group.norm.name: group for group in search.groups.values() if group.norm.name in search.found}
        rewrites = rescale_norms(graph, {name: (group, search.found[name]) for name, group in done.items()})
        order = [e.key for e in matmul_operand_edges(graph)]
        return Plan({key: search.quantizers[key] for key in order if key in search.quantizers}, rewrites)


@dataclass(frozen=True)
class Format:
    """An operand with its current parameters, the grid that they are searched in, and the kind of format that they
    make: "uniform" (scale, zero point), "softmax" or "gelu" (scale, q)."""

    side: Side
    grid: Grid
    bits: int
    kind: str = "uniform"

    @property
    def parameters(self) -> Tensor:
        """[G, 2]."""
        assert self.side.current is not None
        return self.side.current

    def same(self, other: Format | None) -> bool:
        """Whether the parameters are equal."""
        return other is not None and torch.equal(self.parameters, other.parameters)

    def quantizer(self) -> Quantizer:
        first, second = self.parameters.unbind(-1)
        if self.kind != "uniform":
            return AdaLogFormat(first[0], self.bits, numerator=int(second[0]), shift=_shift(self.kind))
        if isinstance(self.side.groups, Tensor):
            return Uniform(first, second, self.bits, signed=False, granularity="channel", axis=0)
        if self.side.groups == HEADS:
            return Uniform(first, second, self.bits, signed=False, granularity="head", axis=-3)
        return Uniform(first[0], second[0], self.bits, signed=False)

    def improved(self, error: OutputError, steps: int, rows: int | None = None) -> Format:
        """With parameters that make ``error`` least; rows: how many the operand was thinned to for it."""
        side = self.side if rows is None else replace(self.side, values=thinned(self.side.values, rows))
        if self.kind == "uniform":
            found = progressive(side, error, self.grid.spacing, steps=steps)
            return replace(self, side=replace(self.side, current=found.current))
        # first the bases at the scale so far, then scales with the best bases
        bases = self.grid.candidates[:, 0, 1].unique()
        tried = torch.stack([self.parameters[0, 0].expand_as(bases), bases], -1)[:, None]
        best = ranked(side, error, tried, BASES)[0]
        if self.kind == "gelu":
            scales = self.grid.candidates[:, 0, 0].unique()
            pairs = torch.cartesian_prod(scales, best[:, 0, 1])[:, None]
            start = replace(side, candidates=pairs, current=best[0])
            best = progressive(start, error, self.grid.spacing, children=4, steps=steps, keep=16).current[None]  # type: ignore[index]
        return replace(self, side=replace(self.side, current=best[0]))


def thinned(values: Tensor, count: int) -> Tensor:
    """About ``count`` of values [n, ...], evenly spaced."""
    return values[:: max(1, len(values) // count)]


class _Search:
    """Finds the formats of one product after the other."""

    def __init__(self, graph: Graph, bits: Widths, run: Run):
        self.graph, self.bits, self.run = graph, bits, run
        self.sampler = ProductSampler(torch.Generator().manual_seed(run.seed), rows=ROWS)
        self.groups = norm_groups(graph)
        self.found: dict[str, Reparameterization] = {}
        self.quantizers: dict[str, Quantizer] = {}

    def settle(self, product: Product, tensors: list[Sequence[Tensor]], wanted: set[str]) -> None:
        """Find the quantizers of a product's operands; see :func:`settle_products`."""
        values, joined = self._operands(product, tensors)
        values = self._reparameterized(product, values, wanted)
        steps, rounds = int(self.run["steps"]), int(self.run["rounds"])
        formats = [
            self._format(product, edge, x).improved(OutputError.own(), steps, FEWER if edge.name == "input" else None)
            if edge.key in wanted
            else None
            for edge, x in zip(product.quantized, values, strict=True)
        ]
        for _ in range(rounds if joined else 0):
            before = list(formats)
            for i, one in enumerate(formats):
                if one is not None:
                    other = formats[1 - i]
                    rows = FEWER if product.quantized[i].name == "input" else None
                    exact, own = values[1 - i], values[i] if rows is None else thinned(values[i], rows)
                    error = OutputError.of(own, exact if other is None else other.side.quantized(), exact)
                    formats[i] = one.improved(error, steps, rows)
            if all(a is None or a.same(b) for a, b in zip(formats, before, strict=True)):
                break
        for edge, one in zip(product.quantized, formats, strict=True):
            if one is not None:
                self.quantizers[edge.key] = one.quantizer()

    def _operands(self, product: Product, tensors: list[Sequence[Tensor]]) -> tuple[list[Tensor], bool]:
        """The operands as [..., rows, k] with a common k; or (False) as rows, each by itself."""
        site = product.site
        if site.kind in ("linear", "conv"):
            (weight,), inputs = tensors
            rows = [r for x in inputs if (r := patches(site, weight, x)) is not None]
            joined = len(rows) == len(inputs)
            rows = rows if joined else [x.flatten(0, -2) for x in inputs]
            return [weight.flatten(1).float(), self.sampler.some_rows(rows)], joined
        if len(tensors) == 2 and min(x[0].dim() for x in tensors) >= 2:
            each = zip(*tensors, strict=True)
            pairs = [self.sampler.weighted_pairs(a, b, None, len(tensors[0]))[:2] for a, b in each]
            operands = [torch.cat(x).float() for x in zip(*pairs, strict=True)]
            most = max(1, ELEMENTS // max(x[0].numel() for x in operands))
            return [thinned(x, most) for x in operands], True
        return self.sampler.each_alone(tensors), False

    def _reparameterized(self, product: Product, values: list[Tensor], wanted: set[str]) -> list[Tensor]:
        """The operands of a layer after a LayerNorm as the rewrite makes them: W·diag(r), x/r − t."""
        group = self.groups.get(product.site.name)
        if group is None:
            return values
        edge, name = product.site.edges["input"], group.norm.name
        if name not in self.found and edge.key in wanted:
            bits, channels = self.bits.of(self.graph, edge), values[1].T.contiguous()
            format = self._uniform(channels, channels, bits, min(16, 2**bits), torch.arange(len(channels)))
            scale, zero = format.improved(OutputError.own(), int(self.run["steps"])).parameters.unbind(-1)
            self.found[name] = reparameterize(-zero * scale, (2**bits - 1 - zero) * scale, bits)
        if name not in self.found:
            return values
        return [values[0] * self.found[name].scale, values[1] / self.found[name].scale - self.found[name].shift]

    def _format(self, product: Product, edge: Edge, values: Tensor) -> Format:
        """The format of one operand with its candidates."""
        bits, smallest = self.bits.of(self.graph, edge), self.run["smallest_base"]
        if edge.name == "output":
            return _logarithmic(values, bits, "softmax", smallest)
        if edge.name == "input" and behind_gelu(edge.value):
            return _logarithmic(values, bits, "gelu", smallest)
        by_head = edge.name in ("q", "k", "v")
        if edge.is_weight:
            return self._uniform(values, values, bits, min(16, 2 ** (bits - 1)), torch.arange(len(values)))
        if by_head and values.dim() == 4 and values.shape[1] > 1:
            return self._uniform(values, values.movedim(1, 0).flatten(1), bits, min(16, 2 ** (bits - 1)), HEADS)
        zeros = min(16, 2**bits if edge.name == "input" else 2 ** (bits - 1))
        return self._uniform(values, values.reshape(1, -1), bits, zeros, None)

    def _uniform(self, values: Tensor, rows: Tensor, bits: int, zeros: int, groups: str | Tensor | None) -> Format:
        grid = asymmetric_grid(rows, bits, zeros=zeros, candidates=int(self.run["candidates"]))
        groups = groups.to(values.device) if isinstance(groups, Tensor) else groups
        side = Side(values, partial(asymmetric, bits=bits), grid.candidates, grid.start, groups)
        return Format(side, grid, bits)


def _shift(kind: str) -> float:
    return GELU_MINIMUM if kind == "gelu" else 0.0


def _logarithmic(values: Tensor, bits: int, kind: str, smallest: int) -> Format:
    """Softmax outputs: scale 1, all bases. GELU outputs: 16 scales between the quantile 0.9 and the largest of the
    positive values, plus the shift."""
    scales, shift = torch.ones(1, device=values.device), _shift(kind)
    if kind == "gelu":
        positive = values[values > 0] if bool((values > 0).any()) else scales
        low = positive.kthvalue(round(0.9 * (len(positive) - 1)) + 1).values
        scales = torch.lerp(low, positive.max(), torch.linspace(0, 1, 16, device=values.device)) + shift
    bases = torch.tensor([float(q) for q in range(smallest, 138)], device=values.device)
    pairs = torch.cartesian_prod(scales, bases)[:, None]
    start = torch.stack([scales[-1], bases.new_tensor(37.0)])[None]
    spacing = ((scales[-1] - scales[0]) / max(len(scales) - 1, 1))[None]
    side = Side(values, partial(adaptive, bits=bits, shift=shift), pairs, start)
    return Format(side, Grid(pairs, spacing, start), bits, kind)
