"""Recipes in YAML and the trainer that follows them: mistakes in a sentence, trainings that go on where they stop."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from timm.scheduler import CosineLRScheduler

from quantlens.data import load_images
from quantlens.errors import QuantlensError, StorageError
from quantlens.zoo.architecture import ClippedSoftmax, ConvStem
from quantlens.zoo.augmentation import coloured, erased, mixing, prepared, shifted
from quantlens.zoo.designs import merged
from quantlens.zoo.recipes import Augmentation, Recipe, Schedule, load_recipe, parse_recipe
from quantlens.zoo.train import main
from quantlens.zoo.training import STATE, Run, rate_at, train, trained
from quantlens.zoo.training_images import of_classes, training_images

SOURCE = "embedded:digits-train?n=96"


def tiny(**changes) -> dict:
    """A recipe of a few milliseconds per step; a change of a mapping is one of its keys."""
    told = {
        "name": "tiny",
        "model": {"depth": 1, "width": 16, "heads": 2, "patch": 8},
        "images": {"source": SOURCE},
        "steps": 6,
        "batch_size": 16,
        "schedule": {"rate": 1e-3, "warmup": 2},
        "averages": {},
        "augmentation": {},
        "optimizer": {},
    }
    for key, value in changes.items():
        told[key] = {**told[key], **value} if isinstance(told.get(key), dict) and isinstance(value, dict) else value
    return told


def recipe(**changes) -> Recipe:
    return parse_recipe(tiny(**changes))


def files(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.stem: load_file(str(path)) for path in sorted(folder.glob("*.safetensors"))}


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ---- the file --------------------------------------------------------------------------------------------------------


def test_a_recipe_is_read_from_a_file_and_is_plain_data_again(tmp_path, monkeypatch):
    monkeypatch.setenv("SOMEWHERE", "/pictures")
    text = """
model: {depth: 2, width: 32, heads: 4, patch: 4, stem: conv, registers: 2, layer_scale: 0.1}
images: {source: "imagefolder:${SOMEWHERE}/train", classes: [cat, dog], share: 0.5}
pretraining: {images: {source: "imagefolder:other"}, steps: 40}
steps: 60
schedule: {shape: wsd, rate: 0.001, warmup: 5, end: 0.1}
"""
    (tmp_path / "small.yaml").write_text(text)
    found = load_recipe(tmp_path / "small.yaml")
    assert (found.name, found.model.stem, found.images.classes) == ("small", "conv", ("cat", "dog"))
    assert found.source(found.images) == "imagefolder:/pictures/train"
    assert found.source(found.phases[0][0]) == f"imagefolder:{tmp_path.resolve()}/other"
    again = parse_recipe(json.loads(json.dumps(found.to_dict())))
    assert again.to_dict() == found.to_dict()
    assert "${SOMEWHERE}" in again.images.source, "the same recipe on every machine"
    monkeypatch.delenv("SOMEWHERE")
    with pytest.raises(QuantlensError, match=r"SOMEWHERE.*not set; run `export"):
        found.source(found.images)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"modle": {}}, "unknown key 'modle'; did you mean 'model'"),
        ({"model": {"widht": 3}}, "unknown key 'widht' in `model`; did you mean 'width'"),
        ({"model": {"depth": "deep"}}, r"`model.depth`: input should be a valid integer"),
        ({"model": {"depth": 0}}, r"`model.depth`: input should be greater than or equal to 1"),
        ({"model": {"heads": 3}}, "width 16 is no multiple of heads 3"),
        ({"model": {"patch": 5}}, "size 32 is no multiple of patch 5"),
        ({"model": {"patch": 1, "stem": "conv"}}, "patch 1 is no power of 2"),
        ({"schedule": {"shape": "step"}}, r"`schedule.shape`: input should be 'cosine', 'wsd' or 'constant'"),
        ({"schedule": {"warmup": 6}}, "the warmup of 6 steps leaves nothing of 6"),
        ({"schedule": {"rate": float("nan")}}, r"`schedule.rate`"),
        ({"optimizer": {"name": "adamm"}}, r"`optimizer.name`"),
        ({"images": {"source": "cats"}}, r"`images.source`: source 'cats' has no kind"),
        ({"images": {"share": 0}}, r"`images.share`"),
        ({"batch_size": 15, "augmentation": {"mixup": 0.5}}, "batch_size 15 is odd"),
        ({"averages": {"last": 3, "every": 3}}, "do not fit into steps"),
        ({"checkpoints": 6}, "6 checkpoints do not fit into 6 steps"),
        ({"averages": {"ema": 1.0}}, r"`averages.ema`"),
        ({"seed": -1}, r"`seed`"),
    ],
)
def test_a_mistake_is_told_with_file_and_key(changes, said, tmp_path):
    import yaml

    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tiny(**changes)))
    with pytest.raises(QuantlensError, match=said) as raised:
        load_recipe(tmp_path / "r.yaml")
    assert str(raised.value).startswith(f"recipe {tmp_path / 'r.yaml'}: ")
    assert "\n" not in str(raised.value)


def test_what_is_no_recipe_is_told(tmp_path):
    with pytest.raises(QuantlensError, match="does not exist"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "r.yaml").write_text("steps: 1\nsteps: 2\n")
    with pytest.raises(QuantlensError, match=r"not valid YAML at line 2: the key 'steps' stands twice"):
        load_recipe(tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_text("- 1\n")
    with pytest.raises(QuantlensError, match="must hold keys"):
        load_recipe(tmp_path / "r.yaml")


# ---- images ----------------------------------------------------------------------------------------------------------


def test_classes_are_chosen_and_counted_in_the_order_given():
    images = load_images("embedded:digits-train?n=200", recipe().preprocess)
    found = of_classes(images, ["7", 2])
    assert found.class_names == ["7", "2"]
    names = np.array(images.names)
    assert set(found.names) == {*names[images.labels == 7], *names[images.labels == 2]}
    assert {name for name, label in zip(found.names, found.labels, strict=True) if label == 0} == set(
        names[images.labels == 7]
    )
    assert found.fingerprint != images.fingerprint
    with pytest.raises(QuantlensError, match=r"has no class 'cat'; its classes are 0, 1"):
        of_classes(images, ["1", "cat"])
    with pytest.raises(QuantlensError, match="asked for a class twice"):
        of_classes(images, ["1", "1"])


def test_a_share_is_of_every_class_and_of_the_seed():
    source = {"source": "embedded:digits-train", "share": 0.25}
    whole = training_images(recipe(images={"source": "embedded:digits-train"}).images, recipe())
    found = [training_images(recipe(images=source).images, recipe(seed=seed)) for seed in (0, 0, 1)]
    counts = np.bincount(found[0].labels)
    np.testing.assert_array_equal(counts, np.round(np.bincount(whole.labels) / 4))
    assert found[0].names == found[1].names != found[2].names
    label_of = dict(zip(whole.names, whole.labels.tolist(), strict=True))
    assert found[0].labels.tolist() == [label_of[name] for name in found[0].names]
    with pytest.raises(QuantlensError, match="gives 12 images, and batch_size is 16"):
        training_images(recipe(images={"source": "embedded:digits-train?n=12"}).images, recipe())


# ---- the learning rate -----------------------------------------------------------------------------------------------


def test_cosine_is_that_of_timm():
    steps, warmup, schedule = 50, 10, Schedule(rate=0.02, warmup=10, end=0.1)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.02)
    timm = CosineLRScheduler(
        optimizer, t_initial=steps - warmup, lr_min=0.002, warmup_t=warmup, warmup_prefix=True, t_in_epochs=False
    )
    for step in range(warmup, steps):
        timm.step_update(step)
        assert rate_at(schedule, step, steps) == pytest.approx(optimizer.param_groups[0]["lr"])
    assert [rate_at(schedule, step, steps) for step in (0, 4, 9)] == pytest.approx([0.002, 0.01, 0.02])


def test_wsd_stays_and_falls_and_constant_stays():
    wsd = Schedule(rate=1.0, shape="wsd", warmup=2, end=0.5, decay=0.4)
    assert [rate_at(wsd, step, 10) for step in range(10)] == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.875, 0.75, 0.625])
    constant = Schedule(rate=1.0, shape="constant", warmup=2)
    assert [rate_at(constant, step, 5) for step in range(5)] == [0.5, 1, 1, 1, 1]


# ---- augmentation ----------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randint(1, 256, (32, 3, 8, 8), dtype=torch.uint8)


def test_no_augmentation_changes_nothing(pictures):
    expected = recipe().preprocess.normalize(pictures.clone())
    assert torch.equal(prepared(pictures, Augmentation(), recipe().preprocess), expected)
    assert mixing(Augmentation(), 3) is None


def test_pictures_are_moved_and_mirrored_each_in_its_own_way(pictures):
    ways = set()
    found = shifted(pictures, 2, True)
    padded = torch.nn.functional.pad(pictures, (2, 2, 2, 2))
    for before, after in zip(padded, found, strict=True):
        candidates = {
            (top, left, mirrored): (before.flip(2) if mirrored else before)[:, top : top + 8, left : left + 8]
            for top in range(5)
            for left in range(5)
            for mirrored in (False, True)
        }
        ways |= {way for way, candidate in candidates.items() if torch.equal(candidate, after)}
        assert any(torch.equal(candidate, after) for candidate in candidates.values())
    assert len(ways) > 15
    assert {mirrored for *_, mirrored in ways} == {False, True}
    assert {top for top, *_ in ways} == set(range(5))


def test_colours_change_within_their_limits(pictures):
    grey = torch.full((64, 3, 4, 4), 0.5)
    found = coloured(grey, 0.2)
    assert 0.4 <= float(found.min()) < 0.43
    assert 0.57 < float(found.max()) <= 0.6
    assert torch.allclose(found, found[:, :1, :1, :1].expand_as(found)), "grey stays grey"
    changed = coloured(pictures / 255, 0.5)
    assert float(changed.min()) >= 0
    assert float(changed.max()) <= 1
    assert float((changed - pictures / 255).abs().mean()) > 0.02


def test_a_rectangle_is_erased_of_some():
    images = torch.ones(400, 3, 16, 16)
    gone = (erased(images, 0.5) == 0).all(1)
    some = gone.any(2).any(1)
    assert 0.4 < float(some.float().mean()) < 0.6
    shares = gone[some].float().mean((1, 2))
    assert 0.1 < float(shares.mean()) < 0.25
    for one in gone[some][:50]:
        rows, columns = one.any(1), one.any(0)
        assert torch.equal(one, rows[:, None] & columns[None, :]), "a rectangle"
    assert torch.equal(erased(images, 0.0), images)


@pytest.mark.parametrize("which", ["mixup", "cutmix"])
def test_mixed_targets_follow_the_images(which):
    mix = mixing(Augmentation(**{which: 1.0}), 2)
    np.random.seed(3)
    images, target = mix(torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)]), torch.tensor([0, 1]))
    assert target.sum(1).tolist() == pytest.approx([1, 1])
    assert images.mean((1, 2, 3)).tolist() == pytest.approx(target[:, 1].tolist(), abs=1e-6)
    assert 0 < float(target[0, 1]) < 1


# ---- the model -------------------------------------------------------------------------------------------------------


def test_every_key_of_the_model_changes_it():
    def shape_of(**changes):
        return {name: tuple(value.shape) for name, value in recipe(model=changes).build(8).state_dict().items()}

    plain = shape_of()
    assert plain["blocks.0.mlp.fc1.weight"] == (64, 16)
    assert plain["pos_embed"] == (1, 17, 16)
    assert shape_of(depth=2).keys() > plain.keys()
    assert shape_of(registers=3)["reg_token"] == (1, 3, 16)
    assert shape_of(mlp_ratio=2)["blocks.0.mlp.fc1.weight"] == (32, 16)
    assert "blocks.0.ls1.gamma" in shape_of(layer_scale=0.1)
    stem = recipe(model={"stem": "conv"}).build(8)
    assert isinstance(stem.patch_embed, ConvStem)
    assert stem(torch.zeros(2, 3, 32, 32)).shape == (2, 8)
    assert recipe(model={"heads": 4}).build(8).blocks[0].attn.num_heads == 4
    assert recipe(model={"depth": 3, "drop_path": 0.2}).build(8).blocks[2].drop_path1.drop_prob == pytest.approx(0.2)


def test_clipped_softmax_is_in_the_attention():
    clip = ClippedSoftmax(2.0)
    rows = torch.tensor([[0.7, 0.2, 0.05, 0.05]])
    assert clip(rows)[0].tolist() == pytest.approx([0.55, 0, 0, 0])
    clipped, plain = (recipe(model={"clipped_softmax": a}).build(8).eval() for a in (2.0, 0.0))
    plain.load_state_dict(clipped.state_dict())
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    attention = clipped.blocks[0].attn
    tokens = clipped.norm(clipped.patch_embed(x))
    q, k, v = attention.qkv(tokens).reshape(2, 16, 3, 2, 8).permute(2, 0, 3, 1, 4)
    by_hand = ((q @ k.mT / 8**0.5).softmax(-1) * (1 + 2 / 16) - 2 / 16).clamp(0, 1) @ v
    expected = attention.proj(by_hand.transpose(1, 2).reshape(2, 16, 16))
    torch.testing.assert_close(attention(tokens), expected)
    assert not torch.allclose(plain(x), clipped(x))


# ---- training --------------------------------------------------------------------------------------------------------

EVERYTHING = {
    "model": {"drop_path": 0.1, "stem": "conv"},
    "images": {"source": SOURCE, "classes": ["0", "1", "2", "3"], "share": 0.9},
    "pretraining": {"images": {"source": "embedded:digits-train?n=64"}, "steps": 4},
    "augmentation": {"crop": 2, "flip": True, "colour": 0.2, "erase": 0.3, "mixup": 0.2, "cutmix": 0.5},
    "optimizer": {"clip_norm": 1.0},
    "averages": {"ema": 0.9, "last": 3, "every": 1},
    "checkpoints": 2,
    "label_smoothing": 0.1,
}


@pytest.mark.parametrize("stop", [3, 4, 7])
def test_a_stopped_training_goes_on_bit_for_bit(tmp_path, stop):
    """Within pretraining, at its end, and after it."""
    one = recipe(**EVERYTHING)
    assert train(one, tmp_path / "whole")
    assert not train(one, tmp_path / "parts", stop=stop)
    assert (tmp_path / "parts" / STATE).exists()
    assert not (tmp_path / "parts" / "weights.safetensors").exists()
    torch.manual_seed(99)  # of no account
    assert train(one, tmp_path / "parts")
    whole, parts = files(tmp_path / "whole"), files(tmp_path / "parts")
    assert set(whole) == {"weights", "ema", "average", "step-000002", "step-000004"}
    assert whole.keys() == parts.keys()
    assert all(same(whole[name], parts[name]) for name in whole)
    logs = [json.loads((tmp_path / name / "log.json").read_text())["log"] for name in ("whole", "parts")]
    assert logs[0] == logs[1]
    assert [line["step"] for line in logs[0]] == [4, 10]
    assert not (tmp_path / "parts" / STATE).exists()


def test_recipes_that_share_their_pretraining_share_its_steps(tmp_path):
    schedule = {"rate": 2e-3, "warmup": 1}
    given = {**EVERYTHING, "pretraining": {**EVERYTHING["pretraining"], "schedule": schedule}}
    first, second = recipe(**given), recipe(**given, schedule={"end": 0.5}, steps=5)
    assert first.pretrained == second.pretrained
    others = [{"seed": 1}, {"augmentation": {"crop": 1}}, {"averages": {"ema": 0.5}}, {"pretraining": {"steps": 3}}]
    others += [{"pretraining": {"schedule": {"rate": 1e-3, "warmup": 1}}}]
    changed = [parse_recipe(merged(tiny(**given), change)).pretrained for change in others]
    assert len({first.pretrained, *changed}) == 1 + len(others)
    shared, steps = tmp_path / "shared", []
    train(first, tmp_path / "first", pretrained=shared)
    train(second, tmp_path / "second", pretrained=shared, report=lambda done, *_: steps.append(done))
    assert steps == [5, 6, 7, 8, 9]
    assert [path.stem for path in shared.iterdir()] == [first.pretrained]
    train(second, tmp_path / "whole")
    whole, parts = files(tmp_path / "whole"), files(tmp_path / "second")
    assert whole.keys() == parts.keys()
    assert all(same(whole[name], parts[name]) for name in whole)
    assert not same(files(tmp_path / "first")["weights"], whole["weights"])
    logs = [json.loads((tmp_path / name / "log.json").read_text())["log"] for name in ("whole", "second")]
    assert logs[0] == logs[1]


def test_a_schedule_of_pretraining_is_its_own():
    own = {"images": {"source": SOURCE}, "steps": 3, "schedule": {"rate": 1e-3, "end": 0.2}}
    told = recipe(schedule={"end": 0.5}, pretraining=own)
    assert [(steps, schedule.end) for _, steps, schedule in told.phases] == [(3, 0.2), (6, 0.5)]
    del own["schedule"]
    told = recipe(schedule={"end": 0.5}, pretraining=own)
    assert [(steps, schedule.end) for _, steps, schedule in told.phases] == [(3, 0.5), (6, 0.5)]
    with pytest.raises(QuantlensError, match="the warmup of 2 steps leaves nothing of 1; shorten it"):
        recipe(pretraining={**own, "steps": 1})


def test_an_interrupted_training_keeps_its_state(tmp_path):
    def interrupt(done, total, loss):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe(), tmp_path / "parts", report=interrupt)
    seen = []
    assert train(recipe(), tmp_path / "parts", report=lambda done, total, loss: seen.append((done, total)))
    assert seen == [(4, 6), (5, 6), (6, 6)]
    train(recipe(), tmp_path / "whole")
    assert same(files(tmp_path / "whole")["weights"], files(tmp_path / "parts")["weights"])
    assert train(recipe(), tmp_path / "whole", report=lambda *_: pytest.fail("it is done"))


def test_a_killed_training_goes_on_from_the_last_state(tmp_path):
    class Killed(Exception):
        pass

    def kill(done, total, loss):
        if done == 5:
            raise Killed

    with pytest.raises(Killed):
        train(recipe(), tmp_path / "parts", report=kill, save_seconds=0.0)
    seen = []
    assert train(recipe(), tmp_path / "parts", report=lambda done, *_: seen.append(done))
    assert seen == [5, 6], "the state was that after four steps: the fifth was told, and killed before it was kept"
    train(recipe(), tmp_path / "whole")
    assert same(files(tmp_path / "whole")["weights"], files(tmp_path / "parts")["weights"])


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"steps": 7},
        {"batch_size": 8},
        {"schedule": {"rate": 2e-3}},
        {"schedule": {"shape": "constant"}},
        {"schedule": {"end": 0.5}},
        {"schedule": {"warmup": 1}},
        {"optimizer": {"name": "lion"}},
        {"optimizer": {"weight_decay": 0.5}},
        {"optimizer": {"clip_norm": 0.1}},
        {"label_smoothing": 0.2},
        {"augmentation": {"crop": 2}},
        {"augmentation": {"flip": True}},
        {"augmentation": {"colour": 0.3}},
        {"augmentation": {"erase": 0.5}},
        {"augmentation": {"mixup": 0.5}},
        {"augmentation": {"cutmix": 0.5}},
        {"images": {"share": 0.5}},
        {"pretraining": {"images": {"source": SOURCE}, "steps": 3}},
    ],
    ids=lambda changes: json.dumps(changes)[:40],
)
def test_every_key_changes_the_weights(changes, tmp_path_factory, plain_weights):
    folder = tmp_path_factory.mktemp("changed")
    train(recipe(**changes), folder)
    assert not same(files(folder)["weights"], plain_weights)


@pytest.fixture(scope="module")
def plain_weights(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("plain")
    train(recipe(), folder)
    return files(folder)["weights"]


def test_averages_are_those_of_the_weights_on_the_way(tmp_path):
    given = recipe(averages={"ema": 0.9, "last": 2, "every": 2}, checkpoints=5)
    train(given, tmp_path)
    found = files(tmp_path)
    way = [found[f"step-{k:06d}"] for k in range(1, 6)] + [found["weights"]]
    expected = {name: (way[3][name] + way[5][name]) / 2 for name in way[0]}
    for name, value in found["average"].items():
        torch.testing.assert_close(value, expected[name])
    name, ema = "head.weight", way[0]["head.weight"]
    for step, weights in enumerate(way[1:], 2):
        decay = min(0.9, 1 - step ** (-2 / 3))
        ema = decay * ema + (1 - decay) * weights[name]
    torch.testing.assert_close(found["ema"][name], ema)


def test_fine_tuning_goes_on_from_pretraining_with_a_new_head(tmp_path):
    given = recipe(**{**EVERYTHING, "augmentation": {}, "model": {}})
    run = Run(given, torch.device("cpu"))
    for _ in range(4):
        run.advance()
    assert (run.model.head.out_features, run.done) == (8, 4)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.advance()
    assert (run.model.head.out_features, run.done, run.step) == (4, 5, 1)
    moved = {
        name: float((value - before[name]).abs().max())
        for name, value in run.model.state_dict().items()
        if "head" not in name
    }
    assert max(moved.values()) <= 2 * rate_at(given.schedule, 0, 6)


@pytest.mark.slow
def test_a_model_learns_and_is_read_from_its_file(tmp_path):
    given = recipe(steps=100, schedule={"rate": 5e-3, "warmup": 5}, model={"width": 32})
    train(given, tmp_path)
    log = json.loads((tmp_path / "log.json").read_text())["log"]
    assert [line["step"] for line in log] == [50, 100]
    assert log[1]["loss"] < 0.95 * log[0]["loss"]
    model, again, classes = trained(tmp_path / "weights.safetensors")
    assert again.to_dict() == given.to_dict()
    assert classes == [str(digit) for digit in range(8)]
    images = load_images(SOURCE, given.preprocess)
    right = model(images.tensor()).argmax(1).numpy() == images.labels
    assert right.mean() > 0.35
    assert not model.training


def test_what_lies_in_the_folder_must_be_of_the_same_recipe(tmp_path):
    train(recipe(), tmp_path, stop=2)
    with pytest.raises(QuantlensError, match="cannot go on: it is of another recipe"):
        train(recipe(seed=1), tmp_path)
    (tmp_path / STATE).write_bytes(b"nothing")
    with pytest.raises(StorageError, match=r"state\.pt cannot be read: delete it"):
        train(recipe(), tmp_path)
    (tmp_path / STATE).unlink()
    train(recipe(), tmp_path)
    with pytest.raises(QuantlensError, match="is of another recipe; take another folder"):
        train(recipe(seed=1), tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(b"nothing")
    with pytest.raises(StorageError, match="holds no weights that a recipe"):
        trained(tmp_path / "weights.safetensors")


def test_a_loss_that_is_not_finite_is_told(tmp_path):
    with pytest.raises(QuantlensError, match="tiny: the loss is not finite after 6 steps; lower the rate"):
        train(recipe(schedule={"rate": 1e30, "warmup": 0}, optimizer={"name": "sgd"}), tmp_path)


def test_the_command_follows_a_recipe(tmp_path, capsys, monkeypatch):
    import yaml

    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in tiny().items() if k != "name"}))
    main([str(path), "--out", str(tmp_path / "run"), "--seed", "3"])
    told = capsys.readouterr()
    assert told.out.strip() == str(tmp_path / "run" / "weights.safetensors")
    assert "6/6" in told.err
    _, found, _ = trained(tmp_path / "run" / "weights.safetensors")
    assert (found.name, found.seed) == ("mine", 3)
    monkeypatch.chdir(tmp_path)
    main([str(path)])
    assert (tmp_path / "mine" / "weights.safetensors").exists()
    capsys.readouterr()
    path.write_text("steps: 3")
    with pytest.raises(SystemExit, match="2"):
        main([str(path)])
    assert capsys.readouterr().err.strip().startswith(f"error: recipe {path}: the key `model` is missing")


def test_rates_end_where_they_should():
    assert rate_at(Schedule(rate=1.0), 999, 1000) < 1e-5
    assert math.isclose(rate_at(Schedule(rate=1.0, end=0.2), 99_999, 100_000), 0.2, rel_tol=1e-4)
