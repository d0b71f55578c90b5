"""Configurations name exactly those layers of mixtures of experts that differ, as the files call them."""

import re
from typing import Any

import pytest

from tests.engine import mixtures
from tests.formats.quantized import quantized

KEPT, WIDE = {r"mlp\.experts\.": "keep"}, {r"mlp\.experts\.": {"bits": 8}}
_EXPERT = re.compile(r"(.+\.experts)\.\d+\.[^.]+")


def config(name: str, form: str, layers: Any) -> tuple[dict[str, Any], set[str], set[str]]:
    """What a configuration says, the layers of the files by the names of their tensors, and those that are kept."""
    contents = quantized(mixtures.make(name), form, layers=layers).contents(form)
    assert contents.config is not None
    stored = [key.rpartition(".") for key, _ in contents.heads()]
    return contents.config, {layer for layer, *_ in stored}, {layer for layer, _, kind in stored if kind == "weight"}


def dynamic(found: dict[str, Any], sign: str) -> list[str]:
    return [key.removeprefix(f"{sign}:") for key in found["dynamic"] if key.startswith(sign)]


def auto_round(found: dict[str, Any], bits: int) -> list[str]:
    return [key if key.startswith("^") else f"^{re.escape(key)}$"
            for key, own in found["extra_config"].items() if own["bits"] == bits]  # fmt: skip


def compressed(names: list[str]) -> list[str]:
    return [name.removeprefix("re:") if name.startswith("re:") else f"{re.escape(name)}$" for name in names]


def group_of(found: dict[str, Any], bits: int) -> list[str]:
    (targets,) = (own["targets"] for own in found["config_groups"].values() if own["weights"]["num_bits"] == bits)
    return compressed(targets)


READ: dict[str, Any] = {
    "auto_round-kept": ("auto_round", KEPT, lambda found: auto_round(found, 16)),
    "auto_round-wide": ("auto_round", WIDE, lambda found: auto_round(found, 8)),
    "auto_gptq-kept": ("auto_gptq", KEPT, lambda found: dynamic(found, "-")),
    "auto_gptq-wide": ("auto_gptq", WIDE, lambda found: dynamic(found, "+")),
    "auto_awq-kept": ("auto_awq", KEPT, lambda found: dynamic(found, "-")),
    "llm_compressor-kept": ("llm_compressor", KEPT, lambda found: compressed(found["ignore"])),
    "llm_compressor-wide": ("llm_compressor", WIDE, lambda found: group_of(found, 8)),
}


@pytest.mark.parametrize("case", READ)
@pytest.mark.parametrize("name", mixtures.APART)
def test_patterns_match_the_experts_of_the_files_and_their_modules_and_nothing_else(name: str, case: str) -> None:
    form, layers, read = READ[case]
    found, stored, kept = config(name, form, layers)
    experts = {layer for layer in stored if _EXPERT.fullmatch(layer)}
    modules = {match[1] for layer in experts if (match := _EXPERT.fullmatch(layer))}
    blocks = 1 if name.startswith("deepseek") else 2  # whose first one is dense
    assert len(experts) == 3 * 4 * blocks and len(modules) == blocks
    patterns = [re.compile(pattern) for pattern in read(found)]
    matched = {layer for layer in stored | modules if any(pattern.match(layer) for pattern in patterns)}
    assert experts | modules <= matched <= experts | modules | (kept if layers is KEPT else set())


def test_awq_names_the_module_of_experts_for_loaders_that_compare_parts() -> None:
    found, *_ = config("mixtral", "auto_awq", KEPT)
    assert "model.layers.1.block_sparse_moe.experts" in found["modules_to_not_convert"]


@pytest.mark.parametrize(("form", "read"), [("auto_round", lambda found: auto_round(found, 16)),
                                            ("llm_compressor", lambda found: compressed(found["ignore"]))])  # fmt: skip
def test_a_module_is_not_meant_where_one_of_its_stacks_is(form: str, read: Any) -> None:
    found, stored, _ = config("qwen3_moe", form, {"experts.down_proj": "keep"})
    patterns = [re.compile(pattern) for pattern in read(found)]
    matched = {layer for layer in stored if any(pattern.match(layer) for pattern in patterns)}
    assert {layer for layer in matched if ".experts." in layer} == {
        f"model.layers.{block}.mlp.experts.{expert}.down_proj" for block in range(2) for expert in range(4)
    }
    assert not any(pattern.match("model.layers.0.mlp.experts") for pattern in patterns)


def test_stacks_that_checkpoints_hold_whole_are_named_as_they_are_packed() -> None:
    found, stored, _ = config(mixtures.STACKED, "auto_round", WIDE)
    (pattern, _) = (re.compile(key) for key in auto_round(found, 8))
    experts = {
        f"model.layers.0.mlp.experts.{expert}.{stack}_proj" for expert in range(4) for stack in ("gate_up", "down")
    }
    assert {layer for layer in stored if pattern.match(layer)} == experts | {"model.layers.0.mlp.experts"}
