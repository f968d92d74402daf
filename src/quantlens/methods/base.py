"""What a method is, and how one is found.

A method is one file in this folder with one class: its paper as data (:class:`MethodInfo`) and one verb,
:meth:`Method.build`, which reads calibration images, may rewrite the graph exactly, and returns a quantizer for every
edge it quantizes. Everything else (options, bits, folding LayerScale, the record of what was done) is here; methods
import what `build` is written in (Calibration, Graph, Edge, Plan, FLOAT) from here, too.
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from numbers import Integral
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from quantlens.ambient import isolated
from quantlens.calibration import Calibration, ObservationCache, affine, read_as_pixels, split_outlier_channels
from quantlens.errors import QuantlensError, UnknownNameError, UnsupportedError
from quantlens.formats import Uniform, pixel_codes
from quantlens.graph import SCALINGS, VIEWS, Edge, Graph, graph_of, op_name, walk
from quantlens.methods._everything import everything_edges as everything_edges, of_target
from quantlens.methods._former_options import current_options
from quantlens.metrics.divergence import OutputKind, outputs_of
from quantlens.qmodel import FLOAT, TARGETS, Bits, Plan, Provenance, QuantizedModel, Target, float_copy, target_named
from quantlens.transforms import fold_layer_scale, scale_queries

Progress = Callable[[int, int], None]
"""Called with (done, total) steps."""

MATMUL_OPERANDS, EVERYTHING = "partially", "fully"
"""What a method quantizes: operands of matrix products (LayerNorm, softmax, GELU and sums stay float), or all."""

OURS, PAPER = "ours", "paper"


@dataclass(frozen=True)
class Option:
    """An option of a method: its default, what it means, the values allowed (None: any of the type), and the name of
    the type, which a default or a choice tells by itself. A number lies above ``above``, and from ``least`` to
    ``most``."""

    default: Any
    help: str
    choices: tuple[Any, ...] | None = None
    type: str = ""
    above: float = -math.inf
    least: float = -math.inf
    most: float = math.inf

    def __post_init__(self) -> None:
        if not self.type:
            values = (value for value in (self.default, *(self.choices or ())) if value is not None)
            object.__setattr__(self, "type", type(next(values, "")).__name__)

    def instead_of(self, value: Any) -> str:
        """What to give instead of a value that the option cannot have; "" where it can."""
        if self.choices is not None:
            return "" if value in self.choices else f"choose one of {', '.join(map(str, self.choices))}"
        if self.type not in ("int", "float") or (value is None and self.default is None):
            return ""
        is_number = isinstance(value, int if self.type == "int" else int | float) and not isinstance(value, bool)
        if is_number and self.above < value and self.least <= value <= self.most and math.isfinite(value):
            return ""
        ends = {"above": self.above, "of at least": self.least, "of at most": self.most} if is_number else {}
        limits = " and ".join(f"{word} {end}" for word, end in ends.items() if math.isfinite(end))
        such = "" if self.default is None else f", such as {self.default}"
        return f"give a {'whole ' * (self.type == 'int')}number{limits and ' '}{limits}{such}"


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
    raise it when the method's numbers change. floating: whether it knows floating-point formats.
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
    floating: bool = False

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
        kept = {name: value for name, value in asdict(self).items() if name != "because"}
        for key, options in (("options", self.options), ("arguments", self.shared)):
            kept[key] = [
                {"name": name, "default": o.default, "help": o.help, "choices": o.choices, "type": o.type}
                for name, o in options.items()
            ]
        return kept | {"citation": self.citation}


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


class Method(ABC):
    """One published method. Subclasses set :attr:`info` and write :meth:`build`."""

    info: ClassVar[MethodInfo]

    @abstractmethod
    def build(self, graph: Graph, calibration: Calibration, bits: "Widths", run: "Run") -> Plan:
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
        asked, settings = Bits.parse(bits), self.options(options)
        if not isinstance(seed, Integral) or not abs(seed) < 2**63:
            raise QuantlensError(f"seed is {seed!r}; give a whole number, such as 0")
        self._check_formats(asked)
        widths = Widths(asked, settings)
        images = Calibration.of(calibration, model.preprocess, device=model.device, seed=seed)
        if asked.is_float:
            return float_copy(model)
        started = time.perf_counter()
        with torch.no_grad():
            torch.default_generator.manual_seed(seed)
            graph = graph_of(model).clone()
            _check_modules(graph, asked)
            done, split, pixels = self._rewritten(graph, model, images, settings)
            known = not split and not pixels and images.fingerprint is not None
            seen = model.derived.setdefault(f"seen, images {images.fingerprint}", {}) if known else None
            run = Run(self.settings(settings) | settings, seed, progress, seen, outputs_of(model))
            plan = self.build(graph, images, widths, run)
        if not isinstance(plan, Plan):
            raise QuantlensError(f"the method {self.info.name} gave {type(plan).__name__}; its `build` returns a Plan")
        graph.invalidate()
        plan.quantizers |= {key: pixel_codes(images.device) for key in pixels if key in plan.quantizers}
        widths.conform(graph, plan, images, seed)
        plan.share_weights(graph)
        order = {key: place for place, key in enumerate(graph.sites.edges)}
        plan.quantizers = dict(sorted(plan.quantizers.items(), key=lambda item: order.get(item[0], -1)))
        plan.rewrites[:0] = done
        plan.provenance = Provenance.of(
            model,
            method=self.info.name,
            method_version=self.info.version,
            bits=str(asked),
            widths=asked.to_mapping() if asked.is_mixed else None,
            seed=seed,
            options=settings,
            calibration=images.info(content=True),
            seconds=round(time.perf_counter() - started, 3),
        )
        # formats whose parameters follow from their bits alone are made on the CPU
        return QuantizedModel(graph, plan, preprocess=model.preprocess, reference=model).to(images.device)

    def _check_formats(self, asked: Bits) -> None:
        """Raises UnsupportedError for floating-point formats of a method that has integers alone."""
        if asked.floating and not self.info.floating:
            from quantlens.methods.registry import available

            known = [name for name, info in available().items() if info.floating]
            raise UnsupportedError(
                f"{self.info.name} quantizes to integers, not to {asked.floating[0]}: choose {', '.join(known[:-1])} "
                f"or {known[-1]}, or widths such as W8A8"
            )

    def _rewritten(
        self, graph: Graph, model: Any, images: Calibration, settings: Mapping[str, Any]
    ) -> tuple[list[str], list[str], list[str]]:
        """Exact rewrites for any method: (what was done, in sentences; of split channels; edges that read pixels)."""
        folded = fold_layer_scale(graph)
        done = [f"LayerScale folded into {len(folded)} linear layers"] if folded else []
        split = split_outlier_channels(graph, images) if settings["outlier_channels"] == "split" else []
        pixels: list[str] = []
        target = target_named(settings["target"])
        signed = target is not None and target.symmetric_activations  # codes of pixels are not
        own = settings["patch_bits"] == 8 and self.info.quantizes != EVERYTHING and not signed
        if settings["image"] == "pixels" and own:
            pixels = read_as_pixels(graph, model.preprocess, images)
        done += scale_queries(graph) if target is not None and target.untried else []
        done += [*split, *(["the image is read as pixel/255, whose codes are exact"] if pixels else [])]
        return done, split, pixels

    def options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All options with their values, shared ones too: defaults (those of the variant; with a target also
        :attr:`Target.options`) overridden by ``given``, but for shared ones that are None. Raises on unknown or removed
        names and values not allowed; old names get a DeprecationWarning."""
        given = {name: value for name, value in given.items() if value is not None or name not in SHARED_OPTIONS}
        given = current_options(self.info.name, given)
        known = {**self.info.shared, **self.info.options}
        for name, value in given.items():
            if name not in known:
                raise UnknownNameError(f"option of {self.info.name}", name, known)
            wanted = known[name].instead_of(value)
            if name in ("patch_bits", "head_bits"):
                fits = type(value) is int and (2 <= value <= 16 or value == FLOAT)
                wanted = "" if fits else f"give 2 to 16 bits, or {FLOAT} for float"
            if wanted:
                raise QuantlensError(f"{self.info.name}: option {name}={value!r}; {wanted}")
        usual = {name: option.default for name, option in known.items()}
        usual |= {name: value for name, value in self.settings({**usual, **given}).items() if name in known}
        target = target_named(given.get("target"))
        of_target = {} if target is None else {k: v for k, v in target.options.items() if k in known}
        return {**usual, **of_target, **given}

    def settings(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that departures are about, with the values of the variant in ``options``."""
        paper = options.get("variant") == PAPER
        return {d.setting: d.paper if paper else d.ours for d in self.info.departures}


def _check_modules(graph: Graph, asked: Bits) -> None:
    """Raises UnknownNameError for a module with widths of its own that the graph does not have."""
    names = [site.name for site in graph.sites]
    for module, _ in asked.modules:
        if not any(f"{name}.".startswith(f"{module}.") for name in names):
            raise UnknownNameError("module or site", module, names)


@dataclass(frozen=True)
class Run:
    """What a method is told of the run: its options (all, defaults filled in), the seed, a progress callback, what was
    seen of the float model on the same images before, and what the model gives."""

    options: dict[str, Any]
    seed: int
    progress: Progress | None = None
    seen: ObservationCache | None = None
    outputs: OutputKind = "softmax"

    def __getitem__(self, option: str) -> Any:
        return self.options[option]


@dataclass(frozen=True)
class Widths:
    """Bits per edge: the asked-for widths, with the patch embedding's input and the classifier as the options say."""

    bits: Bits
    options: dict[str, Any]

    @property
    def target(self) -> Target | None:
        return target_named(self.options["target"])

    def of(self, graph: Graph, edge: Edge) -> int:
        """Width of an edge; 32 means that it stays in float. Raises UnsupportedError for a width that the target (an
        option) has no kernels for."""
        site, (width, name) = graph.sites[edge.site], self._asked(graph, edge)
        if self.target is None or width == FLOAT:
            return width
        if name:
            raise UnsupportedError(
                f"{self.target.name} has no kernels for {name}: choose widths such as W8A8, or leave the target out to "
                "simulate"
            )
        if (site.kind, edge.name) not in self.target.edges:
            return FLOAT
        self.target.check_width(width, weight=edge.is_weight)
        return width

    def format_of(self, graph: Graph, edge: Edge) -> str:
        """The floating-point format of an edge; "" where it has integers, or stays in float."""
        return self._asked(graph, edge)[1]

    def _asked(self, graph: Graph, edge: Edge) -> tuple[int, str]:
        """Width and floating-point format of an edge, before the target is looked at."""
        site, head, widths = graph.sites[edge.site], self.options["head_bits"], self.bits.of(edge.site)
        width = widths.weights if edge.is_weight else widths.activations
        if head is not None and any(site.name == h.name for h in graph.sites.head):
            return int(head), ""
        if width != FLOAT and not edge.is_weight and site.kind == "conv" and graph.is_image(edge.value):
            return int(self.options["patch_bits"]), ""
        return width, widths.formats[0 if edge.is_weight else 1]

    def weights(self, low: Tensor, high: Tensor, width: int) -> Uniform:
        """The grid of a weight's rows [out] over [low, high]: asymmetric, or what the target (an option) makes of it,
        so that weights are fitted and rounded on the grid that ships."""
        made = affine(low, high, width, granularity="channel", axis=0)
        if self.target is None or not self.target.symmetric_weights:
            return made
        return self.target.symmetric(torch.maximum(low.abs(), high.abs()), made)

    def conform(self, graph: Graph, plan: Plan, images: Calibration, seed: int) -> None:
        """Bring a plan's quantizers inside the target (an option), which may add some; where it quantizes every tensor,
        those of activations are chosen here, whatever the method has chosen."""
        if self.target is None:
            return
        if self.target.everything:
            plan.quantizers = {k: q for k, q in plan.quantizers.items() if graph.sites.edges[k].is_weight}
        for key, quantizer in plan.quantizers.items():
            edge = graph.sites.edges[key]
            weight = graph.tensor(str(edge.value.target)) if edge.is_weight else None
            plan.quantizers[key] = self.target.conform(key, quantizer, weight)
        plan.quantizers |= of_target(self.target, graph, plan, images, seed)


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


def quantized_edges(graph: Graph, bits: Widths) -> list[Edge]:
    """:func:`matmul_operand_edges` that do not stay in float."""
    return [edge for edge in matmul_operand_edges(graph) if bits.of(graph, edge) != FLOAT]


def readers(graph: Graph, node: fx.Node, through: Collection[str] = VIEWS | SCALINGS) -> list[tuple[fx.Node, fx.Node]]:
    """What reads a value after the operations ``through``, each with the node whose value it reads; sites end a way."""

    def passing(value: fx.Node) -> list[fx.Node]:
        return [user for user in value.users if op_name(user) in through and user not in graph.sites.by_node]

    return [(u, value) for value in walk([node], passing) for u in value.users if u not in passing(value)]
