"""Checkpoint files as training code writes them."""

from __future__ import annotations

import argparse
import collections
import datetime
import enum
import json
import os
import pathlib
import re
import warnings
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import quantlens as ql
from quantlens.errors import BadWeightsError, QuantlensWarning, UnsupportedError
from quantlens.models import read_state

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def vit(seed: int = 0, **settings):
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(seed)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 4}
    return VisionTransformer(**{**size, **settings}).eval()


@pytest.fixture(scope="module")
def trained():
    return vit(7)


def loaded(path, module=None):
    """(a fresh module with the weights of a file, what was said of them)."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = ql.load_model(vit() if module is None else module, path, input_size=(3, 32, 32))
    texts = [str(w.message) for w in told if w.category is QuantlensWarning]
    return model, "; ".join(text for text in texts if "images are prepared" not in text)


class Settings(dict):
    """As configurations of other packages are: dictionaries that are none."""


class Meter:
    def __init__(self):
        self.count, self.kind = 3, Kind.LAST


class Kind(enum.Enum):
    LAST = 1


def under(prefix: str, state):
    return {f"{prefix}{key}": value for key, value in state.items()}


def averaged(state):
    return {key: value * 0 for key, value in state.items()}


LAYOUTS = {
    "args": (
        lambda s: {"model": s, "args": argparse.Namespace(lr=1, out=pathlib.Path("/x")), "epoch": 3},
        "took 'model', not 'args', 'epoch'",
    ),
    "numpy": (
        lambda s: {
            "state_dict": s,
            "best": np.float64(3.5),
            "curve": np.zeros(3),
            "when": datetime.datetime(2026, 1, 1),
            "log": collections.defaultdict(list, {"loss": [1.0]}),
            "last": collections.deque([1, 2], maxlen=3),
        },
        "took 'state_dict'",
    ),
    "own classes": (lambda s: {"net": s, "cfg": Settings(lr=1), "meter": Meter()}, "took 'net', not 'cfg', 'meter'"),
    "lightning": (
        lambda s: {
            "state_dict": {**under("model.", s), "loss.weight": torch.zeros(5)},
            "hyper_parameters": Settings(lr=1),
            "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(9)}}}],
        },
        r"left out what is not the model's \(loss\.weight\)",
    ),
    "one foreign key": (lambda s: {**under("module.", s), "n_averaged": torch.tensor(3)}, "n_averaged"),
    "prefix of a part": (
        lambda s: {
            **under("backbone.", {k: v for k, v in s.items() if "head" not in k}),
            **{k: v for k, v in s.items() if "head" in k},
        },
        "^$",
    ),
    "two prefixes": (lambda s: under("_orig_mod.module.net.", s), "^$"),
    "teacher": (
        lambda s: {"student": under("module.", averaged(s)), "teacher": under("backbone.", s)},
        "took 'teacher'",
    ),
    "averaged": (lambda s: {"state_dict": averaged(s), "state_dict_ema": s}, r"'state_dict_ema' \(averaged weights\)"),
    "no average kept": (lambda s: {"state_dict": s, "state_dict_ema": None}, "took 'state_dict'"),
    "other names": (
        lambda s: {"run": {"weights": s}, "optimizer": {"state": {"a": averaged(s), "b": averaged(s)}}},
        "took 'run'",
    ),
    "list": (lambda s: list(s.values()), "a list of tensors, taken in the model's order"),
    "arrays": (lambda s: {k: v.numpy() for k, v in s.items()}, "^$"),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_training_code(trained, tmp_path, layout, zipped):
    make, said = LAYOUTS[layout]
    path = tmp_path / "model_best.pth.tar"
    torch.save(make(trained.state_dict()), path, _use_new_zipfile_serialization=zipped)
    model, told = loaded(path)
    torch.testing.assert_close(model(IMAGES), trained(IMAGES))
    assert not told or str(path) in told
    assert re.search(said, told), told


def test_a_whole_module_gives_its_tensors_and_runs_nothing(trained, tmp_path):
    torch.save({"model": trained, "epoch": 1}, tmp_path / "w.ckpt")
    model, told = loaded(tmp_path / "w.ckpt")
    assert torch.equal(model(IMAGES), trained(IMAGES))
    assert "a whole module" in told


@pytest.mark.parametrize("function", [os.system, eval, print, getattr, __import__])
def test_nothing_in_a_file_is_run(trained, tmp_path, function):
    class Evil:
        def __reduce__(self):
            return function, ("raise SystemExit",)

    for content in ({"state_dict": trained.state_dict(), "x": Evil()}, Evil(), [Evil()]):
        for zipped in (True, False):
            torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
            with pytest.raises(BadWeightsError, match="tensors only"):
                read_state(tmp_path / "w.pth")


def test_code_of_other_packages_is_not_run(trained, tmp_path, monkeypatch):
    import timm

    class Asked:
        def __reduce__(self):
            return timm.list_models, ("vit*",)

    torch.save({"model": trained.state_dict(), "x": Asked()}, tmp_path / "w.pth")
    monkeypatch.setattr("timm.models._registry.list_models", lambda *args: pytest.fail("executed"))
    model, _ = loaded(tmp_path / "w.pth")
    assert torch.equal(model(IMAGES), trained(IMAGES))


@pytest.mark.parametrize(
    "content", [{"optimizer": {"state": {0: {"m": torch.zeros(3)}}}}, 3, None, [1], {}, torch.ones(2)]
)
def test_a_file_without_weights(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(BadWeightsError, match="holds no state_dict"):
        read_state(tmp_path / "w.pth")


def test_messages_are_whole_and_plain(tmp_path):
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "w.pt")
    for name, content in (("w.pt", None), ("a.pth", b"junk"), ("b.pth", b"PK\x03\x04junk"), ("c.npz", b"junk")):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(BadWeightsError, match="cannot be read as weights") as caught:
            read_state(tmp_path / name)
        assert "\x1b" not in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_checkpoint_in_several_files(trained, tmp_path):
    state = trained.state_dict()
    names = list(state)
    for i, part in enumerate((names[:5], names[5:])):
        save_file({k: state[k] for k in part}, tmp_path / f"model-{i}.safetensors")
    index = {"weight_map": {k: f"model-{int(i >= 5)}.safetensors" for i, k in enumerate(names)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for given in (tmp_path, tmp_path / "model.safetensors.index.json"):
        model, _ = loaded(given)
        assert torch.equal(model(IMAGES), trained(IMAGES))
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(BadWeightsError, match=r"names the file model-1\.safetensors"):
        read_state(tmp_path)
    with pytest.raises(BadWeightsError, match="holds none of"):
        read_state(tmp_path.parent)


def test_a_file_of_another_image_size(tmp_path):
    """As timm's own loading resamples it; the same size of classifier, tokens of the model's own grid."""
    from timm.layers import resample_abs_pos_embed

    larger = vit(3, img_size=64)
    torch.save({"model": larger.state_dict()}, tmp_path / "w.pth")
    model, told = loaded(tmp_path / "w.pth")
    expected = resample_abs_pos_embed(larger.pos_embed, [4, 4], num_prefix_tokens=1)
    torch.testing.assert_close(model.module.pos_embed, expected)
    assert "resampled 1 position embedding" in told
    assert "(1, 65, 32) to (1, 17, 32)" in told


def test_relative_positions_of_another_size(tmp_path):
    import timm

    def swin(side, window):
        settings = {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "num_classes": 3}
        return timm.create_model("swin_tiny_patch4_window7_224", img_size=side, window_size=window, **settings).eval()

    torch.save(swin(64, 8).state_dict(), tmp_path / "w.pth")
    with pytest.warns(QuantlensWarning, match="resampled 2 position embeddings"):
        model = ql.load_model(swin(32, 4), tmp_path / "w.pth")
    assert model(IMAGES).shape == (2, 3)


def test_a_body_takes_a_classifiers_file(trained, tmp_path):
    torch.save(trained.state_dict(), tmp_path / "w.pth")
    model, told = loaded(tmp_path / "w.pth", vit(num_classes=0))
    assert "left the classifier out (head.weight" in told
    torch.testing.assert_close(model(IMAGES), trained.forward_head(trained.forward_features(IMAGES), pre_logits=True))


def test_a_weight_that_is_missing_is_still_refused(trained, tmp_path):
    state = {k: v for k, v in trained.state_dict().items() if "fc1" not in k}
    torch.save({"model": under("module.", state), "args": argparse.Namespace()}, tmp_path / "w.pth")
    with pytest.raises(BadWeightsError, match=r"2 missing \(blocks\.0\.mlp\.fc1\.weight"):
        loaded(tmp_path / "w.pth")


def _beside(state):
    return {f"module.{'' if k.startswith('head.') else 'backbone.'}{k}": v for k, v in state.items()}


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (_beside, ""),
        (lambda s: {k.replace("blocks.0.", "blocks.0._orig_mod."): v for k, v in s.items()}, ""),
        (lambda s: {"params": {k: v * 0 for k, v in s.items()}, "params_ema": s}, "averaged"),
        (
            lambda s: {f"model.{k}": v * 0 for k, v in s.items()} | {f"ema_model.module.{k}": v for k, v in s.items()},
            r"left out .*model\.cls_token",
        ),
        (
            lambda s: s | {"decoder_blocks.0.weight": torch.ones(2), "mask_token": torch.ones(1)},
            "left out .*mask_token",
        ),
        (lambda s: s | {"head_dist.weight": torch.ones(4, 32)}, r"left out .*head_dist"),
        (lambda s: s | {"head.weight": s["head.weight"].to_sparse()}, ""),
        (lambda s: {"model": averaged(s), "ema_model": s, "ema_decay": 0.9}, r"'ema_model' \(averaged weights\)"),
        (lambda s: {"shadow_params": list(s.values()), "decay": 0.9}, "'shadow_params' .*; a list of tensors"),
        (
            lambda s: {("" if "head." in k else "backbone.") + k.replace("head.", "head.fc."): v for k, v in s.items()},
            r"took head\.fc\.weight, head\.fc\.bias as head\.weight, head\.bias",
        ),
        (lambda s: s | {"lm_head.weight": torch.ones(4, 32), "masked_embed": torch.ones(1, 32)}, "left out .*lm_head"),
    ],
)
def test_more_layouts(trained, tmp_path, layout, said):
    torch.save(layout(trained.state_dict()), tmp_path / "w.pth")
    model, told = loaded(tmp_path / "w.pth")
    assert torch.equal(model(IMAGES), trained(IMAGES))
    assert re.search(said, told)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: (w * 10).to(torch.int8), r"1 that hold no weights \(head.weight: int8\)"),
        (lambda w: w.to(torch.complex64), r"head.weight: complex64"),
        (lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), "'head.weight' is a quantized tensor"),
        (None, "a body without a classifier"),
        (lambda w: torch.ones(9, 32), r"file \(9, 32\), model \(4, 32\)\)\. Its classifier has other classes"),
    ],
)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_what_holds_no_weights(trained, tmp_path, change, said):
    state = trained.state_dict()
    heads = {"head.weight": change(state["head.weight"])} if change else {}
    body = {k: v for k, v in state.items() if change or not k.startswith("head.")}
    torch.save(body | heads, tmp_path / "w.pth")
    with pytest.raises(BadWeightsError, match=said):
        loaded(tmp_path / "w.pth")


def test_another_block_is_still_unknown(trained, tmp_path):
    torch.save(trained.state_dict() | {"blocks.1.norm1.weight": torch.ones(32)}, tmp_path / "w.pth")
    with pytest.raises(BadWeightsError, match="1 unknown"):
        loaded(tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is empty"),
        (b"  <!DOCTYPE html><html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"\x1f\x8b\x08\x00", "gzip"),
        (None, "an archive of other files"),
        (b"PK\x03\x04 cut off", "an archive without its end"),
        (b"Entry not found", "text, which begins with 'Entry not found'"),
        (b"GGUF\x03\x00", "a GGUF file"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_downloads_that_are_no_weights(tmp_path, content, said, suffix):
    path = tmp_path / f"w{suffix}"
    if content is None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("model.pth", b"x")
    else:
        path.write_bytes(content)
    with pytest.raises(BadWeightsError, match=said):
        read_state(path)


@pytest.mark.parametrize("name", ["w.safetensors", "w.bin", "w.PTH", "w.npz", "w.pkl"])
def test_what_a_file_holds_counts_not_its_name(trained, tmp_path, name):
    state = trained.state_dict()
    np.savez(tmp_path / "a.npz", **{k: v.numpy() for k, v in state.items()})
    save_file(state, tmp_path / "a.safetensors", metadata={"format": "pt"})
    torch.save(state, tmp_path / "a.pt")
    for written in ("a.npz", "a.safetensors", "a.pt"):
        (tmp_path / name).write_bytes((tmp_path / written).read_bytes())
        assert torch.equal(loaded(tmp_path / name)[0](IMAGES), trained(IMAGES))


def test_programs_and_quantized_checkpoints_are_no_weights(trained, tmp_path):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), str(tmp_path / "script.pt"))
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),))
    torch.export.save(program, str(tmp_path / "program.pt2"))
    save_file({"a": torch.ones(1)}, tmp_path / "q.safetensors", metadata={"format": "quantlens"})
    for name, said in (("script.pt", "TorchScript"), ("program.pt2", "torch.export"), ("q.safetensors", "quantized")):
        with pytest.raises(UnsupportedError, match=f"{said}.* opens it"):
            ql.load_model(str(tmp_path / name))
        with pytest.raises(BadWeightsError, match=said if name != "program.pt2" else "unknown ending"):
            loaded(tmp_path / name)
