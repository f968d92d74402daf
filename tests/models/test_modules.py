"""A person's own module: out of its wrappers, in float32, at its own size and channels."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import timm
import torch
from torch import nn

import quantlens as ql
from quantlens.data import Preprocess
from quantlens.errors import BadWeightsError, QuantlensError, QuantlensWarning, UnsupportedError

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 4}


def vit(**settings):
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(**{**TINY, **settings}).eval()


class Small(nn.Module):
    """Any size of image, one normalised convolution, ``classes`` logits."""

    def __init__(self, classes: int = 5, channels: int = 3, norm=lambda layer: layer):
        super().__init__()
        self.stem = norm(nn.Conv2d(channels, 8, 4, 4))
        self.head = norm(nn.Linear(8, classes))

    def forward(self, x):
        return self.head(self.stem(x).relu().mean((2, 3)))


def images(channels: int = 3, side: int = 32):
    return torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(1))


# ---- size ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("deit_tiny_distilled_patch16_224", {"img_size": 32, "depth": 1}),
        ("swin_tiny_patch4_window7_224", {"img_size": 96, "embed_dim": 24, "depths": (1, 1, 1, 1)}),
        ("coatnet_0_rw_224", {"img_size": 64}),
    ],
)
def test_a_module_of_timm_keeps_its_own_size(name, settings):
    module = timm.create_model(name, num_classes=3, **settings).eval()
    model = ql.load_model(module)
    side = settings["img_size"]
    assert model.preprocess.input_size == (3, side, side)
    assert model.preprocess.mean == tuple(module.pretrained_cfg["mean"])
    assert model.preprocess.crop_pct == module.pretrained_cfg["crop_pct"]
    x = images(side=side)
    torch.testing.assert_close(model(x), module(x))


def test_the_size_of_a_module_without_configuration_is_found():
    class Fixed(Small):
        def forward(self, x):
            assert x.shape[-1] == 64
            return super().forward(x)

    with pytest.warns(QuantlensWarning, match="64×64"):
        assert ql.load_model(Fixed()).preprocess.input_size == (3, 64, 64)


def test_what_the_person_says_counts():
    own = Preprocess((3, 48, 48), mean=(0.5,) * 3, std=(0.25,) * 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", QuantlensWarning)
        assert ql.load_model(Small(), preprocess=own).preprocess == own
    with pytest.warns(QuantlensWarning, match=r"assumed: 48×48 pixels, mean \(0\.485"):
        assert ql.load_model(Small(), input_size=(3, 48, 48)).preprocess.input_size == (3, 48, 48)
    with pytest.raises(QuantlensError, match="differ; give one"):
        ql.load_model(Small(), preprocess=own, input_size=(3, 32, 32))
    with pytest.raises(QuantlensError, match="write \\(channels"):
        ql.load_model(Small(), input_size=(3, 32, "x"))


def test_no_argument_is_left_out_without_a_word():
    for asked in ({"num_classes": 3}, {"weights": "random"}):
        with pytest.raises(QuantlensError):
            ql.load_model(Small(), **asked)
    for asked in ({"num_classes": 3}, {"input_size": (3, 64, 64)}, {"name": "mine"}):
        with pytest.raises(QuantlensError, match="leave it out"):
            ql.load_model("digits-vit", **asked)
    with pytest.raises(QuantlensError, match="unknown task 'classfy'; did you mean 'classify'"):
        ql.load_model("digits-vit", task="classfy")
    with pytest.raises(QuantlensError, match="not int"):
        ql.load_model(3)


def test_tensors_need_no_preprocessing():
    with warnings.catch_warnings():
        warnings.simplefilter("error", QuantlensWarning)
        assert ql.quantize(Small(), images()).preprocess.input_size == (3, 32, 32)


# ---- channels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels(channels):
    module = vit(in_chans=channels)
    model = ql.load_model(module)
    assert model.preprocess.input_size == (channels, 32, 32)
    assert len(model.preprocess.mean) == channels
    x = images(channels)
    quantized = ql.quantize(module, x, bits="W8A8")
    error = (quantized(x) - module(x)).norm() / module(x).norm()
    assert error < 0.1


def test_pictures_for_other_channels():
    from PIL import Image

    picture = Image.new("RGB", (40, 40), (255, 0, 0))
    grey = ql.load_model(vit(in_chans=1)).preprocess
    assert grey.resize_crop(picture).shape == (1, 32, 32)
    assert set(grey.resize_crop(picture).ravel()) == {76}  # what red is in grey, by ITU-R 601
    with pytest.raises(UnsupportedError, match="4 channels; pictures have 3"):
        ql.load_model(vit(in_chans=4)).preprocess(picture)


# ---- number types ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["half", "bfloat16", "double"])
def test_other_precisions_are_computed_in_float32(kind):
    module = getattr(vit(), kind)()
    with pytest.warns(QuantlensWarning, match="quantlens computes in float32"):
        model = ql.load_model(module)
    assert {t.dtype for t in model.parameters()} == {torch.float32}
    assert next(module.parameters()).dtype != torch.float32, "the caller's module is left alone"
    torch.testing.assert_close(model(images()), copy.deepcopy(module).float()(images()))


# ---- what cannot be copied as it is ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "norm",
    [
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        lambda layer: nn.utils.prune.l1_unstructured(layer, "weight", 0.5),
    ],
)
def test_computed_weights_become_plain(norm):
    module = Small(norm=norm)
    module(images()).sum().backward()  # a weight of the hooks is now the outcome of an operation
    module.eval()
    expected = module(images()).detach()
    model = ql.load_model(module, input_size=(3, 32, 32))
    assert torch.equal(model(images()), expected)
    assert set(model.module.state_dict()) == {f"{n}.{k}" for n in ("stem", "head") for k in ("weight", "bias")}
    assert torch.equal(module(images()), expected), "the caller's module still works"


def test_tensors_kept_from_a_forward_with_gradients():
    module = timm.create_model("levit_128s", img_size=64, num_classes=3).eval()
    module(images(side=64)).sum().backward()
    model = ql.load_model(module)
    torch.testing.assert_close(model(images(side=64)), module(images(side=64)))
    assert model.preprocess.input_size == (3, 64, 64)


# ---- wrappers --------------------------------------------------------------------------------------------------------


def _compiled(module):
    module = copy.deepcopy(module)
    module.compile()
    return module


def _partly_compiled(module):
    module = copy.deepcopy(module)
    module.blocks[0] = torch.compile(module.blocks[0])
    return module


@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, torch.compile, _compiled, _partly_compiled, torch.optim.swa_utils.AveragedModel, ql.load_model],
)
def test_wrappers_come_off(wrap):
    module = vit()
    model = ql.load_model(wrap(module))
    assert set(model.module.state_dict()) == set(module.state_dict())
    assert (type(model.module), model.preprocess.input_size) == (type(module), (3, 32, 32))
    assert torch.equal(model(images()), module(images()))


def test_what_has_no_float_weights_is_refused():
    module = vit()
    with pytest.raises(UnsupportedError, match="TorchScript"):
        ql.load_model(torch.jit.trace(Small(), images()))
    with pytest.raises(UnsupportedError, match="Sequential: 0 is TorchScript"):
        ql.load_model(nn.Sequential(torch.jit.script(nn.Conv2d(3, 2, 4)), nn.Flatten()))
    with torch.device("meta"):
        empty = Small()
    with pytest.raises(UnsupportedError, match="meta device"):
        ql.load_model(empty)
    with pytest.raises(UnsupportedError, match="no shape yet"):
        ql.load_model(nn.Sequential(nn.Flatten(), nn.LazyLinear(3)))
    with pytest.raises(UnsupportedError, match=r"W8A8.* float model is wanted"):
        ql.load_model(ql.quantize(module, images()))
    packed = Small()
    packed.codes = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedError, match=r"codes is a torch\.int8.*`evaluate` and `compare` take this one"):
        ql.load_model(packed)
    with pytest.raises(UnsupportedError, match="torch quantized '0'"):
        ql.load_model(nn.Sequential(torch.ao.nn.quantized.dynamic.Linear(3, 3)))
    holder = Small()
    holder.lock = threading.Lock()
    with pytest.raises(UnsupportedError, match="cannot be copied"):
        ql.load_model(holder)


# ---- task ------------------------------------------------------------------------------------------------------------


def test_tasks():
    own = {"input_size": (3, 32, 32)}
    assert ql.load_model(vit()).task == "classify"
    assert ql.load_model(vit(num_classes=0)).task == "features"
    assert ql.load_model(vit(num_classes=1)).task == "binary"
    assert ql.load_model(Small(1), **own).task == "binary"
    assert ql.load_model(Small(5), **own).task == "classify"
    assert ql.load_model(Small(5), task="multilabel", **own).task == "multilabel"
    assert ql.load_model(nn.Conv2d(3, 8, 4), **own).task == "features"


def test_the_task_is_kept_with_the_checkpoint(tmp_path):
    quantized = ql.quantize(ql.load_model(vit(), task="multilabel"), images(), bits="W8A8", method="minmax")
    quantized.save(tmp_path / "q.safetensors")
    assert ql.load(tmp_path / "q.safetensors").task == "multilabel"


@pytest.mark.parametrize(("bound", "refused"), [(float("inf"), False), (float("nan"), True)])
def test_a_bound_may_be_infinite(bound, refused):
    """Gemma's clipped layers hold bounds that are open until they are measured."""

    class Clipped(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)
            self.register_buffer("most", torch.tensor(bound))

        def forward(self, images):
            return self.layer(images.mean((2, 3)).clamp(max=self.most))

    if refused:
        with pytest.raises(BadWeightsError, match="'most' are NaN"):
            ql.load_model(Clipped())
        return
    model = ql.load_model(Clipped(), input_size=(3, 8, 8))
    assert torch.equal(model.module.most, torch.tensor(bound))
