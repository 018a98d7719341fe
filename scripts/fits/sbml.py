"""An SBML model as expressions of SymPy, and these as functions of JAX arrays.

The packages that translate SBML to JAX write Python code from a file and run it. Here
libSBML and the grammar of PEtab read all formulas, so a file cannot bring in code.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import libsbml
import sympy
from jaxtyping import Array
from petab.v1.math import sympify_petab


Function = Callable[..., Array]


class UnsupportedError(Exception):
    """A file uses a part of SBML or PEtab that is not read here."""


@dataclass(frozen=True)
class Model:
    """An initial value problem in symbols.

    - `states`: the names of species and of parameters with a rate rule.
    - `slopes`, `initial`: an expression for each; those of `initial` have no states.
    - `constants`: the values of all other parameters and of compartments, by name.
    - `assigned`: what the names with an assignment rule stand for.

    Expressions are in terms of the states, the constants and `time`.
    """

    states: tuple[str, ...]
    slopes: tuple[sympy.Expr, ...]
    initial: tuple[sympy.Expr, ...]
    constants: dict[str, float]
    assigned: dict[sympy.Symbol, sympy.Expr]


def symbol(name: str) -> sympy.Symbol:
    """The symbol that PEtab's grammar makes of a name."""
    return sympy.Symbol(name, real=True)


TIME = symbol("time")


def read_model(path: Path) -> Model:
    """Reads an SBML file."""
    document = libsbml.readSBML(str(path))
    if document.getNumErrors(libsbml.LIBSBML_SEV_ERROR):
        raise UnsupportedError(document.getErrorLog().toString())
    document.expandFunctionDefinitions()
    model = document.getModel()
    if model.getNumEvents():
        msg = f"{path.name} has events"
        raise UnsupportedError(msg)
    return _translated(model)


def _translated(model: Any) -> Model:
    assigned, rates = {}, {}
    for rule in model.getListOfRules():
        target = {"assignmentRule": assigned, "rateRule": rates}[rule.getElementName()]
        target[rule.getVariable()] = _expression(rule)
    species = {s.getId(): s for s in model.getListOfSpecies()}
    states = tuple(dict.fromkeys([*species, *rates]))
    quantities = [*model.getListOfParameters(), *model.getListOfCompartments()]
    constants = {
        q.getId(): q.getValue() if isinstance(q, libsbml.Parameter) else q.getSize()
        for q in quantities
        if q.getId() not in rates and q.getId() not in assigned
    }
    rules = resolved({symbol(name): e for name, e in assigned.items()})
    slopes = {**_slopes_of_reactions(model, species), **rates}
    initial = {
        s: _initial_value(model, model.getElementBySId(s), constants) for s in states
    }
    starts = {symbol(name): e for name, e in initial.items()} | {TIME: sympy.S.Zero}
    return Model(
        states,
        tuple(substituted(slopes[s], rules) for s in states),
        tuple(substituted(substituted(initial[s], rules), starts) for s in states),
        constants,
        rules,
    )


def parse(formula: Any) -> sympy.Expr:
    """The expression of a formula in PEtab's grammar."""
    found: Any = sympify_petab(formula)
    return found


def _expression(element: Any) -> sympy.Expr:
    return parse(libsbml.formulaToL3String(element.getMath()))


def substituted(
    expression: sympy.Expr, rules: Mapping[sympy.Symbol, sympy.Expr]
) -> sympy.Expr:
    """`expression` with what `rules` say in place of symbols."""
    found: Any = expression.xreplace(dict(rules))
    return found


def resolved(
    rules: Mapping[sympy.Symbol, sympy.Expr],
) -> dict[sympy.Symbol, sympy.Expr]:
    """`rules` without symbols that have a rule in the expressions themselves."""
    found = dict(rules)
    # A rule may name others. SBML forbids cycles, so each pass resolves one level.
    for _ in rules:
        found = {name: substituted(e, found) for name, e in found.items()}
    return found


def _slopes_of_reactions(
    model: Any, species: Mapping[str, Any]
) -> dict[str, sympy.Expr]:
    """The slope of each species: of its amount, or of its concentration."""
    slopes: dict[str, Any] = dict.fromkeys(species, sympy.S.Zero)
    for reaction in model.getListOfReactions():
        law = reaction.getKineticLaw()
        if law.getNumLocalParameters() or law.getNumParameters():
            msg = f"reaction {reaction.getId()} has local parameters"
            raise UnsupportedError(msg)
        flux = _expression(law)
        sides = (-1, reaction.getListOfReactants()), (1, reaction.getListOfProducts())
        for sign, side in sides:
            for reference in side:
                name = reference.getSpecies()
                if species[name].getBoundaryCondition():
                    continue
                change = sign * sympy.Float(reference.getStoichiometry()) * flux
                slopes[name] += change / _volume(species[name])
    return slopes


def _volume(species: Any) -> sympy.Expr:
    """What an amount is divided by to give the value of the species."""
    amounts = species.getHasOnlySubstanceUnits()
    return sympy.S.One if amounts else symbol(species.getCompartment())


def _initial_value(
    model: Any, element: Any, constants: Mapping[str, float]
) -> sympy.Expr:
    assignment = model.getInitialAssignment(element.getId())
    if assignment is not None:
        return _expression(assignment)
    if isinstance(element, libsbml.Parameter):
        return sympy.Float(element.getValue())
    volume = constants[element.getCompartment()]
    amounts = element.getHasOnlySubstanceUnits()
    if element.isSetInitialConcentration():
        return sympy.Float(
            element.getInitialConcentration() * (volume if amounts else 1.0)
        )
    return sympy.Float(element.getInitialAmount() / (1.0 if amounts else volume))


def to_function(
    expressions: Sequence[sympy.Expr], *arguments: sympy.Symbol | Sequence[sympy.Symbol]
) -> Function:
    """A function of values of `arguments` that returns the expressions as a vector.

    A sequence among the arguments stands for an array with as many entries.
    """
    function = sympy.lambdify(
        arguments, list(expressions), modules="jax", cse=True, docstring_limit=0
    )

    def evaluate(*values: Any) -> Array:
        found = [jnp.asarray(v, jnp.float64) for v in function(*values)]
        return jnp.stack(found) if found else jnp.zeros(0)

    return evaluate
