"""Packed checkpoints: integer codes at their bit width, scales, what stays in float, and a header that describes
itself.

The file is safetensors. Its tensor ``header`` is JSON, compressed: format version, the graph, the sites' quantizers,
the rewrites done, the plan's info (method, options, seed, calibration images, checkpoint SHA-256), the preprocessing,
and which tensors lie one after the other in the tensor ``small``. Loading needs neither timm nor the model's class,
executes nothing from the file, and gives bit-equal logits. Its metadata holds a digest of header and tensors: a file
that does not match it is rejected.
"""

import hashlib
import json
import warnings
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantlens._version import __version__
from quantlens.ambient import check_device, isolated
from quantlens.data import Preprocess
from quantlens.errors import BadWeightsError, QuantlensError, QuantlensWarning, StorageError
from quantlens.files import write_whole
from quantlens.formats import restore
from quantlens.graph import Graph
from quantlens.graph.serialize import graph_from_dict, graph_to_dict
from quantlens.qmodel.hub import find_checkpoint
from quantlens.qmodel.model import QuantizedModel
from quantlens.qmodel.plan import Plan

FORMAT = "quantlens"
VERSION = 3
"""1 had no integer operators; 2 had its header in the metadata, and no tensor ``small``. Both are read."""

SAME = "same_as"
"""In place of a quantizer's configuration: another edge, whose quantizer it is."""

STEP = ("factor", "shift")
"""What is kept of each step of :attr:`quantlens.graph.Graph.axes`."""

SMALL = 1 << 16
"""Bytes below which a tensor shares one with others: its entry of its own would take as much room as its values."""


def pack(codes: Tensor, bits: int) -> Tensor:
    """Integer codes (any shape, signed or not) -> uint8 [ceil(n·bits/8)], each code in ``bits`` bits, least
    significant first."""
    flat = codes.reshape(-1).cpu().numpy().astype("<u2")  # two's complement
    stream = np.unpackbits(flat.view(np.uint8).reshape(-1, 2), axis=1, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(stream, bitorder="little"))


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...], *, signed: bool) -> Tensor:
    """The inverse of :func:`pack`: int32 codes of ``shape``. Raises BadWeightsError if the length does not fit."""
    count = int(np.prod(shape, dtype=np.int64))
    if packed.dtype != torch.uint8 or packed.numel() != -(-count * bits // 8):
        raise BadWeightsError(
            f"packed codes of length {packed.numel()} do not hold {count} codes of {bits} bits; the file is damaged"
        )
    stream = np.unpackbits(packed.cpu().numpy(), count=count * bits, bitorder="little")
    wide = np.zeros((count, 8 if bits <= 8 else 16), np.uint8)
    wide[:, :bits] = stream.reshape(count, bits)
    codes = np.packbits(wide, bitorder="little").view("u1" if bits <= 8 else "<u2").astype(np.int32)
    if signed:
        codes -= codes >> (bits - 1) << bits
    return torch.from_numpy(codes).reshape(shape)


def check_name(path: str | Path) -> Path:
    """The path of a checkpoint to be written. Raises StorageError for another ending than .safetensors."""
    if Path(path).suffix != ".safetensors":
        raise StorageError(f"{path}: quantized checkpoints end in .safetensors; give it a name that does")
    return Path(path)


@isolated
def save(qmodel: QuantizedModel, path: str | Path) -> Path:
    """Write ``qmodel`` to a .safetensors file, whole or not at all. Returns the path.

    Raises StorageError when the file cannot be written (no room, no permission).
    """
    from safetensors.torch import save as to_bytes

    path = check_name(path)
    if not isinstance(qmodel, QuantizedModel):
        raise QuantlensError(f"a {type(qmodel).__name__} cannot be saved; give a model that ql.quantize gives")
    tensors, header = _content(qmodel)
    text = json.dumps(header)
    packed = {name: value for name, value in tensors.items() if name not in header["small"]}
    if header["small"]:
        packed["small"] = torch.cat([_as_bytes(tensors[name]) for name in header["small"]])
    packed["header"] = torch.frombuffer(bytearray(zlib.compress(text.encode())), dtype=torch.uint8)
    version = json.dumps({"version": VERSION})  # what earlier releases look for
    return write_whole(
        path, to_bytes(packed, {"format": FORMAT, "header": version, "sha256": digest_of(text, tensors)})
    )


def digest_of(header: str, tensors: dict[str, Tensor]) -> str:
    """SHA-256, in hexadecimal, of a header and of every tensor with its name, type and shape."""
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"\n{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(_as_bytes(value).numpy().tobytes())
    return digest.hexdigest()


def plan_digest(qmodel: QuantizedModel) -> str:
    """SHA-256, in hexadecimal, of a plan and the numbers that it is about: quantizers and operators with their
    parameters, quantized weights, and the tensors that stay in float. It is that of the checkpoint, too, and says
    nothing of how or when the model was made. One tensor is in memory at a time."""
    graph, plan, uses = qmodel.graph, qmodel.plan, qmodel.weight_uses()
    digest = hashlib.sha256()

    def add(name: str, tensors: dict[str, Tensor], config: Any = None) -> None:
        digest.update(digest_of(f"{name} {json.dumps(config, sort_keys=True)}", tensors).encode())

    parts: dict[str, Any] = {**plan.quantizers, **{f"operator {name}": one for name, one in plan.operators.items()}}
    for name, part in sorted(parts.items()):
        add(name, part.tensors(), part.config())
    with torch.no_grad():
        for name in sorted(graph.tensors()):
            value = graph.tensor(name)
            for key, quantizer in uses.get(name, [("", None)]):
                add(f"{name} {key}", {"": value if quantizer is None else quantizer(value) + 0.0})  # -0.0 is 0.0
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
    graph, plan = qmodel.graph, qmodel.plan
    readers = Counter(str(n.target) for n in graph.fx.nodes if n.op == "get_attr" for _ in n.users)
    tensors: dict[str, Tensor] = {}
    weights: dict[str, dict[str, Any]] = {}
    uses = qmodel.weight_uses()
    for name, ((key, quantizer), *others) in uses.items():
        if readers[name] == 1 + len(others) and all(q is quantizer for _, q in others):  # else it stays in float
            weights[key] = {"tensor": name, "shape": list(graph.tensor(name).shape)}
            tensors[f"codes/{key}"] = pack(quantizer.encode(graph.tensor(name)), quantizer.bits)
    packed = {w["tensor"] for w in weights.values()}
    tensors |= {f"float/{k}": v for k, v in graph.tensors().items() if k not in packed}
    same = {key: one[0][0] for one in uses.values() for key, q in one[1:] if q is one[0][1]}
    parts = {f"quantizer/{k}": q for k, q in plan.quantizers.items() if k not in same}
    parts |= {f"operator/{k}": o for k, o in plan.operators.items()}  # type: ignore[misc]
    tensors |= {f"{owner}/{name}": v for owner, part in parts.items() for name, v in part.tensors().items()}
    axes = {name: len(steps) for name, steps in graph.axes.items()}
    for name, steps in graph.axes.items():
        for n, step in enumerate(steps):
            tensors |= {f"axes/{name}/{n}/{what}": value for what, value in zip(STEP, step, strict=True)}
    header = {
        "version": VERSION,
        "quantlens": __version__,
        "graph": graph_to_dict(graph),
        "structure": graph.structure.to_dict(),
        **({"axes": axes} if axes else {}),
        "quantizers": {k: {SAME: same[k]} if k in same else q.config() for k, q in plan.quantizers.items()},
        "operators": {name: o.config() for name, o in plan.operators.items()},
        "weights": weights,
        "rewrites": plan.rewrites,
        "info": dict(plan.info),
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
        path.open("rb").close()
        with safe_open(path, "pt") as stream:
            metadata = stream.metadata() or {}
            text = metadata.get("header", "")
            if metadata.get("format") == FORMAT and "header" in stream.keys():  # noqa: SIM118
                text = zlib.decompress(stream.get_tensor("header").numpy().tobytes()).decode()
        header = json.loads(text) if metadata.get("format") == FORMAT else None
    except PermissionError as error:
        raise BadWeightsError(f"{path} cannot be read: you have no permission to") from error
    except Exception as error:
        raise BadWeightsError(f"{path} is damaged or no safetensors file: {error}") from error
    if not isinstance(header, dict):
        raise BadWeightsError(
            f"{path} is a safetensors file but no quantized checkpoint of quantlens; make one with `quantlens quantize`"
        )
    if header.get("version") not in range(1, VERSION + 1):
        raise BadWeightsError(
            f"{path} has checkpoint version {header.get('version')}; this quantlens reads versions 1 to {VERSION}"
        )
    return header, text, metadata.get("sha256")


def _found(name: str | Path) -> Path:
    """The file that a name means, as :func:`quantlens.qmodel.hub.find_checkpoint` finds it."""
    found = find_checkpoint(name)
    if found is None and (str(name).startswith("hf:") or Path(name).is_dir()):
        raise BadWeightsError(f"{name} holds no quantized checkpoint of quantlens; `ql.load_model` loads float models")
    return found or Path(name)


def _renamed(graph: Graph, key: str) -> str:
    """The key of an edge, whose site has another name in files of earlier releases."""
    site, _, name = key.rpartition(".")
    return key if key in graph.sites.edges else f"{graph.sites.former.get(site, site)}.{name}"


@isolated
def load(path: str | Path, *, device: str | torch.device = "cpu") -> QuantizedModel:
    """Read a quantized checkpoint. Logits are bit-equal to those of the model that was saved (on the same device).

    path: a file, a folder that holds one, or ``hf:user/repo`` on the Hugging Face hub (``hf:user/repo/FILE``,
    ``hf:user/repo@revision``). Raises BadWeightsError: not a quantized checkpoint, another version, damaged content, a
    repository that cannot be read.
    """
    from safetensors.torch import load_file

    check_device(device)
    path = _found(path)
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

    def own(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    try:
        quantizers: dict[str, Any] = {}
        for k, config in header["quantizers"].items():
            quantizers[k] = quantizers[config[SAME]] if SAME in config else restore(config, own(f"quantizer/{k}/"))
        operators = {k: restore(config, own(f"operator/{k}/")) for k, config in header.get("operators", {}).items()}
        values = own("float/")
        for key, weight in header["weights"].items():
            q = quantizers[key]
            codes = unpack(tensors[f"codes/{key}"], q.bits, tuple(weight["shape"]), signed=q.signed)
            values[weight["tensor"]] = q.decode(codes)
        graph = graph_from_dict(header["graph"], values, header.get("structure"))
        for name, count in header.get("axes", {}).items():
            steps = ([tensors[f"axes/{name}/{n}/{what}"] for what in STEP] for n in range(count))
            graph.axes[name] = tuple((factor, shift) for factor, shift in steps)
        quantizers = {_renamed(graph, k): q for k, q in quantizers.items()}
        plan = Plan.restore(quantizers, list(header["rewrites"]), header["info"], operators)
        model = QuantizedModel(graph, plan, preprocess=Preprocess.from_dict(header["preprocess"]))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise BadWeightsError(f"{path} is damaged: {type(error).__name__} {error}") from error
    return model.to(device)
