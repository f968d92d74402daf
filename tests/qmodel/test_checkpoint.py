from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import quantlens as ql
from quantlens.errors import BadWeightsError, StorageError
from quantlens.qmodel.checkpoint import pack, read_header, unpack


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 16), st.integers(0, 50), st.booleans(), st.integers(0, 2**31))
def test_codes_follow_each_other_bit_by_bit(bits, count, signed, seed):
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    codes = np.random.default_rng(seed).integers(low, high, size=count)
    whole = sum((int(code) % 2**bits) << (place * bits) for place, code in enumerate(codes))
    expected = whole.to_bytes(-(-count * bits // 8), "little")
    assert pack(torch.from_numpy(codes), bits).numpy().tobytes() == expected


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 16), st.integers(0, 50), st.booleans(), st.integers(0, 2**31))
def test_packing_is_lossless(bits, count, signed, seed):
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    codes = torch.from_numpy(np.random.default_rng(seed).integers(low, high, size=(count, 3)).astype(np.int32))
    packed = pack(codes, bits)
    assert packed.numel() == -(-codes.numel() * bits // 8)
    assert torch.equal(unpack(packed, bits, tuple(codes.shape), signed=signed), codes)


BITS = ("W2A4", "W3A8", "W4A4", "W8A8", "W10A10", "W32A8")
ARCHITECTURES = ("vit", "deit-distilled", "deit3", "swin", "torchvision", "plain")


@pytest.mark.parametrize(
    ("bits", "architecture"),
    [
        pytest.param(b, a, marks=() if a == "swin" or b == "W4A4" else pytest.mark.slow)
        for b in BITS
        for a in ARCHITECTURES
    ],
)
def test_logits_survive_bit_for_bit(bits, architecture, loaded, pictures, tmp_path):
    qmodel = ql.quantize(loaded[architecture], pictures, method="repq-vit", bits=bits)
    path = qmodel.save(tmp_path / "q.safetensors")
    again = ql.load(path)
    assert torch.equal(again(pictures), qmodel(pictures))
    assert again.plan.info == json.loads(json.dumps(qmodel.plan.info))
    assert again.preprocess == qmodel.preprocess
    assert again.size_mb == qmodel.size_mb
    assert torch.equal(ql.load(again.save(tmp_path / "q2.safetensors"))(pictures), qmodel(pictures))


class _Tokens(torch.nn.Module):
    """A body that returns its tokens [B, N, D] and, beside them, the pooled ones [B, D]."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = torch.nn.Conv2d(3, 8, 8, 8), torch.nn.LayerNorm(8)

    def forward(self, images):
        tokens = self.norm(self.embed(images).flatten(2).mT)
        return tokens, tokens.mean(1)


def test_several_outputs_survive_bit_for_bit(pictures, tmp_path):
    qmodel = ql.quantize(_Tokens().eval(), pictures, method="minmax", bits="W8A8")
    again = ql.load(qmodel.save(tmp_path / "q.safetensors"))
    for got, expected in zip(again(pictures), qmodel(pictures), strict=True):
        assert torch.equal(got, expected)
    assert torch.equal(again.outputs(pictures).logits, qmodel.outputs(pictures).logits)


def test_size_is_close_to_bits_over_32(pictures, tmp_path):
    from timm.models.vision_transformer import VisionTransformer

    model = ql.load_model(
        VisionTransformer(img_size=32, patch_size=8, embed_dim=192, depth=3, num_heads=3, num_classes=10),
        input_size=(3, 32, 32),
    )
    full = 4 * model.num_parameters
    for bits, share in (("W8A8", 8 / 32), ("W4A8", 4 / 32), ("W3A8", 3 / 32)):
        qmodel = ql.quantize(model, pictures, bits=bits, method="minmax")
        on_disk = qmodel.save(tmp_path / "q.safetensors").stat().st_size
        assert share < on_disk / full < share + 0.05
        assert abs(on_disk - qmodel.size_bytes()) < 150_000, "the header is all that size_mb leaves out"


def test_loading_needs_no_timm(loaded, pictures, tmp_path):
    import subprocess
    import sys

    qmodel = ql.quantize(loaded["swin"], pictures, method="repq-vit", bits="W4A4")
    path = qmodel.save(tmp_path / "q.safetensors")
    torch.save((pictures, qmodel(pictures)), tmp_path / "expected.pt")
    code = (
        "import sys; sys.modules['timm'] = None\n"
        "import torch, quantlens as ql; torch.set_num_threads(1)\n"
        f"x, y = torch.load({str(tmp_path / 'expected.pt')!r}); assert torch.equal(ql.load({str(path)!r})(x), y)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_no_checkpoint_says_so(loaded, pictures, tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(BadWeightsError, match="no quantized checkpoint"):
        ql.load(tmp_path / "missing.safetensors")
    save_file({"a": torch.zeros(3)}, tmp_path / "plain.safetensors")
    with pytest.raises(BadWeightsError, match="quantlens quantize"):
        ql.load(tmp_path / "plain.safetensors")
    path = ql.quantize(loaded["vit"], pictures, method="repq-vit").save(tmp_path / "q.safetensors")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(BadWeightsError, match="damaged"):
        ql.load(path)


def test_a_file_is_written_whole_or_not_at_all(loaded, pictures, tmp_path, monkeypatch):
    qmodel = ql.quantize(loaded["vit"], pictures, method="repq-vit")
    path = qmodel.save(tmp_path / "q.safetensors")
    before = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        qmodel.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["q.safetensors"]


def test_the_header_describes_the_file(loaded, pictures, tmp_path):
    path = ql.quantize(loaded["vit"], pictures, method="repq-vit", bits="W4A8", seed=13).save(
        tmp_path / "q.safetensors"
    )
    header = read_header(path)
    info = header["info"]
    assert (info["method"], info["bits"], info["seed"], info["model"]) == ("repq-vit", "W4A8", 13, "vit")
    assert info["checkpoint_sha256"] == loaded["vit"].checkpoint_sha256
    assert info["calibration"]["n"] == len(pictures)
    assert header["quantizers"]["blocks.0.attn.qkv.weight"]["bits"] == 4


def test_a_file_that_was_changed_is_refused(loaded, pictures, tmp_path):
    """One bit anywhere after the first bytes: in the header, the codes, a scale."""
    path = ql.quantize(loaded["vit"], pictures, method="minmax", bits="W4A8").save(tmp_path / "q.safetensors")
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for place in [*rng.integers(8, len(whole), 20), len(whole) - 1]:
        changed = bytearray(whole)
        changed[place] ^= 1 << int(rng.integers(0, 8))
        path.write_bytes(changed)
        with pytest.raises(BadWeightsError, match=r"q\.safetensors"):
            ql.load(path)
    path.write_bytes(whole)
    assert torch.isfinite(ql.load(path)(pictures)).all()


def test_a_header_takes_a_small_part_of_a_file(loaded, pictures, tmp_path):
    qmodel = ql.quantize(loaded["vit"], pictures, method="minmax", bits="W4A8")
    path = qmodel.save(tmp_path / "q.safetensors")
    assert path.stat().st_size - qmodel.size_bytes() < len(json.dumps(read_header(path))) / 5


def test_a_file_of_version_2_is_read(loaded, pictures, tmp_path):
    """Its header lies in the metadata, and every tensor has an entry of its own."""
    from safetensors.torch import save_file

    from quantlens.qmodel import checkpoint

    qmodel, path = ql.quantize(loaded["vit"], pictures, method="minmax", bits="W4A8"), tmp_path / "q.safetensors"
    tensors, header = checkpoint._content(qmodel)
    text = json.dumps({**{k: v for k, v in header.items() if k != "small"}, "version": 2})
    metadata = {"format": checkpoint.FORMAT, "header": text, "sha256": checkpoint.digest_of(text, tensors)}
    save_file(tensors, path, metadata)
    assert torch.equal(ql.load(path)(pictures), qmodel(pictures))


def test_a_file_without_a_digest_loads_with_one_line_said(loaded, pictures, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    qmodel = ql.quantize(loaded["vit"], pictures, method="minmax", bits="W4A8")
    path = qmodel.save(tmp_path / "q.safetensors")
    with safe_open(path, "pt") as stream:
        metadata = stream.metadata()
    del metadata["sha256"]
    save_file(load_file(path), tmp_path / "old.safetensors", metadata)
    with pytest.warns(UserWarning, match="saved without a digest"):
        again = ql.load(tmp_path / "old.safetensors")
    assert torch.equal(again(pictures), qmodel(pictures))


@pytest.mark.parametrize("method", ["quantlens-fast", "gptq", "erq"])
def test_weights_fitted_in_closed_form_come_back_to_the_last_bit(method, tmp_path):
    """Sums over another layout in memory would differ."""
    model = ql.load_model("digits-vit")
    quantized = ql.quantize(model, "embedded:digits-calibration?n=16&seed=0", method=method, bits="W4A4")
    images = torch.randn(32, *model.preprocess.input_size, generator=torch.Generator().manual_seed(0))
    again = ql.load(quantized.save(tmp_path / "q.safetensors"))
    with torch.inference_mode():
        assert torch.equal(again(images), quantized(images))
