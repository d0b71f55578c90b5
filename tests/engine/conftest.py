"""What holds for every test of this folder: one thread, since a run of a tiny model gains nothing from more."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _one_thread_again() -> Iterator[None]:
    """A run sets the number that its journal names."""
    yield
    torch.set_num_threads(1)
