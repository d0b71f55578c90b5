"""The experts of quantized checkpoints: a packed linear layer for every matrix, run for the tokens that chose them.

Legend: N tokens, M of them, K experts that a token takes, D hidden size, I inputs of the last projection.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from autoround.errors import FormatError

# The stacks of a module of experts in the order in which tokens pass through them.
_LAST = "down_proj"


class PackedExperts(nn.Module):
    """Stands in for a module of experts as transformers has them.

    Experts are its modules "0", "1", …, whose layers are named as in the checkpoint. Stacks that are not quantized stay
    parameters under their own names.

    Args:
        experts: what it stands in for; the stacks that are quantized are taken off it.
        layers: name of a stack -> for each expert its layers by name, in the order of their rows.
        path: for messages.

    Raises:
        FormatError: the experts have biases or lie transposed, which no checkpoint of single experts has.
    """

    def __init__(self, experts: Any, layers: Mapping[str, list[dict[str, nn.Module]]], path: str) -> None:
        super().__init__()
        if experts.has_bias or experts.is_transposed:
            raise FormatError(f"{path}: found packed experts with biases or transposed; needed plain ones")
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

    def forward(self, x_ND: Tensor, choice_NK: Tensor, share_NK: Tensor) -> Tensor:
        """Sum of what the chosen experts make of each token, weighted: (N, D)."""
        y_ND = torch.zeros_like(x_ND)
        (original,) = self._original
        for expert in sorted(set(choice_NK.flatten().tolist())):
            token_M, place_M = (choice_NK == expert).nonzero(as_tuple=True)
            h_M = self._project(self._first, expert, x_ND[token_M])
            h_MI = original._apply_gate(h_M) if original.has_gate else original.act_fn(h_M)
            own_MD = self._project(_LAST, expert, h_MI) * share_NK[token_M, place_M, None]
            y_ND.index_add_(0, token_M, own_MD.to(y_ND.dtype))
        return y_ND

    def _project(self, stack: str, expert: int, x_M: Tensor) -> Tensor:
        if stack not in self._layers:
            return nn.functional.linear(x_M, self.get_parameter(stack)[expert])
        module = self.get_submodule(str(expert))
        return torch.cat([module.get_submodule(name)(x_M) for name in self._layers[stack][expert]], -1)
