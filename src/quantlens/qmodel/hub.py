"""Quantized checkpoints by name: a file, a folder that holds one, or a repository of the Hugging Face hub."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quantlens.arguments import checked
from quantlens.errors import BadWeightsError, QuantlensError, UnsupportedError, first_line

LIBRARY = "quantlens"
CONFIG = "config.json"
"""Says in a folder or repository which file is the checkpoint: {"library_name": "quantlens", "checkpoint": FILE}."""

REPOSITORY = re.compile(r"(?P<repo>\w[\w.-]*/[\w.-]+)(/(?P<file>[^@]+\.safetensors))?(@(?P<revision>.+))?")


@checked
def find_checkpoint(name: str | Path) -> Path | None:
    """The file of the quantized checkpoint that a name means, or None where it means something else.

    name: ``FILE.safetensors``, a folder that holds one, ``hf:DIR``, or ``hf:user/repo``, ``hf:user/repo/FILE`` and
    ``hf:user/repo@revision``, of which the file is downloaded once. An existing file or folder wins. Raises
    BadWeightsError for a repository that cannot be read, and where several checkpoints could be meant.
    """
    text = str(name)
    path = Path(text.removeprefix("hf:"))
    if path.is_dir():
        return _within(path)
    if path.is_file() or not text.startswith("hf:"):
        return path if path.suffix == ".safetensors" else None
    return _download(text.removeprefix("hf:"))


def _within(folder: Path) -> Path | None:
    """The one quantized checkpoint in a folder: the file that its config.json names, or that is one."""
    named = _named(folder / CONFIG)
    if named is not None:
        return folder / named
    found = [file for file in sorted(folder.glob("*.safetensors")) if _is_quantized(file)]
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:5])
        raise BadWeightsError(f"{folder} holds {len(found)} quantized checkpoints ({names}); give the file")
    return found[0] if found else None


def _is_quantized(file: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as stream:
            return (stream.metadata() or {}).get("format") == LIBRARY
    except (OSError, SafetensorError):
        return False


def _named(config: Path) -> str | None:
    """The checkpoint that a config.json names; None where there is none, or it is of something else."""
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or content.get("library_name") != LIBRARY:
        return None
    name = content.get("checkpoint")
    if not isinstance(name, str) or Path(name).name != name:
        raise BadWeightsError(f"{config} does not name a checkpoint file; push the model again")
    return name


def _download(text: str) -> Path | None:
    match = REPOSITORY.fullmatch(text)
    if match is None:
        return None
    repo, file, revision = match["repo"], match["file"], match["revision"]
    with told(f"{text} cannot be read from the Hugging Face hub"):
        from huggingface_hub import snapshot_download

        def fetch(name: str) -> Path:
            return Path(snapshot_download(repo, revision=revision, allow_patterns=[name])) / name

        name = file or _named(fetch(CONFIG))
        return None if name is None else fetch(name)


@contextmanager
def told(what: str, kind: type[QuantlensError] = BadWeightsError) -> Iterator[None]:
    """What the hub refuses, or no network, as an error of a kind with one sentence that begins with `what`."""
    try:
        from huggingface_hub import errors
    except ImportError as error:
        raise UnsupportedError(f"{what}: huggingface_hub is not installed (`pip install huggingface_hub`)") from error
    # its client, and so what is raised without a network, differs between releases
    clients = [c for c in errors.HfHubHTTPError.__mro__ if c.__name__ in ("HTTPError", "RequestException")]
    no_network = (errors.OfflineModeIsEnabled, ConnectionError, TimeoutError, *clients)
    sentences: dict[Any, str] = {  # the narrower kinds first
        errors.GatedRepoError: "ask for access on its page, and log in (`hf auth login`)",
        errors.RepositoryNotFoundError: "there is no such repository, or it is private and needs a token",
        errors.RevisionNotFoundError: "it has no such revision",
        errors.LocalEntryNotFoundError: "there is no network, and no copy on this machine",
        errors.EntryNotFoundError: "it has no such file",
        errors.LocalTokenNotFoundError: "no token is known; log in (`hf auth login`) or give token=…",
        errors.HFValidationError: "{line}",
        errors.HfHubHTTPError: "{line}",
        **dict.fromkeys(no_network, "there is no network ({line})"),
    }
    try:
        yield
    except tuple(sentences) as error:
        why = next(text for one, text in sentences.items() if isinstance(error, one))
        if why == "{line}" and getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            why = "the token is missing or does not allow it (`hf auth login`)"
        raise kind(f"{what}: {why.replace('{line}', first_line(error))}") from error
