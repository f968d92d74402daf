"""The study file: what it means, and one sentence for every mistake in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantlens.errors import QuantlensError
from quantlens.studies.config import StudyConfig, load_config, parse_config

GOOD = """
models:
  - deit_tiny_patch16_224
  - {name: vit_tiny_patch16_224, weights: w/vit.safetensors, label: ViT-T}
methods: [repq-vit, {name: percentile, options: {percentile: 99.9}}]
bits: [FP32, w8a8, W4A4]
seeds: [0, 13]
calibration: imagenet:data/train[0:200]
id: imagenet:data/val
ood:
  textures: images:${PICTURES}/textures
  hard: {source: "images:/abs/hard", group: near}
  letters: embedded:letters
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "my-study.yaml"
    path.write_text(text)
    return path


def problem(tmp_path: Path, text: str) -> str:
    with pytest.raises(QuantlensError) as caught:
        load_config(write(tmp_path, text))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PICTURES", "/pics")
    config = load_config(write(tmp_path, GOOD))
    assert config.name == "my-study"
    assert [m.label for m in config.models] == ["deit_tiny_patch16_224", "ViT-T"]
    assert config.models[1].weights == str(tmp_path / "w/vit.safetensors")
    assert load_config(write(tmp_path, GOOD.replace("w/vit.safetensors", "random"))).models[1].weights == "random"
    assert config.methods[1].options == {"percentile": 99.9}
    assert config.bits == ("FP32", "W8A8", "W4A4")
    assert config.calibration is not None
    assert config.calibration.n == 32
    assert config.calibration.drawn(13) == f"imagenet:{tmp_path}/data/train[0:200]?n=32&seed=13"
    assert config.id == f"imagenet:{tmp_path}/data/val"
    assert config.ood["textures"].source == "images:/pics/textures"
    assert config.ood["hard"].source == "images:/abs/hard"
    assert config.ood["hard"].group == "near"
    assert config.ood["letters"].source == "embedded:letters"
    assert parse_config(config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("models:", "modles:", "unknown key 'modles'; did you mean 'models'?"),
        ("label: ViT-T", "labell: ViT-T", "unknown key 'labell' in `models[1]`; did you mean 'label'?"),
        ("options:", "option:", "in `methods[1]`; did you mean 'options'?"),
        ("group: near", "grup: near", "in `ood.hard`; did you mean 'group'?"),
        ("group: near", "group: middle", "`ood.hard.group`"),
        ("w8a8", "W8", "'W8'"),
        ("w8a8", "W1A8", "2 to 10"),
        ("seeds: [0, 13]", "seeds: [0, x]", "`seeds[1]`"),
        ("seeds: [0, 13]", "seeds: []", "`seeds`"),
        ("seeds: [0, 13]", "seeds: [-1]", "greater than or equal to 0"),
        ("id: imagenet:data/val", "", "the key `id` is missing"),
        ("calibration: imagenet:data/train[0:200]", "", "name a source of images, or `none`, and some are made"),
        ("calibration: imagenet:data/train[0:200]", "calibration: {source: 'images:x', m: 3}", "unknown key 'm'"),
        ("data/train[0:200]", "data/train?n=3", "write the number of images as `n`"),
        ("label: ViT-T", "label: deit_tiny_patch16_224", "its own `label`"),
        ("${PICTURES}", "${NO_SUCH_PLACE}", "${NO_SUCH_PLACE}, which is not set"),
        ("seeds:", "seeds: [1]\nseeds:", "the key 'seeds' stands twice"),
        ("models:", "models: [", "not valid YAML at line"),
        ("models:", "models: !!python/object/apply:os.getcwd []\nx:", "not valid YAML"),
    ],
)
def test_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, said: str) -> None:
    monkeypatch.setenv("PICTURES", "/pics")
    assert old in GOOD
    message = problem(tmp_path, GOOD.replace(old, new, 1))
    assert said in message
    assert "my-study.yaml" in message


@pytest.mark.parametrize("text", ["none", "{source: none, n: 32}", "made:dead-leaves"])
def test_a_study_without_calibration_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("PICTURES", "/pics")
    config = load_config(write(tmp_path, GOOD.replace("imagenet:data/train[0:200]", text)))
    assert config.calibration is not None
    assert config.calibration.drawn(5) == "made:dead-leaves?n=32&seed=5"
    assert parse_config(config.to_dict()) == config


def test_defaults_of_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PICTURES", raising=False)
    config = load_config(write(tmp_path, GOOD.replace("${PICTURES}", "${PICTURES:-here}")))
    assert config.ood["textures"].source == f"images:{tmp_path}/here/textures"


def test_files_that_are_none(tmp_path: Path) -> None:
    assert "must hold keys" in problem(tmp_path, "just text")
    assert "must hold keys" in problem(tmp_path, "")
    with pytest.raises(QuantlensError, match="does not exist"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(QuantlensError, match="directory"):
        load_config(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(QuantlensError, match="cannot be read"):
        load_config(tmp_path / "binary.yaml")


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "examples").glob("*.yaml")), ids=lambda p: p.name)
def test_examples_are_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("QUANTLENS_DATA", "IMAGENET", "OOD", "COCO"):
        monkeypatch.setenv(name, "/data")
    config = load_config(path)
    assert config.calibration is not None


def test_the_page_on_the_study_file_has_every_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "study.md").read_text(encoding="utf-8")
    text = page.partition("```yaml\n")[2].partition("```")[0]
    (tmp_path / "study.yaml").write_text(text, encoding="utf-8")
    (tmp_path / "my_method.py").write_text("", encoding="utf-8")
    monkeypatch.setenv("WEIGHTS", str(tmp_path))
    study = load_config(tmp_path / "study.yaml")
    assert study.model_fields_set == set(StudyConfig.model_fields)
    assert study.scores == ("msp", "energy", "knn")
