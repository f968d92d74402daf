"""A quantized model as a file that runtimes run: ONNX, OpenVINO IR. What is written are the quantizers that were
measured: their codes, scales and zero points.

The file carries what an application needs besides: preprocessing, class names, the plan's record (method, bits, seed,
calibration, checkpoint), and a guard: an out-of-distribution score as second output, with the threshold that keeps a
given share of in-distribution images.
"""

import functools
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from quantlens._version import __version__
from quantlens.ambient import isolated
from quantlens.errors import (
    QuantlensError,
    StorageError,
    UnknownNameError,
    UnsupportedError,
    first_line,
)
from quantlens.export.digest import KEY, NOTHING, seal
from quantlens.export.guards import (
    GUARDS,
    MAHALANOBIS,
    NONE,
    OFFERED,
    Gaussians,
    fit_gaussians,
    guard_images as images_of,
    guarded,
    write_score,
)
from quantlens.export.onnx_file import Initializer, check, pieces
from quantlens.export.onnx_values import Size
from quantlens.export.record import has_guard
from quantlens.export.runtimes import need, openvino_core
from quantlens.files import write_whole
from quantlens.formats import Blocks, FloatingPoint
from quantlens.graph.structure import paths_of
from quantlens.qmodel import QuantizedModel, float_model
from quantlens.qmodel.checkpoint import plan_digest

CLASSIFIED = ("classify", "binary", "multilabel")
"""Tasks whose measured output is called "logits"; that of the others is called "features"."""

KEEP = 0.95
"""Share of in-distribution images that the threshold keeps."""


@isolated
def export(
    model: Any,
    path: str | Path,
    *,
    simulate: bool = False,
    guard: str | None = None,
    guard_images: Any = None,
    keep: float = KEEP,
) -> Path:
    """Write a model for a runtime; the ending chooses: ``.onnx`` (operator set 21), ``.xml`` (OpenVINO IR, weights in
    the ``.bin`` beside it) or ``.pt2`` (PyTorch's own; outputs as the module's, see :mod:`quantlens.export.pt2`).

    Inputs: ``images`` float32 [batch, C, H, W], normalised, and what else the module takes, by its names. Outputs:
    ``logits`` [batch, K] and ``score`` [batch] (``features`` [batch, D] of a model without a classifier), and what else
    the module returns; of a detector ``logits`` [batch, Q, C], ``boxes`` [batch, Q, 4] and ``scores`` alone.

    model: quantized or float. simulate: write formats without integer kernels as float operations that reproduce them.
    guard: the OOD score, of :data:`~quantlens.export.guards.OFFERED`; None is the one that best separates guard images
    from OOD-like images made of them, without any "energy". guard_images: in-distribution images (a SOURCE, an image
    set, a tensor) whose scores in the file give the threshold that keeps the share ``keep`` of them.
    Raises UnsupportedError for formats that the file cannot hold, StorageError where it cannot be written.
    """
    path = Path(path)
    qmodel: QuantizedModel = float_model(model)
    _check(qmodel, path, guard, guard_images, keep)
    images = None if guard_images is None else images_of(guard_images, qmodel.preprocess)
    said: dict[str, Any] = {"score": None if guard == NONE else guard or "energy", "keep": keep, "threshold": None}
    record = {  # what the file says of itself
        "quantlens": __version__,
        "plan": json.dumps({**qmodel.plan.info, "rewrites": qmodel.plan.rewrites}),
        "preprocess": json.dumps(qmodel.preprocess.to_dict()),
        "task": qmodel.task,
        "num_parameters": str(qmodel.num_parameters),
        "saturating": json.dumps(any(quantizer.bits > 7 for _, quantizer in qmodel.weight_edges())),
        "plan_sha256": plan_digest(qmodel),
    }
    gaussians = None
    if images is not None and (guard == MAHALANOBIS or (guard is None and path.suffix != ".pt2")):
        try:
            gaussians = fit_gaussians(qmodel, images)
        except UnsupportedError:  # it is not offered
            if guard is not None:
                raise

    @functools.cache
    def made(score: str | None) -> Any:
        return _made(qmodel, score, gaussians if score == MAHALANOBIS else None, path.suffix, simulate)

    def written(said: dict[str, Any], path: Path) -> Path:
        score = said["score"] if path.suffix != ".pt2" or said["score"] == MAHALANOBIS else None
        return _write(made(score), {**record, "guard": json.dumps(said)}, path)

    if images is not None:
        from quantlens.export.exported import Artefact

        with _folder_beside(path) as folder:
            said = guarded(
                said, guard is None, images, gaussians, lambda said: Artefact(written(said, folder / path.name))
            )
    return written(said, path)


def _check(qmodel: QuantizedModel, path: Path, guard: str | None, guard_images: Any, keep: float) -> None:
    """Raises QuantlensError for what cannot be exported so."""
    if guard is not None and guard not in OFFERED:
        raise UnknownNameError("guard score", guard, OFFERED)
    if not 0 < keep < 1:
        raise QuantlensError(f"keep={keep}: give the share of in-distribution images to keep, such as 0.95")
    if path.suffix not in (".onnx", ".xml", ".pt2"):
        raise UnsupportedError(f"{path}: give a file that ends in .onnx or .xml (OpenVINO) or .pt2 (PyTorch)")
    if guard_images is not None and not has_guard(qmodel):
        raise UnsupportedError(
            f"{qmodel.name} has the task {qmodel.task!r}, and a guard is for classifiers of several classes: export it "
            "without guard images"
        )
    if guard_images is not None and guard == NONE:
        raise QuantlensError('guard images set the threshold of a score: leave them out with guard="none"')
    if guard_images is None and guard == MAHALANOBIS:
        raise QuantlensError(f'the score "{MAHALANOBIS}" is fitted on in-distribution images: give guard images')


def _made(qmodel: QuantizedModel, score: str | None, gaussians: Gaussians | None, suffix: str, simulate: bool) -> Any:
    """Program and names of inputs and outputs of a .pt2 file; ModelProto and initializers of the others."""
    if suffix != ".pt2":
        return onnx_model(qmodel, score, simulate=simulate, gaussians=gaussians)
    from quantlens.export.pt2 import pt2_program

    outputs = [*_names_given(qmodel), *([] if gaussians is None else ["score"])]
    names = {"inputs": json.dumps(input_names(qmodel.graph)), "outputs": json.dumps(outputs)}
    return pt2_program(qmodel, simulate=simulate, gaussians=gaussians), names


def _write(made: Any, record: dict[str, str], path: Path) -> Path:
    """The file, with what it says of itself. made: what :func:`_made` gives."""
    if path.suffix == ".pt2":
        from quantlens.export.pt2 import write_pt2

        program, names = made
        return write_pt2(program, {**record, **names}, path)
    from onnx import helper

    proto, initializers = made
    record = {**record, "outputs": json.dumps([output.name for output in proto.graph.output])}
    del proto.metadata_props[:]
    helper.set_model_props(proto, record)
    if path.suffix == ".onnx":
        with _folder_beside(path) as folder:
            seal(write_whole(folder / path.name, pieces(proto, initializers)))
            os.replace(folder / path.name, path)
        return path
    return _openvino(proto, initializers, record, path)


@contextmanager
def _folder_beside(path: Path) -> Iterator[Path]:
    """A folder for the time being, where a file is to be. Raises StorageError where there can be none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            yield Path(folder)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error}; free some room or choose another place") from error


def onnx_model(
    qmodel: QuantizedModel, guard: str | None, *, simulate: bool, gaussians: Gaussians | None = None
) -> tuple[Any, list[Initializer]]:
    """The checked ONNX ModelProto without its initializers, and these."""
    need("onnx")
    from onnx import helper

    from quantlens.export.detectors import write_detections
    from quantlens.export.onnx_graph import IR_VERSION, OPSET, Emitter
    from quantlens.export.onnx_operations import write_graph

    if qmodel.plan.operators:
        raise UnsupportedError(
            f"the model computes {len(qmodel.plan.operators)} LayerNorms or softmaxes in integer arithmetic of its "
            "own, which runtimes have no operators for; quantize for a runtime (--target) to export"
        )
    edges = qmodel.graph.sites.edges
    small = [k for k, q in qmodel.plan.quantizers.items() if isinstance(q, Blocks | FloatingPoint)]
    if not all(edges[key].is_weight for key in small):
        raise UnsupportedError(
            f"{qmodel.bits}: floating-point formats of activations cannot be written as ONNX operations; export to "
            ".pt2 with --simulate, or give activations a width (WMXFP4A8)"
        )
    graph, emitter = qmodel.graph, Emitter(qmodel.graph, qmodel.plan.quantizers, simulate=simulate)
    taken = input_names(graph)
    given = dict(zip(graph.outputs, write_graph(emitter, taken), strict=True))
    if qmodel.task == "detect":
        outputs = write_detections(emitter, qmodel, given)
    else:
        outputs = _write_outputs(emitter, qmodel, given, guard if has_guard(qmodel) else None, gaussians)
    inputs = [emitter.info(name, *emitter.values[node]) for node, name in zip(graph.inputs, taken, strict=True)]
    proto = helper.make_model(
        helper.make_graph(emitter.nodes, qmodel.name, inputs, outputs),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="quantlens",
        producer_version=__version__,
    )
    initializers = list(emitter.constants.values())
    check(proto, initializers)
    return proto, initializers


def _write_outputs(
    emitter: Any, qmodel: QuantizedModel, given: Mapping[Any, str], guard: str | None, gaussians: Gaussians | None
) -> list[Any]:
    """What a file gives of a model that is no detector: what is measured, the guard's score, what else the module
    returns. given: outputs of the graph -> their values. Returns what the file says of each."""
    graph = qmodel.graph
    primary, first = given[graph.output], "logits" if qmodel.task in CLASSIFIED else "features"
    shape = emitter.sizes(graph.output)
    if len(shape) > 2:  # as `QuantizedModel.outputs` measures it
        pooled = emitter.op("Gather", primary, np.int64(0), axis=1) if len(shape) == 3 else None
        primary = pooled or emitter.op("ReduceMean", primary, [-2, -1], keepdims=0)
    measured = emitter.op("Identity", primary, out=first)
    width = shape[1] if len(shape) == 4 else shape[-1]
    outputs = [emitter.info(first, "float", (Size(1), width))]
    if guard is not None:
        outputs.append(emitter.info("score", "float", (Size(1),)))
        write_score(emitter, guard, measured, gaussians)
    for node, name in output_names(graph).items():
        if node is not graph.output or len(shape) > 2:
            emitter.op("Identity", given[node], out=name)
            outputs.append(emitter.info(name, *emitter.values[node]))
    return outputs


def _names_given(qmodel: QuantizedModel) -> list[str]:
    """Names of the outputs of a program of torch, in order."""
    if qmodel.task == "detect":
        return ["logits", "boxes", "scores"]
    first = "logits" if qmodel.task in CLASSIFIED else "features"
    named = {**output_names(qmodel.graph), qmodel.graph.output: first}
    return [named[node] for node in qmodel.graph.outputs]


def input_names(graph: Any) -> list[str]:
    """Names of a file's inputs: ``images``, and others as the module calls them."""
    names = graph.structure.input_names
    return ["images" if n is graph.input else names[number] for number, n in enumerate(graph.inputs)]


def output_names(graph: Any) -> dict[Any, str]:
    """Outputs of a graph -> their names in a file: as the module calls them (``pooler_output``), or ``output.1``."""
    found: dict[Any, str] = {}
    for number, name in sorted(paths_of(graph.structure.gives).items()):
        name = name if name[:1].isalpha() else f"output.{name}".rstrip(".")
        taken = {"logits", "score", "features", *input_names(graph), *found.values()}
        found.setdefault(graph.outputs[number], f"output.{name}" if name in taken else name)
    return found


def _openvino(proto: Any, initializers: list[Initializer], record: dict[str, str], path: Path) -> Path:
    openvino = need("openvino")
    with _folder_beside(path) as folder:
        source = folder / "model.onnx"
        write_whole(source, pieces(proto, initializers))
        try:
            model = openvino_core().read_model(source)
        except RuntimeError as error:
            raise UnsupportedError(f"OpenVINO cannot read {path.stem}: {first_line(error)}; export to .onnx") from error
        _fold_biases(model)
        for key, value in {**record, KEY: NOTHING}.items():
            model.set_rt_info(value, ["quantlens", key])
        # else OpenVINO quantizes float activations to 8 bits before layers with integer weights, unasked
        model.set_rt_info("0", ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])
        try:
            openvino.save_model(model, folder / path.name, compress_to_fp16=False)
        except RuntimeError as error:
            raise StorageError(f"cannot write {path}: {error}; free some room or choose another place") from error
        seal(folder / path.name)
        os.replace(folder / path.with_suffix(".bin").name, path.with_suffix(".bin"))
        os.replace(folder / path.name, path)
    return path


def _fold_biases(model: Any) -> None:
    """Biases of convolutions as constants of the sizes they are added in. OpenVINO reads them as reshaped by a shape
    that it computes late, and where a model also makes tensors of the batch's size it may by then have taken the first
    channel's bias for all, into the quantizer that follows."""
    from openvino import opset13 as operators

    for node in model.get_ordered_ops():
        if node.get_type_name() != "Reshape" or not node.get_element_type().is_real():
            continue
        source, shape = node.input_value(0).get_node(), node.get_output_partial_shape(0)
        if source.get_type_name() == "Constant" and shape.is_static:
            folded = operators.constant(source.get_data().reshape(list(shape.to_shape())))
            for reader in list(node.output(0).get_target_inputs()):
                reader.replace_source_output(folded.output(0))


# ---- the guard: how often it is right -----------------------------------------------


def looks_unknown(
    guard: Mapping[str, Any] | None, logits: np.ndarray, scores: np.ndarray | None = None
) -> np.ndarray | None:
    """Which images [n] a file's guard calls unknown, from its logits [n, K], or from scores
    [n] of its own where they are of something else; None without a threshold.

    guard: ``{"score", "keep", "threshold": {"value", "n"} or None}``, as the file's metadata holds it.
    """
    threshold = (guard or {}).get("threshold")
    if guard is None or not threshold:
        return None
    if guard["score"] in GUARDS:
        scores = GUARDS[guard["score"]](logits)
    return None if scores is None else scores < float(threshold["value"])


def guard_metrics(
    guard: Mapping[str, Any] | None, known: np.ndarray | None, others: Mapping[str, np.ndarray | None]
) -> dict[str, Any] | None:
    """How often a guard is right on images that it was not set on; None for a guard without a threshold.

    known: :func:`looks_unknown` of the in-distribution images; others: that of every OOD set.
    Returns the guard itself with ``"id": {"n", "kept"}`` (share of ID images that look known) and for every OOD set
    ``{"n", "flagged", "balanced_accuracy"}`` (share that looks unknown; mean of kept and flagged).
    """
    if guard is None or known is None:
        return None
    kept = float((~known).mean())
    sets: dict[str, Any] = {}
    for name, unknown in others.items():
        if unknown is not None:
            flagged = float(unknown.mean())
            sets[name] = {"n": len(unknown), "flagged": flagged, "balanced_accuracy": (kept + flagged) / 2}
    return {**guard, "id": {"n": len(known), "kept": kept}, "ood": sets}
