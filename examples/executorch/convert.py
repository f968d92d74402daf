"""A quantized model in ExecuTorch: a .pt2 of `quantlens export`, of a model quantized for `xnnpack`, becomes a .pte
that XNNPACK runs, and what it gives is compared with the .pt2 in PyTorch.

    make executorch     # an environment of its own, .venv-executorch; quantlens is not in it
    .venv-executorch/bin/python examples/executorch/convert.py model.pt2 --out model.pte --images images.npy

It prints JSON: which operations are delegated and which are not, with their shares of the time; of the images (float32
[N, 3, H, W], prepared as the model wants them) how far logits and predictions are from the .pt2's; the median time of
an image, beside other files' (`--fp32 model.pt2`, `--onnx model.onnx`) in turn with it. The .pte takes one image. A
.pt2 is a program: give only one that you trust.
"""

import argparse
import contextlib
import io
import json
import logging
import platform
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
try:
    with contextlib.redirect_stderr(io.StringIO()):  # torchao tells of extensions for GPUs that it does not load
        import numpy as np
        import torch
        import torch.ao.quantization.fx._decomposed  # registers the operators of a .pt2
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.devtools import Inspector
        from executorch.devtools.backend_debug import get_delegation_info
        from executorch.exir import to_edge_transform_and_lower
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime
except ModuleNotFoundError as error:
    sys.exit(f"{error.name} is not installed here: run `make executorch`, then use .venv-executorch/bin/python")

Run = Callable[[torch.Tensor], list[torch.Tensor]]
"""An image [1, 3, H, W] -> all outputs."""

PROFILED = 30
"""Runs of which the shares of time are the medians."""


def opened(path: Path) -> torch.nn.Module:
    """The program of a .pt2 file. Exits with a sentence where it cannot be read."""
    try:
        return torch.export.load(path).module()
    except Exception as error:
        sys.exit(f"{path} cannot be read by torch {torch.__version__}: {str(error).splitlines()[0]}")


def convert(model: torch.nn.Module, image: torch.Tensor, path: Path) -> dict:
    """Write the .pte for images of this shape [1, 3, H, W]; ExecuTorch plans memory for the largest batch, so that it
    has one. Gives how many operations of each kind are delegated, and how many are not."""
    with torch.no_grad():
        program = torch.export.export(model, (image,), strict=False)
        program = program.run_decompositions({torch.ops.aten.matmul.default: product})
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    found = get_delegation_info(lowered.exported_program().graph_module)
    path.write_bytes(lowered.to_executorch().buffer)
    kinds = {name: one for name, one in found.delegation_by_operator.items() if name != "getitem"}
    return {
        "parts": found.num_delegated_subgraphs,
        "delegated": {name: one.delegated for name, one in kinds.items() if one.delegated},
        "not_delegated": {name: one.non_delegated for name, one in kinds.items() if one.non_delegated},
    }


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A batched product without the expansion of its operands to the shape that they have, which XNNPACK does not take
    and which costs as much as LayerNorm."""
    if a.dim() != b.dim() or a.dim() < 4 or a.shape[:-2] != b.shape[:-2]:
        return NotImplemented
    return torch.bmm(a.flatten(0, -3), b.flatten(0, -3)).unflatten(0, a.shape[:-2])


def in_executorch(path: Path) -> Run:
    method = Runtime.get().load_program(path).load_method("forward")
    return lambda image: [value.clone() for value in method.execute((image,))]


def in_pytorch(model: torch.nn.Module) -> Run:
    def run(image: torch.Tensor) -> list[torch.Tensor]:
        with torch.no_grad():
            return torch.utils._pytree.tree_leaves(model(image))

    return run


def in_onnxruntime(path: Path, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda image: [torch.from_numpy(one) for one in session.run(None, {name: image.numpy()})]


def profile(path: Path, image: torch.Tensor) -> dict:
    """Where the time goes, by ExecuTorch's event tracer: fractions of it in XNNPACK (all of it) and in each kind of
    operation outside; of XNNPACK's own part, those of its kernels (which it counts in microseconds)."""
    program = Runtime.get().load_program(path, enable_etdump=True)
    method = program.load_method("forward")
    for _ in range(PROFILED):
        method.execute((image,))
    with tempfile.TemporaryDirectory() as folder:
        program.write_etdump_result_to_file(f"{folder}/events", None)
        blocks = Inspector(etdump_path=f"{folder}/events").event_blocks
    outside, kernels, counts, inside = Counter(), Counter(), Counter(), 0.0
    for event in (one for block in blocks if block.name == "Execute" for one in block.events if one.perf_data):
        spent, name = float(event.perf_data.p50), event.name
        if name == "DELEGATE_CALL":
            inside += spent
        elif event.is_delegated_op:
            kernels[name.split(" #")[0]] += spent
            counts[name.split(" #")[0]] += 1
        elif name.startswith("native_call_"):
            outside[name.removeprefix("native_call_").split(".")[0]] += spent
    shares = {"XNNPACK": inside, **dict(outside.most_common())}
    whole, own = sum(shares.values()), sum(kernels.values()) or 1.0
    return {
        "share_of_time": {name: round(spent / whole, 4) for name, spent in shares.items()},
        "kernels": {name: {"n": counts[name], "share": round(s / own, 3)} for name, s in kernels.most_common()},
    }


def timed(runs: dict[str, Run], images: torch.Tensor, rounds: int) -> dict[str, float]:
    """Median milliseconds of an image, the runs taking turns."""
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 3):
        image = images[turn % len(images)][None]
        for name, run in runs.items():
            start = time.perf_counter()
            run(image)
            if turn >= 3:
                spent[name].append(1000 * (time.perf_counter() - start))
    return {name: round(median(values), 4) for name, values in spent.items()}


def parity(expected: Run, got: Run, images: torch.Tensor, logits: Path | None) -> dict:
    """How far the first output is from what it should be; `logits`: a .npy file to write it to."""
    pairs = [(expected(image[None])[0], got(image[None])[0]) for image in images]
    wanted, found = (torch.cat(values) for values in zip(*pairs, strict=True))
    if logits is not None:
        np.save(logits, found.numpy())
    noise = (found - wanted).square().sum()
    return {
        "n": len(images),
        "max_difference": float((found - wanted).abs().max()),
        "max_logit": float(wanted.abs().max()),
        "sqnr_db": round(float(10 * torch.log10(wanted.square().sum() / noise)), 2) if noise > 0 else None,
        "same_prediction": float((found.argmax(1) == wanted.argmax(1)).float().mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", type=Path, help="a .pt2 of `quantlens export`")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.pte")
    parser.add_argument("--images", type=Path, required=True, metavar="FILE.npy", help="float32 [N, 3, H, W], prepared")
    parser.add_argument("--fp32", type=Path, metavar="FILE.pt2", help="a float model, to be timed as a .pte beside it")
    parser.add_argument("--onnx", type=Path, metavar="FILE.onnx", help="a file to be timed in ONNX Runtime beside it")
    parser.add_argument("--logits", type=Path, metavar="FILE.npy", help="write the logits that the .pte gives")
    parser.add_argument("--rounds", type=int, default=50, help="timed runs of each file")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    images = torch.from_numpy(np.load(given.images).astype(np.float32))
    torch.set_num_threads(given.threads)
    portable_lib._unsafe_reset_threadpool(given.threads)
    model = opened(given.model)
    told = convert(model, images[:1], given.out)
    runs = {"pte": in_executorch(given.out)}
    found = parity(in_pytorch(model), runs["pte"], images, given.logits)
    if given.fp32 is not None:
        beside = given.out.with_name(f"{given.out.stem}-fp32.pte")
        convert(opened(given.fp32), images[:1], beside)
        runs["pte_fp32"] = in_executorch(beside)
    if given.onnx is not None:
        runs["onnxruntime"] = in_onnxruntime(given.onnx, given.threads)
    told |= {"bytes": given.out.stat().st_size, "parity": found, "ms": timed(runs, images, given.rounds)}
    told |= profile(given.out, images[:1])
    told |= {
        "executorch": version("executorch"),
        "torch": torch.__version__,
        "threads": portable_lib._threadpool_get_thread_count(),
        "machine": platform.machine(),
    }
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
