"""Where modules and names of earlier releases live today. What is imported from an old place is found at the new one,
with a DeprecationWarning that names both."""

import os
import sys
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

DROPPED = "0.4"
"""The release without the old names."""


_PACKAGE = os.path.dirname(__file__)


def _of(old: str, new: str, *names: str) -> dict[str, str]:
    return {f"quantlens.{old}.{name}": f"quantlens.{new}.{name}" for name in names}


MODULES: dict[str, str] = {
    **_of("quantizers", "formats", "base", "integer_ops", "log", "uniform"),
    "quantlens.quantizers.twin": "quantlens.formats.uniform",
    "quantlens.formats.twin": "quantlens.formats.uniform",
    **dict.fromkeys(_of("quantizers", "", "adalog", "shifted_log"), "quantlens.formats.log"),
    **dict.fromkeys(_of("formats", "", "adalog", "shifted_log"), "quantlens.formats.log"),
    "quantlens.quantizers.power_of_two": "quantlens.formats.uniform",
    "quantlens.formats.power_of_two": "quantlens.formats.uniform",
    "quantlens.formats.sqrt_softmax": "quantlens.formats.group_scaled",
    "quantlens.quantizers.operators": "quantlens.formats.base",
    "quantlens.formats.operators": "quantlens.formats.base",
    "quantlens.quantizers.block_scaled": "quantlens.formats.group_scaled",
    "quantlens.quantizers.rows": "quantlens.formats.group_scaled",
    "quantlens.quantizers.model": "quantlens.qmodel.model",
    **dict.fromkeys(_of("quantizers", "", "bits", "targets"), "quantlens.qmodel.plan"),
    **dict.fromkeys(_of("qmodel", "", "bits", "targets"), "quantlens.qmodel.plan"),
    "quantlens.ranges.observers": "quantlens.calibration.passes",
    "quantlens.calibration.observers": "quantlens.calibration.passes",
    "quantlens.reconstruction.checkpoints": "quantlens.reconstruction.settings",
    **_of("ranges", "calibration.ranges", "guided", "rules", "similarity"),
    "quantlens.ranges.power_of_two": "quantlens.calibration.ranges.rules",
    "quantlens.calibration.ranges.power_of_two": "quantlens.calibration.ranges.rules",
    "quantlens.ranges.progressive": "quantlens.calibration.ranges.guided",
    "quantlens.calibration.ranges.progressive": "quantlens.calibration.ranges.guided",
    "quantlens.calibration.products": "quantlens.calibration.sampling",
    **_of("graph", "transforms", "rotation"),
    **_of("reconstruction", "transforms", "heads"),
    "quantlens.reconstruction.equalisation": "quantlens.transforms.norms",
    "quantlens.transforms.equalisation": "quantlens.transforms.norms",
    "quantlens.reconstruction.massive": "quantlens.transforms.layers",
    "quantlens.transforms.outlier_channels": "quantlens.transforms.layers",
    "quantlens.reconstruction.rounding": "quantlens.reconstruction.scales",
    "quantlens.allocation.costs": "quantlens.allocation.groups",
    "quantlens.allocation.hessian": "quantlens.allocation.sensitivity",
    "quantlens.reconstruction.centring": "quantlens.transforms.heads",
    "quantlens.transforms.mean_subtraction": "quantlens.transforms.heads",
    "quantlens.reconstruction.views": "quantlens.calibration.images",
    "quantlens.reconstruction.pixels": "quantlens.transforms.layers",
    "quantlens.transforms.pixels": "quantlens.transforms.layers",
    "quantlens.transforms.registry": "quantlens.transforms",
    "quantlens.reconstruction.sensitivity": "quantlens.reconstruction.block_metrics",
    **_of("allocation", "sensitivity", "alone", "inspection", "statistics"),
    **_of("studies", "evaluation", "environment", "images", "outputs"),
    "quantlens.evaluation.flat": "quantlens.evaluation.result",
    "quantlens.evaluation.entries": "quantlens.evaluation.compare",
    "quantlens.evaluation.bootstrap": "quantlens.evaluation.compare",
    "quantlens.models.class_names": "quantlens.models.loading",
    "quantlens.data.decode": "quantlens.data.sources",
    "quantlens.export.processor": "quantlens.export.exported",
    "quantlens.deploy.processor": "quantlens.export.exported",
    "quantlens.deploy.parity": "quantlens.export.parity",
    "quantlens.metrics.spread": "quantlens.metrics.registry",
    "quantlens.metrics.ood_scores.logits": "quantlens.metrics.ood_scores.registry",
    "quantlens.zoo.recipe": "quantlens.zoo.train",
    "quantlens.evaluation.scoring": "quantlens.metrics",
    "quantlens.studies.standing": "quantlens.studies.significance",
    "quantlens.studies.aggregate": "quantlens.studies.results",
    **_of("deploy", "qmodel", "checkpoint"),
    **_of("deploy", "export", "bench", "export", "onnx_file", "onnx_graph", "pt2"),
    "quantlens.deploy.artefact": "quantlens.export.exported",
    "quantlens.export.threshold": "quantlens.export.export",
    "quantlens.deploy.guard": "quantlens.export.export",
    "quantlens.calibration.walk": "quantlens.calibration.passes",
    "quantlens.calibration.process_memory": "quantlens.calibration.cache",
    "quantlens.attention.lens": "quantlens.attention.recording",
    "quantlens.attention.measure": "quantlens.attention.drift",
    "quantlens.attention.tokens": "quantlens.attention.drift",
    "quantlens.attention.gradients": "quantlens.attention.maps",
    "quantlens.attention.study_cell": "quantlens.attention.image_sets",
    "quantlens.attention.sets": "quantlens.attention.image_sets",
    "quantlens.attention.selection": "quantlens.attention.image_sets",
    "quantlens.attention.figures": "quantlens.attention.picture_grids",
    "quantlens.studies.work": "quantlens.studies.measuring",
    "quantlens.studies.specs": "quantlens.studies.cells",
    "quantlens.report.charts": "quantlens.report.page",
    "quantlens.report.marks": "quantlens.studies.significance",
    "quantlens.studies.pairing": "quantlens.studies.compare",
    "quantlens.studies.executors.worker": "quantlens.studies.measuring",
    "quantlens.studies.executors.driver": "quantlens.studies.runner",
    "quantlens.report.attention_gallery": "quantlens.report.attention",
    "quantlens.studies.cell_labels": "quantlens.studies.cells",
    "quantlens.studies.database": "quantlens.studies.store",
    "quantlens.studies.study_file": "quantlens.studies.config",
    "quantlens.studies.executors.cluster": "quantlens.studies.executors.ray",
    **dict.fromkeys(
        _of("reconstruction", "", "latent", "learners", "trained_tensors"), "quantlens.reconstruction.trainer"
    ),
    "quantlens.reconstruction.losses": "quantlens.reconstruction.settings",
    "quantlens.reconstruction.streams": "quantlens.reconstruction.units",
    "quantlens.allocation.solver": "quantlens.allocation.choosing",
    "quantlens.allocation.spectra": "quantlens.allocation.sensitivity",
    "quantlens.demo": "quantlens.report.demo",
    "quantlens.plots.attention": "quantlens.plots.precisions",
    "quantlens.plots.mixed": "quantlens.plots.points",
    "quantlens.sensitivity.graph_parts": "quantlens.sensitivity.alone",
    "quantlens.plots.lines": "quantlens.plots.precisions",
    "quantlens.plots.figures": "quantlens.plots",
    "quantlens.plots.files": "quantlens.plots.style",
    "quantlens.report.text": "quantlens.studies.text",
    "quantlens.report.collect": "quantlens.studies.board",
    "quantlens.zoo.augment": "quantlens.zoo.train",
}
"""Old module -> new module."""

RENAMED: dict[str, str] = {
    "quantlens.allocation.hessian.DEPARTURES": "quantlens.allocation.sensitivity.HESSIAN_DEPARTURES",
    "quantlens.attention.tokens.outliers": "quantlens.attention.drift.outlier_tokens",
    "quantlens.attention.tokens.large": "quantlens.attention.drift.large_tokens",
    "quantlens.attention.tokens.overlap": "quantlens.attention.drift.token_overlap",
    "quantlens.calibration.Walk": "quantlens.calibration.CalibrationPass",
    "quantlens.calibration.Look": "quantlens.calibration.EdgeView",
    "quantlens.calibration.Seen": "quantlens.calibration.ObservationCache",
    "quantlens.calibration.walk.Walk": "quantlens.calibration.passes.CalibrationPass",
    "quantlens.calibration.walk.Look": "quantlens.calibration.passes.EdgeView",
    "quantlens.calibration.walk.Seen": "quantlens.calibration.passes.ObservationCache",
    "quantlens.quantizers.BlockScaled": "quantlens.formats.GroupScaled",
    "quantlens.quantizers.SquaredRows": "quantlens.formats.SqrtSoftmax",
    "quantlens.quantizers.block_scaled.BlockScaled": "quantlens.formats.GroupScaled",
    "quantlens.quantizers.rows.SquaredRows": "quantlens.formats.SqrtSoftmax",
    "quantlens.quantizers.restore_operator": "quantlens.formats.restore",
    "quantlens.quantizers.operators.restore_operator": "quantlens.formats.restore",
    "quantlens.deploy.guard.guard_figures": "quantlens.export.guards.guard_metrics",
    "quantlens.export.exported.guard_threshold": "quantlens.export.guards.guard_threshold",
    "quantlens.metrics.classification_figures": "quantlens.metrics.classification.classification_metrics",
    "quantlens.metrics.ood_figures": "quantlens.metrics.ood.ood_metrics",
    "quantlens.metrics.delta": "quantlens.metrics.ood.opposite_change",
    "quantlens.calibration.Transform": "quantlens.calibration.Replacement",
    "quantlens.reconstruction.find_massive": "quantlens.calibration.measured_transforms.find_outlier_channels",
    "quantlens.reconstruction.split_massive": "quantlens.calibration.measured_transforms.split_outlier_channels",
    "quantlens.reconstruction.massive.find_massive": "quantlens.calibration.measured_transforms.find_outlier_channels",
    "quantlens.reconstruction.massive.split_massive": "quantlens.calibration.measured_transforms."
    "split_outlier_channels",
    "quantlens.reconstruction.massive.massive_channels": "quantlens.transforms.layers.outlier_channels",
    "quantlens.reconstruction.centring.centre": "quantlens.calibration.measured_transforms.subtract_means",
    "quantlens.reconstruction.centring.channel_means": "quantlens.calibration.measured_transforms.channel_means",
    "quantlens.reconstruction.pixels.read_pixels": "quantlens.calibration.measured_transforms.read_as_pixels",
    "quantlens.reconstruction.pixels.pixel_quantizer": "quantlens.formats.uniform.pixel_codes",
}
"""Old name -> new name, where that has changed, too."""

PACKAGES: dict[str, tuple[str, ...]] = {
    "quantlens.quantizers": ("quantlens.formats", "quantlens.qmodel"),
    "quantlens.ranges": ("quantlens.calibration.ranges", "quantlens.calibration"),
    "quantlens.deploy": ("quantlens.qmodel.checkpoint",),
    "quantlens.studies.bootstrap": ("quantlens.metrics.bootstrap", "quantlens.evaluation.compare"),
    "quantlens.studies.flat": ("quantlens.evaluation.result", "quantlens.studies.results"),
    "quantlens.studies.evaluate": (
        "quantlens.evaluation.result",
        "quantlens.metrics",
        "quantlens.evaluation.run",
    ),
    "quantlens.data.images": ("quantlens.data.given",),
    "quantlens.data.folders": ("quantlens.data.coco",),
    "quantlens.graph": ("quantlens.transforms",),
    "quantlens.graph.rewrites": ("quantlens.transforms.norms", "quantlens.transforms.layers"),
    "quantlens.reconstruction": ("quantlens.transforms",),
    "quantlens.allocation": ("quantlens.sensitivity",),
    "quantlens.allocation.allocation": ("quantlens.allocation.choosing",),
    "quantlens.studies": ("quantlens.evaluation.result", "quantlens.evaluation.run"),
    "quantlens.report.attention": (
        "quantlens.plots.precisions",
        "quantlens.metrics.correlation",
        "quantlens.studies.drift",
    ),
    "quantlens.evaluation.compare": ("quantlens.evaluation.differences",),
    "quantlens.export.exported": ("quantlens.export.parity",),
    "quantlens.attention.lookup": (
        "quantlens.attention.maps",
        "quantlens.attention.image_sets",
    ),
}
"""Old package, or module of which several were made -> where its names are looked for now; those that still exist ask
here for what left them."""


_DISTILLATION = "distillation of whole networks was removed in quantlens 0.3; research/2026-11-29-distillation.md"
REMOVED: dict[str, str] = {
    **dict.fromkeys(
        _of("reconstruction", "", "distillation", "distil", "Distillation", "DistillationReport"),
        f"{_DISTILLATION} tells what it gave",
    ),
    "quantlens.reconstruction.Trainer": "removed in quantlens 0.3; Trainer(groups).run(steps, loss) is "
    "train(groups, steps, loss)",
    "quantlens.reconstruction.expected_error": "removed in quantlens 0.3; mean_output of the quantized operands less "
    "that of the float ones is the same",
    "quantlens.reconstruction.optimise_scales": "removed in quantlens 0.3; reconstruct with "
    'Settings(("scales",), inputs="quantized") does the same',
}
"""Modules and names that are gone -> what to tell."""


def warn(message: str) -> None:
    """A DeprecationWarning for the first line of code outside of the package and of the import system."""
    frame = sys._getframe(1)
    while frame.f_back and (frame.f_code.co_filename.startswith(_PACKAGE) or "importlib" in frame.f_code.co_filename):
        frame = frame.f_back
    where = frame.f_code.co_filename, frame.f_lineno, frame.f_globals.get("__name__", "")
    registry = frame.f_globals.setdefault("__warningregistry__", {})
    warnings.warn_explicit(message, DeprecationWarning, *where, registry=registry)


def _tell(old: str, new: str) -> None:
    warn(f"quantlens: {old} is {new} now; quantlens {DROPPED} drops the old name")


ARGUMENTS = ("patch_bits", "head_bits", "outlier_channels", "image", "target")
"""What every method takes; these were options of methods."""

RENAMED_ARGUMENTS = {"massive_channels": "outlier_channels"}


def arguments_apart(options: Mapping[str, Any], written: Callable[[str], str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(:data:`ARGUMENTS`, the method's own) of options that may hold both; a DeprecationWarning says how the former are
    ``written`` now."""
    known = {**dict(zip(ARGUMENTS, ARGUMENTS, strict=True)), **RENAMED_ARGUMENTS}
    shared = {known[name]: value for name, value in options.items() if name in known}
    for name in shared:
        how = f"write {written(name)}. quantlens {DROPPED} drops the old place"
        warn(f"quantlens: {name} is no option of a method any more; {how}")
    return shared, {name: value for name, value in options.items() if name not in known}


def find(package: str, name: str) -> Any:
    """``name`` of an old package, from where it is now. Raises ImportError for a removed name, else AttributeError."""
    old = f"{package}.{name}"
    if old in REMOVED:
        raise ImportError(f"quantlens: {old}: {REMOVED[old]}")
    place, _, renamed = RENAMED.get(old, "").rpartition(".")
    places = (place,) if place else PACKAGES.get(package, ())
    for module in map(import_module, () if name.startswith("_") else places):
        if hasattr(module, renamed or name):
            _tell(old, f"{module.__name__}.{renamed or name}")
            return getattr(module, renamed or name)
    raise AttributeError(f"module {package!r} has no attribute {name!r}")


def finder(package: str) -> Callable[[str], Any]:
    """The ``__getattr__`` of a package: names that have moved are found where they are now, with a warning."""
    return partial(find, package)


class _Alias(ModuleType):
    """An old module: every attribute is the new module's."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if self.__name__ in PACKAGES or f"{self.__name__}.{name}" in RENAMED:
            return find(self.__name__, name)
        return getattr(import_module(MODULES[self.__name__]), name)


class _Finder:
    """Finds old modules by their names; asked last, when nothing else was found."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name in REMOVED:
            raise ModuleNotFoundError(f"quantlens: {name}: {REMOVED[name]}", name=name)
        known = name in MODULES or name in PACKAGES
        return ModuleSpec(name, self, is_package=name in PACKAGES) if known else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        if spec.name in MODULES:
            _tell(spec.name, MODULES[spec.name])
        return _Alias(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is to be run."""


def install() -> None:
    """Let old imports be found."""
    sys.meta_path.append(_Finder())  # type: ignore[arg-type]
