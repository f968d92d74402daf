"""Whatever a person brings is taken, or refused in one sentence: drawn models, files, calibration images, texts.

Every drawn case that is valid counts; at most one in twenty may be refused, and what is accepted is compared with
the module it came from.
"""

from __future__ import annotations

import tempfile
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import quantlens as ql
from fuzzed import drawn_models, layouts, made, pictures
from quantlens.api import read_bits
from quantlens.calibration import Calibration
from quantlens.data import Preprocess
from quantlens.data.sources import open_source
from quantlens.errors import QuantlensError

REFUSED = 0.05
"""Largest share of valid cases that may be refused."""


def cases(count: int):
    """Hypothesis with ``count`` examples, without a limit of time for one."""
    return settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))


class Tally:
    """Counts what was drawn and what was refused."""

    def __init__(self) -> None:
        self.drawn, self.refused = 0, Counter()

    def __call__(self, call):
        """What ``call`` gives; None where it is refused by name. Any other exception is the test's."""
        self.drawn += 1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return call()
        except QuantlensError as error:
            said = str(error)
        self.refused[said[:150]] += 1
        assert "\n" not in said.strip(), f"more than a sentence: {said}"
        return None

    def check(self, least: int) -> None:
        assert self.drawn >= least, f"only {self.drawn} cases drawn"
        share = sum(self.refused.values()) / self.drawn
        assert share <= REFUSED, f"{share:.0%} of {self.drawn} valid cases refused: {self.refused.most_common(8)}"


def tensor_of(output):
    """The logits of what a model returned."""
    if isinstance(output, dict):
        return output["logits"]
    return output[0] if isinstance(output, tuple) else output


def ratio(expected, got) -> float:
    """Largest difference over the largest value."""
    return float((expected - got).abs().max() / expected.abs().max().clamp_min(1e-6))


# ---- models ----------------------------------------------------------------------------------------------------------

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


def wrapped(module: nn.Module, wrapper: str) -> nn.Module:
    """The module as a person may hold it: the same function."""
    if wrapper == "parallel":
        return nn.DataParallel(module)
    if wrapper == "compiled":
        return torch.compile(module)
    if wrapper == "sequential":
        return nn.Sequential(module)
    if wrapper == "training":
        return module.train()
    if wrapper == "weight norm":
        name = next(n for n, p in module.named_modules() if isinstance(p, nn.Linear))
        nn.utils.parametrizations.weight_norm(module.get_submodule(name))
    elif wrapper == "old weight norm":
        name = next(n for n, p in module.named_modules() if isinstance(p, nn.Linear))
        nn.utils.weight_norm(module.get_submodule(name))
    elif wrapper == "frozen":
        module.requires_grad_(False)
    elif wrapper == "after a forward":
        module.stem.register_buffer("kept", sum(p.sum() for p in module.parameters()) * 1.0, persistent=False)
    return module


WRAPPERS = [
    *["none"] * 4,
    "parallel",
    "compiled",
    "sequential",
    "training",
    "weight norm",
    "old weight norm",
    "frozen",
    "after a forward",
]


@pytest.mark.slow
def test_models():
    tally, quantized = Tally(), []

    @cases(100)
    @given(
        drawn_models(),
        st.integers(0, 99),
        st.sampled_from(["float32"] * 4 + sorted(DTYPES)),
        st.sampled_from(WRAPPERS),
        st.sampled_from(["minmax", "minmax", "percentile", "repq-vit", "quantlens-fast"]),
        st.booleans(),
    )
    def run(drawn, seed, dtype, wrapper, method, keep_bits):
        dtype = "float32" if "norm" in wrapper else dtype  # a norm taken in half precision is another weight
        module = made(drawn, seed).to(DTYPES[dtype])
        expected_by = made(drawn, seed).to(DTYPES[dtype]).float()
        images = pictures(drawn, 6, seed)
        with torch.no_grad():
            expected = expected_by(images)
        held = wrapped(module, wrapper)
        result = tally(lambda: ql.quantize(held, images, method=method, bits="FP32" if keep_bits else "W8A8", seed=0))
        if result is None:
            return
        got = result(images)
        assert type(got) is type(expected), (type(got), type(expected))
        if isinstance(expected, dict):
            assert list(got) == list(expected)
        want, have = tensor_of(expected), tensor_of(got)
        assert want.shape == have.shape
        if keep_bits:
            assert ratio(want, have) <= 1e-4
        else:
            quantized.append(float(10 * torch.log10((want**2).mean() / ((want - have) ** 2).mean().clamp_min(1e-20))))
            # ranges by percentile cut off what some of these networks live on
            assert quantized[-1] > (3 if method == "percentile" else 8), f"{quantized[-1]:.1f} dB"

    run()
    tally.check(95)
    assert np.median(quantized) > 25, f"{np.median(quantized):.1f} dB"


# ---- checkpoint files ------------------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.BatchNorm2d(4), nn.Flatten())
        self.head = nn.Linear(4 * 16, 5)

    def forward(self, x):
        return self.head(self.body(x))


@pytest.mark.slow
def test_checkpoint_layouts(tmp_path):
    tally, names = Tally(), sorted(layouts({}))

    @cases(560)
    @given(
        st.sampled_from(names),
        st.sampled_from([".pth", ".pt", ".bin", ".pth.tar", ".ckpt", ".tar", ".safetensors"]),
        st.sampled_from(["float32", "float16", "float64"]),
        st.integers(0, 999),
    )
    def run(layout, suffix, dtype, seed):
        torch.manual_seed(seed)
        module, source = Small(), Small()
        for value in source.buffers():
            if value.is_floating_point():
                value.uniform_(0.5, 2)
        state = {k: v.to(DTYPES[dtype]) if v.is_floating_point() else v for k, v in source.state_dict().items()}
        content = layouts(state)[layout]
        with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
            path = Path(folder) / f"w{suffix}"
            if suffix == ".safetensors":
                content = content if all(isinstance(v, torch.Tensor) for v in content.values()) else state
                save_file({k: v.contiguous().clone() for k, v in content.items()}, path)
            else:
                torch.save(content, path)
            model = tally(lambda: ql.load_model(module, weights=path, input_size=(3, 16, 16)))
        if model is not None:
            for name, value in model.module.state_dict().items():
                assert torch.equal(value.float(), state[name].float()), name

    run()
    tally.check(500)


@pytest.mark.slow
def test_damaged_checkpoints(tmp_path):
    """Bytes changed, cut or made up: read as the same tensors, or refused by name."""
    state = Small().state_dict()

    @cases(240)
    @given(
        st.sampled_from([".pth", ".safetensors", ".npz", ".ckpt"]),
        st.integers(0, 10**6),
        st.binary(max_size=40),
        st.booleans(),
    )
    def run(suffix, where, junk, cut):
        path = tmp_path / f"w{suffix}"
        save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
        content = path.read_bytes()
        where %= len(content)
        path.write_bytes(content[:where] + junk + (b"" if cut else content[where + len(junk) :]))
        Tally()(lambda: ql.load_model(Small(), weights=path, input_size=(3, 16, 16)))

    run()


# ---- calibration images ----------------------------------------------------------------------------------------------


def containers(images: torch.Tensor) -> dict[str, object]:
    """The same images in what a person may keep them in."""
    labels = torch.zeros(len(images), dtype=torch.int64)
    pairs = TensorDataset(images, labels)

    def as_dict(batch):
        return {"pixel_values": torch.stack([b[0] for b in batch]), "labels": torch.stack([b[1] for b in batch])}

    return {
        "tensor": images,
        "float64": images.double(),
        "float16": images.half().float().half(),
        "channels last": images.to(memory_format=torch.channels_last),
        "part of a larger one": torch.cat([images, images], 1)[:, : images.shape[1]],
        "with gradients": images.clone().requires_grad_(),
        "numpy": images.numpy(),
        "numpy float64": images.double().numpy(),
        "batches": list(images.split(2)),
        "single images": list(images),
        "pairs": [(image, 3) for image in images],
        "batches with labels": [(b, labels[: len(b)]) for b in images.split(3)],
        "tuple of batches": tuple(images.split(2)),
        "generator": (b for b in images.split(2)),
        "dicts": [{"pixel_values": b} for b in images.split(2)],
        "one dict": {"pixel_values": images},
        "dict of images": [{"image": b, "label": 1} for b in images],
        "numpy batches": [b.numpy() for b in images.split(2)],
        "data set": pairs,
        "loader": DataLoader(pairs, batch_size=3),
        "loader of dicts": DataLoader(pairs, batch_size=2, collate_fn=as_dict),
        "loader of tensors": DataLoader(images, batch_size=2),
    }


@pytest.mark.slow
def test_containers():
    tally, names = Tally(), sorted(containers(torch.zeros(2, 3, 8, 8)))

    @cases(600)
    @given(
        st.sampled_from(names),
        st.integers(1, 7),
        st.sampled_from([1, 3, 4]),
        st.sampled_from([8, 16, 33]),
        st.sampled_from([8, 20]),
        st.integers(0, 99),
    )
    def run(kind, count, channels, height, width, seed):
        images = torch.randn(count, channels, height, width, generator=torch.Generator().manual_seed(seed))
        grey = (0.5,) * channels
        preprocess = Preprocess((channels, height, width), mean=grey, std=grey)
        expected = images.half().float() if kind == "float16" else images
        found = tally(lambda: torch.cat(list(Calibration.of(containers(images)[kind], preprocess))))
        if found is not None:
            assert found.dtype == torch.float32
            assert not found.requires_grad
            assert torch.equal(found, expected)

    run()
    tally.check(500)


@pytest.mark.slow
def test_images_that_cannot_be():
    """What is no calibration image is refused by name, and nothing else is raised."""
    wrong = [
        torch.zeros(0, 3, 16, 16),
        torch.full((2, 3, 16, 16), float("nan")),
        torch.zeros(2, 3, 16, 16, dtype=torch.int64),
        torch.zeros(2, 16, 16, 3),
        torch.zeros(2, 5, 16, 16),
        torch.zeros(16, 16),
        torch.zeros(2, 3, 16, 16, dtype=torch.complex64),
        np.zeros((2, 3, 16, 16), dtype=object),
        np.array(["a", "b"]),
        [],
        [torch.zeros(2, 3, 16, 16), torch.zeros(2, 3, 8, 8)],
        [None],
        [1, 2, 3],
        ["a.jpg", "b.jpg"],
        {},
        {"labels": torch.zeros(3)},
        5,
        object(),
        "folder:/nowhere/at/all",
        "no such kind:x",
        DataLoader(TensorDataset(torch.zeros(4, dtype=torch.int64)), batch_size=2),
    ]
    for given_images in wrong:
        with pytest.raises(QuantlensError) as caught:
            Calibration.of(given_images, Preprocess((3, 16, 16)))
        assert "\n" not in str(caught.value).strip()


# ---- texts -----------------------------------------------------------------------------------------------------------

PIECES = st.sampled_from(["W", "A", "4", "8", "99", "-1", "FP", "32", "MP", "0", " ", "w4a4", ".json", "é", "\t", "6"])
SOURCES = st.sampled_from(
    ["folder:", "embedded:", "digits-test", "[0:4]", "[", "?n=3", "&seed=1", "?corrupt=", "::", "parquet:", "\0", "a/b"]
)


@pytest.mark.slow
def test_texts():
    """Bits and sources: understood, or refused by name."""

    @cases(400)
    @given(st.lists(PIECES, max_size=5).map("".join), st.lists(SOURCES, max_size=5).map("".join))
    def run(bits, source):
        Tally()(lambda: read_bits(bits))
        Tally()(lambda: open_source(source))

    run()
