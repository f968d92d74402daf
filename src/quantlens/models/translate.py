"""Names of a vision transformer's tensors as Hugging Face writes them, under the names of timm."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

# of transformers before and since version 5
_LAYER = re.compile(r"(?:.*\.)?(?:encoder\.layer|layers)\.(\d+)\.(.+)\.(weight|bias)$")
_PARTS = {
    "attention.output.dense": "attn.proj",
    "attention.o_proj": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
}
_QKV = {
    **{f"attention.attention.{name}": i for i, name in enumerate(("query", "key", "value"))},
    **{f"attention.{name}": i for i, name in enumerate(("q_proj", "k_proj", "v_proj"))},
}
_REST = (
    (r"(.*\.)?embeddings\.cls_token$", "cls_token"),
    (r"(.*\.)?embeddings\.distillation_token$", "dist_token"),
    (r"(.*\.)?embeddings\.position_embeddings$", "pos_embed"),
    (r"(.*\.)?embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"(.*\.)?layernorm\.(?=weight$|bias$)", "norm."),
    (r"(cls_)?classifier\.", "head."),
    (r"distillation_classifier\.", "head_dist."),
)


def to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The state dict of a ViT or DeiT of Hugging Face under timm's names; None where it is none."""
    found: dict[str, Tensor] = {}
    joined: dict[str, dict[int, Tensor]] = {}
    for key, value in state.items():
        layer = _LAYER.match(key)
        if layer and layer[2] in _QKV:
            joined.setdefault(f"blocks.{layer[1]}.attn.qkv.{layer[3]}", {})[_QKV[layer[2]]] = value
        elif layer and layer[2] in _PARTS:
            found[f"blocks.{layer[1]}.{_PARTS[layer[2]]}.{layer[3]}"] = value
        else:
            pattern, name = next(((p, n) for p, n in _REST if re.match(p, key)), (None, key))
            found[key if pattern is None else re.sub(pattern, name, key)] = value
    if not joined or any(set(parts) != {0, 1, 2} for parts in joined.values()):
        return None
    return found | {name: torch.cat([parts[i] for i in range(3)]) for name, parts in joined.items()}
