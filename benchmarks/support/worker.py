"""One architecture of the support table, in a process of its own: built, its tensors redrawn at trained scale,
captured, quantized, saved, read back, exported. What each step gave is written to a file as soon as it is known."""

import json
import math
import os
import resource
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

METHODS = ("minmax", "quantlens-fast", "repq-vit")
CALIBRATION, TEST = 32, 32
"""Pictures that methods see, and others that everything is measured on."""

ROUNDING = 3e-7
"""Of the scale of a value, what float operations of a runtime differ by (float exports are 125 to 135 dB apart)."""

SAME = 40.0
"""dB within which a quantizer of a file gives what the simulation's gives of the same input: a code in 10⁴ that takes
the other side of its border is some 60 dB, a fault below 20."""

FEW = 4
"""Codes by which a quantizer may differ whatever that is in dB: a small tensor has few to share it."""

MEMORY = 8 << 30
"""Bytes that a process may take."""


def build(name: str, entry: dict[str, Any]) -> nn.Module:
    """The module, small: by arguments, and by keeping the first of its blocks in every stage."""
    torch.manual_seed(0)
    if entry["source"] == "timm":
        import timm

        module = timm.create_model(name, num_classes=10, **entry["build"])
        for parent in module.modules():
            if isinstance(parent, nn.Sequential | nn.ModuleList):
                for number in range(len(parent) - 1, 0, -1):
                    if type(parent[number]).__name__ in entry["keep"]:
                        del parent[number]
    elif entry["source"] == "shipped":
        from quantlens import load_model

        module = load_model(name).module
    else:
        import transformers

        config = getattr(transformers, entry["config"])(**{"num_labels": 10, **entry["build"]})
        module = getattr(transformers, entry["model"])(config)
    return module.eval()


def redraw(module: nn.Module, images: Tensor, seed: int = 0) -> None:
    """Every parameter, and every buffer that is trained, at the scale that training gives it: a fresh model's zeros
    (biases, means, residual branches) and ones (LayerScale of 1e-6, variances) hide faults."""
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor, scale: float, mean: float = 0.0) -> Tensor:
        return mean + scale * torch.randn(like.shape, generator=generator)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(like.shape, generator=generator)

    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    with torch.no_grad():
        for owner in module.modules():
            is_norm = "norm" in type(owner).__name__.lower() and not hasattr(owner, "kernel_size")
            for name, value in owner.named_parameters(recurse=False):
                lower, size = name.lower(), value.squeeze()
                if owner in norms and "weight" in lower:
                    new = uniform(value, 0.2, 0.8)
                elif is_norm and "weight" in lower:
                    new = uniform(value, 0.6, 1.4)
                elif any(word in lower for word in ("gamma", "layer_scale", "lambda")) and size.dim() < 2:
                    new = uniform(value, 0.1, 1.0)
                elif any(word in lower for word in ("scale", "temperature", "a_log")) or value.dim() == 0:
                    new = value + normal(value, 0.1)
                elif size.dim() < 2 or "bias" in lower:
                    new = value * uniform(value, 0.8, 1.2) + normal(value, 0.2)
                elif any(word in lower for word in ("pos", "token", "embed", "query", "latent")):
                    new = normal(value, 0.3)
                else:
                    fan_in = value.shape[0] if lower.endswith("proj_t") else math.prod(value.shape[1:])
                    rows = uniform(value[:, :1].flatten(1)[:, :1], -0.5, 0.5).exp()
                    new = normal(value, fan_in**-0.5) * rows.view(-1, *[1] * (value.dim() - 1))
                value.copy_(new)
        for frozen in (m for m in module.modules() if "FrozenBatchNorm" in type(m).__name__):
            for name, value in frozen.named_buffers(recurse=False):
                value.copy_(normal(value, 0.1) if name in ("bias", "running_mean") else uniform(value, 0.6, 1.4))
        # statistics of BatchNorm are those of the pictures, roughly
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.train()
            norm.momentum = 1.0
        if norms:
            module(images)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.eval()
            norm.momentum = momentum
            norm.running_mean += 0.1 * norm.running_var.sqrt() * normal(norm.running_mean, 1.0)
            norm.running_var.clamp_(min=0.5 * float(norm.running_var.mean()))  # training leaves no channel to blow up
            norm.running_var *= uniform(norm.running_var, 0.8, 1.25)


def pictures(count: int, side: int) -> Tensor:
    """Photographs: ImageNet's where they are, else patches of those that come with scikit-learn; normalised."""
    from quantlens.data import Preprocess, load_images, open_source

    shared = os.environ.get("QUANTLENS_DATA", Path(__file__).resolve().parents[3] / "shared" / "data")
    folder = Path(shared) / "imagenet"
    step = 900 // count
    source = f"imagenet:{folder}[0:{count * step}:{step}]" if folder.is_dir() else f"embedded:photo-patches[0:{count}]"
    return load_images(open_source(source), Preprocess((3, side, side), crop_pct=0.9)).tensor()


def first_tensor(value: Any) -> Tensor:
    """What a module's output is measured by."""
    if isinstance(value, Tensor):
        return value
    for name in ("logits", "image_embeds", "pooler_output", "last_hidden_state"):
        found = value.get(name) if hasattr(value, "get") else getattr(value, name, None)
        if isinstance(found, Tensor):
            return found
    return next(part for part in (value.values() if hasattr(value, "values") else value) if isinstance(part, Tensor))


def sqnr(expected: Tensor, found: Tensor) -> float:
    """Signal over noise, dB, of tensors of one shape."""
    if expected.shape != found.shape or not bool(found.isfinite().all()):
        return -math.inf
    signal, noise = expected.double().square().sum(), (expected.double() - found.double()).square().sum()
    return float(10 * torch.log10(signal / noise)) if float(noise) > 0 else 200.0


def block_sqnr(float_blocks: dict[str, Tensor], quantized: Any, images: Tensor) -> dict[str, float]:
    """dB of every block's result in the quantized model. A method may rotate the residual stream: the orthogonal matrix
    that brings the two together best is taken out, that of another block where tokens are too few to tell."""
    found: dict[str, float] = {}
    rotations: dict[int, list[Tensor]] = {}
    values = block_values(quantized, images)
    same = [name for name in values if name in float_blocks and float_blocks[name].shape == values[name].shape]
    for name in sorted(same, key=lambda name: -values[name].numel()):
        expected, value = float_blocks[name], values[name]
        found[name] = sqnr(expected, value)
        channels = value.shape[-1]
        left, right = (t.reshape(-1, channels).double() for t in (expected, value))
        if not bool(value.isfinite().all()):
            continue
        if len(left) > 2 * channels:
            u, _, v = torch.linalg.svd(right.T @ left)
            rotations.setdefault(channels, []).append(u @ v)
        for rotation in rotations.get(channels, []):
            found[name] = max(found[name], sqnr(left, right @ rotation))
    return {name: found[name] for name in values if name in found}


def block_values(quantized: Any, images: Tensor) -> dict[str, Tensor]:
    """The result of every block under a quantized model's plan (an empty one: in float)."""
    results = {block.name: block.result for block in quantized.graph.sites.blocks}
    env = _run_graph(quantized, images, results.values())
    return {name: env[node] for name, node in results.items() if isinstance(env.get(node), Tensor)}


def rounding(quantized: Any, images: Tensor) -> float:
    """dB between simulations that round as different runtimes do: what quantizers of activations read differs by
    :data:`ROUNDING` of its scale, and a value on the border of two codes may take the other one. Lowest of three."""
    output = quantized.graph.output
    exact = _run_graph(quantized, images, [output])[output]
    generator = torch.Generator().manual_seed(0)

    def moved(key: str, quantizer: Any, value: Tensor) -> Tensor:
        if key.endswith(".weight"):
            return quantizer(value)
        noise = ROUNDING * value.square().mean().sqrt()
        return quantizer(value + noise * torch.randn(value.shape, generator=generator))

    return min(sqnr(exact, _run_graph(quantized, images, [output], moved)[output]) for _ in range(3))


def weakest(quantized: Any, path: Path, images: Tensor) -> tuple[str, float]:
    """The quantizer of an exported file that lies furthest from the simulation's, both given the file's own values
    before it, and how far, dB. However far small differences grow from layer to layer, only a fault shows here."""
    from quantlens.export.export import openvino_core
    from quantlens.export.exported import open_file

    edges = {f"{key}.value": key for key in quantized.plan.quantizers if not key.endswith(".weight")}
    tensors = {name for op in openvino_core().read_model(path).get_ops() for out in op.outputs() for name in out.names}
    values = open_file(path, 1, sorted(edges.keys() & tensors)).run({"images": images.numpy()})
    found: dict[str, float] = {}

    def theirs(key: str, quantizer: Any, value: Tensor) -> Tensor:
        mine, given = quantizer(value), values.get(f"{key}.value")
        if given is None:
            return mine
        other = torch.from_numpy(given)
        differing = (mine - other).abs() > 1e-3 * mine.abs().amax()
        if int(differing.sum()) > FEW:
            found[key] = sqnr(mine, other)
        return other

    output = _run_graph(quantized, images, [quantized.graph.output], theirs)[quantized.graph.output]
    measured = next(values[name] for name in ("logits", "features") if name in values)
    if measured.shape == tuple(output.shape):
        found["the output"] = sqnr(output, torch.from_numpy(measured))
    return min(found.items(), key=lambda edge: edge[1], default=("", math.inf))


def _run_graph(quantized: Any, images: Tensor, keep: Any, instead: Any = None) -> dict[Any, Any]:
    """Values of nodes under a quantized model's plan. instead: (edge, quantizer, value) -> what the edge gives."""
    graph, quantizers = quantized.graph, quantized.plan.quantizers
    env: dict[Any, Any] = {graph.input: images}

    def hook(key: str, value: Tensor) -> Tensor:
        if key not in quantizers:
            return value
        return instead(key, quantizers[key], value) if instead else quantizers[key](value)

    with torch.inference_mode():
        graph.run([n for n in graph.fx.nodes if n.op == "call_function"], env, hook=hook, keep=keep)
    return env


def enough_tokens(images: Tensor, blocks: dict[str, Tensor]) -> Tensor:
    """Pictures, moved about where it takes more of them to tell a rotation of a block's channels from its noise."""
    shapes = {(value.shape[-1], value.numel() // value.shape[-1]) for value in blocks.values()}
    times = max((2 * channels // max(tokens, 1) + 1 for channels, tokens in shapes), default=1)
    return torch.cat([images.roll(7 * n, dims=-1) for n in range(min(times, 16))])


class Record:
    """Results of the steps, in a file. A step that raises is noted with the sentence, and its traceback."""

    def __init__(self, name: str, path: Path):
        self.path, self.data = path, {"name": name, "steps": {}}

    def step(self, name: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """Run one step; its numbers, or None where it raised."""
        started = time.perf_counter()
        try:
            found: dict[str, Any] | None = run()
            self.data["steps"][name] = {**found, "seconds": round(time.perf_counter() - started, 2)}  # type: ignore[dict-item]
        except Exception as error:
            found, text = None, (str(error).strip().splitlines() or [""])[0]
            self.data["steps"][name] = {
                "error": f"{type(error).__name__}: {text}",
                "traceback": traceback.format_exc()[-3000:],
            }
        self.write()
        return found

    def write(self) -> None:
        self.path.write_text(json.dumps(self.data, indent=1), encoding="utf-8")


def run(name: str, entry: dict[str, Any], path: Path, *, quick: bool) -> None:
    """All steps of one architecture. quick: capture and W8A8 alone."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    import quantlens as ql
    from quantlens.data import Preprocess
    from quantlens.graph import graph_of
    from quantlens.qmodel import float_model

    record, held = Record(name, path), {}
    ships, square = entry["source"] == "shipped", entry["source"] == "detectors"
    side = ql.load_model(name).preprocess.input_size[1] if ships else entry["side"]
    preprocess = Preprocess((3, side, side), crop_pct=0.9, resize=(side, side) if square else None)
    images = pictures(CALIBRATION + TEST, side)
    calibration, test = images[:CALIBRATION], images[CALIBRATION:]

    def capture() -> dict[str, Any]:
        module = build(name, entry)
        if not ships:
            redraw(module, images)
        with torch.no_grad():  # a module may keep what it computes, and use it when it is captured
            expected = first_tensor(module(test))
        scale = expected.abs().max()
        if not bool(expected.isfinite().all()) or float(expected.std(0).max()) < 1e-3 * float(scale):
            raise RuntimeError("the redrawn module's output does not depend on the image, or is not finite")
        model = ql.load_model(name) if ships else ql.load_model(module, preprocess=preprocess, name=name)
        graph = graph_of(model)
        with torch.inference_mode():
            found = float_model(model)(test)
            one = first_tensor(float_model(model)(test[:1]))
        apart = max(
            float((first_tensor(found) - expected).abs().max() / scale),
            float((one - expected[:1]).abs().max() / scale),
        )
        shown = enough_tokens(images, block_values(float_model(model), images))
        held.update(model=model, expected=expected, shown=shown, blocks=block_values(float_model(model), shown))
        return {
            "apart": apart,
            "ok": apart <= 1e-4 and type(found) is type(module(test[:1])),
            "sites": len(graph.sites),
            "blocks": len(held["blocks"]),
        }

    if record.step("capture", capture) is None:
        return

    def quantize(method: str, bits: str) -> dict[str, Any]:
        quantized = ql.quantize(held["model"], calibration, method=method, bits=bits, seed=0)
        with torch.inference_mode():
            found = first_tensor(quantized(test))
        held[f"{method} {bits}"] = quantized
        numbers: dict[str, Any] = {"db": sqnr(held["expected"], found), "rewrites": quantized.plan.rewrites}
        if bits == "W8A8":
            numbers["blocks"] = block_sqnr(held["blocks"], quantized, held["shown"])
        return {**numbers, "ok": bool(found.isfinite().all())}

    for bits in ("W8A8",) if quick else ("W8A8", "W4A4"):
        for method in METHODS[: 2 if quick else 3]:
            record.step(f"{method} {bits}", lambda method=method, bits=bits: quantize(method, bits))
    if quick:
        return

    def quantize_for(target: str | None) -> Any:
        key = f"{target} W8A8" if target else "quantlens-fast W8A8"
        if key not in held:
            held[key] = ql.quantize(held["model"], calibration, bits="W8A8", target=target)
        return held[key]

    with tempfile.TemporaryDirectory() as folder:
        for key in ("quantlens-fast W8A8", "repq-vit W4A4"):
            if key in held:
                record.step(f"reload {key}", lambda key=key: _reload(held[key], Path(folder), test))
        for target in (None, "openvino-cpu"):
            for suffix in (".onnx", ".xml"):
                record.step(
                    f"export {target or 'any'} {suffix}",
                    lambda target=target, suffix=suffix: _export(
                        quantize_for(target), Path(folder) / f"model{suffix}", test
                    ),
                )


def _reload(quantized: Any, folder: Path, test: Tensor) -> dict[str, Any]:
    import quantlens as ql

    path = quantized.save(folder / "model.safetensors")
    with torch.inference_mode():
        before, after = (first_tensor(q(test)) for q in (quantized, ql.load(path)))
    return {"ok": bool(torch.equal(before, after)), "kb": Path(path).stat().st_size // 1000}


def _export(quantized: Any, path: Path, test: Tensor) -> dict[str, Any]:
    import quantlens as ql

    with torch.inference_mode():
        expected = first_tensor(quantized(test))
    exported = ql.Artefact(ql.export(quantized, path, simulate=True), threads=1)
    found = torch.from_numpy(exported.run(test.numpy())[0])
    db, (edge, least) = sqnr(expected, found.reshape(expected.shape)), weakest(quantized, path, test[:8])
    numbers = {"db": db, "ok": db >= 30 and least >= SAME, "weakest": least, "edge": edge}
    return numbers if db >= 30 else {**numbers, "rounding": rounding(quantized, test)}
