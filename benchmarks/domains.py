"""Texts to judge models on: four domains that need no network and are the same wherever the pinned packages are.

``docs`` is the part of Python's documentation that calibration never reads; ``code`` the definitions of the standard
library without docstrings and comments; ``prose`` the English paragraphs of the task descriptions that lm-eval brings
along, abstracts of papers for the most part; ``model`` rows that the float model writes itself, kept beside its folder.
A document gives at most ``SEQLEN`` tokens, one row, and no row holds two documents.
"""

import ast
import functools
import hashlib
import json
import random
import re
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from autoround.data.sources import held_out
from autoround.data.tokens import load_calibration
from autoround.errors import DataError
from autoround.model.load import open_model
from autoround.model.sample import Sampler

SEQLEN = 256
# Tokens below which a document is left out, and characters of a definition that is worth reading.
SHORTEST, SHORTEST_CODE = 32, 300
# A paragraph of prose has as many words, and all but this share of its characters are letters and plain punctuation.
PROSE_WORDS, PROSE_SHARE = 40, 0.95
_PLAIN = frozenset(" ,.;:'\"()-?!")
_FENCED, _BLANK_LINE = re.compile(r"```.*?```", re.DOTALL), re.compile(r"\n\s*\n")
# How links, tables, headings, lists and the checklists of contributors look.
_MARKED = re.compile(r"https?://|\[[ xX]\]|^[#*|<>!`-]|^\d+\.")
# Calibration draws with small seeds.
_SEED = 20_261
MODEL = "model"


def docs() -> list[str]:
    """Documents of Python that calibration never reads."""
    return held_out("python-docs:split=test")


def code() -> list[str]:
    """Functions and classes at the top level of the standard library's modules, as their syntax trees print."""
    return list(_code())


@functools.cache
def _code() -> tuple[str, ...]:
    root = Path(sysconfig.get_path("stdlib"))
    found: list[str] = []
    for name in sorted(sys.stdlib_module_names):
        for file in (root / f"{name}.py", root / name / "__init__.py"):
            if file.is_file():
                found += [text for text in _definitions(file) if len(text) >= SHORTEST_CODE]
    return tuple(dict.fromkeys(found))


def prose() -> list[str]:
    """What lm-eval's tasks say of themselves in whole English paragraphs, a document for each of its files."""
    spec = find_spec("lm_eval")
    assert spec is not None and spec.origin is not None, "lm-eval is one of the package's requirements"
    seen: set[str] = set()
    found = []
    for file in sorted((Path(spec.origin).parent / "tasks").rglob("README.md")):
        paragraphs = []
        for paragraph in _BLANK_LINE.split(_FENCED.sub("", file.read_text(encoding="utf-8"))):
            text = " ".join(paragraph.split())
            if text not in seen and _is_prose(text):
                paragraphs.append(text)
            seen.add(text)
        if paragraphs:
            found.append("\n\n".join(paragraphs))
    return found


TEXTS: dict[str, Callable[[], list[str]]] = {"docs": docs, "code": code, "prose": prose}
DOMAINS = (*TEXTS, MODEL)


def read(domain: str, reference: Path, tokenizer: PreTrainedTokenizerBase, *, tokens: int) -> list[list[int]]:
    """Rows of one domain, a document each, in an order that is drawn once for all.

    Args:
        domain: out of ``DOMAINS``.
        reference: folder of the float model; it writes the rows of ``model``.
        tokenizer: of that model.
        tokens: predicted tokens wanted, all but the first of each row; no row is begun beyond them.

    Raises:
        DataError: the domain has fewer tokens.
    """
    if domain == MODEL:
        return written(reference, tokenizer, rows=-(-tokens // (SEQLEN - 1)))
    texts = TEXTS[domain]()
    random.Random(domain).shuffle(texts)
    rows: list[list[int]] = []
    left = tokens
    for text in texts:
        row = tokenizer(text, truncation=True, max_length=SEQLEN, verbose=False).input_ids
        if len(row) >= SHORTEST:
            rows.append(row)
            left -= len(row) - 1
        if left <= 0:
            return rows
    raise DataError(f"domain {domain!r}: found {tokens - left} tokens to predict; needed {tokens}; ask for fewer")


def written(reference: Path, tokenizer: PreTrainedTokenizerBase, *, rows: int) -> list[list[int]]:
    """Rows that a model writes itself, from the file beside its folder if it wrote them before.

    The file's name tells the weights, so that a model that is trained anew writes anew.
    """
    name = f"{reference.name}.wrote-{rows}x{SEQLEN}-{_digest(reference)}.json"
    file = reference.resolve().with_name(name)
    if not file.exists():
        sampler = Sampler(open_model(reference))
        made = load_calibration(
            f"self:num={rows}", tokenizer, nsamples=rows, seqlen=SEQLEN, batch_size=1, seed=_SEED, writer=sampler
        )
        unfinished = file.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(made.tokens_NT.tolist()))
        unfinished.replace(file)
    found: list[list[int]] = json.loads(file.read_text())
    return found


def _digest(folder: Path) -> str:
    found = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        found.update(file.read_bytes())
    return found.hexdigest()[:12]


def _definitions(file: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        tree = ast.parse(file.read_bytes())
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.unparse(_Bare().visit(node))


class _Bare(ast.NodeTransformer):
    """Takes docstrings away; comments are in no syntax tree."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
        return super().generic_visit(node)


def _is_prose(text: str) -> bool:
    if len(text.split()) < PROSE_WORDS or _MARKED.search(text):
        return False
    return sum(c in _PLAIN or (c.isascii() and c.isalpha()) for c in text) / len(text) >= PROSE_SHARE
