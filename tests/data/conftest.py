"""Checks that hold for every test of this folder."""

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _no_warning_left(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing normal is warned about; a test that expects warnings clears them."""
    yield
    assert caplog.messages == []
