"""What processors make of rows with images, for the families that see them: random pixels, image tokens between others.

Every image is 16 by 16 pixels; Mllama takes two tiles of it.
"""

import torch
from torch import Tensor

from tests.families.vision import IMAGE, VISION


def images(model_type: str) -> list[dict[str, Tensor]]:
    """What a processor makes of rows of two images, one, none and one, the last one shorter; empty for text models."""
    if model_type not in VISION:
        return []
    generator = torch.Generator().manual_seed(1)
    return [_row(model_type, count, tokens, generator) for count, tokens in ((2, 16), (1, 16), (0, 16), (1, 13))]


def _row(model_type: str, count: int, tokens: int, generator: torch.Generator) -> dict[str, Tensor]:
    ids_1T = torch.randint(3, IMAGE, (1, tokens), generator=generator)
    places = _TOKENS_OF_IMAGE.get(model_type, 1)
    for image in range(count):
        ids_1T[0, 1 + image * (places + 2) :][:places] = IMAGE
    shown_1T = (ids_1T == IMAGE).long()
    row = {"input_ids": ids_1T, "attention_mask": torch.ones_like(ids_1T)}
    if model_type == "gemma3":
        row["token_type_ids"] = shown_1T
    if model_type.startswith("qwen"):
        row["mm_token_type_ids"] = shown_1T
    return row | (_PIXELS.get(model_type, _plain)(count, tokens, generator) if count else {})


_QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
_TOKENS_OF_IMAGE = {**dict.fromkeys((*_QWEN, "llava", "gemma3", "mistral3"), 4), "phi4_multimodal": 5}


def _plain(count: int, tokens: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(count, 3, 16, 16, generator=generator)}


def _patches(count: int, tokens: int, generator: torch.Generator) -> dict[str, Tensor]:
    grid = torch.tensor([[1, 4, 4]] * count)
    return {"pixel_values": torch.randn(16 * count, 96, generator=generator), "image_grid_thw": grid}


def _sized(count: int, tokens: int, generator: torch.Generator) -> dict[str, Tensor]:
    return _plain(count, tokens, generator) | {"image_sizes": torch.tensor([[16, 16]] * count)}


def _masked(count: int, tokens: int, generator: torch.Generator) -> dict[str, Tensor]:
    pixels = _plain(count, tokens, generator)["pixel_values"]
    return {"pixel_values": pixels[None], "pixel_attention_mask": torch.ones(1, count, 16, 16, dtype=torch.int64)}


def _tiled(count: int, tokens: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "pixel_values": torch.randn(1, count, 2, 3, 16, 16, generator=generator),
        "aspect_ratio_ids": torch.full((1, count), 2),
        "aspect_ratio_mask": torch.ones(1, count, 2, dtype=torch.int64),
        "cross_attention_mask": torch.ones(1, tokens, count, 2, dtype=torch.int64),
    }


def _whole_and_crop(count: int, tokens: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "image_pixel_values": torch.randn(count, 2, 3, 16, 16, generator=generator),
        "image_sizes": torch.tensor([[16, 16]] * count),
        "image_attention_mask": torch.ones(count, 2, 2, 2),
    }


_PIXELS = {
    **dict.fromkeys(_QWEN, _patches),
    **dict.fromkeys(("idefics3", "smolvlm"), _masked),
    "mllama": _tiled,
    "mistral3": _sized,
    "phi4_multimodal": _whole_and_crop,
}
