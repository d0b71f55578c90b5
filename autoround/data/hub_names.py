"""Names of hub datasets: the well-known short ones, and ``org/name``. Torch-free."""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from autoround.errors import DataError

OFFLINE = "to go on offline, give --dataset python-docs or a local file"
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class HubName(NamedTuple):
    """Where a dataset lies on the hub and what is usually read of it.

    Attributes:
        repo: ``org/name``.
        config: its configuration; None for the dataset's default.
        splits: those usually read.
        stream: too big to download.
        pair: columns of a question and its answer, where their names do not tell.
    """

    repo: str
    config: str | None = None
    splits: tuple[str, ...] = ()
    stream: bool = False
    pair: tuple[str, str] | None = None


SHORT_NAMES: Mapping[str, HubName] = MappingProxyType(
    {
        "pile-10k": HubName("NeelNanda/pile-10k"),
        "pile-val-backup": HubName("mit-han-lab/pile-val-backup", splits=("validation",)),
        "c4": HubName("allenai/c4", config="en", stream=True),
        "cci3-hq": HubName("BAAI/CCI3-HQ", stream=True),
        "fineweb-edu": HubName("HuggingFaceFW/fineweb-edu", config="sample-10BT", stream=True),
        "github-code-clean": HubName("codeparrot/github-code-clean", stream=True),
        "mbpp": HubName(
            "google-research-datasets/mbpp",
            config="full",
            splits=("train", "validation", "test"),
            pair=("text", "code"),
        ),
        "new-title-chinese": HubName("madao33/new-title-chinese"),
        "opencode-instruct": HubName("nvidia/OpenCodeInstruct", stream=True),
        "ultra-fineweb": HubName("openbmb/Ultra-FineWeb", splits=("en",), stream=True),
        "ultrachat_200k": HubName("HuggingFaceH4/ultrachat_200k", splits=("train_sft",)),
        "wikitext": HubName("Salesforce/wikitext", config="wikitext-2-raw-v1"),
    }
)
"""Well-known datasets by short name; any other ``org/name`` works as well."""

# Names by which other places know a dataset of the hub.
_ALIASES: Mapping[str, str] = MappingProxyType({"swift/pile-val-backup": "pile-val-backup"})
_IMAGES = "found questions about images that are not in the set itself; give a dataset that holds its images"
# Names that Intel's tool knows and that cannot be read from the hub -> what to say.
_REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "audiocaps": "found a set that is not on the hub; download its train.csv and give TRAIN.csv:column=caption",
        "local": "found no file of that name; give the path of the file itself",
        "liuhaotian/llava": _IMAGES,
        "llava_conv_58k": _IMAGES,
        "llava_instruct_80k": _IMAGES,
        "llava_instruct_150k": _IMAGES,
    }
)


def resolve(name: str) -> HubName:
    """Return the hub place of a short name or ``org/name``, in any case.

    Raises:
        DataError: the text cannot be the name of a hub dataset, or names one that is no text.

    >>> resolve("PILE-10K").repo, resolve("org/name").repo
    ('NeelNanda/pile-10k', 'org/name')
    """
    folded = name.casefold()
    if folded in _REFUSED:
        raise DataError(f"dataset {name!r}: {_REFUSED[folded]}")
    by_name = {short.casefold(): known for short, known in SHORT_NAMES.items()}
    by_name |= {known.repo.casefold(): known for known in SHORT_NAMES.values()}
    folded = _ALIASES.get(folded, folded)
    if folded in by_name:
        return by_name[folded]
    if not _REPO.fullmatch(name):
        raise DataError(f"dataset {name!r}: found neither a file of that name nor a hub name (org/name); {OFFLINE}")
    return HubName(name)
