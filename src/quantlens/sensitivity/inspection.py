"""Which layer hurts: every site and every block quantized alone, and the statistics of what it quantizes."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from quantlens.arguments import checked
from quantlens.calibration import Calibration, CalibrationPass, EdgeView
from quantlens.errors import QuantlensError, UnknownNameError, UnsupportedError
from quantlens.files import write_whole
from quantlens.formats import Quantizer
from quantlens.graph import Edge, Graph
from quantlens.methods import Progress, registry
from quantlens.metrics.divergence import outputs_of
from quantlens.qmodel import Bits, QuantizedModel, float_model, simulate
from quantlens.qmodel.model import pooled
from quantlens.sensitivity.alone import Effect, effects_alone
from quantlens.sensitivity.statistics import EdgeStatistics, edge_statistics

FORMAT = 1
SITE, BLOCK, EDGE = "site", "block", "edge"
GRANULARITIES = (SITE, BLOCK, EDGE)
RANKS: dict[str, Callable[[Effect], float]] = {
    "sqnr": lambda effect: -math.inf if effect.sqnr_db is None else -effect.sqnr_db,
    "kl": lambda effect: effect.kl or 0.0,
    "iou": lambda effect: -(effect.matched_iou or 0.0),
}
"""What parts are ranked by -> how much one hurts."""
SAME_DB = 60.0
"""A method's exact rewrites leave the logits at least this close to the model's: float rounding gives some 90 dB."""

Stage = Callable[[str, int, int], None]
"""Called with (what is done, steps done, steps in all)."""


@dataclass(frozen=True)
class Part:
    """A site, a block or an edge that was quantized alone.

    name, kind: of the site (``linear``), ``block``, or the edge's name. block: the block that it lies in, None outside
    of all. bits: widths of its weight and its activations (``W8A8``, ``W8``, ``A8``; ``A8/A4`` where they differ).
    effect: what it does to the output. edges: what it quantizes.
    """

    name: str
    kind: str
    block: str | None
    bits: str
    effect: Effect
    edges: tuple[EdgeStatistics, ...] = ()

    def remark(self) -> str:
        """What stands out among the channels that it quantizes, in words; empty where nothing does."""
        said = []
        for edge in self.edges:
            if edge.massive:
                named = [f"{c}: {peak:.3g}" for c, peak in zip(edge.massive[:3], edge.peaks[:3], strict=True)]
                more = f" and {len(edge.massive) - 3} more" if len(edge.massive) > 3 else ""
                said.append(f"{edge.name} channel {', '.join(named)}{more} against {edge.rest or 0.0:.3g}")
            if edge.dead:
                said.append(f"{edge.name}: {len(edge.dead)} dead channel{'s' if len(edge.dead) > 1 else ''}")
        return "; ".join(said)


@dataclass(frozen=True)
class Inspection:
    """The sites, blocks and edges of a model, each quantized alone.

    method, bits, seed, options: whose quantizers they are. images: where the images come from. seconds: of the
    statistics and of the pass over all parts (calibration not counted).
    """

    model: str
    checkpoint_sha256: str | None
    method: str
    bits: str
    seed: int
    parts: Mapping[str, tuple[Part, ...]]
    images: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    rewrites: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def sites(self) -> tuple[Part, ...]:
        """Sites in execution order."""
        return self.parts.get(SITE, ())

    @property
    def blocks(self) -> tuple[Part, ...]:
        """Blocks in execution order."""
        return self.parts.get(BLOCK, ())

    @property
    def detects(self) -> bool:
        """Whether the model gives boxes."""
        return any(part.effect.matched_iou is not None for parts in self.parts.values() for part in parts)

    def ranked(self, by: str = SITE, rank: str | None = None) -> list[Part]:
        """Parts ("site", "block", "edge") with the one that hurts most first: by falling noise (``rank="sqnr"``), by
        falling KL divergence ("kl") or, of a detector, by rising IoU ("iou", the default there; else
        sqnr). Raises UnknownNameError, and UnsupportedError for one that the model does not have."""
        rank = rank or ("iou" if self.detects else "sqnr")
        check_names((by,), rank)
        lacking = {"kl": "features, which have no KL divergence", "iou": "no boxes, which an IoU is of"}
        field = {"kl": "kl", "iou": "matched_iou"}.get(rank, "")
        if field and any(getattr(part.effect, field) is None for part in self.parts.get(by, ())):
            raise UnsupportedError(f"{self.model} gives {lacking[rank]}; rank by sqnr")
        return sorted(self.parts.get(by, ()), key=lambda part: RANKS[rank](part.effect), reverse=True)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that is valid JSON; parts in execution order."""
        data = {"format": FORMAT, **asdict(self)}
        return data | {f"{by}s": list(found) for by, found in data.pop("parts").items()}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> "Inspection":
        """The inverse of :meth:`to_dict`. Raises QuantlensError for another format."""
        rest = dict(data)
        if rest.pop("format", None) != FORMAT:
            raise QuantlensError(
                f"the inspection has format {data.get('format')}, this quantlens reads {FORMAT}; inspect it again"
            )
        parts = {by: tuple(map(_read_part, rest.pop(f"{by}s"))) for by in GRANULARITIES if f"{by}s" in rest}
        return Inspection(parts=parts, rewrites=tuple(rest.pop("rewrites")), **rest)

    def save(self, path: str | Path) -> Path:
        """Write :meth:`to_dict` as JSON; an existing file is replaced at once or not at all. Raises StorageError."""
        return write_whole(
            Path(path), json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n", what="the inspection"
        )


def _read_part(data: Mapping[str, Any]) -> Part:
    edges = tuple(EdgeStatistics(**edge) for edge in data["edges"])
    return Part(**{**data, "effect": Effect(**data["effect"]), "edges": edges})


@checked
def inspect(
    model: Any,
    images: Any,
    bits: str | Bits | Mapping[str, Any] = "W8A8",
    *,
    method: str = "minmax",
    seed: int = 0,
    by: str | Sequence[str] = (SITE, BLOCK),
    rows: int | None = None,
    progress: Stage | None = None,
    **options: Any,
) -> Inspection:
    """Quantize every site and every block of a model alone, and measure what that does to the output.

    model: :class:`quantlens.models.Model`. images: as for calibration; they set the ranges, and the output's noise and
    KL divergence are measured on them. bits, method, options: the quantizers, made once for the whole model; a method
    that rewrites the model exactly is inspected after its rewrites. by: "site", "block" and "edge", any of them. rows:
    see :func:`quantlens.sensitivity.alone.effects_alone`.

    Raises QuantlensError where the bits are FP32, UnknownNameError for a name that does not exist, UnsupportedError for
    a method whose parts cannot be taken one by one: one that trains weights, or computes in integers throughout.
    """
    by, bits, step = check_names(by), Bits.parse(bits), progress or (lambda what, done, total: None)
    if bits.is_float:
        raise QuantlensError(f"{bits} quantizes nothing; give bits such as W8A8 or W4A4")
    calibration = Calibration.of(images, model.preprocess, device=model.device, seed=seed)
    quantized = registry.get(method).apply(
        model, calibration, bits, seed=seed, progress=partial(step, "choosing ranges"), **options
    )
    _check_same(model, quantized, calibration)
    graph, plan = quantized.graph, quantized.plan
    named = [(kind, name, keys) for kind in by for name, keys in _members(graph, plan.quantizers, kind).items()]
    if not named:
        raise UnsupportedError(f"{model.name} has no transformer blocks; inspect its sites instead")
    started = time.perf_counter()
    seen = _statistics(graph, plan.quantizers, calibration, seed, partial(step, "statistics"))
    looked = time.perf_counter()
    keys_of = [keys for _, _, keys in named]
    told = partial(step, "one part at a time")
    settings: dict[str, Any] = {"outputs": outputs_of(model), "rows": rows, "progress": told}
    effects = effects_alone(graph, plan.quantizers, keys_of, calibration, **settings)
    parts: dict[str, tuple[Part, ...]] = dict.fromkeys(by, ())
    for (kind, name, keys), effect in zip(named, effects, strict=True):
        parts[kind] += (_part(graph, kind, name, [seen[key] for key in keys], effect),)
    return Inspection(
        model.name,
        model.checkpoint_sha256,
        quantized.method,
        quantized.bits,
        seed,
        parts,
        calibration.info(),
        dict(plan.provenance.options),
        tuple(plan.rewrites),
        {"statistics": round(looked - started, 3), "alone": round(time.perf_counter() - looked, 3)},
    )


def check_names(by: str | Sequence[str], rank: str = "sqnr") -> tuple[str, ...]:
    """The granularities, each once. Raises UnknownNameError for a granularity or a rank that does not exist,
    QuantlensError without any."""
    wanted = (by,) if isinstance(by, str) else tuple(dict.fromkeys(by))
    if not wanted:
        raise QuantlensError(f"nothing to inspect: choose some of {', '.join(GRANULARITIES)}")
    for what, name, known in [("rank", rank, RANKS), *(("granularity", one, GRANULARITIES) for one in wanted)]:
        if name not in known:
            raise UnknownNameError(what, name, known)
    return wanted


def _check_same(model: Any, quantized: QuantizedModel, calibration: Calibration) -> None:
    """Raises UnsupportedError unless the graph without quantizers is the model, and quantizers are all that is new."""
    if quantized.plan.operators:
        raise UnsupportedError(
            f"{quantized.method} computes in integers throughout, so that no site can be quantized alone; choose a "
            "method that sets ranges only, such as minmax, percentile or repq-vit"
        )
    images = calibration.chunk(0)[:4]
    with torch.no_grad():
        expected = float_model(model).outputs(images).logits.double()
        logits = simulate(quantized.graph, {})(images)[0]
        logits = logits if quantized.task == "detect" else pooled(logits)
        error = (logits.double() - expected).square().sum()
    if float(error) > float(expected.square().sum()) * 10 ** (-SAME_DB / 10):
        raise UnsupportedError(
            f"{quantized.method} changes the model's weights besides quantizing them, so that no site can be quantized "
            "alone; choose a method that sets ranges only, such as minmax, percentile or repq-vit"
        )


def _members(graph: Graph, quantizers: Mapping[str, Any], by: str) -> dict[str, list[str]]:
    """Name -> keys of the quantizers that belong to it, in graph order; parts without a quantizer are left out."""
    found: dict[str, list[str]] = {}
    for key, edge in graph.sites.edges.items():
        name = {SITE: edge.site, BLOCK: _block_of(graph, edge.site), EDGE: key}[by]
        if name is not None and key in quantizers:
            found.setdefault(name, []).append(key)
    return found


def _block_of(graph: Graph, site: str) -> str | None:
    """The block of a site. What lies outside of a detector's blocks counts as parts, too (backbone, heads): the largest
    modules that hold no block."""
    block = graph.sites[site].block
    if block is not None or graph.boxes is None:
        return block
    names = [f"{b.name}." for b in graph.sites.blocks]
    prefixes = accumulate(site.split("."), "{}.{}".format)
    return next((p for p in prefixes if not any(name.startswith(f"{p}.") for name in names)), site)


def _statistics(
    graph: Graph, quantizers: Mapping[str, Quantizer], calibration: Calibration, seed: int, progress: Progress
) -> dict[str, EdgeStatistics]:
    """By edge key, of the float model."""
    found: dict[str, EdgeStatistics] = {}

    def on_edge(edge: Edge, view: EdgeView) -> None:
        found[edge.key] = edge_statistics(edge, graph.sites[edge.site].kind, view, quantizers[edge.key])

    wanted = [edge for key, edge in graph.sites.edges.items() if key in quantizers]
    with torch.no_grad():
        CalibrationPass(graph, calibration, sequential=False, seed=seed).run(wanted, on_edge, progress)
    return found


def _part(graph: Graph, by: str, name: str, edges: list[EdgeStatistics], effect: Effect) -> Part:
    site = graph.sites[graph.sites.edges[edges[0].key].site]
    kind = {SITE: site.kind, BLOCK: BLOCK, EDGE: edges[0].name}[by]
    widths = [f"{'W' if edge.is_weight else 'A'}{edge.bits}" for edge in edges]
    weights, activations = ([w for w in dict.fromkeys(widths) if w[0] == letter] for letter in "WA")
    bits = "/".join(weights) + "/".join(activations)
    return Part(name, kind, site.block, bits, effect, () if by == BLOCK else tuple(edges))
