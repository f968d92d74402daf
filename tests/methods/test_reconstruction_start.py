"""The quantizers that reconstruction methods start from."""

from __future__ import annotations

import pytest
import torch

from quantlens.calibration import Observation
from quantlens.calibration.ranges import affine, clipping, mse
from quantlens.formats import ShiftedLog
from quantlens.methods._reconstruction import ETAS, shifted_log, softmax_range


class _Look:
    """What a walk shows of an edge, for tensors at hand."""

    def __init__(self, *pieces):
        self.pieces = pieces

    def tensors(self):
        return list(self.pieces)

    def __call__(self, axis=None, tail=0.0):
        assert axis is None
        return Observation.of(torch.cat([p.flatten() for p in self.pieces])[None], tail)


@pytest.fixture(scope="module")
def probs():
    """[4, 2, 64, 64]: a flat head and a peaked one."""
    scores = torch.randn(4, 2, 64, 64, generator=torch.Generator().manual_seed(0))
    return (scores * torch.tensor([0.5, 3.0])[:, None, None]).softmax(-1)


def test_clipping_keeps_the_short_end():
    """Of a GELU's outputs the negative values keep levels; a symmetric tensor is clipped at both ends."""
    x = torch.nn.functional.gelu(torch.randn(1, 20000, generator=torch.Generator().manual_seed(1)) * 0.7)
    seen = Observation.of(x)
    low, high = clipping(seen, 4)
    assert torch.equal(low, x.amin(1))
    assert float(high) < float(x.max())
    bias = {rule: float((affine(*rule(seen, 4), 4)(x) - x)[x < 0].mean().abs()) for rule in (clipping, mse)}
    assert bias[clipping] < bias[mse]
    y = torch.randn(1, 20000, generator=torch.Generator().manual_seed(2))
    low, high = clipping(Observation.of(y), 3)
    assert float(-low) == pytest.approx(float(high), rel=1e-6)
    assert float(high) < 0.8 * float(y.abs().max())


def test_the_softmax_range_is_the_best_of_its_candidates(probs):
    def error(high, x):
        e = affine(torch.zeros(1), torch.tensor([high]), 4)(x) - x
        return float((e.square().sum(-1) + e.sum(-1).square()).mean())

    low, high = softmax_range(_Look(probs), 4, by_head=False)
    assert float(low) == 0.0
    tried = [error(float(probs.max()) * f, probs) for f in torch.linspace(1, 0.05, 39).tolist()]
    assert error(float(high), probs) < 1.1 * min(tried), "up to the rows that were looked at"
    _, heads = softmax_range(_Look(probs[:2], probs[2:]), 4, by_head=True)
    assert heads.shape == (2,)
    assert float(heads[0]) < 0.5 * float(heads[1]), "the flat head has a finer range"


def test_the_shift_is_the_best_of_its_candidates(probs):
    quantizer = shifted_log(_Look(probs), 4)
    assert quantizer.kind == "shifted-log2"
    error = float((quantizer(probs) - probs).square().sum())
    ends = torch.stack([probs.min(), probs.max()])
    tried = [float((ShiftedLog.covering(eta, ends, 4)(probs) - probs).square().sum()) for eta in ETAS]
    assert error <= 1.001 * min(tried), "up to the sample of values"
