"""Processors of the families that see images, saved beside their tiny models; every word is one token."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    Idefics3ImageProcessorPil,
    MllamaImageProcessorPil,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
)

from tests.families.table import VOCABULARY, make
from tests.families.vision import IMAGE

TEMPLATE = (
    "{% for message in messages %}{{ message.role }} {% for part in message.content %}"
    "{% if part.type == 'image' %}SHOWN {% else %}{{ part.text }} {% endif %}{% endfor %}</s> {% endfor %}"
)
# Names of the image token and those after it, how a template shows an image, and the settings that go with it.
_WORDS: dict[str, tuple[tuple[str, ...], str, dict[str, Any]]] = {
    "qwen2_vl": (
        ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"),
        "<|vision_start|><|image_pad|><|vision_end|>",
        {},
    ),
    "llava": (
        ("<image>",),
        "<image>",
        {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    ),
    "idefics3": (
        ("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"),
        "<image>",
        {"image_seq_len": 1},
    ),
    "mllama": (("<|image|>", "<|python_tag|>"), "<|image|>", {}),
}


def save(model_type: str, folder: Path) -> None:
    """A family's tiny model with its processor, in the files that such models have on the hub."""
    special, shown, settings = _WORDS[model_type]
    make(model_type).save_pretrained(folder)
    tokenizer = _tokenizer(special, TEMPLATE.replace("SHOWN", shown))
    tokenizer.save_pretrained(folder)
    _image_processor(model_type).save_pretrained(folder)
    kind = {"qwen2_vl": "Qwen2VL", "llava": "Llava", "idefics3": "Idefics3", "mllama": "Mllama"}[model_type]
    config = {"processor_class": f"{kind}Processor", **settings}
    (folder / "processor_config.json").write_text(json.dumps(config))


def write_rows(folder: Path, counts: Sequence[int], words: int = 6) -> Path:
    """A file of chats with so many images each, of different sizes."""
    lines = []
    for row, count in enumerate(counts):
        parts = []
        for image in range(count):
            name = f"{row}-{image}.png"
            Image.new("RGB", (16 + 8 * row, 16 + 8 * image), (30 * row, 60, 90)).save(folder / name)
            parts.append({"type": "image", "path": name})
        text = " ".join(f"w{(7 * row + word) % 80}" for word in range(words + row))
        chat = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]},
                {"role": "assistant", "content": "w1 w2 w3"}]  # fmt: skip
        lines.append(json.dumps({"messages": chat}))
    file = folder / "rows.jsonl"
    file.write_text("\n".join(lines))
    return file


def _tokenizer(special: Sequence[str], template: str) -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{index}" for index in range(IMAGE - 4)), *special]
    words += [f"more{index}" for index in range(VOCABULARY - len(words))]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=list(special), chat_template=template,
    )  # fmt: skip


def _image_processor(model_type: str) -> Any:
    match model_type:
        case "qwen2_vl":
            sizes = {"shortest_edge": 64, "longest_edge": 256}
            return Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size=sizes)
        case "llava":
            return CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
        case "idefics3":
            edge = {"longest_edge": 16}
            return Idefics3ImageProcessorPil(size=edge, max_image_size=edge, do_image_splitting=False)
        case _:
            return MllamaImageProcessorPil(size={"height": 16, "width": 16}, max_image_tiles=2)
