"""The building blocks of methods, each on a layer or a problem of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import quantlens as ql
from benchmarks.quality.case import Case, Quantity
from benchmarks.quality.subjects import loaded, pictures, small, small_network
from quantlens.calibration import Calibration, CalibrationPass, Observation
from quantlens.calibration.ranges import affine, minmax, mse, symmetric
from quantlens.calibration.ranges.similarity import (
    Objective,
    Operand,
    Ranking,
    alternate_pair,
    candidate_factors,
)
from quantlens.formats import Uniform
from quantlens.graph import graph_of
from quantlens.methods import bit_split
from quantlens.qmodel import Plan, QuantizedModel
from quantlens.reconstruction import (
    AdaRound,
    annealed_beta,
)
from quantlens.reconstruction.closed_form import Grid, Moments, output_shift, ridge, round_columns, round_halves
from quantlens.transforms.equalisation import balance, equalise_norms
from quantlens.transforms.norms import find_norm_groups


def _of(model: Any, images: Tensor) -> Calibration:
    return Calibration.of(images, model.preprocess)


def _logits(model: Any, graph: Any, plan: Plan, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return QuantizedModel(graph, plan, preprocess=model.preprocess)(images)


# -- layers of the small model ---------------
def _gptq(site: str) -> Quantity:
    """Squared output error of a layer that gptq fitted to that of rounding to nearest, on the float inputs."""

    def quantity(seed: int) -> float:
        model, images, key = small("vit", seed), pictures(seed), f"{site}.weight"
        graph, seen = graph_of(model), []
        CalibrationPass(graph, _of(model, images), sequential=False).run(
            [graph.sites[site].edges["input"]], lambda edge, look: seen.extend(look.tensors())
        )
        inputs, weight = torch.cat(seen).flatten(0, -2), graph.tensor(key)
        quantized = [
            ql.quantize(model, images, method=method, bits="W3A32", seed=seed) for method in ("gptq", "repq-vit")
        ]
        errors = [
            float((inputs @ (q.plan.quantizers[key](q.graph.tensor(key)) - weight).T).square().sum()) for q in quantized
        ]
        return errors[0] / errors[1]

    return quantity


def _bit_split(seed: int) -> float:
    """The worst layer's output error with codes fitted to rounding to nearest, on the layers' own quantized inputs."""
    model, images = small("vit", seed), pictures(seed)
    images = torch.cat([images, images.flip(-1), images.flip(-2), images.mT])  # enough rows for every layer
    graph, errors = graph_of(model), {}
    sites = [s for s in graph.sites.of_kind("linear") if "blocks" in s.name]
    enough, bit_split.ENOUGH = bit_split.ENOUGH, 4
    try:
        q = ql.quantize(model, images, method="bit-split", bits="W3A6", damping=0.0, seed=seed)
        for how in ("response", "round"):
            found: dict[str, float] = {}

            def note(edge: Any, look: Any, how: str = how, found: dict[str, float] = found) -> None:
                inputs = torch.cat(list(look.tensors())).flatten(0, -2)
                weight, got = (g.tensor(graph.sites[edge.site].weight) for g in (graph, q.graph))
                if how == "round":
                    codes, scale = bit_split.round_alternating(weight, 3)
                    got = codes * scale[:, None]
                quantized = q.plan.quantizers[edge.key](inputs)
                found[edge.site] = float((quantized @ got.T - inputs @ weight.T).square().mean())

            CalibrationPass(graph, _of(model, images), sequential=False).run([s.edges["input"] for s in sites], note)
            errors[how] = found
    finally:
        bit_split.ENOUGH = enough
    return max(errors["response"][name] / errors["round"][name] for name in errors["round"])


# -- closed form, rounding, scales ---------------
def _problem(seed: int, out: int) -> tuple[Tensor, Tensor, Tensor]:
    """Correlated inputs [300, 24] with a mean, the same coarsely rounded, and a weight [out, 24]."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(24, 24, generator=generator) * torch.linspace(0.1, 2, 24)
    inputs = torch.randn(300, 24, generator=generator) @ mix + 3 * torch.randn(24, generator=generator)
    return inputs, (inputs / 2).round() * 2, torch.randn(out, 24, generator=generator)


def _ridge(seed: int) -> float:
    inputs, rough, weight = _problem(seed, 7)
    moments = Moments.of([(rough, inputs)])
    fitted = ridge(weight, moments, 1e-3)
    outputs = inputs @ weight.T
    before = rough @ weight.T - outputs
    after = rough @ fitted.T - output_shift(weight, fitted, moments).float() - outputs
    return float(after.square().sum() / before.square().sum())


def _compensated(how: Any, bits: int) -> Quantity:
    def quantity(seed: int) -> float:
        inputs, _, weight = _problem(seed, 40)
        gram = inputs.double().T @ inputs.double()
        grid = Grid.of(affine(*minmax(Observation.of(weight)), bits, granularity="channel", axis=0))
        errors = []
        for rounded in (how(weight, gram, grid, damping=0.01), grid.round(weight)):
            change = (rounded - weight).double()
            errors.append(float(((change @ gram) * change).sum()))
        return errors[0] / errors[1]

    return quantity


def _learned_rounding(straight: bool, bits: int, how: str) -> Quantity:
    """Output error of a layer with learned rounding to rounding to nearest."""

    def quantity(seed: int) -> float:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(256, 8, generator=generator) @ torch.randn(8, 24, generator=generator)
        x = x + 0.3 * torch.randn(256, 24, generator=generator)
        weight = torch.randn(16, 24, generator=generator)
        seen = Observation.of(weight)
        quantizer = (
            symmetric(*minmax(seen), bits, granularity="channel", axis=0)
            if how == "symmetric"
            else affine(*mse(seen, bits), bits, granularity="channel", axis=0)
        )
        rounding = AdaRound(quantizer, weight, straight_through=straight)
        nearest = float((x @ (quantizer(weight) - weight).T).square().mean())
        optimiser = torch.optim.Adam(rounding.parameters(), lr=0.03)
        for step in range(200):
            if straight:
                optimiser.param_groups[0]["lr"] = 0.03 * (1 - step / 200)
            loss = (x @ (rounding() - weight).T).square().mean() / nearest
            beta = annealed_beta(step / 200)
            if not straight and beta is not None:
                loss = loss + rounding.regulariser(beta) / weight.numel()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return float((x @ (rounding.harden() - weight).T).square().mean()) / nearest

    return quantity


def _learned_scale(seed: int) -> float:
    """Squared error of a scale learned from a range 0.4 times as wide to that range's."""
    from quantlens.reconstruction.scales import LearnedScale

    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 7, 6, generator=generator) * torch.tensor([0.2, 1.0, 3.0, 0.5, 8.0, 1.5])
    learned = LearnedScale(Uniform(torch.tensor(0.3), torch.tensor(6), 4, signed=False))
    with torch.no_grad():
        learned.ratio.mul_(0.4)
    before = float((learned(x) - x).square().mean())
    optimiser = torch.optim.Adam(learned.parameters(), lr=0.01)
    for _ in range(200):
        optimiser.zero_grad()
        (learned(x) - x).square().mean().backward()
        optimiser.step()
    return float((learned.freeze()(x) - x).square().mean()) / before


def _balanced_norm(seed: int) -> float:
    """Error behind a LayerNorm of uneven channels, one scale of 5 bits: balanced to not."""
    network: Any = small_network("vit", seed)
    size = torch.exp(1.5 * torch.randn(32, generator=torch.Generator().manual_seed(1 + seed)))
    network.blocks[0].norm1.weight.data *= size
    network.blocks[0].norm1.bias.data *= size
    network.blocks[0].attn.qkv.weight.data /= size
    graph = graph_of(loaded(network)).clone()
    group = find_norm_groups(graph)[0]
    nodes = [n for n in graph.fx.nodes if n.op == "call_function"]
    nodes = nodes[: nodes.index(group.norm.node) + 1]

    def normed() -> Tensor:
        return graph.run(nodes, {graph.input: pictures(seed)}, keep=[group.norm.node])[group.norm.node].reshape(-1, 32)

    def error() -> float:
        x, weight = normed(), graph.tensor(str(group.linears[0].weight))
        got = affine(*minmax(Observation.of(x.reshape(1, -1))), 5)(x)
        return float(((got - x) @ weight.T).square().mean())

    before, x = error(), normed()
    equalise_norms(graph, [group], {group.norm.name: balance(x.amin(0), x.amax(0))})
    return error() / before


def _inversions(got: Tensor, expected: Tensor) -> float:
    """Share of the pairs of columns whose order in ``got`` [..., w] is the reverse of that in ``expected``; a tie of
    two columns that differ counts half."""
    ranking = Ranking.of(expected, 0.0)
    columns = got.reshape(-1, got.shape[-1]).T
    found = (columns[ranking.first] - columns[ranking.second]).sign_() * ranking.sign
    known = ranking.sign != 0
    return float(((1 - found)[known] / 2).mean()) if bool(known.any()) else 0.0


def _ranking(seed: int) -> float:
    """Pairs of scores in the wrong order with the ranking loss to without, scores with a few far-out values."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(4, 30, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    left[:, :2] *= 6
    left, right = (Operand.of(x, x.abs().max() / 7, -8, 7) for x in (left, right))
    expected = left.values @ right.values.mT
    unit = float(expected.var(-1).mean().sqrt())
    found = []
    for ranking in (Ranking.of(expected, 0.1 * unit, weight=1.0 / unit), None):
        objective = Objective(expected, ranking=ranking) if ranking else Objective(expected)
        a, b, _ = alternate_pair(objective, left, right, candidate_factors(0.5, 1.2, 100), 20, first="left")
        found.append(_inversions(a.quantized() @ b.quantized().mT, expected))
    return found[0] / found[1]


CASES = (
    *(
        Case(f"gptq/{site}", "output error of a layer to rounding to nearest, W3", _gptq(site), below=0.6)
        for site in ("blocks.0.attn.proj", "blocks.1.mlp.fc2")
    ),
    Case("bit-split/layers", "worst layer's output error to rounding, W3A6", _bit_split, below=0.75),
    Case("parts/ridge", "output error with ridge and shift to without", _ridge, below=0.9),
    *(
        Case(f"parts/{how.__name__}-{bits}", "output error to rounding to nearest", _compensated(how, bits), below=0.9)
        for how in (round_columns, round_halves)
        for bits in (2, 4, 8)
    ),
    *(
        Case(
            f"parts/adaround-{'straight' if straight else 'soft'}-{bits}-{how}",
            "output error to rounding to nearest",
            _learned_rounding(straight, bits, how),
            below=0.85,
        )
        for straight in (False, True)
        for bits in (2, 4)
        for how in ("asymmetric", "symmetric")
    ),
    Case("parts/learned-scale", "error of a learned scale to its bad start", _learned_scale, below=0.6),
    Case(
        "parts/balanced-norm", "error behind a LayerNorm, balanced to not, uneven channels", _balanced_norm, below=0.05
    ),
    Case("parts/ranking", "pairs in the wrong order with the ranking loss to without", _ranking, below=1),
)
