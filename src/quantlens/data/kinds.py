"""The table of source kinds: one line each."""

from quantlens.data.cifar import open_cifar
from quantlens.data.coco import open_coco
from quantlens.data.embedded import open_embedded
from quantlens.data.folders import open_imagefolder, open_imagenet, open_images
from quantlens.data.hub import open_hub
from quantlens.data.made import open_made
from quantlens.data.sources import SourceKind
from quantlens.data.tables import open_parquet
from quantlens.data.tars import open_webdataset

KINDS = {
    "imagenet": SourceKind(
        "dir",
        "wnid folders, nXXXXXXXX_* files, or one folder with a label file (?labels=FILE)",
        open_imagenet,
        ("labels",),
    ),
    "imagefolder": SourceKind("dir", "one folder per class, label = rank of the folder's name", open_imagefolder),
    "images": SourceKind("dir", "every image below a folder, no labels", open_images),
    "parquet": SourceKind(
        "file|dir",
        "tables as Hugging Face has them, in shards (?split=test&image=COLUMN&label=COLUMN)",
        open_parquet,
        ("split", "image", "label"),
    ),
    "hf": SourceKind(
        "dir|user/set",
        "a data set of Hugging Face (?split=test&config=NAME&image=COLUMN&label=COLUMN)",
        open_hub,
        ("split", "config", "image", "label"),
    ),
    "webdataset": SourceKind(
        "tar|dir", "tar files with .cls or .json labels: shard-{000..099}.tar", open_webdataset, ("image", "label")
    ),
    "cifar10": SourceKind("dir", "CIFAR-10 test images (?split=train)", open_cifar, ("split",)),
    "cifar100": SourceKind("dir", "CIFAR-100 test images, fine labels (?split=train)", open_cifar, ("split",)),
    "coco": SourceKind("dir", "images and boxes of a COCO instances file (?split=val2017)", open_coco, ("split",)),
    "embedded": SourceKind("name", "a set that ships with the package, no download", open_embedded),
    "made": SourceKind("name", "images made by code, for calibration without any: dead-leaves or noise", open_made),
}
