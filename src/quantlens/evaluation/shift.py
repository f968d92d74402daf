"""Shifted in-distribution sets: images of the same classes under other circumstances (ImageNet-V2, corruptions of the
ID images), what a classifier loses on them, and OOD detection that counts them as in-distribution.

A set that is called NAME:SEVERITY after a corruption ("fog:3") is one of those that the mean corruption error is over,
wherever its images come from.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, product
from typing import Any

import numpy as np

from quantlens.data.sources import parse_spec, with_corruption
from quantlens.errors import QuantlensError, UnknownNameError, UnsupportedError
from quantlens.evaluation.outputs import VECTORS, Outputs, of_images
from quantlens.evaluation.result import CORRUPT, CORRUPTED, plain
from quantlens.evaluation.tasks import ONE_LABEL
from quantlens.metrics import mean_over_sets, metrics_of, ood_metrics
from quantlens.metrics.bootstrap import ID, Array, classification, ranking
from quantlens.metrics.classification import calibration_error

ALL = "all"
SEVERITIES = (1, 2, 3, 4, 5)


# ---- what is asked for -----------------------------------------------------------------------------------------------


def corruption_of(name: str) -> tuple[str, int] | None:
    """(corruption, severity) that a set is called after; None for another name."""
    first, colon, last = name.rpartition(":")
    if not colon or not last.isdecimal() or int(last) not in SEVERITIES:
        return None
    from quantlens.data.corruptions import CORRUPTIONS

    return (first, int(last)) if first in CORRUPTIONS else None


def corruptions(given: str | Sequence[str]) -> list[tuple[str, int]]:
    """(corruption, severity) of each that is asked for: "fog:3", "fog:1,3,5", "fog" (all five), "all", "all:3", or a
    list of these. Raises QuantlensError for a severity that there is not, UnknownNameError for a corruption."""
    if not given:
        return []
    from quantlens.data.corruptions import CORRUPTIONS

    found: dict[tuple[str, int], None] = {}
    for text in [given] if isinstance(given, str) else given:
        name, colon, last = str(text).partition(":")
        if name not in (ALL, *CORRUPTIONS):
            raise UnknownNameError("corruption", name, [ALL, *CORRUPTIONS])
        levels = [one.strip() for one in last.split(",")] if colon else list(map(str, SEVERITIES))
        wrong = [level for level in levels if not level.isdecimal() or int(level) not in SEVERITIES]
        if wrong:
            raise QuantlensError(f"the severity of {text!r} is {wrong[0]!r}; write 1 to 5, such as {name}:3")
        names = CORRUPTIONS if name == ALL else [name]
        found |= dict.fromkeys((one, int(level)) for one in names for level in levels)
    return list(found)


def shifted_sets(shift: Mapping[str, Any] | None, corrupted: Callable[[str, int], Any]) -> dict[str, Any]:
    """The images of every shifted set by its name, `corrupted` giving those of a corruption of the ID images. Raises
    QuantlensError for a set that is named twice."""
    sets: dict[str, Any] = {str(name): images for name, images in (shift or {}).items() if name != CORRUPT}
    for name, severity in corruptions((shift or {}).get(CORRUPT, ())):
        if (title := f"{name}:{severity}") in sets:
            raise QuantlensError(f"the shifted set {title} is given and made of the ID images; leave one of them out")
        sets[title] = corrupted(name, severity)
    return sets


def corrupted_images(images: Any, cache_dir: Any, name: str, severity: int) -> Any:
    """What makes the corrupted images of an ImageSet, those of its SOURCE with `?corrupt=`. Raises QuantlensError where
    it holds no pictures, or corrupted ones."""
    from quantlens.data.kinds import KINDS

    kind, colon, _ = images.source.partition(":")
    source, seed = f"{images.source}, {name}:{severity}", 0
    if colon and kind in KINDS:
        source, seed = with_corruption(images.source, name, severity), parse_spec(images.source).seed
    if images.pixels is None:
        images.corrupted(name, severity)  # says what to give instead
    return partial(lambda: replace(images.corrupted(name, severity, seed=seed, cache_dir=cache_dir), source=source))


def check_shift(shift: Any, task: str, model: Any) -> None:
    """Raise UnsupportedError where shift is asked for of a model that is not measured under it."""
    if not shift:
        return
    if task == "detect":
        raise UnsupportedError(
            f"{model.name} is a detector, and shift is of classifiers: measure it on shifted images as its ID images, "
            "such as id='coco:DIR?corrupt=fog:3'"
        )
    if task not in ONE_LABEL:
        raise UnsupportedError(
            f"{model.name} is measured as {task!r}, and shift is of classifiers with one label for an image: leave "
            "`shift` out"
        )
    if hasattr(model, "recorded"):
        raise UnsupportedError(f"{model.name}: a file of logits has none of shifted images; give the model")


# ---- metrics ---------------------------------------------------------------------------------------------------------


def shift_metrics(images: Mapping[str, Array], n_bins: int) -> dict[str, float]:
    """The metrics of one shifted set, of what `outputs.of_images` gives of its images."""
    right = images["rank"] == 0
    return {
        "top1": float(right.mean()),
        "top5": float((images["rank"] < 5).mean()),
        "nll": float(images["nll"].mean()),
        "ece": calibration_error(images["confidence"], right, n_bins=n_bins),
        "brier": float(images["brier"].mean()),
    }


def corruptions_among(names: Iterable[str]) -> dict[str, dict[str, list[str]]]:
    """Parts of `shift_mean` -> corruption -> the sets among these names: {"corruptions": …, "severity_3": …}."""
    found: dict[str, dict[str, list[str]]] = {}
    known = [(name, one) for name in names if (one := corruption_of(name)) is not None]
    for part, level in ((CORRUPTED, None), *((f"severity_{level}", level) for level in SEVERITIES)):
        for name, (corruption, severity) in known:
            if level in (None, severity):
                found.setdefault(part, {}).setdefault(corruption, []).append(name)
    return found


def mean_over(corruptions: Mapping[str, Sequence[str]], sets: Mapping[str, Mapping[str, Any]], metric: str) -> Any:
    """The mean of a metric (of numbers or arrays) over corruptions, each the mean over its sets."""
    return np.mean([np.mean([sets[one][metric] for one in same], axis=0) for same in corruptions.values()], axis=0)


def shift_means(sets: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The means over the corruptions among the shifted sets, of all severities ("corruptions") and of each
    ("severity_3"), with the mean corruption error `mce`; {} without any."""
    means: dict[str, dict[str, Any]] = {}
    for part, of in corruptions_among(sets).items():
        named = [name for name in metrics_of("classify") if all(name in sets[one] for one in chain(*of.values()))]
        found = {name: float(mean_over(of, sets, name)) for name in named}
        means[part] = {"mce": 1 - found["top1"], **found, "n_sets": sum(map(len, of.values()))}
    return means


@dataclass
class Shifted:
    """What one model gives on shifted images, set after set. id_scores: {score: [N]} of the ID images."""

    id_scores: Mapping[str, Array]
    sets: dict[str, dict[str, Any]] = field(default_factory=dict)
    images: dict[str, dict[str, Array]] = field(default_factory=dict)
    """what is kept of the images of every set (`outputs.of_images`)"""
    scores: dict[str, dict[str, Array]] = field(default_factory=dict)
    full: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(
        self, name: str, about: Mapping[str, Any], logits: Any, labels: Any, scores: dict[str, Array], n_bins: int
    ) -> None:
        """Measure a set. about: of `images.describe`; scores: {score: [N]} of its images."""
        given, self.scores[name] = of_images(logits, labels, "scores"), scores
        self.images[name] = {key: given[key] for key in VECTORS}
        self.sets[name] = {**about, **shift_metrics(self.images[name], n_bins)}

    def against(self, name: str, scores: Mapping[str, Array], group: str) -> None:
        """Measure an OOD set by its scores {score: [M]} against the ID images and all shifted ones as in-distribution
        (full-spectrum OOD detection: Yang, Zhou and Liu, IJCV 2023)."""
        if self.sets:
            found = {score: ood_metrics(spectrum(self, score), values) for score, values in scores.items()}
            sizes = {"n": next((values.size for values in scores.values()), 0), "group": group}
            self.full[name] = sizes | found

    def parts(self) -> dict[str, Any]:
        """The parts of a result that are of shifted images; none without any."""
        if not self.sets:
            return {}
        means = {"shift_mean": shift_means(self.sets), "full_spectrum_mean": mean_over_sets(self.full)}
        return dict(plain({"shift": self.sets, "full_spectrum": self.full, **means}))

    def within(self, outputs: Outputs | None) -> Outputs | None:
        """The per-image outputs with those of the shifted images."""
        if outputs is None or not self.sets:
            return outputs
        marks = {name: {"fingerprint": entry["fingerprint"]} for name, entry in self.sets.items()}
        scores = self.scores if outputs.id_scores else {}
        return replace(outputs, about=outputs.about | {"shift": marks}, shift=self.images, shift_scores=scores)


def spectrum(images: Any, score: str) -> Array:
    """A score of all images that are in-distribution in the full spectrum: the ID images, then every shifted set; of a
    `Shifted` or of `Outputs`."""
    of_shifted = images.scores if isinstance(images, Shifted) else images.shift_scores
    return np.concatenate([images.id_scores[score], *(one[score] for one in of_shifted.values())])


# ---- comparing, and resampling the images ----------------------------------------------------------------------------

OF_A_SET, OF_MEANS, OF_SPECTRUM = ("top1", "nll", "ece"), ("mce", "nll", "ece"), ("aupr_out", "auroc")
"""What is compared of a set that is no corruption, of the means over corruptions, and of full-spectrum detection."""


def common_shift(about: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], list[str]]:
    """(names of the shifted sets of results, or of what per-image outputs are about, and a note where they differ).
    They are compared together or not at all, as full-spectrum detection is of all of them."""
    marks = [{name: one.get("fingerprint") for name, one in (part.get("shift") or {}).items()} for part in about]
    if all(one == marks[0] for one in marks):
        return tuple(marks[0]), []
    return (), ["left out, as not all cells were measured on the same images of it: what there is under shift"]


def shift_values(result: Mapping[str, Any], sets: Sequence[str], scores: Sequence[str]) -> dict[str, Any]:
    """What is compared of a result that has shifted images, by path. sets, scores: of OOD detection."""
    parts = [("shift", name, OF_A_SET) for name in result["shift"] if corruption_of(name) is None]
    parts += [("shift_mean", CORRUPTED, OF_MEANS)] if CORRUPTED in (result.get("shift_mean") or ()) else []
    found = {f"{key}.{name}.{one}": result[key][name].get(one) for key, name, chosen in parts for one in chosen}
    by_set = {name: result["full_spectrum"][name] for name in sets}
    for group, names in members(sets, {name: entry["group"] for name, entry in by_set.items()}).items():
        for score, metric in product(scores, OF_SPECTRUM):
            values = [by_set[name][score][metric] for name in names]
            found[f"full_spectrum_mean.{group}.{score}.{metric}"] = sum(values) / len(values)
    return found


def members(sets: Sequence[str], groups: Mapping[str, str]) -> dict[str, list[str]]:
    """OOD sets by group, those groups that have any."""
    return {group: names for group in ("far", "near") if (names := [name for name in sets if groups[name] == group])}


def places(outputs: Any) -> dict[str, str]:
    """By which counts the images of every shifted set are drawn: corrupted images with what they were made of, which is
    the ID images, or those of the first corruption with these labels; other sets by their own."""
    known, found = {outputs.labels.tobytes(): ID}, {}
    for name, images in outputs.shift.items():
        own = f"shift.{name}"
        found[name] = known.setdefault(images["labels"].tobytes(), own) if corruption_of(name) else own
    return found


def shift_sizes(outputs: Any) -> dict[str, int]:
    """Images of every shifted set that is drawn by itself, by the name of its counts."""
    return {place: len(outputs.shift[name]["labels"]) for name, place in places(outputs).items() if place != ID}


def resampled_shift(
    outputs: Any, sets: Sequence[str], scores: Sequence[str], counts: Mapping[str, Array]
) -> dict[str, Array]:
    """{path: [resamples]} of what `shift_values` has, for counts [images, resamples] by `places`."""
    at, n_bins = places(outputs), int(outputs.about["n_bins"])
    by_set = {}
    for name, images in outputs.shift.items():
        rank, confidence, nll, brier = (images[key] for key in ("rank", "confidence", "nll", "brier"))
        drawn = counts[at[name]]
        by_set[name] = classification(rank, confidence, nll, brier, drawn, n_bins=n_bins, wanted=OF_A_SET)
    found = {
        f"shift.{name}.{one}": values
        for name, metrics in by_set.items()
        if corruption_of(name) is None
        for one, values in metrics.items()
    }
    for part, of in corruptions_among(by_set).items():
        found |= {f"shift_mean.{part}.{one}": mean_over(of, by_set, one) for one in OF_MEANS[1:]}
        found[f"shift_mean.{part}.mce"] = 1 - mean_over(of, by_set, "top1")
    together = {**counts, ID: np.concatenate([counts[ID], *(counts[at[name]] for name in outputs.shift)])}
    for score in scores if sets else ():
        oods = {name: outputs.ood_scores[name][score] for name in sets}
        ranked = ranking(spectrum(outputs, score), oods, together, OF_SPECTRUM)
        for group, names in members(sets, outputs.groups).items():
            for metric in OF_SPECTRUM:
                mean = np.mean([ranked[name][metric] for name in names], axis=0)
                found[f"full_spectrum_mean.{group}.{score}.{metric}"] = mean
    return found
