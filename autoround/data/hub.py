"""Datasets of the Hugging Face hub -> documents, through the ``datasets`` library; streamed when the rows are known."""

import itertools
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from autoround.data.hub_errors import explain, out_of_reach
from autoround.data.hub_names import HubName, resolve
from autoround.data.language import DatasetSpec, did_you_mean
from autoround.data.records import Document, Source, read_record
from autoround.errors import AutoRoundError, DataError
from autoround.log import LOGGER

_TIMEOUT_SECONDS = 10
_SCRIPT = "Dataset scripts are no longer supported"


class _Opened(NamedTuple):
    """A dataset whose splits are known.

    Attributes:
        target: which one.
        catalog: its splits by name: streams where the hub answers.
        splits: those to read.
        files: what ``load_dataset`` needs beside the name; empty for all but former scripts.
        cached: why the cache alone is read; empty where the hub answers.
    """

    target: HubName
    catalog: Mapping[str, Any]
    splits: tuple[str, ...]
    files: Mapping[str, list[str]]
    cached: str

    def whole(self, split: str) -> Any:
        """All rows of some splits, joined by ``+``."""
        if self.cached:
            return _from_cache(self.target).as_dataset(split=split)
        return _load(self.target, self.files, streaming=False, split=split)


def hub_source(spec: DatasetSpec, *, rng: random.Random, rows: int) -> Source:
    """Open a dataset of the hub; its documents come in an order drawn from ``rng``.

    A dataset with ``num`` is streamed: windows of max(1024, 8 * rows) documents are read and shuffled one after
    another. Without ``num`` it is downloaded to the cache and shuffled whole. Offline, and with a warning where the
    hub is out of reach, the cache alone is read.

    Args:
        spec: which dataset, configuration, splits and column.
        rng: source of the order; same state, same order.
        rows: rows wanted, the measure of a streaming window.

    Raises:
        DataError: no such dataset, configuration or split, none that this login may read, neither hub nor copy in the
            cache, or, while documents are read, one without text; the message says how to go on offline.
    """
    target = resolve(spec.name)
    cached = _why_cached(spec.name, target.repo)
    with _explained(spec.name, cached):
        opened = _open(spec, target._replace(config=spec.config or target.config), cached)
    sliced = any("[" in split for split in opened.splits)
    streamed = (spec.num is not None or target.stream) and not cached and not sliced
    read = _streamed(opened, spec, rng=rng, rows=rows) if streamed else _whole(opened, spec, rng=rng)
    parts = [f"hub dataset {target.repo}", *([f"config {opened.target.config}"] if opened.target.config else [])]
    parts += [f"split {'+'.join(opened.splits)}", *(["streamed"] if streamed else [])]
    parts += ["from the cache alone"] if cached else []
    return Source(", ".join(parts), _guarded(read, spec.name, cached))


def windows(documents: Iterator[Document], *, rng: random.Random, size: int) -> Iterator[Document]:
    """Yield documents shuffled within successive windows of ``size``, in bounded memory."""
    while window := list(itertools.islice(documents, size)):
        rng.shuffle(window)
        yield from window


def _why_cached(name: str, repo: str) -> str:
    """Asks the hub once and shortly, so that a machine without network does not wait for the library's retries."""
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of the client that the hub library uses

    cached = "no network allowed (offline)" if datasets.config.HF_HUB_OFFLINE else ""
    with _explained(name, ""):
        try:
            if not cached:
                HfApi().dataset_info(repo, timeout=_TIMEOUT_SECONDS)
        except (HTTPError, OSError) as error:
            if not out_of_reach(error):
                raise
            cached = "the hub out of reach"
    if cached:
        LOGGER.warning("dataset %r: found %s; reads the copy in the cache as it is", name, cached)
    return cached


def _open(spec: DatasetSpec, target: HubName, cached: str) -> _Opened:
    files: Mapping[str, list[str]] = {}
    try:
        catalog = _from_cache(target).info.splits if cached else _load(target, files, streaming=True)
    except RuntimeError as error:
        if _SCRIPT not in str(error):
            raise
        target, files = target._replace(config=None), _parquet_files(spec, target.repo)
        catalog = _load(target, files, streaming=True)
    return _Opened(target, catalog, _splits(spec, target, list(catalog)), files, cached)


def _load(target: HubName, files: Mapping[str, list[str]], *, streaming: bool, split: str | None = None) -> Any:
    import datasets

    if files:
        return datasets.load_dataset("parquet", data_files=dict(files), streaming=streaming, split=split)
    return datasets.load_dataset(target.repo, target.config, streaming=streaming, split=split)


def _from_cache(target: HubName) -> Any:
    """What ``load_dataset`` falls back to in the end, without its attempts to reach the hub before."""
    from datasets.packaged_modules.cache.cache import Cache

    name = target.repo.rpartition("/")[2]
    return Cache(repo_id=target.repo, dataset_name=name, config_name=target.config, version="auto", hash="auto")


def _parquet_files(spec: DatasetSpec, repo: str) -> dict[str, list[str]]:
    """The files of a dataset whose script no longer runs, by split: ``data/train-00000-of-00002.parquet`` …"""
    from huggingface_hub import HfApi

    found: dict[str, list[str]] = {}
    for file in sorted(HfApi().list_repo_files(repo, repo_type="dataset")):
        name, dot, suffix = file.rpartition("/")[2].rpartition(".")
        if dot and suffix == "parquet":
            found.setdefault(name.partition("-")[0], []).append(f"hf://datasets/{repo}/{file}")
    if not found or spec.config:
        raise DataError(
            f"dataset {spec.name!r}: found a Python script, which is not run; needed data files"
            + ("; drop config=, which the script defines" if found else "; look for a copy in parquet")
        )
    return found


def _splits(spec: DatasetSpec, target: HubName, available: list[str]) -> tuple[str, ...]:
    """The splits asked for, checked; else the dataset's usual ones, ``train``, or the first."""
    for asked in spec.split or ():
        base = asked.partition("[")[0]
        if base not in available:
            hint = did_you_mean(base, available)
            raise DataError(
                f"dataset {spec.name!r}: found no split {base!r}; needed one of {', '.join(available)}{hint}"
            )
    if spec.split:
        return spec.split
    usual = [name for name in target.splits if name in available]
    return tuple(usual) or (("train",) if "train" in available else (available[0],))


def _streamed(opened: _Opened, spec: DatasetSpec, *, rng: random.Random, rows: int) -> Iterator[Document]:
    streams = [_read(_encoded(opened.catalog[split]), opened.target, spec, split) for split in opened.splits]
    return windows(_alternate(streams), rng=rng, size=max(1024, 8 * rows))


def _whole(opened: _Opened, spec: DatasetSpec, *, rng: random.Random) -> Iterator[Document]:
    split = "+".join(opened.splits)
    whole = _encoded(opened.whole(split))
    order = list(range(len(whole)))
    rng.shuffle(order)
    for row in order:
        found = whole[row]
        record = found if isinstance(found, Mapping) else found.to_pylist()[0]
        yield _document(record, opened.target, spec, f"{spec.name} [{split}], row {row + 1}")


def _encoded(rows: Any) -> Any:
    """A dataset whose images stay the bytes that they are, so that those of many rows fit into memory: as tables of one
    row where it has images and is no stream."""
    import datasets

    if not _shows(rows.features or {}):
        return rows
    return rows.decode(False) if isinstance(rows, datasets.IterableDataset) else rows.with_format("arrow")


def _shows(feature: Any) -> bool:
    """Whether there are images in a feature of a dataset."""
    import datasets

    if isinstance(feature, Mapping):
        return any(_shows(each) for each in feature.values())
    if isinstance(feature, datasets.List | datasets.LargeList):
        return _shows(feature.feature)
    return isinstance(feature, datasets.Image)


def _read(rows: Iterable[Mapping[str, Any]], target: HubName, spec: DatasetSpec, split: str) -> Iterator[Document]:
    for number, row in enumerate(rows, 1):
        yield _document(row, target, spec, f"{spec.name} [{split}], row {number}")


def _document(row: Mapping[str, Any], target: HubName, spec: DatasetSpec, where: str) -> Document:
    if target.pair and spec.column is None and all(column in row for column in target.pair):
        row = dict(zip(("input", "output"), (row[column] for column in target.pair), strict=True))
    return read_record(row, where=where, column=spec.column)


def _alternate(streams: list[Iterator[Document]]) -> Iterator[Document]:
    """One document of each stream in turn, until all are empty."""
    while streams:
        alive = []
        for stream in streams:
            for document in itertools.islice(stream, 1):
                yield document
                alive.append(stream)
        streams = alive


def _guarded(documents: Iterator[Document], name: str, cached: str) -> Iterator[Document]:
    with _explained(name, cached):
        yield from documents


@contextmanager
def _explained(name: str, cached: str) -> Iterator[None]:
    """Errors of the client libraries as one of ours."""
    import pyarrow as pa
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of the client that the hub library uses

    try:
        yield
    except AutoRoundError:
        raise
    except (HTTPError, DatasetsError, OSError, RuntimeError, ValueError, pa.ArrowException) as error:
        raise DataError(f"dataset {name!r}: {explain(name, error, cached=cached)}") from error
