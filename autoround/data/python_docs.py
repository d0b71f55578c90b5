"""The offline builtin ``python-docs``: the language reference and long docstrings of the running Python. Torch-free.

Documents come in a fixed order for a given Python version: the topics of ``pydoc_data`` by name, then the docstrings
of at least 200 characters by module and line. Every eighth document, from the third on, is the ``test`` split and
the others ``train``; paragraphs that also stand in ``test`` are left out of ``train``, so that no text measured on was
calibrated on.
"""

import ast
import functools
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from autoround.data.language import did_you_mean
from autoround.errors import DataError

SPLITS = ("train", "test")
_TEST_FIRST, _TEST_EVERY = 2, 8
_LONG = 200
_SKIPPED = frozenset(
    {"__pycache__", "_bundled", "antigravity.py", "dist-packages", "idlelib", "lib2to3", "pydoc_data", "site-packages"}
    | {"test", "tests", "this.py", "turtledemo"}
)
_BLANK_LINE = re.compile(r"\n\s*\n")


def python_docs(split: Iterable[str] = ("train",)) -> list[str]:
    """Return the documents of one or both splits in their fixed order; no module is imported or run for it.

    Args:
        split: names out of ``SPLITS``.

    Raises:
        DataError: an unknown split, or a Python installed without its sources and reference.
    """
    wanted = tuple(split)
    for name in wanted:
        if name not in SPLITS:
            hint = did_you_mean(name, SPLITS)
            raise DataError(f"python-docs: found split {name!r}; needed {' or '.join(SPLITS)}{hint}")
    documents = _documents()
    if not documents:
        raise DataError("python-docs: found no documentation in this Python; give --dataset a local file")
    test = list(documents[_TEST_FIRST::_TEST_EVERY])
    train = [text for index, text in enumerate(documents) if index % _TEST_EVERY != _TEST_FIRST]
    return (_unseen(train, test) if "train" in wanted else []) + (test if "test" in wanted else [])


@functools.cache
def _documents() -> tuple[str, ...]:
    return tuple(dict.fromkeys([*_topics(), *_docstrings()]))


def _topics() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError:  # some distributions leave it out
        return []
    return [topics[name] for name in sorted(topics)]


def _docstrings() -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    for name in sorted(sys.stdlib_module_names):
        for path in (*_sources(root / name), *_sources(root / f"{name}.py")):
            source = path.read_bytes()
            if b'"""' in source or b"'''" in source:
                yield from _long_docstrings(_parse(source))


def _sources(path: Path) -> Iterator[Path]:
    if path.name in _SKIPPED:
        return
    if path.is_dir():
        for inner in sorted(path.iterdir()):
            yield from _sources(inner)
    elif path.suffix == ".py" and path.is_file():
        yield path


def _parse(source: bytes) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        return ast.parse(source)


def _long_docstrings(node: ast.AST) -> Iterator[str]:
    """Docstrings in line order; only statements are descended into."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        text = ast.get_docstring(node)
        if text and len(text) >= _LONG:
            yield text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.stmt, ast.ExceptHandler)):
            yield from _long_docstrings(child)


def _unseen(train: list[str], test: list[str]) -> list[str]:
    """The documents without paragraphs of the held-out ones; what is then shorter than a long docstring goes."""
    seen = {_spaced(paragraph) for text in test for paragraph in _BLANK_LINE.split(text)}
    kept = (
        "\n\n".join(paragraph for paragraph in _BLANK_LINE.split(text) if _spaced(paragraph) not in seen)
        for text in train
    )
    return [text for text in kept if len(text) >= _LONG]


def _spaced(paragraph: str) -> str:
    return " ".join(paragraph.split())
