"""The page docs/formats.md: what the tests found, by client, layout, width and symmetry."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from autoround.formats.gguf.recipes import FILE_TYPES
from tests.clients import matrix
from tests.clients.matrix import PASSED, Claim, Outcomes

CODES = {True: "symmetric", False: "asymmetric"}


def page(outcomes: Outcomes) -> str:
    """The whole page."""
    head, tail = (Path(__file__).with_name(name).read_text() for name in ("page_head.md", "page_tail.md"))
    found = matrix.claims(outcomes)
    sections = [
        line
        for client in matrix.COLUMNS
        for line in _section(client, [claim for claim in found if claim.client == client])
    ]
    return "".join((head, *_overview(found), *_files(outcomes), *sections, "\n", tail))


def _overview(found: list[Claim]) -> Iterator[str]:
    """A line per layout and symmetry, a column per client."""
    yield _line("layout", "codes", *matrix.COLUMNS.values()) + _line(*["---"] * (2 + len(matrix.COLUMNS)))
    for layout, stored in matrix.STORED.items():
        for sym in sorted({sym for _, sym in stored}, reverse=True):
            own = [[each for each in found if (each.client, each.layout) == (name, layout)] for name in matrix.COLUMNS]
            codes = "any" if layout == "fake" else CODES[sym]
            yield _line(f"`{layout}`", codes, *(_widths(claims, sym) or "–" for claims in own))


def _files(outcomes: Outcomes) -> Iterator[str]:
    """The table of GGUF file types."""
    yield "\n## GGUF files\n\nThe other clients here load folders only, and llama.cpp GGUF files only.\n\n"
    yield _line("file type", *matrix.FILE_COLUMNS) + _line(*["---"] * (1 + len(matrix.FILE_COLUMNS)))
    for name in FILE_TYPES:
        states = (outcomes.get(key(name), matrix.NOT_RUN) for key in matrix.FILE_COLUMNS.values())
        yield _line(f"`gguf:{name}`", *("yes" if state == PASSED else f"**{state}**" for state in states))


def _section(client: str, found: list[Claim]) -> Iterator[str]:
    """What one client takes, what it refuses, and what it does not read."""
    yield f"\n## {client}\n\n" + _line("layout", *CODES.values(), "also") + _line(*["---"] * 4)
    unread = matrix.NOT_READ.get(client, {})
    for layout in (name for name in matrix.STORED if name not in unread):
        own = [claim for claim in found if claim.layout == layout and claim.words is None]
        also = dict.fromkeys(_text(claim.beside, {claim.outcome}) for claim in own if claim.beside)
        yield _line(f"`{layout}`", *(_widths(own, sym) for sym in CODES), ", ".join(also))
    answers = [*_refusals([claim for claim in found if claim.layout not in unread]), *_unread(found, unread)]
    yield "".join(["\n", *answers] if answers else [])


def _refusals(found: list[Claim]) -> Iterator[str]:
    """A line per layout and answer."""
    groups: dict[tuple[str, str, str], list[Claim]] = defaultdict(list)
    for claim in found:
        if claim.words is not None:
            groups[claim.layout, claim.words, claim.note].append(claim)
    for (layout, words, note), own in groups.items():
        widths = {sym: [str(claim.cell[0]) for claim in own if claim.cell and claim.cell[1] is sym] for sym in CODES}
        what = [f"{CODES[sym]} {', '.join(bits)}" for sym, bits in widths.items() if bits]
        what += dict.fromkeys(claim.beside for claim in own if claim.beside)
        answer = f"refused with {_quoted(words)}"
        why = f"; {note}" if note else ""
        yield f"- `{layout}`, {', '.join(what)}: {_text(answer, {claim.outcome for claim in own})}{why}.\n"


def _unread(found: list[Claim], unread: Mapping[str, str]) -> Iterator[str]:
    """A line per reason, with the client's words where it was asked."""
    groups: dict[str, list[str]] = defaultdict(list)
    for layout, reason in unread.items():
        own = [claim for claim in found if claim.layout == layout]
        answers = dict.fromkeys(_text(_quoted(claim.words or ""), {claim.outcome}) for claim in own)
        groups[", ".join((reason, *answers))].append(f"`{layout}`")
    for reason, layouts in groups.items():
        yield f"- Not read: {', '.join(layouts)}: {reason}.\n"


def _widths(found: Iterable[Claim], sym: bool) -> str:
    """The widths that passed, and in bold those that should have."""
    states: dict[str, set[str]] = defaultdict(set)
    for claim in found:
        if claim.words is None and claim.cell is not None and (claim.cell[1] is sym or claim.layout == "fake"):
            states["yes" if claim.layout == "fake" else str(claim.cell[0])].add(claim.outcome)
    return ", ".join(_text(bits, states[bits]) for bits in sorted(states))


def _text(what: str, outcomes: set[str]) -> str:
    bad = ", ".join(sorted(outcomes - {PASSED}))
    return f"{what} **{bad}**" if bad else what


def _quoted(words: str) -> str:
    return f"“{words.replace('{bits}', '…').replace('{sym}', '…').rstrip('.,')}”"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |\n"
