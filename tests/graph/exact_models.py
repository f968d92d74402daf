"""Small models for the tests of exactness: drawn at random, with all that a layer may have and no parameter as it was
initialised."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

SIZE = 8
"""Pixels of an image's side."""


SHARED = ("block", "norm", "mlp", "first", "bias", "kv", "proj")
"""Parts of a transformer that may stand in two places of the graph: the whole block, its LayerNorm, its MLP, the MLP's
first layer, the bias of the MLP's second layer (which is the attention's too), the layer that makes v (and k), or the
one that reads the context."""


@dataclass(frozen=True)
class Conv:
    """One convolution with all its attributes. whole: called as ``torch.convolution``."""

    channels: int
    kernel: int
    stride: int
    padding: int | str
    dilation: int
    groups: int
    bias: bool
    norm: bool
    whole: bool


@dataclass(frozen=True)
class Net:
    """Convolutions, then pooled or as tokens, which a Conv1d may mix, a LayerNorm and an MLP."""

    convs: tuple[Conv, ...]
    tokens: bool
    mixed: bool
    affine: bool
    biases: bool
    act: str


@dataclass(frozen=True)
class Vit:
    """A transformer of one block. shared: see :data:`SHARED`."""

    dim: int
    class_token: bool
    pre_norm: bool
    patch_padding: int
    patch_bias: bool
    qkv: str
    qkv_bias: bool
    proj_bias: bool
    mlp_bias: bool
    head_bias: bool
    affine: tuple[str, str, str]
    layer_scale: bool
    act: str
    softmax: int
    qk_norm: bool
    position_bias: bool
    fused: bool
    shared: str
    massive: bool


@st.composite
def convs(draw: st.DrawFn, size: int, first: bool) -> Conv:
    """One that fits images of ``size`` pixels."""
    groups = 1 if first else draw(st.sampled_from((1, 2, 4, 8)))
    padding = draw(st.sampled_from((0, 1, 2, "same", "valid")))
    stride = 1 if padding == "same" else draw(st.integers(1, 2))
    kernel, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    if dilation * (kernel - 1) + 1 > size:
        kernel = 1
    whole = not isinstance(padding, str) and draw(st.booleans())
    return Conv(8, kernel, stride, padding, dilation, groups, draw(st.booleans()), draw(st.booleans()), whole)


@st.composite
def nets(draw: st.DrawFn) -> Net:
    size, found = SIZE, []
    for number in range(draw(st.integers(1, 3))):
        conv = draw(convs(size, number == 0))
        found.append(conv)
        if conv.padding != "same":
            margin = conv.padding if isinstance(conv.padding, int) else 0
            size = (size + 2 * margin - conv.dilation * (conv.kernel - 1) - 1) // conv.stride + 1
    flags = [draw(st.booleans()) for _ in range(4)]
    return Net(tuple(found), *flags, act=draw(st.sampled_from(("gelu", "relu"))))


def vits() -> st.SearchStrategy[Vit]:
    flag, affine = st.booleans(), st.sampled_from(("full", "full", "full", "weight", "none"))
    return st.builds(
        Vit,
        dim=st.sampled_from((4, 8)),  # as many channels as tokens, or more
        class_token=flag,
        pre_norm=flag,
        patch_padding=st.sampled_from((0, 0, 2)),
        patch_bias=flag,
        qkv=st.sampled_from(("joint", "apart")),
        qkv_bias=flag,
        proj_bias=flag,
        mlp_bias=flag,
        head_bias=flag,
        affine=st.tuples(affine, affine, affine),
        layer_scale=flag,
        act=st.sampled_from(("gelu", "tanh", "relu")),
        softmax=st.sampled_from((-1, -1, -1, -2)),
        qk_norm=st.sampled_from((False, False, True)),
        position_bias=flag,
        fused=flag,
        shared=st.sampled_from(("nothing", "nothing", "nothing", *SHARED)),
        massive=flag,
    )


def activation(name: str, x: Tensor) -> Tensor:
    return F.relu(x) if name == "relu" else F.gelu(x, approximate="tanh" if name == "tanh" else "none")


def layer_norm(dim: int, affine: str) -> nn.LayerNorm:
    return nn.LayerNorm(dim, elementwise_affine=affine != "none", bias=affine == "full")


class ConvNet(nn.Module):
    def __init__(self, net: Net):
        super().__init__()
        self.net, channels = net, 3
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        for c in net.convs:
            made = nn.Conv2d(channels, c.channels, c.kernel, c.stride, c.padding, c.dilation, c.groups, bias=c.bias)
            self.convs.append(made)
            self.norms.append(nn.BatchNorm2d(c.channels) if c.norm else nn.Identity())
            channels = c.channels
        self.mix = nn.Conv1d(channels, channels, 3, padding=1, groups=2, bias=net.biases) if net.mixed else None
        self.norm = layer_norm(channels, "full" if net.affine else "none")
        self.up, self.down = nn.Linear(channels, 20, bias=net.biases), nn.Linear(20, 5, bias=net.biases)

    def forward(self, x: Tensor) -> Tensor:
        for i, (c, conv, norm) in enumerate(zip(self.net.convs, self.convs, self.norms, strict=True)):
            if c.whole:
                both = ([n, n] for n in (c.stride, c.padding, c.dilation))
                x = torch.convolution(x, conv.weight, conv.bias, *both, False, [0, 0], c.groups)
            else:
                x = conv(x)
            x = norm(x)
            if i < len(self.convs) - 1:
                x = activation(self.net.act, x)
        x = x.flatten(2)
        if self.mix is not None:
            x = self.mix(x)
        x = x.transpose(1, 2) if self.net.tokens else x.mean(-1)
        x = self.down(activation(self.net.act, self.up(self.norm(x))))
        return x.mean(1) if self.net.tokens else x


class Attention(nn.Module):
    def __init__(self, vit: Vit):
        super().__init__()
        self.vit, self.size = vit, vit.dim // 2
        parts = ("qkv",) if vit.qkv == "joint" else ("q", "k", "v")
        for part in parts:
            setattr(self, part, nn.Linear(vit.dim, vit.dim * 3 // len(parts), bias=vit.qkv_bias))
        if vit.shared == "kv" and vit.qkv == "apart":
            self.k = self.v
        self.proj = nn.Linear(vit.dim, vit.dim, bias=vit.proj_bias)
        self.q_norm, self.k_norm = (nn.LayerNorm(self.size), nn.LayerNorm(self.size)) if vit.qk_norm else (None, None)
        tokens = 4 + vit.class_token
        self.bias = nn.Parameter(torch.zeros(2, tokens, tokens)) if vit.position_bias else None

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        if self.vit.qkv == "joint":
            q, k, v = self.qkv(x).reshape(b, n, 3, 2, self.size).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (p(x).reshape(b, n, 2, self.size).transpose(1, 2) for p in (self.q, self.k, self.v))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.vit.fused and self.vit.softmax == -1:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=None if self.bias is None else self.bias[None])
        else:
            logits = (q * self.size**-0.5) @ k.transpose(-2, -1)
            logits = logits if self.bias is None else logits + self.bias
            x = logits.softmax(self.vit.softmax) @ v
        return self.proj(x.transpose(1, 2).reshape(b, n, c))


class Block(nn.Module):
    def __init__(self, vit: Vit):
        super().__init__()
        self.vit, dim = vit, vit.dim
        self.norm1, self.norm2 = layer_norm(dim, vit.affine[0]), layer_norm(dim, vit.affine[1])
        self.attn = Attention(vit)
        self.fc1, self.fc2 = nn.Linear(dim, 18, bias=vit.mlp_bias), nn.Linear(18, dim, bias=vit.mlp_bias)
        self.gammas = nn.ParameterList(torch.ones(dim) for _ in range(2 * vit.layer_scale))
        self.other = nn.Linear(18, dim) if vit.shared == "first" else None
        if vit.shared == "norm":
            self.norm2 = self.norm1
        if vit.shared == "bias" and vit.mlp_bias and vit.proj_bias:
            self.attn.proj.bias = self.fc2.bias

    def forward(self, x: Tensor) -> Tensor:
        for branch, gamma in zip((self.attend, self.feed), self.gammas or (None, None), strict=True):
            y = branch(x)
            x = x + (y if gamma is None else y * gamma)
        if self.vit.shared == "proj":
            x = x + self.attn.proj(x)
        if self.other is not None:
            x = x + self.other(activation(self.vit.act, self.fc1(x)))
        return x + self.mlp(x) if self.vit.shared == "mlp" else x

    def attend(self, x: Tensor) -> Tensor:
        return self.attn(self.norm1(x))

    def feed(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm2(x))

    def mlp(self, x: Tensor) -> Tensor:
        return self.fc2(activation(self.vit.act, self.fc1(x)))


class Transformer(nn.Module):
    def __init__(self, vit: Vit):
        super().__init__()
        self.vit, dim = vit, vit.dim
        # padded patches overlap: 2 x 2 of 6 x 6 pixels
        kernel = 4 if vit.patch_padding == 0 else 6
        self.patch = nn.Conv2d(3, dim, kernel, 4, vit.patch_padding, bias=vit.patch_bias)
        self.token = nn.Parameter(torch.zeros(1, 1, dim)) if vit.class_token else None
        self.position = nn.Parameter(torch.zeros(1, 4 + vit.class_token, dim))
        self.norm_pre = nn.LayerNorm(dim) if vit.pre_norm else nn.Identity()
        self.block = Block(vit)
        self.norm, self.head = layer_norm(dim, vit.affine[2]), nn.Linear(dim, 5, bias=vit.head_bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        if self.token is not None:
            x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        x = self.norm_pre(x + self.position)
        x = self.block(x)
        if self.vit.shared == "block":
            x = self.block(x)
        return self.head(self.norm(x)[:, 0] if self.token is not None else self.norm(x).mean(1))


def drawn(kind: Net | Vit, seed: int) -> nn.Module:
    """The model, float64, every parameter and buffer away from its initial value."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = (ConvNet if isinstance(kind, Net) else Transformer)(kind)  # type: ignore[arg-type]
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("running_var"):
                value.data = 0.5 + torch.rand_like(value)
            elif "norm" in name and name.endswith("weight"):
                value.data = (0.5 + torch.rand_like(value)) * torch.where(torch.rand_like(value) < 0.2, -1.0, 1.0)
            elif "gammas" in name:
                value.data = 1 + 0.3 * torch.randn_like(value)
            elif value.is_floating_point():
                fan = value[0].numel() if value.dim() > 1 and "position" not in name and "token" not in name else 1
                value.data = torch.randn_like(value) * fan**-0.5
    if isinstance(kind, Vit) and kind.massive:
        model.block.fc1.weight.data[3] *= 40  # type: ignore[union-attr, index]
    return model.double().eval().requires_grad_(False)
