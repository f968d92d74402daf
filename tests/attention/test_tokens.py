"""Outlier tokens and large tokens of an image."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantlens.attention.drift import large_tokens, outlier_tokens, quantile, token_norms, token_overlap


def test_outlier_rule():
    generator = torch.Generator().manual_seed(0)
    norms = 10 + torch.randn(2, 100, generator=generator)
    assert not outlier_tokens(norms).any()
    norms[0, 7], norms[1, 50] = 40.0, 14.0  # the second stands out of a narrow spread but is no 1.5 medians
    found = outlier_tokens(norms)
    assert found[0].nonzero().tolist() == [[7]]
    assert not found[1].any()
    assert not outlier_tokens(torch.full((1, 9), 3.0)).any()
    assert token_overlap(found, found).tolist() == [1, 1]
    assert token_overlap(found, torch.zeros_like(found)).tolist() == [0, 1]
    tokens = torch.zeros(1, 5, 2)
    tokens[0, 3] = torch.tensor([3.0, 4.0])
    assert token_norms(tokens, prefix=1).tolist() == [[0, 0, 5, 0]]


def test_outliers_of_many_blocks_at_once():
    norms = 10 + torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(1))
    norms[1, 2, 7] = 99
    assert torch.equal(outlier_tokens(norms)[1], outlier_tokens(norms[1]))
    assert outlier_tokens(norms).nonzero().tolist() == [[1, 2, 7]]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 196])
@pytest.mark.parametrize("q", [0.25, 0.5])
def test_quantiles_are_numpys(count, q):
    values = torch.randn(3, 2, count, generator=torch.Generator().manual_seed(count))
    assert quantile(values, q).shape == (3, 2, 1)
    assert np.allclose(quantile(values, q)[..., 0], np.quantile(values.numpy(), q, axis=-1), atol=1e-6)


@pytest.mark.parametrize("norms", [[1.0, 2.0], [1.0, 1.0, 2.0, 2.0]])
def test_of_an_even_number_the_median_lies_between_the_middle_two(norms):
    """2 is less than 1.5 times the median 1.5, and no outlier; the lower of the middle two would make it one."""
    assert not outlier_tokens(torch.tensor([norms])).any()


def test_where_many_tokens_are_large_none_is_an_outlier_but_they_are_counted():
    norms = torch.tensor([[10.0] * 7 + [30.0] * 8])  # the median is theirs
    assert int(outlier_tokens(norms).sum()) == 0
    assert int(large_tokens(norms).sum()) == 8
    alone = torch.tensor([[10.0] * 14 + [30.0]])
    assert torch.equal(outlier_tokens(alone), large_tokens(alone))
    assert not large_tokens(torch.zeros(1, 6)).any()
    assert not large_tokens(torch.full((1, 6), 3.0)).any()
