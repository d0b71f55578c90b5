"""The images of a record: in its messages, or in a column of their own. Torch-free; nothing is opened here."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeGuard

from autoround.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

Picture: TypeAlias = "Path | bytes | Image"
"""An existing file, the bytes of one, or what pillow made of it."""
Part: TypeAlias = "str | Picture"
"""A piece of a message: text, or an image."""

COLUMNS = ("images", "image")
MARK = "<image>"
_KEYS = ("bytes", "image", "path")


class Shelf:
    """The images in the columns of a record, for the places where its messages show one.

    Args:
        record: what it has in ``images``, else in ``image``: one image or a list of them.
        where: the row, for messages.
        folder: where paths begin.
    """

    def __init__(self, record: Mapping[str, object], *, where: str, folder: Path) -> None:
        value = next((value for key in COLUMNS if (value := record.get(key))), None)
        items = value if isinstance(value, list) else [value]
        self._where, self._folder, self._taken = where, folder, 0
        self._items = [item for item in items if _may_show(item)]

    def take(self) -> "Picture | None":
        """The next one; None where there are none at all.

        Raises:
            DataError: all are taken, or there is no such file.
        """
        if not self._items:
            return None
        self._taken += 1
        if self._taken > len(self._items):
            raise self._wrong("more")
        return picture(self._items[self._taken - 1], where=self._where, folder=self._folder)

    def filled(self, text: str) -> tuple[Part, ...]:
        """A text, and images where it says ``<image>``, if there are any."""
        return tuple(self._filled(text)) if self._items and MARK in text else (text,)

    def _filled(self, text: str) -> Iterator[Part]:
        for index, piece in enumerate(text.split(MARK)):
            if index and (own := self.take()) is not None:
                yield own
            if piece.strip():
                yield piece.strip("\n")

    def rest(self) -> tuple[Picture, ...]:
        """Where no message shows any, all but mere names, which may mean anything; else none.

        Raises:
            DataError: some are taken and others left, or there is no such file.
        """
        if 0 < self._taken < len(self._items):
            raise self._wrong(str(self._taken))
        left = (item for item in self._items[self._taken :] if not isinstance(item, str))
        found = (picture(item, where=self._where, folder=self._folder) for item in left)
        return tuple(each for each in found if each is not None)

    def _wrong(self, places: str) -> DataError:
        return DataError(
            f"{self._where}: found {len(self._items)} images and {places} places for them in its messages; needed as "
            "many, or messages without places; correct the row"
        )


def picture(value: object, *, where: str, folder: Path = Path()) -> "Picture | None":
    """The image that a value stands for; None for anything else.

    Args:
        value: a path, bytes, pillow's, or a mapping of ``path``, ``image`` or ``bytes`` to one, as ``datasets`` has it.
        where: the row, for messages.
        folder: where paths begin.

    Raises:
        DataError: a path of no file.
    """
    if isinstance(value, Mapping):
        own = (value.get(key) for key in _KEYS)
        return next((found for each in own if (found := picture(each, where=where, folder=folder)) is not None), None)
    if isinstance(value, str):
        if not (file := folder / Path(value).expanduser()).is_file():
            raise DataError(
                f"{where}: found no image {value} in {folder.absolute()}; needed a file, or its bytes in the data; "
                "check the path"
            )
        return file
    if value is None or isinstance(value, bytes):
        return value or None
    return value if _is_opened(value) else None


def _may_show(item: object) -> bool:
    if isinstance(item, Mapping):
        return any(item.get(key) for key in _KEYS)
    return bool(item) if item is None or isinstance(item, str | bytes) else _is_opened(item)


def _is_opened(value: object) -> TypeGuard["Image"]:
    from PIL.Image import Image

    return isinstance(value, Image)
