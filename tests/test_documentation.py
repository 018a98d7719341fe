"""The examples of the documentation run and print what they say; its numbers are right.

An example is a block of Python in the README, on a page of `docs` or in a public
docstring. Those that start with an import are programs. They run as a user runs them:
in a separate process, with JAX's default precision unless they change it.
"""

import ast
import importlib.util
import inspect
import json
import pathlib
import re
import subprocess
import sys
import textwrap

import pytest

import nodegrad


ROOT = pathlib.Path(__file__).parents[1]
if not (ROOT / "docs").exists():
    pytest.skip("the documentation is not here", allow_module_level=True)

PUBLIC = [name for name in dir(nodegrad) if not name.startswith("_")]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_RUNNER = """
import contextlib, io, json, sys, traceback
import jax

runs = []
for code in json.load(sys.stdin):
    jax.config.update("jax_enable_x64", False)
    out, error = io.StringIO(), None
    try:
        with contextlib.redirect_stdout(out):
            exec(compile(code, "example", "exec"), {"__name__": "__main__"})
    except Exception:
        error = traceback.format_exc()
    runs.append((out.getvalue(), error))
json.dump(runs, sys.stdout)
"""


def _blocks(text: str) -> list[str]:
    found = re.findall(r"^( *)```python\n(.*?)^\1```", text, re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(code) for _, code in found]


def _examples() -> dict[str, list[str]]:
    """All blocks, by where they are."""
    found = {str(path.relative_to(ROOT)): _blocks(path.read_text()) for path in PAGES}
    for name in PUBLIC:
        doc = inspect.getdoc(getattr(nodegrad, name)) or ""
        found[f"nodegrad.{name}"] = _blocks(doc)
    return {where: codes for where, codes in found.items() if codes}


EXAMPLES = _examples()
PROGRAMS = {
    where: programs
    for where, codes in EXAMPLES.items()
    if (programs := [code for code in codes if code.startswith("import")])
}


@pytest.fixture(scope="module")
def tables():
    """`scripts/benchmark_tables.py`."""
    path = ROOT / "scripts" / "benchmark_tables.py"
    spec = importlib.util.spec_from_file_location("benchmark_tables", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


# Examples.


_NUMBER = re.compile(r"-?\d+(?:\.\d*)?(?:e[+-]?\d+)?")


def _agree(said: str, got: str) -> bool:
    """Whether what was printed is what was promised, to the digits of that."""
    words = lambda text: "".join(_NUMBER.sub("#", text).split())
    pairs = zip(_NUMBER.findall(said), _NUMBER.findall(got), strict=False)
    unit = lambda number: 10.0 ** -len(number.partition(".")[2])
    close = lambda said, got: abs(float(said) - float(got)) <= 0.51 * unit(said)
    return words(said) == words(got) and all(close(*pair) for pair in pairs)


def test_agreement_is_that_of_the_digits_promised():
    assert _agree("0.1096", "0.10959301")
    assert _agree("[2.  1.00]", "[2.        1.0000123]")
    assert not _agree("0.1096", "0.1094")
    assert not _agree("0.1096", "nan")
    assert not _agree("True", "False")
    assert not _agree("[1. 2.]", "[1.]")


@pytest.mark.slow
@pytest.mark.parametrize("where", PROGRAMS)
def test_programs_print_what_they_say(where):
    codes = PROGRAMS[where]
    run = subprocess.run(
        [sys.executable, "-c", _RUNNER],
        input=json.dumps(codes),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    for code, (out, error) in zip(codes, json.loads(run.stdout), strict=True):
        assert error is None, error
        promised = re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE)
        printed = out.splitlines()
        assert len(printed) == len(promised) > 0
        for said, got in zip(promised, printed, strict=True):
            assert _agree(said, got), f"{got!r} was printed, not {said!r}"


@pytest.mark.parametrize("where", EXAMPLES)
def test_fragments_are_python(where):
    for code in EXAMPLES[where]:
        ast.parse(code)


def test_programs_are_found_on_pages_and_in_docstrings():
    assert "README.md" in PROGRAMS
    assert "docs/training.md" in PROGRAMS
    assert "nodegrad.theorem1_blocks" in PROGRAMS


# Names.


def test_the_reference_has_every_public_name_once():
    pages = (ROOT / "docs" / "api").glob("*.md")
    names = re.findall(
        r"^::: nodegrad\.(\w+)$", "".join(p.read_text() for p in pages), re.M
    )
    assert sorted(names) == sorted(PUBLIC)


def test_the_readme_has_every_public_name_and_is_short():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 90
    for name in PUBLIC:
        assert re.search(rf"`(nodegrad\.)?{name}\b", readme), name


# Numbers.


def test_numbers_in_text_are_those_of_the_benchmarks(tables):
    # `python scripts/benchmark_tables.py --refresh README.md docs/*.md` repairs them.
    results = tables.load()
    for page in PAGES:
        text = page.read_text()
        assert tables.refreshed(text, results) == text, page


def test_quantities_that_pages_name_are_measured(tables):
    results = tables.load()
    text = "".join(page.read_text() for page in PAGES)
    named = set(re.findall(r"<!-- ([\w.]+) -->", text))
    assert len(named) > 20
    assert named <= set(tables.QUANTITIES)
    for name in named:
        quantity = tables.QUANTITIES[name]
        if quantity.subcommand in results:
            assert quantity.value(results) is not None, name


RESULTS = {
    "modes": {
        "header": {
            "date": "2026-01-01 00:00:00",
            "device": "cpu",
            "machine": "x86_64",
            "cores": 1,
            "dtype": "float64",
            "clock": "a clock",
            "python": "3.11",
            "versions": {"jax": "0.10", "optax": None},
        },
        "notes": ["A note."],
        "budgets": [
            dict(
                what="a", case="c", peer="p", measured=2.0, limit=1.0, verdict="MISSED"
            ),
            dict(what="b", case="c", peer="p", measured=0.5, limit=1.0, verdict="ok"),
            dict(what="i", case="c", peer="p", measured=3.0, limit=None, verdict=""),
        ],
        "tables": [
            {
                "title": "tangents of ACA",
                "records": [
                    dict(method="solve", seconds=2e-3, temp_bytes=1000),
                    dict(method="jvp", seconds=5e-3, temp_bytes=1500),
                    dict(method="jacfwd", seconds=9e-3, temp_bytes=0),
                ],
            }
        ],
    }
}


def test_tables_show_everything_misses_included(tables):
    shown = tables.tables(RESULTS)
    assert "1 of 2 limits are met" in shown
    assert "| a | c | p | 2.000 | 1.00 | **MISSED** |" in shown
    assert "| i | c | p | 3.000 |  |  |" in shown
    assert "    | jvp | 5.00 | 1.50 |" in shown
    assert "jax 0.10" in shown and "optax" not in shown
    assert "There are no results of" in shown and "`ensembles`" in shown


def test_sections_of_a_table_are_told_apart(tables):
    record = dict(method="m", seconds=1.0, temp_bytes=1)
    by_steps = tables.records_table([{**record, "section": n} for n in (10, 100)])
    assert "| method | steps |" in by_steps and "| m | 100 |" in by_steps
    by_name = tables.records_table([{**record, "section": "x"}])
    assert "| case | method |" in by_name and "| x | m |" in by_name


def test_numbers_are_refreshed(tables):
    text = "7<!-- jvp.time --> and 7<!-- lorenz.time -->"
    assert (
        tables.refreshed(text, RESULTS)
        == "2.5<!-- jvp.time --> and 7<!-- lorenz.time -->"
    )
    with pytest.raises(KeyError):
        tables.refreshed("7<!-- no.such.number -->", RESULTS)
