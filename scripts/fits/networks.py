"""PEtab-SciML: a network inside of a model, as the hybridization table says.

Layers and functions are those that the problems here use; others raise an error.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import yaml
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from .likelihood import Fit, gathered, Outputs, reader, Settings, Vector
from .sbml import parse, read_model, symbol, TIME, to_function, UnsupportedError
from .tables import Observable, Table


Weights = Mapping[str, Mapping[str, Array]]

# GELU is the approximation by tanh, as in JAX and in the published log-likelihoods.
_FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
}


def read_network(path: Path) -> Callable[[Weights, Array], Array]:
    """A network as a function of its weights, by layer, and of its input."""
    content = yaml.safe_load(path.read_text())
    kinds = {layer["layer_type"] for layer in content["layers"]}
    if kinds - {"Linear"}:
        msg = f"layers {kinds}"
        raise UnsupportedError(msg)
    nodes = content["forward"]
    called = {n["target"] for n in nodes if n["op"] == "call_function"}
    if called - set(_FUNCTIONS):
        msg = f"functions {called}"
        raise UnsupportedError(msg)

    def apply(weights: Weights, x: Array) -> Array:
        values: dict[str, Array] = {}
        for node in nodes:
            inputs = [values[name] for name in node["args"]]
            values[node["name"]] = _evaluate(node, inputs, weights, x)
        return values[nodes[-1]["name"]]

    return apply


def _evaluate(
    node: Mapping[str, Any], inputs: Sequence[Array], weights: Weights, x: Array
) -> Array:
    """The value of a node of the graph of a network."""
    operation = node["op"]
    if operation == "placeholder":
        return x
    (value,) = inputs
    if operation == "call_module":
        layer = weights[node["target"]]
        return layer["weight"] @ value + layer["bias"]
    return _FUNCTIONS[node["target"]](value) if operation == "call_function" else value


def read_weights(path: Path, name: str) -> Weights:
    """The weights of the network `name`, by layer and then `weight` and `bias`."""
    with h5py.File(path) as file:
        layers: Any = file[f"parameters/{name}"]
        return {
            layer: {
                kind: jnp.asarray(layers[layer][kind][()]) for kind in layers[layer]
            }
            for layer in layers
        }


def expected_llh(folder: Path) -> float:
    """The log-likelihood of the training data at nominal parameters, as published."""
    content = yaml.safe_load((folder / f"expected_{folder.name}.yaml").read_text())
    return float(content["llh"]["training"])


def read_hybrid(folder: Path, settings: Settings) -> Fit:
    """The likelihood of the training data of a model with one network in it.

    Its parameters are those of the table, then all weights.
    """
    content = yaml.safe_load((folder / f"train_{folder.name}.yaml").read_text())
    extension = content["extensions"]["sciml"]
    ((net, entry),) = extension["neural_nets"].items()
    network = read_network(folder / entry["location"])
    weights = read_weights(folder / extension["array_files"][0], net)
    model = read_model(folder / content["model_files"]["model"]["location"])
    table = _read(folder, content["parameter_files"])
    table = table[~table["parameterId"].str.startswith(net)]
    scalars = list(table["parameterId"])
    nominal = np.array(table["nominalValue"], float)
    flat, unravel = ravel_pytree(weights)

    names = tuple(model.constants)
    states, constants = [symbol(s) for s in model.states], [symbol(s) for s in names]
    slopes = to_function(model.slopes, TIME, states, constants)
    initial = to_function(model.initial, constants)
    inputs, targets = _hybridization(
        _read(folder, extension["hybridization_files"]), net
    )
    network_inputs = to_function(inputs, TIME, states, constants)
    outputs_at = np.array([names.index(t) for t in targets])
    scalars_at = np.array([names.index(s) for s in scalars], int)
    times, observables = _measured(folder, content)
    readers = [reader(o, states, constants) for o in observables]
    values = jnp.array(list(model.constants.values()))

    def field(t: Array, y: Array, args: tuple[Array, Weights]) -> Array:
        constants, weights = args
        outputs = network(weights, network_inputs(t, y, constants))
        return slopes(t, y, constants.at[outputs_at].set(outputs))

    def outputs(x: Vector) -> Outputs:
        constants = values.at[scalars_at].set(x[: len(scalars)])
        args = constants, unravel(x[len(scalars) :])
        ys, successful = settings.states(field, initial(constants), args, times)
        # One condition: `(1, times, states)`.
        found = [read(constants, times, ys[None], constants[None]) for read in readers]
        mean, log_sigma = jnp.concatenate(found, axis=-1)
        return Outputs(*(jnp.where(successful, z, jnp.nan) for z in (mean, log_sigma)))

    unbounded = np.full(len(flat), np.inf)
    return Fit(
        folder.name,
        (*scalars, *(f"{net}[{i}]" for i in range(len(flat)))),
        np.concatenate([nominal, flat]),
        np.concatenate([np.array(table["lowerBound"], float), -unbounded]),
        np.concatenate([np.array(table["upperBound"], float), unbounded]),
        outputs,
        *gathered([(o.values, o.transformation) for o in observables]),
    )


def _read(folder: Path, names: Sequence[str]) -> Table:
    return pd.read_csv(folder / names[0], sep="\t")


def _hybridization(table: Table, net: str) -> tuple[list[Any], list[str]]:
    """The expressions of the inputs, and the names of what the outputs set, in order.

    The table names them `net_input1` and so on, `net_output1` and so on.
    """
    rows = dict(zip(table["targetId"], table["targetValue"], strict=True))
    inputs = {k: v for k, v in rows.items() if k.startswith(f"{net}_input")}
    outputs = {v: k for k, v in rows.items() if v.startswith(f"{net}_output")}

    def number(name: str) -> int:
        return int(name.split("put")[-1])

    expressions = [parse(inputs[k]) for k in sorted(inputs, key=number)]
    return expressions, [outputs[k] for k in sorted(outputs, key=number)]


def _measured(
    folder: Path, content: Mapping[str, Any]
) -> tuple[Array, list[Observable]]:
    """The times of all measurements, and the observables."""
    table = _read(folder, content["observable_files"])
    measurements = _read(folder, content["measurement_files"])
    times = np.unique(measurements["time"])
    observables = []
    for _, row in table.iterrows():
        of_row = measurements[measurements["observableId"] == row["observableId"]]
        count = len(of_row)
        observables.append(
            Observable(
                parse(row["observableFormula"]),
                parse(row["noiseFormula"]),
                (),
                "lin",
                np.zeros(count, int),
                np.searchsorted(times, of_row["time"]),
                np.zeros((count, 0), int),
                of_row["measurement"].to_numpy(float),
            )
        )
    return jnp.asarray(times), observables
