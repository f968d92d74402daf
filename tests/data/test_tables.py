"""Sources parquet and hf: tables of pictures."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from quantlens.calibration import Calibration
from quantlens.data import Preprocess, as_image_set, load_images, open_source
from quantlens.data.labels import as_labels
from quantlens.data.tables import HELD_BYTES, class_names_of
from quantlens.errors import BadImageError, QuantlensError, UnknownNameError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

PRE = Preprocess((3, 16, 16))


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


@pytest.fixture
def pictures(picture: Callable[..., Image.Image]) -> list[Image.Image]:
    return [picture(20 + k, 24, seed=k) for k in range(7)]


def write(path: Path, columns: dict[str, Any], names: Sequence[str] | None = None, **more: Any) -> Path:
    """A parquet file, its column `label` a ClassLabel where there are names."""
    table = pa.table(columns)
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
        about = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": about})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **more)
    return path


def hugging_face(images: Sequence[Image.Image]) -> list[dict[str, Any]]:
    return [{"bytes": encoded(image), "path": f"{k}.png"} for k, image in enumerate(images)]


def test_the_layout_of_hugging_face(tmp_path: Path, pictures: list[Image.Image]) -> None:
    file = write(tmp_path / "a.parquet", {"image": hugging_face(pictures), "label": [1, 0] * 3 + [1]}, ["x", "y"])
    source = open_source(f"parquet:{file}")
    assert source.labels.tolist() == [1, 0, 1, 0, 1, 0, 1]
    assert source.class_names == ["x", "y"]
    for k, image in enumerate(pictures):
        assert np.array_equal(np.asarray(source.image(k)), np.asarray(image))
    picked = open_source(f"parquet:{file}[::2]?n=3&seed=4")
    assert [picked.labels[k] for k in range(3)] == [source.labels[source.names.index(n)] for n in picked.names]


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_shards_and_row_groups_are_read_in_any_order(rows: int, tmp_path: Path, pictures: list[Image.Image]) -> None:
    for k, part in enumerate((slice(0, 4), slice(4, 7))):
        columns = {"img": [encoded(p) for p in pictures[part]], "cls": list(range(7))[part]}
        write(tmp_path / f"train-{k:05d}-of-00002.parquet", columns, row_group_size=rows)
    source = open_source(f"parquet:{tmp_path}")
    order = [6, 0, 3, 4, 2, 6, 1, 5]
    assert [np.asarray(source.image(k)).shape[1] for k in order] == [20 + k for k in order]
    assert source.labels.tolist() == list(range(7))
    chosen = source.select(order)
    assert [chosen.image(k).width for k in range(8)] == [20 + k for k in order]
    assert load_images(source, PRE, cache_dir=False, workers=4).labels.tolist() == list(range(7))


def test_row_groups_make_room(tmp_path: Path, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch) -> None:
    assert HELD_BYTES > 1 << 20
    columns = {"image": [encoded(p) for p in pictures]}
    source = open_source(f"parquet:{write(tmp_path / 'a.parquet', columns, row_group_size=1)}")
    monkeypatch.setattr("quantlens.data.tables.HELD_BYTES", 2 * len(columns["image"][-1]) + 10)
    for k in [*range(7), *range(7)]:
        assert source.image(k).width == 20 + k
        assert len(source._held) <= 2


def test_of_several_splits_the_test_split_is_taken(tmp_path: Path, pictures: list[Image.Image]) -> None:
    write(tmp_path / "data" / "train-00000-of-00001.parquet", {"image": hugging_face(pictures)})
    write(tmp_path / "data" / "test-00000-of-00001.parquet", {"image": hugging_face(pictures[:2])})
    write(tmp_path / "odd" / "extra-00000-of-00001.parquet", {"image": hugging_face(pictures[:3])})
    assert len(open_source(f"parquet:{tmp_path}")) == 2
    assert len(open_source(f"parquet:{tmp_path}?split=train")) == 7
    assert len(open_source(f"parquet:{tmp_path}?split=extra&n=3")) == 3
    with pytest.raises(UnknownNameError, match="split"):
        open_source(f"parquet:{tmp_path}?split=tset")
    write(tmp_path / "none" / "b" / "one.parquet", {"image": hugging_face(pictures)})
    assert len(open_source(f"parquet:{tmp_path / 'none'}")) == 7


def test_columns_are_found_or_asked_for(tmp_path: Path, pictures: list[Image.Image]) -> None:
    left, right = hugging_face(pictures), hugging_face(pictures[::-1])
    file = write(tmp_path / "a.parquet", {"left": left, "right": right, "fine_label": range(7), "coarse": [0] * 7})
    with pytest.raises(QuantlensError, match=r"left, right may all .* \?image="):
        open_source(f"parquet:{file}")
    source = open_source(f"parquet:{file}?image=right")
    assert source.image(0).width == 26
    assert source.labels.tolist() == list(range(7))
    coarse = open_source(f"parquet:{file}?image=right&label=coarse")
    assert coarse.labels.tolist() == [0] * 7
    assert coarse.fingerprint() != source.fingerprint()
    with pytest.raises(UnknownNameError, match="column of labels"):
        open_source(f"parquet:{file}?image=left&label=corse")
    with pytest.raises(QuantlensError, match="no column holds pictures"):
        open_source(f"parquet:{write(tmp_path / 'b.parquet', {'label': [1, 2]})}")
    numbers = {"pixels": [np.asarray(p).tolist() for p in pictures]}
    plain = open_source(f"parquet:{write(tmp_path / 'c.parquet', numbers)}")
    assert np.array_equal(np.asarray(plain.image(3)), np.asarray(pictures[3]))
    assert plain.labels is None


def test_what_is_no_picture_is_named(tmp_path: Path, pictures: list[Image.Image]) -> None:
    images = [*hugging_face(pictures[:2]), {"bytes": b"no picture", "path": None}, {"bytes": None, "path": None}]
    file = write(tmp_path / "a.parquet", {"image": images})
    with pytest.raises(BadImageError, match=r"a\.parquet, row 2: it is not an image"):
        load_images(f"parquet:{file}", PRE)
    assert [name for name, _ in load_images(f"parquet:{file}", PRE, skip_bad=True).skipped] == ["a/000002", "a/000003"]
    (tmp_path / "b.parquet").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(QuantlensError, match="not a whole parquet file"):
        open_source(f"parquet:{tmp_path / 'b.parquet'}")
    with pytest.raises(QuantlensError, match="there is no"):
        open_source(f"parquet:{tmp_path / 'absent'}")


@pytest.mark.parametrize(
    ("values", "names", "labels", "found"),
    [
        (["dog", "cat", "dog"], None, [1, 0, 1], ["cat", "dog"]),
        (["dog", "cat"], ["dog", "cat"], [0, 1], ["dog", "cat"]),
        ([True, False], None, [1, 0], None),
        ([3.0, 1.0], None, [3, 1], None),
        ([[0, 2], [], [1]], ["a", "b", "c"], [[1, 0, 1], [0, 0, 0], [0, 1, 0]], ["a", "b", "c"]),
        ([[0, 1], [1, 1]], None, [[0, 1], [1, 1]], None),
        ([-1, -1], None, None, None),
        (None, None, None, None),
    ],
)
def test_labels(values: Any, names: Any, labels: Any, found: Any) -> None:
    array, names = as_labels(values, names, "x")
    assert (None if array is None else array.tolist()) == labels
    assert names == found


@pytest.mark.parametrize(
    ("values", "names"),
    [([1, None], None), (["a"], ["b"]), ([0.5], None), ([[0, 1], [1]], None), ([[3]], ["a"]), ([1, "a"], None)],
)
def test_labels_that_are_none_are_refused(values: Any, names: Any) -> None:
    with pytest.raises(QuantlensError, match=r"^x: "):
        as_labels(values, names, "x")


def test_class_names_of_a_schema() -> None:
    one = {"names": ["a", "b"], "_type": "ClassLabel"}
    assert class_names_of(one) == class_names_of({"feature": one, "_type": "List"}) == class_names_of([one])
    assert class_names_of({"names": {"1": "b", "0": "a"}}) == ["a", "b"]
    assert class_names_of({"dtype": "int64"}) is None


@pytest.mark.real
def test_real_parquet_files(shared_data: Path) -> None:
    source = open_source(f"parquet:{shared_data / 'cifar10'}[:20]")
    assert source.class_names is not None
    assert source.class_names[source.labels[0]] == "truck"
    assert len(open_source(f"parquet:{shared_data / 'cifar10'}?split=train")) == 50000
    assert load_images(source, Preprocess((3, 32, 32), crop_pct=1.0)).pixels.shape == (20, 3, 32, 32)


# ---- the library of Hugging Face -------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Any]:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    datasets = pytest.importorskip("datasets")
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])})
    data = datasets.Dataset.from_dict({"image": pictures, "label": [1, 0] * 3 + [1]}, features=kinds)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "validation": data.select(range(3))}).save_to_disk(tmp_path / "two")
    return tmp_path, data


def test_data_sets_of_hugging_face(saved: tuple[Path, Any], pictures: list[Image.Image]) -> None:
    folder, data = saved
    source = open_source(f"hf:{folder / 'one'}")
    assert source.labels.tolist() == [1, 0, 1, 0, 1, 0, 1]
    assert source.class_names == ["x", "y"]
    assert np.array_equal(np.asarray(source.image(5)), np.asarray(pictures[5]))
    assert len(open_source(f"hf:{folder / 'two'}")) == 3
    assert len(open_source(f"hf:{folder / 'two'}?split=train&image=image&label=label&n=4")) == 4
    with pytest.raises(UnknownNameError, match="split"):
        open_source(f"hf:{folder / 'two'}?split=test")
    images = load_images(source, PRE)
    given = as_image_set(data, PRE, "mine")
    assert np.array_equal(given.pixels, images.pixels)
    assert given.labels.tolist() == images.labels.tolist()
    looped = as_image_set((row for row in data), PRE)
    assert np.array_equal(looped.pixels, images.pixels)
    with pytest.raises(QuantlensError, match="train, validation; give one"):
        as_image_set({"train": data, "validation": data}, PRE)


def test_a_data_set_of_hugging_face_calibrates_as_a_source(saved: tuple[Path, Any]) -> None:
    folder, data = saved
    drawn = np.random.RandomState(2).permutation(7)
    whole = load_images(f"hf:{folder / 'one'}", PRE).tensor()
    for given in (data, f"hf:{folder / 'one'}", data.with_transform(lambda rows: rows)):
        chunk = Calibration.of(given, PRE, seed=2).chunk(0)
        assert np.array_equal(chunk.numpy(), whole[drawn].numpy())
