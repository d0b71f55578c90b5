"""Whether torchrun started this process, and its place among those it started. Torch-free."""

from collections.abc import Mapping
from dataclasses import dataclass

# Parts of a step that 1, 2 and 4 processes can share evenly, so that their number decides nothing.
PARTS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """The place of a process among those that torchrun started.

    Attributes:
        rank: of this process, from 0, on all machines together.
        size: how many processes there are.
        local_rank: of this process on its machine, from 0.
        local_size: how many processes its machine has.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int

    @property
    def parts(self) -> int:
        """Into how many parts the rows of a step are divided at least."""
        return max(PARTS, self.size)


def launched(environ: Mapping[str, str]) -> Launch | None:
    """The place that torchrun gave this process; None where something else started it.

    Args:
        environ: the environment.

    >>> launched({"WORLD_SIZE": "2"})  # of another launcher
    >>> names = {"TORCHELASTIC_RUN_ID": "none", "RANK": "1", "LOCAL_RANK": "1"}
    >>> launched(names | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"})
    Launch(rank=1, size=2, local_rank=1, local_size=2)
    """
    if "TORCHELASTIC_RUN_ID" not in environ:
        return None
    return Launch(
        rank=int(environ["RANK"]),
        size=int(environ["WORLD_SIZE"]),
        local_rank=int(environ["LOCAL_RANK"]),
        local_size=int(environ["LOCAL_WORLD_SIZE"]),
    )


def follows(environ: Mapping[str, str]) -> bool:
    """Whether this process is one that works for another, which alone reads text, writes files and tells.

    >>> follows({})
    False
    """
    launch = launched(environ)
    return launch is not None and launch.rank > 0
