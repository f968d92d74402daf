"""Image sets for an evaluation: opened once, checked against the model's classes and against each other."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

from quantlens.data.ood_sets import group_of
from quantlens.errors import QuantlensError, UnknownNameError

ImageProgress = Callable[[str, int, int], None]
"""Called with what is done ("decoding textures"), the number of images done, and the number in all."""


@dataclass(frozen=True)
class EvaluationImages:
    """The images of one evaluation, opened and checked: labelled ID images, OOD sets with their groups
    ("far" or "near"), and the images that scores are fitted on, or None. shift: what opens each shifted set, one after
    the other, as there may be a hundred of them."""

    id: Any
    ood: dict[str, Any]
    fit: Any
    groups: dict[str, str]
    shift: dict[str, Callable[[], Any]] = field(default_factory=dict)

    def shifted(self, model: Any) -> Iterator[tuple[str, Any]]:
        """(name, images) of every shifted set. Raises QuantlensError for labels that are none of the model's."""
        for name, open_set in self.shift.items():
            images = open_set()
            images.check_labels(model.num_classes)
            yield name, images

    @classmethod
    def open(
        cls,
        model: Any,
        id: Any,
        ood: Mapping[str, Any] | None,
        fit: Any,
        groups: Mapping[str, str] | None,
        progress: ImageProgress | None,
        task: str = "classify",
        *,
        shift: Mapping[str, Any] | None = None,
        pixels: bool = False,
        **reading: Any,
    ) -> "EvaluationImages":
        """Images of what `data.as_image_set` accepts, `reading` being its other arguments. pixels: whether a float
        model looks at them beside a file of logits. Raises QuantlensError for an empty set, labels that do not fit the
        task, groups of other sets, or a fit set among those evaluated."""
        from quantlens.data import as_image_set
        from quantlens.data.shared import warn_shared
        from quantlens.evaluation.foreign import refuse_unprepared
        from quantlens.evaluation.shift import check_shift, corrupted_images, shifted_sets
        from quantlens.evaluation.tasks import check_labels, check_same_classes

        groups_of(ood or {}, groups)  # a mistake there is told before images are read

        def opened(value: Any, name: str) -> Any:
            value = value() if isinstance(value, partial) else value  # of a study
            told = None if progress is None else partial(progress, f"decoding {name}")
            refuse_unprepared(model, value)
            images = as_image_set(value, model.preprocess, name, progress=told, **reading)
            return images.in_classes_of(getattr(model, "class_names", None))

        check_shift(shift, task, model)
        if hasattr(model, "open_sets"):
            found: EvaluationImages = model.open_sets(id, ood, fit, groups, pixels, task, opened)
            return found
        if id is None:
            raise QuantlensError("id is missing: give labelled images, such as id='imagenet:DIR'")
        id_images = opened(id, "the ID set")
        if hasattr(model, "learn"):
            model.learn(id_images.tensor(0, 1).shape[1:])
        if task == "detect":
            from quantlens.evaluation.detection import with_boxes

            id_images = with_boxes(id_images, model)
        else:
            _refuse_boxes(id_images, model, task)
            check_labels(id_images, task, model.num_classes)
        ood_images = {str(name): opened(value, f"OOD set {name}") for name, value in (ood or {}).items()}
        sets = shifted_sets(shift, partial(corrupted_images, id_images, reading.get("cache_dir")))
        fit_images = None if fit is None else opened(fit, "the fit set")
        if fit_images is not None:
            if task == "features":
                check_same_classes(id_images, fit_images)
            refuse_overlap(fit_images, "the fit set", id_images, "the ID set")
            for name, images in ood_images.items():
                refuse_overlap(fit_images, "the fit set", images, f"OOD set {name}")
        warn_shared(id_images, ood_images, fit_images, getattr(model, "calibration", None), model.preprocess)
        opening = _opening(sets, opened, model.num_classes, fit_images)
        return cls(id_images, ood_images, fit_images, groups_of(ood_images, groups), opening)


def _opening(
    sets: Mapping[str, Any], opened: Callable[[Any, str], Any], classes: int, fit: Any
) -> dict[str, Callable[[], Any]]:
    """What opens each shifted set; those that are not made of other images are opened, and checked, at once."""
    opening: dict[str, Callable[[], Any]] = {}
    for name, value in sets.items():
        opening[name] = partial(opened, value, what := f"shifted set {name}")
        if not isinstance(value, partial):
            images = opening[name]()
            images.check_labels(classes)
            opening[name] = partial(lambda found: found, images)
            if fit is not None:
                refuse_overlap(fit, "the fit set", images, what)
    return opening


def _refuse_boxes(images: Any, model: Any, task: str) -> None:
    if images.boxes is not None and images.labels is None and task != "features":
        raise QuantlensError(
            f"{images.source} has boxes and {model.name} is no detector (it is measured as {task!r}): one gives "
            "class logits [B, Q, C] and boxes [B, Q, 4], as 'logits' (or 'pred_logits') and 'pred_boxes' or as a tuple"
        )


def describe(images: Any) -> dict[str, Any]:
    """{"source", "fingerprint", "n", "skipped"} of an image set."""
    return {
        "source": images.source,
        "fingerprint": images.fingerprint,
        "n": len(images),
        "skipped": len(images.skipped),
    }


def groups_of(sets: Mapping[str, Any], groups: Mapping[str, str] | None) -> dict[str, str]:
    """Set name -> "far" or "near": as given, else as the set itself says (embedded ones do), else what OpenOOD makes of
    its name (`data.ood_sets`), else far."""
    given = dict(groups or {})
    for name, group in given.items():
        if name not in sets:
            raise UnknownNameError("OOD set", name, sets, hint="a group is given to one of the sets evaluated")
        if group not in ("far", "near"):
            raise QuantlensError(f"the group of OOD set {name!r} is {group!r}; write 'far' or 'near'")
    own = {name: getattr(images, "group", None) or group_of(str(name)) for name, images in sets.items()}
    return {name: given.get(name) or ("near" if own[name] == "near" else "far") for name in sets}


# ---- overlap ---------------------------------------------------------------------------------------------------------


def source_name(images: Any) -> str:
    """The SOURCE of an image set or an opened Source; for tensors the name they were given."""
    return str(getattr(images, "spec", None) or images.source)


def fingerprint(images: Any) -> str:
    """The short hash of an image set or an opened Source."""
    value = images.fingerprint
    return str(value() if callable(value) else value)


def refuse_overlap(first: Any, first_what: str, second: Any, second_what: str) -> None:
    """Raise when images that are learnt from are among the images that are evaluated, as far as their files or names
    tell."""
    same = fingerprint(first) == fingerprint(second)
    count = len(second) if same else len(_identities(first) & _identities(second))
    if count:
        raise QuantlensError(
            f"{first_what} ({source_name(first)}) and {second_what} ({source_name(second)}) share {count} images; "
            "metrics measured so would flatter: take other images, for example with a slice SOURCE[a:b]"
        )


def _identities(images: Any) -> set[str]:
    """One string per image that two sets give alike exactly when they hold the same image: its real path, or for images
    that are no files of their own the place of the collection and the image's name in it. Empty for tensors."""
    from quantlens.data.sources import parse_spec

    try:
        spec = parse_spec(source_name(images))
    except QuantlensError:
        return set()
    if spec.kind == "embedded":  # names are unique across the embedded sets, and some sets are part of others
        return {f"embedded/{name}" for name in images.names}
    real = cache(os.path.realpath)  # a directory is resolved once, not once per file
    if spec.kind in ("imagenet", "imagefolder", "images"):
        places = (os.path.split(os.path.join(spec.path, name)) for name in images.names)
        return {os.path.join(real(folder), name) for folder, name in places}
    return {f"{spec.kind}:{real(spec.path)}:{spec.options}:{name}" for name in images.names}
