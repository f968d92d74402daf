"""Train a model of the zoo again: `python -m quantlens.zoo.train digits-vit` (also `make zoo`).

Writes the weights (safetensors, with the recipe and versions in its header) and a card (JSON: SHA-256,
recipe, metrics measured on the embedded sets) to the package's own `zoo/weights`, or to the folder given with
--out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from quantlens import zoo
from quantlens._version import __version__
from quantlens.data import Preprocess, load_images
from quantlens.errors import QuantlensError, StorageError, UnknownNameError
from quantlens.metrics import classification_metrics, make_scorer, ood_metrics
from quantlens.zoo.recipe import RECIPES, Recipe, train


@torch.inference_mode()
def logits_of(model: nn.Module, source: str, preprocess: Preprocess) -> tuple[np.ndarray, np.ndarray | None]:
    """(logits [N,K], labels [N] or None) of a source."""
    images = load_images(source, preprocess)
    return torch.cat([model(x) for x, _ in images.batches(128)]).numpy(), images.labels


def measure(model: nn.Module, entry: zoo.ZooEntry) -> dict[str, Any]:
    """FP32 metrics on the entry's own images: n, top-1, NLL, ECE; AUPR-out and AUROC by MSP for each OOD set
    (fractions).
    """
    score = make_scorer("msp", None)
    logits, labels = logits_of(model, entry.sources.id, entry.preprocess)
    if labels is None:
        raise QuantlensError(f"{entry.sources.id} has no labels; evaluate on a labelled source")
    figures = classification_metrics(logits, labels)
    result: dict[str, Any] = {key: figures[key] for key in ("n", "top1", "nll", "ece")}
    inside = score(logits, None)
    result["ood"] = {}
    for name, ood in entry.sources.ood.items():
        outside = score(logits_of(model, ood.source, entry.preprocess)[0], None)
        found = ood_metrics(inside, outside)
        keep = {key: found[key] for key in ("aupr_out", "auroc", "chance_aupr_out", "n_ood")}
        result["ood"][name] = {"group": ood.group, **keep}
    return result


def write(model: nn.Module, recipe: Recipe, figures: dict[str, Any], seconds: float, weights: Path) -> dict[str, Any]:
    """Write WEIGHTS and its card beside it; returns the card. Raises StorageError where that fails."""
    import timm
    from safetensors.torch import save_file

    made_with = {
        "quantlens": __version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
    state = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    header = {
        "format": "pt",
        "model": recipe.name,
        "license": "Apache-2.0",
        "recipe": json.dumps(recipe.to_dict(), sort_keys=True),
        "made_with": json.dumps(made_with, sort_keys=True),
        "figures": json.dumps(figures, sort_keys=True),
    }
    try:
        weights.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, str(weights), metadata=header)
        weights.chmod(0o644)  # safetensors leaves it readable by its owner alone, and a package is for all
        card = {
            "model": recipe.name,
            "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
            "num_parameters": sum(value.numel() for value in state.values()),
            "bytes": weights.stat().st_size,
            "figures": figures,
            "recipe": recipe.to_dict(),
            "made_with": made_with,
            "seconds": round(seconds, 1),
        }
        weights.with_suffix(".json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot write {weights}: {error}; choose another folder with --out") from error
    return card


def main(arguments: list[str] | None = None) -> int:
    """Entry point of `python -m quantlens.zoo.train`."""
    parser = argparse.ArgumentParser(prog="python -m quantlens.zoo.train", description="train a model of the zoo again")
    parser.add_argument("model", help=f"one of: {', '.join(RECIPES)}")
    parser.add_argument("--out", type=Path, help="folder for the weights and the card (default: the package's own)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; 1 (the default) repeats bit for bit")
    parser.add_argument("--epochs", type=int, help="fewer epochs than the recipe's, for a trial")
    given = parser.parse_args(arguments)
    try:
        return _run(given)
    except QuantlensError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(given: argparse.Namespace) -> int:
    if given.model not in RECIPES:
        raise UnknownNameError("zoo model", given.model, RECIPES)
    for name in ("threads", "epochs"):
        if getattr(given, name) is not None and getattr(given, name) < 1:
            raise QuantlensError(f"--{name} {getattr(given, name)} is too few; give 1 or more")
    torch.set_num_threads(given.threads)
    entry, recipe = zoo.available()[given.model], RECIPES[given.model]
    if given.epochs is not None:
        recipe = Recipe(**{**vars(recipe), "epochs": given.epochs})
    start = time.monotonic()

    def report(done: int, total: int, loss: float) -> None:
        left = (time.monotonic() - start) / done * (total - done)
        if done % 10 == 0 or done == total:
            print(f"epoch {done}/{total}  loss {loss:.4f}  {left:.0f} s left", flush=True)

    model = train(recipe, report)
    seconds = time.monotonic() - start
    figures = measure(model, entry)
    weights = (given.out / entry.weights.name) if given.out else entry.weights
    card = write(model, recipe, figures, seconds, weights)
    quality = f"top-1 {100 * figures['top1']:.2f} %, NLL {figures['nll']:.3f}"
    print(f"{weights}: {card['bytes'] / 1e6:.2f} MB, {quality}")
    for name, ood in figures["ood"].items():
        rates = f"AUPR-out {100 * ood['aupr_out']:.1f} %, AUROC {100 * ood['auroc']:.1f} %"
        print(f"  {name} ({ood['group']}): {rates}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
