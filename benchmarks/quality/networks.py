"""Training of blocks; biases; MLPs with another activation function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import quantlens as ql
from benchmarks.quality.case import Case, Quantity
from benchmarks.quality.subjects import calibration, digits, held_out, kl, pictures, small
from quantlens.calibration import Calibration
from quantlens.graph import graph_of
from quantlens.qmodel import Plan, QuantizedModel
from quantlens.reconstruction import Settings, find_units, mse, reconstruct
from quantlens.reconstruction.bias import correct_biases
from quantlens.reconstruction.mlp import Fit, replace_gelu


def _of(model: Any, images: Tensor) -> Calibration:
    return Calibration.of(images, model.preprocess)


def _logits(model: Any, graph: Any, plan: Plan, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return QuantizedModel(graph, plan, preprocess=model.preprocess)(images)


# -- biases, MLPs ---------------
def _biases(bits: str) -> Quantity:
    """Error of the shipped model's held-out logits with corrected biases to without."""

    def quantity(seed: int) -> float:
        images, _, expected = held_out()
        q = ql.quantize(digits(), calibration(seed), method="minmax", bits=bits, seed=seed)
        before = float((_logits(digits(), q.graph, q.plan, images) - expected).square().mean())
        correct_biases(q.graph, q.plan.quantizers, _of(digits(), calibration(seed)))
        return float((_logits(digits(), q.graph, q.plan, images) - expected).square().mean()) / before

    return quantity


def _relu(steps: int | None, seed: int) -> tuple[Any, dict[str, tuple[float, float]]]:
    """The shipped model with ReLU for GELU: as it is (None), refitted (0), or trained."""
    graph = graph_of(digits()).clone()
    if steps is None:
        for gelu in graph.sites.of_kind("gelu"):
            gelu.node.target, gelu.node.kwargs = torch.ops.aten.relu.default, {}
        graph.invalidate()
        return graph, {}
    with torch.no_grad():
        return graph, replace_gelu(graph, _of(digits(), calibration(seed)), Fit(steps), {}, seed=seed)


def _relu_kl(one: int, other: int | None) -> Quantity:
    def quantity(seed: int) -> float:
        images, _, expected = held_out()
        with torch.inference_mode():
            found = [kl(expected, _relu(steps, seed)[0](images)) for steps in (one, other)]
        return found[0] / found[1]

    return quantity


def _relu_error(seed: int) -> float:
    return max(after / before for before, after in _relu(60, seed)[1].values())


def _first_token(seed: int) -> float:
    """Error of the first token with all weight on it to its error without weights."""
    model, name = small("vit", seed), "blocks.1.mlp"
    mlp: Any = model.module.blocks[1].mlp
    seen: list[Tensor] = []
    handle = mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model.module(pictures(seed))
    handle.remove()
    x, found = seen[0][:, 0], []
    first = torch.zeros(1, 17, 32)
    first[:, 0] = 17.0
    for weights in ({f"{name}.fc2": first}, {}):
        graph = graph_of(model).clone()
        with torch.no_grad():
            replace_gelu(graph, _of(model, pictures(seed)), Fit(200), weights, seed=seed)
            t = {n: graph.tensor(f"{name}.{n}") for n in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")}
            hidden = functional.linear(x, t["fc1.weight"], t["fc1.bias"]).relu()
            new = functional.linear(hidden, t["fc2.weight"], t["fc2.bias"])
            found.append(float((new - mlp.fc2(functional.gelu(mlp.fc1(x)))).square().mean()))
    return found[0] / found[1]


# -- blocks ---------------
def _rounded(seed: int, straight: bool) -> tuple[Any, Any]:
    """(graph, plan) of the shipped model before and after its rounding is learned block by block."""
    bits, rate = ("W4A8", 0.05) if straight else ("W3A8", 0.1)
    q = ql.quantize(digits(), calibration(seed), method="minmax", bits=bits, seed=seed)
    graph, plan = q.graph.clone(), Plan(dict(q.plan.quantizers))
    settings = Settings(("rounding",), iterations=40, straight_through=straight, lr_rounding=rate)
    reconstruct(graph, plan, _of(digits(), calibration(seed)), settings, seed=seed)
    return (q.graph, q.plan), (graph, plan)


def _blocks_output(straight: bool) -> Quantity:
    """Squared error of held-out logits, trained to not."""

    def quantity(seed: int) -> float:
        images, _, expected = held_out()
        before, after = (float((_logits(digits(), *one, images) - expected).square().mean())
                         for one in _rounded(seed, straight))  # fmt: skip
        return after / before

    return quantity


def _unit_losses(graph: Any, plan: Plan, original: Any, images: Tensor) -> Tensor:
    """Mean squared error of every unit behind the quantized prefix."""
    found = []
    exact, quantized = {original.input.name: images}, {original.input.name: images}

    def hook(key: str, value: Tensor) -> Tensor:
        quantizer = plan.quantizers.get(key)
        return value if quantizer is None else quantizer(value)

    def run(graph: Any, unit: Any, values: dict[str, Tensor], hook: Any = None) -> dict[str, Tensor]:
        inputs = {graph.input: torch.empty_like(images, device="meta")} | {s: values[s.name] for s in unit.sources}
        out = graph.run(unit.nodes, inputs, hook=hook, keep=unit.results)
        return {r.name: out[r] for r in unit.results}

    for mine, theirs in zip(find_units(graph), find_units(original), strict=True):
        exact |= run(original, theirs, exact)
        quantized |= run(graph, mine, quantized, hook)
        name = mine.results[0].name
        found.append((quantized[name] - exact[name]).square().mean())
    return torch.stack(found)


def _blocks_units(straight: bool) -> Quantity:
    """Geometric mean over the units of held-out loss, trained to not."""

    def quantity(seed: int) -> float:
        images, original = held_out()[0][:128], graph_of(digits())
        with torch.inference_mode():
            before, after = (_unit_losses(*one, original, images) for one in _rounded(seed, straight))
        return float((after / before).log().mean().exp())

    return quantity


def _scales_alone(seed: int) -> float:
    """Squared error of the logits with scales learned block by block to without, small ViT, W32A4."""
    model, images = small("vit", seed), pictures(seed)
    q = ql.quantize(model, images, method="minmax", bits="W32A4", seed=seed)
    learned = Plan(dict(q.plan.quantizers))
    settings = Settings(("scales",), inputs="quantized", iterations=24, rounds=3, batch_size=8, lr_scales=0.03)
    reconstruct(q.graph, learned, _of(model, images), settings, seed=seed)
    expected = model(images)
    errors = [float((_logits(model, q.graph, plan, images) - expected).square().mean()) for plan in (learned, q.plan)]
    return errors[0] / errors[1]


def _training_error(seed: int, **settings: Any) -> float:
    """Mean |ŷ − y| of the second block in training, nothing being learned."""
    model, images, seen = small("vit", seed), pictures(seed), []

    def loss(got: Tensor, expected: Tensor, context: Any) -> Tensor:
        if context.unit == "blocks.1" and torch.is_grad_enabled():
            seen.append(float((got - expected).detach().abs().mean()))
        return mse(got, expected, context)

    q = ql.quantize(model, images, method="minmax", bits="W32A4", seed=seed)
    how = Settings(("scales",), loss, iterations=4, batch_size=8, lr_scales=0.0, **settings)
    reconstruct(q.graph, q.plan, _of(model, images), how, seed=seed)
    return sum(seen) / len(seen)


HALF: dict[str, Any] = {"inputs": "mixed", "input_drop": 0.5}


CASES = (
    *(
        Case(f"bias/{bits}", "error of held-out logits with corrected biases to without", _biases(bits), below=1)
        for bits in ("W3A8", "W4A8")
    ),
    Case("relu/solved", "KL with ReLU refitted to as it is", _relu_kl(0, None), below=1),
    Case("relu/trained", "KL with ReLU trained to refitted", _relu_kl(60, 0), below=1),
    Case("relu/error", "worst MLP's error, trained to as it is", _relu_error, below=1),
    Case("relu/first-token", "error of the first token with all weight on it to without", _first_token, below=1),
    *(
        Case(
            f"blocks/output-{'straight' if straight else 'soft'}",
            "error of held-out logits, rounding learned to not",
            _blocks_output(straight),
            below=1,
        )
        for straight in (True, False)
    ),
    *(
        Case(
            f"blocks/units-{'straight' if straight else 'soft'}",
            "units' held-out loss, rounding learned to not",
            _blocks_units(straight),
            below=1,
        )
        for straight in (True, False)
    ),
    Case("blocks/scales", "error of the logits with scales learned to not, W32A4", _scales_alone, below=1),
    Case(
        "blocks/half-inputs",
        "error in training with half the inputs float to none",
        lambda seed: _training_error(seed, **HALF) / _training_error(seed, inputs="quantized"),
        below=1,
    ),
    Case(
        "blocks/float-inputs",
        "error in training with all inputs float to half",
        lambda seed: _training_error(seed, inputs="float") / _training_error(seed, **HALF),
        below=1,
    ),
    Case(
        "blocks/half-dropped",
        "error in training with half the activations dropped to none, float inputs",
        lambda seed: _training_error(seed, inputs="float", drop=0.5) / _training_error(seed, inputs="float"),
        below=1,
    ),
)
