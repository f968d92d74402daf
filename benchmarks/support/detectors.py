"""Detectors of Hugging Face by family, small: what they are made from. Tests take them, too."""

from typing import Any

RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]}
RESNET |= {"layer_type": "basic"}
LAST = {**RESNET, "out_features": ["stage4"]}
THREE = {**RESNET, "out_features": ["stage2", "stage3", "stage4"]}
TIMM = {"model_type": "timm_backbone", "backbone": "resnet18", "features_only": True, "use_pretrained_backbone": False}
RT_RESNET = {**RESNET, "model_type": "rt_detr_resnet", "out_features": ["stage2", "stage3", "stage4"]}
HGNET = {
    "model_type": "hgnet_v2",
    "stem_channels": [3, 8, 8],
    "stage_in_channels": [8, 16, 16, 16],
    "stage_mid_channels": [8, 8, 8, 8],
    "stage_out_channels": [16, 16, 16, 32],
    "stage_num_blocks": [1, 1, 1, 1],
    "stage_numb_of_layers": [1, 1, 1, 1],
    "hidden_sizes": [16, 16, 16, 32],
    "depths": [1, 1, 1, 1],
    "embedding_size": 8,
    "use_learnable_affine_block": True,
    "out_features": ["stage2", "stage3", "stage4"],
}
DINO = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "patch_size": 8, "image_size": 64}
SEQUENCE = {"encoder_layers": 1, "encoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
SEQUENCE |= {"decoder_layers": 2, "decoder_ffn_dim": 32, "d_model": 16, "num_queries": 5, "num_labels": 4}
RT = {**SEQUENCE, "d_model": 32, "encoder_hidden_dim": 32, "encoder_in_channels": [16, 16, 32]}
RT |= {"decoder_in_channels": [32, 32, 32], "decoder_n_points": 2, "num_denoising": 4}
D_FINE = {**RT, "backbone_config": HGNET, "decoder_n_points": [2, 3, 2], "max_num_bins": 8, "lqe_hidden_dim": 8}
DEFORMABLE = {**SEQUENCE, "encoder_n_points": 2, "decoder_n_points": 2, "disable_custom_kernels": True}
DEFORMABLE |= {"num_feature_levels": 4, "d_model": 32}
RF = {"d_model": 32, "decoder_ffn_dim": 32, "decoder_n_points": 2, "decoder_layers": 2, "num_queries": 5}
RF |= {"decoder_self_attention_heads": 2, "decoder_cross_attention_heads": 2, "group_detr": 3, "num_labels": 4}
WINDOWED = {**DINO, "model_type": "rf_detr_dinov2", "num_windows": 2, "out_features": ["stage2", "stage4"]}
LW_VIT = {"model_type": "lw_detr_vit", "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
LW_VIT |= {"image_size": 64, "pretrain_image_size": 64, "patch_size": 16, "window_block_indices": [0, 2]}
LW_VIT |= {"out_indices": [1, 3], "num_windows": 4}

CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "yolos": (
        "Yolos",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "image_size": [64, 64],
            "patch_size": 16,
            "num_detection_tokens": 5,
            "num_labels": 4,
        },
    ),
    "detr": ("Detr", {**SEQUENCE, "backbone_config": LAST}),
    "detr-timm": ("Detr", {**SEQUENCE, "backbone_config": {**TIMM, "out_indices": [1, 2, 3, 4]}}),
    "conditional-detr": ("ConditionalDetr", {**SEQUENCE, "backbone_config": LAST}),
    "deformable-detr": ("DeformableDetr", {**DEFORMABLE, "backbone_config": THREE}),
    "deformable-detr-two-stage": (
        "DeformableDetr",
        {**DEFORMABLE, "backbone_config": THREE, "two_stage": True, "with_box_refine": True}
        | {"two_stage_num_proposals": 6},
    ),
    "dab-detr": ("DabDetr", {**SEQUENCE, "hidden_size": 16, "backbone_config": LAST}),
    "rt-detr": ("RTDetr", {**RT, "backbone_config": RT_RESNET}),
    "rt-detr-v2": ("RTDetrV2", {**RT, "backbone_config": RT_RESNET}),
    "rt-detr-v2-discrete": ("RTDetrV2", {**RT, "backbone_config": RT_RESNET, "decoder_method": "discrete"}),
    "d-fine": ("DFine", D_FINE),
    "rf-detr": ("RfDetr", {**RF, "backbone_config": WINDOWED}),
    "lw-detr": ("LwDetr", {**RF, "backbone_config": LW_VIT, "projector_scale_factors": [1.0]}),
}
"""Name -> (what its classes are called, configuration)."""


def side_of(name: str) -> int:
    """The side of its images: the last level of a Deformable DETR has a group for each channel."""
    return 128 if CONFIGURATIONS[name][0] == "DeformableDetr" else 64
