from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import quantlens as ql
from quantlens.errors import BadWeightsError, QuantlensError, UnknownNameError

NAME = "vit_tiny_patch16_224"
SMALL = {"input_size": (3, 32, 32), "num_classes": 7}


@pytest.fixture(scope="module")
def network():
    return ql.load_model(NAME, seed=5, **SMALL).module


@pytest.fixture
def state(network):
    return {k: v.clone() for k, v in network.state_dict().items()}


def _same(model, network):
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x), network(x))


def test_features_leave_the_classifier_out(state, network, tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(state, path)
    x = torch.randn(2, 3, 32, 32)
    model = ql.load_model(NAME, path, input_size=(3, 32, 32), task="features")
    assert torch.equal(model(x), network.forward_head(network.forward_features(x), pre_logits=True))
    shipped = ql.load_model("digits-vit", task="features")
    assert (shipped(x).shape, shipped.task, shipped.class_names) == ((2, 64), "features", None)


def test_safetensors(network, state, tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(state, path)
    model = ql.load_model(NAME, path, **SMALL)
    _same(model, network)
    assert model.checkpoint_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert model.checkpoint == "w.safetensors"
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
@pytest.mark.parametrize("wrap", [None, "state_dict", "model"])
def test_torch_files(network, state, tmp_path, suffix, wrap):
    path = tmp_path / f"w{suffix}"
    torch.save({wrap: {f"module.{k}": v for k, v in state.items()}, "epoch": 3} if wrap else state, path)
    _same(ql.load_model(NAME, path, **SMALL), network)


def test_augreg_npz(tmp_path):
    """Google's JAX names and layouts, written from a model and read back."""
    network = ql.load_model(NAME, seed=9, **SMALL).module
    path = tmp_path / "augreg.npz"
    np.savez(path, **_jax_names(network))
    model = ql.load_model(NAME, path, **SMALL)
    torch.testing.assert_close(model(torch.ones(1, 3, 32, 32)), network(torch.ones(1, 3, 32, 32)), rtol=1e-5, atol=1e-5)
    assert model.checkpoint_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_every_parameter_comes_from_the_npz(tmp_path):
    """A classifier of other classes sets their number; what the file does not hold is not left random."""
    size = {"input_size": (3, 32, 32)}
    network = ql.load_model(NAME, seed=9, **SMALL).module
    arrays, image, path = _jax_names(network), torch.ones(1, 3, 32, 32), tmp_path / "w.npz"
    np.savez(path, **arrays)
    for found in (ql.load_model(NAME, path, **size), ql.load_model(ql.load_model(NAME, **SMALL).module, path)):
        torch.testing.assert_close(found(image), network(image), rtol=1e-5, atol=1e-5)
    with pytest.raises(BadWeightsError, match=r"no values for 'head\.weight', 'head\.bias'"):
        ql.load_model(NAME, path, num_classes=5, **size)
    np.savez(path, **{k: v for k, v in arrays.items() if "head/" not in k})
    with pytest.raises(BadWeightsError, match=r"no values for 'head\.weight'"):
        ql.load_model(NAME, path, **size)


def _jax_names(vit) -> dict[str, np.ndarray]:
    out = {
        "embedding/kernel": vit.patch_embed.proj.weight.permute(2, 3, 1, 0),
        "embedding/bias": vit.patch_embed.proj.bias,
        "cls": vit.cls_token,
        "Transformer/posembed_input/pos_embedding": vit.pos_embed,
        "Transformer/encoder_norm/scale": vit.norm.weight,
        "Transformer/encoder_norm/bias": vit.norm.bias,
        "head/kernel": vit.head.weight.t(),
        "head/bias": vit.head.bias,
    }
    for i, block in enumerate(vit.blocks):
        root = f"Transformer/encoderblock_{i}/"
        heads, dim = block.attn.num_heads, vit.embed_dim
        attention = root + "MultiHeadDotProductAttention_1/"
        for j, part in enumerate(("query", "key", "value")):
            weight, bias = block.attn.qkv.weight.chunk(3)[j], block.attn.qkv.bias.chunk(3)[j]
            out[f"{attention}{part}/kernel"] = weight.t().reshape(dim, heads, -1)
            out[f"{attention}{part}/bias"] = bias.reshape(heads, -1)
        out[f"{attention}out/kernel"] = block.attn.proj.weight.t().reshape(heads, -1, dim)
        out[f"{attention}out/bias"] = block.attn.proj.bias
        for norm, name in ((block.norm1, "LayerNorm_0"), (block.norm2, "LayerNorm_2")):
            out[f"{root}{name}/scale"], out[f"{root}{name}/bias"] = norm.weight, norm.bias
        for layer, name in ((block.mlp.fc1, "Dense_0"), (block.mlp.fc2, "Dense_1")):
            mlp = f"{root}MlpBlock_3/{name}/"
            out[f"{mlp}kernel"], out[f"{mlp}bias"] = layer.weight.t(), layer.bias
    return {k: v.detach().numpy() for k, v in out.items()}


def test_the_number_of_classes_comes_from_the_file(state, tmp_path):
    save_file(state, tmp_path / "w.safetensors")
    model = ql.load_model(NAME, tmp_path / "w.safetensors", input_size=(3, 32, 32))
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 7)


def test_pickles_that_run_code_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(BadWeightsError, match="tensors only"):
        ql.load_model(NAME, tmp_path / "evil.pth", **SMALL)


def test_weights_that_do_not_fit_say_why(state, tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({k: v for k, v in state.items() if "blocks.3" not in k} | {"extra.weight": torch.zeros(1)}, path)
    with pytest.raises(BadWeightsError, match=r"12 missing \(blocks\.3.*1 unknown \(extra\.weight\)"):
        ql.load_model(NAME, path, **SMALL)
    save_file(state | {"blocks.0.attn.qkv.weight": torch.zeros(9, 192)}, path)
    with pytest.raises(BadWeightsError, match=r"another shape \(blocks\.0\.attn\.qkv\.weight: file \(9, 192\)"):
        ql.load_model(NAME, path, **SMALL)


def test_nan_in_weights_is_named(state, tmp_path):
    state["blocks.2.mlp.fc1.weight"][0, 3] = float("nan")
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(BadWeightsError, match=r"1 of \d+ values of '.*blocks\.2\.mlp\.fc1\.weight'"):
        ql.load_model(NAME, tmp_path / "w.safetensors", **SMALL)


@pytest.mark.parametrize(
    ("content", "suffix", "message"),
    [
        (None, ".safetensors", "no weights file"),
        (b"junk", ".safetensors", "cannot be read"),
        (b"junk", ".txt", "unknown ending"),
        (b"junk", ".pth", "cannot be read"),
        (b"junk", ".npz", "cannot be read"),
    ],
)
def test_files_that_are_no_weights(tmp_path, content, suffix, message):
    path = tmp_path / f"w{suffix}"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadWeightsError, match=message):
        ql.load_model(NAME, path, **SMALL)


def test_unknown_names_offer_close_ones():
    with pytest.raises(UnknownNameError, match="deit_tiny_patch16_224"):
        ql.load_model("diet_tiny_patch16_224")
    with pytest.raises(UnknownNameError, match="augreg_in21k_ft_in1k"):
        ql.load_model("vit_tiny_patch16_224.augreg_in21k_ft_in2k")


def test_pretrained_without_a_network_says_what_to_do(monkeypatch):
    import timm

    def offline(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(BadWeightsError, match="--weights FILE"):
        ql.load_model(NAME, "pretrained")


def test_pretrained_goes_through_timm(monkeypatch):
    """The hub path is timm's own: it is asked for pretrained weights, under the tag given."""
    import timm

    real, asked = timm.create_model, []

    def fake(name, pretrained=False, **kwargs):
        asked.append((name, pretrained))
        return real(name, pretrained=False, **kwargs)

    monkeypatch.setattr(timm, "create_model", fake)
    model = ql.load_model("vit_tiny_patch16_224.augreg_in21k_ft_in1k", "pretrained")
    assert asked == [("vit_tiny_patch16_224.augreg_in21k_ft_in1k", True)]
    assert model.checkpoint == "pretrained"
    assert len(model.checkpoint_sha256) == 64


def test_the_models_own_preprocessing_is_used():
    vit, deit = ql.load_model("vit_tiny_patch16_224").preprocess, ql.load_model("deit_tiny_patch16_224").preprocess
    assert tuple(vit.mean) == tuple(vit.std) == (0.5, 0.5, 0.5)
    assert tuple(deit.mean) == (0.485, 0.456, 0.406)
    assert (deit.interpolation, deit.crop_pct, tuple(deit.input_size)) == ("bicubic", 0.9, (3, 224, 224))


def test_random_weights_follow_the_seed():
    a, b, c = (ql.load_model(NAME, seed=s, **SMALL).checkpoint_sha256 for s in (1, 1, 2))
    assert a == b != c


def test_a_users_module(pictures):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3072, 5)

        def forward(self, x):
            return self.fc(x.flatten(1))

    net = Net().train()
    model = ql.load_model(net, input_size=(3, 32, 32))
    assert model.name == "Net"
    assert net.training, "the caller's module is left alone"
    assert all(p.requires_grad for p in net.parameters())
    assert torch.equal(model(pictures), net(pictures))
    assert ql.quantize(net, pictures, bits="W8A8")(pictures).shape == (8, 5)
    with pytest.raises(QuantlensError, match="timm name"):
        ql.load_model(net, "pretrained")


def test_the_shipped_model():
    model = ql.load_model("digits-vit")
    assert model.checkpoint_sha256 == hashlib.sha256(Path(model.weights_path).read_bytes()).hexdigest()
    assert model(torch.zeros(1, *model.preprocess.input_size)).shape[1] == len(model.class_names)


@pytest.mark.real
@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "vit_tiny_patch16_224.augreg_in21k_ft_in1k"])
def test_real_weights(shared_data, name):
    model = ql.load_model(name, shared_data / "weights" / f"{name}.safetensors")
    assert model(torch.zeros(1, 3, 224, 224)).shape == (1, 1000)
    assert model.class_names[0].startswith("tench")
