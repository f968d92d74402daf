"""The models that ship with the package, and the recipes that train them."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from quantlens import zoo
from quantlens.data import load_images
from quantlens.zoo.train import DIGITS_VIT, RECIPES, Recipe, augment, main, measure, train


@pytest.fixture(scope="module")
def digits_vit() -> torch.nn.Module:
    entry = zoo.available()["digits-vit"]
    model = entry.build()
    model.load_state_dict(load_file(str(entry.weights)), strict=True)
    return model.eval()


def small(**changes) -> Recipe:
    fields = {
        **vars(DIGITS_VIT),
        "train": "embedded:digits-train?n=128",
        "epochs": 2,
        "embed_dim": 32,
        "depth": 2,
    }
    return Recipe(**{**fields, **changes})


def test_shipped_model_is_worth_quantizing() -> None:
    entry = zoo.available()["digits-vit"]
    images = load_images(entry.sources.id, entry.preprocess)
    assert len(images) == entry.card()["figures"]["n"] >= 350
    assert entry.card()["figures"]["top1"] >= 0.97, "which the next test measures"
    assert entry.weights.stat().st_size <= 4 * 2**20


def test_card_tells_the_truth(digits_vit: torch.nn.Module) -> None:
    entry = zoo.available()["digits-vit"]
    card = entry.card()
    assert card["sha256"] == hashlib.sha256(entry.weights.read_bytes()).hexdigest()
    assert card["bytes"] == entry.weights.stat().st_size
    assert card["num_parameters"] == sum(p.numel() for p in digits_vit.parameters())
    recipe = json.loads(json.dumps(asdict(DIGITS_VIT) | {"preprocess": DIGITS_VIT.preprocess.to_dict()}))
    then = recipe | {"augmentation": recipe["augmentation"] | {"noise": 0.0, "cutout": 0.0, "mixup": 0.0}}
    assert card["recipe"] == then | {"weight_decay": 0.0, "label_smoothing": 0.0}, "today's cannot do what was off"
    measured = measure(digits_vit, entry)
    assert measured["n"] == card["figures"]["n"]
    assert measured["top1"] == pytest.approx(card["figures"]["top1"], abs=0.003)
    assert set(measured["ood"]) == set(entry.sources.ood) == set(card["figures"]["ood"])
    for name, ood in measured["ood"].items():
        assert ood["group"] == entry.sources.ood[name]["group"]
        assert ood["aupr_out"] == pytest.approx(card["figures"]["ood"][name]["aupr_out"], abs=0.005)
        said = card["figures"]["ood"][name]
        assert said["chance_aupr_out"] + 0.1 < said["aupr_out"] < 0.98  # it tells something, and not everything
    with safe_open(str(entry.weights), "pt") as file:
        header = file.metadata()
    assert json.loads(header["recipe"]) == card["recipe"]
    assert json.loads(header["figures"]) == card["figures"]


def test_entry_and_recipe_agree(digits_vit: torch.nn.Module) -> None:
    entry = zoo.available()["digits-vit"]
    assert set(RECIPES) == set(zoo.available()) - set(zoo.DETECTORS)
    assert entry.preprocess == DIGITS_VIT.preprocess
    assert len(entry.class_names) == DIGITS_VIT.num_classes == digits_vit.num_classes
    assert load_images(entry.sources.id, entry.preprocess).class_names == entry.class_names
    sets = {
        s: load_images(s, entry.preprocess) for s in (entry.sources.fit, entry.sources.calibration, entry.sources.id)
    }
    pixels = [{p.tobytes() for p in images.pixels} for images in sets.values()]
    assert not pixels[0] & pixels[1]
    assert not (pixels[0] | pixels[1]) & pixels[2]
    assert {ood["group"] for ood in entry.sources.ood.values()} == {"near", "far"}


def test_listing_the_zoo_imports_no_heavy_package() -> None:
    code = (
        "import sys; from quantlens import zoo; zoo.available()['digits-vit'].card()\n"
        "print([m for m in ('torch', 'timm', 'sklearn', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_training_is_seeded_and_learns() -> None:
    losses: list[float] = []
    before = torch.random.get_rng_state()
    recipe = small(epochs=6, warmup_epochs=1)
    one = train(recipe, lambda done, total, loss: losses.append(loss))
    assert torch.equal(torch.random.get_rng_state(), before)
    two = train(recipe)
    for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    other = train(small(epochs=1, seed=1))
    assert not torch.equal(other.state_dict()["head.weight"], one.state_dict()["head.weight"])
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    assert not one.training


def test_command_trains_and_writes_a_loadable_model(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(RECIPES, "digits-vit", small())
    main(["digits-vit", "--out", str(tmp_path), "--epochs", "1"])
    weights = tmp_path / "digits_vit.safetensors"
    small().build().load_state_dict(load_file(str(weights)), strict=True)
    card = json.loads(weights.with_suffix(".json").read_text())
    assert card["recipe"]["epochs"] == 1
    assert 0 <= card["figures"]["top1"] <= 1
    assert "top-1" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["digits-vot"])
    assert "choose from" in capsys.readouterr().err


# --- augmentation ---

IDENTITY = dict.fromkeys(DIGITS_VIT.augmentation, 0.0)


def test_augmentation_of_zero_strength_changes_nothing() -> None:
    x = torch.from_numpy(load_images("embedded:digits-test[:16]", DIGITS_VIT.preprocess).pixels / 255).float()
    y = augment(x, torch.Generator().manual_seed(0), **IDENTITY)
    assert torch.allclose(x, y, atol=1e-4)


@pytest.mark.parametrize("field", IDENTITY)
def test_each_change_is_seeded_and_stays_in_range(field: str) -> None:
    x = torch.from_numpy(load_images("embedded:digits-test[:16]", DIGITS_VIT.preprocess).pixels / 255).float()
    how = {**IDENTITY, field: 20.0 if field == "rotate" else 0.2}
    y = augment(x, torch.Generator().manual_seed(0), **how)
    assert y.shape == x.shape
    assert 0 <= float(y.min()) <= float(y.max()) <= 1
    assert float((x - y).abs().mean()) > 1e-3
    assert torch.equal(y, augment(x, torch.Generator().manual_seed(0), **how))
    assert not torch.equal(y, augment(x, torch.Generator().manual_seed(1), **how))
