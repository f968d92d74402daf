"""What a method is, and how one is found.

A method is one file in this folder with one class: its paper as data (:class:`MethodInfo`) and one verb,
:meth:`Method.build`, which reads calibration images, may rewrite the graph exactly, and returns a quantizer for every
edge it quantizes. Everything else (options, bits, folding LayerScale, the record of what was done) is here.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from quantlens.ambient import isolated
from quantlens.calibration import Calibration, ObservationCache
from quantlens.calibration.measured_transforms import read_as_pixels, split_outlier_channels
from quantlens.calibration.ranges import affine
from quantlens.errors import QuantlensError, UnknownNameError
from quantlens.formats import Uniform
from quantlens.formats.uniform import pixel_codes
from quantlens.graph import Edge, Graph, graph_of
from quantlens.graph.graph import VIEWS, op_name
from quantlens.graph.sites import SCALINGS
from quantlens.methods._former_options import current_options
from quantlens.qmodel import Bits, Plan, QuantizedModel
from quantlens.qmodel.bits import FLOAT
from quantlens.qmodel.model import float_copy
from quantlens.qmodel.plan import Provenance
from quantlens.qmodel.targets import TARGETS, target_named
from quantlens.transforms import fold_layer_scale

Progress = Callable[[int, int], None]
"""Called with (done, total) steps."""

MATMUL_OPERANDS, EVERYTHING = "partially", "fully"
"""What a method quantizes: operands of matrix products (LayerNorm, softmax, GELU and sums stay float), or all."""

OURS, PAPER = "ours", "paper"


@dataclass(frozen=True)
class Option:
    """An option of a method: its default, what it means, the values allowed (None: any of the type), and the name of
    the type, which a default or a choice tells by itself."""

    default: Any
    help: str
    choices: tuple[Any, ...] | None = None
    type: str = ""

    def __post_init__(self) -> None:
        if not self.type:
            values = (value for value in (self.default, *(self.choices or ())) if value is not None)
            object.__setattr__(self, "type", type(next(values, "")).__name__)


@dataclass(frozen=True)
class Departure:
    """Where a method departs from its paper: the value of a setting (or option) here, and in the paper's form."""

    setting: str
    ours: Any
    paper: Any
    what: str


@dataclass(frozen=True)
class MethodInfo:
    """A method's identity: where it comes from and what it does.

    quantizes: :data:`MATMUL_OPERANDS` or :data:`EVERYTHING`. departures: where it departs from its paper; a method that
    has any gets the option ``variant``, which undoes them all; because: why it does not by default. readings: what was
    chosen where the paper is silent or leaves a choice, or the authors' code does something else; a sentence each.
    arguments: defaults of :data:`SHARED_OPTIONS` that are not the usual ones. version: part of every result's identity;
    raise it when the method's numbers change.
    """

    name: str
    title: str
    paper: str
    venue: str
    year: int
    url: str
    quantizes: str
    summary: str
    departures: tuple[Departure, ...] = ()
    aliases: tuple[str, ...] = ()
    options: dict[str, Option] = field(default_factory=dict)
    version: int = 1
    readings: tuple[str, ...] = ()
    arguments: dict[str, Any] = field(default_factory=dict)
    because: str = "the better one"

    def __post_init__(self) -> None:
        if self.departures and "variant" not in self.options:
            help = f"{OURS}: as its departures say; {PAPER}: none of them. The default is {OURS}, {self.because}"
            variant = {"variant": Option(OURS, help, (OURS, PAPER))}
            object.__setattr__(self, "options", {**variant, **self.options})

    @property
    def citation(self) -> str:
        if not self.paper:
            return self.title or "–"
        return ", ".join(part for part in (self.paper, self.venue, str(self.year or "")) if part)

    @property
    def shared(self) -> dict[str, Option]:
        """:data:`SHARED_OPTIONS` with this method's defaults."""
        return {name: replace(o, default=self.arguments.get(name, o.default)) for name, o in SHARED_OPTIONS.items()}

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data; options and arguments of ``quantize`` are lists of name, type, default, choices, help."""

        def listed(options: Mapping[str, Option]) -> list[dict[str, Any]]:
            return [{"name": name, **asdict(option)} for name, option in options.items()]

        kept = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "because"}
        return kept | {
            "citation": self.citation,
            "departures": [asdict(departure) for departure in self.departures],
            "options": listed(self.options),
            "arguments": listed(self.shared),
        }


SHARED_OPTIONS = {
    "patch_bits": Option(8, "width of the image that the patch embedding reads (32: not quantized)"),
    "head_bits": Option(None, "width of the classifier's weight and input (None: as everywhere)", type="int"),
    "outlier_channels": Option(
        "keep",
        "input channels after an activation function that are 16 times larger than the median one: keep (as in the "
        "papers) or split (a linear layer of their own, which is exact)",
        ("keep", "split"),
    ),
    "image": Option(
        "range",
        "codes of an 8-bit image: range (one range for the normalised image, as in the papers) or pixels (the graph "
        "reads pixel/255, whose 256 values are the codes: exact)",
        ("range", "pixels"),
    ),
    "target": Option(
        None, "runtime whose integers the model must suit, for export (None: any format)", (None, *sorted(TARGETS))
    ),
}
"""What every method takes, as arguments of ``quantize``: they explain many differences between published results."""

FOR_TARGETS = {"outlier_channels": "split", "image": "pixels"}
"""Shared options that a target has by default: exact rewrites that every method gains from, at next to no cost."""


class Method(ABC):
    """One published method. Subclasses set :attr:`info` and write :meth:`build`."""

    info: ClassVar[MethodInfo]

    @abstractmethod
    def build(self, graph: Graph, calibration: Calibration, bits: Widths, run: Run) -> Plan:
        """Choose quantizers for ``graph`` and return the plan.

        graph: a copy with tensors of its own, to be rewritten exactly. bits: widths per edge. run: options, seed,
        progress.
        """

    @isolated
    def apply(
        self,
        model: Any,
        calibration: Any,
        bits: str | Bits | Mapping[str, Any],
        *,
        seed: int = 0,
        progress: Progress | None = None,
        **options: Any,
    ) -> QuantizedModel:
        """Quantize ``model`` (:class:`quantlens.models.Model`) with this method.

        calibration: float images [N, 3, H, W] prepared as the model wants them, an iterable of such batches, an image
        set or a source. Raises UnknownNameError for an option the method does not have.
        """
        widths, settings = Bits.parse(bits), self.options(options)
        images = Calibration.of(calibration, model.preprocess, device=model.device, seed=seed)
        if widths.is_float:
            return float_copy(model)
        started = time.perf_counter()
        with torch.no_grad():
            torch.default_generator.manual_seed(seed)
            graph = graph_of(model).clone()
            check_names(graph, widths)
            folded = fold_layer_scale(graph)
            split = split_outlier_channels(graph, images) if settings["outlier_channels"] == "split" else []
            pixels = self._pixels(graph, model, images, settings)
            seen = None if split or pixels or images.fingerprint is None else _seen(model, images.fingerprint)
            run = Run(self.settings(settings) | settings, seed, progress, seen)
            plan = self.build(graph, images, Widths(widths, settings), run)
        if not isinstance(plan, Plan):
            raise QuantlensError(f"the method {self.info.name} gave {type(plan).__name__}; its `build` returns a Plan")
        graph.invalidate()
        target = target_named(settings["target"])
        if target is not None:
            edges = graph.sites.edges
            plan.quantizers = {
                k: target.conform(k, q, graph.tensor(str(edges[k].value.target)) if edges[k].is_weight else None)
                for k, q in plan.quantizers.items()
            }
        plan.quantizers |= {key: pixel_codes(images.device) for key in pixels if key in plan.quantizers}
        plan.rewrites[:0] = [*split, *(["the image is read as pixel/255, whose codes are exact"] if pixels else [])]
        if folded:
            plan.rewrites.insert(0, f"LayerScale folded into {len(folded)} linear layers")
        plan.provenance = Provenance.of(
            model,
            method=self.info.name,
            method_version=self.info.version,
            bits=str(widths),
            widths=widths.to_mapping() if widths.is_mixed else None,
            seed=seed,
            options=settings,
            calibration=images.info(),
            seconds=round(time.perf_counter() - started, 3),
        )
        return QuantizedModel(graph, plan, preprocess=model.preprocess, reference=model)

    def _pixels(self, graph: Graph, model: Any, images: Calibration, settings: dict[str, Any]) -> list[str]:
        """Keys of the edges that read the image as pixels now; see :func:`~quantlens.transforms.layers.read_pixels`."""
        if settings["image"] != "pixels" or int(settings["patch_bits"]) != 8 or self.info.quantizes == EVERYTHING:
            return []
        return read_as_pixels(graph, model.preprocess, images)

    def options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All options with their values, shared ones too: defaults (those of the variant; with a target also
        :data:`FOR_TARGETS`) overridden by ``given``, but for shared ones that are None. Raises on unknown or removed
        names and values not allowed; old names get a DeprecationWarning."""
        given = {name: value for name, value in given.items() if value is not None or name not in SHARED_OPTIONS}
        given = current_options(self.info.name, given)
        known = {**self.info.shared, **self.info.options}
        for name, value in given.items():
            if name not in known:
                raise UnknownNameError(f"option of {self.info.name}", name, known)
            wanted = _unlike(name, known[name], value)
            if wanted:
                raise QuantlensError(f"{self.info.name}: option {name}={value!r}; {wanted}")
        usual = {name: option.default for name, option in known.items()}
        usual |= {name: value for name, value in self.settings({**usual, **given}).items() if name in known}
        return {**usual, **(FOR_TARGETS if given.get("target") is not None else {}), **given}

    def settings(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that departures are about, with the values of the variant in ``options``."""
        paper = options.get("variant") == PAPER
        return {d.setting: d.paper if paper else d.ours for d in self.info.departures}


def _unlike(name: str, option: Option, value: Any) -> str:
    """What to give instead of a value that an option cannot have; "" where it can."""
    if option.choices is not None:
        return "" if value in option.choices else f"choose one of {', '.join(map(str, option.choices))}"
    whole = isinstance(value, int) and not isinstance(value, bool)
    if name in ("patch_bits", "head_bits"):
        return "" if whole and (2 <= value <= 16 or value == FLOAT) else f"give 2 to 16 bits, or {FLOAT} for float"
    if option.type not in ("int", "float") or (value is None and option.default is None):
        return ""
    fits = whole or (option.type == "float" and isinstance(value, float))
    such = "" if option.default is None else f", such as {option.default}"
    return "" if fits else f"give a {'whole ' * (option.type == 'int')}number{such}"


def _seen(model: Any, fingerprint: str) -> ObservationCache:
    """What was seen of a model on the images with that fingerprint; it lives as long as the model is loaded."""
    found: ObservationCache = model.derived.setdefault(f"seen, images {fingerprint}", {})
    return found


@dataclass(frozen=True)
class Run:
    """What a method is told of the run: its options (all of them, defaults filled in), the seed, a progress
    callback, and what was seen of the float model on the same images before (for a pass over the graph as it is)."""

    options: dict[str, Any]
    seed: int
    progress: Progress | None = None
    seen: ObservationCache | None = None

    def __getitem__(self, option: str) -> Any:
        return self.options[option]


@dataclass(frozen=True)
class Widths:
    """Bits per edge: the asked-for widths, with the patch embedding's input and the classifier as the options say."""

    bits: Bits
    options: dict[str, Any]

    def of(self, graph: Graph, edge: Edge) -> int:
        """Width of an edge; 32 means that it stays in float. Raises UnsupportedError for a width that the target (an
        option) has no kernels for."""
        width, target = self._asked(graph, edge), target_named(self.options["target"])
        if target is None or width == FLOAT:
            return width
        if not target.takes(graph.sites[edge.site].kind, edge.name):
            return FLOAT
        target.check_width(width, weight=edge.is_weight)
        return width

    def weights(self, low: Tensor, high: Tensor, width: int) -> Uniform:
        """The grid of a weight's rows [out] over [low, high]: asymmetric, or what the target (an option) makes of it,
        so that weights are fitted and rounded on the grid that ships."""
        made, target = affine(low, high, width, granularity="channel", axis=0), target_named(self.options["target"])
        if target is None or not target.symmetric_weights:
            return made
        return target.symmetric(torch.maximum(low.abs(), high.abs()), made)

    def _asked(self, graph: Graph, edge: Edge) -> int:
        site = graph.sites[edge.site]
        head = self.options["head_bits"]
        if head is not None and any(site.name == h.name for h in graph.sites.head):
            return int(head)
        if not edge.is_weight and site.kind == "conv" and graph.is_image(edge.value):
            return FLOAT if self.bits.of(edge.site).activations == FLOAT else int(self.options["patch_bits"])
        widths = self.bits.of(edge.site)
        return widths.weights if edge.is_weight else widths.activations


def check_names(graph: Graph, bits: Bits) -> None:
    """Raises UnknownNameError for a module that mixed precision names and the graph does not have."""
    for name, _ in bits.modules:
        if not any(site.name == name or site.name.startswith(f"{name}.") for site in graph.sites):
            raise UnknownNameError("module or site", name, [site.name for site in graph.sites])


def matmul_operand_edges(graph: Graph) -> list[Edge]:
    """The edges that methods of the RepQ-ViT family quantize, in graph order: weights and inputs of linear and conv
    layers, and both operands of the attention's products (the softmax output once, as its reader sees it)."""
    chosen = {
        "linear": ("input", "weight"),
        "conv": ("input", "weight"),
        "scores": ("q", "k"),
        "probs": ("output",),
        "context": ("v",),
        "matmul": ("lhs", "rhs"),
    }
    return [site.edges[name] for site in graph.sites for name in chosen.get(site.kind, ())]


CHOICES = {"aten.index_select.default"}
"""Operations that choose some channels of a tensor."""


def everything_edges(graph: Graph) -> list[tuple[Edge, ...]]:
    """What a fully quantized method quantizes besides weights, in graph order: groups of edges that carry one tensor
    and so share one quantizer.

    Every value is quantized where it is made: at the ``output`` edge of the site that made it, and from there through
    operations that move values or multiply them by one number. What no site made (pixels, the sum with the position
    embedding, a concatenation, pooled tokens) is quantized at the edges that read it, which form one group. A softmax
    reads its own ``input`` edge, after bias and mask; where neither stands between it and the scores, that edge
    alone is quantized, the scores being the same tensor up to one number. Channels that are chosen out of a tensor (a
    layer split in two) are quantized where they are read, each part by itself. The classifier's output counts too.
    """
    by_node = {site.node: site for site in graph.sites}
    softmaxes = graph.sites.of_kind("probs")
    passed_on = {_origin(s.edges["input"].value) for s in softmaxes} & {s.node for s in graph.sites.of_kind("scores")}
    groups: dict[Any, list[Edge]] = {}
    for site in graph.sites:
        for edge in site.edges.values():
            if edge.is_weight:
                continue
            if edge.position is None:
                if site.node not in passed_on and not all(op_name(u) in CHOICES for u in site.node.users):
                    groups.setdefault(site.node, []).append(edge)
            elif site.kind == "probs":
                groups[edge.key] = [edge]
            elif _origin(edge.value) not in by_node:
                groups.setdefault(_origin(edge.value, scalings=False), []).append(edge)
    order = {node: i for i, node in enumerate(graph.fx.nodes)}

    def place(edge: Edge) -> tuple[int, bool, int]:
        return order[edge.node], edge.position is None, edge.position or 0

    return sorted((tuple(sorted(g, key=place)) for g in groups.values()), key=lambda g: place(g[0]))


def _origin(value: fx.Node, *, scalings: bool = True) -> fx.Node:
    """Where a value comes from, through operations that only move it or (``scalings``) multiply it by one number."""
    while op_name(value) in VIEWS or (
        scalings and op_name(value) in SCALINGS and len(value.args) == 2 and isinstance(value.args[1], int | float)
    ):
        value = value.args[0]  # type: ignore[assignment]
    return value
