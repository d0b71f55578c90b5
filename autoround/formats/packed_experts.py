"""The experts of quantized checkpoints: a packed linear layer for every matrix, run for the tokens that chose them.

Legend: N tokens, M of them, K experts that a token takes, D hidden size, I inputs of the last projection.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

# The stacks of a module of experts in the order in which tokens pass through them.
_LAST = "down_proj"


class PackedExperts(nn.Module):
    """Stands in for a module of experts as transformers has them.

    Experts are its modules "0", "1", …, whose layers are named as in the checkpoint. Stacks that are not quantized stay
    parameters under their own names.

    Args:
        experts: what it stands in for; the stacks that are quantized are taken off it.
        layers: name of a stack -> for each expert its layers by name, in the order of their rows.
    """

    def __init__(self, experts: Any, layers: Mapping[str, list[dict[str, nn.Module]]]) -> None:
        super().__init__()
        self._layers = {name: [tuple(own) for own in each] for name, each in layers.items()}
        self._first = "gate_up_proj" if experts.has_gate else "up_proj"
        for name, each in layers.items():
            delattr(experts, name)
            for expert, own in enumerate(each):
                module = self._modules.setdefault(str(expert), nn.Module())
                assert module is not None
                for key, layer in own.items():
                    module.add_module(key, layer)
        for name, parameter in list(experts.named_parameters(recurse=False)):
            delattr(experts, name)
            self.register_parameter(name, parameter)
        self._original = (experts,)  # for what is between the projections; in a tuple, so that it is no submodule

    def forward(self, x_ND: Tensor, choice_NK: Tensor | None = None, share_NK: Tensor | None = None) -> Tensor:
        """Sum of what the chosen experts make of each token, weighted: (N, D).

        Where nothing is chosen, each expert has an equal part of the tokens, in the order of experts.
        """
        if choice_NK is None or share_NK is None:
            parts = x_ND.chunk(len(self._layers[next(iter(self._layers))]))
            return torch.cat([self._expert(expert, x_MD) for expert, x_MD in enumerate(parts)])
        y_ND = torch.zeros_like(x_ND)
        for expert in sorted(set(choice_NK.flatten().tolist())):
            token_M, place_M = (choice_NK == expert).nonzero(as_tuple=True)
            own_MD = self._expert(expert, x_ND[token_M]) * share_NK[token_M, place_M, None]
            y_ND.index_add_(0, token_M, own_MD.to(y_ND.dtype))
        return y_ND

    def _expert(self, expert: int, x_MD: Tensor) -> Tensor:
        (original,) = self._original
        h_M = self._project(self._first, expert, x_MD)
        return self._project(_LAST, expert, original._apply_gate(h_M) if original.has_gate else original.act_fn(h_M))

    def _project(self, stack: str, expert: int, x_M: Tensor) -> Tensor:
        (original,) = self._original
        bias = self.get_parameter(f"{stack}_bias")[expert] if original.has_bias else None
        if stack not in self._layers:
            weight = self.get_parameter(stack)[expert]
            return nn.functional.linear(x_M, weight.mT if original.is_transposed else weight, bias)
        module = self.get_submodule(str(expert))
        y_M = torch.cat([module.get_submodule(name)(x_M) for name in self._layers[stack][expert]], -1)
        return y_M if bias is None else y_M + bias
