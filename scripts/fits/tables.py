"""The tables of a PEtab problem of version 1, in the form that a likelihood needs.

All numbers that a simulation uses are entries of one vector: first the parameters of
the table, on linear scale, then constants. Conditions and measurements refer to it by
index, so that they are arrays, and JAX traces the model once for all of them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import petab.v1 as petab
import sympy
from jaxtyping import Float, Int

from .sbml import Model, parse, read_model, substituted, symbol, UnsupportedError


Indices = Int[np.ndarray, "..."]
Vector = Float[np.ndarray, "..."]
#: A table of pandas, whose own annotations fit few uses of it.
Table = Any


@dataclass(frozen=True)
class Parameters:
    """The parameters of the table: all by name; bounds and scales of those to estimate.

    `lower` and `upper` are on the scale of each parameter.
    """

    names: tuple[str, ...]
    values: Vector
    estimated: Indices
    scales: tuple[str, ...]
    lower: Vector
    upper: Vector

    @property
    def nominal(self) -> Vector:
        """The values of the estimated parameters, on their scales."""
        values = self.values[self.estimated]
        pairs = zip(values, self.scales, strict=True)
        return np.array([scaled(value, scale) for value, scale in pairs])


@dataclass(frozen=True)
class Observable:
    """A measured quantity and its `n` measurements.

    - `formula`, `noise`: expressions of states, constants and `placeholders`.
    - `conditions`, `times`: of each measurement, as indices, shape `(n,)`.
    - `overrides`: what the placeholders stand for, as indices, shape `(n, k)`.
    - `values`: shape `(n,)`, not transformed.
    """

    formula: sympy.Expr
    noise: sympy.Expr
    placeholders: tuple[sympy.Symbol, ...]
    transformation: str
    conditions: Indices
    times: Indices
    overrides: Indices
    values: Vector


@dataclass
class Numbers:
    """The vector of all numbers: those of parameters, then constants as they come."""

    parameters: tuple[str, ...]
    constants: list[float] = field(default_factory=list)

    def index(self, entry: Any) -> int:
        """Where the value of a table's entry is: a number or a parameter's name."""
        if entry in self.parameters:
            return self.parameters.index(entry)
        self.constants.append(float(entry))
        return len(self.parameters) + len(self.constants) - 1


@dataclass(frozen=True)
class Tables:
    """A problem.

    - `names`: of all constants of the model and of formulas.
    - `indices`: where their values are, for each condition: `(conditions, names)`.
    - `numbers`: the constants after the parameters in the vector of all numbers.
    - `times`: of all measurements, in increasing order.
    """

    name: str
    model: Model
    parameters: Parameters
    names: tuple[str, ...]
    indices: Indices
    numbers: Vector
    times: Vector
    observables: tuple[Observable, ...]


def scaled(value: float, scale: str) -> float:
    """`value` on a scale of PEtab."""
    functions = {"lin": float, "log": math.log, "log10": math.log10}
    return functions[scale](value)


def read_tables(path: Path) -> Tables:
    """Reads a problem from its YAML file, or from the one in a folder of its name."""
    if path.is_dir():
        path = path / f"{path.name}.yaml"
    problem: Any = petab.Problem.from_yaml(str(path))
    _check(problem)
    model = read_model(_model_path(path))
    parameters = _parameters(problem.parameter_df)
    extra = [name for name in parameters.names if name not in model.constants]
    names = (*model.constants, *extra)
    numbers = Numbers(parameters.names)
    measurements = problem.measurement_df
    conditions = list(dict.fromkeys(measurements["simulationConditionId"]))
    indices = _condition_indices(
        model, names, numbers, problem.condition_df.loc[conditions]
    )
    times = np.unique(measurements["time"].to_numpy(float))
    observables = tuple(
        _observable(
            row,
            measurements[measurements["observableId"] == row.name],
            conditions,
            times,
            numbers,
            model.assigned,
        )
        for _, row in problem.observable_df.iterrows()
    )
    return Tables(
        path.stem,
        model,
        parameters,
        names,
        indices,
        np.array(numbers.constants),
        times,
        tuple(o for o in observables if len(o.values)),
    )


def _check(problem: Any) -> None:
    """Raises an error for what is in a problem but not read here."""
    measurements, parameters = problem.measurement_df, problem.parameter_df
    empty = pd.Series(dtype=object)
    if measurements.get("preequilibrationConditionId", empty).notna().any():
        msg = "preequilibration"
        raise UnsupportedError(msg)
    if parameters.get("objectivePriorType", empty).notna().any():
        msg = "priors"
        raise UnsupportedError(msg)
    noise = set(problem.observable_df.get("noiseDistribution", empty).dropna())
    if noise - {"normal"}:
        msg = f"noise distributions {noise}"
        raise UnsupportedError(msg)
    if not np.isfinite(measurements["time"]).all():
        msg = "measurements of a steady state"
        raise UnsupportedError(msg)


def _model_path(path: Path) -> Path:
    files = petab.yaml.load_yaml(str(path))["problems"][0]["sbml_files"]
    return path.parent / files[0]


def _parameters(table: Table) -> Parameters:
    estimate = table["estimate"].to_numpy(int) == 1
    scales = table["parameterScale"][estimate]

    def on_scale(column: str) -> Vector:
        pairs = zip(table[column][estimate], scales, strict=True)
        return np.array([scaled(value, scale) for value, scale in pairs])

    return Parameters(
        tuple(table.index),
        table["nominalValue"].to_numpy(float),
        np.flatnonzero(estimate),
        tuple(scales),
        on_scale("lowerBound"),
        on_scale("upperBound"),
    )


def _condition_indices(
    model: Model, names: tuple[str, ...], numbers: Numbers, conditions: Table
) -> Indices:
    """Where each condition finds the value of each constant."""
    columns = [c for c in conditions.columns if c != "conditionName"]
    unknown = [c for c in columns if c not in names]
    if unknown:
        msg = f"conditions set {unknown}, which are not constants of the model"
        raise UnsupportedError(msg)
    defaults: Mapping[str, Any] = {
        name: numbers.index(
            name if name in numbers.parameters else model.constants[name]
        )
        for name in names
    }
    rows = [
        {**defaults, **{c: numbers.index(row[c]) for c in columns}}
        for _, row in conditions.iterrows()
    ]
    return np.array([[row[name] for name in names] for row in rows])


def _observable(
    row: Any,
    measurements: Table,
    conditions: list[str],
    times: Vector,
    numbers: Numbers,
    assigned: Mapping[sympy.Symbol, sympy.Expr],
) -> Observable:
    entries = [_overrides(m) for _, m in measurements.iterrows()]
    counts = entries[0] if entries else ([], [])
    kinds = "observableParameter", "noiseParameter"
    placeholders = [
        symbol(f"{kind}{i + 1}_{row.name}")
        for kind, values in zip(kinds, counts, strict=True)
        for i in range(len(values))
    ]
    overrides = [[numbers.index(e) for e in (*o, *n)] for o, n in entries]
    transformation = row.get("observableTransformation", "lin")
    columns = "observableFormula", "noiseFormula"
    formula, noise = (substituted(parse(row[c]), assigned) for c in columns)
    return Observable(
        formula,
        noise,
        tuple(placeholders),
        "lin" if pd.isna(transformation) else transformation,
        np.array([conditions.index(c) for c in measurements["simulationConditionId"]]),
        np.searchsorted(times, measurements["time"].to_numpy(float)),
        np.array(overrides, dtype=int).reshape(len(entries), len(placeholders)),
        measurements["measurement"].to_numpy(float),
    )


def _overrides(measurement: Any) -> tuple[list[Any], list[Any]]:
    """What stands for the placeholders of the formula and of the noise formula."""
    split = petab.split_parameter_replacement_list
    return (
        split(measurement.get("observableParameters")),
        split(measurement.get("noiseParameters")),
    )
