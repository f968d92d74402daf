"""A model as a graph of quantization sites: capture, sites, blocks, serialization."""

from quantlens import _moved
from quantlens.graph.capture import capture, graph_of
from quantlens.graph.exporting import arguments_of, images_among
from quantlens.graph.graph import (
    VIEWS,
    EdgeHook,
    Graph,
    argument,
    coordinates,
    on_axes,
    op_name,
    origin,
    put_tensor,
    replace_argument,
    tensor_tree,
    walk,
)
from quantlens.graph.layout import axes_of_last, example_sizes, moved
from quantlens.graph.reuse import forget_if_changed
from quantlens.graph.sites import (
    ADDS,
    ROTATION,
    SCALINGS,
    Block,
    Edge,
    Site,
    SiteMap,
    choices,
    classifier_terms,
    dynamic_nodes,
)
from quantlens.graph.structure import parameters_of

__all__ = [
    "ADDS",
    "ROTATION",
    "SCALINGS",
    "VIEWS",
    "Block",
    "Edge",
    "EdgeHook",
    "Graph",
    "Site",
    "SiteMap",
    "argument",
    "arguments_of",
    "axes_of_last",
    "capture",
    "choices",
    "classifier_terms",
    "coordinates",
    "dynamic_nodes",
    "example_sizes",
    "forget_if_changed",
    "graph_of",
    "images_among",
    "moved",
    "on_axes",
    "op_name",
    "origin",
    "parameters_of",
    "put_tensor",
    "replace_argument",
    "tensor_tree",
    "walk",
]


__getattr__ = _moved.finder(__name__)
