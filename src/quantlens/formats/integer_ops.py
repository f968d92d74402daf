"""LayerNorm and softmax in integer arithmetic, as simulated by a fully quantized model (FQ-ViT, IJCAI 2022).

Both read values on the grid of the quantizer in front of them and turn them into integers; everything up to the
output codes is integer arithmetic, done here in float64, which holds integers to 2⁵³ exactly and runs on every device.
Each docstring gives the widths an integer kernel needs. Under autograd the values are the same and the gradient is
that of the float operation.
"""

import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional

from quantlens.formats.base import Operator, Quantizer, bounded_, needs_grad, parameter
from quantlens.formats.log import Log
from quantlens.formats.uniform import Affine

FRACTION = 16
"""Fractional bits of the normalised integers in an integer LayerNorm."""
MULTIPLIER_BITS = 8
"""Width of the multipliers M in an integer LayerNorm (section 3.2 of the paper)."""
EXPONENT_BITS = 20
"""n of the integer exponential: what is below 2⁻ⁿ of the row's largest value is as good as 2⁻ⁿ. Sums of 8192 such
integers stay below 2⁵³."""
FINEST = 8
"""The integer exponential works on a grid of at most 2⁻⁸."""
IBERT = (0.35815147, 0.96963238, 1.0)
"""a, b, c of I-BERT's polynomial a·r² + b·r + c ≈ exp(r) on (−ln 2, 0] (Kim et al., ICML 2021, eq. 13)."""
PIECE = 1 << 18
"""Elements worked on at a time, so that the passes over them stay in cache."""


class IntegerLayerNorm(Operator):
    """LayerNorm over the last dimension on integers, put out as codes of ``output``.

    With X = x/s the integers of the input (the code less its zero point, shifted left by α_c for a power-of-two
    format), C channels, D = C·X − ΣX and V = C·ΣX² − (ΣX)² + E:

        n = round(2¹⁶·D/√V)              normalised, |n| ≤ 2¹⁶·√C
        y = round((M_c·n + B_c)·2^(−N_c))    clamped to the output's codes less its zero point

    M_c·2^(−N_c) ≈ γ_c/s_out·2⁻¹⁶ with |M_c| < 2⁸, B_c = round(β_c/s_out·2^N_c). E = round(C²·eps/s²), so that a row
    whose values are all equal gives β as in float; V is at least 1, so that this holds for eps = 0 too.

    An integer kernel holds ΣX², V and D·2¹⁶ in 64 bits, n and M·n + B in 32.

    scale: float32 [], the input's smallest scale s. multiplier, shift, offset: M, N and B [C]. eps: of the float
    LayerNorm. output: a Uniform or PowerOfTwo format, per tensor or along the last dimension.
    """

    kind, settings = "integer-layer-norm", ("eps",)

    def __init__(self, scale: Tensor, multiplier: Tensor, shift: Tensor, offset: Tensor, eps: float, output: Quantizer):
        super().__init__(output)
        self.eps = float(eps)
        multiplier, shift, offset = multiplier.to(torch.int16), shift.to(torch.int8), offset.to(torch.int32)
        self._hold(scale=parameter("scale", scale), multiplier=multiplier, shift=shift, offset=offset)
        down = torch.exp2(-shift.double())
        self._hold(derived=True, _gain=multiplier.double() * down, _add=offset.double() * down)

    @classmethod
    def of(cls, scale: Tensor, weight: Tensor, bias: Tensor, eps: float, output: Affine) -> "IntegerLayerNorm":
        """In place of a float LayerNorm. weight, bias: γ and β [C]. eps: its own."""
        weight, bias = weight.detach().double(), bias.detach().double()
        step = output.scales.double().to(weight.device)
        gain, shift_to = weight / step, bias / step
        # the largest N that keeps |M| below 2⁸ and |B| below 2²⁹
        room = (MULTIPLIER_BITS - 1e-9) - torch.log2(gain.abs().clamp_min(2.0**-40)) + FRACTION
        headroom = 29 - torch.log2(shift_to.abs().clamp_min(2.0**-40))
        shift = torch.minimum(room, headroom).floor().clamp(0, 31)
        most = 2**MULTIPLIER_BITS - 1
        multiplier = (gain * torch.exp2(shift - FRACTION)).round().clamp(-most, most)
        offset = (shift_to * torch.exp2(shift)).round().clamp(-(2**29), 2**29)
        return cls(scale, multiplier, shift, offset, eps, output)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        shape: Any = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
        *_: Any,
    ) -> Tensor:
        """x [..., C] on the input's grid -> float32 [..., C] on the output's grid. The other arguments are those of
        the float operation, which the gradient needs."""
        with torch.no_grad():
            out = _by_rows(x, lambda rows: self._levels(rows).float().mul_(self.output.scales), torch.float32)
        if needs_grad(x):
            soft = functional.layer_norm(x, x.shape[-1:], weight, bias, self.eps)
            return out + (soft - soft.detach())
        return out

    def encode(self, x: Tensor) -> Tensor:
        """Codes of the output: what an integer kernel computes. x [..., C] on the input's grid."""
        with torch.no_grad():
            levels = self._levels(x.reshape(-1, x.shape[-1])).view(x.shape)
            return (levels + self.output.zero_point.double()).to(self.output.code_dtype)

    def _levels(self, rows: Tensor) -> Tensor:
        """float64 [n, C] integers: output codes less the zero point."""
        channels = rows.shape[1]
        integers = (rows.double() / self.scale.double()).round_()
        total = integers.sum(1, keepdim=True)
        square = torch.linalg.vecdot(integers, integers)[:, None]
        guard = round(channels**2 * self.eps / float(self.scale) ** 2)
        variance = (channels * square - total * total + guard).clamp_min_(1.0)
        factor = (2.0**FRACTION * channels) / variance.sqrt()
        normalised = integers.mul_(factor).sub_(total * (factor / channels)).round_()
        return bounded_(normalised.mul_(self._gain).add_(self._add).round_(), *self.output.bounds(2))


class LogIntSoftmax(Operator):
    """Softmax over one dimension on integers, put out as log2 codes (section 3.3, Log-Int-Softmax).

    With the input's codes q, the differences v = q − max q ≤ 0 on a grid of 2^(−m)·s ≤ 2⁻⁸ (a shift by m), and
    I-BERT's integer exponential e(v) ≈ exp(v·s):

        ratio = round(Σe/e)        code = round to the nearest power of two of ratio        value = 2^(−code)

    A ratio from 1.5·2^k on goes to 2^(k+1); codes from 2ᵇ − 1 on are the zero code. There are no more than 2ᵇ
    differences, so e(v) is a table of integers, filled once.

    scale: float32 [], the input's scale. levels: how many codes the input has (2ᵇ). lowest: the input's value of code 0
    when that code stands for masked entries, whose probability is then exactly 0 (a row that is masked as a whole
    gives zeros); None if nothing is masked. bits: width of the output codes. An integer kernel holds Σe in 64 bits.
    """

    kind, settings = "log-int-softmax", ("levels",)

    def __init__(self, scale: Tensor, levels: int, bits: int, *, lowest: Tensor | None = None):
        scale = parameter("scale", scale)
        super().__init__(Log(torch.tensor(1.0, device=scale.device), bits, steps=1))
        self.levels = levels
        table = integer_exponential(-torch.arange(levels + 1, device=scale.device, dtype=torch.float64), float(scale))
        table[-1] = 0.0  # one more step than there are: the masked
        self._hold(scale=scale, lowest=None if lowest is None else lowest.detach().float().clone().reshape(()))
        self._hold(derived=True, _table=table)

    def forward(self, x: Tensor, dim: int = -1, *_: Any) -> Tensor:  # type: ignore[override]
        """x [...] on the input's grid -> float32 [...] probabilities, powers of two or 0."""
        with torch.no_grad():
            out = self.output.decode(self.encode(x, dim))
        if needs_grad(x):
            soft = functional.softmax(x, dim)
            return out + (soft - soft.detach())
        return out

    def encode(self, x: Tensor, dim: int = -1) -> Tensor:
        """Codes of the output, of its code dtype: k for 2^(−k), the last for 0."""
        with torch.no_grad():
            return _by_rows(x.movedim(dim, -1), self._codes, self.output.code_dtype).movedim(-1, dim)

    def _codes(self, rows: Tensor) -> Tensor:
        """[n, k] float32 -> int64 codes."""
        integers = (rows * (1.0 / self.scale)).round_()
        steps = integers.amax(1, keepdim=True) - integers
        if self.lowest is not None:
            steps.masked_fill_(rows <= self.lowest + 0.5 * self.scale, self.levels)
        steps = steps.clamp_(0, self.levels).to(torch.int32)
        exponentials = self._table.index_select(0, steps.view(-1)).view(steps.shape)
        ratio = (exponentials.sum(1, keepdim=True) / exponentials).round_().nan_to_num_(nan=torch.inf)
        # the exponent of ratio, one more from 1.5·2^k on: half a mantissa added carries into the exponent
        code = ((ratio.view(torch.int64) + (1 << 51)) >> 52) - 1023
        return code.clamp_(0, self.output.qmax)

    @classmethod
    def restore(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        return super().restore({**config, "bits": config["output"]["bits"]}, tensors)


class MaskedSoftmax(Operator):
    """Float softmax on quantized values whose code 0 stands for masked entries, put out on a uniform grid: what an
    ablation without Log-Int-Softmax needs where attention is masked.

    lowest, scale: float32 [], the input's value of code 0 and its scale. output: the format of the probabilities.
    """

    kind = "masked-softmax"

    def __init__(self, scale: Tensor, lowest: Tensor, output: Quantizer):
        super().__init__(output)
        self._hold(scale=parameter("scale", scale), lowest=lowest.detach().float().clone().reshape(()))

    def forward(self, x: Tensor, dim: int = -1, *_: Any) -> Tensor:  # type: ignore[override]
        """x [...] on the input's grid -> probabilities on the output's."""
        masked = x <= self.lowest + 0.5 * self.scale
        kept = functional.softmax(x.masked_fill(masked, torch.finfo(x.dtype).min), dim)
        return self.output(kept.masked_fill(masked & ~masked.all(dim, keepdim=True), 0.0))


def integer_exponential(steps: Tensor, scale: float) -> Tensor:
    """I-BERT's integer exponential: integers e > 0 with e(v)/e(0) ≈ exp(v·scale), for integers v ≤ 0 (any shape).

    float64 that holds integers below 2⁴². The grid is first made finer by a left shift m so that scale·2^(−m) ≤ 2⁻⁸:
    on a coarser one ⌊−ln 2/scale⌋ is far from −ln 2/scale (at a scale of 0.2 by 15 %, which is a wrong temperature).
    n is 20, or the octaves that v spans if they are fewer.
    """
    a, b, c = IBERT
    scale = max(scale, 2.0**-18)  # a finer grid leaves 2⁵³, and exp is 1 on all of it
    shift = max(0, math.ceil(math.log2(scale) + FINEST))
    step = scale * 2.0**-shift
    octave = math.floor(-math.log(2.0) / step)
    span = float(steps.min()) * 2.0**shift / octave if steps.numel() else 0.0
    most = min(EXPONENT_BITS, math.floor(span) + 1)
    v = (steps.double() * 2.0**shift).clamp_min(float(most * octave))
    octaves = (v / octave).floor()
    rest = v - octaves * octave
    value = rest * (rest + math.floor(b / a / step)) + math.floor(c / a / step**2)
    return (value * torch.exp2(most - octaves)).floor()


def _by_rows(x: Tensor, function: Callable[[Tensor], Tensor], kind: torch.dtype) -> Tensor:
    """``function`` of the rows of x [..., k], some :data:`PIECE` elements at a time on a CPU, as ``kind``."""
    rows = x.detach().reshape(-1, x.shape[-1]).contiguous()
    count = max(1, PIECE // max(1, rows.shape[1])) if rows.device.type == "cpu" else max(1, rows.shape[0])
    out = torch.empty_like(rows, dtype=kind)
    for part, into in zip(rows.split(count), out.split(count), strict=True):
        into.copy_(function(part))
    return out.view(x.shape)
