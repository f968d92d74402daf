"""adalog: AdaLog, post-training quantization for vision transformers with adaptive logarithm quantizer (Wu et al., ECCV
2024).

* Softmax outputs and GELU outputs have logarithmic codes whose base 2^(q/37) is searched
  (:mod:`quantlens.formats.log`, section 3.2). GELU outputs are shifted by 0.17 first, so that none is negative;
  after the layer the shift is one number per output channel, which goes into the bias.
* All other operands are asymmetric uniform: weights per output channel, q, k and v per head, other activations per
  tensor. LayerNorm outputs are made channel-wise first and rewritten to one scale, as in ``repq-vit``.
* The two parameters of a format (scale and zero point, scale and base) are found together, by fast progressive
  combining search (section 3.3, :mod:`quantlens.calibration.ranges.guided`): a grid of 128 points, then ever
  finer steps around the best. First the operand's own squared error is made least, then that of the layer's
  output, for one operand and the other in turn (weight, input; q, k; softmax, v), three rounds.

All products are searched on the float network's tensors, none waits for another.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from quantlens.calibration.ranges.guided import (
    HEADS,
    OutputError,
    Side,
    adaptive,
    asymmetric,
    asymmetric_grid,
    progressive,
    ranked,
)
from quantlens.calibration.sampling import Product, ProductSampler, patches
from quantlens.formats import AdaLog as AdaLogFormat, Quantizer
from quantlens.methods._scale_search import IMAGE, grouped_uniform, settle_products
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
from quantlens.methods.ptq4vit import GELU_MINIMUM, after_gelu
from quantlens.methods.repq_vit import Norms, norm_groups, reparameterize, rescale_norms

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
            "rounds": Option(3, "most times that both operands of a product are searched", least=1),
            "candidates": Option(128, "points of the first grid of scales and zero points", least=16),
            "steps": Option(6, "most steps of a search, each finer than the one before", least=1),
        },
    )

    def build(self, graph: Graph, calibration: Calibration, bits: Widths, run: Run) -> Plan:
        search = _Search(graph, bits, run)
        plan = settle_products(graph, calibration, bits, run, search.settle)
        plan.rewrites = rescale_norms(graph, search.norms)
        return plan


@dataclass(frozen=True)
class Format:
    """An operand with its current parameters and its candidates: scale and zero point, or scale and q of a logarithmic
    format. spacing [G]: distance of the candidates' scales. shift: of a logarithmic format, None for a uniform one."""

    side: Side
    spacing: Tensor
    bits: int
    shift: float | None = None

    @property
    def parameters(self) -> Tensor:
        """[G, 2]."""
        return self.side.current

    def quantizer(self) -> Quantizer:
        first, second = self.parameters.unbind(-1)
        if self.shift is not None:
            return AdaLogFormat(first[0], self.bits, numerator=int(second[0]), shift=self.shift)
        return grouped_uniform(self.side.groups, first, second, self.bits, signed=False)

    def improved(self, error: OutputError, steps: int, rows: int | None = None) -> "Format":
        """With parameters that make ``error`` least; rows: how many the operand was thinned to for it."""
        candidates: Tensor = self.side.candidates
        side = replace(self.side, values=thinned(self.side.values, rows))
        if self.shift is None:
            best = progressive(side, error, self.spacing, steps=steps).current
        else:  # first the bases at the scale so far, then scales with the best bases
            bases = candidates[:, 0, 1].unique()
            tried = torch.stack([self.parameters[0, 0].expand_as(bases), bases], -1)[:, None]
            found = ranked(side, error, tried, BASES)[0]
            best = found[0]
            if self.shift:
                pairs = torch.cartesian_prod(candidates[:, 0, 0].unique(), found[:, 0, 1])[:, None]
                start = replace(side, candidates=pairs, current=best)
                best = progressive(start, error, self.spacing, children=4, steps=steps, keep=16).current
        return replace(self, side=replace(self.side, current=best))


def thinned(values: Tensor, count: int | None) -> Tensor:
    """About ``count`` (None: all) of values [n, ...], evenly spaced."""
    return values if count is None else values[:: max(1, len(values) // count)]


class _Search:
    """Finds the formats of one product after the other. norms: the LayerNorms to be rewritten, by name."""

    def __init__(self, graph: Graph, bits: Widths, run: Run):
        self.graph, self.bits, self.run = graph, bits, run
        self.sampler = ProductSampler(torch.Generator().manual_seed(run.seed), rows=ROWS)
        self.groups = norm_groups(graph)
        self.norms: Norms = {}

    def settle(self, product: Product, tensors: list[Sequence[Tensor]]) -> list[Quantizer | None]:
        """Find the quantizers of a product's operands; see :func:`settle_products`."""
        values, joined = self._operands(product, tensors)
        values, steps = self._reparameterized(product, values), self.run["steps"]
        rows = [FEWER if edge.name == "input" else None for edge in product.quantized]
        formats: dict[int, Format] = {}
        for i, (edge, x) in enumerate(zip(product.quantized, values, strict=True)):
            if self.bits.of(self.graph, edge) != FLOAT:
                formats[i] = self._format(edge, x).improved(OutputError.own(), steps, rows[i])
        for _ in range(self.run["rounds"] if joined else 0):
            before = {i: one.parameters for i, one in formats.items()}
            for i in formats:
                exact = values[1 - i]
                coded = formats[1 - i].side.quantized() if 1 - i in formats else exact
                error = OutputError.of(thinned(values[i], rows[i]), coded, exact)
                formats[i] = formats[i].improved(error, steps, rows[i])
            if all(torch.equal(one.parameters, before[i]) for i, one in formats.items()):
                break
        return [formats[i].quantizer() if i in formats else None for i in range(len(values))]

    def _operands(self, product: Product, tensors: list[Sequence[Tensor]]) -> tuple[list[Tensor], bool]:
        """The operands as [..., rows, k] with a common k; or (False) as rows, each by itself."""
        site = product.site
        if site.kind in ("linear", "conv"):
            (weight,), inputs = tensors
            rows = [patches(site, weight, x) for x in inputs]
            joined = all(r is not None for r in rows)
            rows = rows if joined else [x.flatten(0, -2) for x in inputs]
            return [weight.flatten(1).float(), self.sampler.some_rows(rows)], joined
        if len(tensors) == 2 and min(x[0].dim() for x in tensors) >= 2:
            each = zip(*tensors, strict=True)
            pairs = [self.sampler.weighted_pairs(a, b, None, len(tensors[0]))[:2] for a, b in each]
            operands = [torch.cat(x).float() for x in zip(*pairs, strict=True)]
            most = max(1, ELEMENTS // max(x[0].numel() for x in operands))
            return [thinned(x, most) for x in operands], True
        return self.sampler.each_alone(tensors), False

    def _reparameterized(self, product: Product, values: list[Tensor]) -> list[Tensor]:
        """The operands of a layer after a LayerNorm as the rewrite makes them: W·diag(r), x/r − t."""
        group = self.groups.get(product.site.name)
        if group is None:
            return values
        name, bits = group.norm.name, self.bits.of(self.graph, product.site.edges["input"])
        if name not in self.norms and bits != FLOAT:
            channels = values[1].T.contiguous()
            each = torch.arange(len(channels), device=channels.device)
            format = self._uniform(channels, channels, bits, min(16, 2**bits), each)
            scale, zero = format.improved(OutputError.own(), self.run["steps"]).parameters.unbind(-1)
            self.norms[name] = group, reparameterize(-zero * scale, (2**bits - 1 - zero) * scale, bits)
        if name not in self.norms:
            return values
        _, found = self.norms[name]
        return [values[0] * found.scale, values[1] / found.scale - found.shift]

    def _format(self, edge: Edge, values: Tensor) -> Format:
        """The format of one operand with its candidates."""
        bits, smallest = self.bits.of(self.graph, edge), self.run["smallest_base"]
        if edge.name == "output":
            return _logarithmic(values, bits, 0.0, smallest)
        if after_gelu(edge):
            return _logarithmic(values, bits, GELU_MINIMUM, smallest)
        zeros = min(16, 2**bits if edge.name == "input" else 2 ** (bits - 1))
        if edge.is_weight:
            return self._uniform(values, values, bits, zeros, torch.arange(len(values), device=values.device))
        if edge.name in ("q", "k", "v") and values.dim() == 4 and values.shape[1] > 1:
            return self._uniform(values, values.movedim(1, 0).flatten(1), bits, zeros, HEADS)
        return self._uniform(values, values.reshape(1, -1), bits, zeros, None)

    def _uniform(self, values: Tensor, rows: Tensor, bits: int, zeros: int, groups: str | Tensor | None) -> Format:
        candidates, spacing, start = asymmetric_grid(rows, bits, zeros=zeros, candidates=self.run["candidates"])
        return Format(Side(values, partial(asymmetric, bits=bits), candidates, start, groups), spacing, bits)


def _logarithmic(values: Tensor, bits: int, shift: float, smallest: int) -> Format:
    """Softmax outputs (shift 0): scale 1, all bases. GELU outputs: 16 scales between the quantile 0.9 and the largest
    of the positive values, plus the shift."""
    scales = torch.ones(1, device=values.device)
    if shift:
        positive = values[values > 0] if bool((values > 0).any()) else scales
        low = positive.kthvalue(round(0.9 * (len(positive) - 1)) + 1).values
        scales = torch.lerp(low, positive.max(), torch.linspace(0, 1, 16, device=values.device)) + shift
    bases = torch.arange(smallest, 138, dtype=torch.float32, device=values.device)
    pairs = torch.cartesian_prod(scales, bases)[:, None]
    start = torch.stack([scales[-1], bases.new_tensor(37.0)])[None]
    spacing = ((scales[-1] - scales[0]) / max(len(scales) - 1, 1))[None]
    return Format(Side(values, partial(adaptive, bits=bits, shift=shift), pairs, start), spacing, bits, shift)
