"""Train a model of the zoo again: `python -m quantlens.zoo.train digits-vit` (also `make zoo`).

Writes the weights (safetensors, with the recipe and versions in its header) and a card (JSON: SHA-256, recipe, metrics
measured on the embedded sets) to the package's own `zoo/weights`, or to the folder given with --out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save
from torch import nn

from quantlens import zoo
from quantlens._version import __version__
from quantlens.data import load_images
from quantlens.files import write_whole
from quantlens.metrics import classification_metrics, make_scorer, ood_metrics
from quantlens.zoo.recipe import RECIPES, Recipe, train


@torch.inference_mode()
def measure(model: nn.Module, entry: zoo.ZooEntry) -> dict[str, Any]:
    """FP32 metrics on the entry's own images: n, top-1, NLL, ECE; AUPR-out and AUROC by MSP for each OOD set
    (fractions).
    """

    def logits_of(source: str) -> Any:
        batches = load_images(source, entry.preprocess).batches(128)
        return torch.cat([model(x) for x, _ in batches]).numpy()

    score, logits = make_scorer("msp", None), logits_of(entry.sources.id)
    labels = load_images(entry.sources.id, entry.preprocess).check_labels(len(entry.class_names))
    figures = classification_metrics(logits, labels)
    result: dict[str, Any] = {key: figures[key] for key in ("n", "top1", "nll", "ece")}
    result["ood"] = {}
    for name, ood in entry.sources.ood.items():
        found = ood_metrics(score(logits, None), score(logits_of(ood.source), None))
        keep = {key: found[key] for key in ("aupr_out", "auroc", "chance_aupr_out", "n_ood")}
        result["ood"][name] = {"group": ood.group, **keep}
    return result


def write(model: nn.Module, recipe: Recipe, figures: dict[str, Any], seconds: float, weights: Path) -> None:
    """Write the weights and their card beside them. Raises StorageError where that fails."""
    state = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    versions = {"quantlens": __version__, "torch": torch.__version__, "timm": timm.__version__}
    made_with = {**versions, "python": platform.python_version(), "threads": torch.get_num_threads()}
    told = {"recipe": asdict(recipe), "made_with": made_with, "figures": figures}
    header = {name: json.dumps(value, sort_keys=True) for name, value in told.items()}
    content = save(state, {"format": "pt", "model": recipe.name, "license": "Apache-2.0", **header})
    write_whole(weights, content)
    card = {
        "model": recipe.name,
        "sha256": hashlib.sha256(content).hexdigest(),
        "num_parameters": sum(value.numel() for value in state.values()),
        "bytes": len(content),
        **told,
        "seconds": round(seconds, 1),
    }
    write_whole(weights.with_suffix(".json"), json.dumps(card, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `python -m quantlens.zoo.train`."""
    parser = argparse.ArgumentParser(prog="python -m quantlens.zoo.train", description="train a model of the zoo again")
    parser.add_argument("model", choices=RECIPES)
    parser.add_argument("--out", type=Path, help="folder for the weights and the card (default: the package's own)")
    parser.add_argument("--epochs", type=int, help="fewer epochs than the recipe's, for a trial")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)  # which repeats bit for bit
    entry, recipe = zoo.available()[given.model], RECIPES[given.model]
    if given.epochs is not None:
        recipe = replace(recipe, epochs=given.epochs)
    start = time.monotonic()

    def report(done: int, total: int, loss: float) -> None:
        left = (time.monotonic() - start) / done * (total - done)
        print(f"epoch {done}/{total}  loss {loss:.4f}  {left:.0f} s left", flush=True)

    model = train(recipe, report)
    seconds, figures = time.monotonic() - start, measure(model, entry)
    weights = (given.out or zoo.WEIGHTS) / entry.weights.name
    write(model, recipe, figures, seconds, weights)
    print(f"{weights}: top-1 {100 * figures['top1']:.2f} %, NLL {figures['nll']:.3f}")
    for name, ood in figures["ood"].items():
        rates = f"AUPR-out {100 * ood['aupr_out']:.1f} %, AUROC {100 * ood['auroc']:.1f} %"
        print(f"  {name} ({ood['group']}): {rates}")


if __name__ == "__main__":
    main()
