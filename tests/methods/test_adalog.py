from __future__ import annotations

import pytest
import torch

import quantlens as ql
from quantlens.errors import UnsupportedError
from quantlens.formats import AdaLog, Log


@pytest.fixture(scope="module")
def model(loaded):
    return loaded["vit"]


@pytest.fixture(scope="module")
def quantized(model, pictures):
    return ql.quantize(model, pictures, method="adalog", bits="W4A4")


def test_formats(quantized):
    """Softmax and GELU outputs have adaptive log codes; q, k and v a scale per head; weights one per channel."""
    formats = quantized.plan.quantizers
    probs, gelu = formats["blocks.0.attn.probs.output"], formats["blocks.0.mlp.fc2.input"]
    assert isinstance(probs, AdaLog)
    assert float(probs.delta) == 1.0
    assert float(probs.shift) == 0.0
    assert isinstance(gelu, AdaLog)
    assert float(gelu.shift) == pytest.approx(0.16997124)
    for key in ("scores.q", "scores.k", "context.v"):
        assert formats[f"blocks.0.attn.{key}"].granularity == "head"
    assert formats["blocks.0.attn.qkv.weight"].granularity == "channel"
    assert formats["blocks.0.attn.qkv.input"].granularity == "tensor"
    assert any("reparameterized" in line for line in quantized.plan.rewrites)


def test_the_adaptive_base_beats_sqrt2(model, pictures, quantized):
    """On the attention it was searched on, in the context that it makes."""
    graph = ql.quantize(model, pictures, bits="FP32").graph
    seen = {}

    def hook(key, value):
        seen[key] = value
        return value

    calls = [n for n in graph.fx.nodes if n.op == "call_function"]
    graph.run(calls, {graph.input: pictures}, hook=hook, keep=[graph.output])
    for block in (0, 1):
        probs = seen[f"blocks.{block}.attn.context.probs"]
        v = seen[f"blocks.{block}.attn.context.v"]
        errors = [
            float(((q(probs) - probs) @ v).square().sum())
            for q in (
                quantized.plan.quantizers[f"blocks.{block}.attn.probs.output"],
                Log(torch.tensor(1.0), 4, steps=2),
            )
        ]
        assert errors[0] < errors[1]


def test_the_format_is_the_best_of_its_bases(model, pictures):
    """Of every base, at the scale that suits it best: the error of the output says which is chosen."""

    from quantlens.calibration.ranges.guided import OutputError, losses
    from quantlens.methods.adalog import _logarithmic

    generator = torch.Generator().manual_seed(0)
    probs = torch.randn(1, 30, 12, generator=generator).mul(3).softmax(-1)
    right = torch.randn(1, 12, 6, generator=generator).mT
    start = _logarithmic(probs, 3, 0.0, 1)
    error = OutputError.of(probs, right, right)
    found = start.improved(error, 1)
    reached = losses(found.side, error.exact, found.side.current[None])
    every = losses(start.side, error.exact, start.side.candidates)
    assert float(reached) <= float(every.min()) * (1 + 1e-6)
    assert float(every.min()) < float(every.max())


def test_saved_and_read_back_the_logits_are_equal(quantized, pictures, tmp_path):
    again = ql.load(quantized.save(tmp_path / "q.safetensors"))
    assert torch.equal(again(pictures), quantized(pictures))
    assert isinstance(again.plan.quantizers["blocks.0.mlp.fc2.input"], AdaLog)


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".onnx", ".pt2"])
def test_it_is_exported_as_a_simulation_alone(ending, model, pictures, tmp_path):
    pytest.importorskip("onnxruntime", reason="the deploy extra is not installed")
    from quantlens.export.export import export
    from quantlens.export.exported import Artefact

    quantized = ql.quantize(model, pictures, method="adalog", bits="W6A6", rounds=1, steps=2)
    with pytest.raises(UnsupportedError, match="--simulate"):
        export(quantized, tmp_path / f"m{ending}")
    path = export(quantized, tmp_path / f"m{ending}", simulate=True)
    expected = quantized(pictures)
    if ending == ".pt2":
        got = torch.export.load(path).module()(pictures)
    else:
        got = torch.as_tensor(Artefact(path, threads=1)(pictures))
    assert float((got - expected).square().sum()) < 1e-6 * float(expected.square().sum())
