"""A detector that reads from its images where their objects are, and images that say it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import quantlens as ql
from quantlens.data import ImageSet, Preprocess
from quantlens.metrics import Boxes
from quantlens.zoo.detectors import Block

CLASSES = ("cat", "dog", "owl")
QUERIES, SIDE = 6, 16


class Reader(nn.Module):
    """Row q of an image is query q: centre x, y, width, height and the logits of the classes, by layers that are the
    identity."""

    def __init__(self, softmax: bool = True):
        super().__init__()
        self.box, self.kind = nn.Linear(4, 4), nn.Linear(4, 4 if softmax else 3)
        with torch.no_grad():
            for layer in (self.box, self.kind):
                layer.weight.copy_(torch.eye(len(layer.weight), 4))
                layer.bias.zero_()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        rows = images[:, 0, :QUERIES]
        return {"logits": self.kind(rows[..., 4:8]), "pred_boxes": self.box(rows[..., :4])}


def detector(softmax: bool = True, **changes: Any) -> Any:
    """The float model."""
    plain = Preprocess((3, SIDE, SIDE), mean=(0, 0, 0), std=(1, 1, 1), resize=(SIDE, SIDE))
    module = Reader(softmax)
    with torch.no_grad():
        for name, value in changes.items():
            module.get_parameter(name.replace("_", ".")).add_(value)
    return ql.load_model(module, preprocess=plain, class_names=list(CLASSES))


def pictures(n: int = 12, seed: int = 0, *, objects: bool = True, noise: float = 0.02) -> ImageSet:
    """Images of pictures of many sizes with up to four objects each, of which the detector finds nearly all, not quite
    in their places; without objects it finds little."""
    rng = np.random.default_rng(seed)
    values = rng.random((n, 3, SIDE, SIDE)).astype(np.float32)
    values[:, 0, :QUERIES, 7] = 4.0  # no object
    values[:, 0, :QUERIES, 4:7] = rng.normal(0, 1, (n, QUERIES, 3))
    values[:, 0, :QUERIES, :4] = rng.uniform(0.3, 0.6, (n, QUERIES, 4))
    sizes = rng.integers(20, 200, (n, 2))
    image, query = np.nonzero(rng.random((n, QUERIES)) < 0.5 if objects else np.zeros((n, QUERIES)))
    side = rng.uniform(0.1, 0.4, (len(image), 2))
    centre = rng.uniform(0.25, 0.75, (len(image), 2))
    labels = rng.integers(0, 3, len(image))
    moved = np.hstack([centre, side]) + rng.normal(0, noise, (len(image), 4)) * np.tile(side, 2)
    values[image, 0, query, :4] = moved
    values[image, 0, query, 4 + labels] = rng.uniform(3, 9, len(image))
    corners = np.hstack([centre - side / 2, centre + side / 2]) * np.tile(sizes[image, ::-1], 2)
    boxes = Boxes(image, corners, labels, names=CLASSES, ids=(1, 2, 3))
    names = [f"{k}.png" for k in range(n)]
    named = (names, None, f"made/{seed}", f"{seed}-{n}-{objects}")
    return ImageSet(*named, values=torch.from_numpy(values), boxes=boxes, sizes=sizes)


class Selecting(nn.Module):
    """A detector that selects its queries (top-k): the places of the encoder's map that score best."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.encoder, self.norm = nn.Conv2d(3, 16, 4, 4), Block(16, 2, 16), nn.LayerNorm(16)
        self.score, self.decoder = nn.Linear(16, 3), Block(16, 2, 16)
        self.kind, self.box = nn.Linear(16, 3), nn.Linear(16, 4)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        memory = self.norm(self.encoder(self.patches(images).flatten(2).mT))
        best = self.score(memory).amax(-1).topk(QUERIES, dim=1).indices[:, :, None]
        queries = self.decoder(memory.gather(1, best.expand(-1, -1, 16)))
        return {"logits": self.kind(queries), "pred_boxes": self.box(queries).sigmoid()}


def selecting() -> Any:
    """The float model, with random weights."""
    torch.manual_seed(0)
    plain = Preprocess((3, SIDE, SIDE), mean=(0, 0, 0), std=(1, 1, 1), resize=(SIDE, SIDE))
    return ql.load_model(Selecting().eval(), preprocess=plain, class_names=list(CLASSES))
