"""Places where OpenVINO's own passes compute something else than the file says, which export writes around."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import quantlens as ql
from quantlens.data import Preprocess
from quantlens.export import exported
from quantlens.export.export import export
from quantlens.export.exported import Artefact

pytest.importorskip("onnx", reason="the deploy extra is not installed")
pytest.importorskip("openvino", reason="the deploy extra is not installed")


class Token(nn.Module):
    """A token in front of patches, read by a layer at once."""

    def __init__(self):
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, 8, 8, 8), nn.Parameter(torch.randn(1, 1, 8))
        self.up, self.head = nn.Linear(8, 16), nn.Linear(16, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        return self.head(nn.functional.gelu(self.up(x))).mean(1)


class Pooled(nn.Module):
    """A mean of windows over the edge, of what has been scaled and shifted, and a layer that reads such a thing."""

    def __init__(self, inside):
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, 8, 4, 4), nn.GroupNorm(1, 8)
        self.pool, self.up = nn.AvgPool2d(3, 1, 1, count_include_pad=inside), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)
        nn.init.normal_(self.norm.bias)
        nn.init.uniform_(self.norm.weight, 0.5, 2)

    def forward(self, x):
        x = self.norm(self.patches(x))
        x = self.norm(x + self.pool(x) - x)
        return self.head(self.up(x).relu().mean((2, 3)))


class Excited(nn.Module):
    """Squeeze-excite: a convolution without a bias is read twice, and its mean by a layer."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.deep = nn.Conv2d(8, 8, 3, 2, 1, groups=8, bias=False)
        self.gate, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x):
        x = self.deep(nn.functional.gelu(self.patches(x)))
        x = x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()
        return self.head(x.mean((2, 3)))


class Means(nn.Module):
    """Means and largest values of channels that have been scaled, before layers."""

    def __init__(self):
        super().__init__()
        self.patches, self.norm, self.head = nn.Conv2d(3, 8, 4, 4), nn.GroupNorm(1, 8), nn.Linear(8, 5)
        nn.init.normal_(self.norm.bias)

    def forward(self, x):
        x = self.norm(self.patches(x)).flatten(2)
        return self.head(x.mean(-1)) + self.head(x.mean(-1, keepdim=True).flatten(1)) + self.head(x.amax(-1))


class Stem(nn.Module):
    """Convolutions, and beside them a token that is repeated for the batch."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 2, 2)
        self.token, self.head = nn.Parameter(torch.randn(1, 1, 8)), nn.Linear(8, 5)

    def forward(self, x):
        x = self.second(self.first(x).relu()).flatten(2).mT
        return self.head(torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)).mean(1)


class Grouped(nn.Module):
    """A convolution of groups, a limit, and a layer that reads codes."""

    def __init__(self):
        super().__init__()
        self.patches, self.first = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.second, self.head = nn.Conv2d(8, 8, 2, 2), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.second(self.first(self.patches(x)).clamp(0, 1)).flatten(2).mT).flatten(1)[:, :10]


class Tables(nn.Module):
    """Layers whose results are scaled by tables: by token and channel, by token, by channel of an image."""

    def __init__(self):
        super().__init__()
        self.patches, self.up, self.down = nn.Conv2d(3, 8, 16, 16), nn.Linear(8, 8), nn.Linear(8, 8)
        self.table, self.tokens, self.head = (
            nn.Parameter(torch.randn(size)) for size in ((1, 4, 8), (1, 4, 1), (1, 8))
        )

    def forward(self, x):
        x = self.patches(x).flatten(2).mT.relu()
        x = self.up(x) * self.table.expand(len(x), -1, -1)
        x = x + self.down(self.up(x.relu()) * self.tokens.expand(len(x), -1, -1))
        return torch.cat([self.down(self.up(x.relu())[:, 0] * self.head), self.down(x)[:, 1]], 1)


class Resized(nn.Module):
    """Pictures of another size, whose channels have scales of their own."""

    def __init__(self):
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 5)

    def forward(self, x):
        x = nn.functional.interpolate(x, (24, 24), mode="bicubic")
        return self.head(self.patches(x).relu().mean((2, 3)))


@pytest.mark.parametrize("target", [None, "openvino-cpu"])
def test_a_resized_picture_with_scales_of_channels(target, tmp_path):
    torch.manual_seed(0)
    images = torch.randn(24, 3, 32, 32) * torch.tensor([0.5, 1, 2])[:, None, None]
    model = ql.load_model(Resized().eval(), preprocess=Preprocess((3, 32, 32)))
    qmodel = ql.quantize(model, images[:16], bits="W8A8", target=target)
    expected = qmodel(images)
    noise = float((expected - Artefact(export(qmodel, tmp_path / "m.xml", simulate=True))(images)).square().sum())
    assert noise < 1e-6 * float(expected.square().sum())


@pytest.mark.parametrize("target", [None, "openvino-cpu"])
@pytest.mark.parametrize(
    "made", [Token, lambda: Pooled(False), lambda: Pooled(True), Excited, Means, Stem, Grouped, Tables]
)
def test_it_computes_what_was_measured(made, target, tmp_path, monkeypatch):
    """In integers, where the processor's sums do not saturate, and as on one whose do, to a flip or two of a code."""
    torch.manual_seed(0)
    images = torch.randn(24, 3, 32, 32)
    model = ql.load_model(made().eval(), preprocess=Preprocess((3, 32, 32)))
    qmodel = ql.quantize(model, images[:16], method="minmax", bits="W8A8", target=target)
    path, expected = export(qmodel, tmp_path / "m.xml", simulate=True), qmodel(images)
    for saturates in (True,) if exported.saturates() else (False, True):
        monkeypatch.setattr(exported, "saturates", lambda said=saturates: said)
        noise = float((expected - Artefact(path, threads=1)(images)).square().sum())
        assert noise < 1e-6 * float(expected.square().sum()), saturates
