"""A quantized model: a graph and the plan that it follows. Simulation, checkpoint, export, study and report read the
same two."""

import copy
import math
from operator import attrgetter
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from quantlens.ambient import plain_arithmetic
from quantlens.errors import QuantlensError, UnknownNameError, UnsupportedError
from quantlens.formats.base import Quantizer
from quantlens.graph import Edge, Graph, graph_of
from quantlens.qmodel.plan import FP32, Plan, Provenance
from quantlens.qmodel.simulation import classifier_of, float_features, simulate

CACHED = 4 << 20
"""Bytes of the largest activation that a CPU may work on at once: larger ones leave its cache between operations."""


CALLING = ("forward_with_filtered_kwargs",)
"""Functions of a part that a larger model calls in place of the part, and that do nothing but call it."""


class _Pair(NamedTuple):
    logits: Tensor
    features: Tensor | None


class Outputs(_Pair):
    """What is measured of a model for a batch, as a pair: logits [B, K] (or features, of a model without a classifier);
    features [B, D] that the classifier reads, or None. Of a detector class logits [B, Q, C] and None, and ``boxes``
    [B, Q, 4]: centre x, centre y, width, height in fractions of the input."""

    boxes: Tensor | None
    score: Tensor | None = None
    """Of an exported file: the score [B] of its guard."""

    def __new__(cls, logits: Tensor, features: Tensor | None, boxes: Tensor | None = None) -> "Outputs":
        made = super().__new__(cls, logits, features)
        made.boxes = boxes
        return made


def pooled(logits: Tensor) -> Tensor:
    """What a model gives as a row per image: of tokens [B, N, D] the first, of a feature map [B, C, H, W] the mean."""
    if logits.dim() <= 2:
        return logits
    return logits.mean((-2, -1)) if logits.dim() == 4 else logits[:, 0]


class QuantizedModel(nn.Module):
    """A graph simulated under a plan. It takes and returns what the float module does: ``qmodel(images)`` gives logits
    [B, K], or a tuple, a dictionary, an output of Hugging Face models.

    Weights are quantized once, when the simulation is built; activations pass through their quantizers in every
    forward.

    graph: the FP32 graph after the plan's rewrites. plan: see :class:`Plan`. preprocess: how images become its input.
    reference: the FP32 model it was made from, or None (a model read from a file does not have it).
    """

    def __init__(self, graph: Graph, plan: Plan, *, preprocess: Any, reference: Any = None):
        super().__init__()
        sites = {site.name: site for site in graph.sites}
        named = (("site edge", plan.quantizers, graph.sites.edges), ("site", plan.operators, sites))
        for what, names, known in named:
            for name in names:
                if name not in known:
                    raise UnknownNameError(f"quantization {what}", name, known)
        self.graph, self.plan = graph, plan
        self.quantizers = nn.ModuleList(plan.quantizers.values())
        self.operators = nn.ModuleList(plan.operators.values())
        self.preprocess = preprocess
        self._reference = self._like = [reference]  # in a list: not a submodule
        self._simulation: list[fx.GraphModule | None] = [None]
        self.eval()

    # -- running ----------------------------------------------------------------------------------------------------
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """images [B, 3, H, W] float, normalised -> logits [B, K], or what else the float module takes and returns. It
        is computed in float32, and returned in the type of the images."""
        tensors = self.graph.tensors_of(args, kwargs)
        given = tensors[self.graph.structure.image].dtype
        outputs = self._run(tensors)[2]
        if given in (torch.float16, torch.bfloat16, torch.float64):
            outputs = [x.to(given) if x.is_floating_point() else x for x in outputs]
        return self.graph.structure.result(outputs)

    def outputs(self, *args: Any, **kwargs: Any) -> Outputs:
        """Logits and the features that the classifier reads (before its own input quantizer, on the float model's
        axes), of images or of what else the float module takes; tokens and feature maps :func:`pooled`."""
        logits, features, everything = self._run(self.graph.tensors_of(args, kwargs))
        if self.task != "detect":
            with plain_arithmetic():
                return Outputs(pooled(logits), None if features is None else float_features(self.graph, features))
        if self.graph.boxes is None:
            raise UnsupportedError(f"{self.name} gives no class logits [B, Q, C] and boxes [B, Q, 4]")
        return Outputs(logits, None, everything[self.graph.outputs.index(self.graph.boxes)])

    def _run(self, tensors: list[Tensor]) -> tuple[Any, ...]:
        with plain_arithmetic():
            wide = (x.float() if x.is_floating_point() else x for x in tensors)
            return self.simulation()(*(x.contiguous() for x in wide))

    def simulation(self) -> fx.GraphModule:
        """The graph with weights replaced by their quantized values and quantizers on the other edges (built once):
        its inputs -> (logits, features, all outputs)."""
        if self._simulation[0] is None:
            self._simulation[0] = simulate(self.graph, self.plan.quantizers, self.plan.operators, whole=True)
        return self._simulation[0]

    def classifier(self) -> tuple[Tensor, Tensor] | None:
        """Weight [K, D] and bias [K] of the classifier as quantized, on the features of :meth:`outputs`; None if it
        has none."""
        return classifier_of(self.graph, self.plan.quantizers)

    def __getattr__(self, name: str) -> Any:
        """What a larger model reads of its part (``config``, ``main_input_name``, ``num_features``): values as the
        float module has them, which a model read from a file does not know; of its functions those that call it."""
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            module = getattr((self.__dict__.get("_like") or [None])[0], "module", None)
            value = None if module is None or name.startswith("_") else getattr(module, name, None)
            if name in CALLING and isinstance(value, MethodType):
                return MethodType(value.__func__, self)
            if value is None:
                raise
            if callable(value) or isinstance(value, Tensor):
                raise AttributeError(
                    f"{name!r} lies inside {type(module).__name__}, which was quantized as a whole; quantize a part "
                    "that nothing else reaches into"
                ) from error
            return value

    # -- what it is -------------------------------------------------------------------------------------------------
    @property
    def reference(self) -> Any:
        return self._reference[0]

    provenance = property(attrgetter("plan.provenance"), doc="Who made it, out of what, on which images.")
    name = property(attrgetter("provenance.model"))
    method = property(attrgetter("provenance.method"))
    bits = property(attrgetter("provenance.bits"))
    seed = property(attrgetter("provenance.seed"))
    calibration = property(attrgetter("provenance.calibration"))
    checkpoint_sha256 = property(attrgetter("provenance.checkpoint_sha256"))
    class_names = property(attrgetter("provenance.class_names"))
    task = property(attrgetter("provenance.task"))
    detection_head = property(attrgetter("provenance.detection_head"), doc="What a detector's outputs mean, or None.")
    device = property(attrgetter("graph.device"))

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.provenance.options)

    @property
    def num_classes(self) -> int:
        if self.detection_head is not None:
            return len(self.detection_head.labels)
        return int(self.graph.output.meta["shape"][-1])

    @property
    def num_parameters(self) -> int:
        return self.graph.num_parameters()

    @property
    def images_together(self) -> int | None:
        """How many images are fastest in one forward pass: those whose largest activation stays within :data:`CACHED`
        on a CPU (at least 1), None for as many as memory holds elsewhere."""
        if self.device.type != "cpu":
            return None
        shapes = (n.meta.get("shape") or () for n in self.graph.fx.nodes if n.op == "call_function")
        largest = max((math.prod(d for d in shape if d is not None) for shape in shapes), default=1)
        return max(1, CACHED // (4 * max(largest, 1)))

    @property
    def size_mb(self) -> float:
        """Megabytes (10⁶ bytes) of the packed model: integer codes at their width, scales, what stays in float."""
        return self.size_bytes() / 1e6

    @property
    def size_ratio(self) -> float:
        """Packed size over FP32 size."""
        return self.size_bytes() / (4 * self.num_parameters)

    def size_bytes(self) -> int:
        total, uses = sum(t.nbytes for t in self.graph.tensors().values()), self.weight_uses()
        for name, ((_, quantizer), *_) in uses.items():
            weight = self.graph.tensor(name)
            total += -(-weight.numel() * quantizer.bits // 8) - weight.nbytes
        again = {key for (_, first), *others in uses.values() for key, q in others if q is first}
        kept = (q for key, q in self.plan.quantizers.items() if key not in again)
        return total + sum(t.nbytes for part in (*kept, *self.plan.operators.values()) for t in part.tensors().values())

    def weight_edges(self) -> list[tuple[Edge, Quantizer]]:
        """Edges of quantized weights with their quantizers, in graph order."""
        edges = self.graph.sites.edges
        return [(edges[k], q) for k, q in self.plan.quantizers.items() if edges[k].is_weight]

    def weight_uses(self) -> dict[str, list[tuple[str, Quantizer]]]:
        """Quantized weights by name: (edge, quantizer) of each layer that reads it."""
        found: dict[str, list[tuple[str, Quantizer]]] = {}
        for edge, quantizer in self.weight_edges():
            found.setdefault(str(edge.value.target), []).append((edge.key, quantizer))
        return found

    # -- moving, saving -----------------------------------------------------------------------------------------------
    def _apply(self, *args: Any, **kwargs: Any) -> "QuantizedModel":
        """What :meth:`to` and its like do, also those of a module that this one is a part of."""
        super()._apply(*args, **kwargs)
        self._simulation[0] = None
        return self

    def save(self, path: Any) -> Any:
        """Write the packed checkpoint; the same as :func:`quantlens.save`."""
        from quantlens.qmodel.checkpoint import save

        return save(self, path)

    def __deepcopy__(self, memo: dict) -> "QuantizedModel":
        plan = Plan(
            {k: copy.deepcopy(q, memo) for k, q in self.plan.quantizers.items()},
            list(self.plan.rewrites),
            copy.deepcopy(self.plan.notes),
            {k: copy.deepcopy(o, memo) for k, o in self.plan.operators.items()},
            self.plan.provenance,
        )
        return QuantizedModel(self.graph.clone(), plan, preprocess=self.preprocess, reference=self.reference)

    def extra_repr(self) -> str:
        return f"{self.name}, {self.method}, {self.bits}, {self.size_mb:.2f} MB"


def float_model(model: Any) -> QuantizedModel:
    """A loaded FP32 model as a QuantizedModel with an empty plan (method "fp32"), so that it is run and measured the
    same way. It shares the model's graph and is to be read; ``float_copy`` makes one to hand out.

    model: :class:`quantlens.models.Model` (captured once and kept on it) or a QuantizedModel, returned as it is.
    """
    if isinstance(model, QuantizedModel):
        return model
    if not hasattr(model, "derived"):
        raise QuantlensError(
            f"{type(model).__name__} is no float or quantized model; give what ql.load_model or ql.quantize gives "
            "(load_model takes an nn.Module, too)"
        )
    if "float_model" not in model.derived:
        plan = Plan(provenance=Provenance.of(model, method="fp32", bits=FP32))
        model.derived["float_model"] = QuantizedModel(graph_of(model), plan, preprocess=model.preprocess)
    return model.derived["float_model"]


def float_copy(model: Any) -> QuantizedModel:
    """As :func:`float_model`, with a graph and a plan of its own: whatever is done to it, ``model`` stays as it is."""
    made = copy.deepcopy(float_model(model))
    made._like = made._like if isinstance(model, QuantizedModel) else [model]
    return made
