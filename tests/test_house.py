"""The house guards itself: sizes, imports, names, documentation."""

import ast
import inspect
import pathlib
import re
import statistics
import tomllib

import pytest

import nodegrad


ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted((ROOT / "nodegrad").glob("*.py"))
TREES = {path.stem: ast.parse(path.read_text()) for path in FILES}


def _functions():
    for stem, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                doc = ast.get_docstring(node, clean=False) or ""
                length = node.end_lineno - node.lineno + 1 - len(doc.splitlines())
                yield f"{stem}.{node.name}", length


def _imports(tree, top_level_only):
    nodes = tree.body if top_level_only else ast.walk(tree)
    return {
        node.module
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module
    }


def test_files_are_short():
    lengths = {path.name: len(path.read_text().splitlines()) for path in FILES}
    assert max(lengths.values()) <= 400, lengths
    assert statistics.median(lengths.values()) < 200, lengths


def test_functions_are_short():
    lengths = dict(_functions())
    too_long = {name: n for name, n in lengths.items() if n > 60}
    assert not too_long
    assert statistics.median(lengths.values()) < 12


def test_imports_point_one_way():
    edges = {stem: _imports(tree, True) for stem, tree in TREES.items()}
    done, doing = set(), []

    def visit(stem):
        assert stem not in doing, [*doing, stem]
        if stem not in done:
            doing.append(stem)
            for other in edges[stem]:
                visit(other)
            done.add(doing.pop())

    for stem, tree in TREES.items():
        visit(stem)
        assert _imports(tree, False) == edges[stem], f"{stem} imports inside a function"


def test_private_names_of_diffrax_have_one_place():
    for path in FILES:
        if path.name != "_diffrax.py":
            assert not re.search(r"diffrax\._|diffrax\.\w+\._", path.read_text()), path


def test_there_is_no_room_for_odds_and_ends():
    assert not {"utils", "_utils", "helpers", "_helpers", "misc", "_misc"} & set(TREES)


def test_public_names_are_exported_as_themselves():
    for node in TREES["__init__"].body:
        if isinstance(node, ast.ImportFrom):
            assert all(alias.asname == alias.name for alias in node.names)


@pytest.mark.parametrize(
    "name", [name for name in dir(nodegrad) if not name.startswith("_")]
)
def test_public_names_are_documented(name):
    thing = getattr(nodegrad, name)
    doc = inspect.getdoc(thing)
    assert doc is not None
    if name != "RESULTS":
        assert "**Arguments:**" in doc
        assert "**Cost:**" in doc


def test_versions_agree():
    with open(ROOT / "pyproject.toml", "rb") as file:
        version = tomllib.load(file)["project"]["version"]
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()
