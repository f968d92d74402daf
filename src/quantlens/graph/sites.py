"""Sites: the places of a graph that quantizers can sit at, named as a person would name them; and blocks.

An edge's key is ``<site>.<edge>``. An edge with a position is the value as that one operation reads it; ``output`` is
the value as everybody reads it. A product with a constant called ``…_rotation`` is no site: it stays in float
(:func:`quantlens.transforms.rotation.rotate_input`).
"""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from quantlens.graph.graph import VIEWS, Graph, argument, op_name, walk

CONVS = {"aten.conv2d.default", "aten.conv2d.padding", "aten.convolution.default"}
ADDS = {"aten.add.Tensor", "aten.add_.Tensor"}
ROTATION = "_rotation"
"""How the names of constants end that values are rotated by."""

CLAMPS = {"aten.clamp.default", "aten.clamp_.default", "aten.hardtanh.default"}
SCALINGS = {"aten.mul.Tensor", "aten.div.Tensor", "aten.mul.Scalar", "aten.div.Scalar"}


@dataclass(frozen=True)
class Edge:
    """Where a quantizer can sit: ``key`` = site name + edge name; ``position`` = argument index, ``None`` for the
    output, ``node`` being the site's (of a clipped softmax the clipping)."""

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
    """A part of the graph that runs alone: one tensor in (a layer of a detector's decoder: several, as it reads the
    encoder's result too), one tensor out (``result``)."""

    name: str
    sources: tuple[fx.Node, ...]
    result: fx.Node
    nodes: tuple[fx.Node, ...] = field(repr=False)

    @property
    def source(self) -> fx.Node:
        """The first of what it reads; for most blocks the only one."""
        return self.sources[0]


class SiteMap:
    """All sites of a graph, in execution order; indexable by name."""

    def __init__(self, sites: list[Site], blocks: list[Block], head: Collection[fx.Node], former: dict[str, str]):
        self._sites = {s.name: s for s in sites}
        self.by_node = {s.node: s for s in sites}
        self.blocks = blocks
        self.head = [site for node, site in self.by_node.items() if node in head]
        """The linear sites whose (weighted) sum is the model's output; of a detector those of its class and box heads,
        of every layer that boxes are refined by."""
        self.former = {old: new for old, new in former.items() if old != new}
        """Names that sites have in checkpoints of version 3 and earlier, where they differ -> their names."""
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


def dynamic_nodes(graph: Graph) -> set[fx.Node]:
    """Nodes whose values depend on the pixels (sizes do not count)."""
    found = {graph.input}
    for node in graph.fx.nodes:
        size = node.meta.get("symbolic") or op_name(node).startswith("aten.sym_size")
        if node.op == "call_function" and not size and not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


CHOOSE = {f"aten.{name}" for name in ("argmax", "argmin", "argsort")}
CHOOSE_BESIDE_VALUES = {f"aten.{name}" for name in ("topk", "sort", "max", "min", "kthvalue")}
"""Operations that give places, of the largest values or in their order: alone, or second to the values there."""


def choices(graph: Graph) -> list[fx.Node]:
    """Nodes whose values are places that the pixels choose, as a detector's queries (top-k): a little noise changes all
    that is read there. Two networks are compared value by value at the places that the float one chooses."""
    dynamic = dynamic_nodes(graph)

    def chooses(node: fx.Node) -> bool:
        second = op_name(node) == "<built-in function getitem>" and node.args[1] == 1
        operation = op_name(node.args[0] if second else node).rpartition(".")[0]  # type: ignore[arg-type]
        return operation in (CHOOSE_BESIDE_VALUES if second else CHOOSE)

    return [node for node in graph.fx.nodes if node in dynamic and chooses(node)]


def find_sites(graph: Graph) -> SiteMap:
    """Read the sites and blocks off a graph. Cheap; called through :attr:`Graph.sites`."""
    dynamic = dynamic_nodes(graph)
    attentions, clipped = _find_attentions(graph, dynamic)
    described = {node: _describe(graph, node, dynamic, attentions) for node in graph.fx.nodes if node in dynamic}
    found = [(node, *kind_and_name) for node, kind_and_name in described.items() if kind_and_name is not None]
    blocks = _find_blocks(graph, dynamic, attentions)
    owner = {n: b.name for b in blocks for n in b.nodes}
    sites = []
    rows = [row[1:] for row in found]
    names = _numbered(rows)
    for name, (node, kind, _) in zip(names, found, strict=True):
        positions = {**{edge: position for position, edge in enumerate(EDGES[kind])}, "output": None}
        edges = {edge: Edge(f"{name}.{edge}", name, edge, node, position) for edge, position in positions.items()}
        if node in clipped:
            edges["output"] = replace(edges["output"], node=clipped[node])
        sites.append(Site(name, kind, node, owner.get(node), edges))
    former = dict(zip(_numbered(rows, former=True), names, strict=True))
    return SiteMap(sites, blocks, _head(graph, dynamic), former)


def _find_attentions(
    graph: Graph, dynamic: set[fx.Node]
) -> tuple[dict[fx.Node, tuple[str, fx.Node]], dict[fx.Node, fx.Node]]:
    """What the operations of attentions are, with the node whose module names them: q·kᵀ "scores", the softmax over
    these "probs", its product with v "context". And of softmaxes that are stretched and clipped what comes of that,
    which is then the output of "probs"."""
    found: dict[fx.Node, tuple[str, fx.Node]] = {}
    clipped: dict[fx.Node, fx.Node] = {}
    for softmax in graph.fx.nodes:
        scores = _scores_of(softmax) if softmax in dynamic and op_name(softmax) == "aten.softmax.int" else None
        if scores is None:
            continue
        found |= {scores: ("scores", scores), softmax: ("probs", scores)}
        end = _clipped(softmax)
        if end is not softmax:
            clipped[softmax] = end
        context = _first_product(end.users, lambda n: n.users if op_name(n) in VIEWS else ())
        if context is not None:
            found[context] = ("context", context)
    return found, clipped


def _clipped(softmax: fx.Node) -> fx.Node:
    """What a softmax's rows are after numbers are multiplied, added and cut off (a clipped softmax); itself where none
    are cut off."""
    node, end = softmax, softmax
    while len(node.users) == 1:
        (node,) = node.users
        if op_name(node) not in SCALINGS | ADDS | CLAMPS | {"aten.sub.Tensor"} or len(node.all_input_nodes) > 1:
            break
        end = node if op_name(node) in CLAMPS else end
    return end


def _numbered(found: list[tuple[str, str]], *, former: bool = False) -> list[str]:
    """Names of sites (kind, name) that no two share: sums are numbered, and layers that are called more than once
    (``layers.0.call2``; ``former``: ``layers.02``)."""
    counts = Counter(name for _, name in found)
    taken = {name for kind, name in found if kind != "add" and counts[name] == 1}
    names = []
    for kind, name in found:
        if kind == "add" or counts[name] > 1:
            stem = f"{name}.call" if kind in ("linear", "conv") and not former else name
            name = next(f"{stem}{n}" for n in itertools.count(1) if f"{stem}{n}" not in taken)
            taken.add(name)
        names.append(name)
    return names


EDGES = {
    "linear": ("input", "weight"),
    "conv": ("input", "weight"),
    "scores": ("q", "k"),
    "probs": ("input",),
    "context": ("probs", "v"),
    "layer_norm": ("input",),
    "gelu": ("input",),
    "add": ("lhs", "rhs"),
    "matmul": ("lhs", "rhs"),
}
"""Kinds of sites: the edges of their operands, in the order of the arguments; each has an ``output`` too."""


# kind       operation                     name
# linear     ``aten.linear``               the module (``blocks.3.attn.qkv``)
# conv       ``aten.conv2d`` …             the module (``patch_embed.proj``)
# scores     q·kᵀ                          ``blocks.3.attn.scores``
# probs      softmax over the scores       ``blocks.3.attn.probs``
# context    probs·v                       ``blocks.3.attn.context``
# layer_norm ``aten.layer_norm``           the module (``blocks.3.norm1``)
# gelu       ``aten.gelu``                 the module (``blocks.3.mlp.act``)
# add        sum of two activations        ``blocks.3.add1``
# matmul     any other product             ``<module>.matmul``
def _describe(
    graph: Graph, node: fx.Node, dynamic: set[fx.Node], attentions: dict[fx.Node, tuple[str, fx.Node]]
) -> tuple[str, str] | None:
    """kind and name of a node that depends on the pixels, ``None`` if it is no site."""
    op, module = op_name(node), node.meta.get("module", "")
    if op == "aten.linear.default" and _is_layer(graph, node):
        return "linear", _by_weight(node.args[1], module)
    if op in CONVS and graph.constant(node.args[1]) is not None and not argument(node, "transposed", False):
        return "conv", _by_weight(node.args[1], module)
    if node in attentions:
        kind, named_by = attentions[node]
        return kind, _join(named_by.meta.get("module", ""), kind)
    if op == "aten.matmul.default":
        rotation = graph.constant(node.args[1]) is not None and str(node.args[1].target).endswith(ROTATION)  # type: ignore[union-attr]
        return None if rotation else ("matmul", _join(module, "matmul"))
    if op == "aten.layer_norm.default":
        return "layer_norm", _by_weight(argument(node, "weight"), module)
    if op == "aten.gelu.default":
        return "gelu", module or "gelu"
    if _is_sum(node, dynamic) and not _is_logit_sum(node):
        return "add", _join(module, "add")
    return None


def _is_layer(graph: Graph, node: fx.Node) -> bool:
    """Whether a linear operation is one of a matrix of weights (of a vector it is a weighted mean, as in D-FINE's box
    distributions)."""
    weight = graph.constant(node.args[1])
    return weight is not None and weight.dim() == 2


def _is_sum(node: fx.Node, dynamic: set[fx.Node]) -> bool:
    return op_name(node) in ADDS and all(isinstance(a, fx.Node) and a in dynamic for a in node.args[:2])


def _is_logit_sum(node: fx.Node) -> bool:
    """The sum of a distilled model's two heads is no residual add."""
    return all(isinstance(a, fx.Node) and op_name(a) == "aten.linear.default" for a in node.args[:2]) and all(
        op_name(u) in SCALINGS or u.op == "output" for u in node.users
    )


def _join(module: str, leaf: str) -> str:
    return f"{module}.{leaf}" if module else leaf


def _by_weight(weight: Any, module: str) -> str:
    """A layer is named by its weight's qualified name, less ``.weight`` (or ``_weight``, as in MultiheadAttention) and
    what the norms of weights put after it."""
    if isinstance(weight, fx.Node):
        stem = re.sub(r"(_folded\d*|_t)$", "", str(weight.target))
        return re.sub(r"(\.parametrizations)?[._]weight(\.original\d*|_orig|_[gv])?$", "", stem)
    return module or "layer"


def _scores_of(softmax: fx.Node) -> fx.Node | None:
    """Walk up from a softmax to the matmul that made its logits, through scaling, bias, mask and views."""
    passing = VIEWS | ADDS | SCALINGS | {"aten.masked_fill.Scalar", "aten.where.self", "aten._safe_softmax.default"}
    return _first_product(softmax.all_input_nodes, lambda n: n.all_input_nodes if op_name(n) in passing else ())


def _first_product(start: Iterable[fx.Node], onward: Callable[[fx.Node], Iterable[fx.Node]]) -> fx.Node | None:
    return next((n for n in walk(start, onward) if op_name(n) == "aten.matmul.default"), None)


# -- blocks -------------------------------------------------------------------------------------------------------
def _find_blocks(graph: Graph, dynamic: set[fx.Node], attentions: dict[fx.Node, tuple[str, fx.Node]]) -> list[Block]:
    """Transformer blocks: the smallest module around an attention that does its residual addition itself.

    A module whose nodes do not have exactly one activation in (a detector's: at least one) and one out is no block (its
    parent is tried).
    """
    summing = {n.meta.get("module", "") for n in graph.fx.nodes if _is_sum(n, dynamic)}
    blocks: dict[str, Block] = {}
    for node in graph.fx.nodes:
        path = node.meta.get("module", "") if attentions.get(node, ("",))[0] == "scores" else ""
        while path and path not in blocks:
            block = _as_block(graph, path, dynamic) if path in summing else None
            if block is None:
                path = path.rpartition(".")[0]
            else:
                blocks[path] = block
    return list(blocks.values())


def _as_block(graph: Graph, path: str, dynamic: set[fx.Node]) -> Block | None:
    calls = (n for n in graph.fx.nodes if n.op == "call_function")
    inside = dict.fromkeys(n for n in calls if f"{n.meta.get('module', '')}.".startswith(f"{path}."))
    tensors = [n for n in inside if n in dynamic]
    sources = tuple(dict.fromkeys(s for n in tensors for s in n.all_input_nodes if s in dynamic and s not in inside))
    results = [n for n in tensors if any(u not in inside for u in n.users)]
    alone = len(results) == 1 and (len(sources) == 1 or (len(sources) > 1 and graph.boxes is not None))
    return Block(path, sources, results[0], tuple(inside)) if alone else None


# -- head ---------------------------------------------------------------------------------------------------
def _head(graph: Graph, dynamic: set[fx.Node]) -> set[fx.Node]:
    """The linear layers of the head. A detector's are those that scores and boxes are made by after the last norm,
    product or convolution."""
    if graph.boxes is None:
        return {node for node, _ in classifier_terms(graph) or []}
    ends = {"aten.layer_norm.default", "aten.matmul.default", "aten.native_layer_norm.default", *CONVS}

    def onward(node: fx.Node) -> list[fx.Node]:
        return [n for n in node.all_input_nodes if n in dynamic and op_name(n) not in ends]

    return {node for node in walk([graph.output, graph.boxes], onward) if op_name(node) == "aten.linear.default"}


def classifier_terms(graph: Graph) -> list[tuple[fx.Node, float]] | None:
    """The output as Σ cᵢ·linearᵢ: [(linear node, cᵢ)]; ``None`` if the output is no weighted sum of linear layers.

    One term for most models, two of weight ½ for a distilled DeiT.
    """

    def terms(node: Any, factor: float) -> list[tuple[fx.Node, float]] | None:
        if not isinstance(node, fx.Node):
            return None
        op = op_name(node)
        if op == "aten.linear.default":
            return [(node, factor)] if _is_layer(graph, node) else None
        if op in SCALINGS and isinstance(node.args[1], int | float):
            number = float(node.args[1])
            return terms(node.args[0], factor / number if "div" in op else factor * number)
        if op in ADDS and not node.kwargs:
            left, right = terms(node.args[0], factor), terms(node.args[1], factor)
            return left + right if left and right else None
        return None

    return terms(graph.output, 1.0)
