"""What a quantized model still computes in float, in words: for a person who ships it."""

from collections import Counter
from typing import Any

from quantlens.graph import VIEWS, Site, op_name, walk
from quantlens.qmodel.model import QuantizedModel

LAYERS = {"linear": "linear layers", "conv": "convolutions"}

WORDS = {
    **LAYERS,
    "scores": "products of attention",
    "context": "products of attention",
    "matmul": "matrix products",
    "probs": "softmax",
    "softmax": "softmax",
    "layer_norm": "LayerNorm",
    "gelu": "GELU",
    "silu": "SiLU",
    "sigmoid": "sigmoid",
    "log": "inverse sigmoid",
    "grid_sampler": "grid sampling",
    "topk": "choice of queries (top-k)",
    **dict.fromkeys(("add", "sub", "rsub", "mul", "div"), "sums and products by element"),
}
"""Kinds of sites and operations of ATen -> words. What only moves or compares values (ReLU, pooling) is in none."""


def in_float(qmodel: QuantizedModel) -> dict[str, int]:
    """How many operations of each kind, on the way from the images to what is measured, are computed in float. Linear
    and convolution layers whose input or weight is float are called by their names, too."""
    graph, plan, found = qmodel.graph, qmodel.plan, Counter[str]()
    measured = [graph.output] if graph.boxes is None else [graph.output, graph.boxes]
    needed = set(walk(measured, lambda node: node.all_input_nodes))
    for node in walk(graph.inputs, lambda node: [user for user in node.users if "sym_size" not in op_name(user)]):
        site = graph.sites.by_node.get(node)
        kind = site.kind if site is not None else "".join(op_name(node).split(".")[1:2])
        if node not in needed or kind not in WORDS:
            continue
        quantized = [] if site is None else [name for name, edge in site.edges.items() if edge.key in plan.quantizers]
        if site is not None and kind in LAYERS:
            if "weight" not in quantized or not ("input" in quantized or _made_quantized(qmodel, site)):
                found[f"{LAYERS[kind]} ({site.name})"] += 1
        elif not quantized and (site is None or site.name not in plan.operators):
            found[WORDS[kind]] += 1
    return dict(found)


def _made_quantized(qmodel: QuantizedModel, layer: Site) -> bool:
    """Whether what a layer reads is quantized where a site makes it."""
    value: Any = layer.edges["input"].value
    while op_name(value) in VIEWS:
        value = value.args[0]
    site = qmodel.graph.sites.by_node.get(value)
    return site is not None and site.edges["output"].key in qmodel.plan.quantizers


def said_in_float(qmodel: QuantizedModel) -> str:
    """One sentence of the same."""
    found = in_float(qmodel)
    layers = [name for name in found if name.endswith(")") and name.startswith(tuple(LAYERS.values()))]
    words = [f"{count} {word}" for word, count in found.items() if word not in layers]
    named = [name.partition("(")[2][:-1] for name in layers]
    if named:
        words.append(f"{len(named)} layers ({', '.join(named[:4])}{' …' if len(named) > 4 else ''})")
    return f"in float: {', '.join(words) or 'nothing'}"
