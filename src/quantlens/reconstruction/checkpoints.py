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
from quantlens.errors import StorageError
from quantlens.files import write_whole
from quantlens.formats import Quantizer, restore
from quantlens.graph import Graph
from quantlens.qmodel import Plan
from quantlens.reconstruction.settings import Result, UnitReport
from quantlens.reconstruction.units import Unit

VERSION = 1
"""Part of every checkpoint's fingerprint; raise it when results change."""


class Checkpoint:
    """Finished units in a folder, one safetensors file each, written atomically and keyed by a fingerprint of all
    that determines them."""

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
        self.folder = made_folder(folder)
        self.key = fingerprint(graph, plan.quantizers, calibration, settings, seed, reference)

    def _path(self, index: int, unit: Unit) -> Path:
        return self.folder / f"{index:03d}-{re.sub(r'[^A-Za-z0-9._-]+', '_', unit.name)}.safetensors"

    def read(self, index: int, unit: Unit) -> Result | None:
        """A stored unit; None if there is none that fits, or the file is damaged."""
        found = stored(self._path(index, unit), self.key)
        if found is None:
            return None
        tensors, record = found
        made: list[Quantizer] = []
        for number, config in enumerate(record["formats"]):
            prefix = f"q{number}."
            made.append(restore(config, {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}))
        report = {**record["report"], "rounds": tuple(record["report"]["rounds"])}
        return Result(
            UnitReport(**report),
            {k[2:]: v for k, v in tensors.items() if k.startswith("w.")},
            {key: made[number] for key, number in record["quantizers"].items()},
        )

    def write(self, index: int, unit: Unit, result: Result) -> None:
        tensors = {f"w.{k}": v.detach().cpu().contiguous() for k, v in result.tensors.items()}
        numbers: dict[int, int] = {}
        configs: list[dict[str, Any]] = []
        for quantizer in result.quantizers.values():
            if id(quantizer) not in numbers:
                numbers[id(quantizer)] = number = len(configs)
                configs.append(quantizer.config())
                tensors |= {f"q{number}.{k}": v.cpu().contiguous() for k, v in quantizer.tensors().items()}
        record = {
            "report": {**asdict(result.report), "rounds": list(result.report.rounds)},
            "formats": configs,
            "quantizers": {key: numbers[id(q)] for key, q in result.quantizers.items()},
        }
        store(self._path(index, unit), self.key, tensors, record)


def made_folder(folder: Path | str) -> Path:
    """The folder, made where it is absent. Raises StorageError where it cannot be."""
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make the folder {path}: {error.strerror}") from error
    return path


def store(path: Path, key: str, tensors: dict[str, Tensor], record: Mapping[str, Any]) -> None:
    """Write a file whole or not at all."""
    write_whole(path, pack(tensors, {"fingerprint": key, "record": json.dumps(record)}))


def stored(path: Path, key: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What :func:`store` wrote under that key; None without such a file, or with a damaged one."""
    if not path.exists():
        return None
    try:
        with safe_open(str(path), "pt") as file:
            about = file.metadata() or {}
            if about.get("fingerprint") != key:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, json.loads(about["record"])
    except (SafetensorError, OSError, KeyError, ValueError):
        return None


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
    for key in sorted(quantizers):
        quantizer = quantizers[key]
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
        elif isinstance(value, Mapping):
            for name in sorted(value):
                add(item.name, name, value[name])
            continue
        add(item.name, value)
    for chunk in calibration:
        add(chunk)
    return digest.hexdigest()
