"""The central step of methods that train, on a small model; see ``test_mechanisms.py``."""

from __future__ import annotations

import pytest
import torch

import quantlens as ql
from quantlens.formats import ShiftedLog
from quantlens.graph import graph_of
from quantlens.methods import _reconstruction
from quantlens.reconstruction import Context, trainer, units
from small_models import changed, energy, rows_of, values


@pytest.fixture
def told(monkeypatch):
    """Settings of every reconstruction that is run."""
    found, real = [], _reconstruction.reconstruct
    monkeypatch.setattr(_reconstruction, "reconstruct", lambda *a, **k: (found.append(a[3]), real(*a, **k))[1])
    return found


def test_half_of_the_elements_are_dropped(loaded, pictures, monkeypatch):
    """Of every activation while it is trained, and of every block's input; none in what ships."""
    drawn = {}
    for module in (trainer, units):
        real = module.random_mask

        def spy(shape, p, generator, device, real=real, module=module):
            mask = real(shape, p, generator, device)
            drawn.setdefault(module.__name__.split(".")[-1], []).append(mask.double().mean())
            return mask

        monkeypatch.setattr(module, "random_mask", spy)
    q = ql.quantize(loaded["vit"], pictures, method="qdrop", bits="W4A4", iterations=4)
    for name in ("trainer", "units"):
        assert float(torch.stack(drawn[name]).mean()) == pytest.approx(0.5, abs=0.02), name
    count = len(drawn["trainer"])
    assert count >= len([k for k in q.plan.quantizers if not k.endswith(".weight")])
    assert torch.equal(q(pictures), q(pictures))
    assert len(drawn["trainer"]) == count


def last_block(loss, error):
    """The loss of an error at the output of the last block."""
    context = Context("blocks.1", is_logits=False, images=torch.arange(len(error)), scale=1.0)
    return float(loss(error, torch.zeros_like(error), context))


@pytest.mark.parametrize("method", ["fima-q", "aphq-vit"])
def test_losses_know_what_the_output_depends_on(method, loaded, pictures, told):
    """After the last block the class token alone is read: errors of other tokens cost next to nothing. fima-q's matrix
    is more than its diagonal: errors of two elements at once cost more than each of them alone."""
    ql.quantize(loaded["vit"], pictures, method=method, bits="W4A4", iterations=0)
    loss = told[0].loss
    classes, patches = torch.zeros(2, 8, 17, 32).unbind(0)
    classes[:, 0], patches[:, 1:] = 1.0, 1.0
    assert last_block(loss, patches) < 1e-3 * last_block(loss, classes)
    parts = [classes * part for part in (torch.arange(32) < 16, torch.arange(32) >= 16)]
    alone = sum(last_block(loss, part) for part in parts)
    if method == "fima-q":
        assert last_block(loss, classes) > 1.1 * alone
    else:
        assert last_block(loss, classes) == pytest.approx(alone, rel=1e-5)


def test_mlps_are_refitted_with_relu(loaded, pictures):
    """No GELU is left, and the first MLP's output is nearer to what it was than with a ReLU alone."""
    model = loaded["vit"]
    q = ql.quantize(model, pictures, method="aphq-vit", bits="W8A8", iterations=0, mlp_iterations=40)
    assert not q.graph.sites.of_kind("gelu")
    seen, now = values(graph_of(model), pictures), values(q.graph, pictures)
    weight, bias = (graph_of(model).tensor(f"blocks.0.mlp.fc2.{part}") for part in ("weight", "bias"))
    expected = rows_of(seen["blocks.0.mlp.fc2.output"])
    plain = rows_of(seen["blocks.0.mlp.fc1.output"]).relu() @ weight.T + bias
    assert energy(rows_of(now["blocks.0.mlp.fc2.output"]) - expected) < 0.5 * energy(plain - expected)


def test_small_probabilities_keep_levels_and_weights_are_smoothed(fresh, pictures, told):
    """Of a peaked attention, whose smallest values take the range up without a shift, the found one leaves less error.
    In the first stage float weights are trained on channel-wise activations, and the blocks' losses fall."""

    def peaked(tensors):
        tensors["blocks.0.attn.qkv.weight"][:32] *= 4

    model = changed(fresh("vit"), peaked)
    q = ql.quantize(model, pictures, method="i-and-s-vit", bits="W4A4", iterations=48)
    probs, found = (
        values(graph_of(model), pictures)["blocks.0.attn.probs.output"],
        q.plan.quantizers["blocks.0.attn.probs.output"],
    )
    assert isinstance(found, ShiftedLog)
    unshifted = ShiftedLog.covering(1e-6, probs, 4)
    assert energy(found(probs) - probs) < 0.7 * energy(unshifted(probs) - probs)
    smooth, quantized = told
    assert (smooth.optimise, smooth.float_weights, smooth.inputs) == (("weights",), True, "float")
    assert (quantized.optimise, quantized.float_weights, quantized.inputs) == (("weights",), False, "quantized")
    gains = [
        unit["after"] / unit["before"] for unit in q.plan.info["reconstruction"]["smooth"] if "blocks" in unit["unit"]
    ]
    assert max(gains) <= 1, "the best of a block's steps is kept"
    assert min(gains) < 0.9
    assert sum(gains) < 0.95 * len(gains)


def test_blocks_are_trained_by_what_the_output_depends_on(loaded, pictures, told):
    """And their losses fall, beyond what the closed form reached."""
    q = ql.quantize(loaded["vit"], pictures, method="quantlens-best", bits="W3A3", iterations=32)
    blocks = [unit for unit in q.plan.info["reconstruction"] if unit["unit"].startswith("blocks")]
    assert blocks
    assert any(unit["after"] < 0.9 * unit["before"] for unit in blocks)
    loss = told[0].loss
    classes, patches = torch.zeros(2, 8, 17, 32).unbind(0)
    classes[:, 0], patches[:, 1:] = 1.0, 1.0
    assert last_block(loss, patches) < 1e-3 * last_block(loss, classes)
