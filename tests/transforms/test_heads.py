"""Rotations inside heads: exact on every architecture."""

from __future__ import annotations

import torch

from quantlens.graph import graph_of
from quantlens.transforms import find_score_pairs, find_value_pairs, rotate_scores, rotate_values


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_the_function_stays_when_values_are_rotated(loaded, architecture, pictures):
    graph = graph_of(loaded[architecture]).clone()
    expected, pairs = graph(pictures), find_value_pairs(graph)
    assert [p.context.name for p in pairs] == [s.name for s in graph.sites.of_kind("context")]
    for pair in pairs:
        before = graph.tensor(pair.values.weight).clone(), graph.tensor(pair.proj.weight).clone()
        rotate_values(graph, pair, _generator())
        changed = (graph.tensor(pair.values.weight) != before[0]).any(1).nonzero().flatten()
        assert torch.equal(changed, pair.rows.sort().values), "rows of v, and no others, change"
        assert not torch.equal(graph.tensor(pair.proj.weight), before[1])
        # a rotation keeps what a head holds
        heads = (t[pair.rows].view(pair.heads, -1).norm(dim=1) for t in (before[0], graph.tensor(pair.values.weight)))
        torch.testing.assert_close(*heads)
    torch.testing.assert_close(graph(pictures), expected, rtol=1e-3, atol=1e-4)


def test_the_function_stays_when_scores_are_rotated(loaded, architecture, pictures):
    graph = graph_of(loaded[architecture]).clone()
    expected, pairs = graph(pictures), find_score_pairs(graph)
    assert [p.scores.name for p in pairs] == [s.name for s in graph.sites.of_kind("scores")]
    for pair in pairs:
        assert pair.q is not pair.k or not torch.isin(pair.q_rows, pair.k_rows).any()
        before = graph.tensor(pair.q.weight).clone()
        rotate_scores(graph, pair, _generator())
        changed = (graph.tensor(pair.q.weight) != before).any(1).nonzero().flatten()
        rows = torch.cat([pair.q_rows.flatten()] + ([pair.k_rows.flatten()] if pair.k is pair.q else []))
        assert torch.equal(changed, rows.sort().values)
    torch.testing.assert_close(graph(pictures), expected, rtol=1e-3, atol=1e-4)
