"""ONNX and OpenVINO files of any maker, in their runtime."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantlens.errors import BadWeightsError, UnsupportedError, first_line
from quantlens.evaluation.foreign import Foreign
from quantlens.export.exported import Opened, open_file
from quantlens.export.runtimes import need

KINDS = {".onnx": "onnx", ".xml": "openvino"}


class ForeignFile(Foreign):
    """An .onnx or .xml file that another tool wrote. Its one input takes images: [B, 3, H, W] or [B, H, W, 3], float of
    any width (normalised), or uint8 (pixels, which the graph normalises itself). opened: the file, where it is open."""

    def __init__(
        self,
        path: str | Path,
        *,
        output: str | None = None,
        features: str | None = None,
        opened: Opened | None = None,
        **given: Any,
    ) -> None:
        self.path = Path(path)
        self._opened = open_file(self.path) if opened is None else opened
        there = {port.name for port in self._opened.outputs}
        inner = [name for name in (output, features) if name is not None and name not in there]
        if inner:
            self._opened = open_file(self.path, inner=inner)
        super().__init__(KINDS[self.path.suffix], self.path.stem, output=output, features=features, **given)
        files = files_of(self.path)
        self.size_mb = sum(file.stat().st_size for file in files) / 1e6
        self.foreign |= {"file": self.path.name, "sha256": sha256(files), "runtime": self._opened.runtime}
        self._look_at_input()
        self.learn()

    def _look_at_input(self) -> None:
        """How images go in. Raises UnsupportedError for inputs that are not images."""
        if len(self._opened.inputs) != 1:
            names = ", ".join(port.name for port in self._opened.inputs)
            raise UnsupportedError(
                f"{self.path} takes {len(self._opened.inputs)} inputs ({names}), and quantlens feeds images alone; "
                "export the part that takes images"
            )
        port = self._opened.inputs[0]
        shape = port.shape or (None, 3, None, None)
        sizes = f"{port.name} {['?' if size is None else size for size in shape]} {port.dtype}"
        self._last = len(shape) == 4 and shape[1] != 3 and shape[3] == 3
        if len(shape) != 4 or not (self._last or shape[1] in (3, None)):
            raise UnsupportedError(
                f"{self.path} takes {sizes}; quantlens feeds colour images [B, 3, H, W] or [B, H, W, 3]"
            )
        if port.dtype not in ("float32", "float16", "float64", "uint8"):
            raise UnsupportedError(f"{self.path} takes {sizes}; quantlens feeds float or uint8 images")
        self._dtype, self.fixed_batch = np.dtype(port.dtype), shape[0]
        self._size = (3, *(shape[1:3] if self._last else shape[2:]))
        expected = None if self.preprocess is None else self.preprocess.input_size
        if expected and any(size not in (None, own) for own, size in zip(expected, self._size, strict=True)):
            raise UnsupportedError(
                f"{self.path} takes images {list(self._size[1:])} and the float model's are {list(expected[1:])}; give "
                "the float model that it came from, or its preprocessing"
            )
        if self._dtype == np.uint8 and self.preprocess is None:
            raise UnsupportedError(
                f"{self.path} takes {sizes}, pixels that the graph normalises itself; name the float model it came "
                "from (reference=, --reference), or give its preprocessing"
            )
        layout = "NHWC" if self._last else "NCHW"
        self.foreign["input"] = f"{sizes} {layout}"

    def learn(self, size: Any = None) -> None:
        if None not in self._size:
            size = self._size
        super().learn(size)

    def named(self, images: Tensor) -> dict[str, Tensor]:
        values = images.cpu().float()
        if self._dtype == np.uint8 and self.preprocess is not None:  # back to the pixels that were normalised
            mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self.preprocess.mean, self.preprocess.std))
            values = ((values * std + mean) * 255).round().clamp(0, 255)
        if self._last:
            values = values.permute(0, 2, 3, 1)
        given = np.ascontiguousarray(values.numpy().astype(self._dtype))
        found = self._opened.run({self._opened.inputs[0].name: given})
        arrays = {name: np.asarray(value) for name, value in found.items()}
        return {name: torch.from_numpy(value.copy()) for name, value in arrays.items() if value.dtype.kind in "fiub"}

    def outputs(self, images: Tensor) -> Any:
        try:
            return super().outputs(images)
        except self._opened.failures as error:
            raise BadWeightsError(
                f"{self.path} cannot be run on images {list(images.shape)}: {first_line(error)}"
            ) from error


def files_of(path: Path) -> list[Path]:
    """The files of a model: an .xml has its weights in the .bin beside it, an .onnx may have some in others."""
    if path.suffix == ".xml":
        weights = path.with_suffix(".bin")
        return [path, *([weights] if weights.is_file() else [])]
    graph = need("onnx").load(str(path), load_external_data=False).graph
    places = (entry.value for tensor in graph.initializer for entry in tensor.external_data if entry.key == "location")
    return [path, *(path.parent / place for place in dict.fromkeys(places))]


def sha256(files: list[Path]) -> str:
    """SHA-256 of files one after the other: of a single one, what `sha256sum` prints."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
