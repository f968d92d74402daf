"""`?corrupt=NAME:SEVERITY` in a SOURCE, and what comes of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from quantlens.data import ImageSet, Preprocess, as_image_set, load_images, open_source, with_corruption
from quantlens.data.corruptions import corrupt, picture_seeds
from quantlens.data.sources import FileSource, open_calibration, parse_spec, with_sample
from quantlens.errors import BadImageError, QuantlensError, UnknownNameError
from quantlens.evaluation.images import refuse_overlap

PRE = Preprocess((3, 24, 24), crop_pct=0.9)


def last(images) -> np.ndarray:
    """Pixels [N, H, W, C]."""
    return np.asarray(images.pixels).transpose(0, 2, 3, 1)


def test_it_is_done_after_the_resize_and_the_crop(folder: Path) -> None:
    clean = load_images(f"images:{folder}", PRE)
    found = load_images(f"images:{folder}?corrupt=gaussian_noise:3", PRE)
    assert np.array_equal(last(found), corrupt(last(clean), "gaussian_noise", 3, seeds=picture_seeds(last(clean))))
    assert found.source == f"images:{folder}?corrupt=gaussian_noise:3"
    assert (found.names, found.preprocess) == (clean.names, PRE)
    assert found.tensor().shape == (10, 3, 24, 24)


def test_a_picture_is_the_same_in_every_slice_and_order(folder: Path) -> None:
    whole = load_images(f"images:{folder}?corrupt=shot_noise:5", PRE)
    part = load_images(f"images:{folder}[3:9:2]?corrupt=shot_noise:5", PRE, cache_dir=False)
    assert np.array_equal(part.pixels, whole.pixels[3:9:2])
    sample = load_images(f"images:{folder}?n=4&corrupt=shot_noise:5", PRE)
    assert np.array_equal(sample.pixels, whole.pixels[[whole.names.index(name) for name in sample.names]])
    opened = open_source(f"images:{folder}?corrupt=shot_noise:5").select([7, 2])
    assert np.array_equal(load_images(opened, PRE).pixels, whole.pixels[[7, 2]])


def test_a_seed_makes_other_noise(folder: Path) -> None:
    texts = ("corrupt=fog:3", "corrupt=fog:3&seed=0", "corrupt=fog:3&seed=1", "seed=2&corrupt=fog:3", "corrupt=fog:4")
    found = [load_images(f"images:{folder}[:2]?{text}", PRE) for text in texts]
    assert np.array_equal(found[0].pixels, found[1].pixels)
    assert len({images.pixels.tobytes() for images in found}) == 4
    assert len({images.fingerprint for images in found}) == 4


@pytest.mark.parametrize("text", ["corrupt=snow:2", "corrupt=snow:2&seed=3", "n=3&seed=3&corrupt=spatter:1"])
def test_the_opened_source_has_the_fingerprint_of_its_images(text: str) -> None:
    source = open_source(f"embedded:digits-test[:6]?{text}")
    images = load_images(source, Preprocess((3, 32, 32), crop_pct=1.0))
    clean = open_source(f"embedded:digits-test[:6]{'?n=3&seed=3' if 'n=3' in text else ''}")
    assert images.fingerprint == source.fingerprint() != clean.fingerprint()
    assert np.array_equal(images.labels, clean.labels)
    assert images.class_names == clean.class_names
    assert load_images("embedded:digits-test[:6]", images.preprocess).fingerprint != images.fingerprint


def test_every_kind_takes_it_beside_its_own_keys(tmp_path: Path) -> None:
    labels = tmp_path / "a" / "val.txt"
    labels.parent.mkdir()
    labels.write_text("im0.png 5\nim1.png 7\n")
    for k in range(2):
        Image.fromarray(np.full((40, 40, 3), 90 * k, np.uint8)).save(labels.parent / f"im{k}.png")
    for text in (f"labels={labels}&corrupt=brightness:2", f"corrupt=brightness:2&labels={labels}"):
        images = load_images(f"imagenet:{labels.parent}?{text}", PRE, cache_dir=False)
        assert images.labels.tolist() == [5, 7]
        assert np.unique(images.pixels[0]).tolist() == [25]
    spec = parse_spec("cifar10:DIR[:9]?split=train&corrupt=zoom_blur:1&n=5&seed=2")
    assert (spec.corruption, spec.options, spec.sample, spec.seed) == (("zoom_blur", 1), {"split": "train"}, 5, 2)
    assert parse_spec("images:DIR").corruption is None


def test_texts_of_corrupted_sources() -> None:
    assert with_corruption("images:DIR[:5]", "fog", 2) == "images:DIR[:5]?corrupt=fog:2"
    assert with_corruption("hf:DIR?split=test&n=3", "fog", 2) == "hf:DIR?split=test&n=3&corrupt=fog:2"
    assert with_corruption("images:why?/", "fog", 2) == "images:why?/?corrupt=fog:2"
    assert parse_spec("images:why?/?corrupt=fog:2").path == "images:why?/"[7:]
    assert with_sample("images:DIR?corrupt=fog:2", 5, 1) == "images:DIR?corrupt=fog:2&n=5&seed=1"
    assert with_sample("images:DIR?corrupt=fog:2&seed=4", 5, 1) == "images:DIR?corrupt=fog:2&n=5&seed=1"
    with pytest.raises(QuantlensError, match="is corrupted already"):
        with_corruption("images:DIR?corrupt=fog:2", "snow", 1)
    with pytest.raises(UnknownNameError, match="there are gaussian_noise"):
        with_corruption("images:DIR", "mist", 1)


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("corrupt=mist:3", r"unknown corruption 'mist' \(there are gaussian_noise, .*, saturate\)"),
        ("corrupt=fog", "corruption fog: severity '' must be 1, 2, 3, 4 or 5; write fog:3"),
        ("corrupt=fog:7", "severity '7' must be 1, 2, 3, 4 or 5"),
        ("corrupt=", "unknown corruption ''"),
        ("corrupt=fog:1&corrupt=fog:2", "gives a key twice"),
        ("corupt=fog:1", "unknown query key .* did you mean 'corrupt'"),
        ("seed=1", "gives a seed but no number of images"),
    ],
)
def test_what_cannot_be_is_refused_when_it_is_opened(query: str, said: str) -> None:
    with pytest.raises(QuantlensError, match=said):
        open_source(f"embedded:digits-test?{query}")


def test_calibration_images_are_drawn_from_a_corrupted_source() -> None:
    drawn = open_calibration("embedded:digits-test?corrupt=contrast:3", 4, seed=5)
    again = open_source(drawn.spec)
    assert (again.names, again.corruption) == (drawn.names, ("contrast", 3, 5))
    assert drawn.corruption == again.corruption
    assert drawn.fingerprint() == again.fingerprint()
    with pytest.raises(QuantlensError, match="share 4 images"):  # corrupted or not, they have been seen
        refuse_overlap(drawn, "the calibration images", open_source("embedded:digits-test"), "the ID set")


def test_only_clean_images_are_cached(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clean = load_images(f"images:{folder}", PRE)
    cached = sorted(path.name for path in (tmp_path / "default-cache" / "images").iterdir())
    before = np.array(clean.pixels)
    monkeypatch.setattr(FileSource, "image", None)  # nothing is decoded again
    first, second = (load_images(f"images:{folder}?corrupt=glass_blur:2", PRE) for _ in range(2))
    assert np.array_equal(first.pixels, second.pixels)
    assert sorted(path.name for path in (tmp_path / "default-cache" / "images").iterdir()) == cached
    assert np.array_equal(load_images(f"images:{folder}", PRE).pixels, before)


def test_what_is_large_is_kept_in_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load_images(f"images:{folder}?corrupt=contrast:2", PRE)
    monkeypatch.setattr("quantlens.data.cache.KEPT_BYTES", 1000)
    monkeypatch.setattr("quantlens.data.images.CORRUPTED_TOGETHER", 3)
    found = load_images(f"images:{folder}?corrupt=contrast:2", PRE)
    assert isinstance(found.pixels, np.memmap)
    assert np.array_equal(found.pixels, expected.pixels)


def test_bad_images_are_left_out_before(folder: Path) -> None:
    (folder / "im3.jpg").write_bytes(b"no picture")
    with pytest.raises(BadImageError, match=r"im3\.jpg"):
        load_images(f"images:{folder}?corrupt=contrast:2", PRE)
    found = load_images(f"images:{folder}?corrupt=contrast:2", PRE, skip_bad=True)
    assert len(found) == len(found.pixels) == 9
    assert len(found.skipped) == 1


def test_channels_of_the_model(folder: Path) -> None:
    """In whatever order a model wants its channels, and whether it has one or three, the pictures are the same ones."""
    text = f"images:{folder}[:3]?corrupt=saturate:5"
    colours = last(load_images(text, PRE))
    assert np.array_equal(last(load_images(text, replace(PRE, channels="bgr")))[..., ::-1], colours)
    grey = PRE.for_size((1, 24, 24))
    clean = last(load_images(f"images:{folder}[:3]", grey))
    noisy = last(load_images(f"images:{folder}[:3]?corrupt=gaussian_noise:1", grey))
    assert noisy.shape == clean.shape == (3, 24, 24, 1)
    assert 3 < np.abs(noisy.astype(int) - clean).mean() < 15


def test_a_set_in_memory_is_corrupted_too(folder: Path) -> None:
    source = open_source(f"images:{folder}[:4]")
    given = as_image_set([source.image(k) for k in range(4)], PRE)
    expected = load_images(f"images:{folder}[:4]?corrupt=pixelate:4&seed=2", PRE)
    found = given.corrupted("pixelate", 4, seed=2)
    assert np.array_equal(found.pixels, expected.pixels)
    assert found.fingerprint != given.fingerprint
    with pytest.raises(QuantlensError, match="holds tensors, and fog is for pictures; give PIL images or a SOURCE"):
        as_image_set(given.tensor()).corrupted("fog", 1)
    with pytest.raises(QuantlensError, match="severity '9'"):
        given.corrupted("fog", 9)
    with pytest.raises(QuantlensError, match="need at least 16"):
        load_images(f"images:{folder}?corrupt=fog:1", Preprocess((3, 12, 12)))


@pytest.mark.real
@pytest.mark.slow
def test_real_images_are_harder_to_know(shared_data: Path) -> None:
    import quantlens as ql

    model = ql.load_model("deit_tiny_patch16_224", shared_data / "weights" / "deit_tiny_patch16_224.safetensors")
    text = f"imagenet:{shared_data / 'imagenet'}[::20]"
    found = [
        ql.evaluate(model, id=f"{text}{more}").to_dict()["id"]["top1"] for more in ("", "?corrupt=impulse_noise:5")
    ]
    assert found[0] > 0.7 > 0.4 > found[1]


def test_corrupted_pictures_are_kept_where_that_is_asked_for(folder: Path, tmp_path: Path, monkeypatch) -> None:
    """A study reads them from the cache again; other severities, seeds and slices are other entries."""
    cache = tmp_path / "cache"
    texts = [f"images:{folder}?corrupt=fog:3", f"images:{folder}?corrupt=fog:4", f"images:{folder}[:4]?corrupt=fog:3"]
    texts.append(f"images:{folder}?corrupt=fog:3&seed=1")
    plain = [load_images(text, PRE, cache_dir=False) for text in texts]
    first = [load_images(text, PRE, cache_dir=cache, keep_corrupted=True) for text in texts]
    files = len(list(cache.rglob("*.npy")))
    with monkeypatch.context() as patched:
        patched.setattr(ImageSet, "corrupted", None)
        again = [load_images(text, PRE, cache_dir=cache, keep_corrupted=True) for text in texts]
    for one, made, read in zip(plain, first, again, strict=True):
        assert np.array_equal(one.pixels, made.pixels)
        assert np.array_equal(one.pixels, read.pixels)
        assert one.fingerprint == made.fingerprint == read.fingerprint
    load_images(f"images:{folder}?corrupt=snow:1", PRE, cache_dir=cache)
    assert len(list(cache.rglob("*.npy"))) == files, "not by itself"
    Image.new("RGB", (60, 60), (9, 200, 9)).save(folder / plain[0].names[0])
    changed = load_images(texts[0], PRE, cache_dir=cache, keep_corrupted=True)
    assert not np.array_equal(changed.pixels, plain[0].pixels), "a changed file is corrupted anew"
