"""The page docs/models.md, written from runs of all families: python -m tests.families.page."""

import logging
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from autoround import func
from autoround.errors import AutoRoundError
from autoround.model.blocks import find_blocks
from tests.families import contracts
from tests.families.table import FAMILIES

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
_TITLES = {
    "dense": "Dense models",
    "hybrid": "Hybrid and recurrent models",
    "experts": "Mixtures of experts",
    "vision": "Models of images and text",
}
_HEAD = """# Model families

Written by `make families`. Every row is a test: a tiny random model of transformers' own class is saved, quantized
to 2 bits block by block and exported as `auto_round`; `autoround.load` reads the folder with the same class, and its
logits are those of the model with the codes' weights. Blocks lifted out of the model and called with what was recorded
compute what the model computes, block after block; no tensor of a block is read twice; and the first block's outputs
are closer to the float ones after tuning than after rounding to nearest.

Blocks are found by structure: there is no code for any of these families but a table of four entries, which lets xLSTM
run in float32, tells how the experts of Llama 4 lie, names the routers of JetMoE, and takes the halving of hidden
states away from RWKV, so that others of the same kinds should work as well. *Functions* counts the blocks that compute
different things: each of these gets a compiled step of its own, equal blocks share one. *Layers* counts those quantized
and those kept, with the reasons in the plan that `--dry-run` prints. Models of images and text are tuned on rows of two
images, one and none, some padded; their towers are kept. Embeddings, norms, convolutions and parameters that are no
layers are always kept.
"""


def row(name: str) -> tuple[str, str, str, str, str]:
    """Model type, blocks and functions, layers, what is special, and whether it works.

    Raises:
        AssertionError: a contract does not hold, or the engine takes what the table says it refuses.
    """
    family = FAMILIES[name]
    with tempfile.TemporaryDirectory() as folder:
        try:
            case = contracts.quantized(name, Path(folder))
        except AutoRoundError as error:
            assert family.refused, f"{name}: {error}"
            words = str(error).replace(folder, "").partition(": found ")[2]
            return f"`{name}`", "", "", family.special, f"no: found {words}"
        assert not family.refused, f"{name} works; take its refusal out of the table"
        contracts.check_all(case)
        blocks = find_blocks(case.model)
        functions = {func.make_block_fn(case.model.get_submodule(path)).signature for path in blocks}
        fates = Counter(layer.spec is not None for layer in case.tuned.plan.layers.values())
        return (
            f"`{name}`",
            f"{len(blocks)} / {len(functions)}",
            f"{fates[True]} + {fates[False]} kept",
            family.special,
            "yes",
        )


def page() -> Iterator[str]:
    """The lines of the page; each family is run when its line is asked for."""
    yield _HEAD
    for kind, title in _TITLES.items():
        yield f"\n## {title}\n\n| model type | blocks / functions | layers | special | works |\n|---|---|---|---|---|\n"
        for name, family in FAMILIES.items():
            if family.kind == kind:
                yield f"| {' | '.join(row(name))} |\n"


def main() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    lines = []
    for line in page():
        sys.stdout.write(line)
        sys.stdout.flush()
        lines.append(line)
    PAGE.write_text("".join(lines))


if __name__ == "__main__":
    main()
