"""What the runtimes' own tools make of a float model at 8 bits, each in a process of its own: what a tool changes in
torch, sets or prints stays there, and NNCF sends nothing to its makers.

    python -m quantlens.export.peers TOOL FLOAT_FILE IMAGES.npy TARGET_FILE
"""

import json
import os
import subprocess
import sys
import tempfile
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from quantlens.errors import QuantlensWarning


class Tool(NamedTuple):
    """A tool: the package it needs, the file of the float model that it reads, the one that it writes, and its name in
    a table."""

    package: str
    source: str
    target: str
    label: str


TOOLS = {
    "onnxruntime-static": Tool(
        "onnxruntime", "fp32.onnx", "onnxruntime-static.onnx", "ONNX Runtime static int8 (its defaults)"
    ),
    "nncf-transformer": Tool("nncf", "fp32.xml", "nncf.xml", "NNCF int8 (transformer)"),
}
OF_THE_FILE = ("sha256", "plan_sha256")
"""What another tool's file does not take over of the metadata of the float file that it is made of."""


def peer_files(calibration: np.ndarray, folder: Path) -> dict[str, Path]:
    """Label -> file of every tool that is installed, made of the float files (:data:`TOOLS`) in ``folder``. What is not
    installed, or fails, is told in a warning. calibration: float32 [N, 3, H, W]."""
    found = {}
    for name, tool in TOOLS.items():
        if find_spec(tool.package) is None or not (folder / tool.source).is_file():
            lacking = tool.package if find_spec(tool.package) is None else "the runtime of its float file"
            warnings.warn(f"{tool.label} is left out: {lacking} is not installed", QuantlensWarning, stacklevel=3)
        elif reason := _run(name, folder / tool.source, calibration, folder / tool.target):
            warnings.warn(f"{tool.label} is left out: it ended with {reason}", QuantlensWarning, stacklevel=3)
        else:
            found[tool.label] = folder / tool.target
    return found


def _run(name: str, source: Path, calibration: np.ndarray, target: Path) -> str:
    """Run a tool; why it failed, "" where it did not."""
    with tempfile.TemporaryDirectory() as scratch:
        images = Path(scratch) / "images.npy"
        np.save(images, calibration)
        command = [sys.executable, "-m", __name__, name, *(str(p.resolve()) for p in (source, images, target))]
        # NNCF_CI: no telemetry; the path: packages are those that this process has
        added = {"NNCF_CI": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        made = subprocess.run(
            command, capture_output=True, text=True, cwd=scratch, env={**os.environ, **added}, check=False
        )
    said = made.stderr.strip().splitlines() or [f"exit status {made.returncode}"]
    return "" if made.returncode == 0 and target.is_file() else said[-1]


def onnxruntime_static(source: Path, images: np.ndarray, target: Path) -> None:
    """ONNX Runtime's static quantization with its defaults, weights per output channel. Its pre-processing changes
    nothing: what it looks for (shapes, fusions) is in the float file."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    rest = iter(images)

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(rest, None)
            return None if image is None else {"images": image[None]}

    quantize_static(source, target, Reader(), quant_format=QuantFormat.QDQ, per_channel=True)
    made = onnx.load(target)
    said = {p.key: p.value for p in onnx.load(source).metadata_props if p.key not in OF_THE_FILE}
    onnx.helper.set_model_props(made, said | _record(said["plan"], "onnxruntime-static", len(images)))
    onnx.save(made, target)


def nncf_transformer(source: Path, images: np.ndarray, target: Path) -> None:
    """NNCF's post-training quantization with its preset for transformers."""
    import nncf
    import openvino

    model = openvino.Core().read_model(source)
    data = nncf.Dataset([image[None] for image in images])
    quantized = nncf.quantize(model, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(images))
    plan = model.get_rt_info(["quantlens", "plan"]).value
    for key, value in (dict.fromkeys(OF_THE_FILE, "") | _record(plan, "nncf-transformer", len(images))).items():
        quantized.set_rt_info(value, ["quantlens", key])
    openvino.save_model(quantized, target, compress_to_fp16=False)


def _record(plan: str, method: str, count: int) -> dict[str, str]:
    """What a peer's file says of itself beside the float file's record, ``plan`` (JSON) of which is rewritten."""
    made = {"method": method, "bits": "W8A8", "calibration": {"n": count}}
    return {"plan": json.dumps(json.loads(plan) | made), "saturating": "true", "own_settings": "true"}


def main(arguments: list[str]) -> None:
    name, source, images, target = arguments
    tools: dict[str, Any] = {"onnxruntime-static": onnxruntime_static, "nncf-transformer": nncf_transformer}
    tools[name](Path(source), np.load(images), Path(target))


if __name__ == "__main__":
    main(sys.argv[1:])
