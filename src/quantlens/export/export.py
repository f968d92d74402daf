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
    BadWeightsError,
    QuantlensError,
    StorageError,
    UnknownNameError,
    UnsupportedError,
    first_line,
)
from quantlens.export.digest import KEY, NOTHING, seal
from quantlens.export.guards import (
    MAHALANOBIS,
    NONE,
    OFFERED,
    Gaussians,
    fit_gaussians,
    guard_images as images_of,
    guarded,
    sources,
    write_score,
)
from quantlens.export.onnx_codes import OPSET, OPSETS, held_types
from quantlens.export.onnx_file import Initializer, check, pieces
from quantlens.export.onnx_values import Size
from quantlens.export.record import has_guard
from quantlens.export.runtimes import INSTALL, need, openvino_core
from quantlens.export.told import cannot_run, multiplies_bytes, untried
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
    opset: int | None = None,
    half: bool = False,
) -> Path:
    """Write a model for a runtime; the ending chooses: ``.onnx``, ``.xml`` (OpenVINO IR, weights in the ``.bin`` beside
    it) or ``.pt2`` (PyTorch's own; outputs as the module's, see :mod:`quantlens.export.pt2`).

    Inputs: ``images`` float32 [batch, C, H, W], normalised, and what else the module takes, by its names. Outputs:
    ``logits`` [batch, K] and ``score`` [batch] (``features`` [batch, D] of a model without a classifier), and what else
    the module returns; of a detector ``logits`` [batch, Q, C], ``boxes`` [batch, Q, 4] and ``scores`` alone.

    model: quantized or float. simulate: write formats that the file cannot hold as float operations that reproduce
    them. guard: the OOD score, of :data:`~quantlens.export.guards.OFFERED`; None is the one that best separates guard
    images from OOD-like images made of them, without any "energy". guard_images: in-distribution images (a SOURCE, an
    image set, a tensor) whose scores in the file give the threshold that keeps the share ``keep`` of them. opset: ONNX
    operator set of an .onnx, 21 (None) to 26; codes of 2 bits and blocks of floating-point numbers need 23 to 25. half:
    compute what is float in float16, LayerNorm apart (:mod:`quantlens.export.onnx_half`), between float32 ends.
    Raises UnsupportedError for formats that the file cannot hold, StorageError where it cannot be written.
    """
    path = Path(path)
    qmodel: QuantizedModel = float_model(model)
    _check(qmodel, path, guard, guard_images, keep)
    opset = _opset(path, opset, half)
    images = None if guard_images is None else images_of(guard_images, qmodel.preprocess)
    said: dict[str, Any] = {"score": None if guard == NONE else guard or "energy", "keep": keep, "threshold": None}
    record = _record(qmodel)
    gaussians = None
    if images is not None and (guard == MAHALANOBIS or (guard is None and path.suffix != ".pt2")):
        try:
            gaussians = fit_gaussians(qmodel, images)
        except UnsupportedError:  # it is not offered
            if guard is not None:
                raise

    @functools.cache
    def made(score: str | None) -> Any:
        return _made(qmodel, score, gaussians if score == MAHALANOBIS else None, path.suffix, opset, simulate, half)

    def written(said: dict[str, Any], path: Path) -> Path:
        score = said["score"] if path.suffix != ".pt2" or said["score"] == MAHALANOBIS else None
        return _write(made(score), {**record, "guard": json.dumps(said)}, path)

    if images is not None:
        with _folder_beside(path) as folder:
            said = guarded(
                said, guard is None, images, gaussians, lambda said: _opened(written(said, folder / path.name))
            )
    return written(said, path)


def _opened(path: Path) -> Any:
    """A file in its runtime. Raises UnsupportedError where none runs it."""
    from quantlens.export.exported import Artefact

    try:
        return Artefact(path)
    except BadWeightsError as error:
        raise UnsupportedError(
            f"the threshold of guard images is set by running the file, and it cannot be run by {cannot_run(error)}: "
            "leave them out"
        ) from error


def _check(qmodel: QuantizedModel, path: Path, guard: str | None, guard_images: Any, keep: float) -> None:
    """Raises QuantlensError for what cannot be exported so."""
    if guard is not None and guard not in OFFERED:
        raise UnknownNameError("guard score", guard, OFFERED)
    if not 0 < keep < 1:
        raise QuantlensError(f"keep={keep}: give the share of in-distribution images to keep, such as 0.95")
    if path.suffix not in (".onnx", ".xml", ".pt2"):
        raise UnsupportedError(
            f"{path}: give a file that ends in .onnx or .xml (OpenVINO) or .pt2 (PyTorch; of that, "
            "examples/executorch makes a .pte)"
        )
    if guard_images is not None and not has_guard(qmodel):
        raise UnsupportedError(
            f"{qmodel.name} has the task {qmodel.task!r}, and a guard is for classifiers of several classes: export it "
            "without guard images"
        )
    if guard_images is not None and guard == NONE:
        raise QuantlensError('guard images set the threshold of a score: leave them out with guard="none"')
    if guard_images is None and guard == MAHALANOBIS:
        raise QuantlensError(f'the score "{MAHALANOBIS}" is fitted on in-distribution images: give guard images')


def _record(qmodel: QuantizedModel) -> dict[str, str]:
    """What the file says of itself."""
    return {
        "quantlens": __version__,
        "plan": json.dumps({**qmodel.plan.info, "rewrites": qmodel.plan.rewrites}),
        "preprocess": json.dumps(qmodel.preprocess.to_dict()),
        "task": qmodel.task,
        "num_parameters": str(qmodel.num_parameters),
        "saturating": json.dumps(multiplies_bytes(qmodel)),
        "plan_sha256": plan_digest(qmodel),
        **untried(qmodel),
    }


def _opset(path: Path, opset: int | None, half: bool) -> int | None:
    """The operator set of an .onnx file; None of another. Raises QuantlensError for what cannot be written."""
    if path.suffix != ".onnx":
        if opset is not None or half:
            what = f"opset={opset}" if opset is not None else "half"
            raise QuantlensError(f"{what} is for .onnx files, {path.name} is none: leave it out")
        return None
    opset = OPSET if opset is None else opset
    if type(opset) is not int or opset not in OPSETS:
        raise QuantlensError(f"opset={opset}: ONNX operator sets {OPSETS[0]} to {OPSETS[-1]} are written")
    onnx = need("onnx")
    if opset > (known := onnx.defs.onnx_opset_version()):
        raise QuantlensError(f"opset={opset}: onnx {onnx.__version__} ends at operator set {known}: {INSTALL}")
    return opset


def _made(
    qmodel: QuantizedModel,
    score: str | None,
    gaussians: Gaussians | None,
    suffix: str,
    opset: int | None,
    simulate: bool,
    half: bool,
) -> Any:
    """Program and names of inputs and outputs of a .pt2 file; ModelProto and initializers of the others."""
    if suffix != ".pt2":
        return onnx_model(qmodel, score, simulate=simulate, gaussians=gaussians, opset=opset, half=half)
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
    qmodel: QuantizedModel,
    guard: str | None,
    *,
    simulate: bool,
    gaussians: Gaussians | None = None,
    opset: int | None = OPSET,
    half: bool = False,
) -> tuple[Any, list[Initializer]]:
    """The checked ONNX ModelProto without its initializers, and these. opset: None: for OpenVINO to read."""
    onnx = need("onnx")
    from onnx import helper

    from quantlens.export.detectors import write_detections
    from quantlens.export.onnx_graph import Emitter
    from quantlens.export.onnx_operations import write_graph

    if qmodel.plan.operators:
        raise UnsupportedError(
            f"the model computes {len(qmodel.plan.operators)} LayerNorms or softmaxes in integer arithmetic of its "
            "own, which runtimes have no operators for; quantize for a runtime (--target) to export"
        )
    _check_activations(qmodel, opset)
    graph, emitter = qmodel.graph, Emitter(qmodel.graph, qmodel.plan.quantizers, simulate=simulate, opset=opset)
    emitter.moves = opset is None or not untried(qmodel)
    taken = input_names(graph)
    given = dict(zip(graph.outputs, write_graph(emitter, taken), strict=True))
    if half:
        given = _halved(emitter, taken, given, [] if gaussians is None else sources(graph))
    if qmodel.task == "detect":
        outputs = write_detections(emitter, qmodel, given)
    else:
        outputs = _write_outputs(emitter, qmodel, given, guard if has_guard(qmodel) else None, gaussians)
    inputs = [emitter.info(name, *emitter.values[node]) for node, name in zip(graph.inputs, taken, strict=True)]
    operators = [helper.make_opsetid("", opset or OPSET)]
    proto = helper.make_model(
        helper.make_graph(emitter.nodes, qmodel.name, inputs, outputs),
        opset_imports=operators,
        ir_version=helper.find_min_ir_version_for(operators),
        producer_name="quantlens",
        producer_version=__version__,
    )
    initializers = list(emitter.constants.values())
    try:
        check(proto, initializers)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        if not half:
            raise
        raise UnsupportedError(
            f"the model cannot be computed in float16 ({first_line(error)}): leave --half out"
        ) from error
    return proto, initializers


def _check_activations(qmodel: QuantizedModel, opset: int | None) -> None:
    """Raises UnsupportedError for floating-point formats of activations that the file cannot hold."""
    edges = qmodel.graph.sites.edges
    floating = [k for k, q in qmodel.plan.quantizers.items() if isinstance(q, Blocks | FloatingPoint)]
    if any(not edges[k].is_weight and not held_types(qmodel.plan.quantizers[k], opset, weight=False) for k in floating):
        why = "OpenVINO files have none" if opset is None else "ONNX finds no scales as the model runs"
        other = "export FP8 to .onnx" if opset is None else "give activations FP8 (WMXFP4AFP8)"
        raise UnsupportedError(
            f"{qmodel.bits}: activations cannot be written in this floating-point format: {why}; {other} or a width "
            "(WMXFP4A8), or export to .pt2 with --simulate"
        )


def _halved(emitter: Any, inputs: list[str], given: Mapping[Any, str], read: list[Any]) -> dict[Any, str]:
    """The graph in float16; what is written after it reads float32, of its nodes ``read``. given, returned: outputs ->
    their values."""
    from quantlens.export.onnx_half import to_half

    kinds = zip(inputs, (emitter.values[node].kind for node in emitter.graph.inputs), strict=True)
    single = to_half(emitter, [name for name, kind in kinds if kind == "float"])
    emitter.names |= {node: single(emitter.names[node]) for node in read if node in emitter.names}
    return {node: single(name) if emitter.values[node].kind == "float" else name for node, name in given.items()}


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
