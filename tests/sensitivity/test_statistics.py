"""The statistics of tensors, against numpy and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from quantlens.calibration.ranges import affine
from quantlens.errors import QuantlensError
from quantlens.graph import Edge
from quantlens.sensitivity.statistics import by_channel, edge_statistics


class Shown:
    """A look at pieces held in memory."""

    def __init__(self, pieces: list[Tensor]):
        self.pieces = pieces

    def tensors(self) -> list[Tensor]:
        return self.pieces


def edge(name: str) -> Edge:
    return Edge(f"site.{name}", "site", name, None, 0)  # type: ignore[arg-type]


def measured(pieces: list[Tensor], name: str = "input", kind: str = "linear", bits: int = 8):
    whole = torch.cat([p.flatten() for p in pieces])
    quantizer = affine(whole.min()[None], whole.max()[None], bits)
    return edge_statistics(edge(name), kind, Shown(pieces), quantizer), quantizer  # type: ignore[arg-type]


@pytest.fixture
def pieces() -> list[Tensor]:
    """Two pieces of unequal size, skewed, far from zero, channels of different widths."""
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(7, 5, 48, generator=generator).exp() * torch.linspace(0.5, 2, 48) + 30
    return [values[:4], values[4:]]


def test_figures_of_an_activation(pieces):
    found, quantizer = measured(pieces)
    values = torch.cat(pieces)
    rows = values.double().reshape(-1, 48).numpy()
    assert found.kurtosis == pytest.approx(stats.kurtosis(rows.ravel(), fisher=False), rel=1e-9)
    assert (found.low, found.high) == (rows.min(), rows.max())
    ranges = np.ptp(rows, axis=0)
    # torch's median of an even number of channels is the lower of the two in the middle
    assert found.range_ratio == pytest.approx(ranges.max() / np.sort(ranges)[23], rel=1e-6)
    norms = np.linalg.norm(rows, axis=1)
    assert found.token_norm == pytest.approx(norms.max(), rel=1e-6)
    assert found.token_norm_median == pytest.approx(np.median(norms), rel=1e-6)
    error = quantizer(values).double().numpy().reshape(-1, 48) - rows
    assert found.sqnr_db == pytest.approx(10 * math.log10((rows**2).sum() / (error**2).sum()), rel=1e-5)
    assert (found.channels, found.dead, found.massive, found.rest) == (48, (), (), None)


def test_a_normal_tensor_has_kurtosis_three():
    found, _ = measured([torch.randn(200, 1000, generator=torch.Generator().manual_seed(0))])
    assert found.kurtosis == pytest.approx(3, abs=0.05)


def test_planted_channels_are_named(pieces):
    for piece in pieces:
        piece -= 30
        piece[..., 17] = 1.25  # constant, not zero
        piece[..., 5] *= 40
    pieces[1][2, 3, 5] = -900.0
    found, _ = measured(pieces)
    others = np.delete(np.abs(torch.cat(pieces).numpy()).reshape(-1, 48), 5, axis=1)
    assert (found.dead, found.massive, found.peaks) == ((17,), (5,), (900.0,))
    assert found.rest == pytest.approx(others.max())


def test_a_channel_that_one_piece_moves_is_not_dead(pieces):
    for piece in pieces:
        piece[..., 0] = 2.0
    assert measured(pieces)[0].dead == (0,)
    pieces[1][0, 0, 0] = 3.0
    assert measured(pieces)[0].dead == ()


def test_a_weight_s_channels_are_its_outputs():
    weight = torch.randn(6, 20, generator=torch.Generator().manual_seed(1))
    weight[4] = 0
    found, _ = measured([weight], "weight")
    ranges = np.ptp(weight.numpy(), axis=1)
    assert found.dead == (4,)
    assert found.range_ratio == pytest.approx(ranges.max() / np.sort(ranges)[2], rel=1e-6)
    assert found.token_norm is None
    assert found.is_weight


def test_channels_of_heads_stand_side_by_side():
    tokens = torch.arange(2 * 5 * 12.0).reshape(2, 5, 12)  # [B, N, C]
    heads = tokens.reshape(2, 5, 3, 4).transpose(1, 2)  # [B, h, N, d]
    for name, kind, value in (("q", "scores", heads), ("k", "scores", heads.mT), ("v", "context", heads)):
        torch.testing.assert_close(by_channel(edge(name), kind, value), tokens)
    pixels = torch.rand(2, 3, 8, 8)
    assert by_channel(edge("input"), "conv", pixels).shape == (2, 8, 8, 3)
    assert by_channel(edge("output"), "probs", torch.rand(2, 3, 5, 5)) is None


def test_constant_tensors_have_no_kurtosis():
    found, _ = measured([torch.zeros(3, 4, 8)])
    assert (found.kurtosis, found.sqnr_db, found.range_ratio) == (None, None, None)
    assert found.dead == tuple(range(8))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(pieces, bad):
    quantizer = affine(torch.zeros(1), torch.ones(1), 8)
    pieces[1][0, 0, 0] = bad
    with pytest.raises(QuantlensError, match=r"site\.input.*not finite"):
        edge_statistics(edge("input"), "linear", Shown(pieces), quantizer)  # type: ignore[arg-type]
