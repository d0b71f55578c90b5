"""What holds for every test of this folder."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """A run sets the number of threads that its journal names."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
