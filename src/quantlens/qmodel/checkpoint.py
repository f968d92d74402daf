"""Packed checkpoints: integer codes at their bit width, scales, what stays in float, and a header that describes
itself.

The file is safetensors. Its tensor ``header`` is JSON, compressed: format version, the graph, the sites' quantizers,
the rewrites done, the plan's info (method, options, seed, calibration images, checkpoint SHA-256), the preprocessing,
and which tensors lie one after the other in the tensor ``small``. Loading needs neither timm nor the model's class,
executes nothing from the file, and gives bit-equal logits. Its metadata holds a digest of header and tensors: a file
that does not match it is rejected.
"""

from __future__ import annotations

import hashlib
import json
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantlens._version import __version__
from quantlens.ambient import isolated
from quantlens.data import Preprocess
from quantlens.errors import BadWeightsError, QuantlensWarning, StorageError
from quantlens.files import write_whole
from quantlens.formats import restore
from quantlens.graph.serialize import graph_from_dict, graph_to_dict
from quantlens.qmodel.model import QuantizedModel
from quantlens.qmodel.plan import Plan

FORMAT = "quantlens"
VERSION = 3
"""1 had no integer operators; 2 had its header in the metadata, and no tensor ``small``. Both are read."""

SMALL = 1 << 16
"""Bytes below which a tensor shares one with others: its entry of its own would take as much room as its values."""


def pack(codes: Tensor, bits: int) -> Tensor:
    """Integer codes (any shape, signed or not) -> uint8 [ceil(n·bits/8)], each code in ``bits`` bits, least
    significant first."""
    flat = codes.reshape(-1).to(torch.int64).cpu().numpy() & ((1 << bits) - 1)
    if 8 % bits == 0:  # a byte holds whole codes
        each = 8 // bits
        packed = np.zeros(-(-len(flat) // each), np.uint8)
        for place in range(each):
            part = flat[place::each].astype(np.uint8)
            packed[: len(part)] |= part << np.uint8(place * bits)
        return torch.from_numpy(packed)
    shifts = np.arange(bits, dtype=np.int64)
    stream = ((flat[:, None] >> shifts) & 1).astype(np.uint8).reshape(-1)
    return torch.from_numpy(np.packbits(stream, bitorder="little"))


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...], *, signed: bool) -> Tensor:
    """The inverse of :func:`pack`: int32 codes of ``shape``. Raises BadWeightsError if the length does not fit."""
    count = int(np.prod(shape, dtype=np.int64))
    if packed.dtype != torch.uint8 or packed.numel() != -(-count * bits // 8):
        raise BadWeightsError(
            f"packed codes of length {packed.numel()} do not hold {count} codes of {bits} bits; the file is damaged"
        )
    if 8 % bits == 0:
        codes, each = np.empty(packed.numel() * 8 // bits, np.int32), 8 // bits
        for place in range(each):
            codes[place::each] = packed.cpu().numpy() >> np.uint8(place * bits) & np.uint8((1 << bits) - 1)
        codes = codes[:count]
    else:
        stream = np.unpackbits(packed.cpu().numpy(), count=count * bits, bitorder="little").reshape(count, bits)
        codes = stream.astype(np.int32) @ (1 << np.arange(bits, dtype=np.int32))
    if signed:
        codes = np.where(codes >= 1 << (bits - 1), codes - (1 << bits), codes)
    return torch.from_numpy(codes.astype(np.int32)).reshape(shape)


@isolated
def save(qmodel: QuantizedModel, path: str | Path) -> Path:
    """Write ``qmodel`` to a .safetensors file, whole or not at all. Returns the path.

    Raises StorageError when the file cannot be written (no room, no permission).
    """
    from safetensors.torch import save as to_bytes

    path = Path(path)
    if path.suffix != ".safetensors":
        raise StorageError(f"{path}: quantized checkpoints end in .safetensors")
    tensors, header = _content(qmodel)
    text = json.dumps(header)
    packed = {name: value for name, value in tensors.items() if name not in header["small"]}
    if header["small"]:
        packed["small"] = torch.cat([_as_bytes(tensors[name]) for name in header["small"]])
    packed["header"] = torch.frombuffer(bytearray(zlib.compress(text.encode())), dtype=torch.uint8)
    version = json.dumps({"version": VERSION})  # what earlier releases look for
    content = to_bytes(packed, {"format": FORMAT, "header": version, "sha256": digest_of(text, tensors)})
    write_whole(path, content)
    return path


def digest_of(header: str, tensors: dict[str, Tensor]) -> str:
    """SHA-256, in hexadecimal, of a header and of every tensor with its name, type and shape."""
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"\n{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(_as_bytes(value).numpy().tobytes())
    return digest.hexdigest()


def _as_bytes(tensor: Tensor) -> Tensor:
    """A tensor on the CPU as uint8 [bytes]."""
    return tensor.reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)


def _split(small: Tensor, about: dict[str, list[Any]]) -> dict[str, Tensor]:
    """The tensors that lie one after the other in ``small`` uint8 [bytes]. about: name -> [type, shape]. Raises
    ValueError where they do not."""
    sizes = [getattr(torch, kind).itemsize * int(np.prod(shape, dtype=np.int64)) for kind, shape in about.values()]
    parts = small.split(sizes)
    return {
        name: part.clone().view(getattr(torch, kind)).reshape(shape)
        for (name, (kind, shape)), part in zip(about.items(), parts, strict=True)
    }


def _content(qmodel: QuantizedModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
    graph = qmodel.graph
    tensors: dict[str, Tensor] = {}
    weights: dict[str, dict[str, Any]] = {}
    by_weight: dict[str, str] = {}
    for edge, quantizer in qmodel.weight_edges():
        name = str(edge.value.target)
        weight = graph.tensor(name)
        if name in by_weight:  # two sites share one weight: keep the float values, both quantize them again
            weights.pop(by_weight[name], None)
            tensors[f"float/{name}"] = weight
            continue
        by_weight[name] = edge.key
        weights[edge.key] = {"tensor": name, "shape": list(weight.shape)}
        tensors[f"codes/{edge.key}"] = pack(quantizer.encode(weight), quantizer.bits)
    packed = {w["tensor"] for w in weights.values()}
    tensors |= {f"float/{k}": v for k, v in graph.tensors().items() if k not in packed}
    for key, quantizer in qmodel.plan.quantizers.items():
        tensors |= {f"quantizer/{key}/{name}": value for name, value in quantizer.tensors().items()}
    for name, operator in qmodel.plan.operators.items():
        tensors |= {f"operator/{name}/{key}": value for key, value in operator.tensors().items()}
    header = {
        "version": VERSION,
        "quantlens": __version__,
        "graph": graph_to_dict(graph),
        "quantizers": {key: q.config() for key, q in qmodel.plan.quantizers.items()},
        "operators": {name: o.config() for name, o in qmodel.plan.operators.items()},
        "weights": weights,
        "rewrites": qmodel.plan.rewrites,
        "info": dict(qmodel.plan.info),
        "preprocess": qmodel.preprocess.to_dict(),
    }
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    small = {k: [str(v.dtype).removeprefix("torch."), list(v.shape)] for k, v in tensors.items() if v.nbytes < SMALL}
    return tensors, header | {"small": small}


def read_header(path: str | Path) -> dict[str, Any]:
    """The header of a quantized checkpoint, without its tensors. Raises BadWeightsError if the file is none."""
    return _described(Path(path))[0]


def _described(path: Path) -> tuple[dict[str, Any], str, str | None]:
    """A checkpoint's header, as it is and as text, and its digest (None: earlier releases kept none)."""
    from safetensors import safe_open

    if not path.is_file():
        raise BadWeightsError(f"no quantized checkpoint at {path}")
    try:
        with path.open("rb"):
            pass
        with safe_open(path, "pt") as stream:
            metadata = stream.metadata() or {}
            text = metadata.get("header", "")
            if metadata.get("format") == FORMAT and "header" in stream.keys():  # noqa: SIM118
                text = zlib.decompress(stream.get_tensor("header").numpy().tobytes()).decode()
    except PermissionError as error:
        raise BadWeightsError(f"{path} cannot be read: you have no permission to") from error
    except Exception as error:
        raise BadWeightsError(f"{path} is damaged or no safetensors file: {error}") from error
    try:
        header = json.loads(text) if metadata.get("format") == FORMAT else None
    except ValueError as error:
        raise BadWeightsError(f"{path} is damaged: its header cannot be read ({error})") from error
    if not isinstance(header, dict):
        raise BadWeightsError(
            f"{path} is a safetensors file but no quantized checkpoint of quantlens; make one with `quantlens quantize`"
        )
    if header.get("version") not in range(1, VERSION + 1):
        raise BadWeightsError(
            f"{path} has checkpoint version {header.get('version')}; this quantlens reads versions 1 to {VERSION}"
        )
    return header, text, metadata.get("sha256")


def is_quantized_checkpoint(path: str | Path) -> bool:
    """Whether ``path`` is a file written by :func:`save`."""
    try:
        read_header(path)
    except BadWeightsError:
        return False
    return True


@isolated
def load(path: str | Path, *, device: str | torch.device = "cpu") -> QuantizedModel:
    """Read a quantized checkpoint. Logits are bit-equal to those of the model that was saved (on the same device).

    Raises BadWeightsError: not a quantized checkpoint, another version, damaged content.
    """
    from safetensors.torch import load_file

    path = Path(path)
    header, text, digest = _described(path)
    try:
        tensors = load_file(path)
        tensors.pop("header", None)
        tensors |= _split(tensors.pop("small", torch.empty(0, dtype=torch.uint8)), header.get("small", {}))
    except Exception as error:
        raise BadWeightsError(f"{path} is damaged: {type(error).__name__} {error}") from error
    if digest is None:
        text = f"{path} was saved without a digest (quantlens 0.2 or earlier): not checked"
        warnings.warn(text, QuantlensWarning, stacklevel=3)
    elif digest != digest_of(text, tensors):
        raise BadWeightsError(f"{path} is damaged: its content does not match its digest; copy or make it again")
    try:
        own = _by_owner(tensors)
        quantizers = {k: restore(config, own.get(f"quantizer/{k}", {})) for k, config in header["quantizers"].items()}
        operators = {
            k: restore(config, own.get(f"operator/{k}", {})) for k, config in header.get("operators", {}).items()
        }
        values = {k.removeprefix("float/"): v for k, v in tensors.items() if k.startswith("float/")}
        for key, weight in header["weights"].items():
            q = quantizers[key]
            codes = unpack(tensors[f"codes/{key}"], q.bits, tuple(weight["shape"]), signed=q.signed)
            values[weight["tensor"]] = q.decode(codes)
        graph = graph_from_dict(header["graph"], values)
        plan = Plan.restore(quantizers, list(header["rewrites"]), header["info"], operators)
        model = QuantizedModel(graph, plan, preprocess=Preprocess.from_dict(header["preprocess"]))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise BadWeightsError(f"{path} is damaged: {type(error).__name__} {error}") from error
    return model.to(device)


def _by_owner(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors named ``owner/name`` by owner, which may hold slashes itself."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        owner, _, name = key.rpartition("/")
        found.setdefault(owner, {})[name] = value
    return found
