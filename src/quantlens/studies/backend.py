"""What a study does with models and methods, in one object, so that a test can put a small one in its place."""

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantlens.errors import BadWeightsError, UnknownNameError

COLLECT_SECONDS = 10.0
"""Least time between two collections of cyclic garbage: they take a quarter of a second each."""

_collected = 0.0

Steps = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""


@dataclass(frozen=True)
class MethodChoice:
    """A method of the registry with all its options, defaults filled in. key: the options as keys of cells spell them
    (None: the same)."""

    name: str
    version: int
    options: dict[str, Any]
    key: dict[str, Any] | None = None

    def spelled(self) -> dict[str, Any]:
        return self.options if self.key is None else self.key


class Backend:
    """The backend of every real study. Imports are made when they are needed."""

    def method(self, name: str, options: Mapping[str, Any]) -> MethodChoice:
        """Look a method up by name or alias; unknown names and options raise."""
        from quantlens.methods import registry
        from quantlens.methods._former_options import former_options

        method = registry.get(name)
        chosen, found = method.info.name, dict(method.options(options))
        return MethodChoice(chosen, int(method.info.version), found, former_options(chosen, found))

    def foreign(self, file: str) -> MethodChoice:
        """What stands where methods do for a file of another tool: its content is in the key of its cell."""
        from quantlens.evaluation.foreign_files import KINDS, files_of, sha256

        path = Path(file)
        if not path.is_file():
            raise BadWeightsError(f"the foreign file {file} does not exist; check the path")
        options = {"file": path.name, "sha256": sha256(files_of(path) if path.suffix in KINDS else [path])}
        kind = KINDS.get(path.suffix, "logits")
        return MethodChoice(f"foreign:{kind}", 1, options, {"sha256": options["sha256"]})

    def open_foreign(self, file: str, reference: Any, bits: str) -> Any:
        """The model of such a file, as `evaluate` measures it."""
        from quantlens.evaluation.foreign import open_foreign

        return open_foreign(file, reference=reference, bits=None if bits == "unknown" else bits)

    def check_model(self, name: str, weights: str | None) -> None:
        """Raise at once for a name or a weights file that cannot be right, before any model is loaded."""
        from quantlens import zoo

        if weights not in (None, "pretrained", "random") and not Path(str(weights)).is_file():
            raise BadWeightsError(f"the weights {weights} of {name} do not exist; check the path")
        if name in zoo.available() or name.startswith(("hf:", "hf-hub:", "hf_hub:", "local-dir:")):
            return
        import timm

        if not timm.is_model(name.split("/")[-1].partition(".")[0]):
            known = [*timm.list_models(), *zoo.available()]
            raise UnknownNameError("model", name, known, "`quantlens models --filter 'vit*'` lists the names")

    def load_model(self, name: str, weights: str | None, device: str, options: Mapping[str, Any]) -> Any:
        """The FP32 model."""
        from quantlens.models import load_model

        return load_model(name, weights, device=device, **options)

    def quantize(
        self, model: Any, calibration: Any, choice: MethodChoice, bits: str, seed: int, progress: Steps | None
    ) -> Any:
        """The quantized model."""
        from quantlens.api import quantize

        return quantize(
            model, calibration, method=choice.name, bits=bits, seed=seed, progress=progress, **choice.options
        )

    def evaluate(self, model: Any, id: Any, ood: Mapping[str, Any], **settings: Any) -> Any:
        """The Result of a model; with mixed precision it says which widths were chosen, under "allocation"."""
        from quantlens.evaluation.run import evaluate

        result = evaluate(model, id, ood, **settings)
        allocation = getattr(getattr(model, "plan", None), "info", {}).get("allocation")
        if allocation is not None:
            result.extra["allocation"] = allocation
        return result

    def attention(
        self, model: Any, reference: Any, id: Any, ood: Mapping[str, Any], spec: Any, progress: Any
    ) -> dict[str, Any]:
        """What a cell keeps of the model's attention against that of the FP32 model, under "attention" and
        "attention_examples"; where the lens does not apply, the reason in words."""
        from quantlens.attention.image_sets import survey
        from quantlens.errors import UnsupportedError

        if hasattr(model, "foreign"):
            return {"attention": {"unavailable": f"{model.method}: nobody can look into it"}}
        try:
            return survey(reference, model, id, ood, images=spec.images, show=spec.show, progress=progress)
        except UnsupportedError as error:
            return {"attention": {"unavailable": str(error)}}

    def inspect(
        self, model: Any, images: Any, choice: MethodChoice, bits: str, seed: int, progress: Any
    ) -> dict[str, Any]:
        """The sensitivity of every layer: `Inspection.to_dict`, by site and by block, in six digits (the last ones of a
        sum differ with the threads that added it up)."""
        from quantlens.api import inspect

        found = inspect(model, images, bits, method=choice.name, seed=seed, progress=progress, **choice.options)
        return dict(_six_digits(found.to_dict()))

    def free(self, *, at_once: bool = False) -> None:
        """Give back the memory of a cell that is over: graphs are cycles, which counting references does not free. A
        collection walks all of torch, so after short cells on a CPU there is none unless `at_once`."""
        global _collected
        import torch

        if torch.cuda.is_available() or at_once or time.monotonic() - _collected > COLLECT_SECONDS:
            gc.collect()
            _collected = time.monotonic()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _six_digits(tree: Any) -> Any:
    """Plain data with its floats rounded to six significant digits."""
    if isinstance(tree, dict):
        return {key: _six_digits(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_six_digits(value) for value in tree]
    return float(f"{tree:.6g}") if isinstance(tree, float) else tree
