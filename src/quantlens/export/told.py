"""What `quantlens export` tells of a file: what its weights take, and what could be checked where nothing runs it."""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

from quantlens.errors import BadWeightsError
from quantlens.export.exported import files_of
from quantlens.export.onnx_codes import OPSET, WIDTHS, held_types, is_integer
from quantlens.export.verify import verify
from quantlens.formats import Quantizer
from quantlens.qmodel import QuantizedModel
from quantlens.qmodel.plan import target_named


class Stored(NamedTuple):
    """What the weights of one kind take: how many values, and bytes with their scales and zero points."""

    values: int
    size: int


def weight_sizes(
    qmodel: QuantizedModel, path: Path, opset: int | None = None, *, half: bool = False
) -> dict[str, Stored]:
    """Type of the codes in a file ("int4") -> :class:`Stored`; "float32" and "float16" of all that is no code. opset,
    half: as it was exported with."""
    values, sizes, coded = Counter[str](), Counter[str](), set()
    for edge, quantizer in qmodel.weight_edges():
        name = str(edge.value.target)
        kinds, weight = _kinds(quantizer, path.suffix, opset), qmodel.graph.tensor(name)
        if kinds and weight.dim() > 1:
            coded.add(name)
            values[kinds[0].lower()] += weight.numel()
            width, wide = WIDTHS.get(kinds[0], 8), path.suffix == ".pt2"
            size = -(-weight.numel() * width // 8) + _parameter_bytes(quantizer, 32 if wide else width, half=half)
            sizes[kinds[0].lower()] += size
    norms = {str(n.target) for site in qmodel.graph.sites.of_kind("layer_norm") for n in site.node.all_input_nodes}
    for name, tensor in qmodel.graph.tensors().items():
        if tensor.is_floating_point() and name not in coded:
            kind, each = ("float16", 2) if half and name not in norms else ("float32", 4)
            values[kind] += tensor.numel()
            sizes[kind] += each * tensor.numel()
    return {kind: Stored(values[kind], sizes[kind]) for kind in values}


def _parameter_bytes(quantizer: Quantizer, width: int, *, half: bool) -> int:
    """Of scales and, of a format without blocks, zero points of a width."""
    held = quantizer.tensors()
    scales = held["scale"].nbytes // (1 + half) if "scale" in held else 0
    return scales + (held["scale_codes"].nbytes if "scale_codes" in held else -(-held["scale"].numel() * width // 8))


def weights_sentence(qmodel: QuantizedModel, path: Path, opset: int | None = None, *, half: bool = False) -> str:
    """One sentence of the same."""
    said = [
        f"{one.values} {kind} in {one.size / 1e6:.3f} MB ({one.size / one.values:.2f} bytes each)"
        for kind, one in weight_sizes(qmodel, path, opset, half=half).items()
        if one.values
    ]
    return f"weights: {', '.join(said)}"


def _kinds(quantizer: Quantizer, suffix: str, opset: int | None) -> tuple[str, ...]:
    if suffix == ".pt2":
        from quantlens.export.pt2 import STANDARD

        return (str(quantizer.code_dtype).removeprefix("torch."),) if is_integer(quantizer, STANDARD) else ()
    return held_types(quantizer, (opset or OPSET) if suffix == ".onnx" else None, weight=True)


def unrun(path: Path, qmodel: QuantizedModel, error: BadWeightsError) -> list[str]:
    """Sentences on a file that was written and that its runtime refuses. Raises the error again where it is another."""
    if " cannot be run by " not in str(error):
        raise error
    size = sum(file.stat().st_size for file in files_of(path)) / 1e6
    return [
        f"{path}: {qmodel.name} {qmodel.bits}, {size:.2f} MB",
        f"not run: {cannot_run(error)}; read back, {verify(path, qmodel).sentences()[0]}",
    ]


def cannot_run(error: BadWeightsError) -> str:
    """The runtime and its reason, of what opening a file raised."""
    return str(error).partition(" cannot be run by ")[2] or str(error)


def untried(qmodel: QuantizedModel) -> dict[str, str]:
    """What a file's metadata say, where its target is a machine that nobody ran such a file on; else nothing."""
    target = target_named(qmodel.plan.info.get("options", {}).get("target"))
    if target is None or not target.untried:
        return {}
    return {
        "untried": f"never run on {target.untried}; checked by ONNX's checker and shape inference, by ONNX Runtime on "
        "a CPU, and by tests of what the documentation asks for"
    }


def multiplies_bytes(qmodel: QuantizedModel) -> bool:
    """Whether weights of 8 bits meet activations of 8 bits or fewer."""
    inputs = [q for key, q in qmodel.plan.quantizers.items() if not qmodel.graph.sites.edges[key].is_weight]
    return any(q.bits > 7 for _, q in qmodel.weight_edges()) and any(q.bits <= 8 for q in inputs)
