"""A quantized model as a file: packed checkpoints."""

from quantlens.deploy.checkpoint import is_quantized_checkpoint, load, read_header, save

__all__ = ["is_quantized_checkpoint", "load", "read_header", "save"]
