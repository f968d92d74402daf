"""The target xnnpack: what ExecuTorch's partitioner for XNNPACK takes (executorch 1.5, backends/xnnpack/partition).

Of a static int8 linear or conv layer: signed codes with a scale and zero point per tensor at its input and at its
output, whose quantizer is all that reads it, and signed symmetric weights per output channel.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import quantlens as ql
from quantlens.errors import UnsupportedError
from quantlens.qmodel.in_float import said_in_float

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(os.environ.get("QUANTLENS_EXECUTORCH", ROOT / ".venv-executorch" / "bin" / "python"))


@pytest.mark.parametrize("method", ["minmax", "repq-vit", "gptq", "quantlens-fast", "base-ptq"])
def test_a_plan_has_what_xnnpack_takes_and_nothing_else(method, loaded, pictures):
    qmodel = ql.quantize(loaded["vit"], pictures, method=method, bits="W8A8", target="xnnpack")
    sites = [site for site in qmodel.graph.sites if site.kind in ("linear", "conv")]
    keys = {site.edges[name].key for site in sites for name in ("input", "weight", "output")}
    assert set(qmodel.plan.quantizers) == keys
    assert not qmodel.plan.operators
    for key, quantizer in qmodel.plan.quantizers.items():
        weight = qmodel.graph.sites.edges[key].is_weight
        assert (quantizer.kind, quantizer.bits, quantizer.signed) == ("uniform", 8, True)
        axes = {None} if not weight else {0, None} if method == "base-ptq" else {0}
        assert quantizer.axis in axes
        assert quantizer.symmetric if weight else -128 <= int(quantizer.zero_point) <= 127
    assert "layers" not in said_in_float(qmodel)


def test_signed_codes_have_the_values_of_unsigned_ones(loaded, pictures):
    made = {
        target: ql.quantize(loaded["vit"], pictures, method="minmax", bits="W8A8", target=target)
        for target in ("xnnpack", "onnxruntime-cpu")
    }
    values = torch.linspace(-9, 9, 4001)
    for key, quantizer in made["onnxruntime-cpu"].plan.quantizers.items():
        given = values if quantizer.axis is None else values.expand(len(quantizer.scale), -1)
        assert torch.equal(made["xnnpack"].plan.quantizers[key](given), quantizer(given))


def test_codes_of_pixels_are_the_pixels_less_128():
    model, pixels = ql.load_model("digits-vit"), torch.arange(3 * 3 * 32 * 32).reshape(3, 3, 32, 32) % 256
    qmodel = ql.quantize(
        model, model.preprocess.normalize(pixels.byte()), method="minmax", bits="W8A8", target="xnnpack"
    )
    codes = qmodel.plan.quantizers["patch_embed.proj.input"].encode(torch.arange(256) / 255)
    assert torch.equal(codes.int(), torch.arange(256).int() - 128)


def test_an_output_covers_what_the_layer_gives(loaded, pictures):
    model = loaded["plain"]
    qmodel = ql.quantize(model, pictures, method="minmax", bits="W8A8", target="xnnpack")
    head = qmodel.plan.quantizers[qmodel.graph.sites.head[-1].edges["output"].key]
    logits = model(pictures)
    low, high = (float(head.decode(torch.tensor(code, dtype=torch.int8))) for code in (-128, 127))
    assert low - float(head.scale) < float(logits.min()) < float(logits.max()) < high + float(head.scale)
    assert high - low < 1.1 * float(logits.max().clamp_min(0) - logits.min().clamp_max(0))


@pytest.mark.parametrize("name", ["vit", pytest.param("swin", marks=pytest.mark.slow)])
def test_a_pt2_has_the_pattern_that_the_partitioner_looks_for(name, loaded, pictures, tmp_path):
    qmodel = ql.quantize(loaded[name], pictures, method="minmax", bits="W8A8", target="xnnpack")
    graph = torch.export.load(ql.export(qmodel, tmp_path / "m.pt2")).graph_module.graph
    operators, seen, pairs = torch.ops.quantized_decomposed, 0, set()
    per_tensor, per_channel = operators.quantize_per_tensor.default, operators.dequantize_per_channel.default
    for layer in graph.nodes:
        if not any(kind in str(layer.target) for kind in ("aten.linear", "aten.conv")):
            continue
        value, weight = layer.args[:2]
        assert value.target == operators.dequantize_per_tensor.default
        assert weight.target == per_channel
        assert (weight.args[0].op, *weight.args[3:]) == ("placeholder", 0, -128, 127, torch.int8)
        (after,) = layer.users
        for node in (value.args[0], after):
            assert node.target == per_tensor
            assert node.args[3:] == (-128, 127, torch.int8)
        pairs |= {value.args[0], after}
        seen += 1
    assert seen == sum(site.kind in ("linear", "conv") for site in qmodel.graph.sites) > 8
    assert pairs == {node for node in graph.nodes if node.target == per_tensor}


def test_widths_that_it_has_not_are_refused(loaded, pictures):
    for bits, what in (("W4A8", "4-bit weights: choose 8"), ("W8A16", "16-bit activations: choose 8")):
        with pytest.raises(UnsupportedError, match=what):
            ql.quantize(loaded["vit"], pictures, method="minmax", bits=bits, target="xnnpack")


@pytest.mark.slow
@pytest.mark.process
def test_it_runs_in_executorch(tmp_path):
    """Every layer in an int8 kernel of XNNPACK, and the predictions of the .pt2."""
    if not PYTHON.exists():
        pytest.skip(f"no ExecuTorch at {PYTHON}: run `make executorch`, or name its Python in $QUANTLENS_EXECUTORCH")
    model = ql.load_model("digits-vit")
    qmodel = ql.quantize(
        model, "embedded:digits-calibration?n=8&seed=0", method="minmax", bits="W8A8", target="xnnpack"
    )
    source = ql.data.open_source("embedded:digits-test?n=20&seed=0")
    np.save(tmp_path / "images.npy", np.stack([np.asarray(model.preprocess(source.image(i))) for i in range(20)]))
    arguments = [
        ql.export(qmodel, tmp_path / "m.pt2"),
        "--out",
        tmp_path / "m.pte",
        "--images",
        tmp_path / "images.npy",
    ]
    script = ROOT / "examples" / "executorch" / "convert.py"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [PYTHON, script, *arguments, "--rounds", "3", "--fp32", ql.export(model, tmp_path / "f.pt2")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    assert sum(one["n"] for name, one in told["kernels"].items() if "QC8" in name) == 26
    assert not any("linear" in name or "convolution" in name for name in told["not_delegated"])
    assert told["parity"]["same_prediction"] == 1
    assert told["parity"]["sqnr_db"] > 35
    assert set(told["ms"]) == {"pte", "pte_fp32"}
    assert sum(told["share_of_time"].values()) == pytest.approx(1, abs=0.01)
