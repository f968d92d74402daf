"""An image tower as a classifier of texts: logits = scale · cosine(image, text) + bias, a class for every text."""

import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quantlens.errors import QuantlensError
from quantlens.qmodel import Outputs

SCALE = 100.0
"""The logit scale where none is given: CLIP's, which is trained up to this bound."""
FIELDS = ("embeddings", "logit_scale", "logit_bias", "class_names")
ENDINGS = (".npy", ".npz", ".safetensors")


@dataclass(frozen=True, eq=False)
class TextEmbeddings:
    """embeddings: float32 [K, D], rows of length 1. logit_scale: what cosines are multiplied with (the exponential of
    the parameter that CLIP and SigLIP keep). logit_bias: SigLIP's. class_names: K names or None."""

    embeddings: Tensor
    logit_scale: float = SCALE
    logit_bias: float = 0.0
    class_names: list[str] | None = None

    @classmethod
    def of(cls, given: Any) -> "TextEmbeddings | None":
        """A tensor or array [K, D]; a mapping with "embeddings" and, if wanted, the other fields; or a file: .npy of an
        array, .npz or .safetensors with such entries (of a single one the name does not matter). None of None. Raises
        QuantlensError for anything else."""
        if given is None or isinstance(given, TextEmbeddings):
            return given
        found = _read(Path(given)) if isinstance(given, str | Path) else given
        where = f"the text embeddings {given}" if isinstance(given, str | Path) else "the text embeddings"
        if not isinstance(found, Mapping):
            found = {"embeddings": found}
        if "embeddings" not in found and len(found) == 1:
            found = {"embeddings": next(iter(found.values()))}
        unknown = [str(name) for name in found if name not in FIELDS]
        if "embeddings" not in found or unknown:
            raise QuantlensError(
                f"{where} must hold 'embeddings' [K, D] and may hold logit_scale, logit_bias and class_names; there is "
                f"{', '.join(map(str, found)) or 'nothing'}"
            )
        try:
            rows = np.asarray(_array(found["embeddings"]), dtype=np.float32)
            scale, bias = (
                float(np.asarray(_array(found.get(name, default)), dtype=np.float64).reshape(()))
                for name, default in (("logit_scale", SCALE), ("logit_bias", 0.0))
            )
        except (TypeError, ValueError) as error:
            raise QuantlensError(f"{where} cannot be read as numbers: {error}") from error
        lengths = np.linalg.norm(rows, axis=1) if rows.ndim == 2 else np.zeros(1)
        if rows.ndim != 2 or 0 in rows.shape or not np.isfinite(rows).all() or not lengths.all():
            raise QuantlensError(f"{where} have shape {rows.shape}; give finite rows [K, D], one per class, none all 0")
        if not scale > 0 or not np.isfinite([scale, bias]).all():
            raise QuantlensError(f"{where}: logit_scale is {scale:g} and logit_bias {bias:g}; the scale is above 0")
        names = found.get("class_names")
        names = None if names is None else [str(name) for name in np.asarray(names).tolist()]
        if names is not None and len(names) != len(rows):
            raise QuantlensError(f"{where} have {len(rows)} rows and {len(names)} class names; give one per row")
        return cls(torch.from_numpy(rows / lengths[:, None]), scale, bias, names)

    def describe(self) -> dict[str, Any]:
        """{"n", "logit_scale", "logit_bias", "fingerprint"} of a result."""
        digest = hashlib.sha256(self.embeddings.numpy().tobytes()).hexdigest()
        return {
            "n": len(self.embeddings),
            "logit_scale": self.logit_scale,
            "logit_bias": self.logit_bias,
            "fingerprint": digest[:16],
        }


def _array(value: Any) -> Any:
    return value.detach().cpu().float().numpy() if isinstance(value, Tensor) else value


def _read(path: Path) -> Any:
    """What a file holds: an array, or a dictionary. Nothing is unpickled."""
    if path.suffix not in ENDINGS:
        raise QuantlensError(f"the text embeddings {path} end in {path.suffix!r}; give one of {', '.join(ENDINGS)}")
    try:
        if path.suffix != ".safetensors":
            loaded = np.load(path, allow_pickle=False)
            return loaded if path.suffix == ".npy" else {name: loaded[name] for name in loaded.files}
        with safe_open(str(path), framework="pt") as file:
            found: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            names = (file.metadata() or {}).get("class_names")
        return found if names is None else {**found, "class_names": json.loads(names)}
    except FileNotFoundError:
        raise QuantlensError(f"the text embeddings {path} do not exist; check the path") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, SafetensorError) as error:
        raise QuantlensError(f"the text embeddings {path} cannot be read: {error}") from error


class ZeroShot:
    """A model that gives image embeddings [B, D], measured as a classifier of K texts. Its features are the normalised
    embeddings, which its logits are linear in; all else is the model's."""

    def __init__(self, model: Any, texts: TextEmbeddings):
        width = int(model.num_classes)
        if width != texts.embeddings.shape[1]:
            raise QuantlensError(
                f"the text embeddings have {texts.embeddings.shape[1]} columns and {model.name} gives images "
                f"{width}; give embeddings of the model's own text tower, after its projection"
            )
        self._model, self._texts = model, texts
        self.num_classes = len(texts.embeddings)
        self.class_names = texts.class_names

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._model, name)

    def outputs(self, images: Tensor) -> Outputs:
        """Logits [B, K] and normalised image embeddings [B, D]."""
        unit = torch.nn.functional.normalize(self._model.outputs(images).logits.float(), dim=-1)
        weight, bias = self.classifier()
        return Outputs(unit @ weight.to(unit.device).T + bias.to(unit.device), unit)

    def classifier(self) -> tuple[Tensor, Tensor]:
        """Weight [K, D] and bias [K] on the normalised embeddings."""
        weight = self._texts.logit_scale * self._texts.embeddings
        return weight, torch.full((len(weight),), self._texts.logit_bias)
