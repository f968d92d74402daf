"""Quantized models on the Hugging Face hub: a repository with the checkpoint, its card and a config.json."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from quantlens._version import __version__
from quantlens.arguments import checked
from quantlens.errors import StorageError
from quantlens.files import write_whole
from quantlens.qmodel import QuantizedModel
from quantlens.qmodel.checkpoint import load
from quantlens.qmodel.hub import CONFIG, LIBRARY, find_checkpoint, told
from quantlens.report.card import card, default_stem


@checked
def push_to_hub(
    model: QuantizedModel | str | Path,
    repo: str,
    result: Any = None,
    *,
    private: bool | None = None,
    token: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
) -> str:
    """Push a quantized model to a repository of the Hugging Face hub, which is made where there is none: checkpoint,
    card, result and config.json. Returns the name with which :func:`quantlens.load` reads it: ``hf:user/repo@commit``.

    model, result, base_model, license: as for :func:`quantlens.card`. private: a new repository is (None: as the
    account has it). token: None is the one of ``hf auth login``. Raises StorageError without a network, a token, or
    leave to write.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_folder(model, Path(folder), result, repo=repo, base_model=base_model, license=license)
        with told(f"{repo} cannot be written on the Hugging Face hub", StorageError):
            from huggingface_hub import HfApi

            api = HfApi(token=token)
            made = api.create_repo(repo, private=private, exist_ok=True).repo_id
            done = api.upload_folder(repo_id=made, folder_path=folder, commit_message="Quantized by quantlens")
    return f"hf:{made}@{done.oid}"


def write_folder(
    model: QuantizedModel | str | Path, folder: Path, result: Any = None, *, repo: str | None = None, **about: Any
) -> None:
    """Write what a repository holds to an empty folder, which :func:`quantlens.load` reads, too."""
    if isinstance(model, QuantizedModel):
        file = folder / f"{default_stem(model)}.safetensors"
        model.save(file)
    else:
        there = find_checkpoint(model) or Path(model)
        load(there)  # what is no checkpoint, or damaged, is rejected
        file = folder / there.name
        shutil.copyfile(there, file)
        beside = there.with_suffix(".result.json")
        if beside.is_file():
            shutil.copyfile(beside, folder / beside.name)  # what the card takes where no other result is given
    card(file, result, repo=repo, **about)
    config = _of_transformers(model) | {
        "library_name": LIBRARY,
        "library_version": __version__,
        "checkpoint": file.name,
    }
    if "model_type" in config:
        config["quantization_config"] = {"quant_method": LIBRARY, "checkpoint": file.name}
    write_whole(folder / CONFIG, json.dumps(config, indent=1) + "\n", what="the configuration")


def _of_transformers(model: Any) -> dict[str, Any]:
    """The configuration with which transformers made the float model, where it did and that is at hand."""
    module = getattr(getattr(model, "reference", None), "module", None)
    config = getattr(module, "config", None)
    if config is None or not hasattr(config, "model_type"):
        return {}
    return json.loads(config.to_json_string(use_diff=True)) | {"architectures": [type(module).__name__]}
