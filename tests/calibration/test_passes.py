"""The pass shows every edge what it should see, runs no more than it must, and gives the same from files."""

from __future__ import annotations

import pytest
import torch

from quantlens.calibration import Calibration, CalibrationPass, cache, images as chunks
from quantlens.errors import QuantlensError
from quantlens.graph import Graph
from quantlens.qmodel import float_model


@pytest.fixture
def model(loaded):
    return loaded["vit"]


@pytest.fixture
def graph(model):
    return float_model(model).graph.clone()


def _pass(model, graph, pictures, *, sequential=False, **settings):
    return CalibrationPass(graph, Calibration.of(pictures, model.preprocess), sequential=sequential, **settings)


def _values(graph, pictures, wanted):
    """What the graph computes at ``wanted`` edges when it runs from end to end."""
    found = {}

    def hook(key, value):
        if key in wanted:
            found[key] = value
        return value

    nodes = [node for node in graph.fx.nodes if node.op == "call_function"]
    graph.run(nodes, {graph.input: pictures}, hook=hook, keep=[graph.output])
    return found


@pytest.mark.parametrize("memory", [1 << 30, 0])
@pytest.mark.parametrize("chunk", [32, 3])
def test_every_edge_shows_what_the_graph_computes(memory, chunk, model, graph, pictures, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", chunk)
    edges = [e for e in graph.sites.edges.values() if not e.is_weight]
    expected = _values(graph, pictures, {e.key for e in edges})
    shown = []

    def on_edge(edge, view):
        pieces = view.tensors()
        assert len(pieces) == -(-len(pictures) // chunk)
        assert len(pieces[1:]) == len(pieces) - 1
        torch.testing.assert_close(torch.cat(list(pieces)), expected[edge.key], rtol=1e-4, atol=1e-5)
        assert float(view().high) == pytest.approx(float(expected[edge.key].max()), rel=1e-4)
        shown.append(edge.key)

    steps = []
    _pass(model, graph, pictures, memory=memory).run(edges, on_edge, lambda *step: steps.append(step))
    assert sorted(shown) == sorted(expected)
    order = {node: i for i, node in enumerate(graph.fx.nodes)}
    places = [order[graph.sites.edges[key].node] for key in shown]
    assert places == sorted(places)
    assert steps == [(i, len(edges)) for i in range(1, len(edges) + 1)]


def test_files_give_what_memory_gives(model, graph, pictures, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", 3)
    found = {}
    for memory in (1 << 30, 0):
        monkeypatch.setattr(cache, "MEMORY", memory)
        seen = found[memory] = []
        edges = [s.edges["input"] for s in graph.sites.of_kind("linear")]

        def on_edge(edge, view, seen=seen):
            seen.extend(view.tensors())
            return lambda value: value.round(decimals=1)

        _pass(model, graph, pictures, sequential=True).run(edges, on_edge)
    assert all(torch.equal(a, b) for a, b in zip(*found.values(), strict=True))


def test_what_is_not_looked_at_does_not_run(model, graph, pictures, monkeypatch):
    ran = []
    run = Graph.run
    monkeypatch.setattr(Graph, "run", lambda self, nodes, *a, **k: (ran.extend(nodes), run(self, nodes, *a, **k))[1])
    sites = graph.sites.of_kind("linear")
    edges = [site.edges[name] for site in sites for name in ("input", "weight")]

    def on_edge(edge, view):
        if edge.is_weight or edge.site == sites[1].name:
            view()

    _pass(model, graph, pictures).run(edges, on_edge)
    assert len(ran) == len(set(ran))
    assert sites[0].node in ran
    assert sites[1].node not in ran, "its input was looked at, and nothing after it"


@pytest.mark.parametrize("name", ["input", "weight", "output"])
def test_later_edges_see_what_was_done_to_earlier_ones(name, model, graph, pictures):
    """What is returned for an edge is applied to it, in a sequential pass alone."""
    first, second = (graph.sites[f"blocks.{i}.mlp.fc1"] for i in (0, 1))
    edges = [first.edges["input"], first.edges["weight"], first.edges["output"], second.edges["input"]]
    seen = {}
    for sequential in (False, True):

        def on_edge(edge, view, sequential=sequential):
            seen[sequential, edge.key] = view.tensors()[0]
            return (lambda value: value * 0.5) if edge is first.edges[name] else None

        _pass(model, graph, pictures, sequential=sequential).run(edges, on_edge)
    order = [edge.key for edge in edges]
    for key in order:
        same = torch.equal(seen[False, key], seen[True, key])
        assert same == (key.endswith("weight") or order.index(key) <= order.index(f"{first.name}.{name}")), key
    expected = _values(graph, pictures, {f"{first.name}.input", f"{first.name}.output"})
    output = expected[f"{first.name}.output"]
    if name != "output":
        bias = graph.tensor(first.bias)
        torch.testing.assert_close(seen[True, f"{first.name}.output"], (output - bias) * 0.5 + bias)


def test_other_edges_of_the_node_are_shown(model, graph, pictures):
    site = graph.sites.of_kind("scores")[0]
    expected = _values(graph, pictures, {f"{site.name}.q", f"{site.name}.output"})
    found = {}

    def on_edge(edge, view):
        found.update({name: view.tensors(site.edges[name])[0] for name in ("q", "k")})
        assert torch.equal(view.tensors()[0], expected[edge.key])

    _pass(model, graph, pictures).run([site.edges["output"]], on_edge)
    assert torch.equal(found["q"], expected[f"{site.name}.q"])
    torch.testing.assert_close(found["q"] @ found["k"], expected[f"{site.name}.output"])


def test_values_that_are_not_finite_are_named(model, graph, pictures):
    edge = graph.sites["blocks.1.mlp.fc2"].edges["weight"]
    name = str(edge.value.target)
    graph.set_tensor(name, graph.tensor(name).clone().index_fill_(0, torch.tensor([1]), float("nan")))
    with pytest.raises(QuantlensError, match=r"blocks\.1\.mlp\.fc2\.weight: values are not finite"):
        _pass(model, graph, pictures).run([edge], lambda edge, view: view())
