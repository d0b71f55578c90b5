"""What has to hold for every family: contracts over one run of a tiny model.

Legend: N rows, T tokens, D hidden size, V vocabulary.
"""

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import autoround
from autoround import func
from autoround.data.tokens import load_calibration
from autoround.engine import Run, quantize
from autoround.func.block import transposed_weights
from autoround.journal import Journal
from autoround.model.blocks import find_blocks
from autoround.model.capture import capture
from autoround.model.carry import strip
from autoround.model.finish import Ending, head_path
from autoround.model.load import open_model
from autoround.model.media import Media
from autoround.model.source import WeightSource
from autoround.recipe import Recipe
from tests.families import table
from tests.families.images import images
from tests.model.tiny import block_outputs, chained_outputs

STEPS = 6


class Spy:
    """A source that remembers what was read."""

    def __init__(self, source: WeightSource) -> None:
        self.source, self.read_names = source, list[str]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def read(self, name: str) -> Tensor:
        self.read_names.append(name)
        return self.source.read(name)


class Rows(NamedTuple):
    """Token ids, which of them count, and what comes beside them."""

    tokens_NT: Tensor
    valid_NT: Tensor
    media: Media


@dataclass(frozen=True, kw_only=True)
class Case:
    """A family's model, a tuned run of it that is exported, one rounded to nearest, and what the tuned one read."""

    model: PreTrainedModel
    folder: Path
    tuned: Run
    nearest: Run
    read_names: tuple[str, ...]
    rows: Rows


def rows() -> tuple[Tensor, Tensor]:
    """Token ids, and which of them count: all."""
    shape = (table.ROWS, table.TOKENS)
    tokens_NT = torch.randint(3, table.VOCABULARY, shape, generator=torch.Generator().manual_seed(1))
    return tokens_NT, torch.ones(shape, dtype=torch.bool)


def quantized(model_type: str, folder: Path) -> Case:
    """Save a family's model, quantize the folder twice and export it."""
    model, dataset = table.make(model_type), images(model_type) or rows()[0].tolist()
    model.save_pretrained(folder / "float")
    tuned, nearest = (
        quantize(str(folder / "float"), _recipe(folder / name, preset, dataset))
        for name, preset in (("tuned", "default"), ("nearest", "rtn"))
    )
    spy = Spy(tuned.model.source)
    tuned.model = dataclasses.replace(tuned.model, source=spy)
    hashed = len(spy.source.names())
    for run in (tuned, nearest):
        for _ in run:
            pass
    names = tuple(spy.read_names[hashed:])
    tuned.export()
    calibration = load_calibration(dataset, None, nsamples=table.ROWS, seqlen=table.TOKENS, batch_size=1, seed=0)
    own = Rows(calibration.tokens_NT, calibration.valid_NT, Media(calibration.extras))
    return Case(model=model, folder=folder / "tuned", tuned=tuned, nearest=nearest, read_names=names, rows=own)


def check_all(case: Case) -> None:
    """Every contract."""
    for check in (check_plan, check_blocks, check_ending, check_reads, check_loss, check_export):
        check(case)


def check_plan(case: Case) -> None:
    """Every matrix of the model is a planned layer, or of a module that has no output features to quantize by."""
    planned = {layer.shape.parameter for layer in case.tuned.plan.layers.values()}
    for layer in case.tuned.plan.layers.values():
        assert layer.spec is not None or layer.reason, layer.shape.path
    for name, parameter in case.model.named_parameters():
        path, _, last = name.rpartition(".")
        if parameter.ndim < 2 or name in planned:
            continue
        module = case.model.get_submodule(path)
        assert isinstance(module, nn.Embedding | nn.Conv1d | nn.Conv2d | nn.Conv3d) or last != "weight", name
    assert case.tuned.plan.specs


def check_blocks(case: Case) -> None:
    """Lifted blocks with recorded calls compute what the model computes."""
    model = open_model(case.folder.parent / "float")
    blocks, (tokens_NT, valid_NT, media) = find_blocks(model.skeleton), case.rows
    captured = capture(model, tokens_NT, valid_NT, batch_size=3, media=media)
    expected = block_outputs(case.model, blocks, *case.rows)
    outputs = chained_outputs(model, blocks, captured, batch_size=2)
    assert len(outputs) == len(expected) == len(blocks)
    for path, output_NTW, expected_NTD in zip(blocks, outputs, expected, strict=True):
        output_NTD = strip(model.skeleton.get_submodule(path), output_NTW)
        torch.testing.assert_close(
            output_NTD, expected_NTD, rtol=1e-4, atol=1e-4, msg=lambda text, at=path: f"{at}: {text}"
        )


def check_ending(case: Case) -> None:
    """What follows the last block, run by itself, gives the head what the model gives it."""
    model, (tokens_NT, valid_NT, media) = open_model(case.folder.parent / "float"), case.rows
    blocks, head = find_blocks(model.skeleton), head_path(model.skeleton)
    captured = capture(model, tokens_NT, valid_NT, batch_size=3, media=media)
    outputs = chained_outputs(model, blocks, captured, 2)
    ending = Ending(model, blocks, head, torch.device("cpu"), torch.float32)
    pairs = ending.head_inputs(outputs[-1], tokens_NT, valid_NT, batch_size=3, media=media)
    ours_NTD = torch.cat([own for own, _ in pairs])
    inputs: list[Tensor] = []
    hook = case.model.get_submodule(head).register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    logits(case.model, case.rows)
    hook.remove()
    torch.testing.assert_close(ours_NTD, inputs[0], rtol=1e-3, atol=1e-3)


def check_reads(case: Case) -> None:
    """Blocks are read one after another, each tensor once; capturing reads none of them."""
    blocks = find_blocks(case.model)
    order = [blocks.index(block) for name in case.read_names for block in blocks if name.startswith(f"{block}.")]
    inside = [name for name in case.read_names if name.startswith(tuple(f"{block}." for block in blocks))]
    assert order == sorted(order)
    assert len(inside) == len(set(inside))


def check_loss(case: Case) -> None:
    """Tuning brings the outputs of the first block closer to the float ones than rounding to nearest."""
    first = find_blocks(case.model)[:1]
    expected_NTD, tuned_NTD, nearest_NTD = (
        block_outputs(model, first, *case.rows)[0]
        for model in (case.model, dequantized(case.model, case.tuned), dequantized(case.model, case.nearest))
    )
    errors = [float((each - expected_NTD).square().mean()) for each in (tuned_NTD, nearest_NTD)]
    assert errors[0] <= errors[1], errors


def check_export(case: Case) -> None:
    """The folder is read back by the family's own class and computes with the weights that the codes stand for."""
    loaded = autoround.load(case.folder / "out", dtype=torch.float32)
    assert type(loaded) is type(case.model)
    ours, expected = (logits(each, case.rows) for each in (loaded, dequantized(case.model, case.tuned)))
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
    assert not torch.equal(expected, logits(case.model, case.rows))


def dequantized(model: PreTrainedModel, run: Run) -> PreTrainedModel:
    """The float model with the codes' weights in place."""
    changed, layers = copy.deepcopy(model), run.plan.layers
    turned = transposed_weights(run.model.skeleton)
    with torch.no_grad():
        for path, own in _codes(run):
            weight_OI, shape = func.dequantize(own, run.plan.specs[path]), layers[path].shape
            weight = weight_OI.unflatten(0, (shape.experts, -1)) if shape.experts else weight_OI
            changed.get_parameter(shape.parameter).copy_(weight.mT if f"{path}.weight" in turned else weight)
    return changed


def logits(model: PreTrainedModel, rows: Rows) -> Tensor:
    mask = None if rows.valid_NT.all() else rows.valid_NT.long()
    own = rows.media.take(torch.arange(len(rows.tokens_NT)))
    with torch.no_grad():
        return model(input_ids=rows.tokens_NT, attention_mask=mask, use_cache=False, **own).logits.float()


def _codes(run: Run) -> Iterator[tuple[str, func.IntCodes]]:
    journal = Journal(run.journal_folder, {})
    for index, part in enumerate(run.plan.parts):
        for relative, own in journal.read_block(index).items():
            yield f"{part.prefix}{relative}", own


def _recipe(folder: Path, preset: str, dataset: Any) -> Recipe:
    own: dict[str, Any] = {"iters": STEPS, "keep": "best"} if preset == "default" else {}
    return Recipe.preset(
        preset,
        bits=2,
        group_size=32,
        dataset=dataset,
        nsamples=table.ROWS,
        seqlen=table.TOKENS,
        batch_size=table.ROWS,
        output_dir=str(folder / "out"),
        device_map="cpu",
        torch_compile=False,
        **own,
    )
