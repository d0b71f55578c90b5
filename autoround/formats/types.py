"""The Protocol of a checkpoint layout."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from autoround.func.types import IntCodes
from autoround.plan import FormatRules, Plan
from autoround.spec import QuantSpec


class Format(Protocol):
    """A checkpoint layout. Files are the writer's business; a layout only turns codes into tensors and back.

    Attributes:
        rules: its name and what it can hold.
        dtype: to which all unquantized tensors are cast, such as "float16"; None leaves them as they are.
        config_copies: names of files that repeat the quantization config beside config.json.
    """

    @property
    def rules(self) -> FormatRules: ...

    @property
    def dtype(self) -> str | None: ...

    @property
    def config_copies(self) -> tuple[str, ...]: ...

    def suited(self, plan: Plan) -> "Format":
        """The variant of this layout for a plan, where it has several; itself otherwise."""
        ...

    def pack(self, codes: IntCodes, spec: QuantSpec) -> dict[str, Tensor]:
        """Tensors of one layer by their last name ("qweight", …); "weight" is (O, I).

        Raises:
            FormatError: the layout cannot hold these codes.
        """
        ...

    def unpack(self, tensors: Mapping[str, Tensor], spec: QuantSpec) -> IntCodes | Tensor:
        """Read back what ``pack`` made, by another algorithm: the codes, or the weight where no codes are stored."""
        ...

    def config(self, plan: Plan) -> dict[str, Any] | None:
        """The ``quantization_config``; None for an ordinary checkpoint."""
        ...
