"""The file of settings that every run leaves in its journal."""

from pathlib import Path

from autoround import Recipe, config, quantize
from tests.formats.quantized import tiny_llama


def test_a_run_repeated_from_its_file_writes_the_same_codes(tmp_path: Path) -> None:
    source = tmp_path / "model"
    tiny_llama().save_pretrained(source)
    settings = {"bits": 3, "group_size": 16, "layer_config": {"k_proj": {"bits": 8}}, "clip_search": False}
    first = quantize(source, Recipe.preset("rtn", output_dir=str(tmp_path / "a"), **settings))
    list(first)
    repeated = Recipe(**config.read(first.journal_folder / config.NAME) | {"output_dir": str(tmp_path / "b")})
    assert repeated.model == str(source)
    second = quantize(repeated.model, repeated)
    list(second)
    for file in sorted((first.journal_folder / "blocks").iterdir()):
        assert file.read_bytes() == (second.journal_folder / "blocks" / file.name).read_bytes()
