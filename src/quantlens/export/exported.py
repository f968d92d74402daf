"""An exported file in its runtime: for applications (:class:`Artefact`), and for `evaluate`, which measures it like any
model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from scipy.special import softmax

from quantlens.data import Preprocess
from quantlens.data.decode import decode_image
from quantlens.errors import BadWeightsError
from quantlens.export.export import _need
from quantlens.export.processor import saturates


class Prediction(NamedTuple):
    """What an artefact says of one image: class index, class name (if known), probability, guard score, and whether
    the image looks unknown (score below the threshold; None without a threshold)."""

    label: int
    name: str | None
    probability: float
    score: float
    unknown: bool | None


class Artefact:
    """A .onnx or .xml (OpenVINO) file written by :func:`quantlens.export`, ready to run on the CPU, and what it says of
    itself. runtime: name and version of what runs it. size_mb: megabytes (10⁶ bytes) on disk.

    threads: CPU threads (None: the runtime's choice). Where the processor's integer sums saturate (see
    :mod:`quantlens.export.processor`), ONNX Runtime is told to avoid it, and OpenVINO computes with the same codes in
    float: right, and not faster than FP32. Raises BadWeightsError for a file that is missing, damaged or
    not written by quantlens.
    """

    def __init__(self, path: str | Path, *, threads: int | None = None):
        self.path = Path(path)
        if not self.path.is_file():
            raise BadWeightsError(f"no exported model at {self.path}")
        if self.path.suffix not in _RUNTIMES:
            raise BadWeightsError(f"{self.path}: exported models end in .onnx or .xml")
        self._runtime = _RUNTIMES[self.path.suffix](self.path, threads)
        record = self._runtime.metadata
        try:
            info = json.loads(record["plan"])
            self.preprocess = Preprocess.from_dict(json.loads(record["preprocess"]))
            self.guard: dict[str, Any] = json.loads(record["guard"])
            self.num_parameters = int(record["num_parameters"])
        except (KeyError, ValueError, TypeError) as error:
            raise BadWeightsError(f"{self.path} was not written by `quantlens export`: {error}") from error
        self.info: dict[str, Any] = info
        self.name, self.method = str(info.get("model", self.path.stem)), str(info.get("method", "custom"))
        self.bits, self.seed = str(info.get("bits", "")), int(info.get("seed") or 0)
        self.options: dict[str, Any] = dict(info.get("options") or {})
        self.calibration: dict[str, Any] | None = info.get("calibration")
        self.checkpoint_sha256: str | None = info.get("checkpoint_sha256")
        self.class_names: list[str] | None = info.get("class_names")
        self.runtime, self.num_classes = self._runtime.version, self._runtime.num_classes
        self.size_mb = sum(file.stat().st_size for file in files_of(self.path)) / 1e6
        self.size_ratio = self.size_mb * 1e6 / (4 * self.num_parameters)

    # -- running ------------------------------------------------------------------------------------------------------
    def run(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """images float32 [B, 3, H, W], normalised -> logits [B, K], guard scores [B]."""
        logits, scores = self._runtime.run(np.ascontiguousarray(images, dtype=np.float32))
        return logits, scores

    def predict(self, images: Sequence[Any]) -> list[Prediction]:
        """Predictions for pictures: paths or PIL images."""
        opened = [image if isinstance(image, Image.Image) else decode_image(image) for image in images]
        pixels = np.stack([self.preprocess.resize_crop(image.convert("RGB")) for image in opened])
        logits, scores = self.run(self.preprocess.normalize(pixels).numpy())
        threshold = (self.guard.get("threshold") or {}).get("value")
        probabilities, names = softmax(logits, axis=1), self.class_names
        return [
            Prediction(
                int(label),
                names[label] if names else None,
                float(row[label]),
                float(score),
                None if threshold is None else bool(score < threshold),
            )
            for label, row, score in zip(logits.argmax(1), probabilities, scores, strict=True)
        ]

    # -- what `evaluate` asks of a model ------------------------------------------------------------------------------
    def outputs(self, images: Any) -> Any:
        """Logits of a tensor of images; no features (scores that need them are left out, and say so)."""
        import torch

        from quantlens.qmodel import Outputs

        return Outputs(torch.from_numpy(self.run(images.cpu().numpy())[0]), None)

    def __call__(self, images: Any) -> Any:
        """images [B, 3, H, W] tensor -> logits [B, K] tensor."""
        return self.outputs(images).logits

    reference = None

    def classifier(self) -> None:
        return None

    def eval(self) -> Artefact:
        return self

    def to(self, *_: Any, **__: Any) -> Artefact:
        return self

    def advice(self) -> list[str]:
        """Sentences on what must be set to get these numbers where the file is loaded without quantlens."""
        said = []
        if self.path.suffix == ".xml":
            said.append(
                "OpenVINO computes float operations in bfloat16 on processors that have it; the file cannot say "
                'otherwise, so compile it with {"INFERENCE_PRECISION_HINT": "f32"} (quantlens.Artefact does)'
            )
        if saturates() and may_saturate(self._runtime.metadata) and self.bits != "FP32":
            setting = (
                'compile it with {"LP_TRANSFORMS_MODE": False}, which is right and no faster than FP32'
                if self.path.suffix == ".xml"
                else 'set the session entry "session.x64quantprecision" to "1"'
            )
            said.append(
                f"this processor's 8-bit sums saturate (no VNNI): {setting} (quantlens.Artefact does); "
                "or quantize with W7A8, whose sums fit on every processor"
            )
        return said

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the file, of an .xml and its .bin together."""
        digest = hashlib.sha256()
        for file in files_of(self.path):
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()

    def facts(self) -> dict[str, Any]:
        """What the file is, as a benchmark's row names it."""
        return {
            "fingerprint": self.fingerprint,
            "file": self.path.name,
            "runtime": self.runtime,
            "model": self.name,
            "method": self.method,
            "bits": self.bits,
            "seed": self.seed,
            "checkpoint_sha256": self.checkpoint_sha256,
            "size_mb": self.size_mb,
        }


def may_saturate(metadata: dict[str, str]) -> bool:
    """Whether a file has weights of more than 7 bits (or does not say), whose products two instructions add wrongly."""
    return metadata.get("saturating") != "false"


def files_of(path: Path) -> list[Path]:
    """The files of an exported model: an .xml has its weights in the .bin beside it."""
    return [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path]


class _Runtime(NamedTuple):
    """An opened file. run: images -> logits and scores; version: name and version of what runs it."""

    run: Callable[[np.ndarray], Sequence[np.ndarray]]
    metadata: dict[str, str]
    version: str
    num_classes: int


def _onnxruntime(path: Path, threads: int | None) -> _Runtime:
    ort = _need("onnxruntime")

    def opened(*, precise: bool) -> Any:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if precise:  # weights as unsigned codes, whose products ONNX Runtime adds without saturation
            options.add_session_config_entry("session.x64quantprecision", "1")
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise BadWeightsError(f"{path} cannot be run by ONNX Runtime: {error}") from error

    session = opened(precise=False)
    metadata = dict(session.get_modelmeta().custom_metadata_map)
    if saturates() and may_saturate(metadata):  # known only once it is open
        session = opened(precise=True)
    return _Runtime(
        lambda images: session.run(["logits", "score"], {"images": images}),
        metadata,
        f"onnxruntime {ort.__version__}",
        int(session.get_outputs()[0].shape[-1]),
    )


def _openvino(path: Path, threads: int | None) -> _Runtime:
    openvino = _need("openvino")
    # float32 where the model is float: some CPUs would take bfloat16 by default, which is not what was measured
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    # without VNNI, OpenVINO saturates in its integer kernels, slower than float: the same codes in float operations
    if saturates():
        settings["LP_TRANSFORMS_MODE"] = False
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    try:
        core = openvino.Core()
        model = core.read_model(path)
        compiled = core.compile_model(model, "CPU", settings)
    except Exception as error:
        raise BadWeightsError(f"{path} cannot be run by OpenVINO: {error}") from error
    info = model.get_rt_info("quantlens").value if model.has_rt_info("quantlens") else {}
    return _Runtime(
        lambda images: itemgetter("logits", "score")(compiled({"images": images})),
        {key: getattr(value, "value", value) for key, value in info.items()},
        f"openvino {openvino.__version__.split('-')[0]}",
        int(model.output("logits").partial_shape[-1].get_length()),
    )


_RUNTIMES = {".onnx": _onnxruntime, ".xml": _openvino}
