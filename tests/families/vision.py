"""The families that see images: what their tiny configurations have beside what all language models have."""

from typing import Any, NamedTuple


class Vision(NamedTuple):
    """Settings of the language model beyond the usual ones, of the tower, and of the whole; what is special; whether
    the settings of the language model are those of the whole."""

    text: dict[str, Any]
    eye: dict[str, Any]
    others: dict[str, Any]
    special: str
    flat: bool = False


_SLIDING: dict[str, Any] = {
    "num_hidden_layers": 3,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_ROTARY: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
_SECTIONS: dict[str, Any] = _ROTARY | {"mrope_section": [2, 3, 3]}
_EYE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
_QWEN_EYE: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "out_hidden_size": 64,
    "num_heads": 2,
    "patch_size": 4,
}
IMAGE = 90
_QWEN_IDS: dict[str, Any] = {
    "image_token_id": IMAGE,
    "video_token_id": 91,
    "vision_start_token_id": 92,
    "vision_end_token_id": 93,
}

VISION: dict[str, Vision] = {
    "qwen2_vl": Vision(
        {"rope_parameters": _SECTIONS},
        {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4},
        _QWEN_IDS,
        "positions of three axes",
    ),
    "qwen2_5_vl": Vision(
        {"rope_parameters": _SECTIONS},
        _QWEN_EYE | {"window_size": 16, "fullatt_block_indexes": [1]},
        _QWEN_IDS,
        "positions of three axes",
    ),
    "qwen3_vl": Vision(
        {"rope_parameters": _SECTIONS | {"mrope_interleaved": True}},
        _QWEN_EYE | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        _QWEN_IDS,
        "positions of three axes, image features added between blocks",
    ),
    "qwen3_vl_moe": Vision(
        {"rope_parameters": _SECTIONS | {"mrope_interleaved": True}}
        | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        _QWEN_EYE | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        _QWEN_IDS,
        "a mixture of experts, positions of three axes, image features added between blocks",
    ),
    "llava": Vision(
        {"model_type": "llama"},
        _EYE | {"model_type": "clip_vision_model"},
        {"image_token_id": IMAGE},
        "Llama",
    ),
    "gemma3": Vision(
        _SLIDING,
        _EYE,
        {"mm_tokens_per_image": 4, "image_token_index": IMAGE, "boi_token_index": 92, "eoi_token_index": 93},
        "image tokens see each other both ways",
    ),
    "idefics3": Vision(
        {"model_type": "llama"}, _EYE, {"scale_factor": 2, "image_token_id": IMAGE}, "Llama, images in tiles"
    ),
    "smolvlm": Vision(
        {"model_type": "llama"}, _EYE, {"scale_factor": 2, "image_token_id": IMAGE}, "Llama, images in tiles"
    ),
    "mllama": Vision(
        {"num_hidden_layers": 3, "cross_attention_layers": [1], "rope_parameters": _ROTARY},
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
            "vision_output_dim": 64,
            "intermediate_layers_indices": [0],
            "max_num_tiles": 2,
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        },
        {"image_token_index": IMAGE},
        "blocks of cross attention to images",
    ),
    "internvl": Vision(
        {"model_type": "qwen2"},
        _EYE | {"image_size": [16, 16], "patch_size": [8, 8]},
        {"image_token_id": IMAGE, "downsample_ratio": 0.5},
        "Qwen 2",
    ),
    "mistral3": Vision(
        {"model_type": "mistral"},
        _EYE | {"model_type": "pixtral", "patch_size": 4, "head_dim": 16},
        {"image_token_index": IMAGE, "spatial_merge_size": 2},
        "Mistral, Pixtral's tower",
    ),
    "phi4_multimodal": Vision(
        {},
        _EYE | {"crop_size": 16, "image_token_id": IMAGE},
        {
            "audio_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_blocks": 1,
                "num_attention_heads": 2,
                "ext_pw_out_channel": 32,
                "depthwise_separable_out_channel": 32,
                "nemo_conv_channels": 8,
                "audio_token_id": 91,
            },
        },
        "Phi 3, towers for images and sound inside the decoder",
        flat=True,
    ),
}
