from __future__ import annotations

import torch

from quantlens.calibration import Observation
from quantlens.calibration.ranges import affine, minmax
from quantlens.qmodel.plan import target_named


def test_a_row_of_one_value_stays_what_it_is():
    """A layer that was split off has one input channel: every row of its weight is one value."""
    weight = torch.tensor([[0.5], [-0.25], [0.0]])
    asymmetric = affine(*minmax(Observation.of(weight)), 8, granularity="channel", axis=0)
    made = target_named("openvino-cpu").conform("x.weight", asymmetric, weight)
    assert made.symmetric
    torch.testing.assert_close(made(weight), weight, rtol=1e-6, atol=0)


def test_a_symmetric_range_covers_what_the_quantizer_makes():
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    asymmetric = affine(*minmax(Observation.of(weight)), 8, granularity="channel", axis=0)
    made = target_named("openvino-cpu").conform("x.weight", asymmetric, weight)
    torch.testing.assert_close(made.scale, asymmetric(weight).abs().amax(1) / 127)
