"""Whether an exported file holds the integers of a checkpoint: codes, scales and zero points, site by site."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from quantlens.ambient import isolated
from quantlens.errors import BadWeightsError
from quantlens.export.digest import DAMAGED, check_content, matches
from quantlens.export.exported import files_of
from quantlens.export.integers import Contents, Held, read_onnx, read_openvino, read_pt2
from quantlens.export.onnx_codes import held_types, is_integer
from quantlens.files import mistaken
from quantlens.formats import Blocks
from quantlens.qmodel import QuantizedModel, float_model
from quantlens.qmodel.checkpoint import load, plan_digest

SHOWN = 4
"""Names of sites in a sentence, at most."""


class Difference(NamedTuple):
    """A site at which a file and a checkpoint differ: the edge, and what is different, in words."""

    site: str
    edge: str
    what: str


class Verification(NamedTuple):
    """What :func:`verify` found. equal: sites whose integers, scales and zero points are the same. different: those
    that are not, in the order of the model. in_float: sites without integers in the file; simulated: those of them
    that the checkpoint quantizes, which the file computes in float operations. digest: of the plan, as the file and
    the checkpoint say it; None: the file does not. intact: whether the file is as it was written (None: not known)."""

    file: str
    checkpoint: str
    equal: list[str]
    different: list[Difference]
    in_float: list[str]
    simulated: list[str]
    digest: dict[str, str | None]
    intact: bool | None

    @property
    def ok(self) -> bool:
        return not self.different and self.intact is not False and not self.another

    @property
    def another(self) -> bool:
        """Whether the file says that it was exported from another checkpoint."""
        return self.digest["file"] not in (None, self.digest["checkpoint"])

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, **self._asdict(), "different": [one._asdict() for one in self.different]}

    def sentences(self) -> list[str]:
        """What was found, for a person; first what is wrong."""
        said, all_sites = [], len(self.equal) + len(self.different)
        if self.another:
            own, other = (str(self.digest[name])[:12] for name in ("file", "checkpoint"))
            said.append(
                f"{self.file} was exported from another checkpoint than {self.checkpoint}: its plan's digest is "
                f"{own}…, not {other}…"
            )
        if self.intact is False:
            said.append(f"{self.file} is not as it was written: {DAMAGED}")
        if self.different:
            first = self.different[0]
            said.append(f"first difference: {first.edge}: {first.what}")
        same = f"{len(self.equal)} of {all_sites} sites that are quantized agree in codes, scales and zero points"
        said.append(same if all_sites else "no site has codes that could be compared")
        plain = [name for name in self.in_float if name not in self.simulated]
        for what, names in (("quantized, but written as float operations", self.simulated), ("in float", plain)):
            if names:
                shown = f"{', '.join(names[:SHOWN])}{', …' if len(names) > SHOWN else ''}"
                said.append(f"{what}: {len(names)} site{'s' * (len(names) > 1)} ({shown})")
        if self.digest["file"] is None:
            said.append("the file has no digest of its plan: an earlier release wrote it, or another tool")
        return said


@isolated
def verify(file: str | Path, model: Any) -> Verification:
    """Compare what a file (.onnx, .xml, .pt2) holds with a checkpoint: codes of weights, scales, zero points, and the
    types of codes. They are read from the file's constants and from the operations that use them.

    model: the checkpoint, or the model (quantized or float). Raises BadWeightsError for a file or a checkpoint that
    cannot be read, and for a file of another tool that has none of the model's sites.
    """
    path = Path(file)
    known = isinstance(model, str | Path)
    qmodel: QuantizedModel = load(model) if known else float_model(model)
    contents, intact = _read(path, qmodel)
    if "plan" not in contents.metadata and not contents.held.keys() & qmodel.plan.quantizers.keys():
        raise BadWeightsError(
            f"{path} was not written by `quantlens export`: it has no plan, and integers at none of the model's sites"
        )
    equal, different, in_float, simulated = [], [], [], []
    used: set[str] = set()
    for site in qmodel.graph.sites:
        edges = [edge.key for edge in site.edges.values() if edge.key in qmodel.plan.quantizers]
        found = {key: _held(qmodel, contents, key, used) for key in edges}
        kinds = {key: _kind(qmodel, key, path.suffix, contents.opset) for key in edges}
        wrong = [(key, _difference(qmodel, key, held, kinds[key])) for key, held in found.items()]
        wrong = [(key, what) for key, what in wrong if what]
        if wrong:
            different.append(Difference(site.name, *wrong[0]))
        elif any(held is not None for held in found.values()):
            equal.append(site.name)
        else:
            in_float.append(site.name)
            simulated += [site.name] * bool(edges)
    for name in sorted(contents.held.keys() - used - {one.edge for one in different}):
        different.append(Difference(name, name, "the file has integers there, the checkpoint has none"))
    digest = {"file": contents.metadata.get("plan_sha256") or None, "checkpoint": plan_digest(qmodel)}
    called = str(model) if known else qmodel.name
    return Verification(str(path), called, equal, different, in_float, simulated, digest, intact)


def _read(path: Path, qmodel: QuantizedModel) -> tuple[Contents, bool | None]:
    """What a file holds, and whether it is as it was written. Raises BadWeightsError for one that cannot be read."""
    if not path.is_file():
        raise BadWeightsError(f"no exported model at {path}")
    if path.suffix not in (".onnx", ".xml", ".pt2"):
        raise BadWeightsError(f"{path}: exported models end in .onnx, .xml or .pt2")
    for file in filter(Path.is_file, files_of(path)):
        if what := mistaken(file):
            raise BadWeightsError(f"{file} cannot be read: it is {what}")
    intact = matches(path)
    try:
        if path.suffix == ".pt2":
            edges = qmodel.graph.sites.edges
            known = [key for key in qmodel.plan.quantizers if _kind(qmodel, key, ".pt2", None)]
            calls = [key for key in known if not edges[key].is_weight]
            return read_pt2(path, sorted(calls, key=lambda key: edges[key].position is None)), intact
        return (read_onnx if path.suffix == ".onnx" else read_openvino)(path), intact
    except BadWeightsError:
        check_content(path)  # which says why, where the file has a digest
        raise


def _held(qmodel: QuantizedModel, contents: Contents, key: str, used: set[str]) -> Held | None:
    """The quantizer that the file has at an edge. What a layer with integers reads is looked for where it reads it, as
    several layers may share it; elsewhere by name, or under that of an edge of the same value."""
    edges = qmodel.graph.sites.edges
    edge = edges[key]
    weight = f"{edge.site}.weight"
    if edge.name == "input" and weight in contents.inputs:
        name = contents.inputs[weight]
    elif key in contents.held:
        name = key
    else:
        name = next((k for k in contents.held if k in edges and edges[k].value is edge.value), None)
    if name is None or name not in contents.held:
        return None
    used.add(name)
    return contents.held[name]


def _kind(qmodel: QuantizedModel, key: str, suffix: str, opset: int | None) -> str:
    """The type of an edge's codes in a kind of file, "int8"; "" where the file computes the format in float."""
    edge, quantizer = qmodel.graph.sites.edges[key], qmodel.plan.quantizers[key]
    if suffix == ".pt2":
        from quantlens.export.pt2 import STANDARD

        return str(quantizer.code_dtype).removeprefix("torch.") if is_integer(quantizer, STANDARD) else ""
    if edge.is_weight and qmodel.graph.tensor(str(edge.value.target)).dim() == 1:
        return ""
    return next((name.lower() for name in held_types(quantizer, opset, weight=edge.is_weight)), "")


def _difference(qmodel: QuantizedModel, key: str, held: Held | None, kind: str) -> str:
    """How what a file holds differs from the plan's quantizer; empty where it does not. kind: of the codes that the
    file must have (:func:`_kind`)."""
    quantizer: Any = qmodel.plan.quantizers[key]
    if not kind:
        return "" if held is None else f"the file has integers there, the format {quantizer.kind} has none"
    if held is None:
        return f"the checkpoint has {_sort(kind)} codes there, the file computes it in float"
    if held.wrong:
        return held.wrong
    if held.kind != kind:
        return f"the codes are {held.kind} in the file, {kind} in the checkpoint"
    edge, own = qmodel.graph.sites.edges[key], {k: _array(t) for k, t in quantizer.tensors().items()}
    pairs: list[tuple[str, np.ndarray, np.ndarray]] = [("scale", held.scale, own.get("scale", np.ones(1)).reshape(-1))]
    pairs.append(("zero point", held.zero_point, own.get("zero_point", 0 * held.zero_point).reshape(-1)))
    if edge.is_weight:
        weight, blocks = qmodel.graph.tensor(str(edge.value.target)), isinstance(quantizer, Blocks)
        codes = _array(quantizer.encode(weight)).astype(np.int32)
        per_axis = not blocks and quantizer.axis is not None and quantizer.scale.numel() > 1
        axis = quantizer.axis % weight.dim() if per_axis else None
        if held.codes is None:
            return f"the checkpoint has {_sort(kind)} codes there, the file computes the weight"
        if held.axis != axis and held.scale.size > 1:
            return f"the scales are those of axis {held.axis} in the file, of {axis} in the checkpoint"
        if blocks:
            if held.blocks is None or held.group_size != quantizer.group_size:
                return f"the checkpoint has blocks of {quantizer.group_size} there, the file of {held.group_size}"
            pairs.append(("scale of a block", held.blocks, own["scale_codes"].squeeze(-1)))
            codes = codes.reshape(len(codes), -1)
        pairs.append(("code", held.codes, codes))
    return next((said for name, a, b in pairs if (said := _compared(name, a, b))), "")


def _array(tensor: Any) -> np.ndarray:
    return np.asarray(tensor.detach().cpu().numpy())


def _sort(kind: str) -> str:
    return "floating-point" if kind.startswith("float") else "integer"


def _compared(name: str, found: np.ndarray, own: np.ndarray) -> str:
    """The first number that differs, and how many do."""
    if found.shape != own.shape:
        return f"the {name}s are {list(found.shape)} in the file, {list(own.shape)} in the checkpoint"
    places = np.argwhere(found != own)
    if not len(places):
        return ""
    at = tuple(places[0])
    where = f" {[int(place) for place in at]}" if own.size > 1 else ""
    count = f" ({len(places)} of {own.size} differ)" if own.size > 1 else ""
    return f"{name}{where} is {found[at]} in the file, {own[at]} in the checkpoint{count}"
