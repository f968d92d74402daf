"""The table of source kinds: one line each."""

from quantlens.data.cifar import open_cifar
from quantlens.data.embedded import open_embedded
from quantlens.data.folders import open_coco, open_imagefolder, open_imagenet, open_images
from quantlens.data.sources import SourceKind

KINDS = {
    "imagenet": SourceKind("dir", "wnid folders or nXXXXXXXX_* files, labels of ImageNet-1k", open_imagenet),
    "imagefolder": SourceKind("dir", "one folder per class, label = rank of the folder's name", open_imagefolder),
    "images": SourceKind("dir", "every image below a folder, no labels", open_images),
    "cifar10": SourceKind("dir", "CIFAR-10 test images (?split=train)", open_cifar, ("split",)),
    "cifar100": SourceKind("dir", "CIFAR-100 test images, fine labels (?split=train)", open_cifar, ("split",)),
    "coco": SourceKind("dir", "images of a COCO instances file, no labels (?split=val2017)", open_coco, ("split",)),
    "embedded": SourceKind("name", "a set that ships with the package, no download", open_embedded),
}
