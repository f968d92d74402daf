"""Small detectors of three shapes: a plain ViT with detection tokens (YOLOS), a convolutional backbone with encoder and
decoder (DETR), and one that selects its queries and refines its boxes (RT-DETR).

Each takes normalised pictures [B,3,S,S] and returns {"logits", "pred_boxes"}: [B,Q,C+1] with "no object" last (softmax)
or [B,Q,C] (sigmoid), and boxes [B,Q,4] (centre x, centre y, width, height) as fractions of the picture. `stages(x)` is
what training looks at: logits and boxes after every layer, and the memory [B,N,D] of the picture's places.
"""

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Stages = tuple[list[tuple[Tensor, Tensor]], Tensor]


def logit(p: Tensor) -> Tensor:
    """The inverse of the sigmoid, for 1e-4 to 1 - 1e-4."""
    p = p.clamp(1e-4, 1 - 1e-4)
    return torch.log(p / (1 - p))


def grid(side: int) -> Tensor:
    """Centres (x, y) of side x side cells, [side * side, 2] as fractions, row by row."""
    at = (torch.arange(side) + 0.5) / side
    return torch.cartesian_prod(at, at).flip(-1)


def waves(points: Tensor, dim: int) -> Tensor:
    """Positions [N,2] as fractions -> [N,dim]: sines and cosines of four octaves and more, half for x, half for y."""
    frequency = 2 * math.pi * 0.5 * 24 ** torch.linspace(0, 1, dim // 4)
    angle = points[:, :, None] * frequency
    return torch.cat((angle.sin(), angle.cos()), -1).flatten(1) * 0.5


def spread(count: int, size: float) -> Tensor:
    """Boxes [count,4] on a grid, in logits: where the queries begin to look."""
    side = math.isqrt(count)
    return logit(torch.cat((grid(side), torch.full((side * side, 2), size)), 1))


class MLP(nn.Module):
    """Linear layers with GELU between them."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.gelu(layer(x))
        return self.layers[-1](x)


class Attention(nn.Module):
    """Multi-head attention. Queries and keys begin with one projection: what is near is looked at first."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.k.load_state_dict(self.q.state_dict())

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, x in ((self.q, query), (self.k, key), (self.v, value))
        )
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm transformer layer: self-attention (positions added to queries and keys) and an MLP."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim), MLP(dim, hidden, dim)

    def forward(self, x: Tensor, position: Tensor | None = None) -> Tensor:
        y = self.norm1(x)
        place = y if position is None else y + position
        x = x + self.attn(place, place, y)
        return x + self.mlp(self.norm2(x))


class DecoderBlock(Block):
    """The same with cross-attention to the memory in between."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__(dim, heads, hidden)
        self.norm_cross, self.cross = nn.LayerNorm(dim), Attention(dim, heads)

    def forward(self, x: Tensor, position: Tensor, memory: Tensor, places: Tensor) -> Tensor:  # type: ignore[override]
        y = self.norm1(x)
        x = x + self.attn(y + position, y + position, y)
        x = x + self.cross(self.norm_cross(x) + position, memory + places, memory)
        return x + self.mlp(self.norm2(x))


class Detector(nn.Module):
    """What the three have in common: the last stage is the answer."""

    def stages(self, x: Tensor, every: bool = True) -> Stages:
        """Logits and boxes after every layer (or the last one alone), and the memory."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits, boxes = self.stages(x, every=False)[0][-1]
        return {"logits": logits, "pred_boxes": boxes}


class Yolos(Detector):
    """YOLOS-shaped: patches and detection tokens go through one ViT; an MLP each for class and box reads the tokens."""

    def __init__(self, classes: int, size: int, *, patch: int, dim: int, depth: int, heads: int, queries: int) -> None:
        super().__init__()
        side = size // patch
        self.queries, self.cells = queries, side
        self.patch_embed = nn.Conv2d(3, dim, patch, patch)
        self.anchors = nn.Parameter(spread(queries, 0.25))
        at = torch.cat((grid(side), self.anchors.detach()[:, :2].sigmoid()))
        self.pos_embed = nn.Parameter(waves(at, dim)[None])
        self.det_tokens = nn.Parameter(torch.randn(1, queries, dim) * 0.02)
        self.blocks = nn.ModuleList(Block(dim, heads, 4 * dim) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.class_head, self.box_head = MLP(dim, dim, dim, classes + 1), MLP(dim, dim, dim, 4)
        nn.init.zeros_(self.box_head.layers[-1].weight)

    def stages(self, x: Tensor, every: bool = True) -> Stages:
        patches = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat((patches, self.det_tokens.expand(len(x), -1, -1)), 1) + self.pos_embed
        found = []
        for number, block in enumerate(self.blocks, 1):
            x = block(x)
            if number == len(self.blocks) or (every and number > len(self.blocks) // 2):
                tokens = self.norm(x[:, -self.queries :])
                found.append((self.class_head(tokens), torch.sigmoid(self.box_head(tokens) + self.anchors)))
        return found, x[:, : -self.queries]


class Residual(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a shortcut, as in ResNet-18."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after)
        self.conv2, self.bn2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class Backbone(nn.Module):
    """A ResNet of a few hundred thousand weights: features at a quarter and at an eighth of the picture's size."""

    def __init__(self, widths: tuple[int, int, int]) -> None:
        super().__init__()
        a, b, c = widths
        self.stem = nn.Sequential(nn.Conv2d(3, a, 3, 2, 1, bias=False), nn.BatchNorm2d(a), nn.ReLU())
        self.quarter = Residual(a, b, 2)
        self.eighth = nn.Sequential(Residual(b, c, 2), Residual(c, c, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.quarter(self.stem(x))
        return fine, self.eighth(fine)


class Encoded(Detector):
    """A convolutional backbone, and an encoder of its coarse map, an eighth of the image, as tokens."""

    def __init__(
        self, size: int, *, widths: tuple[int, int, int], dim: int, heads: int, hidden: int, encoder: int
    ) -> None:
        super().__init__()
        self.backbone = Backbone(widths)
        self.places = nn.Parameter(waves(grid(size // 8), dim)[None], requires_grad=False)
        self.encoder = nn.ModuleList(Block(dim, heads, hidden) for _ in range(encoder))

    def encoded(self, coarse: Tensor) -> Tensor:
        """[B, dim, size/8, size/8] -> tokens [B, (size/8)², dim]."""
        tokens = coarse.flatten(2).transpose(1, 2)
        for block in self.encoder:
            tokens = block(tokens, self.places)
        return tokens


class Detr(Encoded):
    """DETR-shaped: backbone, encoder, and a decoder whose learned queries look at the memory."""

    def __init__(self, classes: int, size: int, *, decoder: int, queries: int, **encoder: Any) -> None:
        super().__init__(size, **encoder)
        dim, heads, hidden = (encoder[name] for name in ("dim", "heads", "hidden"))
        self.cells = size // 8
        self.input_proj = nn.Conv2d(encoder["widths"][2], dim, 1)
        self.encoder_norm = nn.LayerNorm(dim)
        self.anchors = nn.Parameter(spread(queries, 0.25))
        self.query_embed = nn.Parameter(waves(self.anchors.detach()[:, :2].sigmoid(), dim)[None])
        self.targets = nn.Parameter(torch.randn(1, queries, dim) * 0.02)
        self.decoder = nn.ModuleList(DecoderBlock(dim, heads, hidden) for _ in range(decoder))
        self.norm = nn.LayerNorm(dim)
        self.class_head, self.box_head = nn.Linear(dim, classes + 1), MLP(dim, dim, dim, 4)
        nn.init.zeros_(self.box_head.layers[-1].weight)

    def stages(self, x: Tensor, every: bool = True) -> Stages:
        memory = self.encoder_norm(self.encoded(self.input_proj(self.backbone(x)[1])))
        x = self.targets.expand(len(x), -1, -1)
        found = []
        for number, block in enumerate(self.decoder, 1):
            x = block(x, self.query_embed, memory, self.places)
            if every or number == len(self.decoder):
                y = self.norm(x)
                found.append((self.class_head(y), torch.sigmoid(self.box_head(y) + self.anchors)))
        return found, memory


class Sampling(nn.Module):
    """Deformable attention: each query reads a few points around its box on every map, bilinearly, and weighs them."""

    def __init__(self, dim: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.shape = (heads, levels, points)
        self.value, self.proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.offsets, self.weights = (
            nn.Linear(dim, heads * levels * points * 2),
            nn.Linear(dim, heads * levels * points),
        )
        nn.init.zeros_(self.offsets.weight)
        nn.init.zeros_(self.weights.weight)
        turn = torch.arange(heads)[:, None] * (2 * math.pi / heads) + math.pi / 4
        far = (torch.arange(points) + 0.5) / points
        star = torch.stack((turn.cos() * far, turn.sin() * far), -1)[:, None].expand(-1, levels, -1, -1)
        self.offsets.bias.data.copy_(star.flatten())

    def forward(self, query: Tensor, boxes: Tensor, maps: list[Tensor]) -> Tensor:
        heads, levels, points = self.shape
        count = query.shape[1]
        offset = self.offsets(query).unflatten(-1, (heads, levels, points, 2))
        weight = self.weights(query).unflatten(-1, (heads, levels * points)).softmax(-1)
        centre, size = boxes[:, :, None, None, None, :2], boxes[:, :, None, None, None, 2:]
        where = (2 * (centre + offset * size * 0.5) - 1).permute(3, 0, 2, 1, 4, 5)  # levels, B, heads, Q, points, 2
        read = []
        for level, features in enumerate(maps):
            value = self.value(features.flatten(2).transpose(1, 2)).transpose(1, 2)
            value = value.reshape(-1, value.shape[1] // heads, *features.shape[2:])
            read.append(F.grid_sample(value, where[level].flatten(0, 1), align_corners=False))
        sampled = torch.cat(read, -1)  # B * heads, D / heads, Q, levels * points
        weight = weight.permute(0, 2, 1, 3).reshape(-1, 1, count, levels * points)
        mixed = (sampled * weight).sum(-1)
        return self.proj(mixed.reshape(len(query), -1, count).transpose(1, 2))


class RefiningBlock(Block):
    """A decoder layer that samples the maps around its boxes instead of attending to all of them."""

    def __init__(self, dim: int, heads: int, hidden: int, points: int) -> None:
        super().__init__(dim, heads, hidden)
        self.norm_cross, self.cross = nn.LayerNorm(dim), Sampling(dim, heads, 2, points)

    def forward(self, x: Tensor, position: Tensor, boxes: Tensor, maps: list[Tensor]) -> Tensor:  # type: ignore[override]
        y = self.norm1(x)
        x = x + self.attn(y + position, y + position, y)
        x = x + self.cross(self.norm_cross(x) + position, boxes, maps)
        return x + self.mlp(self.norm2(x))


class RtDetr(Encoded):
    """RT-DETR-shaped: two maps, the coarse one encoded and fused into the fine one; the places that score best become
    queries, and every decoder layer refines their boxes. Scores are sigmoids.
    """

    def __init__(self, classes: int, size: int, *, decoder: int, queries: int, points: int, **encoder: Any) -> None:
        super().__init__(size, **encoder)
        widths, dim, heads, hidden = (encoder[name] for name in ("widths", "dim", "heads", "hidden"))
        self.cells, self.queries = size // 4, queries
        self.fine_proj, self.coarse_proj = nn.Conv2d(widths[1], dim, 1), nn.Conv2d(widths[2], dim, 1)
        self.fuse = nn.Sequential(nn.Conv2d(2 * dim, dim, 1, bias=False), nn.BatchNorm2d(dim), nn.ReLU())
        self.mix = nn.Sequential(nn.Conv2d(dim, dim, 3, 1, 1, groups=dim, bias=False), nn.BatchNorm2d(dim))
        anchors = torch.cat((grid(self.cells), torch.full((self.cells**2, 2), 0.25)), 1)
        self.anchors = nn.Parameter(logit(anchors), requires_grad=False)
        self.memory_norm = nn.LayerNorm(dim)
        self.memory_class, self.memory_box = nn.Linear(dim, classes), MLP(dim, dim, 4)
        self.query_position = MLP(4, dim, dim)
        self.decoder = nn.ModuleList(RefiningBlock(dim, heads, hidden, points) for _ in range(decoder))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(decoder))
        self.class_heads = nn.ModuleList(nn.Linear(dim, classes) for _ in range(decoder))
        self.box_heads = nn.ModuleList(MLP(dim, dim, 4) for _ in range(decoder))
        for head in (self.memory_box, *self.box_heads):
            nn.init.zeros_(head.layers[-1].weight)
            nn.init.zeros_(head.layers[-1].bias)
        for head in (self.memory_class, *self.class_heads):
            nn.init.constant_(head.bias, -4.0)

    def stages(self, x: Tensor, every: bool = True) -> Stages:
        fine, coarse = self.backbone(x)
        coarse = self.coarse_proj(coarse)
        coarse = self.encoded(coarse).transpose(1, 2).unflatten(-1, coarse.shape[2:])
        fine = self.fuse(torch.cat((self.fine_proj(fine), F.interpolate(coarse, scale_factor=2.0)), 1))
        fine = fine + self.mix(fine)
        memory = self.memory_norm(fine.flatten(2).transpose(1, 2))
        scores = self.memory_class(memory)
        best = scores.amax(-1).topk(self.queries, dim=1).indices[:, :, None]
        x = memory.gather(1, best.expand(-1, -1, memory.shape[-1]))
        boxes = torch.sigmoid(self.memory_box(x) + self.anchors[best[:, :, 0]])
        found = [(scores.gather(1, best.expand(-1, -1, scores.shape[-1])), boxes)]
        x = x.detach()
        for number, block in enumerate(self.decoder):
            boxes = boxes.detach()
            x = block(x, self.query_position(boxes), boxes, [fine, coarse])
            y = self.norms[number](x)
            boxes = torch.sigmoid(self.box_heads[number](y) + logit(boxes))
            if every or number == len(self.decoder) - 1:
                found.append((self.class_heads[number](y), boxes))
        return found, memory


SHAPES: dict[str, type[Detector]] = {"yolos": Yolos, "detr": Detr, "rtdetr": RtDetr}


def build(shape: str, classes: int, size: int, settings: dict[str, Any]) -> Detector:
    """A detector with random weights: `shape` is a key of SHAPES."""
    return SHAPES[shape](classes, size, **settings)
