"""The flags for single layers and the head, from words to what a dry run prints."""

from pathlib import Path

import pytest

from autoround.cli.main import main
from autoround.cli.quantize import parse
from autoround.errors import UsageError
from autoround.recipe import Recipe
from tests.formats.quantized import tiny_llama
from tests.refusals import refused

RELAXED = "{k_proj:{bits:8},.*down:{bits:4}}"


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        (["--quant_lm_head"], {"quant_lm_head": True}),
        (["--quant-lm-head", "--no_quant_lm_head"], {"quant_lm_head": False}),
        (["--layer_config", RELAXED], {"layer_config": {"k_proj": {"bits": 8}, ".*down": {"bits": 4}}}),
        (["--layer-config={k_proj: keep}"], {"layer_config": {"k_proj": "keep"}}),
        (["--ignore_layers", "lm_head,Down"], {"ignore_layers": ("lm_head", "Down")}),
        (["--fp_layers", "lm_head"], {"ignore_layers": ("lm_head",)}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_words(words: list[str], settings: dict[str, object]) -> None:
    assert parse(["m", *words], "default").recipe == Recipe(model="m", **settings)


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "layers.yaml").write_text("k_proj: {bits: 8}\n'.*down': {bits: 4}\n")
    words = ["m", "--layer_config", str(tmp_path / "layers.yaml")]
    assert parse(words, "default").recipe == parse(["m", "--layer_config", RELAXED], "default").recipe


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layer_config", "nothing.json"], "layer_config: [Errno 2] No such file or directory: 'nothing.json'"),
        (["--layer_config", "{k_proj:{bit:8}}"], "layer_config: k_proj: found unknown setting 'bit'; known are bits, "),
        (["--ignore_layers", "(a"], "ignore_layers: found '(a', no regular expression ("),
        (["--avg_bits", "3"], "--avg_bits: not available yet; use --layer_config to give layers bits of their own"),
        (
            ["--quant_lm_head", "--format", "auto_round,auto_awq"],
            "format auto_awq: found --quant_lm_head; needed off; ",
        ),
    ],
    ids=" ".join,
)
def test_what_cannot_be_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    refused(["model that is never opened", *words], 2, message, capsys)


DRY = """\
LlamaForCausalLM: 2 blocks, 12 layers to quantize with 55,296 weights

quantized
      2 x q_proj      64x64  W4A16G32
      2 x k_proj      32x64  W8A16G32
      2 x v_proj      32x64  W4A16G32
      1 x gate_proj   96x64  W2A16G-1
      1 x up_proj     96x64  W2A16G-1
      1 x down_proj   64x96  W2A16G-1
      1 x gate_proj   96x64  W4A16G32
      1 x up_proj     96x64  W4A16G32
      1 x lm_head    128x64  W8A16G32

kept
      2 x o_proj     64x64  asked for by layer_config o_proj
      1 x down_proj  64x96  asked for by ignore_layers layers.1.mlp.down

notes
  lm_head is untied from model.embed_tokens, which stays unquantized
  q_proj, k_proj and v_proj differ in model.layers.0.self_attn and 1 more: vLLM and SGLang run them as one layer \
and refuse packed formats of this model
"""


def test_a_dry_run_shows_every_fate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_llama(tied=True).save_pretrained(tmp_path / "m")
    config = "{k_proj:{bits:8},o_proj:keep,layers.0.mlp:{bits:2,group_size:-1},lm_head:{bits:8}}"
    words = [str(tmp_path / "m"), "--group_size", "32", "--layer_config", config, "--fp_layers", "layers.1.mlp.down"]
    capsys.readouterr()
    assert main([*words, "--dry_run", "--no_probe", "--output_dir", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.startswith(f"{DRY}\nmemory (")
    wrong = ["--layer_config", "{k_porj:{bits:8}}", "--output_dir", str(tmp_path / "out")]
    assert main([*words, *wrong, "--dry_run"]) == 2
    assert "layer_config: found 'k_porj', which names no layer; " in capsys.readouterr().err


def test_settings_are_refused_where_a_file_type_decides() -> None:
    from autoround.families import split

    for words in (["--layer_config", RELAXED], ["--ignore_layers", "k_proj"], ["--quant_lm_head"]):
        with pytest.raises(UsageError, match="format gguf:q4_k_m: found --"):
            split(parse(["m", "--format", "gguf:q4_k_m", *words], "default").recipe)
