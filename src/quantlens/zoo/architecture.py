"""The vision transformers that recipes describe: timm's, with a stem of convolutions or a clipped softmax."""

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

if TYPE_CHECKING:
    from quantlens.zoo.recipes import Architecture


class ClippedSoftmax(nn.Module):
    """Attention rows p [..., N], stretched and clipped: clamp((1 + a/N) p - a/N, 0, 1), so that a token can attend to
    nothing without ever larger logits (Bondarenko, Nagel and Blankevoort, NeurIPS 2023, equation 4 with zeta = 1)."""

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, rows: Tensor) -> Tensor:
        gamma = self.alpha / rows.shape[-1]
        return (rows * (1 + gamma) - gamma).clamp(0, 1)


class ConvStem(PatchEmbed):
    """A patch embedding of 3x3 convolutions of stride 2 with BatchNorm and ReLU, whose channels double up to the width,
    and a 1x1 convolution (Xiao et al., Early Convolutions Help Transformers See Better, 2021)."""

    def __init__(self, *, patch_size: int, in_chans: int = 3, embed_dim: int, **settings: Any) -> None:
        super().__init__(patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, **settings)
        halvings = patch_size.bit_length() - 1
        widths = [in_chans, *(max(8, embed_dim // 2 ** (halvings - 1 - i)) for i in range(halvings))]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.proj = nn.Sequential(*layers, nn.Conv2d(widths[-1], embed_dim, 1))


def build(given: "Architecture", size: int, num_classes: int) -> nn.Module:
    """The untrained model for pictures [B, 3, size, size]: class token, GELU, one linear head."""
    model = VisionTransformer(
        img_size=size,
        patch_size=given.patch,
        embed_dim=given.width,
        depth=given.depth,
        num_heads=given.heads,
        mlp_ratio=given.mlp_ratio,
        num_classes=num_classes,
        init_values=given.layer_scale,
        reg_tokens=given.registers,
        drop_path_rate=given.drop_path,
        embed_layer=ConvStem if given.stem == "conv" else PatchEmbed,
    )
    if given.clipped_softmax:
        for block in model.blocks:
            block.attn.fused_attn = False
            block.attn.attn_drop = ClippedSoftmax(given.clipped_softmax)  # which timm applies to the softmax's output
    return model


def new_head(model: nn.Module, num_classes: int) -> None:
    """Replace the classifier by an untrained one, initialised as timm does."""
    model.reset_classifier(num_classes)  # type: ignore[operator]
    head: Any = model.head
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
