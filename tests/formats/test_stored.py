"""How checkpoints store their layers, by what their configuration says."""

from typing import Any

import pytest

from autoround.errors import FormatError
from autoround.formats.stored import stored


def test_columns_out_of_order_are_refused_by_the_config() -> None:
    def config(order: str | None) -> dict[str, Any]:
        weights = {"num_bits": 4, "group_size": 32, "actorder": order}
        return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}

    for order in (None, "static", "weight"):
        assert stored(config(order), "folder").group_sizes == {32}
    with pytest.raises(FormatError, match="folder: found actorder 'group'; needed columns in order"):
        stored(config("group"), "folder")
