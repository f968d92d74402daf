"""Vision models as people write them, drawn at random: the parts that :mod:`test_fuzz` puts together."""

from __future__ import annotations

import argparse
import collections
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

F = nn.functional


@dataclass(frozen=True)
class Drawn:
    """What one model is made of."""

    height: int
    width: int
    channels: int
    classes: int
    dim: int
    heads: int
    depth: int
    stem: str
    attention: str
    mlp: str
    norm: str
    pool: str
    head: str
    output: str
    position: str
    scaled: bool
    pre_norm: bool
    by_len: bool


@st.composite
def drawn_models(draw) -> Drawn:
    square = draw(st.sampled_from([16, 24, 32]))
    heads = draw(st.sampled_from([1, 2, 4]))
    return Drawn(
        height=square,
        width=draw(st.sampled_from([square, square, 16, 40])),
        channels=draw(st.sampled_from([3, 3, 3, 1, 4])),
        classes=draw(st.integers(2, 12)),
        dim=heads * draw(st.sampled_from([4, 8, 12])),
        heads=heads,
        depth=draw(st.integers(1, 2)),
        stem=draw(st.sampled_from(["patch", "patch", "convolutions", "depthwise", "unfold"])),
        attention=draw(st.sampled_from(["fused", "manual", "torch", "masked", "relative", "window", "mixer"])),
        mlp=draw(st.sampled_from(["gelu", "tanh-gelu", "swiglu", "relu", "quick-gelu", "convolution", "none"])),
        norm=draw(st.sampled_from(["layer", "layer", "rms", "group", "affine", "none"])),
        pool=draw(st.sampled_from(["mean", "class", "max", "attention"])),
        head=draw(st.sampled_from(["linear", "no-bias", "two-layers", "normalised", "none"])),
        output=draw(st.sampled_from(["tensor", "tensor", "tuple", "dict", "two"])),
        position=draw(st.sampled_from(["learned", "sine", "none", "convolution"])),
        scaled=draw(st.booleans()),
        pre_norm=draw(st.booleans()),
        by_len=draw(st.sampled_from([False, False, False, True])),
    )


def stem(m: Drawn) -> nn.Module:
    c, d = m.channels, m.dim
    if m.stem == "convolutions":
        first = nn.Conv2d(c, d // 2, 3, 2, 1, bias=False)
        second = nn.Conv2d(d // 2, d, 3, 2, 1, groups=2 if d % 4 == 0 else 1, bias=False)
        return nn.Sequential(first, nn.BatchNorm2d(d // 2), nn.ReLU(), second, nn.BatchNorm2d(d), nn.MaxPool2d(2))
    if m.stem == "depthwise":
        parts = (nn.Conv2d(c, d, 1), nn.Conv2d(d, d, 4, 4, groups=d, bias=False), nn.Hardswish(), nn.AvgPool2d(2))
        return nn.Sequential(*parts)
    if m.stem == "unfold":
        return nn.Sequential(nn.PixelUnshuffle(8), nn.Conv2d(64 * c, d, 1))
    return nn.Conv2d(c, d, 8, 8, bias=m.stem == "patch")


class Affine(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


class Group(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


def norm(kind: str, dim: int) -> nn.Module:
    made = {
        "layer": lambda: nn.LayerNorm(dim),
        "rms": lambda: nn.RMSNorm(dim, eps=1e-6),
        "group": lambda: Group(1, dim),
        "affine": lambda: Affine(dim),
        "none": nn.Identity,
    }
    return made[kind]()


class Attention(nn.Module):
    def __init__(self, m: Drawn, tokens: int):
        super().__init__()
        d = m.dim
        self.kind, self.heads, self.tokens = m.attention, m.heads, tokens
        self.qkv, self.proj = nn.Linear(d, 3 * d, bias=m.scaled), nn.Linear(d, d)
        if self.kind == "torch":
            self.whole = nn.MultiheadAttention(d, m.heads, batch_first=True)
        if self.kind == "relative":
            self.table = nn.Parameter(torch.randn(m.heads, 2 * tokens - 1) * 0.5)
            where = torch.arange(tokens)
            self.register_buffer("index", where[:, None] - where[None] + tokens - 1, persistent=False)
        if self.kind == "mixer":
            self.mix = nn.Linear(tokens, tokens)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        if self.kind == "torch":
            return self.whole(x, x, x, need_weights=False)[0]
        if self.kind == "mixer":
            return self.proj(self.mix(x.transpose(1, 2)).transpose(1, 2))
        if self.kind == "window" and n % 2 == 0:
            x = torch.roll(x, 1, 1).reshape(b * 2, n // 2, d)
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if self.kind == "manual":
            x = torch.einsum("bhqk,bhkd->bhqd", (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1), v)
        else:
            mask = None
            if self.kind == "masked":
                mask = torch.arange(n, device=x.device)
                mask = ((mask[None] <= mask[:, None] + 2)[None, None]).expand(b, 1, n, n)
            elif self.kind == "relative":
                mask = self.table[:, self.index]
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = self.proj(x.transpose(1, 2).flatten(2))
        if self.kind == "window" and n % 2 == 0:
            x = torch.roll(x.reshape(b, n, d), -1, 1)
        return x


class Mlp(nn.Module):
    def __init__(self, kind: str, dim: int):
        super().__init__()
        self.kind, self.up = kind, nn.Linear(dim, 2 * dim)
        self.down = nn.Linear(dim if kind == "swiglu" else 2 * dim, dim)
        if kind == "convolution":
            self.between = nn.Conv1d(2 * dim, 2 * dim, 3, 1, 1, groups=2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if self.kind == "convolution":
            x = self.between(x.transpose(1, 2)).transpose(1, 2)
        if self.kind == "swiglu":
            a, b = x.chunk(2, -1)
            return self.down(F.silu(a) * b)
        active = {"relu": F.relu, "tanh-gelu": lambda v: F.gelu(v, approximate="tanh")}
        active["quick-gelu"] = lambda v: v * torch.sigmoid(1.702 * v)
        return self.down(active.get(self.kind, F.gelu)(x))


class Block(nn.Module):
    def __init__(self, m: Drawn, tokens: int):
        super().__init__()
        self.norm1, self.attn = norm(m.norm, m.dim), Attention(m, tokens)
        self.norm2, self.mlp = norm(m.norm, m.dim), None if m.mlp == "none" else Mlp(m.mlp, m.dim)
        self.gamma = nn.Parameter(torch.ones(m.dim)) if m.scaled else 1.0
        self.pre = m.pre_norm

    def forward(self, x: Tensor) -> Tensor:
        branches = [(self.norm1, self.attn)] + ([(self.norm2, self.mlp)] if self.mlp else [])
        for before, branch in branches:
            x = x + self.gamma * branch(before(x)) if self.pre else before(x + self.gamma * branch(x))
        return x


class Model(nn.Module):
    """A vision model made as a :class:`Drawn` says."""

    def __init__(self, m: Drawn):
        super().__init__()
        self.m, d = m, m.dim
        self.stem = stem(m)
        tokens = (m.height // 8) * (m.width // 8)
        if m.position == "learned":
            self.position = nn.Parameter(torch.randn(1, tokens, d) * 0.3)
        elif m.position == "convolution":
            self.position = nn.Conv2d(d, d, 3, 1, 1, groups=d)
        if m.pool == "class":
            self.cls = nn.Parameter(torch.randn(1, 1, d))
        self.blocks = nn.ModuleList(Block(m, tokens + (m.pool == "class")) for _ in range(m.depth))
        self.norm = norm(m.norm, d)
        self.probe = nn.Parameter(torch.randn(d)) if m.pool == "attention" else None
        self.head = nn.Linear(d, m.classes, bias=m.head != "no-bias") if m.head != "none" else nn.Identity()
        if m.head == "two-layers":
            self.head = nn.Sequential(nn.Linear(d, d), nn.Tanh(), nn.Dropout(0.1), nn.Linear(d, m.classes))

    def forward(self, images: Tensor):
        m, x = self.m, self.stem(images)
        if m.position == "convolution":
            x = x + self.position(x)
        x = x.flatten(2).transpose(1, 2)
        if m.position == "learned":
            x = x + self.position
        elif m.position == "sine":
            angle = torch.arange(x.shape[1], device=x.device)[:, None] / 10.0 ** torch.arange(m.dim, device=x.device)
            x = x + torch.sin(angle)
        if m.pool == "class":
            x = torch.cat([self.cls.expand(len(x) if m.by_len else x.shape[0], -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        body = x
        if m.pool == "class":
            x = x[:, 0]
        elif m.pool == "max":
            x = x.amax(1)
        elif m.pool == "attention":
            x = ((x @ self.probe).softmax(1)[..., None] * x).sum(1)
        else:
            x = x.mean(1)
        x = self.head(F.normalize(x, dim=-1) * 4 if m.head == "normalised" else x)
        as_written = {"tuple": (x,), "dict": {"logits": x}, "two": {"logits": x, "tokens": body}}
        return as_written.get(m.output, x)


def redrawn(model: nn.Module, seed: int) -> nn.Module:
    """Every parameter and buffer at the scale that training gives it: fresh ones hide faults."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if not value.is_floating_point():
            continue
        noise = torch.randn(value.shape, generator=generator)
        with torch.no_grad():
            if name.endswith("running_var") or "gamma" in name or (value.dim() == 1 and bool((value == 1).all())):
                value.copy_(1 + 0.3 * noise.clamp(-2, 2))
            elif value.dim() <= 1:
                value.copy_(0.3 * noise)
            elif "position" not in name and "cls" not in name:
                value.copy_(noise * 1.2 * value[0].numel() ** -0.5)
    return model.eval()


def made(m: Drawn, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return redrawn(Model(m), seed)


def pictures(m: Drawn, count: int, seed: int) -> Tensor:
    """Smooth images [count, C, H, W] of mean 0 and deviation 1."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, m.channels, 4, 4, generator=generator)
    fine = torch.randn(count, m.channels, m.height, m.width, generator=generator)
    return F.interpolate(coarse, (m.height, m.width), mode="bilinear") + 0.2 * fine


# ---- checkpoint files ------------------------------------------------------------------------------------------------


def layouts(state: dict[str, Tensor]) -> dict[str, object]:
    """A state dict as training code puts it into a file, by a name for the way."""
    ema = {k: v.clone() for k, v in state.items()}
    return {
        "plain": state,
        "ordered": collections.OrderedDict(state),
        "model": {"model": state},
        "state_dict": {"state_dict": state, "epoch": 3, "arch": "mine"},
        "args": {"model": state, "args": argparse.Namespace(lr=0.1, data=Path("/x"))},
        "numpy": {"state_dict": state, "best_acc1": np.float64(81.3), "steps": np.int64(7)},
        "array": {"state_dict": state, "curve": np.arange(3.0)},
        "optimizer": {"model": state, "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": []}},
        "lightning": {
            "state_dict": {f"model.{k}": v for k, v in state.items()},
            "pytorch-lightning_version": "2.4.0",
            "hyper_parameters": {"lr": 0.1},
            "callbacks": {},
        },
        "ema": {"state_dict": state, "state_dict_ema": ema},
        "two levels": {"checkpoint": {"model_state_dict": state}},
        **{
            f"prefix {p}": {f"{p}{k}": v for k, v in state.items()}
            for p in ("module.", "_orig_mod.", "net.", "backbone.", "model.module.", "encoder.", "_orig_mod.module.")
        },
        "foreign key": {**{f"module.{k}": v for k, v in state.items()}, "n_averaged": torch.tensor(3)},
    }
