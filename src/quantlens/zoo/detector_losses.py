"""What a detector learns from: one-to-one matching of queries and boxes, their losses, and a dense head on the memory.

True boxes come padded to T a picture: boxes [B,T,4] (x1, y1, x2, y2 as fractions) and labels [B,T], -1 for none.
All of it is vectorised, on whatever device the tensors are.
"""

from itertools import combinations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantlens.zoo.detectors import MLP, Stages, grid, logit

CLASS_COST, L1_COST, GIOU_COST = 2.0, 5.0, 2.0
NO_OBJECT = 0.1  # weight of the class "no object", as in DETR
THRESHOLDS = np.linspace(0.5, 0.95, 10)


def corners(boxes: Tensor) -> Tensor:
    """(centre x, centre y, width, height) -> (x1, y1, x2, y2)."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat((centre - half, centre + half), -1)


def centred(boxes: Tensor) -> Tensor:
    """(x1, y1, x2, y2) -> (centre x, centre y, width, height)."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat(((low + high) / 2, high - low), -1)


def overlaps(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU of boxes (x1, y1, x2, y2) that broadcast."""
    size_a, size_b = a[..., 2:] - a[..., :2], b[..., 2:] - b[..., :2]
    shared = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(-1)
    union = size_a.prod(-1) + size_b.prod(-1) - shared
    iou = shared / union.clamp(min=1e-9)
    return iou, iou - (hull - union) / hull.clamp(min=1e-9)


def assign(cost: Tensor, there: Tensor) -> Tensor:
    """The cheapest one-to-one assignment: costs [B,T,Q] of T boxes and Q queries -> query of each box, [B,T].

    Exact: with T boxes, some best assignment gives each box one of its T cheapest queries, and those few combinations
    are all looked at. `there` [B,T] says which boxes exist.
    """
    batch, count, _ = cost.shape
    best = cost.topk(count, dim=-1, largest=False)
    total = cost.new_zeros(batch, *[1] * count)

    def along(values: Tensor, *dims: int) -> Tensor:
        shape = [count if dim in dims else 1 for dim in range(count)]
        return values.reshape(batch, *shape)

    for one in range(count):
        total = total + along(best.values[:, one] * there[:, one, None], one)
    for one, other in combinations(range(count), 2):
        same = best.indices[:, one, :, None] == best.indices[:, other, None, :]
        same = same & (there[:, one] & there[:, other])[:, None, None]
        total = total + along(same * 1e6, one, other)
    winner = total.flatten(1).argmin(-1)
    place = torch.stack([winner // count ** (count - 1 - one) % count for one in range(count)], 1)
    return best.indices.gather(-1, place[..., None])[..., 0]


def detection_loss(stages: Stages, boxes: Tensor, labels: Tensor, softmax: bool) -> Tensor:
    """The sum over all stages (in one go: they are stacked along the batch) of class, L1 and GIoU losses."""
    found, _ = stages
    counts = [len(logits) for logits, _ in found]
    logits = torch.cat([logits.float() for logits, _ in found])
    guessed = torch.cat([b.float() for _, b in found])
    boxes, labels = boxes.repeat(len(counts), 1, 1), labels.repeat(len(counts), 1)
    there = labels >= 0
    known = labels.clamp(min=0)
    with torch.no_grad():
        score = logits.softmax(-1) if softmax else logits.sigmoid()
        score = score.gather(-1, known[:, None].expand(-1, logits.shape[1], -1)).transpose(1, 2)
        distance = (centred(boxes)[:, :, None] - guessed[:, None]).abs().sum(-1)
        giou = overlaps(boxes[:, :, None], corners(guessed)[:, None])[1]
        query = assign(L1_COST * distance - GIOU_COST * giou - CLASS_COST * score, there)
    rows = torch.arange(len(query), device=query.device)[:, None].expand_as(query)
    chosen = guessed[rows, query]
    iou, giou = overlaps(boxes, corners(chosen))
    number = there.sum().clamp(min=1) / len(counts)
    far = (centred(boxes) - chosen).abs().sum(-1) * L1_COST + (1 - giou) * GIOU_COST
    place = (far * there).sum() / number  # no indexing by a mask, for which a GPU would have to wait
    spare = torch.where(there, query, logits.shape[1])  # boxes that do not exist write beside the queries
    if softmax:
        target = logits.new_full((len(logits), logits.shape[1] + 1), logits.shape[-1] - 1, dtype=torch.int64)
        target = target.scatter(1, spare, known)[:, :-1]
        weight = torch.ones(logits.shape[-1], device=logits.device)
        weight[-1] = NO_OBJECT
        return place + CLASS_COST * len(counts) * F.cross_entropy(logits.transpose(1, 2), target, weight)
    aim = logits.new_zeros(len(logits), logits.shape[1] + 1, logits.shape[2])
    aim = aim.index_put((rows, spare, known), iou.detach().clamp(min=0))[:, :-1]
    return place + varifocal(logits, aim) / number


def varifocal(logits: Tensor, aim: Tensor) -> Tensor:
    """Cross-entropy against a soft aim (the IoU of the matched box, else 0), hard negatives weighing more."""
    weight = torch.where(aim > 0, 0.5 + 0.5 * aim, 0.75 * logits.detach().sigmoid() ** 2)
    return F.binary_cross_entropy_with_logits(logits, aim, weight, reduction="sum")


class DenseHead(nn.Module):
    """Class and box from every place of the memory, one box to many places: a teacher that is thrown away after
    training. It makes the features tell digits apart long before the queries know where to look.
    """

    def __init__(self, dim: int, cells: int, classes: int) -> None:
        super().__init__()
        self.norm, self.classes, self.box = nn.LayerNorm(dim), nn.Linear(dim, classes), MLP(dim, dim, 4)
        nn.init.constant_(self.classes.bias, -4.0)
        nn.init.zeros_(self.box.layers[-1].weight)
        self.reach = 0.5 / cells
        self.centres = nn.Parameter(grid(cells), requires_grad=False)

    def forward(self, memory: Tensor, boxes: Tensor, labels: Tensor) -> Tensor:
        """The loss: focal for the class, L1 and GIoU for the boxes of the places that lie in one (the smallest)."""
        x = self.norm(memory.float())
        logits, start = self.classes(x), torch.cat((logit(self.centres), torch.full_like(self.centres, -1.4)), -1)
        guessed = torch.sigmoid(self.box(x) + start)
        box = centred(boxes)
        far = (self.centres[:, None] - box[:, None, :, :2]).abs() / (box[:, None, :, 2:] / 2 + self.reach)
        inside = (far.amax(-1) < 0.8) & (labels >= 0)[:, None]  # [B,N,T]
        area = torch.where(inside, box[..., 2:].prod(-1)[:, None], 9.0)
        smallest = area.argmin(-1)
        positive = inside.any(-1)
        label = labels.clamp(min=0).gather(1, smallest)
        aim = F.one_hot(label, logits.shape[-1]) * positive[..., None]
        chosen = boxes.gather(1, smallest[..., None].expand(-1, -1, 4))
        giou = overlaps(chosen, corners(guessed))[1]
        place = (centred(chosen) - guessed).abs().sum(-1) * L1_COST + (1 - giou) * GIOU_COST
        p = logits.sigmoid()
        hard = torch.where(aim > 0, 0.25 * (1 - p) ** 2, 0.75 * p**2).detach()
        focal = (hard * F.binary_cross_entropy_with_logits(logits, aim.float(), reduction="none")).sum()
        return (4 * focal + (place * positive).sum()) / positive.sum().clamp(min=1)


def detections(logits: Tensor, boxes: Tensor, softmax: bool, top: int = 100) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, labels, boxes (x1, y1, x2, y2 as fractions) of each picture, the best first, [B,D]."""
    if softmax:
        scores, labels = logits.softmax(-1)[..., :-1].max(-1)
        scores, query = scores.sort(descending=True)
        labels = labels.gather(1, query)
    else:
        scores, place = logits.sigmoid().flatten(1).topk(min(top, logits[0].numel()))
        labels, query = place % logits.shape[-1], place // logits.shape[-1]
    return scores, labels, corners(boxes.gather(1, query[..., None].expand(-1, -1, 4)))


def average_precision(
    scores: Tensor, labels: Tensor, boxes: Tensor, true_boxes: Tensor, true_labels: Tensor, classes: int
) -> np.ndarray:
    """COCO's average precision of each class at each of THRESHOLDS, [classes, 10], for boxes that are no crowds."""
    thresholds = torch.from_numpy(THRESHOLDS).to(boxes)[:, None]
    taken = torch.zeros(len(boxes), len(THRESHOLDS), true_labels.shape[1], dtype=torch.bool, device=boxes.device)
    hits = []
    for rank in range(scores.shape[1]):
        iou = overlaps(boxes[:, rank, None], true_boxes)[0] * (labels[:, rank, None] == true_labels)
        free = torch.where(taken | (iou[:, None] < thresholds), -1.0, iou[:, None])
        best = free.max(-1)
        hit = best.values > 0
        taken |= F.one_hot(best.indices, taken.shape[-1]).bool() & hit[..., None]
        hits.append(hit)
    hit = torch.stack(hits, 1).flatten(0, 1).cpu().numpy()
    score, label = scores.flatten().cpu().numpy(), labels.flatten().cpu().numpy()
    recalls = np.linspace(0, 1, 101)
    result = np.full((classes, len(THRESHOLDS)), np.nan)
    for c in range(classes):
        number = int((true_labels == c).sum())
        rows = np.flatnonzero(label == c)
        order = rows[np.argsort(-score[rows], kind="stable")]
        good = hit[order].cumsum(0)
        precision = good / np.arange(1, len(order) + 1)[:, None]
        precision = np.maximum.accumulate(precision[::-1], 0)[::-1]
        for t in range(len(THRESHOLDS) if number else 0):
            at = np.searchsorted(good[:, t] / number, recalls)
            result[c, t] = np.append(precision[:, t], 0.0)[np.minimum(at, len(order))].mean()
    return result
