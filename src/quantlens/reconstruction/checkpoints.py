"""Finished units on disk, so that a killed reconstruction goes on where it was."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as pack
from torch import Tensor

from quantlens.calibration import Calibration
from quantlens.files import check_writable, write_whole
from quantlens.formats import Quantizer, restore
from quantlens.graph import Graph
from quantlens.qmodel import Plan
from quantlens.reconstruction.settings import Result, UnitReport
from quantlens.reconstruction.units import Unit

VERSION = 1
"""Part of every checkpoint's fingerprint; raise it when results change."""


class Checkpoint:
    """Finished units in a folder, one safetensors file each, written atomically and keyed by a fingerprint of all
    that determines them. Raises StorageError for a folder that cannot be written."""

    def __init__(
        self,
        folder: Path | str,
        graph: Graph,
        plan: Plan,
        calibration: Calibration,
        settings: Any,
        seed: int,
        reference: Graph | None = None,
    ):
        self.folder = Path(folder)
        check_writable(self.folder / "unit")
        self.key = fingerprint(graph, plan.quantizers, calibration, settings, seed, reference)

    def _path(self, index: int, unit: Unit) -> Path:
        return self.folder / f"{index:03d}-{re.sub(r'[^A-Za-z0-9._-]+', '_', unit.name)}.safetensors"

    def read(self, index: int, unit: Unit) -> Result | None:
        """A stored unit; None if there is none that fits, or the file is damaged."""
        try:
            with safe_open(str(self._path(index, unit)), "pt") as file:
                about = file.metadata() or {}
                if about.get("fingerprint") != self.key:
                    return None
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            record = json.loads(about["record"])
        except (SafetensorError, OSError, KeyError, ValueError):
            return None

        def parts(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        made = [restore(config, parts(f"q{number}.")) for number, config in enumerate(record["formats"])]
        quantizers = {key: made[number] for key, number in record["quantizers"].items()}
        return Result(UnitReport(**record["report"]), parts("w."), quantizers)

    def write(self, index: int, unit: Unit, result: Result) -> None:
        """Store a unit; edges that share a quantizer share it again when it is read."""
        made = list({id(q): q for q in result.quantizers.values()}.values())
        numbers = {id(q): number for number, q in enumerate(made)}
        tensors = {f"w.{name}": value for name, value in result.tensors.items()}
        tensors |= {f"q{number}.{k}": v for number, q in enumerate(made) for k, v in q.tensors().items()}
        record = {
            "report": asdict(result.report),
            "formats": [q.config() for q in made],
            "quantizers": {key: numbers[id(q)] for key, q in result.quantizers.items()},
        }
        content = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        write_whole(self._path(index, unit), pack(content, {"fingerprint": self.key, "record": json.dumps(record)}))


def fingerprint(
    graph: Graph,
    quantizers: Mapping[str, Quantizer],
    calibration: Calibration,
    settings: Any,
    seed: int,
    reference: Graph | None = None,
) -> str:
    """Hex digest of everything that determines a reconstruction: graph, reference, quantizers, images,
    settings (a dataclass), seed, torch's version and the kind of device. A loss with a state counts by
    ``loss.state()``."""
    digest = hashlib.sha256()

    def add(*values: Any) -> None:
        for value in values:
            if isinstance(value, Tensor):
                add(str(value.dtype), str(tuple(value.shape)))
                digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            else:
                text = str(value).encode()
                digest.update(f"{len(text)}:".encode() + text)

    add(VERSION, torch.__version__, graph.device.type, seed)
    for part in (graph, reference):
        if part is not None:
            for node in part.fx.nodes:
                add(node.op, node.target, node.args, node.kwargs)
            for name, tensor in part.tensors().items():
                add(name, tensor)
    shared: dict[int, int] = {}
    for key, quantizer in sorted(quantizers.items()):
        add(key, json.dumps(quantizer.config(), sort_keys=True), shared.setdefault(id(quantizer), len(shared)))
        for name, tensor in sorted(quantizer.tensors().items()):
            add(name, tensor)
    for item in fields(settings):
        value = getattr(settings, item.name)
        for name, tensor in sorted(getattr(value, "state", dict)().items()):
            add(item.name, name, tensor)
        if callable(value):
            code = getattr(value, "__code__", None)
            extra = (code.co_code.hex(), code.co_consts) if code is not None else ()
            value = (getattr(value, "__module__", ""), getattr(value, "__qualname__", repr(type(value))), *extra)
        add(item.name, value)
    for chunk in calibration:
        add(chunk)
    return digest.hexdigest()
