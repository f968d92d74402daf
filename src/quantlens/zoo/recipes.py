"""Recipes of small classifiers: a YAML file that says everything that a training depends on (docs/training.md has every
key). It is read and checked here, and its model is built; `training` follows it.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, PrivateAttr, model_validator

from quantlens.data.preprocess import Preprocess
from quantlens.data.sources import parse_spec
from quantlens.errors import QuantlensError
from quantlens.yaml_files import Strict, checked, read_yaml, source_from

if TYPE_CHECKING:
    from torch import nn

Count = Annotated[int, Field(ge=1)]
Number = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Part = Annotated[float, Field(ge=0, lt=1)]


class Architecture(Strict):
    """timm's VisionTransformer. stem: one strided convolution, or a 3x3 one of stride 2 for every halving (Xiao et al.,
    2021). layer_scale: LayerScale's initial value. clipped_softmax: alpha of `architecture.ClippedSoftmax`, 0 for the
    plain softmax."""

    depth: Count
    width: Count
    heads: Count
    patch: Count
    mlp_ratio: Positive = 4.0
    stem: Literal["patch", "conv"] = "patch"
    registers: Number = 0
    layer_scale: Positive | None = None
    clipped_softmax: NotNegative = 0.0
    drop_path: Part = 0.0

    @model_validator(mode="after")
    def _fits(self) -> "Architecture":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of heads {self.heads}; change one of them")
        if self.stem == "conv" and (self.patch < 2 or self.patch & (self.patch - 1)):
            raise ValueError(
                f"a conv stem halves the picture, and patch {self.patch} is no power of 2; write 2, 4 or 8"
            )
        return self


def _source(text: str) -> str:
    """A SOURCE as it is written, so that a recipe is the same on every machine."""
    try:
        parse_spec(text)
    except QuantlensError as error:
        raise ValueError(str(error)) from None
    return text


class Images(Strict):
    """Labelled images. classes: those that are taken, by name (by number where the set names none), in this order;
    None: all. share: of the images of each class, drawn with the recipe's seed."""

    source: Annotated[str, AfterValidator(_source)]
    classes: tuple[str | int, ...] | None = Field(default=None, min_length=2)
    share: Annotated[float, Field(gt=0, le=1)] = 1.0

    def whole(self, base: Path) -> str:
        """The SOURCE on this machine: variables are replaced, paths are relative to `base`. Raises QuantlensError for a
        variable that is not set."""
        try:
            return source_from(self.source, base.resolve())
        except ValueError as error:
            raise QuantlensError(f"source {self.source!r} {error}") from None


class Schedule(Strict):
    """The learning rate: `warmup` steps of a line up to `rate`, then half a cosine down to `end` (a share of rate), a
    constant, or a constant with a line down to `end` over the last share `decay` of the steps (wsd)."""

    rate: Positive
    shape: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup: Number = 0
    end: Share = 0.0
    decay: Annotated[float, Field(gt=0, le=1)] = 0.2


class Pretraining(Strict):
    """Steps on other images, before the classifier is replaced and the recipe's own images are trained on. The schedule
    of the learning rate, the optimizer and the averages begin anew then. schedule: of these steps; None: the recipe's.
    """

    images: Images
    steps: Count
    schedule: Schedule | None = None


class Optimizer(Strict):
    """timm's optimizer of that name. weight_decay: of all but vectors and embeddings. clip_norm: the largest norm that
    a gradient keeps; None: any."""

    name: Literal["adamw", "adam", "sgd", "lamb", "lion", "adan"] = "adamw"
    weight_decay: NotNegative = 0.05
    clip_norm: Positive | None = None


class Augmentation(Strict):
    """crop: pixels that a picture moves at most; flip: half of them are mirrored; colour: the largest change of
    brightness, contrast and saturation, as a share; erase: the probability of a rectangle without content; mixup,
    cutmix: their alphas, 0 for without."""

    crop: Number = 0
    flip: bool = False
    colour: Part = 0.0
    erase: Share = 0.0
    mixup: NotNegative = 0.0
    cutmix: NotNegative = 0.0


class Averages(Strict):
    """Averaged weights, written beside the last ones. ema: decay of an exponential moving average, None for none; last:
    how many checkpoints, `every` so many steps and the last step among them, are averaged; 0 for none."""

    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    last: Number = 0
    every: Count = 100


class Recipe(Strict):
    """Everything that a training depends on. steps: with `images`, after pretraining. size: side of the pictures.
    checkpoints: how many weights are kept on the way, evenly spaced, the last ones not among them."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    model: Architecture
    images: Images
    steps: Count
    schedule: Schedule
    pretraining: Pretraining | None = None
    batch_size: Count = 128
    size: Count = 32
    optimizer: Optimizer = Optimizer()
    label_smoothing: Part = 0.0
    augmentation: Augmentation = Augmentation()
    averages: Averages = Averages()
    checkpoints: Number = 0
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    _base: Path = PrivateAttr(default_factory=Path)

    @model_validator(mode="after")
    def _fits(self) -> "Recipe":
        for _, steps, schedule in self.phases:
            if schedule.warmup >= steps:
                raise ValueError(f"the warmup of {schedule.warmup} steps leaves nothing of {steps}; shorten it")
        if self.size % self.model.patch:
            raise ValueError(f"size {self.size} is no multiple of patch {self.model.patch}; change one of them")
        mixed = self.augmentation.mixup or self.augmentation.cutmix
        if mixed and self.batch_size % 2:
            raise ValueError(f"mixup and cutmix take pairs, and batch_size {self.batch_size} is odd; make it even")
        if self.averages.last and (self.averages.last - 1) * self.averages.every >= self.steps:
            raise ValueError("averages.last checkpoints do not fit into steps; take fewer, or closer ones (every)")
        if self.checkpoints >= self.steps:
            raise ValueError(f"{self.checkpoints} checkpoints do not fit into {self.steps} steps; take fewer")
        return self

    @property
    def phases(self) -> list[tuple[Images, int, Schedule]]:
        """Images, steps and schedule of pretraining, if there is any, and of training."""
        given = self.pretraining
        first = [] if given is None else [(given.images, given.steps, given.schedule or self.schedule)]
        return [*first, (self.images, self.steps, self.schedule)]

    @property
    def pretrained(self) -> str:
        """A hash of all that the weights depend on when pretraining ends: recipes that share it share these weights."""
        after = {"name", "images", "steps", "schedule", "checkpoints"}
        told = self.model_dump(mode="json", exclude=after) | {"schedule": self.phases[0][2].model_dump(mode="json")}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def checkpoint_steps(self) -> list[int]:
        """After which steps weights are kept."""
        return [self.steps * k // (self.checkpoints + 1) for k in range(1, self.checkpoints + 1)]

    @property
    def preprocess(self) -> Preprocess:
        """What the model expects of its images."""
        return Preprocess((3, self.size, self.size), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0)

    def source(self, images: Images) -> str:
        """The SOURCE of images on this machine."""
        return images.whole(self._base)

    def build(self, num_classes: int) -> "nn.Module":
        """The untrained model."""
        from quantlens.zoo.architecture import build

        return build(self.model, self.size, num_classes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, from which `parse_recipe` makes the same recipe."""
        return self.model_dump(mode="json")


def load_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Read a recipe (YAML). Its name is that of the file where it gives none. Raises QuantlensError."""
    path = Path(path)
    where = f"recipe {path}"
    return parse_recipe(read_yaml(path, where), base=path.parent, where=where, name=path.stem)


def parse_recipe(data: Any, *, base: Path | None = None, where: str = "the recipe", name: str = "recipe") -> Recipe:
    """A checked recipe from plain data. base: what paths in it are relative to (None: the working directory). Raises
    QuantlensError."""
    if not isinstance(data, dict):
        raise QuantlensError(f"{where} must hold keys such as `model:` and `images:`, not {type(data).__name__}")
    recipe = checked(Recipe, {"name": name, **data}, base=None, where=where)
    recipe._base = base or Path()
    return recipe
