"""Layers that share a tensor compute, step and store what they would alone."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from autoround import func as F
from tests.func.cases import GGUF_SPECS, SPECS, random_params
from tests.func.test_step import Block, make_batch

OTHER = F.QuantSpec(bits=8, group_size=32)


@given(
    st.lists(st.tuples(st.integers(1, 3), st.sampled_from([256, 512]), st.sampled_from(SPECS + GGUF_SPECS)), max_size=5)
)
def test_merging_and_splitting_are_inverse(layers: list[tuple[int, int, F.WeightSpec]]) -> None:
    specs = {f"layer{index}": spec for index, (_, _, spec) in enumerate(layers)}
    weights = {f"layer{index}": torch.randn(rows, columns) for index, (rows, columns, _) in enumerate(layers)}
    tuned = {path: F.prepare(weights[path], spec) for path, spec in specs.items()}
    params = {path: random_params(prepared, seed=1) for path, prepared in tuned.items()}
    fusion = F.fuse(tuned, specs)
    for tree in (tuned, params):
        again = fusion.split(fusion.merge(tree))
        assert list(again) == list(tree)
        for path, leaves in tree.items():
            assert all(torch.equal(own, other) for own, other in zip(again[path], leaves, strict=True))
    rounded = {name: F.fake_quantize(own, fusion.merge(params)[name], fusion.specs[name])
               for name, own in fusion.merge(tuned).items()}  # fmt: skip
    found = fusion.lift(
        lambda tensors, call: torch.cat([torch.ones(1), *(each.flatten() for each in tensors.values())])
    )({f"{name}.weight": weight for name, weight in rounded.items()}, F.Call((), {}))
    alone = {path: F.fake_quantize(tuned[path], params[path], spec) for path, spec in specs.items()}
    expected = [alone[path].flatten() for paths in fusion.members.values() for path in paths]
    assert torch.equal(found, torch.cat([torch.ones(1), *expected]))


def steps(block: Block, specs: dict[str, F.QuantSpec], *, fused: bool) -> tuple[F.Params, torch.Tensor]:
    weights, block_fn = F.split_weights(block, specs), F.make_block_fn(block)
    fusion, params = F.fuse(weights.tuned, specs), F.init_params(weights.tuned)
    optimizer = F.signsgd(F.linear_decay(0.02, 6))
    if fused:
        weights, params = weights._replace(tuned=fusion.merge(weights.tuned)), fusion.merge(params)
        step = F.make_step(fusion.lift(block_fn), fusion.specs, optimizer)
    else:
        step = F.make_step(block_fn, specs, optimizer)
    batches = [make_batch(block, seed) for seed in range(6)]
    result = F.tune_block(step, weights, F.init_state(params, optimizer, keep_best=False), batches)
    return fusion.split(result.params) if fused else result.params, result.losses_K


def test_steps_are_the_same_bit_for_bit() -> None:
    torch.manual_seed(0)
    block, alike = Block(0), F.QuantSpec(bits=2, group_size=16)
    for specs in ({"up": alike, "down": alike}, {"up": alike, "down": OTHER}, {"down": alike}):
        alone, together = (steps(block, specs, fused=fused) for fused in (False, True))
        assert torch.equal(alone[1], together[1])
        for path in specs:
            pairs = zip(alone[0][path], together[0][path], strict=True)
            assert all(torch.equal(own, other) for own, other in pairs), (path, specs)


def test_layers_share_a_tensor_where_spec_and_columns_are_equal() -> None:
    row = F.QuantSpec(bits=4, group_size=-1)
    specs = {"a": OTHER, "b": row, "c": row, "d": OTHER, "e": row}
    columns = {"a": 32, "b": 32, "c": 64, "d": 64, "e": 64}
    tuned = {path: F.prepare(torch.ones(2, columns[path]), spec) for path, spec in specs.items()}
    assert list(F.fuse(tuned, specs).members.values()) == [("a", "d"), ("b",), ("c", "e")]
