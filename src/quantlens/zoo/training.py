"""Follow a recipe: a training that can be stopped at any step and goes on as if it had not been.

What is random in a step depends on the seed, the phase (pretraining or not) and the step alone, so that a state is the
model, the optimizer, the averages and the number of steps done: on one device, with as many threads, a training that
was killed gives the same weights, bit for bit, as one that was not.
"""

import io
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from quantlens._version import __version__
from quantlens.ambient import check_device, isolated
from quantlens.errors import QuantlensError, StorageError
from quantlens.files import check_writable, write_whole
from quantlens.zoo.architecture import new_head
from quantlens.zoo.augmentation import mixing, prepared
from quantlens.zoo.recipes import Recipe, Schedule, parse_recipe
from quantlens.zoo.training_images import training_images

LOGGED = 50
"""Steps between two lines of the log."""
STATE = "state.pt"
WEIGHTS = "weights"
"""The last weights, WEIGHTS.safetensors; "ema" and "average" lie beside them where the recipe asks for them, and
"step-000400" for a checkpoint on the way."""

Report = Callable[[int, int, float], None]
"""Called after every step with steps done, steps in all, and the last mean loss of the log (NaN before)."""


# ---- the learning rate -----------------------------------------------------------------------------------------------


def rate_at(schedule: Schedule, step: int, steps: int) -> float:
    """The learning rate of a step (from 0) of `steps`."""
    if step < schedule.warmup:
        return schedule.rate * (step + 1) / schedule.warmup
    done = (step - schedule.warmup) / (steps - schedule.warmup)
    factor = 1.0
    if schedule.shape == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * done))
    elif schedule.shape == "wsd":
        factor = min(1.0, (steps - step) / (schedule.decay * steps))
    return schedule.rate * (schedule.end + (1 - schedule.end) * factor)


# ---- a training ------------------------------------------------------------------------------------------------------


@dataclass
class _Phase:
    """Images of a phase on the device, uint8 [N, 3, H, W], their labels [N], class names, and its number of steps."""

    pixels: Tensor
    labels: Tensor
    names: list[str]
    steps: int


class Run:
    """A training at some step. `phase` and `step` are those of the step that comes next."""

    def __init__(self, recipe: Recipe, device: torch.device, cache_dir: Any = None) -> None:
        self.recipe, self.device, self.cache_dir = recipe, device, cache_dir
        self.seconds, self.log = 0.0, list[dict[str, Any]]()
        self.total = torch.zeros((), device=device)
        self.model: nn.Module
        self._enter(0)

    @property
    def done(self) -> int:
        """Steps done, in all phases."""
        return self.step + sum(steps for _, steps, _ in self.recipe.phases[: self.phase])

    def _enter(self, phase: int) -> None:
        """Begin a phase: its images, a classifier of its classes, an optimizer and averages."""
        self.phase, self.step, recipe = phase, 0, self.recipe
        given, steps, self.schedule = recipe.phases[phase]
        images = training_images(given, recipe, self.cache_dir)
        assert images.pixels is not None
        assert images.labels is not None
        assert images.class_names is not None
        pixels, labels = torch.from_numpy(np.array(images.pixels)), torch.from_numpy(images.labels.copy())
        self.images = _Phase(pixels.to(self.device), labels.to(self.device), images.class_names, steps)
        self._seed(2)
        if phase == 0:
            self.model = recipe.build(len(images.class_names))
        else:
            new_head(self.model, len(images.class_names))
        self.model = self.model.to(self.device).train()
        optimizer, averages = recipe.optimizer, recipe.averages
        self.optimizer = create_optimizer_v2(
            self.model, optimizer.name, lr=self.schedule.rate, weight_decay=optimizer.weight_decay
        )
        self.ema = None if averages.ema is None else ModelEmaV3(self.model, averages.ema, use_warmup=True)
        self.average = AveragedModel(self.model, use_buffers=True) if averages.last else None
        self.mix = mixing(recipe.augmentation, len(images.class_names))
        self._order = (-1, torch.empty(0, dtype=torch.long))

    def _seed(self, *what: int) -> None:
        """Seed torch and numpy for this phase and `what`."""
        torch_seed, numpy_seed = np.random.SeedSequence([self.recipe.seed, self.phase, *what]).generate_state(2)
        torch.manual_seed(int(torch_seed))
        np.random.seed(int(numpy_seed))

    def _rows(self) -> Tensor:
        """Which images the step takes: every epoch a new order, an incomplete batch left out."""
        size = self.recipe.batch_size
        epoch, place = divmod(self.step, len(self.images.labels) // size)
        if self._order[0] != epoch:
            self._seed(1, epoch)
            self._order = epoch, torch.randperm(len(self.images.labels)).to(self.device)
        return self._order[1][place * size : (place + 1) * size]

    def advance(self) -> None:
        """One step."""
        if self.step == self.images.steps:
            self._enter(self.phase + 1)
        recipe, rows = self.recipe, self._rows()
        self._seed(0, self.step)
        pixels, target = self.images.pixels[rows], self.images.labels[rows]
        images = prepared(pixels, recipe.augmentation, recipe.preprocess)
        if self.mix is not None:
            images, target = self.mix(images, target)
        rate = rate_at(self.schedule, self.step, self.images.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = F.cross_entropy(self.model(images), target, label_smoothing=recipe.label_smoothing)
        self.optimizer.zero_grad()
        loss.backward()
        if recipe.optimizer.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), recipe.optimizer.clip_norm)
        self.optimizer.step()
        self.step += 1
        self.total += loss.detach()
        self._follow(rate)

    def _follow(self, rate: float) -> None:
        """What comes after a step: averages, the log, a checkpoint."""
        averages, left = self.recipe.averages, self.images.steps - self.step
        if self.ema is not None:
            self.ema.update(self.model, self.step)
        if self.average is not None and left % averages.every == 0 and left // averages.every < averages.last:
            self.average.update_parameters(self.model)
        if self.done % LOGGED == 0 or left == 0:
            since = self.done - (self.log[-1]["step"] if self.log else 0)
            loss = float(self.total) / since
            if not math.isfinite(loss):
                raise QuantlensError(
                    f"{self.recipe.name}: the loss is not finite after {self.done} steps; lower the rate"
                )
            self.log.append({"step": self.done, "rate": rate, "loss": loss})
            self.total.zero_()

    @property
    def checkpoint(self) -> str | None:
        """The name of the checkpoint that the last step made, if it did."""
        last = self.phase == len(self.recipe.phases) - 1
        return checkpoint_name(self.step) if last and self.step in self.recipe.checkpoint_steps else None

    @property
    def pretrained(self) -> bool:
        """Whether the last step was that of pretraining."""
        return self.phase < len(self.recipe.phases) - 1 and self.step == self.images.steps

    def averaged(self) -> Iterator[tuple[str, nn.Module]]:
        """The averaged models by the name of their files."""
        if self.ema is not None:
            yield "ema", self.ema.module
        if self.average is not None:
            yield "average", self.average.module

    def packed(self, model: nn.Module) -> bytes:
        """A model's weights as a safetensors file, with the recipe, the class names and versions in its header."""
        versions = {"quantlens": __version__, "torch": torch.__version__, "timm": timm.__version__}
        told = {"recipe": self.recipe.to_dict(), "classes": self.images.names, "made_with": versions}
        header = {"format": "pt", **{name: json.dumps(value, sort_keys=True) for name, value in told.items()}}
        return save({name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}, header)

    def state(self) -> dict[str, Any]:
        """Everything that goes on depends on; when pretraining ends, for all recipes that share it."""
        models = {"model": self.model, "optimizer": self.optimizer, "ema": self.ema, "average": self.average}
        return {
            "recipe": json.dumps(self.recipe.to_dict(), sort_keys=True),
            "pretrained": self.recipe.pretrained if self.pretrained else None,
            **{name: None if part is None else part.state_dict() for name, part in models.items()},
            **{name: getattr(self, name) for name in ("phase", "step", "total", "log", "seconds")},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state` of the same recipe. Raises QuantlensError for another one."""
        same = state["recipe"] == json.dumps(self.recipe.to_dict(), sort_keys=True)
        if not same and state.get("pretrained") != self.recipe.pretrained:
            raise QuantlensError("it is of another recipe: take another folder, or delete it to begin anew")
        for phase in range(1, state["phase"] + 1):
            self._enter(phase)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in ("ema", "average"):
            if state[name] is not None:
                getattr(self, name).load_state_dict(state[name])
        self.step, self.log, self.seconds = state["step"], state["log"], state["seconds"]
        self.total = state["total"].to(self.device)


@isolated
def train(
    recipe: Recipe,
    out: Path,
    *,
    device: str = "cpu",
    stop: int | None = None,
    pretrained: Path | None = None,
    save_seconds: float = 60.0,
    cache_dir: Any = None,
    report: Report | None = None,
) -> bool:
    """Follow a recipe into the folder `out`, or go on there, and say whether it is done.

    Written are WEIGHTS.safetensors (last, so that it is there where everything is), `ema` and `average` beside it where
    the recipe has them, checkpoints, and log.json; meanwhile STATE, every save_seconds and where the training is
    interrupted. device: "cpu", "cuda", …. stop: after so many steps in all. pretrained: a folder of what pretraining
    left, from which a recipe goes on that shares it with one before. Raises QuantlensError where `out` holds another
    recipe, images do not fit, or the loss is not finite.
    """
    check_device(device)
    weights = out / f"{WEIGHTS}.safetensors"
    if weights.exists():
        _check_same(recipe, weights)
        return True
    check_writable(weights, what="the weights")
    with _deterministic(torch.device(device)):
        run = Run(recipe, torch.device(device), cache_dir)
        kept = None if pretrained is None else pretrained / f"{recipe.pretrained}.pt"
        start = next((path for path in (out / STATE, kept) if path is not None and path.exists()), None)
        if start is not None:
            _restore(run, start)
        total = sum(steps for _, steps, _ in recipe.phases)
        _advance(run, min(total, total if stop is None else stop), out, kept, save_seconds, report)
    if run.done < total:
        return False
    for name, model in run.averaged():
        write_whole(out / f"{name}.safetensors", run.packed(model))
    write_whole(out / "log.json", json.dumps({"seconds": round(run.seconds, 1), "log": run.log}, indent=1) + "\n")
    write_whole(weights, run.packed(run.model))
    (out / STATE).unlink(missing_ok=True)
    return True


def _advance(
    run: Run, last: int, out: Path, pretrained: Path | None, save_seconds: float, report: Report | None
) -> None:
    """Steps until `last`; the state is kept now and then, where it is interrupted, at an end before the last, and in
    `pretrained` when pretraining ends."""
    before, saved, total = run.seconds, 0.0, sum(steps for _, steps, _ in run.recipe.phases)
    started = time.monotonic()

    def keep(path: Path = out / STATE) -> None:
        run.seconds = before + time.monotonic() - started
        buffer = io.BytesIO()
        torch.save(run.state(), buffer)
        write_whole(path, buffer.getvalue(), what="the state of the training")

    whole = True
    try:
        while run.done < last:
            whole = False
            run.advance()
            whole = True
            if run.checkpoint is not None:
                write_whole(out / f"{run.checkpoint}.safetensors", run.packed(run.model))
            if run.pretrained and pretrained is not None:
                keep(pretrained)
            if report is not None:
                report(run.done, total, run.log[-1]["loss"] if run.log else math.nan)
            if time.monotonic() - started - saved >= save_seconds:
                saved = time.monotonic() - started
                keep()
    except KeyboardInterrupt:
        if whole:  # within a step, the state is of no step
            keep()
        raise
    if run.done < total:
        keep()
    run.seconds = before + time.monotonic() - started


def _restore(run: Run, path: Path) -> None:
    try:
        state = torch.load(path, map_location=run.device, weights_only=True)
    except Exception as error:  # a damaged file raises almost anything
        raise StorageError(f"{path} cannot be read: delete it to begin anew") from error
    try:
        run.restore(state)
    except QuantlensError as error:
        raise QuantlensError(f"the training that was stopped in {path.parent} cannot go on: {error}") from None


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """Inside, operations of a GPU give the same result every time, where there is such an implementation."""
    if device.type != "cuda":
        yield
        return
    before, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)


def checkpoint_name(step: int) -> str:
    """The name of the weights that are kept after a step."""
    return f"step-{step:06d}"


# ---- what was trained ------------------------------------------------------------------------------------------------


def trained(path: Path) -> tuple[nn.Module, Recipe, list[str]]:
    """A model from the file that a training wrote, in evaluation mode, its recipe, and the names of its classes. Raises
    StorageError."""
    try:
        with safe_open(str(path), "pt") as file:
            header = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        recipe, classes = parse_recipe(json.loads(header["recipe"])), json.loads(header["classes"])
        model = recipe.build(len(classes))
        model.load_state_dict(state)
    except Exception as error:  # a damaged or foreign file raises almost anything
        raise StorageError(f"{path} holds no weights that a recipe of quantlens trained; train it again") from error
    return model.eval(), recipe, classes


def _check_same(recipe: Recipe, weights: Path) -> None:
    """Raise QuantlensError where weights are those of another recipe."""
    if trained(weights)[1].to_dict() != recipe.to_dict():
        raise QuantlensError(f"{weights} is of another recipe; take another folder")
