"""What the experts of a block are given: how many tokens, and the mean squares of their inputs.

Legend: E experts, N tokens, K experts that a token takes, I input features, D hidden size, O output features of all.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from autoround.func.block import BlockFn
from autoround.func.types import Params, RoundingParams

# Name of the experts that tokens are sent to in turn, among the buffers of a module of experts.
_TURN = "turn_E"


def sorted_by_expert(x_ND: Tensor, valid_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, choices (one each) and which of them count, where every expert is given all tokens in turn.

    Args:
        x_ND: the tokens as often as there are experts, zeros for those that did not choose an expert.
        valid_T: bool, of the tokens once.

    >>> x_ND, choice_NK, valid_N = sorted_by_expert(torch.tensor([[1.0], [0], [2], [3]]), torch.tensor([True, False]))
    >>> choice_NK.flatten().tolist(), valid_N.tolist()
    ([0, 0, 1, 1], [True, False, True, False])
    """
    experts = len(x_ND) // len(valid_T)
    choice_N1 = torch.arange(experts, device=x_ND.device).repeat_interleave(len(valid_T)).unsqueeze(-1)
    return x_ND, choice_N1, valid_T.repeat(experts) & (x_ND != 0).any(-1)


class Routed(NamedTuple):
    """What a module of experts has seen.

    Attributes:
        tokens_E: int64, tokens that each expert took.
        all_I: float32, sum of the squares of all tokens, whatever experts they took.
        squares: name of a stack -> float32 (E, I), sums of the squares of its inputs.
    """

    tokens_E: Tensor
    all_I: Tensor
    squares: dict[str, Tensor]

    def add(self, other: "Routed") -> "Routed":
        """Both together."""
        squares = {name: own + other.squares[name] for name, own in self.squares.items()}
        return Routed(self.tokens_E + other.tokens_E, self.all_I + other.all_I, squares)

    def moments(self, count: int) -> dict[str, Tensor]:
        """Mean squares (E, I) by stack. An expert that no token took is weighed by what all of them are, or evenly.

        Args:
            count: of all tokens.
        """
        tokens_E1 = self.tokens_E.unsqueeze(-1)
        found = {}
        for name, square_EI in self.squares.items():
            first = square_EI.shape[1] == len(self.all_I) and name == next(iter(self.squares))
            rest = self.all_I / max(count, 1) if first else torch.ones_like(square_EI[0])
            found[name] = torch.where(tokens_E1 > 0, square_EI / tokens_E1.clamp(min=1), rest)
        return found


def observe(experts: Any, x_ND: Tensor, choice_NK: Tensor, valid_N: Tensor) -> Routed:
    """Send tokens through the experts that they chose, and note the inputs of both projections.

    Args:
        experts: a module as transformers stacks them: ``gate_up_proj`` (or ``up_proj`` without gates) and ``down_proj``
            of all experts, ``is_transposed``, ``has_gate``, ``has_bias``, and ``_apply_gate`` between the two.
        x_ND: hidden states.
        choice_NK: int64, the experts of each token.
        valid_N: bool, tokens that count.

    >>> experts = nn.Module()
    >>> experts.has_gate, experts.has_bias, experts.is_transposed, experts.act_fn = False, False, False, nn.ReLU()
    >>> experts.up_proj, experts.down_proj = nn.Parameter(torch.ones(2, 3, 1)), nn.Parameter(torch.ones(2, 1, 3))
    >>> x_ND, choice_NK = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[0], [0], [1]])
    >>> routed = observe(experts, x_ND, choice_NK, torch.tensor([True, True, False]))
    >>> routed.tokens_E.tolist(), routed.squares["down_proj"].tolist(), routed.moments(2)["up_proj"].tolist()
    ([2, 0], [[5.0, 5.0, 5.0], [0.0, 0.0, 0.0]], [[2.5], [2.5]])
    """
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    stack, counts = getattr(experts, first), []
    sums: dict[str, list[Tensor]] = {first: [], "down_proj": []}
    for expert, weight in enumerate(stack):
        x_MD = x_ND[(choice_NK == expert).any(-1) & valid_N]
        bias_O = getattr(experts, f"{first}_bias")[expert] if experts.has_bias else None
        y_MO = nn.functional.linear(x_MD, weight.mT if experts.is_transposed else weight, bias_O)
        h_MI = experts._apply_gate(y_MO) if experts.has_gate else experts.act_fn(y_MO)
        counts.append(len(x_MD))
        for name, inputs in ((first, x_MD), ("down_proj", h_MI)):
            sums[name].append(inputs.float().square().sum(0))
    return Routed(
        torch.tensor(counts, device=x_ND.device),
        x_ND[valid_N].float().square().sum(0),
        {name: torch.stack(own) for name, own in sums.items()},
    )


def also_in_turn(block_fn: BlockFn, starved: Mapping[str, Tensor]) -> tuple[BlockFn, dict[str, Tensor]]:
    """A block that sends each token to one starved expert besides those that it chose: to each of them in turn.

    What such an expert adds to a token is weighed by the mean of what the chosen ones are. Blocks of equal signature
    still share a step, whichever of their experts are starved.

    Args:
        block_fn: the lifted block.
        starved: module of experts -> bool (E,), at least one of them true.

    Returns:
        The block, and tensors that it takes besides its own.

    >>> from autoround.func.block import make_block_fn
    >>> changed, turns = also_in_turn(make_block_fn(nn.Sequential(nn.ReLU())), {"0": torch.tensor([False, True, True])})
    >>> {name: turn_E.tolist() for name, turn_E in turns.items()}
    {'0.turn_E': [1, 2, 1]}
    """
    skeleton, turns = copy.deepcopy(block_fn.skeleton), {}
    for path, starved_E in starved.items():
        first_E = starved_E.int().argsort(descending=True, stable=True)
        place_E = torch.arange(len(starved_E), device=starved_E.device)
        turns[f"{path}.{_TURN}"] = first_E[place_E % starved_E.sum().clamp(min=1)]
        module = skeleton.get_submodule(path)
        module.register_buffer(_TURN, torch.empty(len(starved_E), dtype=torch.int64, device="meta"))
        module.register_forward_pre_hook(_send, with_kwargs=True)
    return replace(block_fn, skeleton=skeleton, signature=f"{block_fn.signature}+{','.join(starved)}"), turns


def _send(
    module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """The call of a module of experts with one more expert for each token."""
    x, *chosen = (*args, *kwargs.values())
    if not chosen:  # these experts are given all tokens as it is, some of them as zeros
        return args, kwargs
    choice, share, *rest = chosen
    turn_E = module.get_buffer(_TURN)
    place = torch.arange(choice[..., 0].numel(), device=choice.device) % len(turn_E)
    choice = torch.cat([choice, turn_E[place].view(*choice.shape[:-1], 1).to(choice.dtype)], -1)
    found = (x, choice, torch.cat([share, share.mean(-1, keepdim=True)], -1), *rest)
    return found[: len(args)], dict(zip(kwargs, found[len(args) :], strict=True))


def in_even_groups(block_fn: BlockFn, multiple: int) -> BlockFn:
    """A block that sends zeros along with the tokens, so that each expert is given a multiple of so many rows.

    Outputs and gradients are the same. Products of few different sizes suit libraries that prepare each size anew, as
    oneDNN does on CPUs. Modules of experts that are not given choices stay as they are, as do blocks without experts.

    Args:
        block_fn: the lifted block.
        multiple: rows of a product.

    >>> from autoround.func.block import make_block_fn
    >>> block_fn = make_block_fn(nn.Sequential(nn.Linear(2, 2)))
    >>> in_even_groups(block_fn, 32) is block_fn
    True
    """
    counts = {name.rsplit(".", 2)[0]: experts for name, experts in block_fn.stacks.items()}
    if not counts:
        return block_fn
    skeleton = copy.deepcopy(block_fn.skeleton)
    for path, experts in counts.items():
        module = skeleton.get_submodule(path)
        module.register_forward_pre_hook(partial(_fill_up, experts, multiple), with_kwargs=True)
        module.register_forward_hook(partial(_cut, experts, multiple), with_kwargs=True)
    return replace(block_fn, skeleton=skeleton)


def _fill_up(
    experts: int, multiple: int, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """The call of a module of experts with zeros for whom the choices are as even as can be."""
    del module  # the hook's signature
    x, *chosen = (*args, *kwargs.values())
    if not _has_choices(x, chosen):
        return args, kwargs
    choice, share, *rest = chosen
    place_E = torch.arange(experts, device=x.device)
    count_E = (choice.flatten().unsqueeze(-1) == place_E).sum(0)
    need_E = -count_E % multiple
    slots = _spare(experts, multiple, choice.shape[-1]) * choice.shape[-1]
    more = (slots - need_E.sum()) // multiple  # whole groups, one for each expert in turn; what is left: the last one
    need_E = need_E + multiple * (more // experts + (place_E < more % experts))
    choice_S = (torch.arange(slots, device=x.device).unsqueeze(-1) >= need_E.cumsum(0)[:-1]).sum(-1)
    more_choice = choice_S.to(choice.dtype).view(-1, choice.shape[-1])
    found = (
        torch.cat([x, x.new_zeros(len(more_choice), x.shape[-1])]),
        torch.cat([choice, more_choice]),
        torch.cat([share, share.new_zeros(more_choice.shape)]),
        *rest,
    )
    return found[: len(args)], dict(zip(kwargs, found[len(args) :], strict=True))


def _cut(
    experts: int, multiple: int, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], y_ND: Tensor
) -> Tensor:
    """What a module of experts returns for the tokens alone."""
    del module  # the hook's signature
    x, *chosen = (*args, *kwargs.values())
    if not _has_choices(x, chosen):
        return y_ND
    return y_ND[: len(x) - _spare(experts, multiple, chosen[0].shape[-1])]


def _has_choices(x: Tensor, chosen: list[Tensor]) -> bool:
    """Whether each token comes with the experts that it takes, and with a share for each."""
    return x.ndim == 2 and len(chosen) > 1 and chosen[0].shape == chosen[1].shape


def _spare(experts: int, multiple: int, choices: int) -> int:
    """Zeros that fill up the rows of all experts, whatever their tokens are."""
    return -(-experts * (multiple - 1) // choices)


def by_module(paths: Iterator[str] | tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Module of experts -> names of its stacks.

    >>> by_module(("mlp.experts.gate_up_proj", "mlp.experts.down_proj"))
    {'mlp.experts': ('gate_up_proj', 'down_proj')}
    """
    found: dict[str, tuple[str, ...]] = {}
    for path in paths:
        module, _, name = path.rpartition(".")
        found[module] = (*found.get(module, ()), name)
    return found


def restore(params: RoundingParams, start: RoundingParams, starved_E: Tensor) -> RoundingParams:
    """Parameters of a stack in which some experts are where they started.

    Args:
        params: after tuning.
        start: before.
        starved_E: bool, the experts concerned.

    >>> one, zero = (RoundingParams(*(torch.full(size, value) for size in ((4, 1, 2), (4, 1), (4, 1))))
    ...              for value in (1.0, 0.0))
    >>> restore(one, zero, torch.tensor([False, True])).clip_min_OG.flatten().tolist()
    [1.0, 1.0, 0.0, 0.0]
    """
    starved_O = starved_E.repeat_interleave(len(params.clip_min_OG) // len(starved_E))
    fields = zip(params, start, strict=True)
    return RoundingParams(
        *(torch.where(starved_O.view(-1, *[1] * (own.ndim - 1)), before, own) for own, before in fields)
    )


def restored(params: Params, start: Params, starved: Mapping[str, Tensor]) -> Params:
    """Parameters of a block in which some experts are where they started.

    Args:
        params: after tuning, by layer path.
        start: before.
        starved: module of experts -> bool (E,), the experts concerned.

    >>> one, zero = (RoundingParams(*(torch.full(size, value) for size in ((4, 1, 2), (4, 1), (4, 1))))
    ...              for value in (1.0, 0.0))
    >>> found = restored({"mlp.up_proj": one}, {"mlp.up_proj": zero}, {"mlp": torch.tensor([False, True])})
    >>> found["mlp.up_proj"].clip_max_OG.flatten().tolist()
    [1.0, 1.0, 0.0, 0.0]
    """
    return {
        path: restore(own, start[path], starved[module]) if (module := path.rpartition(".")[0]) in starved else own
        for path, own in params.items()
    }
