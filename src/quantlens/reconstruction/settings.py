"""What block reconstruction is told, its losses (ŷ, y, context) -> scalar among it, and what it tells."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as pack
from torch import Tensor

from quantlens.calibration import Calibration
from quantlens.errors import QuantlensError, UnknownNameError
from quantlens.files import check_writable, write_whole
from quantlens.formats import Quantizer, restore
from quantlens.graph import Graph
from quantlens.metrics.divergence import OutputKind, box_error, box_shift, damage
from quantlens.qmodel import Plan
from quantlens.reconstruction.units import Unit


# -- losses -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Context:
    """What a loss may want to know besides the two outputs.

    unit: name. is_logits: whether the output is the model's. images: numbers of the calibration images in the batch.
    scale: mean of ‖y_t‖² over all calibration images and tokens, float. result: number of the output among the unit's.
    objects: where the output is a detector's boxes, the probability of an object for each query [B, Q]; else None.
    """

    unit: str
    is_logits: bool
    images: Tensor
    scale: float
    result: int = 0
    objects: Tensor | None = None


Loss = Callable[[Tensor, Tensor, Context], Tensor]
"""(ŷ, y, context) -> scalar, a mean over the images; y is the float model's output."""


def mse(got: Tensor, expected: Tensor, context: Context) -> Tensor:
    """Mean squared difference."""
    return (got - expected).square().mean()


EPSILON = 0.01
"""ε of the token norm as a share of the mean of ‖y_t‖²."""


def token_norm(got: Tensor, expected: Tensor, context: Context) -> Tensor:
    """Mean over images and tokens of ‖y_t − ŷ_t‖² / (‖y_t‖² + ε), t over all but the last dimension.

    Every token counts by its relative error, so that a few tokens of extreme norm do not make up the whole loss. ε =
    :data:`EPSILON` of the mean squared norm keeps tokens that are next to zero from doing so instead.
    """
    norm = expected.square().sum(-1) + max(EPSILON * context.scale, torch.finfo(torch.float32).tiny)
    return ((got - expected).square().sum(-1) / norm).mean()


@dataclass(frozen=True)
class Metric:
    """A quadratic form on a unit's error that stands for a Hessian or Fisher matrix, diagonal plus low rank.

    diagonal: w, ≥ 0, broadcasts to the output [B, …]. factors: U, [k, n] with n the elements of one row of the output,
    or None. The form is Σ_j w_j Δ_j² + ‖U·|Δ|‖², the matrix diag(w) + Uᵀ·U applied to the magnitudes of the error.
    """

    diagonal: Tensor
    factors: Tensor | None = None

    def __call__(self, difference: Tensor) -> Tensor:
        """Mean of the form over the rows of an error [B, …]."""
        rows = len(difference)
        value = (difference.square() * self.diagonal.to(difference.device)).sum() / rows
        if self.factors is not None:
            low_rank = difference.abs().reshape(rows, -1) @ self.factors.to(difference.device).T
            value = value + low_rank.square().sum() / rows
        return value


@dataclass(frozen=True)
class MetricLoss:
    """A loss with a :class:`Metric` for every unit; :func:`.damage` at the logits, :func:`box_error` at a detector's
    boxes, squared error for a unit that has none.

    metrics: by name of the unit; its second result's, of those that have several, by that name and ``#1``. They may be
    on any device. outputs: what the model gives.
    """

    metrics: Mapping[str, Metric] = field(repr=False)
    outputs: OutputKind = "softmax"

    def __call__(self, got: Tensor, expected: Tensor, context: Context) -> Tensor:
        if context.is_logits:
            return damage(expected, got, self.outputs)
        if context.objects is not None:
            return box_error(got, expected, context.objects)
        metric = self.metrics.get(name_of_result(context.unit, context.result))
        return mse(got, expected, context) if metric is None else metric(got - expected)

    def state(self) -> dict[str, Tensor]:
        """Everything that the loss depends on, for a checkpoint's fingerprint."""
        found = {f"{name}.diagonal": m.diagonal for name, m in self.metrics.items()}
        return found | {f"{name}.factors": m.factors for name, m in self.metrics.items() if m.factors is not None}


@dataclass(frozen=True)
class DetectionLoss:
    """The loss of a whole detector: :func:`.damage` at the logits, :func:`box_shift` at the boxes, squared error of the
    scores that queries are chosen by. outputs: what the model gives."""

    outputs: OutputKind = "softmax"

    def __call__(self, got: Tensor, expected: Tensor, context: Context) -> Tensor:
        if context.is_logits or context.objects is None:
            return MetricLoss({}, self.outputs)(got, expected, context)
        return box_shift(got, expected, context.objects)


def name_of_result(unit: str, number: int) -> str:
    """What the metric of one of a unit's results is called."""
    return f"{unit}#{number}" if number else unit


LOSSES: dict[str, Loss] = {"mse": mse, "token-norm": token_norm}


# -- settings and reports ---------------------------------------------------------------------------------------------
ROUNDING, SCALES, WEIGHTS, VECTORS = "rounding", "scales", "weights", "vectors"


@dataclass(frozen=True)
class Settings:
    """How units are reconstructed. Raises UnknownNameError or QuantlensError for what there is not, or does not fit."""

    optimise: tuple[str, ...] = (ROUNDING, SCALES)
    """Any of "rounding" (AdaRound), "scales" (LSQ), "weights" (float, straight through; not with "rounding"), "vectors"
    (biases, scale and shift of LayerNorms). Weights not quantized and formats that cannot learn stay as they are."""
    loss: str | Loss = "mse"
    """A name of :data:`LOSSES` or a function; it is divided by its value at the start (for the regulariser)."""
    inputs: str = "mixed"
    """What the unit reads: "quantized" (the quantized prefix's output), "float", or "mixed" (element by element)."""
    input_drop: float = 0.5
    """With "mixed": probability of the float one."""
    drop: float = 0.0
    """Probability that an activation's element is left in float (QDrop uses 0.5)."""
    iterations: int = 200
    """Steps per unit, split evenly over the rounds."""
    rounds: int = 1
    """After each the unit is measured on all images; the next starts from the best with half the learning rate."""
    batch_size: int = 16
    """Images per step."""
    lr_rounding: float = 0.02
    """Learning rates are Adam's; they fall to zero along a cosine, but for soft rounding."""
    lr_scales: float = 1e-3
    """In multiples of their start."""
    lr_weights: float = 0.02
    """In units of their scale, or of their standard deviation without a quantizer."""
    lr_vectors: float = 0.003
    """In units of their root mean square."""
    straight_through: bool = False
    """See :class:`.rounding.AdaRound`; without it, its regulariser, weighted, is added to the loss."""
    float_weights: bool = False
    """With "weights": those that are not quantized are trained, too."""
    guarded: bool = True
    """A unit whose loss did not fall keeps its start."""
    held_out: tuple[int, ...] = ()
    """Numbers of images that are not trained on; the loss is measured on these alone (none: on all)."""
    whole: bool = False
    """The network is one unit, compared by its logits and boxes."""

    def __post_init__(self) -> None:
        loss = [self.loss] if isinstance(self.loss, str) else []
        for what, names, known in (
            ("part to optimise", self.optimise, (ROUNDING, SCALES, WEIGHTS, VECTORS)),
            ("reconstruction loss", loss, tuple(LOSSES)),
            ("inputs of reconstruction", [self.inputs], ("quantized", "float", "mixed")),
        ):
            for name in names:
                if name not in known:
                    raise UnknownNameError(what, name, known)
        if ROUNDING in self.optimise and WEIGHTS in self.optimise:
            raise QuantlensError("either the rounding or the weights themselves can be optimised, not both")
        if self.float_weights and WEIGHTS not in self.optimise:
            raise QuantlensError('float_weights says which weights are trained; name "weights" in optimise too')
        if self.iterations < 0 or self.rounds < 1 or self.batch_size < 1:
            raise QuantlensError("reconstruction needs iterations >= 0, rounds >= 1 and a batch size >= 1")
        if not (0 <= self.input_drop <= 1 and 0 <= self.drop < 1):
            raise QuantlensError("drop probabilities lie in 0 … 1 (drop below 1)")


@dataclass(frozen=True)
class UnitReport:
    """What happened to one unit.

    before, after: loss on all calibration images after the quantized prefix. rounds: the loss after each round.
    accepted: whether anything was changed. trained: number of learned tensors.
    """

    unit: str
    before: float
    after: float
    rounds: list[float]
    accepted: bool
    trained: int
    seconds: float


@dataclass(frozen=True)
class Report:
    """All units in order. ``resumed``: how many were read from a checkpoint."""

    units: tuple[UnitReport, ...]
    resumed: int = 0

    def info(self) -> list[dict[str, Any]]:
        """As JSON-able data."""
        return [asdict(unit) for unit in self.units]


@dataclass
class Result:
    """What reconstruction made of one unit: float weights by name, quantizers by edge key."""

    report: UnitReport
    tensors: dict[str, Tensor]
    quantizers: dict[str, Quantizer]


# -- finished units on disk ----------------------------------------------------------------------------------------
# Finished units on disk, so that a killed reconstruction goes on where it was.


VERSION = 3
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
        unrounded: Mapping[str, Tensor] | None = None,
    ):
        self.folder = Path(folder)
        check_writable(self.folder / "unit")
        self.key = fingerprint(graph, plan.quantizers, calibration, settings, seed, reference, unrounded)

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
    unrounded: Mapping[str, Tensor] | None = None,
) -> str:
    """Hex digest of everything that determines a reconstruction: graph, reference, quantizers, images, unrounded
    weights, settings (a dataclass), seed, torch's version and the kind of device. A loss with a state counts by
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
    for name, tensor in sorted((unrounded or {}).items()):
        add("unrounded", name, tensor)
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
