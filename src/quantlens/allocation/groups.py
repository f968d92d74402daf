"""What shares a width: the attention and the MLP of every block, found from the graph.

The paper gives all operations of an attention module one width, and all operations of an MLP module one (Liu et al.
2021, section 3.3). Here a block's *attention* is everything that its attention's output projection is made from
(LayerNorm, projections, products, softmax) and that projection; its *MLP* is the rest of the block, with the residual
sums. What lies outside the blocks (patch embedding, patch merging, classifier) is in no group.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, takewhile

from torch import fx

from quantlens.errors import UnsupportedError
from quantlens.graph import Graph
from quantlens.graph.graph import walk
from quantlens.graph.sites import Block, Site

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
