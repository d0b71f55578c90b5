"""Blocks that are spread over devices.

The processor and torch's meta device stand for two devices: tensors without data refuse to meet those of another one.
Values are compared with the processor as every device, so that moves do nothing.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from autoround import engine, func
from autoround.activations import Inputs, Stream
from autoround.backends.base import Numerics
from autoround.backends.cpu import CPU
from autoround.errors import UsageError
from autoround.forecast.blank import blank, mapped
from autoround.forecast.count import ByteCount
from autoround.func.block import block_tensors
from autoround.model.calls import CallTemplate, Hidden, Shared
from autoround.model.read import read_block
from autoround.placement import SpreadFn, as_named, find_named, fitted, place, spread, weight_bytes
from autoround.tuner import BlockTuner, Tuned
from tests.engine import mixtures
from tests.engine.small import codes, equal_share, make, recipe, tune

HOME, AWAY = torch.device("meta"), torch.device("cpu")
SPLITS = {
    "attention away": {"self_attn": AWAY},
    "most away": {"self_attn": AWAY, "mlp": AWAY, "input_layernorm": AWAY},
    "layers apart": {"self_attn.q_proj": AWAY, "self_attn.v_proj": AWAY, "mlp.up_proj": AWAY},
    "one within the other": {"mlp": AWAY, "mlp.down_proj": HOME},
}
AWAY_PATHS = {
    "attention away": ("self_attn",),
    "most away": ("self_attn", "mlp"),
    "layers apart": ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"),
    "one within the other": ("mlp.gate_proj", "mlp.up_proj"),
}
RECIPES: dict[str, dict[str, Any]] = {
    "steps": {},
    "momentum and the best step": {"momentum": 0.9, "keep": "best"},
    "Adam": {"adam": True},
    "searched": {"clip_search": True},
    "no steps, columns make up": {"iters": 0, "clip_search": True, "compensate": True},
}
ROWS, TOKENS, WIDTH = 8, 16, 32


def block(width: int = WIDTH) -> nn.Module:
    model = make(num_hidden_layers=1, hidden_size=width, intermediate_size=2 * width, head_dim=width // 4)
    found: nn.Module = model.model.layers[0]
    return found


def inputs(home: torch.device, width: int = WIDTH) -> Inputs:
    """Rows for a block of Llama, and how it is called."""
    generator = torch.Generator().manual_seed(0)
    x_NTD = torch.randn(ROWS, TOKENS, width, generator=generator).to(home)
    angle_1TI = torch.randn(1, TOKENS, width // 4, generator=generator).to(home)
    leaves, spec = torch.utils._pytree.tree_flatten(((0,), {"position_embeddings": (1, 2), "attention_mask": None}))
    shared = (Hidden(), Shared(angle_1TI.cos()), Shared(angle_1TI.sin()))
    template = CallTemplate(tuple(leaf if leaf is None else shared[leaf] for leaf in leaves), spec)
    return Inputs(template, Stream(x_NTD, x_NTD), torch.ones(ROWS, TOKENS, dtype=torch.bool).to(home))


def tuned(own: nn.Module, settings: dict[str, Any], folder: Path, parts: int, places: dict[str, torch.device] | None,
          home: torch.device, width: int = WIDTH) -> Tuned:  # fmt: skip
    made = recipe(folder, **({"iters": 2} | settings))
    paths = [path for path in func.linear_paths(own) if made.iters or path.endswith(("q_proj", "k_proj", "up_proj"))]
    specs = {path: func.QuantSpec(bits=8 if "down" in path else 2, group_size=min(width, 128)) for path in paths}
    numerics = Numerics(
        device="cuda", dtype="float32", attention="eager", compiler=None, threads=1, micro_batches=parts
    )
    block_fn, tensors = func.make_block_fn(own), block_tensors(own)
    if places is not None:
        block_fn = spread(block_fn, {"": home} | places)
        tensors = block_fn.sent(tensors)
    tuner = BlockTuner(made, numerics, [home], on_step=lambda done, loss: None)
    return tuner.tune(0, block_fn, tensors, specs, inputs(home, width))


@pytest.mark.parametrize(
    ("split", "settings"),
    [*((split, "steps") for split in SPLITS), *(("layers apart", own) for own in list(RECIPES)[1:])],
)
def test_no_operation_takes_tensors_of_two_devices(split: str, settings: str, tmp_path: Path) -> None:
    own = block()
    with FakeTensorMode(allow_non_fake_inputs=True), ByteCount():
        done = tuned(own, RECIPES[settings], tmp_path, 2, SPLITS[split], HOME)
    away = {path for path, codes in done.codes.items() if codes.q_OI.device == AWAY}
    assert away == {path for path in done.codes if path.startswith(AWAY_PATHS[split])}
    assert done.stream is not None and done.stream.quantized_NTD.device == HOME


def test_experts_compute_elsewhere(tmp_path: Path) -> None:
    """The tokens that each takes are counted there, and starved ones are sent some."""
    settings = {"iters": 1, "nsamples": 4, "starved_experts": "route_all"}
    bare = blank(engine.quantize(mixtures.make("qwen3_moe"), recipe(tmp_path, **settings)))
    run, part = bare.run, bare.run.plan.blocks[0]
    numerics = replace(run.numerics, device="cuda", compiler=None)
    with FakeTensorMode(allow_non_fake_inputs=True), ByteCount():
        block_fn = spread(bare.block_fn(0), {"": HOME, "mlp.experts": AWAY})
        tensors = block_fn.sent(read_block(bare.model, part.path))
        x_NTD = torch.empty(4, *bare.hidden, dtype=numerics.torch_dtype, device=HOME)
        template = mapped(bare.templates[0], lambda tensor: torch.empty_like(tensor, device=HOME))
        given = Inputs(template, Stream(x_NTD, x_NTD), torch.empty(4, TOKENS, dtype=torch.bool, device=HOME))
        tuner = BlockTuner(run.recipe, numerics, [HOME], on_step=lambda done, loss: None)
        done = tuner.tune(0, block_fn, tensors, part.specs, given)
    assert {path for path, own in done.codes.items() if own.q_OI.device == AWAY} == {
        path for path in done.codes if path.startswith("mlp.experts")}  # fmt: skip
    assert {own_E.device for own_E in done.tokens.values()} == {AWAY}


def test_tensors_of_two_devices_are_noticed() -> None:
    """What the test above relies on."""
    own = block()
    block_fn, call = func.make_block_fn(own), inputs(HOME).template
    spread_fn = spread(block_fn, {"": HOME, "mlp": AWAY})
    bound = call.bind(torch.empty(2, TOKENS, WIDTH, device=HOME), torch.arange(2))
    with FakeTensorMode(allow_non_fake_inputs=True):
        tensors = {name: torch.empty(tensor.shape) for name, tensor in block_tensors(own).items()}
        assert spread_fn(spread_fn.sent(tensors), bound).device == HOME
        with pytest.raises(RuntimeError, match="device"):
            block_fn(spread_fn.sent(tensors), bound)


@pytest.mark.parametrize(("settings", "parts"), [("steps", 1), ("steps", 2), ("searched", 1)])
def test_where_modules_compute_makes_no_difference(settings: str, parts: int, tmp_path: Path) -> None:
    """Not in one bit, as long as the devices compute alike."""
    cpu = torch.device("cpu")
    one = tuned(block(), RECIPES[settings], tmp_path, parts, None, cpu)
    other = tuned(block(), RECIPES[settings], tmp_path, parts, dict.fromkeys(SPLITS["layers apart"], cpu), cpu)
    assert one.stream is not None and other.stream is not None
    assert torch.equal(one.losses_K, other.losses_K)
    assert torch.equal(one.stream.quantized_NTD, other.stream.quantized_NTD)
    assert all(
        torch.equal(*pair) for path in one.codes for pair in zip(one.codes[path], other.codes[path], strict=True)
    )


def test_a_block_is_kept_together_as_far_as_devices_have_room() -> None:
    own = block()
    sizes = {name: sum(each.numel() for each in module.parameters()) for name, module in own.named_modules()}
    whole, mlp, layer = sizes[""], sizes["mlp"], sizes["mlp.up_proj"]
    assert place(own, [whole, 0]) == {"": 0}
    rest = dict.fromkeys(("self_attn", "input_layernorm", "post_attention_layernorm"), 1)
    assert place(own, [mlp, whole - mlp]) == {"": 0, "mlp": 0, **rest}
    assert place(own, [mlp - 1, 2 * layer])["mlp.up_proj"] != place(own, [mlp - 1, 2 * layer])["mlp.down_proj"]


def test_parts_of_a_list_are_placed_one_by_one() -> None:
    """Nobody calls the list itself, which could move what goes in."""
    experts = nn.Module()
    experts.each = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(4))
    assert place(experts, [33, 32]) == {"": 0, "each.0": 0, "each.1": 1, "each.2": 0, "each.3": 1}
    assert set(spread(func.make_block_fn(experts), {"": HOME, "each": AWAY}).places) == {
        "", "each.0", "each.1", "each.2", "each.3"}  # fmt: skip


def test_what_fits_nowhere_goes_where_most_room_is() -> None:
    assert place(nn.Sequential(nn.Linear(4, 4, bias=False)), [8, 12]) == {"": 0, "0": 1}


class Rooms(type(CPU)):  # type: ignore[misc]
    """A backend of several devices, all of them the processor, of which each has some memory."""

    def __init__(self, *sizes: int | None) -> None:
        self._sizes = iter(sizes * 100)

    def device_bytes(self, device: torch.device) -> int | None:
        return next(self._sizes)


@pytest.mark.parametrize(("sizes", "is_spread"), [
    ((10**9, 10**9), False), ((10**6, 10**6), True), ((10**6,), False), ((10**6, None), False)
])  # fmt: skip
def test_a_block_is_spread_if_one_device_has_no_room_for_it(sizes: tuple[int | None, ...], is_spread: bool,
                                                            tmp_path: Path) -> None:  # fmt: skip
    block_fn, devices = func.make_block_fn(make().model.layers[0]), (torch.device("cpu"),) * len(sizes)
    assert isinstance(fitted(block_fn, recipe(tmp_path), Rooms(*sizes), devices), SpreadFn) == is_spread


@pytest.mark.parametrize("settings", [{}, {"torch_compile": True}, {"starved_experts": "route_all"}])
def test_a_run_with_blocks_that_are_too_large_for_a_device(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gives the bytes of one device, and a step is divided for each of the devices as ever."""
    one = tune(make(), tmp_path / "one", dtype="float32", batch_size=2, gradient_accumulate_steps=2)
    devices = (torch.device("cpu"),) * 2
    monkeypatch.setattr(engine, "select_all", lambda name: (Rooms(10**6, 10**6), devices))
    other = tune(make(), tmp_path / "other", dtype="float32", batch_size=4, **settings)
    assert equal_share(codes(one), codes(other)) == 1


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9}, {"adam": True, "keep": "best"}])
def test_what_a_weight_takes(settings: dict[str, Any], tmp_path: Path) -> None:
    """The figures by which blocks are spread are those that the tuner takes, with groups of 128 columns."""
    own = block(512)
    with FakeTensorMode(allow_non_fake_inputs=True), ByteCount() as count:
        tuned(own, settings, tmp_path, 1, None, torch.device("cpu"), 512)
    weights = sum(parameter.numel() for parameter in own.parameters())
    assert 1 <= weight_bytes(recipe(tmp_path, **settings)) * weights / count.peak["cpu"] < 1.25


def test_a_run_with_devices_of_modules(tmp_path: Path) -> None:
    one = tune(make(), tmp_path / "one", dtype="float32")
    other = tune(make(), tmp_path / "other", dtype="float32", device_map="{mlp: cpu, 'layers.1': cpu}")
    assert equal_share(codes(one), codes(other)) == 1


def test_modules_are_where_a_map_says() -> None:
    model = make()
    named = {"": HOME, "mlp": AWAY, "model.layers.1": AWAY, "layers.1.mlp.up_proj": HOME}
    found = find_named(named, model, ["model.layers.0", "model.layers.1"])
    places = [
        as_named(func.make_block_fn(model.get_submodule(path)), path, found, HOME).places
        for path in ("model.layers.0", "model.layers.1")
    ]
    assert places == [{"": HOME, "mlp": AWAY}, {"": AWAY, "mlp.up_proj": HOME}]


def test_a_map_that_names_no_module(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="device_map: found 'layers.7', which names no layer; needed a path such as"):
        engine.quantize(make(), recipe(tmp_path, device_map="{layers.7: cpu}"))
