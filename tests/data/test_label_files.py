"""ImageNet as one flat folder with its label file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from quantlens.data import open_source
from quantlens.data.folders import imagenet_wnids
from quantlens.errors import QuantlensError

CLASSES = [7, 0, 999]


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """Validation images 1, 2 and 3, of CLASSES."""
    root = tmp_path / "val"
    root.mkdir()
    for k in range(3):
        Image.fromarray(np.full((8, 8, 3), k, np.uint8)).save(root / f"ILSVRC2012_val_{k + 1:08d}.JPEG")
    return root


def name(k: int) -> str:
    return f"ILSVRC2012_val_{k + 1:08d}"


def wnid(k: int) -> str:
    return imagenet_wnids()[CLASSES[k]]


FILES = {
    "val.txt": "\n".join(f"{name(k)}.JPEG {CLASSES[k]}" for k in range(3)),
    "val_labels.txt": "\n".join(f"val/{name(k)}.JPEG\t{wnid(k)}" for k in (2, 1, 0)),
    "LOC_val_solution.csv": "ImageId,PredictionString\n" + "\n".join(f"{name(k)},{wnid(k)} 3 4 5 6 " for k in range(3)),
    "labels.csv": "filename,label\n" + "\n".join(f"{name(k)}.JPEG,{CLASSES[k]}" for k in range(3)),
    "imagenet_2012_validation_synset_labels.txt": "\n".join(map(wnid, range(3))) + "\n",
    "labels.txt": "\n".join(map(str, CLASSES)),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("place", ["inside", "beside", "given"])
def test_the_usual_kinds(place: str, file: str, flat: Path, tmp_path: Path) -> None:
    where = {"inside": flat, "beside": tmp_path, "given": tmp_path / "far"}[place]
    where.mkdir(exist_ok=True)
    (where / file).write_text(FILES[file])
    source = open_source(f"imagenet:{flat}" + (f"?labels={where / file}" if place == "given" else ""))
    assert source.labels.tolist() == CLASSES
    assert open_source(f"imagenet:{flat}[1:]" + (f"?labels={where / file}" if place == "given" else "")).labels[0] == 0
    assert source.class_names is not None
    assert source.class_names[0].startswith("tench")


def test_the_devkits_numbers_need_its_mapping(flat: Path, tmp_path: Path) -> None:
    truth = tmp_path / "ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("3\n1\n2\n")
    with pytest.raises(QuantlensError, match=r"devkit, whose order .* meta\.mat or map_clsloc\.txt"):
        open_source(f"imagenet:{flat}")
    (tmp_path / "map_clsloc.txt").write_text(f"{wnid(1)} 1 a\n{wnid(2)} 2 b\n{wnid(0)} 3 c\n")
    assert open_source(f"imagenet:{flat}").labels.tolist() == CLASSES
    (tmp_path / "map_clsloc.txt").unlink()
    from scipy.io import savemat

    synsets = np.array(
        [(k, wnid(place)) for k, place in ((1, 1), (2, 2), (3, 0))], dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O")]
    )
    savemat(tmp_path / "meta.mat", {"synsets": synsets})
    assert open_source(f"imagenet:{flat}?labels={truth}").labels.tolist() == CLASSES


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"{name(0)}.JPEG 7", "no label for 2 of the 3 images, the first is ILSVRC2012_val_00000002"),
        ("\n".join(f"{name(k)}.JPEG 1000" for k in range(3)), "has the class '1000'"),
        ("\n".join(f"{name(k)}.JPEG n00000001" for k in range(3)), "has the class 'n00000001'"),
        ("0\n1\n", "has 2 labels and image .* is number 3"),
        ("", "is empty"),
        ("\n".join(f"{name(k)}.JPEG dog" for k in range(3)), "has the class 'dog'"),
    ],
)
def test_a_label_file_of_other_images_is_refused(text: str, words: str, flat: Path) -> None:
    (flat / "val.txt").write_text(text)
    with pytest.raises(QuantlensError, match=words):
        open_source(f"imagenet:{flat}")


def test_other_labels_are_another_source(flat: Path, tmp_path: Path) -> None:
    (flat / "val.txt").write_text(FILES["val.txt"])
    first = open_source(f"imagenet:{flat}").fingerprint()
    (flat / "val.txt").write_text(FILES["val.txt"].replace(" 7", " 8"))
    assert open_source(f"imagenet:{flat}").fingerprint() != first
    (flat / "val.txt").unlink()
    with pytest.raises(QuantlensError, match=r"no wnid .*\?labels=val.txt"):
        open_source(f"imagenet:{flat}")
    with pytest.raises(QuantlensError, match="no such file"):
        open_source(f"imagenet:{flat}?labels={tmp_path / 'absent.txt'}")
