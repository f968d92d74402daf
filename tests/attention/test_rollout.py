from __future__ import annotations

import copy

import pytest
import torch

import quantlens as ql
from quantlens.attention.recording import Lens
from quantlens.attention.rollout import discard_smallest, fuse_heads, rollout
from quantlens.errors import QuantlensError, UnsupportedError


def _attention(blocks=3, batch=2, heads=4, tokens=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(blocks, batch, heads, tokens, tokens, generator=generator)
    return list(logits.softmax(-1))


def test_hand_made_stack():
    """Two blocks of three tokens, one head, nothing discarded: by hand."""
    first = torch.tensor([[[[0.2, 0.8, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]]])
    second = torch.tensor([[[[0.5, 0.0, 0.5], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]]])
    # rows of (A + I)/2: class row of the first (0.6, 0.4, 0), of the second (0.75, 0, 0.25); patches keep themselves
    # class row of the product: 0.75·(0.6, 0.4, 0) + 0.25·(0, 0, 1) = (0.45, 0.3, 0.25)
    found = rollout([first, second], discard=0.0)
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.25 / 0.3]]))


def test_order_of_heads_does_not_matter():
    blocks = _attention()
    order = torch.tensor([2, 0, 3, 1])
    for fusion in ("max", "mean", "min"):
        expected = rollout(blocks, fusion=fusion)
        assert torch.equal(rollout([b[:, order] for b in blocks], fusion=fusion), expected) or torch.allclose(
            rollout([b[:, order] for b in blocks], fusion=fusion), expected, atol=1e-6
        )


def test_uniform_attention_gives_a_constant_map():
    blocks = [torch.full((1, 2, 9, 9), 1 / 9)] * 4
    assert torch.allclose(rollout(blocks, discard=0.0), torch.ones(1, 8))


def test_batches_are_images_side_by_side():
    blocks = _attention()
    together = rollout(blocks)
    alone = torch.cat([rollout([b[i : i + 1] for b in blocks]) for i in range(2)])
    torch.testing.assert_close(together, alone)


def test_discarding_keeps_what_class_tokens_give_and_get():
    fused = fuse_heads(_attention(1)[0])
    kept = discard_smallest(fused, 0.9, prefix=2)
    assert torch.equal(kept[:, :2], fused[:, :2])
    assert torch.equal(kept[:, :, :2], fused[:, :, :2])
    inner = kept[:, 2:, 2:]
    assert float((inner == 0).float().mean()) > 0.85
    survivors = inner[inner > 0]
    assert bool((survivors >= fused.flatten(1).quantile(0.85, dim=1).min()).all())


def _by_the_book(blocks, ratio):
    """vit-explain's arithmetic written out for one image: global discard, (class, class) kept, columns divided."""
    size = blocks[0].shape[-1]
    result = torch.eye(size)
    for attention in blocks:
        fused = attention.max(0).values.clone()
        flat = fused.reshape(-1)
        for index in flat.topk(int(size * size * ratio), largest=False).indices.tolist():
            if index != 0:
                flat[index] = 0
        mixed = (fused + torch.eye(size)) / 2
        sums = [float(row.sum()) for row in mixed]
        step = torch.stack([mixed[:, j] / sums[j] for j in range(size)], dim=1)
        result = step @ result
    mask = result[0, 1:]
    return mask / mask.max()


def test_compat_is_vit_explain():
    blocks = _attention()
    found = rollout(blocks, compat="vit-explain")
    for image in range(2):
        torch.testing.assert_close(found[image], _by_the_book([b[image] for b in blocks], 0.9))
    assert not torch.allclose(found, rollout(blocks))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"discard": 1.0}, "below 1"), ({"fusion": "sum"}, "max, mean, min"), ({"compat": "other"}, "vit-explain")],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(QuantlensError, match=message):
        rollout(_attention(), **settings)


# -- rollout: the row alone, and equal entries ------------------------------------------------------------------------
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_the_row_is_that_of_the_whole_product(prefix):
    generator = torch.Generator().manual_seed(3)
    blocks = list((2 * torch.randn(4, 2, 3, 9, 9, generator=generator)).softmax(-1))
    product = torch.eye(9).expand(2, 9, 9)
    for probs in blocks:
        mixed = discard_smallest(fuse_heads(probs), 0.6, max(prefix, 1)) + torch.eye(9)
        product = mixed / mixed.sum(-1, keepdim=True) @ product
    row = (product[:, 0] if prefix else product.mean(1))[:, prefix:]
    expected = row / row.amax(1, keepdim=True)
    torch.testing.assert_close(rollout(blocks, discard=0.6, prefix=prefix), expected)


def test_equal_entries_share_their_fate():
    """A quantized map holds few values; which of equal ones go must not depend on where they stand."""
    generator = torch.Generator().manual_seed(0)
    fused = torch.randint(0, 4, (3, 12, 12), generator=generator).float()
    kept = discard_smallest(fused, 0.9)
    inner = (slice(None), slice(1, None), slice(1, None))
    for image in range(3):
        for value in range(1, 4):
            assert len((kept[inner][image][fused[inner][image] == value] == 0).unique()) <= 1
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(11, generator=generator)])
    moved = discard_smallest(fused[:, order][:, :, order], 0.9)
    assert torch.equal(moved, kept[:, order][:, :, order])
    distinct = torch.rand(2, 12, 12, generator=generator)
    gone = distinct != discard_smallest(distinct, 0.5, 0, compat=None)
    assert gone.flatten(1).sum(1).tolist() == [72, 72], "without equal entries exactly the share goes"


# -- the lens --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["vit", "deit-distilled", "deit3"])
def test_attention_is_timms(kind, loaded, small_models, pictures):
    """The lens reads what timm's own attention modules compute when their fused kernel is off."""
    network = copy.deepcopy(small_models[kind])
    seen = []
    for block in network.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, args, out: seen.append(out))
    network(pictures)
    lens = Lens(loaded[kind])
    view = lens(pictures)
    assert len(view.probs) == len(seen) == 2
    for ours, theirs in zip(view.probs, seen, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    torch.testing.assert_close(lens.rollout(pictures), rollout(seen, prefix=lens.layout.prefix), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(view.logits, network(pictures), rtol=1e-4, atol=1e-4)


def test_layouts(loaded):
    def layout(kind):
        return Lens(loaded[kind]).layout

    assert {k: layout(k).prefix for k in ("vit", "deit-distilled", "plain", "torchvision")} == {
        "vit": 1,
        "deit-distilled": 2,
        "plain": 0,
        "torchvision": 1,
    }
    assert layout("vit").grid == (4, 4)


def test_tokens_are_the_blocks_outputs(loaded, small_models, pictures):
    network, seen = copy.deepcopy(small_models["vit"]), []
    for block in network.blocks:
        block.register_forward_hook(lambda module, args, out: seen.append(out))
    network(pictures)
    view = Lens(loaded["vit"])(pictures)
    for ours, theirs in zip(view.tokens, seen, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_quantized_attention_is_what_the_values_meet(loaded, pictures):
    """At 3 bits the maps hold at most 8 values: they are read behind their quantizer."""
    model = loaded["vit"]
    qmodel = ql.quantize(model, pictures, method="minmax", bits="W8A3")
    view = Lens(qmodel)(pictures)
    assert all(len(p.unique()) <= 8 for p in view.probs)
    torch.testing.assert_close(view.logits, qmodel(pictures))


def test_windowed_attention_is_refused_in_words(loaded):
    with pytest.raises(UnsupportedError, match="windows"):
        Lens(loaded["swin"])
