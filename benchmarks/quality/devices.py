"""The same quantization elsewhere: in an exported file's runtime, and on a GPU."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch

import quantlens as ql
from benchmarks.quality.case import Case, NotHere, Quantity
from benchmarks.quality.subjects import calibration, digits, held_out, sqnr
from quantlens.methods import registry

FRAGILE = {"fq-ptq": "W6A6"}
"""Methods that at 4 bits turn on single codes: at W4A4 fq-ptq's NLL is 0.29 on an H200 and 0.19 on a processor."""

STEPS: dict[str, dict[str, Any]] = {
    **{name: {"iterations": 20} for name in ("qdrop", "fima-q", "i-and-s-vit")},
    "quantlens-best": {"iterations": 20},
    "aphq-vit": {"iterations": 20, "mlp_iterations": 40},
    "aocq": {"scale_iterations": 10},
    "vt-ptq": {"rounds": 3},
}


def _exported(ending: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a W8A8 file in its runtime, and of the simulation."""
    try:
        import onnxruntime  # noqa: F401
        import openvino  # noqa: F401
    except ImportError as error:
        raise NotHere("the deploy extra is not installed") from error
    images = held_out()[0]
    q = ql.quantize(digits(), calibration(seed), method="minmax", bits="W8A8", target="openvino-cpu", seed=seed)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        artefact = ql.Artefact(ql.export(q, Path(folder) / f"m{ending}"), threads=1)
        return torch.as_tensor(artefact(images)), q(images)


def _export_sqnr(ending: str) -> Quantity:
    def quantity(seed: int) -> float:
        got, expected = _exported(ending, seed)
        return sqnr(expected, got)

    return quantity


def _export_agreement(ending: str) -> Quantity:
    def quantity(seed: int) -> float:
        got, expected = _exported(ending, seed)
        return float((got.argmax(1) == expected.argmax(1)).double().mean())

    return quantity


def _elsewhere(method: str) -> Quantity:
    """|NLL there − NLL here| over the NLL here, the shipped model quantized on each."""

    def quantity(seed: int) -> float:
        device = os.environ.get("QUANTLENS_TEST_DEVICE", "cuda")
        if device == "cuda" and not torch.cuda.is_available():
            raise NotHere("no CUDA GPU here")
        images, labels, _ = held_out()
        there, found = ql.load_model("digits-vit", device=device), []
        for model in (there, digits()):
            bits = FRAGILE.get(method, "W4A4")
            q = ql.quantize(model, calibration(seed), method=method, bits=bits, seed=seed, **STEPS.get(method, {}))
            with torch.inference_mode():
                logits = q(images.to(device) if model is there else images).double().cpu()
            found.append(float(torch.nn.functional.cross_entropy(logits, labels)))
        return abs(found[0] - found[1]) / found[1]

    return quantity


CASES = (
    *(
        Case(
            f"export/{ending[1:]}-dB",
            "dB of a W8A8 file's logits against the simulation",
            _export_sqnr(ending),
            above=0,
        )
        for ending in (".onnx", ".xml")
    ),
    *(
        Case(
            f"export/{ending[1:]}-top1",
            "equal predictions of a W8A8 file and the simulation",
            _export_agreement(ending),
            above=0,
        )
        for ending in (".onnx", ".xml")
    ),
    *(
        Case(f"gpu/{name}", "NLL on the GPU to NLL on the processor, relative difference", _elsewhere(name), below=0.4)
        for name in sorted(registry.available())
    ),
)
