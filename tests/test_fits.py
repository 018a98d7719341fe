"""`scripts/fits`: a small problem in the PEtab format, against its closed form."""

import argparse
import sys
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest


pytest.importorskip("petab")
pytest.importorskip("libsbml")
SCRIPTS = Path(__file__).parents[1] / "scripts"
if not SCRIPTS.exists():
    pytest.skip("a source distribution has no scripts", allow_module_level=True)
sys.path.append(str(SCRIPTS))

from benchmarks import fits as subcommand
from benchmarks.measure import Clock
from benchmarks.report import Report
from fits.likelihood import make_fit, Settings
from fits.tables import read_tables
from fits.trust_region import best_step, minimise


_MATH = 'xmlns="http://www.w3.org/1998/Math/MathML"'
# A -> B in a volume of 2, from a concentration of A that conditions set.
_MODEL = f"""<?xml version="1.0" encoding="UTF-8"?>
<sbml xmlns="http://www.sbml.org/sbml/level2/version4" level="2" version="4">
<model id="decay">
<listOfCompartments><compartment id="cell" size="2"/></listOfCompartments>
<listOfSpecies>
<species id="A" compartment="cell" initialConcentration="0"/>
<species id="B" compartment="cell" initialConcentration="0"/>
</listOfSpecies>
<listOfParameters>
<parameter id="a0" value="1"/><parameter id="k" value="7"/>
<parameter id="twice" constant="false"/>
</listOfParameters>
<listOfInitialAssignments>
<initialAssignment symbol="A"><math {_MATH}><ci>a0</ci></math></initialAssignment>
</listOfInitialAssignments>
<listOfRules>
<assignmentRule variable="twice"><math {_MATH}>
<apply><times/><cn>2</cn><ci>k</ci></apply></math></assignmentRule>
</listOfRules>
<listOfReactions><reaction id="r" reversible="false">
<listOfReactants><speciesReference species="A"/></listOfReactants>
<listOfProducts><speciesReference species="B"/></listOfProducts>
<kineticLaw><math {_MATH}>
<apply><times/><ci>twice</ci><ci>A</ci></apply></math></kineticLaw>
</reaction></listOfReactions>
</model></sbml>
"""
_YAML = """format_version: 1
parameter_file: parameters.tsv
problems:
- condition_files: [conditions.tsv]
  measurement_files: [measurements.tsv]
  observable_files: [observables.tsv]
  sbml_files: [model.xml]
"""
_PARAMETERS = """parameterId parameterScale lowerBound upperBound nominalValue estimate
k log10 0.001 100 0.5 1
scale log10 0.001 100 3 1
sigma log10 0.001 100 0.2 1
offset lin 0 1 0.25 0
"""
_CONDITIONS = """conditionId a0
low 1
high 4
"""
_OBSERVABLES = """observableId observableFormula noiseFormula observableTransformation
left A+offset noiseParameter1_left lin
made observableParameter1_made*B noiseParameter1_made log10
"""
_MEASUREMENTS = """observableId simulationConditionId measurement time \
observableParameters noiseParameters
left low 1.2 0 _ 0.1
left low 0.9 1 _ 0.1
left high 2.2 2 _ 0.3
made low 1.3 1 scale sigma
made high 6.5 1 scale sigma
made high 8.1 2 scale sigma
"""


# PEtab passes arguments to pandas that pandas 3 no longer recommends.
pytestmark = pytest.mark.filterwarnings("ignore:(?s).*deprecat")


@pytest.fixture
def problem(tmp_path):
    tables = {
        "parameters": _PARAMETERS,
        "conditions": _CONDITIONS,
        "observables": _OBSERVABLES,
        "measurements": _MEASUREMENTS,
    }
    for name, text in tables.items():
        tabs = text.replace(" ", "\t").replace("_\t", "\t")
        (tmp_path / f"{name}.tsv").write_text(tabs)
    (tmp_path / "model.xml").write_text(_MODEL)
    path = tmp_path / "problem.yaml"
    path.write_text(_YAML)
    settings = Settings(diffrax.Tsit5(), rtol=1e-10, atol=1e-10)
    return make_fit(read_tables(path), settings)


def closed_form(x):
    """The log-likelihood of decimal logarithms of k, the scale and sigma."""
    k, scale, sigma = 10**x
    left = lambda a0, t: a0 * np.exp(-k * t) + 0.25
    made = lambda a0, t: np.log10(scale * a0 * (1 - np.exp(-k * t)))
    measured = np.array([1.2, 0.9, 2.2, 1.3, 6.5, 8.1])
    means = [left(1, 0), left(1, 1), left(4, 2), made(1, 1), made(4, 1), made(4, 2)]
    sigmas = np.array([0.1, 0.1, 0.3, sigma, sigma, sigma])
    data = np.append(measured[:3], np.log10(measured[3:]))
    llh = -0.5 * np.sum(((means - data) / sigmas) ** 2)
    llh -= np.sum(np.log(sigmas * np.sqrt(2 * np.pi)))
    return llh - np.sum(np.log(measured[3:] * np.log(10)))


def test_the_likelihood_is_that_of_the_closed_form(problem):
    assert problem.names == ("k", "scale", "sigma")
    nominal = np.log10([0.5, 3, 0.2])
    np.testing.assert_allclose(problem.nominal, nominal)
    loss = jax.jit(problem.negative_log_likelihood)
    for x in nominal, nominal + np.array([0.3, -0.2, 0.5]):
        np.testing.assert_allclose(-loss(x), closed_form(x), rtol=1e-8)


@pytest.mark.slow
def test_the_trust_region_finds_the_maximum(problem):
    found = jax.jit(lambda x: minimise(problem, x, tolerance=1e-10))(np.ones(3))
    x, h = np.asarray(found.x), 1e-5
    steps = h * np.eye(3)
    gradient = [(closed_form(x + s) - closed_form(x - s)) / (2 * h) for s in steps]
    np.testing.assert_allclose(gradient, 0.0, atol=1e-3)
    assert -found.value > closed_form(problem.nominal)


def test_steps_stay_within_bounds_and_the_radius():
    hessian = jnp.diag(jnp.array([1e6, 1.0, 0.0]))
    gradient = jnp.array([1e6, 4.0, -1.0])
    lower, upper = jnp.array([-10.0, -0.5, -9.0]), jnp.array([10.0, 3.0, 0.5])
    step = best_step(gradient, hessian, lower, upper, jnp.array(9.0))
    np.testing.assert_allclose(step, [-1.0, -0.5, 0.5], rtol=1e-3)
    short = best_step(gradient, hessian, lower, upper, jnp.array(0.1))
    assert jnp.linalg.norm(short) <= 0.1 + 1e-12


def test_without_data_the_subcommand_says_so(tmp_path):
    arguments = argparse.Namespace(data=tmp_path)
    report = Report("fits", {})
    with pytest.raises(SystemExit, match="NODEGRAD_DATA"):
        subcommand.run(arguments, Clock(lambda: 0.0, ""), report)
