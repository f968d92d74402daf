"""The table of source kinds: one line each."""

from __future__ import annotations

from quantlens.data.cifar import open_cifar
from quantlens.data.folders import open_coco, open_imagefolder, open_imagenet, open_images
from quantlens.data.sources import ArraySource, SourceKind, SourceSpec


def open_embedded(spec: SourceSpec) -> ArraySource:
    """`embedded:NAME`: a set that ships with the package (`quantlens.data.embedded`)."""
    from quantlens.data.embedded import load_embedded

    images = load_embedded(spec.path)
    return ArraySource(
        spec.text,
        spec.kind,
        images.info.name,
        images.pixels,
        images.names,
        images.labels,
        images.class_names,
        group=images.info.group,
    )


KINDS: dict[str, SourceKind] = {
    kind.name: kind
    for kind in (
        SourceKind("imagenet", "dir", "wnid folders or nXXXXXXXX_* files, labels of ImageNet-1k", open_imagenet),
        SourceKind("imagefolder", "dir", "one folder per class, label = rank of the folder's name", open_imagefolder),
        SourceKind("images", "dir", "every image below a folder, no labels", open_images),
        SourceKind("cifar10", "dir", "CIFAR-10 test images (?split=train)", open_cifar, ("split",)),
        SourceKind("cifar100", "dir", "CIFAR-100 test images, fine labels (?split=train)", open_cifar, ("split",)),
        SourceKind(
            "coco",
            "dir",
            "images of a COCO instances file, no labels (?split=val2017)",
            open_coco,
            ("split",),
        ),
        SourceKind("embedded", "name", "a set that ships with the package, no download", open_embedded),
    )
}
