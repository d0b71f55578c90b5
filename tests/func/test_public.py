"""Every public function of the tuner is documented and has an example, which the doctest run executes."""

import ast
from pathlib import Path

import pytest

from autoround import func as F

FILES = sorted(Path(F.__file__).parent.rglob("*.py"))


def public_functions(file: Path) -> list[ast.FunctionDef]:
    tree = ast.parse(file.read_text())
    return [node for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_public_functions_have_examples(file: Path) -> None:
    bare = [node.name for node in public_functions(file) if ">>> " not in (ast.get_docstring(node) or "")]
    assert bare == []


def test_functions_are_found() -> None:
    assert sum(len(public_functions(file)) for file in FILES) > 30
