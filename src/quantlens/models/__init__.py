"""Where a model comes from: timm, the hub, a checkpoint file, a user's own module."""

from quantlens.models.loading import Model, class_names, load_model, model_for_tensors
from quantlens.models.modules import unwrapped
from quantlens.models.weights import file_sha256, read_state, state_sha256

__all__ = [
    "Model",
    "class_names",
    "file_sha256",
    "load_model",
    "model_for_tensors",
    "read_state",
    "state_sha256",
    "unwrapped",
]
