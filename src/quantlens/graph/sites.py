"""Sites: the places of a graph that quantizers can sit at, named as a person would name them; and blocks.

An edge's key is ``<site>.<edge>``. An edge with a position is the value as that one operation reads it; ``output`` is
the value as everybody reads it. A product with a constant called ``…_rotation`` is no site: it stays in float
(:func:`quantlens.transforms.rotation.rotate_input`).
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from quantlens.graph.graph import VIEWS, Graph, argument, op_name

aten = torch.ops.aten

CONVS = {"aten.conv2d.default", "aten.conv2d.padding", "aten.convolution.default"}
ADDS = {"aten.add.Tensor", "aten.add_.Tensor"}
ROTATION = "_rotation"
"""How the names of constants end that values are rotated by."""

SCALINGS = {"aten.mul.Tensor", "aten.div.Tensor", "aten.mul.Scalar", "aten.div.Scalar"}


@dataclass(frozen=True)
class Edge:
    """Where a quantizer can sit: ``key`` = site name + edge name; ``position`` = argument index, ``None`` for the
    output."""

    key: str
    site: str
    name: str
    node: fx.Node
    position: int | None

    @property
    def is_weight(self) -> bool:
        return self.name == "weight"

    @property
    def value(self) -> fx.Node:
        """The node whose value crosses the edge."""
        return self.node if self.position is None else self.node.args[self.position]  # type: ignore[return-value]


@dataclass(frozen=True)
class Site:
    """A quantization site: a node of the graph under a name a person knows."""

    name: str
    kind: str
    node: fx.Node
    block: str | None
    edges: dict[str, Edge] = field(hash=False)

    @property
    def weight(self) -> str | None:
        """Qualified name of the weight tensor of a linear or conv site."""
        return str(self.edges["weight"].value.target) if "weight" in self.edges else None

    @property
    def bias(self) -> str | None:
        found = argument(self.node, "bias") if self.kind in ("linear", "conv") else None
        return str(found.target) if isinstance(found, fx.Node) else None


@dataclass(frozen=True)
class Block:
    """A part of the graph that runs alone: one tensor in (``source``), one tensor out (``result``)."""

    name: str
    source: fx.Node
    result: fx.Node
    nodes: tuple[fx.Node, ...] = field(repr=False)


class SiteMap:
    """All sites of a graph, in execution order; indexable by name."""

    def __init__(self, sites: list[Site], blocks: list[Block], head: list[Site]):
        self._sites = {s.name: s for s in sites}
        self.blocks = blocks
        self.head = head
        """The linear sites whose (weighted) sum is the model's output."""
        self.edges: dict[str, Edge] = {e.key: e for s in sites for e in s.edges.values()}
        self.edges_by_node: dict[fx.Node, list[Edge]] = {}
        for edge in self.edges.values():
            self.edges_by_node.setdefault(edge.node, []).append(edge)

    def __iter__(self) -> Iterator[Site]:
        return iter(self._sites.values())

    def __len__(self) -> int:
        return len(self._sites)

    def __getitem__(self, name: str) -> Site:
        return self._sites[name]

    def __contains__(self, name: str) -> bool:
        return name in self._sites

    def of_kind(self, *kinds: str) -> list[Site]:
        return [s for s in self if s.kind in kinds]

    def block(self, name: str) -> Block:
        return next(b for b in self.blocks if b.name == name)


def dynamic_nodes(graph: Graph) -> set[fx.Node]:
    """Nodes whose values depend on the pixels (sizes do not count)."""
    found = {graph.input}
    for node in graph.fx.nodes:
        if node.op == "call_function" and not node.meta.get("symbolic"):
            if op_name(node).startswith("aten.sym_size"):
                continue
            if any(s in found for s in node.all_input_nodes):
                found.add(node)
    return found


def find_sites(graph: Graph) -> SiteMap:
    """Read the sites and blocks off a graph. Cheap; called through :attr:`Graph.sites`."""
    dynamic = dynamic_nodes(graph)
    softmaxes = {n for n in graph.fx.nodes if op_name(n) == "aten.softmax.int" and n in dynamic}
    score_nodes = {m: s for s in softmaxes if (m := _scores_of(s)) is not None}
    probs = set(score_nodes.values())
    context_nodes = {c: s for s in probs if (c := _context_of(s)) is not None}
    found = []
    for node in graph.fx.nodes:
        described = _describe(graph, node, dynamic, score_nodes, probs, context_nodes)
        if described is not None:
            found.append((*described, node))
    names = _numbered([(kind, name) for kind, name, _, _ in found])
    blocks = _find_blocks(graph, dynamic, score_nodes)
    owner = {n: b.name for b in blocks for n in b.nodes}
    sites = []
    for name, (kind, _, positions, node) in zip(names, found, strict=True):
        edges = {e: Edge(f"{name}.{e}", name, e, node, p) for e, p in positions.items()}
        sites.append(Site(name, kind, node, owner.get(node), edges))
    by_node = {s.node: s for s in sites}
    head = [by_node[n] for n, _ in classifier_terms(graph) or [] if n in by_node]
    return SiteMap(sites, blocks, head)


def _numbered(found: list[tuple[str, str]]) -> list[str]:
    """Names of sites (kind, name) that no two share: sums are numbered, and layers that are called more than once."""
    counts = Counter(name for _, name in found)
    taken = {name for kind, name in found if kind != "add" and counts[name] == 1}
    names = []
    for kind, name in found:
        if kind == "add" or counts[name] > 1:
            name = next(f"{name}{n}" for n in itertools.count(1) if f"{name}{n}" not in taken)
            taken.add(name)
        names.append(name)
    return names


# kind       operation                     edges                    name
# linear     ``aten.linear``               input, weight, output    the module (``blocks.3.attn.qkv``)
# conv       ``aten.conv2d`` …             input, weight, output    the module (``patch_embed.proj``)
# scores     q·kᵀ                          q, k, output             ``blocks.3.attn.scores``
# probs      softmax over the scores       input, output            ``blocks.3.attn.probs``
# context    probs·v                       probs, v, output         ``blocks.3.attn.context``
# layer_norm ``aten.layer_norm``           input, output            the module (``blocks.3.norm1``)
# gelu       ``aten.gelu``                 input, output            the module (``blocks.3.mlp.act``)
# add        sum of two activations        lhs, rhs, output         ``blocks.3.add1``
# matmul     any other product             lhs, rhs, output         ``<module>.matmul``
def _describe(
    graph: Graph,
    node: fx.Node,
    dynamic: set[fx.Node],
    score_nodes: dict[fx.Node, fx.Node],
    probs: set[fx.Node],
    context_nodes: dict[fx.Node, fx.Node],
) -> tuple[str, str, dict[str, int | None]] | None:
    """kind, name and edge positions of a node, ``None`` if it is no site."""
    if node not in dynamic or node.op != "call_function":
        return None
    op, module = op_name(node), node.meta.get("module", "")
    if op == "aten.linear.default" and graph.constant(node.args[1]) is not None:
        return "linear", _by_weight(node.args[1], module), {"input": 0, "weight": 1, "output": None}
    if op in CONVS and graph.constant(node.args[1]) is not None and not argument(node, "transposed", False):
        return "conv", _by_weight(node.args[1], module), {"input": 0, "weight": 1, "output": None}
    if node in score_nodes:
        return "scores", _join(module, "scores"), {"q": 0, "k": 1, "output": None}
    if node in probs:
        home = next(m for m, s in score_nodes.items() if s is node).meta.get("module", "")
        return "probs", _join(home, "probs"), {"input": 0, "output": None}
    if node in context_nodes:
        return "context", _join(module, "context"), {"probs": 0, "v": 1, "output": None}
    if op == "aten.matmul.default":
        if graph.constant(node.args[1]) is not None and str(node.args[1].target).endswith(ROTATION):  # type: ignore[union-attr]
            return None
        return "matmul", _join(module, "matmul"), {"lhs": 0, "rhs": 1, "output": None}
    if op == "aten.layer_norm.default":
        weight = node.args[2] if len(node.args) > 2 else None
        return "layer_norm", _by_weight(weight, module), {"input": 0, "output": None}
    if op == "aten.gelu.default":
        return "gelu", module or "gelu", {"input": 0, "output": None}
    if op in ADDS and all(isinstance(a, fx.Node) and a in dynamic for a in node.args[:2]):
        if _is_logit_sum(node):
            return None
        return "add", _join(module, "add"), {"lhs": 0, "rhs": 1, "output": None}
    return None


def _is_logit_sum(node: fx.Node) -> bool:
    """The sum of a distilled model's two heads is no residual add."""
    return all(isinstance(a, fx.Node) and op_name(a) == "aten.linear.default" for a in node.args[:2]) and all(
        op_name(u) in SCALINGS or u.op == "output" for u in node.users
    )


def _join(module: str, leaf: str) -> str:
    return f"{module}.{leaf}" if module else leaf


def _by_weight(weight: Any, module: str) -> str:
    """A layer is named by its weight's qualified name, less ``.weight`` (or ``_weight``, as in MultiheadAttention)."""
    if isinstance(weight, fx.Node):
        stem = re.sub(r"(_folded\d*|_t)$", "", str(weight.target))
        return re.sub(r"[._]weight$", "", stem)
    return module or "layer"


def _scores_of(softmax: fx.Node) -> fx.Node | None:
    """Walk up from a softmax to the matmul that made its logits, through scaling, bias, mask and views."""
    passing = VIEWS | ADDS | SCALINGS | {"aten.masked_fill.Scalar", "aten.where.self", "aten._safe_softmax.default"}
    queue, seen = [softmax.args[0]], set()
    while queue:
        node = queue.pop()
        if not isinstance(node, fx.Node) or node in seen:
            continue
        seen.add(node)
        if op_name(node) == "aten.matmul.default":
            return node
        if op_name(node) in passing:
            queue.extend(a for a in node.args if isinstance(a, fx.Node))
    return None


def _context_of(softmax: fx.Node) -> fx.Node | None:
    """Walk down from a softmax to the matmul that uses it as left operand."""
    queue, seen = list(softmax.users), set()
    while queue:
        node = queue.pop(0)
        if node in seen:
            continue
        seen.add(node)
        if op_name(node) == "aten.matmul.default":
            return node
        if op_name(node) in VIEWS:
            queue.extend(node.users)
    return None


# -- blocks -------------------------------------------------------------------------------------------------------
def _find_blocks(graph: Graph, dynamic: set[fx.Node], score_nodes: dict[fx.Node, fx.Node]) -> list[Block]:
    """Transformer blocks: the smallest module around an attention that does its residual addition itself.

    A module whose nodes do not have exactly one activation in and one out is no block (its parent is tried).
    """
    order = {n: i for i, n in enumerate(graph.fx.nodes)}
    modules_with_add = {
        n.meta.get("module", "")
        for n in graph.fx.nodes
        if op_name(n) in ADDS and all(isinstance(a, fx.Node) and a in dynamic for a in n.args[:2])
    }
    names: dict[str, None] = {}
    blocks = []
    for node in sorted(score_nodes, key=order.__getitem__):
        path = node.meta.get("module", "")
        while path:
            if path in modules_with_add and path not in names:
                block = _as_block(graph, path, order, dynamic)
                if block is not None:
                    names[path] = None
                    blocks.append(block)
                    break
            if path in names:
                break
            path = path.rpartition(".")[0]
    return blocks


def _as_block(graph: Graph, path: str, order: dict[fx.Node, int], dynamic: set[fx.Node]) -> Block | None:
    inside = [n for n in graph.fx.nodes if _is_within(n.meta.get("module", ""), path) and n.op == "call_function"]
    members = set(inside)
    tensors = [n for n in inside if n in dynamic]
    sources = {s for n in tensors for s in n.all_input_nodes if s in dynamic and s not in members}
    results = [n for n in tensors if any(u not in members for u in n.users)]
    if len(sources) != 1 or len(results) != 1:
        return None
    return Block(path, sources.pop(), results[0], tuple(sorted(inside, key=order.__getitem__)))


def _is_within(module: str, path: str) -> bool:
    return module == path or module.startswith(f"{path}.")


# -- classifier ---------------------------------------------------------------------------------------------------
def classifier_terms(graph: Graph) -> list[tuple[fx.Node, float]] | None:
    """The output as Σ cᵢ·linearᵢ: [(linear node, cᵢ)]; ``None`` if the output is no weighted sum of linear layers.

    One term for most models, two of weight ½ for a distilled DeiT.
    """

    def walk(node: Any, factor: float) -> list[tuple[fx.Node, float]] | None:
        if not isinstance(node, fx.Node):
            return None
        op = op_name(node)
        if op == "aten.linear.default":
            return [(node, factor)] if graph.constant(node.args[1]) is not None else None
        if op in ("aten.div.Tensor", "aten.div.Scalar") and isinstance(node.args[1], int | float):
            return walk(node.args[0], factor / float(node.args[1]))
        if op in ("aten.mul.Tensor", "aten.mul.Scalar") and isinstance(node.args[1], int | float):
            return walk(node.args[0], factor * float(node.args[1]))
        if op in ADDS and not node.kwargs:
            left, right = walk(node.args[0], factor), walk(node.args[1], factor)
            return left + right if left and right else None
        return None

    return walk(graph.output, 1.0)
