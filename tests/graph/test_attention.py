"""Fused attention is opened whatever its mask is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantlens.api import quantize
from quantlens.errors import CaptureError
from quantlens.graph import capture

N = 6
PLACE = torch.arange(N)
EARLIER = PLACE[:, None] >= PLACE


def windows(mask: Tensor, batch: int) -> Tensor:
    """Two masks, in turn, for every image."""
    return torch.stack([mask, mask.mT])[None].expand(batch, 2, N, N).reshape(batch * 2, 1, N, N)


MASKS = {
    "none": lambda x, p: {},
    "causal": lambda x, p: {"is_causal": True},
    "all allowed": lambda x, p: {"attn_mask": torch.ones(x.shape[0], 1, N, N, dtype=torch.bool)},
    "boolean": lambda x, p: {"attn_mask": EARLIER[None, None].expand(x.shape[0], 1, N, N)},
    "made by the batch": lambda x, p: {
        "attn_mask": (torch.arange(N)[:, None] >= torch.arange(N))[None, None].expand(x.shape[0], 1, N, N)
    },
    "some rows attend to nothing": lambda x, p: {"attn_mask": ~EARLIER[None, None].expand(x.shape[0], 1, N, N)},
    "float": lambda x, p: {"attn_mask": p.sigmoid()[None].repeat(x.shape[0], 1, 1)[:, None]},
    "−∞": lambda x, p: {"attn_mask": torch.zeros(N, N).masked_fill(~EARLIER, -torch.inf)},
    "by window": lambda x, p: {"attn_mask": windows(EARLIER, x.shape[0])},
    "from the images": lambda x, p: {"attn_mask": ((x.mean(-1) > 0) | (PLACE == 0))[:, None, None]},
    "none allowed by the images": lambda x, p: {"attn_mask": (x.mean(-1) > x.mean((1, 2))[:, None] + 9)[:, None, None]},
    "numbers from the images": lambda x, p: {"attn_mask": x.mean(-1)[:, None, None]},
    "shared keys": lambda x, p: {"enable_gqa": True},
}


class Net(nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        self.kind, self.qkv, self.numbers = kind, nn.Linear(4, 24), nn.Parameter(torch.randn(N, N))

    def forward(self, x):
        x = x.flatten(2).transpose(1, 2)[:, :N]
        q, k, v = self.qkv(x).view(x.shape[0], N, 3, 2, 4).permute(2, 0, 3, 1, 4)
        given = MASKS[self.kind](x, self.numbers)
        if self.kind == "shared keys":
            k, v = k[:, :1], v[:, 1:]
        if self.kind == "by window":
            q, k, v = (part.reshape(-1, 1, N, 4) for part in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, **given).reshape(x.shape[0], -1)


@pytest.mark.parametrize("kind", MASKS)
def test_the_same_function_with_the_mask(kind):
    torch.manual_seed(0)
    model, images = Net(kind).eval(), torch.randn(3, 4, 3, 3)
    graph = capture(model, images)
    for batch in (1, 3):
        torch.testing.assert_close(graph(images[:batch]), model(images[:batch]), rtol=1e-5, atol=1e-5)
    kinds = [site.kind for site in graph.sites if site.kind != "add"]  # a mask from the images is added to the scores
    assert kinds == ["linear", "scores", "probs", "context"]
    if kind in ("all allowed", "none"):  # nothing is added
        assert not any("add" in str(node.target) for node in graph.fx.nodes)


@pytest.mark.parametrize("size", [len, lambda x: int(x.shape[0]), lambda x: x.size(0) * 1])
def test_a_batch_size_as_a_number(size):
    class Sized(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.layers = nn.Parameter(torch.randn(1, 1, 9)), nn.Sequential(nn.Linear(9, 9))

        def forward(self, x):
            x = torch.cat([self.token.expand(size(x), -1, -1), x.reshape(size(x), 4, -1)], 1)
            return {"tokens": self.layers(x), "logits": x.mean(-1), "more": (x, None)}

    model, images = Sized().eval(), torch.randn(3, 4, 3, 3)
    graph = capture(model, images)
    for batch in (1, 3):
        expected, found = model(images[:batch]), graph(images[:batch])
        assert found["more"][1] is None
        torch.testing.assert_close(found["tokens"], expected["tokens"])
        torch.testing.assert_close(found["logits"], expected["logits"])
    assert [site.name for site in graph.sites] == ["layers.0"]


def test_images_one_by_one_are_refused():
    class Loop(nn.Module):
        def forward(self, x):
            return torch.stack([image.flatten() for image in x])

    with pytest.raises(CaptureError, match="one batch size only"):
        capture(Loop().eval(), torch.randn(3, 4, 3, 3))


class Clipped(nn.Module):
    """An attention whose rows are stretched and cut off, or only stretched."""

    def __init__(self, cut: bool):
        super().__init__()
        self.qkv, self.cut = nn.Linear(4, 12), cut

    def forward(self, x):
        q, k, v = self.qkv(x.flatten(2).transpose(1, 2)[:, :N]).chunk(3, dim=-1)
        rows = (q @ k.mT).softmax(-1) * 1.2 - 0.1
        return (rows.clamp(0, 1) if self.cut else rows) @ v


def test_a_clipped_softmax_is_quantized_where_it_is_cut_off():
    torch.manual_seed(0)
    sites = capture(Clipped(True), torch.randn(2, 4, 3, 3)).sites
    assert [site.kind for site in sites] == ["linear", "scores", "probs", "context"]
    probs, context = sites.of_kind("probs")[0], sites.of_kind("context")[0]
    assert probs.edges["output"].node is context.edges["probs"].value
    assert probs.edges["input"].node is probs.node is not probs.edges["output"].node
    stretched = capture(Clipped(False), torch.randn(2, 4, 3, 3)).sites
    assert [site.kind for site in stretched] == ["linear", "scores", "probs", "matmul"], "rows that are no attention"


def test_a_quantized_clipped_softmax_gives_rows_of_few_values():
    torch.manual_seed(0)
    module, x = Clipped(True), torch.randn(8, 4, 3, 3)
    plan = quantize(module, x, method="minmax", bits="W4A2").plan
    assert "probs.output" in plan.quantizers
    assert not any("matmul" in key for key in plan.quantizers)
    quantizer = plan.quantizers["probs.output"]
    assert len(quantizer(torch.linspace(0, 1, 100)).unique()) == 4
    whole = quantize(module, x, method="fq-ptq", bits="W8A8").plan
    assert "probs.output" in whole.quantizers
    assert "context.probs" not in whole.quantizers
    assert not any("probs" in site for site in whole.operators), "an integer softmax would leave the clipping out"
