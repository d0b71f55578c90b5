"""What went wrong on the hub, in one line with the next step."""

from autoround.data.hub_names import OFFLINE, SHORT_NAMES
from autoround.data.language import did_you_mean

BUILTINS = ("python-docs", "self")
_LOG_IN = "log in with `hf auth login` or HF_TOKEN"


def out_of_reach(error: Exception) -> bool:
    """Whether an error means that there is no way to the hub, rather than an answer of it."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]

    return isinstance(error, (HTTPError, ConnectionError, TimeoutError)) and not isinstance(error, HfHubHTTPError)


def explain(name: str, error: Exception, *, cached: str) -> str:
    """What was found and the next step.

    Args:
        name: of the dataset, as the user gave it.
        error: of the client libraries.
        cached: why the cache alone was read; empty where the hub answered.
    """
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    line = _first_line(error)
    if cached and _is_missing(error):
        online = "read it once online, without num= since streamed rows are not kept"
        return f"found {cached} and no copy in the cache; needed one of them; {online}; {OFFLINE}"
    if isinstance(error, (GatedRepoError, DatasetNotFoundError)):
        return f"found a gated dataset that this login may not read; ask for access on its page and {_LOG_IN}"
    if isinstance(error, RepositoryNotFoundError):
        hint = "" if "/" in name else did_you_mean(name, [*SHORT_NAMES, *BUILTINS])
        return (
            f"found no dataset of that name on the hub, or a private one{hint}; check the name or {_LOG_IN}; {OFFLINE}"
        )
    if out_of_reach(error):
        return f"found the hub out of reach ({line}); check the network and repeat the command; {OFFLINE}"
    return f"found data that cannot be read ({line}); check config= and split=, or the files on its page"


def _is_missing(error: Exception) -> bool:
    return out_of_reach(error) or isinstance(error, FileNotFoundError) or "find cache for" in str(error)


def _first_line(error: Exception) -> str:
    cause = error.__cause__ or error
    return next((line.strip() for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
