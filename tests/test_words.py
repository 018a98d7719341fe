"""Comments, annotations and plain words, measured over the whole package."""

import ast
import inspect
import io
import pathlib
import re
import tokenize

import pytest

import nodegrad


PACKAGE = pathlib.Path(__file__).parents[1] / "nodegrad"
# Where the code is hardest to follow.
HARD = ("_trajectory", "_reversible", "_reverse")
# Words that read as riddles, or as another language in English words.
ODD = re.compile(
    r"\b(besides|nobody|anybody|somebody|whatever|anew|of (its|their) own|hangs? on|"
    r"would else|comes? apart|comes? by|hand(s|ed)? on|walk(s|ing)? back|way back|"
    r"of which|for itself|nothing of|lest|albeit)\b",
    re.IGNORECASE,
)
PRAGMA = re.compile(r"#\s*(pyright|type:|noqa|fmt|ruff)")


def _docstrings(tree: ast.Module) -> list[ast.Constant]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            if ast.get_docstring(node, clean=False) is not None:
                found.append(node.body[0].value)
    return found


def _comments(text: str) -> list[str]:
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = [t.string for t in tokens if t.type == tokenize.COMMENT]
    return [comment for comment in comments if not PRAGMA.match(comment)]


def _num_code_lines(text: str) -> int:
    """Lines that are neither empty, nor a comment alone, nor part of a docstring."""
    docs = set()
    for doc in _docstrings(ast.parse(text)):
        docs |= set(range(doc.lineno, doc.end_lineno + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(
        bool(line.strip()) and not line.strip().startswith("#") and number not in docs
        for number, line in lines
    )


def _arguments(tree: ast.Module) -> list[ast.arg]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            args = node.args
            found += [*args.posonlyargs, *args.args, *args.kwonlyargs]
            found += [arg for arg in (args.vararg, args.kwarg) if arg is not None]
    return [arg for arg in found if arg.arg not in ("self", "cls")]


def _texts(folder: pathlib.Path) -> list[str]:
    return [path.read_text() for path in sorted(folder.rglob("*.py"))]


def _comments_per_100_lines(texts: list[str]) -> float:
    comments = sum(len(_comments(text)) for text in texts)
    return 100 * comments / sum(_num_code_lines(text) for text in texts)


@pytest.mark.parametrize("wing", HARD)
def test_hard_code_is_commented(wing):
    assert _comments_per_100_lines(_texts(PACKAGE / wing)) >= 8


def test_all_code_is_commented():
    assert _comments_per_100_lines(_texts(PACKAGE)) >= 6


def test_arguments_are_annotated():
    arguments = [arg for text in _texts(PACKAGE) for arg in _arguments(ast.parse(text))]
    annotated = [arg for arg in arguments if arg.annotation is not None]
    assert len(annotated) / len(arguments) >= 0.8


@pytest.mark.parametrize(
    "name",
    [name for name in dir(nodegrad) if inspect.isfunction(getattr(nodegrad, name))],
)
def test_public_arguments_are_all_annotated(name):
    signature = inspect.signature(getattr(nodegrad, name))
    missing = [
        parameter.name
        for parameter in signature.parameters.values()
        if parameter.annotation is inspect.Parameter.empty
    ]
    assert not missing


def test_words_are_plain():
    prose = ""
    for text in _texts(PACKAGE):
        prose += "\n".join(doc.value for doc in _docstrings(ast.parse(text)))
        prose += "\n".join(_comments(text))
    assert 1000 * len(ODD.findall(prose)) / len(re.findall(r"\w+", prose)) <= 0.5


def test_the_measures_see_what_they_measure():
    text = (
        '"""A module, besides."""\n\n# A comment.\nx = 1  # noqa\n\n\n'
        'def f(self, a: int, *b, c=1):\n    """Doc\n    string."""\n    return a\n'
    )
    tree = ast.parse(text)
    assert _comments(text) == ["# A comment."]
    assert _num_code_lines(text) == 3
    assert [arg.arg for arg in _arguments(tree)] == ["a", "c", "b"]
    assert len(_docstrings(tree)) == 2
    assert ODD.search(_docstrings(tree)[0].value)
