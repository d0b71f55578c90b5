"""Models that see images, from files of messages to folders that load again."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

import autoround
from autoround.data.tokens import load_calibration
from autoround.engine import TEXT_ALONE, Run, quantize
from autoround.errors import AutoRoundError
from autoround.forecast.blank import blank
from autoround.model.load import open_model
from autoround.model.media import Media
from autoround.model.sample import Sampler
from autoround.recipe import Recipe
from tests.families.contracts import Rows, dequantized, logits
from tests.families.images import images
from tests.families.table import make
from tests.families.vision import IMAGE
from tests.model.processors import save, write_rows

COUNTS, TOKENS = (2, 1, 0, 1), 64


def _recipe(folder: Path, dataset: Any, **settings: Any) -> Recipe:
    own = {"bits": 4, "group_size": 32, "nsamples": 4, "batch_size": 4, "seqlen": TOKENS, "iters": 2} | settings
    return Recipe(dataset=dataset, output_dir=str(folder / "out"), device_map="cpu", torch_compile=False, **own)


def _done(run: Run) -> Run:
    for _ in run:
        pass
    return run


def _rows(source: Path, file: Path) -> Rows:
    opened = open_model(source)
    found = load_calibration(
        str(file), opened.tokenizer(), nsamples=4, seqlen=TOKENS, batch_size=4, seed=0, writer=Sampler(opened)
    )
    return Rows(found.tokens_NT, found.valid_NT, Media(found.extras))


@pytest.mark.parametrize(
    "name", ["qwen2_vl", "mllama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llava", "idefics3"))]
)
def test_rows_with_images_are_tuned_on_and_every_format_loads(name: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    save(name, source)
    file = write_rows(tmp_path, COUNTS)
    formats = ("auto_round", "auto_gptq", "auto_awq", "llm_compressor", "fake")
    run = _done(quantize(str(source), _recipe(tmp_path, str(file), format=formats)))
    folders = run.export()
    rows, model = _rows(source, file), make(name)
    expected = logits(dequantized(model, run), rows)
    assert not torch.equal(expected, logits(model, rows))
    for folder in folders:
        loaded = autoround.load(folder, dtype=torch.float32)
        assert type(loaded) is type(model)
        torch.testing.assert_close(logits(loaded, rows), expected, rtol=2e-2, atol=2e-2)
        for side in ("preprocessor_config.json", "processor_config.json", "chat_template.jinja", "tokenizer.json"):
            assert (folder / side).read_bytes() == (source / side).read_bytes()


def test_image_tokens_count_and_padding_does_not(tmp_path: Path) -> None:
    save("qwen2_vl", tmp_path)
    rows = _rows(tmp_path, write_rows(tmp_path, COUNTS))
    assert bool(rows.valid_NT[rows.tokens_NT == IMAGE].all())
    assert not bool(rows.valid_NT.all())
    ends = rows.valid_NT.sum(1)
    assert all(bool((~row[end:]).all()) for row, end in zip(rows.valid_NT, ends.tolist(), strict=True))


def test_images_in_columns_make_the_rows_that_files_make(tmp_path: Path) -> None:
    """As datasets of the hub have them: bytes, and what pillow made of them."""
    save("qwen2_vl", tmp_path)
    file = write_rows(tmp_path, COUNTS)
    opened, records = open_model(tmp_path), [json.loads(line) for line in file.read_text().splitlines()]
    for row, record in enumerate(records):
        parts = record["messages"][0]["content"]
        files = [tmp_path / part.pop("path") for part in parts if part["type"] == "image"]
        record["images"] = [Image.open(each) if row == 1 else {"bytes": each.read_bytes()} for each in files]
    writer, expected = Sampler(opened), _rows(tmp_path, file)
    found = load_calibration(
        records, opened.tokenizer(), nsamples=4, seqlen=TOKENS, batch_size=4, seed=0, writer=writer
    )
    assert torch.equal(found.tokens_NT, expected.tokens_NT)
    for row in torch.arange(4).split(1):
        own, other = Media(found.extras).take(row), expected.media.take(row)
        assert own.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in own.items())


def test_text_alone_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save("llava", tmp_path / "source")
    texts = [" ".join(f"w{(start + word) % 80}" for word in range(80)) for start in range(8)]
    with caplog.at_level(logging.WARNING, logger="autoround"):
        _done(quantize(str(tmp_path / "source"), _recipe(tmp_path, texts, seqlen=32)))
    assert TEXT_ALONE in caplog.messages


def test_blocks_that_attend_to_images_need_some(tmp_path: Path) -> None:
    save("mllama", tmp_path / "source")
    run = quantize(str(tmp_path / "source"), _recipe(tmp_path, [[5, 6, 7]] * 4))
    with pytest.raises(
        AutoRoundError, match=r"layers\.1: found no call of this block for text alone; needed rows with"
    ):
        _done(run)


def test_plans_of_such_blocks_show_the_model_an_image(tmp_path: Path) -> None:
    save("mllama", tmp_path / "source")
    bare = blank(quantize(str(tmp_path / "source"), _recipe(tmp_path, str(write_rows(tmp_path, COUNTS)))))
    assert len(bare.templates) == 3
    assert any("vision_model" in name for name in bare.outside)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("missing", r"rows\.jsonl, row 2, 'messages' message 1: found no image 1-0\.png in .*; needed a file"),
        ("unreadable", r"rows\.jsonl, row 2, 'messages': found an image that cannot be read, .*1-0\.png"),
    ],
)
def test_bad_images_name_their_row(spoil: str, message: str, tmp_path: Path) -> None:
    save("llava", tmp_path / "source")
    file = write_rows(tmp_path, COUNTS)
    if spoil == "missing":
        (tmp_path / "1-0.png").unlink()
    else:
        (tmp_path / "1-0.png").write_bytes(b"no image")
    with pytest.raises(AutoRoundError, match=message):
        _done(quantize(str(source := tmp_path / "source"), _recipe(tmp_path, str(file))))
    assert source.is_dir()


def test_images_need_a_model_that_sees_them(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path / "source")
    save("llava", tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "other")
    run = quantize(str(tmp_path / "source"), _recipe(tmp_path, str(write_rows(tmp_path, COUNTS))), tokenizer=tokenizer)
    with pytest.raises(AutoRoundError, match="found rows with images; needed a model that sees them"):
        _done(run)


def test_rows_longer_than_seqlen_are_dropped_with_their_images(tmp_path: Path) -> None:
    save("llava", tmp_path / "source")
    file = write_rows(tmp_path, (3, 3, 3, 3))
    with pytest.raises(AutoRoundError, match="found 4 rows with images, all longer than 16 tokens; needed shorter"):
        _done(quantize(str(tmp_path / "source"), _recipe(tmp_path, str(file), seqlen=16)))


@pytest.mark.parametrize("name", ["qwen2_vl", "gemma3", "mllama"])
def test_towers_are_kept_unless_asked_for(name: str, tmp_path: Path) -> None:
    """Gemma 3's tower has torch's attention, which reads the weight of a layer; Qwen2-VL looks for a dtype at one."""
    model = make(name)
    model.save_pretrained(tmp_path / "source")
    kept = quantize(str(tmp_path / "source"), _recipe(tmp_path, None, iters=0, clip_search=False))
    towers = [layer for layer in kept.plan.outside if layer.shape.nontext]
    assert towers
    assert {layer.reason for layer in towers} == {"of images, not text: --quant_nontext_module quantizes it"}
    settings = {"iters": 0, "clip_search": False, "quant_nontext_module": True}
    run = _done(quantize(str(tmp_path / "source"), _recipe(tmp_path, None, **settings)))
    assert sum(layer.spec is not None for layer in run.plan.outside) > len(towers) / 2
    (folder,) = run.export()
    calibration = load_calibration(images(name), None, nsamples=4, seqlen=TOKENS, batch_size=1, seed=0)
    rows = Rows(calibration.tokens_NT, calibration.valid_NT, Media(calibration.extras))
    expected = logits(dequantized(model, run), rows)
    torch.testing.assert_close(
        logits(autoround.load(folder, dtype=torch.float32), rows), expected, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize(
    ("name", "form", "message"),
    [
        ("llama", "auto_round", "quant_nontext_module: found no tower for images in LlamaForCausalLM"),
        (
            "llava",
            "auto_gptq",
            r"format auto_gptq: model\..*: found a quantized tower for images; needed one in 16 bits",
        ),
    ],
)
def test_towers_that_cannot_be_quantized(name: str, form: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(AutoRoundError, match=message):
        quantize(make(name), _recipe(tmp_path, None, iters=0, quant_nontext_module=True, format=(form,)))


def test_gguf_is_refused_by_name(tmp_path: Path) -> None:
    save("qwen2_vl", tmp_path / "source")
    with pytest.raises(AutoRoundError, match="qwen2_vl"):
        quantize(str(tmp_path / "source"), _recipe(tmp_path, None, format=("gguf:q4_k_m",), bits=None, group_size=None))


def test_models_in_memory_take_a_processor(tmp_path: Path) -> None:
    save("llava", tmp_path)
    processor, model = open_model(tmp_path).processor(), make("llava")
    write_rows(tmp_path, COUNTS)
    parts = [{"type": "image", "path": str(tmp_path / "1-0.png")}, {"type": "text", "text": "w1 w2 w3"}]
    records = [{"messages": [{"role": "user", "content": parts[row % 2 :]}]} for row in range(4)]
    run = quantize(model, _recipe(tmp_path, records), tokenizer=processor)
    (folder,) = _done(run).export()
    assert type(open_model(tmp_path).processor()) is type(processor)
    assert (folder / "processor_config.json").is_file()
    assert (folder / "tokenizer.json").is_file()
    with pytest.raises(AutoRoundError, match="found no processor with a model in memory; needed one for images"):
        _done(quantize(model, _recipe(tmp_path / "bare", records), tokenizer=processor.tokenizer))


def test_processors_are_saved_as_they_came(tmp_path: Path) -> None:
    save("idefics3", tmp_path / "source")
    settings = json.loads((tmp_path / "source" / "processor_config.json").read_text())
    assert type(open_model(tmp_path / "source").processor()).__name__ == settings["processor_class"]
