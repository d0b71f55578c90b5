"""What a command that does work sets up first: whether hubs are asked, what stderr shows, and what oneDNN keeps."""

import logging
import os
import shutil
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from autoround.backends.host import settle_heap
from autoround.progress import Progress

if TYPE_CHECKING:
    from autoround.cli.display import Display

# oneDNN, and torch beside it, keep what they made for each of the last 1024 shapes that were multiplied; experts are
# given other numbers of tokens in every pass, so that this would be hundreds of megabytes. Other blocks have fewer.
CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "128"}
_REQUESTS = logging.getLogger("huggingface_hub.utils._http")


@contextmanager
def session(switches: Collection[str], loading: str = "") -> Iterator["Display"]:
    """The display of a command; enter it before anything that may ask a hub is imported.

    Args:
        switches: those of ``SWITCHES`` that were given.
        loading: the model that comes first, which is told.
    """
    if "offline" in switches:
        os.environ["HF_HUB_OFFLINE"] = "1"  # the hub's libraries read it once, when they are imported
    for name, value in CACHES.items():
        os.environ.setdefault(name, value)  # read once, at the first product
    settle_heap()
    from autoround.cli.display import display

    debug = "debug" in switches
    with display(sys.stderr, json="log_json" in switches, debug=debug) as screen:
        if loading and not {"quiet", "dry_run"}.intersection(switches):
            screen.update(Progress(phase="loading", block=0, blocks=0, message=loading))
        if not debug:
            _REQUESTS.addFilter(_is_news)
        try:
            yield screen
        finally:
            _REQUESTS.removeFilter(_is_news)


def terminal_width() -> int | None:
    """Columns of the terminal that stdout is; None where it is none, so that nothing is folded there."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _is_news(record: logging.LogRecord) -> bool:
    """Requests that failed are tried again or end in our own message; only minutes of waiting are told."""
    return record.levelno > logging.WARNING or record.getMessage().startswith("Rate limited")
