"""A ``DatasetSpec`` -> its documents in seeded order, whichever source its name stands for. Torch-free."""

import random
from collections.abc import Iterator, Mapping
from itertools import chain

from autoround.data.files import READERS, find_files, looks_like_path, read_file
from autoround.data.hub import hub_source, windows
from autoround.data.hub_names import OFFLINE
from autoround.data.language import DatasetSpec, parse_specs
from autoround.data.python_docs import python_docs
from autoround.data.records import Document, Source, plain_text
from autoround.data.written import SELF
from autoround.errors import DataError

BUILTIN = "python-docs"
_WINDOW = 100_000


def open_source(spec: DatasetSpec, *, rng: random.Random, rows: int) -> Source:
    """Open a dataset; its documents come in an order drawn from ``rng``.

    The name is, in this order: the builtin ``python-docs``; a local file, folder or glob; a hub dataset. Local
    documents are shuffled whole up to 100,000, beyond that in windows of as many.

    Args:
        spec: what to read.
        rng: source of the order; same state, same order.
        rows: rows wanted; streamed hub datasets read ahead in proportion.

    Raises:
        DataError: nothing of that name, an option the source does not have, or a damaged or foreign record.
    """
    local = _local(spec)
    if local is None:
        return hub_source(spec, rng=rng, rows=rows)
    return local._replace(documents=windows(local.documents, rng=rng, size=_WINDOW))


def documents(spec: DatasetSpec, *, rng: random.Random, rows: int) -> Iterator[Document]:
    """Yield the documents of a dataset; see ``open_source``."""
    return open_source(spec, rng=rng, rows=rows).documents


def held_out(dataset: str = "python-docs:split=test") -> list[str]:
    """Return texts to evaluate on, in their own order, chats as plain text.

    Args:
        dataset: mini-language; ``python-docs:split=test`` shares no paragraph with ``python-docs``, which calibrates.

    Raises:
        UsageError: malformed mini-language.
        DataError: a source that cannot be read, or one of the hub, whose documents have no order of their own here.

    >>> sum(map(len, held_out())) > 100_000
    True
    """
    texts: list[str] = []
    for spec in parse_specs(dataset):
        found = _local(spec)
        if found is None:
            raise DataError(
                f"dataset {spec.name!r}: found a hub name; held-out text must be python-docs or local files"
            )
        texts += [text for document in found.documents if (text := plain_text(document)).strip()]
    return texts


def _local(spec: DatasetSpec) -> Source | None:
    """A builtin or local source in its own order; None for a hub name."""
    if spec.name == SELF:
        raise DataError("dataset 'self': found text that a model writes; needed text that is there; give a file")
    if spec.name == BUILTIN:
        _refuse(spec, {"config": spec.config, "column": spec.column})
        splits = spec.split or ("train",)
        return Source(f"documentation of this Python, split {'+'.join(splits)}", iter(python_docs(splits)))
    files = find_files(spec.name)
    if files:
        _refuse(spec, {"config": spec.config, "split": spec.split})
        origin = str(files[0]) if len(files) == 1 else f"{len(files)} files, {files[0]} to {files[-1]}"
        return Source(origin, chain.from_iterable(read_file(path, column=spec.column) for path in files))
    if looks_like_path(spec.name):
        raise DataError(
            f"dataset {spec.name!r}: found no such file; needed {', '.join(READERS)}, "
            f"a folder or glob of them; {OFFLINE}"
        )
    return None


def _refuse(spec: DatasetSpec, options: Mapping[str, object]) -> None:
    """Options of hub datasets are errors elsewhere, never ignored."""
    for option, value in options.items():
        if value is not None:
            raise DataError(f"dataset {spec.name!r}: found {option}=; only hub datasets have it; drop the option")
