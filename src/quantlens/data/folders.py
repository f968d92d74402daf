"""Sources that are folders of image files: imagenet, imagefolder, images."""

import os
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NoReturn

import numpy as np

from quantlens import _moved
from quantlens.data.label_files import find_label_file, read_label_file
from quantlens.data.sources import IMAGE_SUFFIXES, FileSource, SourceSpec
from quantlens.errors import QuantlensError, StorageError
from quantlens.files import package_file

WNID = re.compile(r"n\d{8}")
_SUFFIXES_TEXT = " ".join(IMAGE_SUFFIXES)


def existing_directory(spec: SourceSpec) -> Path:
    """The folder a spec names, `~` expanded. Raises QuantlensError where it is missing or is a file."""
    root = Path(spec.path).expanduser()
    if root.is_dir():
        return root
    if root.exists():
        raise QuantlensError(f"source {spec.text!r}: {root} is a file; give the folder that holds the images")
    raise QuantlensError(f"source {spec.text!r}: there is no folder {root}; check the path (seen from {Path.cwd()})")


def list_images(root: Path) -> list[str]:
    """Relative paths (forward slashes) of all image files below `root`, sorted; hidden files and folders are
    left out.

    Links to folders are followed, each real folder once.
    """
    found: list[str] = []
    seen: set[tuple[int, int]] = set()

    def refuse(error: OSError) -> NoReturn:
        raise StorageError(f"cannot list {error.filename or root}: {(error.strerror or str(error)).lower()}") from error

    for folder, folders, files in os.walk(root, followlinks=True, onerror=refuse):
        stat = os.stat(folder)
        if (stat.st_dev, stat.st_ino) in seen:
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        folders[:] = sorted(filter(_is_shown, folders))
        prefix = Path(folder).relative_to(root).as_posix()
        found += [f"{prefix}/{file}" for file in files if _is_shown(file) and file.lower().endswith(IMAGE_SUFFIXES)]
    return sorted(name.removeprefix("./") for name in found)


def _is_shown(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"


def open_images(spec: SourceSpec) -> FileSource:
    """`images:DIR`: every image below DIR, no labels. Raises QuantlensError where there are none."""
    root = existing_directory(spec)
    names = list_images(root)
    if not names:
        raise QuantlensError(f"source {spec.text!r}: no image below {root}; files must end in {_SUFFIXES_TEXT}")
    return FileSource(spec.text, spec.kind, root.resolve().name, names, root=root)


def open_imagefolder(spec: SourceSpec) -> FileSource:
    """`imagefolder:DIR`: one folder per class; the label is the rank of the folder's name, as in
    torchvision.
    """
    source = open_images(spec)
    loose = [name for name in source.names if "/" not in name]
    if loose:
        raise QuantlensError(
            f"source {spec.text!r}: {loose[0]} lies outside the class folders (with {len(loose) - 1} others); "
            f"move it into one, or use images:{spec.path} for images without labels"
        )
    classes = sorted(folder.name for folder in source.root.iterdir() if folder.is_dir() and _is_shown(folder.name))
    labels = np.searchsorted(classes, [name.split("/", 1)[0] for name in source.names])
    return replace(source, labels=labels, class_names=classes)


@cache
def imagenet_wnids() -> tuple[str, ...]:
    """The 1000 WordNet ids of ImageNet-1k in class order, from the list that timm ships (timm itself is not
    imported).
    """
    return tuple(sorted(_timm_lines("imagenet_synsets.txt")))


@cache
def imagenet_class_names() -> tuple[str, ...]:
    """The names (WordNet lemmas) of the 1000 classes in class order, from timm."""
    lemma = dict(line.split("\t", 1) for line in _timm_lines("imagenet_synset_to_lemma.txt"))
    return tuple(lemma[wnid] for wnid in imagenet_wnids())


def _timm_lines(file: str) -> list[str]:
    return package_file("timm", f"data/_info/{file}").read_text(encoding="utf-8").splitlines()


def open_imagenet(spec: SourceSpec) -> FileSource:
    """`imagenet:DIR`: wnid folders, or files `nXXXXXXXX_*` or `*_nXXXXXXXX.*`; the label is the rank of the
    wnid among the 1000, so a subset of the classes keeps its true labels. A folder without wnids has its labels in a
    file (:func:`~quantlens.data.label_files.read_label_file`): `?labels=FILE`, or one of the usual names beside it.
    """
    source = open_images(spec)
    names = list(imagenet_class_names())
    wnids = {wnid: k for k, wnid in enumerate(imagenet_wnids())}
    given = spec.options.get("labels")
    file = None if given is None else Path(given).expanduser()
    if file is None and not any(map(_named_wnid, source.names)):
        file = find_label_file(source.root)
    if file is not None:
        labels = read_label_file(spec.text, file, source.names, wnids)
        return replace(source, labels=labels, class_names=names, listed=True)
    labels = np.array([wnids[_wnid(spec, name, wnids)] for name in source.names], dtype=np.int64)
    return replace(source, labels=labels, class_names=names)


def _named_wnid(name: str) -> str | None:
    """The wnid in a file's own name or in the folder next to it that has one."""
    *folders, file = name.split("/")
    found = re.match(r"(n\d{8})_", file) or re.search(r"_(n\d{8})\.", file)
    return found[1] if found else next((f for f in reversed(folders) if WNID.fullmatch(f)), None)


def _wnid(spec: SourceSpec, name: str, rank: dict[str, int]) -> str:
    """The wnid of one file, from the folder it lies in and from its own name; the two must agree."""
    *folders, file = name.split("/")
    where = f"source {spec.text!r}: {name}"
    in_file = re.match(r"(n\d{8})_", file) or re.search(r"_(n\d{8})\.", file)
    in_folder = next((f for f in reversed(folders) if WNID.fullmatch(f)), None)
    if in_folder is None and in_file is None:
        raise QuantlensError(
            f"{where} has no wnid in its name (n01440764_1.JPEG) or its folder's (n01440764); rename the folder, name "
            f"a file of labels (?labels=val.txt), or use imagefolder:{spec.path}, or images:{spec.path} for images "
            "without labels"
        )
    if in_folder and in_file and in_folder != in_file[1]:
        raise QuantlensError(f"{where} is named after {in_file[1]} and lies in {in_folder}; move it to its own folder")
    wnid = in_folder or (in_file[1] if in_file else "")
    if wnid not in rank:
        raise QuantlensError(
            f"{where} belongs to {wnid}, which is not one of the 1000 classes of ImageNet-1k; take it out, "
            f"or use images:{spec.path} (as out-of-distribution images, for example)"
        )
    return wnid


__getattr__ = _moved.finder(__name__)
