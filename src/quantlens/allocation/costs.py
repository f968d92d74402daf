"""What a width costs: bytes of the packed model, and bit operations of one image.

Bytes: a weight of n numbers at b bits takes ⌈n·b/8⌉ bytes; everything else stays as it is (float32). Scales are left
out: their number depends on the method, not on the widths. Bit operations (BOPs): multiply-accumulates × bits of the
one operand × bits of the other; the attention's products multiply activations by activations.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlens.allocation.groups import COMPUTES, Group
from quantlens.graph import Graph
from quantlens.methods.base import SHARED_OPTIONS

PATCH_BITS = int(SHARED_OPTIONS["patch_bits"].default)
"""Width of the pixels that the patch embedding reads, whatever the widths elsewhere (an option of every method)."""

SIZE, BOPS = "size", "bops"
COSTS = {SIZE: "bytes of the packed model", BOPS: "bit operations of one image"}


@dataclass(frozen=True)
class SiteWork:
    """A layer or product: numbers in its weight (0 for a product), multiply-accumulates for one image, and whether it
    reads the pixels."""

    weights: int
    macs: int
    reads_pixels: bool


def site_work(graph: Graph) -> dict[str, SiteWork]:
    """The work of every layer and product by site name, counted on a forward of one image."""
    shapes: dict[str, torch.Size] = {}

    def note(key: str, value: Tensor) -> Tensor:
        shapes[key] = value.shape
        return value

    size = graph.input.meta["shape"][1:]
    calls = [node for node in graph.fx.nodes if node.op == "call_function"]
    with torch.no_grad():
        graph.run(calls, {graph.input: torch.zeros(1, *size, device=graph.device)}, hook=note)
    work = {}
    for site in graph.sites:
        if site.kind not in COMPUTES:
            continue
        weight = None if site.weight is None else graph.tensor(site.weight)
        left = next(edge for edge in site.edges.values() if edge.position == 0)
        inner = shapes[left.key][-1] if weight is None else weight[0].numel()
        made = shapes[site.edges["output"].key].numel()
        work[site.name] = SiteWork(0 if weight is None else weight.numel(), made * inner, graph.is_image(left.value))
    return work


@dataclass(frozen=True)
class CostTable:
    """Costs of a model whose groups may have any of some widths.

    fixed: cost of what lies outside the groups, by kind of cost ("size" in bytes, "bops"). groups: cost of each group
    by width, [kind][group][width].
    """

    fixed: dict[str, int]
    groups: dict[str, list[dict[int, int]]]

    def total(self, kind: str, bits: Sequence[int]) -> int:
        """Cost of the whole model; bits: each group's width."""
        return self.fixed[kind] + sum(row[b] for row, b in zip(self.groups[kind], bits, strict=True))


def cost_table(graph: Graph, groups: Sequence[Group], widths: Iterable[int], default: int) -> CostTable:
    """Costs of ``groups`` at ``widths``; ``default`` is the width of all other layers."""
    work, widths = site_work(graph), list(widths)
    grouped = {name for group in groups for name in group.sites}
    total = sum(t.numel() * t.element_size() for t in graph.tensors().values())
    floats = sum(graph.tensor(s.weight).numel() * 4 for s in graph.sites if s.weight is not None and s.name in work)
    others = [one for name, one in work.items() if name not in grouped]
    inside = [[work[name] for name in group.sites if name in work] for group in groups]
    fixed = {
        SIZE: total - floats + sum(packed(one.weights, default) for one in others),
        BOPS: sum(one.macs * default * (PATCH_BITS if one.reads_pixels else default) for one in others),
    }
    rows = {
        SIZE: [{b: sum(packed(one.weights, b) for one in part) for b in widths} for part in inside],
        BOPS: [{b: sum(one.macs for one in part) * b * b for b in widths} for part in inside],
    }
    return CostTable(fixed, rows)


def packed(count: int, bits: int) -> int:
    """Bytes of ``count`` codes of ``bits`` bits."""
    return -(-count * bits // 8)
