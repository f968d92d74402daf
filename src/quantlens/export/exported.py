"""An exported file in its runtime: for applications (:class:`Artefact`), and for `evaluate`, which measures it like any
model."""

import functools
import hashlib
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from quantlens import _moved
from quantlens.arguments import checked
from quantlens.data import as_rgb, decode_image
from quantlens.errors import BadImageError, BadWeightsError, UnknownNameError, UnsupportedError
from quantlens.export.digest import check_content
from quantlens.export.record import check_outputs, has_guard, names_in, read_head, read_record
from quantlens.export.runtimes import need, openvino_core, openvino_settings, reason_of, refused
from quantlens.files import mistaken


class Prediction(NamedTuple):
    """What an artefact says of one image: class index, class name (if known), probability, guard score (None in a file
    without a guard), and whether the image looks unknown (score below the threshold; None without a threshold)."""

    label: int
    name: str | None
    probability: float
    score: float | None
    unknown: bool | None


class Artefact:
    """A .onnx, .xml (OpenVINO) or .pt2 file written by :func:`quantlens.export`, ready to run on the CPU, and what it
    says of itself. runtime: name and version of what runs it. size_mb: megabytes (10⁶ bytes) on disk.

    threads: CPU threads (None: the runtime's choice). Where the processor's integer sums saturate (see
    :func:`saturates`), ONNX Runtime is told to avoid it, and OpenVINO computes with the same codes in
    float: right, and not faster than FP32; files of the peers of a race run with their runtime's own settings. opened:
    the file, where it is open. Raises BadWeightsError for a file that is missing, damaged or not written by quantlens.
    """

    @checked
    def __init__(self, path: str | Path, *, threads: int | None = None, opened: "Opened | None" = None):
        self.path = Path(path)
        opened = open_file(self.path, threads) if opened is None else opened
        self._run, self._record, self.runtime = opened.run, opened.metadata, opened.runtime
        info, self.preprocess, self.guard, self.num_parameters, self.task = read_record(self.path, self._record)
        self.detection_head = read_head(self.path, info.get("detection_head"))
        self.num_classes = int((opened.outputs[0].shape or ())[-1] or 0)
        if self.detection_head is not None:
            self.num_classes = len(self.detection_head.labels)
        self.info: dict[str, Any] = info
        self.name, self.method = str(info.get("model") or self.path.stem), str(info.get("method") or "custom")
        self.bits, self.seed = str(info.get("bits") or ""), int(info.get("seed") or 0)
        self.options: dict[str, Any] = dict(info.get("options") or {})
        self.calibration: dict[str, Any] | None = info.get("calibration")
        self.checkpoint_sha256: str | None = info.get("checkpoint_sha256")
        self.class_names: list[str] | None = info.get("class_names")
        self._failures, self._entry = opened.failures, opened.entry
        self.integers = None if self.bits == "FP32" else opened.integers
        check_outputs(self, [port.name for port in opened.outputs])
        self.size_mb = sum(file.stat().st_size for file in files_of(self.path)) / 1e6
        self.size_ratio = self.size_mb * 1e6 / (4 * self.num_parameters) if self.num_parameters else None

    # -- running ------------------------------------------------------------------------------------------------------
    def run(self, images: np.ndarray, **others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """images float32 [B, C, H, W], normalised, and what else the model takes, by its names -> logits [B, K] (or
        features [B, D]), guard scores [B] (not a number where the file has no guard)."""
        found = self.values(images, **others)
        measured = found["logits"] if "logits" in found else found["features"]
        score = found.get("score")
        if score is None and self.path.suffix == ".pt2" and has_guard(self):  # it gives what the module gives
            from quantlens.export.guards import GUARDS

            score = GUARDS[self.guard["score"]](measured) if self.guard["score"] in GUARDS else None
        return measured, np.full(len(measured), np.nan, np.float32) if score is None else score

    def values(self, images: np.ndarray, **others: np.ndarray) -> dict[str, np.ndarray]:
        """Everything that the model returns, by the names of the file's outputs."""
        try:
            return self._run({"images": np.ascontiguousarray(images, dtype=np.float32), **others})
        except self._failures as error:
            raise BadWeightsError(
                f"{self.path} cannot be run on images {list(images.shape)}: {reason_of(error)}"
            ) from error

    def predict(self, images: Sequence[Any]) -> list[Prediction]:
        """Predictions for pictures: paths or PIL images, or what :meth:`pixels` made of them."""
        if self.task != "classify":
            raise UnsupportedError(
                f"{self.path} has the task {self.task!r}: there are no classes to predict; in Python, "
                "Artefact.run gives its outputs"
            )
        pixels = np.stack([image if isinstance(image, np.ndarray) else self.pixels(image) for image in images])
        logits, scores = self.run(self.preprocess.normalized(pixels))
        threshold = (self.guard.get("threshold") or {}).get("value")
        shares, names = np.exp(logits - logits.max(axis=1, keepdims=True)), self.class_names
        probabilities = shares / shares.sum(axis=1, keepdims=True)
        unknown = [None if threshold is None else score < threshold for score in scores.tolist()]
        said = [None if np.isnan(score) else score for score in scores.tolist()]
        rows = zip(logits.argmax(1).tolist(), probabilities.max(1).tolist(), said, unknown, strict=True)
        return [Prediction(k, names[k] if names else None, share, *rest) for k, share, *rest in rows]

    def pixels(self, image: Any) -> np.ndarray:
        """uint8 [C, H, W] of a picture, a path or a PIL image. Raises BadImageError that names it."""
        try:
            return self.preprocess.resize_crop(as_rgb(image) if isinstance(image, Image.Image) else decode_image(image))
        except BadImageError as error:
            raise BadImageError(f"{'the picture' if isinstance(image, Image.Image) else image}: {error}") from error

    # -- what `evaluate` asks of a model ------------------------------------------------------------------------------
    def outputs(self, images: Any) -> Any:
        """Logits of a tensor of images, boxes of a detector, the file's own score; no features (scores of them are left
        out)."""
        import torch

        from quantlens.qmodel import Outputs

        found = {name: torch.from_numpy(value) for name, value in self.values(images.cpu().numpy()).items()}
        made = Outputs(found["logits"] if "logits" in found else found["features"], None, found.get("boxes"))
        made.score = found.get("score")
        return made

    def __call__(self, images: Any) -> Any:
        """images [B, 3, H, W] tensor -> logits [B, K] tensor."""
        return self.outputs(images).logits

    reference = None

    def classifier(self) -> None:
        return None

    def to(self, *_: Any, **__: Any) -> "Artefact":
        return self

    def advice(self) -> list[str]:
        """Sentences on what must be set to get these numbers where the file is loaded without quantlens."""
        said = []
        if self.path.suffix == ".xml":
            said.append(
                "OpenVINO computes float operations in bfloat16 on processors that have it; the file cannot say "
                'otherwise, so compile it with {"INFERENCE_PRECISION_HINT": "f32"} (quantlens.Artefact does)'
            )
        if self._entry == UNFUSED:
            said.append(
                f'ONNX Runtime runs these codes as float operations: set the session entry "{UNFUSED}" to "1", without '
                "which it refuses the file (quantlens.Artefact does)"
            )
        elif self.path.suffix != ".pt2" and saturates() and may_saturate(self._record) and self.bits != "FP32":
            setting = (
                'compile it with {"LP_TRANSFORMS_MODE": False}, which is right and no faster than FP32'
                if self.path.suffix == ".xml"
                else f'set the session entry "{PRECISE}" to "1"'
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
            "integers": self.integers,
        }


SATURATE, AS_FLOAT = "saturate", "run as float"
"""What may become of integers on a processor: their sums saturate, or float operations compute with their values."""

UNFUSED, PRECISE = "session.disable_quant_qdq", "session.x64quantprecision"
"""Entries of a session of ONNX Runtime: leave quantized operations as they are written; add without saturation."""

EXACT = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})
"""Linux's names of the instructions that add in 32 bits."""


@functools.cache
def saturates() -> bool:
    """Whether sums of u8 · s8 products saturate here. Of an x86 processor whose instructions are not known, yes.

    x86 processors without VNNI or AMX (AVX2, the first AVX-512) multiply unsigned by signed bytes in pairs and add the
    two products in 16 bits, which saturates at 32767: 255 · 127 · 2 is 64770. Runtimes use that instruction as it is
    fast, and their logits then differ from the measured ones by far more than rounding. With weights of 7 bits (±64)
    the pair stays within 32640: a W7A8 file is right on every processor, whatever its session options. A file says in
    its metadata (``saturating``) whether it has wider weights.
    """
    x86 = platform.machine().lower() in ("x86_64", "amd64", "i386", "i686", "x86")
    return x86 and not EXACT & set(processor("flags").split())


def processor(fact: str) -> str:
    """What Linux says of the processor: its "flags" (instruction sets), its "model name"; "" where it does not."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            return next((line.partition(":")[2].strip() for line in lines if line.startswith(fact)), "")
    except OSError:
        return ""


def may_saturate(metadata: dict[str, str]) -> bool:
    """Whether a file has weights of more than 7 bits (or does not say), whose products two instructions add wrongly."""
    return metadata.get("saturating") != "false"


def own_settings(metadata: dict[str, str]) -> bool:
    """Whether a file is run as its users would, with its runtime's own settings: of a race's peers (`export.peers`)."""
    return metadata.get("own_settings") == "true"


def files_of(path: Path) -> list[Path]:
    """The files of an exported model: an .xml has its weights in the .bin beside it."""
    return [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path]


class Port(NamedTuple):
    """An input or output of a file: its name, its sizes (None: any), its type as NumPy spells it."""

    name: str
    shape: tuple[int | None, ...] | None
    dtype: str


class Opened(NamedTuple):
    """A file in its runtime. run: inputs -> outputs, by name. runtime: name and version of what runs it. failures: what
    `run` raises of an input that does not fit. entry: of ONNX Runtime's session, which it needed. integers: what
    becomes of them here, if it has any: :data:`SATURATE`, :data:`AS_FLOAT`, or None where they are added exactly."""

    run: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
    inputs: list[Port]
    outputs: list[Port]
    metadata: dict[str, str]
    runtime: str
    failures: tuple[type[Exception], ...]
    entry: str = ""
    integers: str | None = None

    @property
    def ours(self) -> bool:
        """Whether `quantlens export` wrote the file."""
        return "plan" in self.metadata


def open_file(path: Path, threads: int | None = None, inner: Sequence[str] = ()) -> Opened:
    """Open any .onnx or .xml file, or a .pt2 file of ours, for the CPU. inner: tensors inside the graph that are made
    outputs. Raises BadWeightsError for a file that is missing, damaged, or that its runtime cannot run."""
    if not path.is_file():
        raise BadWeightsError(f"no exported model at {path}")
    if path.suffix not in _RUNTIMES:
        raise BadWeightsError(f"{path}: exported models end in .onnx, .xml or .pt2")
    for file in filter(Path.is_file, files_of(path)):
        if what := mistaken(file):
            raise BadWeightsError(f"{file} cannot be run: it is {what}")
    check_content(path)
    return _RUNTIMES[path.suffix](path, threads, inner)


def _onnxruntime(path: Path, threads: int | None, inner: Sequence[str]) -> Opened:
    ort = need("onnxruntime")
    named: list[Any] = list(vars(ort.capi.onnxruntime_pybind11_state).values())
    failures: tuple[type[Exception], ...] = (RuntimeError,)
    failures += tuple(kind for kind in named if isinstance(kind, type) and issubclass(kind, Exception))
    source = _with_outputs(path, inner) if inner else path

    def opened(entry: str = "") -> Any:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if entry:
            options.add_session_config_entry(entry, "1")
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except failures as error:
            raise refused(path, "ONNX Runtime", error) from error

    entry = ""
    try:
        session = opened()
    except BadWeightsError:  # it makes integer operators of codes of other types too, and then refuses them
        session, entry = opened(UNFUSED), UNFUSED
    metadata = dict(session.get_modelmeta().custom_metadata_map)
    integers = AS_FLOAT if entry else None
    if not entry and saturates() and may_saturate(metadata):  # known only once it is open
        if own_settings(metadata):
            integers = SATURATE
        else:  # weights as unsigned codes, whose products ONNX Runtime adds without saturation
            session, entry = opened(PRECISE), PRECISE

    def port(value: Any) -> Port:
        kind = value.type.removeprefix("tensor(").removesuffix(")")
        sizes = tuple(size if isinstance(size, int) else None for size in value.shape)
        return Port(value.name, sizes, {"float": "float32", "double": "float64"}.get(kind, kind))

    inputs, outputs = ([port(value) for value in found()] for found in (session.get_inputs, session.get_outputs))
    names = [output.name for output in outputs]

    def run(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(names, session.run(names, values), strict=True))

    return Opened(run, inputs, outputs, metadata, f"onnxruntime {ort.__version__}", failures, entry, integers)


def _with_outputs(path: Path, inner: Sequence[str]) -> bytes:
    """An ONNX file with tensors inside its graph as further outputs."""
    onnx = need("onnx")
    model = onnx.load(str(path))
    known = [name for node in model.graph.node for name in node.output]
    for name in inner:
        if name not in known:
            raise UnknownNameError(f"tensor of {path}", name, known)
        model.graph.output.append(onnx.ValueInfoProto(name=name))
    return bytes(model.SerializeToString())


def _openvino(path: Path, threads: int | None, inner: Sequence[str]) -> Opened:
    openvino = need("openvino")
    try:
        model = openvino_core().read_model(path)
        known = {name for op in model.get_ordered_ops() for out in op.outputs() for name in out.names}
        for name in inner:
            if name not in known:
                raise UnknownNameError(f"tensor of {path}", name, known)
            model.add_outputs(name)
        info = model.get_rt_info("quantlens").value if model.has_rt_info("quantlens") else {}
        metadata = {key: str(getattr(value, "value", value)) for key, value in info.items()}
        own = own_settings(metadata)
        compiled = openvino_core().compile_model(model, "CPU", openvino_settings(threads, own, saturates()))
    except RuntimeError as error:
        raise refused(path, "OpenVINO", error) from error
    written = names_in(metadata.get("outputs", '["logits", "score"]')) if "plan" in metadata else []

    def port(value: Any, place: int, wanted: Sequence[str]) -> Port:  # OpenVINO calls a tensor by several names
        shape, names = value.partial_shape, [name for name in wanted if name in value.names]
        sizes = None
        if not shape.rank.is_dynamic:
            sizes = tuple(size.get_length() if size.is_static else None for size in shape)
        name = next(iter([*written[place : place + 1], *names, *sorted(value.names)]), f"tensor {place}")
        return Port(name, sizes, np.dtype(value.element_type.to_dtype()).name)

    outputs = [port(value, place, inner) for place, value in enumerate(model.outputs)]
    written = []
    inputs = [port(value, place, ["images"]) for place, value in enumerate(model.inputs)]
    into, names = {one.name: place for place, one in enumerate(inputs)}, [one.name for one in outputs]

    def run(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = compiled({into.get(name, name): value for name, value in values.items()})
        return dict(zip(names, found.to_tuple(), strict=True))

    version, here = openvino.__version__.split("-")[0], saturates() and (may_saturate(metadata) or not own)
    integers = None if not here else SATURATE if own else AS_FLOAT
    return Opened(run, inputs, outputs, metadata, f"openvino {version}", (RuntimeError,), integers=integers)


def _torch(path: Path, threads: int | None, inner: Sequence[str]) -> Opened:
    from quantlens.export.pt2 import open_pt2

    return open_pt2(path, threads)


_RUNTIMES = {".onnx": _onnxruntime, ".xml": _openvino, ".pt2": _torch}


__getattr__ = _moved.finder(__name__)
