"""What nodegrad uses of other libraries without being public there is as it was.

This file imports nothing of nodegrad, so that it can say what is missing where nodegrad
itself fails to import. If a test here fails: compare the library with its tested
version (`docs/guarantees.md`), mend `nodegrad/_internal/compat.py`, and then change the
tables below.
"""

import ast
import dataclasses
import importlib
import importlib.metadata
import inspect
import pathlib
import re
import tomllib

import diffrax
import jax.numpy as jnp
import pytest


ROOT = pathlib.Path(__file__).parents[1]
COMPAT = ROOT / "nodegrad" / "_internal" / "compat.py"
VERSIONS = {
    name: importlib.metadata.version(name)
    for name in ("jax", "jaxlib", "equinox", "diffrax", "lineax")
}
_IS_PRIVATE = re.compile(r"\._|\.internal$|^jax\.(core|extend|interpreters)")


def _imports():
    """Module and name of all that `compat.py` imports and that is not public."""
    return [
        (node.module, alias.name)
        for node in ast.walk(ast.parse(COMPAT.read_text()))
        if isinstance(node, ast.ImportFrom) and _IS_PRIVATE.search(node.module or "")
        for alias in node.names
    ]


IMPORTS = _imports()


def test_private_names_exist():
    missing = []
    for module, name in IMPORTS:
        try:
            getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            missing.append(f"{module}.{name}")
    assert len(IMPORTS) > 20
    assert not missing, f"gone from {VERSIONS}"


def test_private_names_have_a_reason():
    doc = ast.get_docstring(ast.parse(COMPAT.read_text()))
    names = {name.lstrip("_") for _, name in IMPORTS}
    aliases = {"loop": "solver_loop", "check_vma": "checks_vma"}
    assert not {n for n in names if f"`{aliases.get(n, n)}`" not in doc}


def test_attributes_of_private_modules_exist():
    modules = {n: f"{m}.{n}" for m, n in IMPORTS if m == "jax.interpreters"}
    assert set(modules) == {"ad", "batching", "mlir"}
    used = set()
    for path in (ROOT / "nodegrad").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                used.add((node.value.id, node.attr))
    used = {(module, name) for module, name in used if module in modules}
    assert len(used) > 5
    missing = {
        (module, name)
        for module, name in used
        if not hasattr(importlib.import_module(modules[module]), name)
    }
    assert not missing, f"gone from {VERSIONS}"


SIGNATURES = {
    "diffrax._heuristics.is_sde": "terms",
    "diffrax._heuristics.is_unsafe_sde": "terms",
    "diffrax._integrate._assert_term_compatible": (
        "t y args terms term_structure contr_kwargs"
    ),
    "diffrax._integrate.loop": (
        "solver stepsize_controller event saveat t0 t1 dt0 max_steps terms args "
        "init_state inner_while_loop outer_while_loop progress_meter"
    ),
    "diffrax._integrate.diffeqsolve": (
        "terms solver t0 t1 dt0 y0 args saveat stepsize_controller adjoint event "
        "max_steps throw progress_meter solver_state controller_state made_jump "
        "discrete_terminating_event"
    ),
    "diffrax._term.WrapTerm": "term direction",
    "equinox.internal._loop.common._Buffer._op": (
        "self pred item x op kwargs makes_false_steps"
    ),
    "equinox.internal._loop.common._select_if_vmap": "pred x y makes_false_steps",
    "equinox.internal.nondifferentiable": "x name msg",
    "equinox.internal.nondifferentiable_backward": "x name msg symbolic",
    "equinox.internal.prevbefore": "x",
    "equinox.internal.unvmap_any": "x",
    "equinox.internal.while_loop": (
        "cond_fun body_fun init_val max_steps buffers kind checkpoints base"
    ),
    "jax.core.eval_jaxpr": "jaxpr consts args propagate_source_info",
    "jax.extend.core.jaxprs_in_params": "params",
    "lineax.internal.default_floating_dtype": "",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_private_functions_take_what_they_took(name):
    module, *attributes = re.split(r"\.(?=\w+$|_Buffer)", name)
    function = importlib.import_module(module)
    for attribute in attributes:
        function = getattr(function, attribute)
    parameters = inspect.signature(function).parameters
    assert " ".join(parameters) == SIGNATURES[name], f"changed in {VERSIONS}"


# The layout of the state of Diffrax's loop, which `recorded_loop` reads, of the buffers
# of Equinox's loop, which `put_row` writes, and of results.
FIELDS = {
    "State": (
        "y tprev tnext made_jump solver_state controller_state progress_meter_state "
        "result num_steps num_accepted_steps num_rejected_steps save_state dense_ts "
        "dense_infos dense_save_index event_tprev event_tnext event_dense_info "
        "event_values event_mask"
    ),
    "SaveState": "saveat_ts_index ts ys save_index",
    "_Buffer": "_array _pred _tag _makes_false_steps",
    "EnumerationItem": "_value _enumeration",
}
MODULES = {
    "_Buffer": "equinox.internal._loop.common",
    "EnumerationItem": "equinox._enum",
}


@pytest.mark.parametrize("name", FIELDS)
def test_states_of_loops_have_the_fields_they_had(name):
    module = MODULES.get(name, "diffrax._integrate")
    cls = getattr(importlib.import_module(module), name)
    fields = [field.name for field in dataclasses.fields(cls)]
    assert " ".join(fields) == FIELDS[name], f"changed in {VERSIONS}"


def test_constant_steps_have_the_state_they_had():
    # `UniformGrid` computes their ends from such a state. It fails in silence.
    field = lambda *_: 0.0
    t0, t1, dt0 = (jnp.array(x) for x in (1.0, 2.0, 0.25))
    init = diffrax.ConstantStepSize().init
    _, state = init(diffrax.ODETerm(field), t0, t1, t0, dt0, None, field, None)
    assert tuple(map(float, state)) == (1, 4, 1.0, 2.0)


def test_all_functions_are_in_the_table():
    functions = {
        f"{module}.{name}"
        for module, name in IMPORTS
        if module.partition(".")[0] != "jax"
        and inspect.isfunction(getattr(importlib.import_module(module), name))
    }
    assert functions <= set(SIGNATURES)


def test_a_new_minor_version_of_diffrax_is_not_taken_unseen():
    with open(ROOT / "pyproject.toml", "rb") as file:
        needs = tomllib.load(file)["project"]["dependencies"]
    (diffrax,) = [need for need in needs if need.startswith("diffrax")]
    assert diffrax.endswith(",<0.8")
