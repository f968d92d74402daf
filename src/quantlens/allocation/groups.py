"""What shares a width: the attention and the MLP of every block, found from the graph; and what each width costs.

The paper gives all operations of an attention module one width, and all operations of an MLP module one (Liu et al.
2021, section 3.3). Here a block's *attention* is everything that its attention's output projection is made from
(LayerNorm, projections, products, softmax) and that projection; its *MLP* is the rest of the block, with the residual
sums. What lies outside the blocks (patch embedding, patch merging, classifier) is in no group.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile

import torch
from torch import Tensor, fx

from quantlens.errors import UnsupportedError
from quantlens.graph import Block, Graph, Site, walk
from quantlens.methods.base import SHARED_OPTIONS

ATTENTION, MLP = "attention", "MLP"

COMPUTES = ("linear", "conv", "scores", "context", "matmul")
"""Kinds of sites that multiply and add: those that weights and bit operations are counted of."""


@dataclass(frozen=True)
class Group:
    """Sites that share one width.

    name: a person's name for it (``blocks.3.attn``). kind: "attention" or "MLP". block: the block it lies in.
    sites: names of its sites, in execution order. modules: module or site names that cover exactly these sites, for
    :class:`~quantlens.qmodel.Bits`.
    """

    name: str
    kind: str
    block: str
    sites: tuple[str, ...]
    modules: tuple[str, ...]


def find_groups(graph: Graph) -> list[Group]:
    """The groups of a graph, in execution order. Raises UnsupportedError for a graph without transformer blocks."""
    found = [group for block in graph.sites.blocks for group in _groups_of(graph, block)]
    if not found:
        raise UnsupportedError(
            "mixed precision gives a width to the attention and the MLP of every block, and no transformer block was "
            "found in this model; give single modules their widths by a mapping instead"
        )
    return found


def _groups_of(graph: Graph, block: Block) -> list[Group]:
    inside = [site for site in graph.sites if site.block == block.name]
    kinds = {site.node: site.kind for site in inside}
    ends = [end for site in inside if site.kind == "context" for end in _output_projections(site.node, kinds)]
    nodes = set(block.nodes)
    above = set(walk(nodes.intersection(ends), lambda node: nodes.intersection(node.all_input_nodes)))
    parts = {
        ATTENTION: [site for site in inside if site.node in above],
        MLP: [site for site in inside if site.node not in above],
    }
    if not any(site.kind in COMPUTES for site in parts[MLP]):
        parts = {ATTENTION: inside}
    if not parts[ATTENTION]:
        parts = {MLP: inside}
    names = {kind: _common_module(sites) for kind, sites in parts.items()}
    groups = []
    for kind, sites in parts.items():
        name = names[kind]
        if len(name) <= len(block.name) or list(names.values()).count(name) > 1:
            name = f"{block.name}.{'attn' if kind == ATTENTION else 'mlp'}"
        members = tuple(site.name for site in sites)
        groups.append(Group(name, kind, block.name, members, cover(members, (s.name for s in graph.sites))))
    return groups


def _output_projections(context: fx.Node, kinds: dict[fx.Node, str]) -> list[fx.Node]:
    """The linear layers that read an attention's result before any residual sum does; without one, the product
    itself."""
    reached = walk(context.users, lambda node: () if kinds.get(node) in ("linear", "add") else node.users)
    return [node for node in reached if kinds.get(node) == "linear"] or [context]


def _common_module(sites: list[Site]) -> str:
    """The innermost module around all layers and products of a group."""
    paths = [site.name.split(".") for site in sites if site.kind in COMPUTES]
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return ".".join(parts[0] for parts in shared)


def cover(members: Iterable[str], everything: Iterable[str]) -> tuple[str, ...]:
    """The shortest module or site names under which lie all ``members`` and no other name of ``everything``.

    A member that is itself the module of others (a GELU that a block calls as a function is named like the block)
    stands under its own name; the others are given longer names by their own groups, and the longest name counts.
    """
    members = list(members)
    others = set(everything) - set(members)
    chosen: dict[str, None] = {}
    for member in members:
        prefixes = accumulate(member.split("."), "{}.{}".format)
        free = (p for p in prefixes if not any(f"{other}.".startswith(f"{p}.") for other in others))
        chosen[next(free, member)] = None
    return tuple(chosen)


# -- what a width costs --------------------------------------------------------------------------------------------
# What a width costs: bytes of the packed model, and bit operations of one image.
#
# Bytes: a weight of n numbers at b bits takes ⌈n·b/8⌉ bytes; everything else stays as it is (float32). Scales are left
# out: their number depends on the method, not on the widths. Bit operations (BOPs): multiply-accumulates × bits of the
# one operand × bits of the other; the attention's products multiply activations by activations.


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
