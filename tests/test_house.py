"""The house guards itself: sizes, imports, names, documentation."""

import ast
import inspect
import pathlib
import re
import statistics
import tomllib
from collections.abc import Iterator

import pytest

import nodegrad


ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "nodegrad"
# The only files that may use names that other libraries do not call public.
PRIVATE_ROOMS = {"compat.py"}
PRIVATE = re.compile(
    r"(equinox\.internal|lineax\.internal|jax\.(extend|interpreters|core|_src))(\.|$)"
    r"|diffrax\.(\w+\.)*_"
)


# What the guards see.


def _modules(package: pathlib.Path) -> dict[str, pathlib.Path]:
    """The files of a package and of its sub-packages, by the names of the modules."""
    modules = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def _parsed(modules: dict[str, pathlib.Path]) -> dict[str, ast.Module]:
    return {name: ast.parse(path.read_text()) for name, path in modules.items()}


def _functions(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Line and name of every function, and its length without the docstring."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node, clean=False) or ""
            length = node.end_lineno - node.lineno + 1 - len(doc.splitlines())
            yield f"{node.lineno} {node.name}", length


def _origin(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    """The absolute name of what `module` imports from."""
    if node.level == 0:
        return node.module or ""
    up = node.level - 1 if is_package else node.level
    parts = module.split(".")
    return ".".join([*parts[: len(parts) - up], *filter(None, [node.module])])


def _imported(
    nodes, module: str, modules: dict[str, pathlib.Path]
) -> dict[str, set[str]]:
    """Modules of the package that the statements import, with the names they use."""
    is_package = modules[module].name == "__init__.py"
    imported = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = _origin(node, module, is_package)
            names = [f"{origin}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            # The name may be a module itself, or something in one.
            owner = name if name in modules else name.rpartition(".")[0]
            if owner in modules:
                imported.setdefault(owner, set()).add(name)
    return imported


def _edges(package: pathlib.Path) -> dict[str, set[str]]:
    """Which modules each module of a package imports at its top level."""
    modules = _modules(package)
    return {
        module: set(_imported(tree.body, module, modules))
        for module, tree in _parsed(modules).items()
    }


def _wings(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    """The same between the parts directly below the package: files, sub-packages."""

    def wing(module):
        return ".".join(module.split(".")[:2])

    wings = {}
    for module, others in edges.items():
        to = wings.setdefault(wing(module), set())
        to |= {wing(other) for other in others} - {wing(module)}
    return wings


def _circle(edges: dict[str, set[str]]) -> list[str] | None:
    """Modules that import each other in a circle, if there are any."""
    done, doing = set(), []

    def visit(module):
        if module in doing:
            return [*doing[doing.index(module) :], module]
        if module not in done:
            doing.append(module)
            for other in sorted(edges[module]):
                if (found := visit(other)) is not None:
                    return found
            done.add(doing.pop())
        return None

    circles = (visit(module) for module in edges)
    return next((circle for circle in circles if circle is not None), None)


def _floors(edges: dict[str, set[str]]) -> dict[str, int]:
    """How many others stand below each module, one on another."""
    floors = {}

    def floor(module):
        if module not in floors:
            floors[module] = 1 + max(map(floor, edges[module]), default=-1)
        return floors[module]

    for module in edges:
        floor(module)
    return floors


def _private_names(tree: ast.Module) -> set[str]:
    """Names of other libraries that are not public, as imported or as attributes."""
    names, aliases = set(), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names.add(alias.name)
                bound = alias.asname or alias.name.partition(".")[0]
                aliases[bound] = alias.name if alias.asname else bound
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                names.add(name)
                aliases[alias.asname or alias.name] = name
    for node in ast.walk(tree):
        attributes = []
        while isinstance(node, ast.Attribute):
            attributes.append(node.attr)
            node = node.value
        if attributes and isinstance(node, ast.Name) and node.id in aliases:
            names.add(".".join([aliases[node.id], *reversed(attributes)]))
    return {name for name in names if PRIVATE.match(name)}


def _false_abstract_names(tree: ast.Module) -> set[str]:
    """What is called `AbstractX` and is no class with something abstract in it."""
    marks = {"abstractmethod", "AbstractVar", "AbstractClassVar"}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.ClassDef):
            used = {getattr(n, "attr", getattr(n, "id", None)) for n in ast.walk(node)}
            found |= set() if used & marks else {node.name}
    return {name for name in found if re.match(r"_*Abstract[A-Z]", name)}


# Of these, names alone are enough. `load` is NumPy's and needs `allow_pickle=False`.
_PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def _dangerous_calls(tree: ast.Module) -> set[str]:
    """What could run code that comes with data: its evaluation, and pickles."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = {alias.name.partition(".")[0] for alias in node.names}
            found |= names & _PICKLES
        elif isinstance(node, ast.ImportFrom):
            found |= {(node.module or "").partition(".")[0]} & _PICKLES
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name):
                found |= {node.func.id} & {"eval", "exec"}
            elif isinstance(node.func, ast.Attribute):
                values = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
                owner = getattr(node.func.value, "id", None)
                is_load = (owner, node.func.attr) in {("np", "load"), ("numpy", "load")}
                if is_load and values.get("allow_pickle") is not False:
                    found.add("load")
                if values.get("allow_pickle"):
                    found.add("allow_pickle")
    return found


MODULES = _modules(PACKAGE)
TREES = _parsed(MODULES)
# The package itself and its wings.
TOP = {name for name, path in MODULES.items() if path.name == "__init__.py"}


# The guards.


def test_files_are_short():
    lengths = {
        name: len(path.read_text().splitlines()) for name, path in MODULES.items()
    }
    assert not {name: n for name, n in lengths.items() if n > 400}
    assert statistics.median(lengths.values()) < 200, lengths


def test_functions_are_short():
    lengths = {
        f"{module}:{where}": length
        for module, tree in TREES.items()
        for where, length in _functions(tree)
    }
    assert not {name: n for name, n in lengths.items() if n > 60}
    assert statistics.median(lengths.values()) < 12


def test_imports_point_one_way():
    edges = _edges(PACKAGE)
    assert _circle(edges) is None
    assert _circle(_wings(edges)) is None


def test_wings_are_few_and_small():
    rooms = {}
    for module in MODULES:
        if module.count(".") == 2:
            rooms.setdefault(module.split(".")[1], []).append(module)
    assert len(rooms) <= 11
    assert not {wing: len(names) for wing, names in rooms.items() if len(names) > 7}
    # Nothing lies beside the wings.
    assert {module.count(".") for module in MODULES if module not in TOP} == {2}


def test_wings_say_in_one_line_what_they_are():
    for wing in TOP - {"nodegrad"}:
        assert len(ast.get_docstring(TREES[wing]).splitlines()) == 1, wing
        assert len(TREES[wing].body) == 1, wing


def test_the_house_has_eight_floors():
    wings = {wing: to for wing, to in _wings(_edges(PACKAGE)).items() if "." in wing}
    assert max(_floors(wings).values()) < 8


def test_imports_stand_at_the_top():
    for module, tree in TREES.items():
        anywhere = _imported(ast.walk(tree), module, MODULES)
        assert anywhere == _imported(tree.body, module, MODULES), module


def test_private_names_have_one_place():
    found = {
        module: names
        for module, tree in TREES.items()
        if (names := _private_names(tree)) and MODULES[module].name not in PRIVATE_ROOMS
    }
    assert not found


def test_private_names_of_diffrax_have_one_place():
    for path in MODULES.values():
        if path.name not in PRIVATE_ROOMS:
            assert not re.search(r"diffrax\._|diffrax\.\w+\._", path.read_text()), path


def test_abstract_names_are_abstract_classes():
    found = {
        module: names
        for module, tree in TREES.items()
        if (names := _false_abstract_names(tree))
    }
    assert not found


def test_there_is_no_room_for_odds_and_ends():
    rooms = {module.rpartition(".")[2].strip("_") for module in MODULES}
    assert not {"utils", "util", "helpers", "misc"} & rooms


def test_public_names_are_exported_as_themselves():
    for node in TREES["nodegrad"].body:
        if isinstance(node, ast.ImportFrom):
            assert all(alias.asname == alias.name for alias in node.names)


@pytest.mark.parametrize(
    "name", [name for name in dir(nodegrad) if not name.startswith("_")]
)
def test_public_names_are_documented(name):
    thing = getattr(nodegrad, name)
    doc = inspect.getdoc(thing)
    assert doc is not None
    if callable(thing) and name != "RESULTS":
        assert "**Arguments:**" in doc
    if inspect.isfunction(thing):
        assert "**Cost:**" in doc


def test_versions_agree():
    with open(ROOT / "pyproject.toml", "rb") as file:
        version = tomllib.load(file)["project"]["version"]
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert nodegrad.__version__ == version


def test_nothing_evaluates_or_unpickles_data():
    files = [*MODULES.values(), *sorted((ROOT / "scripts").rglob("*.py"))]
    found = {
        str(path): calls
        for path in files
        if (calls := _dangerous_calls(ast.parse(path.read_text())))
    }
    # A wheel has no scripts.
    assert len(files) >= len(MODULES) and not found


# The guards find what they are there for.


def _package(folder: pathlib.Path, files: dict[str, str]) -> pathlib.Path:
    for name, text in files.items():
        path = folder / "house" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "house"


FOREST = {
    "__init__.py": "from ._top import a as a",
    "_top.py": "from ._low.wall import b as a",
    "_low/__init__.py": "",
    "_low/wall.py": "from . import floor\nfrom .floor import b",
    "_low/floor.py": "import jax",
    "_mid/__init__.py": "from .stairs import c as c",
    "_mid/stairs.py": "from .._low import floor\nfrom .._low.wall import b as c",
}


def test_relative_imports_of_any_level_are_resolved(tmp_path):
    assert _edges(_package(tmp_path, FOREST)) == {
        "house": {"house._top"},
        "house._top": {"house._low.wall"},
        "house._low": set(),
        "house._low.wall": {"house._low.floor"},
        "house._low.floor": set(),
        "house._mid": {"house._mid.stairs"},
        "house._mid.stairs": {"house._low.floor", "house._low.wall"},
    }


@pytest.mark.parametrize(
    "name, text",
    [
        ("_low/floor.py", "from .wall import b"),
        ("_low/floor.py", "from . import wall"),
        ("_low/floor.py", "from .._top import a"),
        ("_low/floor.py", "from .. import a"),
        ("_low/floor.py", "import house._low.wall"),
        ("_low/floor.py", "from house._low.wall import b"),
        ("_mid/stairs.py", "from . import c"),
    ],
)
def test_a_circle_of_imports_is_found(tmp_path, name, text):
    assert _circle(_edges(_package(tmp_path, FOREST))) is None
    assert _circle(_edges(_package(tmp_path, {name: text}))) is not None


def test_a_circle_of_wings_is_found(tmp_path):
    # No circle of files, but each wing imports the other one.
    files = FOREST | {
        "_mid/roof.py": "",
        "_low/cellar.py": "from .._mid.roof import d",
    }
    edges = _edges(_package(tmp_path, files))
    assert _circle(edges) is None
    assert _circle(_wings(edges)) == ["house._low", "house._mid", "house._low"]


def test_floors_are_counted(tmp_path):
    floors = _floors(_wings(_edges(_package(tmp_path, FOREST))))
    assert floors == {"house._low": 0, "house._mid": 1, "house._top": 1, "house": 2}


def test_namesakes_are_all_measured():
    tree = ast.parse(
        "class A:\n    def f(self):\n        pass\n\n"
        "class B:\n    def f(self):\n        1\n        2\n"
    )
    assert dict(_functions(tree)) == {"2 f": 2, "6 f": 3}


@pytest.mark.parametrize(
    "text",
    [
        "import equinox.internal as eqxi",
        "from equinox import internal",
        "from equinox.internal import while_loop",
        "import jax\njax.core.Tracer",
        "import jax as j\nj.core.Tracer",
        "from jax.core import ShapedArray",
        "from jax.extend.core import Primitive",
        "from jax.interpreters import ad",
        "from jax._src import core",
        "from lineax import internal as lxi",
        "from diffrax._integrate import loop",
        "import diffrax\ndiffrax._integrate.loop",
        "def f():\n    from jax import core",
    ],
)
def test_private_names_are_seen(text):
    assert _private_names(ast.parse(text))


def test_public_names_are_not_taken_for_private_ones():
    text = (
        "import diffrax\nimport equinox as eqx\nimport jax\nimport jax.numpy as jnp\n"
        "from ._compat import loop\nfrom jax.tree_util import Partial\n"
        "diffrax.ODETerm\neqx.internally\njax.core_count\njnp.sum\nself.core._src"
    )
    assert not _private_names(ast.parse(text))


def test_false_abstract_names_are_seen():
    text = (
        "import abc\nimport equinox as eqx\n"
        "class AbstractA:\n    @abc.abstractmethod\n    def f(self): ...\n"
        "class AbstractB:\n    x: eqx.AbstractVar[int]\n"
        "class AbstractC:\n    x: int\n"
        "AbstractD = A | B\n"
        "_AbstractE: TypeAlias = A | B\n"
        "Abstraction = 1\n"
    )
    found = _false_abstract_names(ast.parse(text))
    assert found == {"AbstractC", "AbstractD", "_AbstractE"}


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "import joblib.externals",
        "eval('1')",
        "exec(compile('1', 'x', 'exec'))",
        "np.load('x.npz')",
        "numpy.load('x.npy', allow_pickle=True)",
        "reader.load('x.npz', allow_pickle=True)",
    ],
)
def test_dangerous_calls_are_seen(text):
    assert _dangerous_calls(ast.parse(text))


def test_harmless_calls_are_not_taken_for_dangerous_ones():
    lines = ["np.load('x.npz', allow_pickle=False)", "json.load(f)", "model.eval()"]
    text = "\n".join([*lines, "x.evaluate(t)"])
    assert not _dangerous_calls(ast.parse(text))
