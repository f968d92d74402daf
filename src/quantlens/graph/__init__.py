"""A model as a graph of quantization sites: capture, sites, blocks, serialization."""

from quantlens import _moved
from quantlens.graph.capture import capture, graph_of
from quantlens.graph.graph import Graph
from quantlens.graph.sites import Block, Edge, Site, SiteMap

__all__ = ["Block", "Edge", "Graph", "Site", "SiteMap", "capture", "graph_of"]


def __getattr__(name: str) -> object:
    """Names that have moved are found where they are now, with a warning."""
    return _moved.find(__name__, name)
