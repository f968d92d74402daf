"""A model as a graph of quantization sites: capture, sites, blocks, exact rewrites."""

from quantlens.graph.capture import capture, graph_of
from quantlens.graph.graph import Graph
from quantlens.graph.rewrites import (
    NormGroup,
    find_norm_groups,
    fold_layer_scale,
    fold_norm,
    hidden_source,
    permute_hidden,
    rescale_input,
    rescale_norm,
    split_linear,
)
from quantlens.graph.sites import Block, Edge, Site, SiteMap

__all__ = [
    "Block",
    "Edge",
    "Graph",
    "NormGroup",
    "Site",
    "SiteMap",
    "capture",
    "find_norm_groups",
    "fold_layer_scale",
    "fold_norm",
    "graph_of",
    "hidden_source",
    "permute_hidden",
    "rescale_input",
    "rescale_norm",
    "split_linear",
]
