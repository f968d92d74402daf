"""A figure as a file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from quantlens.errors import UnknownNameError
from quantlens.files import write_whole

FORMATS = ("pdf", "png", "svg")


class Figure:
    """A figure as a Vega-Lite specification. Notebooks show it."""

    def __init__(self, spec: dict[str, Any]):
        self.spec = spec

    def to_dict(self) -> dict[str, Any]:
        """The specification, with all values that are shown."""
        return self.spec

    def to_bytes(self, format: str) -> bytes:
        """As "pdf", "png" (at twice its size) or "svg". Raises UnknownNameError for another format."""
        import vl_convert

        if format not in FORMATS:
            raise UnknownNameError("format of a figure", format, FORMATS)
        if format == "svg":
            return str(vl_convert.vegalite_to_svg(self.spec)).encode()
        if format == "png":
            return bytes(vl_convert.vegalite_to_png(self.spec, scale=2))
        return bytes(vl_convert.vegalite_to_pdf(self.spec))

    def save(self, path: str | os.PathLike[str], format: str = "") -> Path:
        """Write it whole or not at all, by default in the format that the file's name ends in. Raises UnknownNameError
        for another format, StorageError."""
        target = Path(path)
        write_whole(target, self.to_bytes((format or target.suffix[1:]).lower()), what="the figure")
        return target

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        major = str(self.spec["$schema"]).rpartition("/v")[2].partition(".")[0]
        return {f"application/vnd.vegalite.v{major}+json": self.spec}
