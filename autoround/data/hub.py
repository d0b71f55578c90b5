"""Datasets of the Hugging Face hub -> documents, through the ``datasets`` library; streamed when the rows are known."""

import itertools
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from autoround.data.language import DatasetSpec, did_you_mean
from autoround.data.records import Document, read_record
from autoround.errors import AutoRoundError, DataError

OFFLINE = "to go on offline, give --dataset python-docs or a local file"
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_TIMEOUT_SECONDS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class HubName:
    """Where a dataset lies on the hub and what is usually read of it; ``stream`` marks those too big to download."""

    repo: str
    config: str | None = None
    split: str | None = None
    stream: bool = False


SHORT_NAMES: Mapping[str, HubName] = MappingProxyType(
    {
        "pile-10k": HubName(repo="NeelNanda/pile-10k"),
        "pile-val-backup": HubName(repo="mit-han-lab/pile-val-backup", split="validation"),
        "c4": HubName(repo="allenai/c4", config="en", stream=True),
        "cci3-hq": HubName(repo="BAAI/CCI3-HQ", stream=True),
        "fineweb-edu": HubName(repo="HuggingFaceFW/fineweb-edu", config="sample-10BT", stream=True),
        "github-code-clean": HubName(repo="codeparrot/github-code-clean", stream=True),
        "mbpp": HubName(repo="google-research-datasets/mbpp", config="full"),
        "new-title-chinese": HubName(repo="madao33/new-title-chinese"),
        "opencode-instruct": HubName(repo="nvidia/OpenCodeInstruct", stream=True),
        "ultra-fineweb": HubName(repo="openbmb/Ultra-FineWeb", split="en", stream=True),
        "ultrachat_200k": HubName(repo="HuggingFaceH4/ultrachat_200k", split="train_sft"),
        "wikitext": HubName(repo="Salesforce/wikitext", config="wikitext-2-raw-v1"),
    }
)
"""Well-known datasets by short name; any other ``org/name`` works as well."""


def resolve(name: str) -> HubName:
    """Return the hub place of a short name or ``org/name``, in any case.

    Raises:
        DataError: the text cannot be the name of a hub dataset.
    """
    by_name = {short.casefold(): known for short, known in SHORT_NAMES.items()}
    by_name |= {known.repo.casefold(): known for known in SHORT_NAMES.values()}
    if name.casefold() in by_name:
        return by_name[name.casefold()]
    if not _REPO.fullmatch(name):
        raise DataError(f"dataset {name!r}: found neither a file of that name nor a hub name (org/name); {OFFLINE}")
    return HubName(repo=name)


def hub_documents(spec: DatasetSpec, *, rng: random.Random, rows: int) -> Iterator[Document]:
    """Yield the documents of a hub dataset in an order drawn from ``rng``.

    A dataset with ``num`` is streamed: windows of max(1024, 8 * rows) documents are read and shuffled one after
    another. Without ``num`` it is downloaded to the cache and shuffled whole.

    Args:
        spec: which dataset, configuration, splits and column.
        rng: source of the order; same state, same order.
        rows: rows wanted, the measure of a streaming window.

    Raises:
        DataError: the hub is out of reach, the dataset, configuration or split unknown or not allowed, or a record
            without text; the message says how to go on offline.
    """
    import pyarrow as pa
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of the client that the hub library uses

    target = resolve(spec.name)
    try:
        yield from _documents(spec, target, rng=rng, rows=rows)
    except AutoRoundError:
        raise
    except (HTTPError, DatasetsError, OSError, RuntimeError, ValueError, pa.ArrowException) as error:
        raise DataError(f"dataset {spec.name!r}: {_explain(spec.name, error)}") from error


def windows(documents: Iterator[Document], *, rng: random.Random, size: int) -> Iterator[Document]:
    """Yield documents shuffled within successive windows of ``size``, in bounded memory."""
    while window := list(itertools.islice(documents, size)):
        rng.shuffle(window)
        yield from window


def _documents(spec: DatasetSpec, target: HubName, *, rng: random.Random, rows: int) -> Iterator[Document]:
    import datasets

    offline = bool(datasets.config.HF_HUB_OFFLINE)
    if not offline:
        _check_reachable(target.repo)
    config = spec.config or target.config
    catalog = datasets.load_dataset(target.repo, config, streaming=not offline)  # streaming: only lists the splits
    splits = _splits(spec, target, list(catalog))
    sliced = any("[" in split for split in splits)
    if (spec.num is not None or target.stream) and not offline and not sliced:
        streams = [_read(catalog[split], where=f"{spec.name} [{split}]", column=spec.column) for split in splits]
        yield from windows(_alternate(streams), rng=rng, size=max(1024, 8 * rows))
        return
    whole = datasets.load_dataset(target.repo, config, split="+".join(splits))
    order = list(range(len(whole)))
    rng.shuffle(order)
    for row in order:
        yield read_record(whole[row], where=f"{spec.name} [{'+'.join(splits)}], row {row + 1}", column=spec.column)


def _check_reachable(repo: str) -> None:
    """One quick request, so that a machine without network fails in seconds, not after the library's retries."""
    from huggingface_hub import HfApi

    HfApi().dataset_info(repo, timeout=_TIMEOUT_SECONDS)


def _splits(spec: DatasetSpec, target: HubName, available: list[str]) -> list[str]:
    """The splits asked for, checked; else the dataset's usual one, ``train``, or the first."""
    for asked in spec.split or ():
        base = asked.partition("[")[0]
        if base not in available:
            hint = did_you_mean(base, available)
            raise DataError(
                f"dataset {spec.name!r}: found no split {base!r}; needed one of {', '.join(available)}{hint}"
            )
    if spec.split:
        return list(spec.split)
    return [next((name for name in (target.split, "train") if name in available), available[0])]


def _read(rows: Iterable[Mapping[str, Any]], *, where: str, column: str | None) -> Iterator[Document]:
    for number, row in enumerate(rows, 1):
        yield read_record(row, where=f"{where}, row {number}", column=column)


def _alternate(streams: list[Iterator[Document]]) -> Iterator[Document]:
    """One document of each stream in turn, until all are empty."""
    while streams:
        alive = []
        for stream in streams:
            for document in itertools.islice(stream, 1):
                yield document
                alive.append(stream)
        streams = alive


def _explain(name: str, error: Exception) -> str:
    """What was found and the next step, in one line."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HTTPError, RepositoryNotFoundError  # type: ignore[attr-defined]

    cause = error.__cause__ or error
    line = next((line.strip() for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
    log_in = "log in with `hf auth login` or HF_TOKEN"
    if isinstance(error, (GatedRepoError, DatasetNotFoundError)):
        return f"found a gated dataset that this login may not read; ask for access on its page and {log_in}"
    if isinstance(error, RepositoryNotFoundError):
        hint = "" if "/" in name else did_you_mean(name, [*SHORT_NAMES, "python-docs"])
        return (
            f"found no dataset of that name on the hub, or a private one{hint}; check the name or {log_in}; {OFFLINE}"
        )
    if isinstance(error, (HTTPError, ConnectionError, TimeoutError)) and not isinstance(error, HfHubHTTPError):
        cached = "set HF_HUB_OFFLINE=1 to use a copy in the cache"
        return f"found the hub out of reach ({line}); check the network, or {cached}; {OFFLINE}"
    return f"found data that cannot be read ({line}); check config= and split=, or the files on its page"
