"""Channel equalisation: exact, and only where it is exact."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import quantlens as ql
from quantlens.errors import QuantlensError
from quantlens.graph import capture, graph_of
from quantlens.transforms import (
    Factors,
    balance,
    equalise_norms,
    find_norm_groups,
    find_value_pairs,
    rescale_values,
    smooth_factors,
)


def _factors(n: int, seed: int) -> torch.Tensor:
    return torch.exp(torch.randn(n, generator=torch.Generator().manual_seed(seed)))


def test_the_function_stays_when_norms_are_equalised(loaded, architecture, pictures):
    graph = graph_of(loaded[architecture]).clone()
    expected, groups = graph(pictures), find_norm_groups(graph)
    factors = {}
    for i, group in enumerate(groups):
        n = graph.tensor(str(group.norm.node.args[2].target)).numel()
        factors[group.norm.name] = Factors(_factors(n, i), _factors(n, 100 + i) - 1)
    assert equalise_norms(graph, groups, factors) == [g.norm.name for g in groups]
    torch.testing.assert_close(graph(pictures), expected, rtol=1e-3, atol=1e-4)
    assert not torch.equal(graph(pictures), expected), "nothing was changed"


def test_the_function_stays_when_values_are_equalised(loaded, architecture, pictures):
    """Every attention of every architecture has its pair, whether q, k and v come from one layer or three."""
    graph = graph_of(loaded[architecture]).clone()
    expected, pairs = graph(pictures), find_value_pairs(graph)
    assert [p.context.name for p in pairs] == [s.name for s in graph.sites.of_kind("context")]
    before = {p.values.weight: graph.tensor(p.values.weight) for p in pairs}
    for i, pair in enumerate(pairs):
        rescale_values(graph, pair, _factors(len(pair.rows), i))
    torch.testing.assert_close(graph(pictures), expected, rtol=1e-3, atol=1e-4)
    for pair in pairs:
        changed = (graph.tensor(pair.values.weight) != before[pair.values.weight]).any(1).nonzero().flatten()
        assert torch.equal(changed, pair.rows.sort().values), "rows of v, and no others, change"
    factors = _factors(len(pairs[0].rows), 0)
    rows = before[pairs[0].values.weight][pairs[0].rows] / factors[:, None]
    torch.testing.assert_close(graph.tensor(pairs[0].values.weight)[pairs[0].rows], rows)


class _Attention(nn.Module):
    """Attention whose v is also read elsewhere, or whose context passes a non-linear function."""

    def __init__(self, how: str):
        super().__init__()
        self.how = how
        self.patches, self.qkv, self.proj = nn.Conv2d(3, 16, 8, 8), nn.Linear(16, 48), nn.Linear(16, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).reshape(-1, 16, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        context = torch.softmax(q @ k.transpose(-1, -2), dim=-1) @ v
        if self.how == "v twice":
            context = context + v
        if self.how == "non-linear":
            context = torch.relu(context)
        if self.how == "swapped heads":
            context = context.roll(1, 1)
        if self.how == "mixed tokens":
            context = context.transpose(-1, -2).reshape(-1, 2, 16, 8)
        return self.head(self.proj(context.transpose(1, 2).reshape(-1, 16, 16)).mean(1))


@pytest.mark.parametrize(
    ("how", "found"),
    [("plain", True), ("swapped heads", True), ("v twice", False), ("non-linear", False), ("mixed tokens", False)],
)
def test_pairs_are_found_only_where_it_is_exact(how, found, pictures):
    torch.manual_seed(0)
    model = _Attention(how).eval().requires_grad_(False)
    graph = capture(model, pictures)
    pairs = find_value_pairs(graph)
    assert bool(pairs) == found
    for pair in pairs:
        rescale_values(graph, pair, _factors(len(pair.rows), 1))
    torch.testing.assert_close(graph(pictures), model(pictures), rtol=1e-4, atol=1e-5)


def test_smooth_factors_are_the_formula():
    activation, weight = torch.tensor([1.0, 4.0, 16.0]), torch.tensor([2.0, 2.0, 0.5])
    for m in (0.0, 0.5, 1.0):
        raw = activation**m / weight ** (1 - m)
        torch.testing.assert_close(smooth_factors(activation, weight, m), raw / raw.log().mean().exp())
    assert smooth_factors(torch.tensor([1.0, 0.0, 4.0]), torch.ones(3)).tolist()[1] == 1.0, "a dead channel keeps 1"
    assert torch.equal(smooth_factors(torch.zeros(3), torch.zeros(3)), torch.ones(3))


def test_balance_makes_ranges_equal_and_centred():
    low, high = torch.tensor([-1.0, -50.0, 2.0, 3.0]), torch.tensor([1.0, 10.0, 2.5, 3.0])
    full = balance(low, high)
    after = torch.stack([low, high]) / full.scale - full.shift
    sizes = (after[1] - after[0])[:3]
    torch.testing.assert_close(sizes, sizes[:1].expand(3))
    torch.testing.assert_close(after.sum(0), torch.zeros(4), atol=1e-4, rtol=0)
    assert float(full.scale[3]) == 1.0, "a constant channel keeps its size"
    half = balance(low, high, 0.5)
    torch.testing.assert_close(half.scale[:3] ** 2, full.scale[:3])
    assert torch.equal(balance(low, high, 0.0, shift=False).scale, torch.ones(4))
    assert torch.equal(balance(low, high, 1.0, shift=False).shift, torch.zeros(4))


def test_factors_that_cannot_be_undone_are_refused(loaded):
    graph = graph_of(loaded["vit"]).clone()
    group = find_norm_groups(graph)[0]
    good = torch.ones(32)
    for scale, shift in ((torch.zeros(32), good), (-good, good), (good[:5], good[:5]), (good, good * float("nan"))):
        with pytest.raises(QuantlensError, match="positive"):
            equalise_norms(graph, [group], {group.norm.name: Factors(scale, shift)})


def test_balanced_channels_are_of_one_range(loaded, pictures):
    """Channels of very different size: balanced, every one of them spans the same range, and the function stays."""
    import copy

    network = copy.deepcopy(loaded["vit"].module)
    size = torch.exp(1.5 * torch.randn(32, generator=torch.Generator().manual_seed(1)))
    network.blocks[0].norm1.weight.data *= size
    network.blocks[0].norm1.bias.data *= size
    network.blocks[0].attn.qkv.weight.data /= size
    model = ql.load_model(network, input_size=(3, 32, 32))
    graph = graph_of(model).clone()
    group = find_norm_groups(graph)[0]
    nodes = [n for n in graph.fx.nodes if n.op == "call_function"]
    nodes = nodes[: nodes.index(group.norm.node) + 1]

    def spans() -> torch.Tensor:
        x = graph.run(nodes, {graph.input: pictures}, keep=[group.norm.node])[group.norm.node].reshape(-1, 32)
        return x.amax(0) - x.amin(0)

    before = spans()
    x = graph.run(nodes, {graph.input: pictures}, keep=[group.norm.node])[group.norm.node].reshape(-1, 32)
    equalise_norms(graph, [group], {group.norm.name: balance(x.amin(0), x.amax(0))})
    after = spans()
    assert float(before.max() / before.min()) > 20
    assert float(after.max() / after.min()) < 1.5
    torch.testing.assert_close(graph(pictures), model(pictures), rtol=1e-3, atol=1e-3)
