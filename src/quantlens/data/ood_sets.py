"""The OOD sets that people measure ImageNet classifiers on: what they are, and which are near and which are far.

Nothing is downloaded: a set of one of these names is in the group that OpenOOD v1.5 puts it in, unless its group is
given. docs/ood.md says where each comes from.
"""

from dataclasses import dataclass

MOS = "https://github.com/deeplearning-wisc/large_scale_ood"
OPENOOD = "https://github.com/Jingkang50/OpenOOD"


@dataclass(frozen=True)
class OodSet:
    """One of them. title: as papers write it; group: "near" or "far"; images: how many; description: what they show;
    address: where they come from; names: other names, of folders and of papers."""

    title: str
    group: str
    images: int
    description: str
    address: str
    names: tuple[str, ...] = ()


OOD_SETS = {
    "ssb_hard": OodSet(
        "SSB-hard", "near", 49_000, "980 classes of ImageNet-21k that are like ImageNet's", OPENOOD, ("ssb",)
    ),
    "ninco": OodSet(
        "NINCO", "near", 5_879, "64 classes, looked through one by one", "https://github.com/j-cb/NINCO", ()
    ),
    "inaturalist": OodSet("iNaturalist", "far", 10_000, "110 species of plants", MOS, ("inat",)),
    "textures": OodSet(
        "Textures",
        "far",
        5_160,
        "textures (DTD), without 4 of its 47 classes",
        "https://www.robots.ox.ac.uk/~vgg/data/dtd",
        ("texture", "dtd"),
    ),
    "openimage_o": OodSet(
        "OpenImage-O", "far", 15_869, "of OpenImages-v3, chosen by hand", "https://github.com/haoqiwang/vim"
    ),
    "sun": OodSet("SUN", "far", 10_000, "50 kinds of scenes, of nature", MOS, ("sun50",)),
    "places": OodSet("Places", "far", 10_000, "50 kinds of scenes, of Places365", MOS, ("places50", "places365")),
}
"""Folder name in OpenOOD's data (`images_largescale`; of textures `images_classic/texture`) -> the set."""


def group_of(name: str) -> str | None:
    """The group of the set of that name, "near" or "far"; case, and what stands between letters and digits, do not
    matter. None for a name that is not known."""
    return _GROUPS.get(_letters(name))


def _letters(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


_GROUPS = {
    _letters(spelling): found.group
    for name, found in OOD_SETS.items()
    for spelling in (name, found.title, *found.names)
}
