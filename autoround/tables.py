"""Text in columns that fits a terminal. Torch-free."""

import unicodedata
from collections.abc import Sequence

_LEAST = 6
_GAP = "  "


def aligned(rows: Sequence[Sequence[str]], width: int | None = None) -> list[str]:
    """Lines of columns as wide as their longest cells; cells of the widest ones are folded where all do not fit.

    Args:
        rows: of equal length.
        width: of the terminal; no limit when None.

    >>> aligned([("format", "group sizes"), ("auto_gptq", "16, 32, 64")], 20)
    ['format     group', '           sizes', 'auto_gptq  16, 32,', '           64']
    """
    widths = [max(map(cells, column)) for column in zip(*rows, strict=True)]
    while width is not None and sum(widths) + len(_GAP) * (len(widths) - 1) > width and max(widths) > _LEAST:
        widths[widths.index(max(widths))] -= 1
    lines = []
    for row in rows:
        folded = [fold(cell, room) for cell, room in zip(row, widths, strict=True)]
        for line in range(max(map(len, folded))):
            parts = [cell[line] if line < len(cell) else "" for cell in folded]
            padded = (part + " " * (room - cells(part)) for part, room in zip(parts, widths, strict=True))
            lines.append(_GAP.join(padded).rstrip())
    return lines


def cells(text: str) -> int:
    """Places that a text takes in a terminal: two for wide letters, none for marks on others.

    >>> cells("naïve"), cells("日本")
    (5, 4)
    """
    return sum(_cells(letter) for letter in text)


def fold(text: str, width: int) -> list[str]:
    """A text as lines of a width, broken after spaces where there are some."""
    lines, left = [], text
    while cells(left) > width:
        end, taken = 0, 0
        while end < len(left) and taken + _cells(left[end]) <= max(width, 2):
            taken += _cells(left[end])
            end += 1
        space = left.rfind(" ", 1, end + 1)
        end = space + 1 if space > 0 else end
        lines.append(left[:end].rstrip())
        left = left[end:]
    return [*lines, left]


def tail(text: str, width: int) -> str:
    """The end of a text, behind an ellipsis where it is cut.

    >>> tail("the end of it", 7)
    '… of it'
    """
    if cells(text) <= width:
        return text
    start, taken = len(text), 1
    while start and taken + _cells(text[start - 1]) <= width:
        start -= 1
        taken += _cells(text[start])
    return f"…{text[start:]}"


def _cells(letter: str) -> int:
    if unicodedata.combining(letter):
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1
