"""One side of :mod:`benchmarks.equivalence`: quantizes the small graphs with the quantlens on the path and stores all
that was computed.

``python equivalence_worker.py describe JOB`` writes the methods and their options, ``python equivalence_worker.py run
JOB`` runs the cases of a job (a JSON file) and leaves an .npz and a .json of each in its folder. It must run on old and
new code alike, so it uses the public face and attributes of objects, and imports no inner module.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import quantlens as ql
from quantlens.methods import available

SIZE, CLASSES, CALIBRATION, EVALUATION = 32, 10, 16, 32
FLOAT = "float"


class ConvViT(nn.Module):
    """A convolutional stem (BatchNorm, strides, padding, dilation, groups), then attention blocks with LayerScale."""

    def __init__(self, dim: int = 32):
        from timm.models.vision_transformer import Block

        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1),
            nn.BatchNorm2d(16),
            nn.GELU(),
            nn.Conv2d(16, dim, 3, stride=2, padding=1, groups=4),
            nn.BatchNorm2d(dim),
            nn.ReLU(),
            nn.Conv2d(dim, dim, 3, padding=2, dilation=2, groups=dim),
            nn.BatchNorm2d(dim),
            nn.GELU(),
            nn.Conv2d(dim, dim, 1, bias=False),
        )
        self.position = nn.Parameter(0.1 * torch.randn(1, (SIZE // 4) ** 2, dim))
        self.blocks = nn.Sequential(*(Block(dim, 2, mlp_ratio=2, qkv_bias=True, init_values=1.0) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


def make_model(kind: str) -> nn.Module:
    """A small model by name, every parameter and every BatchNorm statistic drawn away from its initial value."""
    from timm.models import swin_transformer, vision_transformer

    size = {"img_size": SIZE, "num_classes": CLASSES}
    torch.manual_seed(0)
    if kind == "vit":
        model: nn.Module = vision_transformer.VisionTransformer(
            **size, patch_size=8, embed_dim=32, depth=2, num_heads=2
        )
    elif kind == "swin":
        model = swin_transformer.SwinTransformer(
            **size, patch_size=2, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4)
        )
    elif kind == "conv":
        model = ConvViT()
    else:
        raise ValueError(f"no model {kind!r}: vit, swin or conv")
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
        elif "pos" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
        else:
            parameter.data = torch.randn_like(parameter) * parameter[0].numel() ** -0.5 * 1.5
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = 0.3 * torch.randn_like(module.running_mean)
            module.running_var = 0.5 + torch.rand_like(module.running_var)
    return model.eval().requires_grad_(False)


def pictures(count: int, seed: int) -> Tensor:
    """[count, 3, SIZE, SIZE] smooth random images."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 8, 8, generator=generator)
    fine = torch.randn(count, 3, SIZE, SIZE, generator=generator)
    return nn.functional.interpolate(coarse, size=SIZE, mode="bicubic") + 0.1 * fine


def probe(key: str, shape: tuple[int | None, ...]) -> Tensor:
    """Fixed random values of many magnitudes for an activation's quantizer; ``None`` in the shape is the batch."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    sizes = [4 if size is None else size for size in shape]
    spread = torch.randn(sizes, generator=generator).exp()
    return torch.randn(sizes, generator=generator) * spread


def record(qmodel: Any, images: Tensor) -> dict[str, Tensor]:
    """Everything that was computed: logits, tensors of the graph, and of every quantizer its parameters and codes."""
    found: dict[str, Tensor] = {}
    with torch.inference_mode():
        found["logits"] = qmodel(images)
        for name, value in qmodel.graph.tensors().items():
            found[f"graph {name}"] = value
        for key, quantizer in qmodel.plan.quantizers.items():
            for name, value in quantizer.tensors().items():
                found[f"parameter {key} {name}"] = value
            edge = qmodel.graph.sites.edges[key]
            if edge.is_weight:
                values, what = qmodel.graph.tensor(str(edge.value.target)), "weight"
            else:
                values, what = probe(key, edge.value.meta["shape"]), "activation"
            found[f"{what} codes {key}"] = quantizer.encode(values)
            found[f"{what} values {key}"] = quantizer(values)
        for site, operator in getattr(qmodel.plan, "operators", {}).items():
            for name, value in operator.tensors().items():
                found[f"operator {site} {name}"] = value
    return {name: value.detach().clone() for name, value in found.items()}


def digest(array: np.ndarray) -> str:
    """sha256 of an array's type, shape and bytes."""
    head = f"{array.dtype.str} {array.shape} ".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()


def store(stem: Path, result: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write the .npz of the tensors and the .json of the rest with their digests."""
    arrays = {name: value.cpu().numpy() for name, value in tensors.items()}
    if arrays:
        np.savez(stem.with_suffix(".npz"), **{name.replace("/", "|"): a for name, a in arrays.items()})
    result["digests"] = {name: digest(array) for name, array in arrays.items()}
    stem.with_suffix(".json").write_text(json.dumps(result), encoding="utf-8")


def cases(job: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for method in job["methods"]:
        for bits in job["bits"]:
            yield method, bits


def run(job: dict[str, Any]) -> None:
    """All cases of one small graph. A model that a method has changed is replaced by a fresh one, which is noted."""
    folder, kind = Path(job["folder"]), job["model"]
    calibration, images = pictures(CALIBRATION, 1), pictures(EVALUATION, 2)

    def fresh() -> tuple[Any, Any]:
        model = ql.load_model(make_model(kind), input_size=(3, SIZE, SIZE), name=kind)
        return model, ql.quantize(model, calibration, bits="FP32")

    model, reference = fresh()
    with torch.inference_mode():
        expected = reference(images).clone()
        store(folder / f"{kind} {FLOAT}", {}, {"logits": expected, "module's logits": model(images)})
    for method, bits in cases(job):
        started, result, tensors = time.perf_counter(), {}, {}
        try:
            options = job["options"].get(method, {})
            qmodel = ql.quantize(model, calibration, method=method, bits=bits, seed=0, **options)
            result["rewrites"] = list(qmodel.plan.rewrites)
            result["formats"] = {key: repr(quantizer) for key, quantizer in qmodel.plan.quantizers.items()}
            try:
                tensors = record(qmodel, images)
            except Exception:
                result["unread"] = True
                raise
        except Exception as error:
            result |= {"error": type(error).__name__, "message": str(error)}
        result["seconds"] = time.perf_counter() - started
        with torch.inference_mode():
            result["changed"] = not torch.equal(reference(images), expected)
        if result["changed"]:
            model, reference = fresh()
        store(folder / f"{kind} {method} {bits}", result, tensors)


def main() -> None:
    verb, job = sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    home = Path(ql.__file__).resolve()
    if not home.is_relative_to(Path(job["source"]).resolve()):
        raise SystemExit(f"quantlens was imported from {home}, not from {job['source']}")
    torch.set_num_threads(1)
    if verb == "describe":
        found = {name: sorted(info.options) for name, info in available().items()}
        Path(job["folder"], "methods.json").write_text(json.dumps(found), encoding="utf-8")
    else:
        run(job)


if __name__ == "__main__":
    main()
