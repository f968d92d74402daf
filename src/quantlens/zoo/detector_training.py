"""The recipes of the zoo's detectors, and the loop that follows them: AdamW, a warm-up and a cosine by steps or by the
clock, a running average of the weights, scenes drawn on the device as they are needed.
"""

import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from quantlens.data.preprocess import Preprocess
from quantlens.data.scene_parts import parts
from quantlens.data.scenes import CLASSES, MOST, SIDE, compose, scenes
from quantlens.files import write_whole
from quantlens.metrics import ood_metrics
from quantlens.zoo.detector_losses import DenseHead, average_precision, detection_loss, detections
from quantlens.zoo.detectors import Detector, build

Batch = tuple[Tensor, Tensor, Tensor]
"""Normalised pictures [B,3,S,S], boxes [B,T,4] as fractions, labels [B,T]."""


HELD_OUT = 512
"""Scenes that a trained detector is measured on, and as many of unknown objects."""
PREPROCESS = Preprocess((3, SIDE, SIDE), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0)


@dataclass(frozen=True)
class DetectorRecipe:
    """Architecture and schedule of one detector. The schedule ends after `steps`, or after so many minutes."""

    name: str
    shape: str  # a key of quantlens.zoo.detectors.SHAPES
    settings: dict[str, Any]
    scoring: str  # "softmax" (the last class is "no object") or "sigmoid"
    preprocess: Preprocess = PREPROCESS
    steps: int = 9000
    batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.02
    warmup: int = 300
    clip_norm: float = 5.0
    average: float = 0.999  # of the running average of the weights
    dense: float = 0.5  # weight of the dense head's loss
    seed: int = 0

    def build(self) -> Detector:
        """The untrained model."""
        return build(self.shape, len(CLASSES), SIDE, self.settings)


SIZES: dict[str, Any] = {"widths": (24, 48, 96), "dim": 96, "heads": 4, "hidden": 288}
DETECTOR_RECIPES = {
    recipe.name: recipe
    for recipe in (
        DetectorRecipe(
            "scenes-yolos", "yolos", {"patch": 6, "dim": 96, "depth": 8, "heads": 4, "queries": 25}, "softmax"
        ),
        DetectorRecipe("scenes-detr", "detr", {**SIZES, "encoder": 2, "decoder": 3, "queries": 25}, "softmax"),
        DetectorRecipe(
            "scenes-rtdetr", "rtdetr", {**SIZES, "encoder": 1, "decoder": 3, "queries": 30, "points": 4}, "sigmoid"
        ),
    )
}


class Source:
    """Batches of training scenes, drawn on the device: the one of a step depends on the seed and the step alone.

    On a GPU those of eight steps are drawn at a time, as there it is the number of operations that costs.
    """

    def __init__(self, recipe: DetectorRecipe, device: torch.device) -> None:
        self.recipe, self.bank = recipe, parts("train").to(device)
        self.generator = torch.Generator(device)
        self.together = 8 if device.type == "cuda" else 1
        self.block, self.drawn = -1, (torch.empty(0),) * 3

    def draw(self, low: int, high: int, *shape: int) -> Tensor:
        """Whole numbers, low to high - 1."""
        device = self.generator.device
        return torch.randint(low, high, shape, generator=self.generator, device=device, dtype=torch.int)

    def __call__(self, step: int) -> Batch:
        block, place = divmod(step, self.together)
        if block != self.block:
            self.generator.manual_seed(self.recipe.seed * 1_000_003 + block)
            self.drawn = compose(self.bank, self.draw, self.together * self.recipe.batch_size)
            self.block = block
        size = self.recipe.batch_size
        pixels, boxes, labels = (tensor[place * size : (place + 1) * size] for tensor in self.drawn)
        return self.recipe.preprocess.normalize(pixels.permute(0, 3, 1, 2)), boxes / SIDE, labels


def fixed(recipe: DetectorRecipe, split: str, n: int, seed: int) -> Batch:
    """`n` scenes that are always the same, as one batch."""
    found = scenes(split, n, seed)
    slot = np.arange(len(found.image)) - np.searchsorted(found.image, found.image)
    boxes, labels = torch.zeros(n, MOST, 4), torch.full((n, MOST), -1)
    boxes[found.image, slot] = torch.from_numpy(found.boxes / SIDE).float()
    labels[found.image, slot] = torch.from_numpy(found.labels)
    pixels = torch.from_numpy(found.pixels).permute(0, 3, 1, 2)
    return recipe.preprocess.normalize(pixels), boxes, labels


@torch.inference_mode()
def answers(model: Detector, recipe: DetectorRecipe, batch: Batch) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Scores, labels and boxes that the model finds, 64 pictures at a time."""
    device = next(model.parameters()).device
    outputs = [model(x.to(device)) for x in batch[0].split(64)]
    return [detections(found["logits"], found["pred_boxes"], recipe.scoring == "softmax") for found in outputs]


def precision(model: Detector, recipe: DetectorRecipe, batch: Batch) -> dict[str, float]:
    """mAP over IoU 0.5 to 0.95, and at 0.5 and 0.75 (fractions), of the model in evaluation mode."""
    found = zip(*answers(model, recipe, batch), strict=True)
    scores, labels, boxes = (torch.cat(tensors).cpu() for tensors in found)
    mean = np.nanmean(average_precision(scores, labels, boxes, *batch[1:], len(CLASSES)), axis=0)
    return {"map": float(mean.mean()), "map50": float(mean[0]), "map75": float(mean[5])}


class Run:
    """A training that can be stopped and taken up again."""

    def __init__(self, recipe: DetectorRecipe, device: torch.device) -> None:
        torch.default_generator.manual_seed(recipe.seed)
        self.recipe, self.device, self.step, self.seconds = recipe, device, 0, 0.0
        model = recipe.build()
        memory = next(v.shape[-1] for k, v in model.named_parameters() if k.endswith("attn.q.weight"))
        self.dense = DenseHead(memory, model.cells, len(CLASSES)).to(device)
        self.model, self.averaged = model.to(device).train(), deepcopy(model).to(device).eval().requires_grad_(False)
        for name, part in self.model.named_children():
            if "class" in name or "box" in name:  # boxes want more than the eight bits of a bfloat16
                for head in part if isinstance(part, nn.ModuleList) else [part]:
                    head.forward = torch.autocast(device.type, enabled=False)(head.forward)  # type: ignore[method-assign]
        weights = [p for m in (self.model, self.dense) for p in m.parameters() if p.requires_grad]
        self.weights = weights
        groups = [
            {"params": [p for p in weights if p.ndim > 1], "weight_decay": recipe.weight_decay},
            {"params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimiser = torch.optim.AdamW(groups, lr=recipe.learning_rate, fused=device.type == "cuda")

    def state(self, log: list[dict[str, float]]) -> dict[str, Any]:
        """All that `load` wants."""
        kept = [part.state_dict() for part in (self.model, self.averaged, self.dense, self.optimiser)]
        return {"step": self.step, "seconds": self.seconds, "parts": kept, "log": log}

    def load(self, state: dict[str, Any]) -> list[dict[str, float]]:
        """Go on where `state` was taken; returns its log."""
        self.step, self.seconds = state["step"], state["seconds"]
        for part, value in zip((self.model, self.averaged, self.dense, self.optimiser), state["parts"], strict=True):
            part.load_state_dict(value)
        return state["log"]

    def advance(self, batch: Batch, progress: float) -> Tensor:
        """One step; returns its loss (on the device). `progress`: how much of the schedule is over, 0 to 1."""
        recipe, (x, boxes, labels) = self.recipe, batch
        rate = recipe.learning_rate * min((self.step + 1) / recipe.warmup, 0.5 * (1 + math.cos(math.pi * progress)))
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        half = self.device.type == "cuda"
        with torch.autocast("cuda", torch.bfloat16) if half else nullcontext():
            stages = self.model.stages(x)
        loss = detection_loss(stages, boxes, labels, recipe.scoring == "softmax")
        loss = loss + recipe.dense * self.dense(stages[1], boxes, labels)
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights, recipe.clip_norm)
        self.optimiser.step()
        self.step += 1
        keep = min(recipe.average, self.step / (self.step + 9))
        with torch.no_grad():
            mine, others = list(self.averaged.parameters()), list(self.model.parameters())
            torch._foreach_lerp_(mine, others, 1 - keep)
            for one, other in zip(self.averaged.buffers(), self.model.buffers(), strict=True):
                one.copy_(other)
        return loss.detach()


def follow(
    recipe: DetectorRecipe,
    weights: Path,
    *,
    device: str = "cpu",
    minutes: float | None = None,
    state: Path | None = None,
    every: float = 60.0,
    source: Callable[[int], Batch] | None = None,
    report: Callable[[str], None] = print,
) -> tuple[Detector, list[dict[str, float]]]:
    """Train; the averaged model on the CPU, in evaluation mode, and the log: an entry for every `every` seconds.

    As often, `weights` (a safetensors file) gets the averaged weights, the file beside it (.json) the log, and `state`
    what a later call goes on from (default: beside them, .pt). minutes: end the schedule by the clock, not by steps.
    """
    weights.parent.mkdir(parents=True, exist_ok=True)
    run, state = Run(recipe, torch.device(device)), state or weights.with_suffix(".pt")
    log: list[dict[str, float]] = []
    if state.exists():
        log = run.load(torch.load(state, map_location=device, weights_only=True))
    source, held_out = source or Source(recipe, run.device), fixed(recipe, "test", HELD_OUT // 2, seed=1)
    start, saved = time.monotonic() - run.seconds, time.monotonic()
    losses: list[Tensor] = []

    def progress() -> float:
        run.seconds = time.monotonic() - start
        return run.step / recipe.steps if minutes is None else run.seconds / (60 * minutes)

    def keep() -> None:
        entry = {"step": run.step, "seconds": round(run.seconds, 1), "loss": float(torch.stack(losses).mean())}
        log.append({**entry, **precision(run.averaged, recipe, held_out)})
        report(f"{recipe.name}  " + "  ".join(f"{key} {value:.4g}" for key, value in log[-1].items()))
        write_whole(weights, save(weights_of(run.averaged), {"format": "pt"}))
        write_whole(weights.with_suffix(".json"), json.dumps({"model": recipe.name, "log": log}, indent=1) + "\n")
        torch.save(run.state(log), state)
        losses.clear()

    while (done := progress()) < 1:
        losses.append(run.advance(source(run.step), done))
        if run.step % 50 == 0 and run.device.type == "cuda":
            torch.cuda.synchronize()  # the clock is to show what was done, not what was asked for
        if time.monotonic() - saved > every:
            keep()
            saved = time.monotonic()
    if losses:
        keep()
    return run.averaged.cpu(), log


def measure_detector(model: Detector, recipe: DetectorRecipe) -> dict[str, Any]:
    """FP32 metrics on HELD_OUT scenes: mAP; AUPR-out and AUROC, by the largest score of a scene, against as many
    scenes that hold unknown digits and letters only (fractions).
    """
    known, unknown = (fixed(recipe, split, HELD_OUT, seed=0) for split in ("test", "unknown"))
    result: dict[str, Any] = {"n": HELD_OUT, **precision(model, recipe, known)}
    largest = [torch.cat([found[0][:, 0] for found in answers(model, recipe, b)]).numpy() for b in (known, unknown)]
    found = ood_metrics(*largest)
    keep = {key: found[key] for key in ("aupr_out", "auroc", "chance_aupr_out", "n_ood")}
    return {**result, "ood": {"scenes-unknown": {"group": "near", **keep}}}


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors, contiguous, on the CPU."""
    return {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
