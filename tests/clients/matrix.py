"""Every client, layout, width and symmetry: which test shows what, or why there is none."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple, TypeAlias

from autoround.formats.rules import RULES
from tests.clients import cases, test_own_loader, test_vllm
from tests.clients.cases import Case, Refusal

Cell: TypeAlias = tuple[int, bool]
# A test's module and the name of its parameters.
Key: TypeAlias = tuple[str, str]
# Of ``make clients``: a test's outcome, the worst where a case has several tests.
Outcomes: TypeAlias = Mapping[Key, str]


def _reader(client: str, file_type: str) -> Key:
    return "test_own_loader", f"{file_type}-{client}"


PASSED, NOT_RUN = "passed", "not run"
OWN = test_own_loader.CLIENTS["load", "own"]
VLLM = test_vllm.CLIENTS["vllm", "vllm"]
# Client -> its column in the first table.
COLUMNS = {
    OWN: "`autoround.load`",
    cases.CLIENTS["auto_round", "auto-round"]: "auto-round",
    cases.CLIENTS["auto_round", "auto-round-lib"]: "auto-round, auto-round-lib",
    cases.CLIENTS["gptqmodel", "gptqmodel"]: "GPTQModel",
    cases.CLIENTS["transformers", "gptqmodel"]: "transformers, GPTQModel",
    cases.CLIENTS["transformers", "auto-round"]: "transformers, compressed-tensors",
    cases.CLIENTS["compressed_tensors", "auto-round"]: "compressed-tensors",
    VLLM: "vLLM, CPU",
}
# Client -> the test of a GGUF file type.
FILE_COLUMNS: dict[str, Callable[[str], Key]] = {
    "llama.cpp through xllamacpp 2026.10": lambda name: ("test_gguf_files", name),
    **{client: partial(_reader, client) for client in test_own_loader.FILE_CLIENTS},
}
# Layout -> widths and symmetries it is written with; what ``fake`` was rounded to is not in the file.
STORED: dict[str, tuple[Cell, ...]] = {
    name: tuple((bits, sym) for sym in cases.BOTH for bits in rules.bits)
    for name, rules in RULES.items()
    if not rules.file_type
} | {"auto_round": ((2, False), (3, False), (8, False)), "fake": ((3, False),)}
PACKINGS = ("auto_round", "auto_round:auto_awq", "auto_round:auto_gptq", "auto_round:gptqmodel")
_ORDINARY = "an ordinary checkpoint, which transformers loads without it"
_ASKS_INTEL = "handed to transformers, which asks for the package auto-round"
_ASKS_COMPRESSED = "handed to transformers, which asks for compressed-tensors"
_OTHER = "not its layout"
# Client -> layout -> why none of its cells can be read.
NOT_READ: dict[str, dict[str, str]] = {
    **{
        cases.CLIENTS["auto_round", environment]: {"llm_compressor": _OTHER, "fake": _ORDINARY}
        for environment in ("auto-round", "auto-round-lib")
    },
    **{
        cases.CLIENTS[loader, "gptqmodel"]: {
            **dict.fromkeys(PACKINGS, _ASKS_INTEL),
            "llm_compressor": _ASKS_COMPRESSED,
        }
        for loader in ("gptqmodel", "transformers")
    },
    cases.CLIENTS["transformers", "auto-round"]: {
        **dict.fromkeys(PACKINGS, "loaded by the package auto-round: see there"),
        **dict.fromkeys(("auto_gptq", "gptq_v2", "auto_awq"), "needs GPTQModel: see there"),
    },
    cases.CLIENTS["compressed_tensors", "auto-round"]: {
        **dict.fromkeys((*PACKINGS, "auto_gptq", "gptq_v2", "auto_awq"), _OTHER),
        "fake": "an ordinary checkpoint: nothing to unpack",
    },
    VLLM: dict.fromkeys(("auto_round", "auto_round:gptqmodel"), "not one of the packings that it reads"),
}
# End of a case's name -> what it shows beside widths and symmetry.
BESIDE = {
    "whole-rows": "whole rows as groups",
    "groups-of-16": "groups of 16",
    "mixed-groups": "mixed group sizes",
    "mixed-bits": "mixed bits",
    "conv1d-quantized-head": "Conv1D, a tied and quantized head",
    "quantized-head": "a quantized head",
    "kept-layers": "kept layers",
    "kept-in-one-block": "layers that one block keeps",
    "kept-experts": "kept experts",
    "kept-part": "a kept part of layers that are joined",
    "tied-conv1d": "Conv1D and a tied head",
    "bfloat16-scales": "bfloat16 scales",
    "points-of-0": "zero points of 0",
}


class Tests(NamedTuple):
    """A module of tests: who is tested on what."""

    module: str
    clients: Mapping[tuple[str, str], str]
    cases: Mapping[str, Case]
    refused: Mapping[str, tuple[Case, str] | Refusal]


TESTS = (
    Tests("test_loaders", cases.CLIENTS, cases.CASES, cases.REFUSED),
    Tests("test_vllm", test_vllm.CLIENTS, test_vllm.CASES, test_vllm.REFUSED),
    Tests("test_own_loader", test_own_loader.CLIENTS, test_own_loader.CASES, {}),
)


class Claim(NamedTuple):
    """What a test shows: that a client computes the same, or ``words`` of its refusal; and how the test ended."""

    client: str
    layout: str
    cell: Cell | None
    beside: str
    outcome: str
    words: str | None = None
    note: str = ""


def beside(name: str) -> str:
    """What a case shows beside widths and symmetry, by the end of its name."""
    return next((text for end, text in BESIDE.items() if name.endswith(end)), "")


def claims(outcomes: Outcomes) -> list[Claim]:
    """All of them; a test without an outcome was not run."""
    found = []
    for module, clients, own, refused in TESTS:
        shown: dict[str, Case | Refusal] = {**own, **{name: Refusal(*entry) for name, entry in refused.items()}}
        for name, entry in shown.items():
            case, *answer = (entry,) if isinstance(entry, Case) else entry
            client, cell = clients[case.loader, case.environment], case.cell
            if case.layout == "fake" and cell is not None:
                cell = STORED["fake"][0]
            outcome = outcomes.get((module, name), NOT_RUN)
            found.append(Claim(client, case.layout, cell, beside(name), outcome, *answer))
    return found


def gaps(found: list[Claim]) -> set[tuple[str, str, Cell]]:
    """Client, layout and cell of what neither a test nor a reason stands for."""
    known = {(claim.client, claim.layout, claim.cell) for claim in found}
    return {
        (client, layout, cell)
        for client in COLUMNS
        for layout, cells in STORED.items()
        for cell in cells
        if layout not in NOT_READ.get(client, {}) and (client, layout, cell) not in known
    }
