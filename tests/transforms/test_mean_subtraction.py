"""Means taken out: the same function, and edges whose channels have mean zero."""

from __future__ import annotations

import pytest
import torch

from quantlens.calibration import Calibration
from quantlens.calibration.measured_transforms import channel_means, subtract_means
from quantlens.graph import graph_of
from quantlens.transforms import fold_layer_scale
from quantlens.transforms.heads import find_score_pairs, find_value_pairs


def _edges(graph) -> dict[str, list[str]]:
    norms = [f"{site.name}.output" for site in graph.sites.of_kind("layer_norm")]
    return {
        "norms": norms,
        "values": [f"{pair.proj.name}.input" for pair in find_value_pairs(graph)],
        "keys": [f"{pair.k.name}.output" for pair in find_score_pairs(graph)],
    }


def test_the_function_stays_and_the_means_go(loaded, architecture, pictures):
    model = loaded[architecture]
    graph = graph_of(model).clone()
    fold_layer_scale(graph)
    graph.invalidate()
    generator = torch.Generator().manual_seed(0)
    for name, value in graph.tensors().items():  # biases that are not small, so that there is something to take out
        if name.endswith("bias") and value.is_floating_point():
            graph.set_tensor(name, value + 0.5 * torch.randn(value.shape, generator=generator))
    graph.invalidate()
    expected, edges = graph(pictures), _edges(graph)
    calibration = Calibration.of(pictures, model.preprocess)
    also = [f"{graph.sites.of_kind('linear')[0].name}.output"]
    told, means = subtract_means(graph, calibration, also)
    assert list(means) == also
    torch.testing.assert_close(graph(pictures), expected, rtol=1e-3, atol=1e-3)
    after = channel_means(graph, calibration, [key for keys in edges.values() for key in keys])
    centred = {what: [key for key in keys if float(after[key].abs().max()) < 1e-4] for what, keys in edges.items()}
    for pair in find_score_pairs(graph):
        key = f"{pair.k.name}.output"
        rows = pair.k_rows.flatten()
        if float(after[key][rows].abs().max()) < 1e-4:
            centred["keys"].append(key)
    assert told
    assert centred["norms"]
    assert len(centred["values"]) == len(edges["values"])
    assert len(set(centred["keys"])) == len(set(edges["keys"]))


@pytest.mark.parametrize("dim", [-1, -2])
def test_keys_stay_where_the_softmax_goes_over_queries(loaded, pictures, dim):
    """A softmax over another dimension sees a number added to all logits of a query."""
    from quantlens.transforms.heads import _rows_shift_freely

    graph = graph_of(loaded["vit"]).clone()
    scores = graph.sites.of_kind("scores")[0]
    softmax = next(site.node for site in graph.sites.of_kind("probs"))
    softmax.args = (softmax.args[0], dim, *softmax.args[2:])
    assert _rows_shift_freely(graph, scores) == (dim == -1)


def test_layers_that_share_their_weights_are_left_as_they_are(loaded, pictures):
    """Two MLPs with the same second layer: what one of them reads cannot change for both, and is not changed twice."""
    from quantlens.transforms.rotation import hadamard, layers_after_activations, rotate_input, rotation_size

    graph = graph_of(loaded["vit"]).clone()
    first, second = (site.node for site in layers_after_activations(graph)[:2])
    second.args = (second.args[0], *first.args[1:])
    shared = graph.sites.of_kind("linear")[0].node, graph.sites.of_kind("linear")[4].node
    assert shared[0].args[2] is not shared[1].args[2]
    shared[1].args = (*shared[1].args[:2], shared[0].args[2])  # and two layers behind LayerNorms the same bias
    graph.fx.lint()
    graph.invalidate()
    expected, before = graph(pictures), len(graph.sites.of_kind("linear"))
    assert not {first, second} & {site.node for site in layers_after_activations(graph)}
    for site in layers_after_activations(graph):
        rotate_input(graph, site, hadamard(rotation_size(graph, site), torch.Generator().manual_seed(0)))
    graph.invalidate()
    subtract_means(graph, Calibration.of(pictures, loaded["vit"].preprocess))
    torch.testing.assert_close(graph(pictures), expected, rtol=1e-3, atol=1e-3)
    assert len(graph.sites.of_kind("linear")) == before
