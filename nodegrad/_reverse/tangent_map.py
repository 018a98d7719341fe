"""The derivative of a recorded solve, as one linear JAX primitive.

The primitive maps tangents of the inputs of a solve (`Inputs`) to tangents of its
outputs (`Outputs`). Its rules:

- evaluation makes the accepted steps again and pushes the tangents forward
  (`pushforward.py`); it reads no stored state;
- transposition is the reverse sweep (`gradient.py`);
- batching adds a `Level` to the parameters of the primitive (see `batch.py`). So
  `jax.grad` of a mean over `jax.vmap` of a solve sums the cotangents of shared
  parameters inside the sweep, and many tangents of one solve make its steps only once;
- forward mode differentiates the code of the evaluation. The result, and the result of
  the sweep, cannot be transposed: reverse over reverse mode raises an error.

The operands are a flat list of arrays. First come the `own` arrays, which belong to one
solve; then the `shared` arrays, which solves may have in common; then one tangent for
each perturbed array, in the same order. With levels, an array has one leading axis for
each level that it is batched over, outermost first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._internal.batch import Axes, Batch, in_front
from .._internal.compat import (
    ad,
    batching,
    mlir,
    nondifferentiable_backward,
    Primitive,
    ShapedArray,
)
from .._internal.devices import check_no_collective_over, without_collectives
from .._trajectory.recording import Inputs, moving_times, Outputs, Plan, Recording
from .._trajectory.trajectory import Trajectory
from .gradient import pull_back
from .pushforward import push_forward


_REVERSE_AGAIN = (
    "A derivative of a solve with an adjoint of nodegrad cannot be differentiated by "
    "reverse mode again (`jax.grad(jax.grad(f))`, `jax.jacrev(jax.jacfwd(f))`). For "
    "second derivatives take forward mode over reverse mode: "
    "`jax.jvp(jax.grad(f), (x,), (v,))`, `jax.jacfwd(jax.grad(f))` or "
    "`jax.hessian(f)`; or forward mode twice."
)


# The fields of `Inputs` of one solve, and those that solves may share.
_OWN = "y", "replay_state"
_SHARED = tuple(name for name in Inputs.__dataclass_fields__ if name not in _OWN)


class Level(NamedTuple):
    """One `vmap` around the primitive.

    - `size`: the number of elements that it maps over.
    - `solves`: whether it maps over solves. Then all `own` operands have an axis for
      it. Otherwise it maps over tangents of one solve.
    - `shared`, `tangents`: for each of these operands, whether it has an axis for it.
    """

    size: int
    solves: bool
    shared: tuple[bool, ...]
    tangents: tuple[bool, ...]


@dataclass(frozen=True, eq=False)
class _Static:
    """The static parameters of the primitive.

    - `own`, `shared`: the tree structures of the two kinds of operands.
    - `perturbed`: for every array of `Inputs`, whether it has a tangent.
    - `tangent_owner`: for every tangent, the position of its array among the shared
      operands, or `None` if its array is an `own` operand.
    - `struct`: shapes and dtypes of the results, for one solve.
    """

    plan: Plan
    own: Any
    shared: Any
    perturbed: Inputs
    tangent_owner: tuple[int | None, ...]
    struct: Outputs

    @property
    def num_own(self) -> int:
        return self.own.num_leaves

    @property
    def num_primals(self) -> int:
        return self.own.num_leaves + self.shared.num_leaves

    def inputs(self, operands: Sequence[Any]) -> tuple[Inputs, Trajectory]:
        """Returns the inputs and the trajectory, from the operands (or their axes)."""
        first, trajectory = jax.tree.unflatten(self.own, operands[: self.num_own])
        shared = jax.tree.unflatten(
            self.shared, operands[self.num_own : self.num_primals]
        )
        fields = dict(zip((*_OWN, *_SHARED), (*first, *shared), strict=True))
        return Inputs(**fields), trajectory

    def tangents(self, leaves: list[Any]) -> Inputs:
        """Returns the tangents as `Inputs`, with `None` where there is no tangent."""
        structure = jax.tree.structure(eqx.filter(self.perturbed, self.perturbed))
        return jax.tree.unflatten(structure, leaves)


def _split(inputs: Inputs) -> tuple[tuple, tuple]:
    """Splits the fields into those of one solve and those that solves may share."""
    own = tuple(getattr(inputs, name) for name in _OWN)
    return own, tuple(getattr(inputs, name) for name in _SHARED)


def tangent_map(
    plan: Plan,
    inputs: Inputs,
    trajectory: Trajectory,
    tangents: Inputs,
    struct: Outputs,
) -> Outputs:
    """Maps the tangents of the inputs of a solve to those of its outputs, linearly.

    `tangents` has `None` for inputs without a tangent, and the result for outputs whose
    tangent is known to be zero. `struct` has the shapes and dtypes of the outputs.
    """
    first, shared = _split(inputs)
    own_leaves, own = jax.tree.flatten((first, trajectory))
    shared_leaves, shared_structure = jax.tree.flatten(shared)
    perturbed = jax.tree.map(lambda _, t: t is not None, inputs, tangents)
    if not moving_times(perturbed):
        # Times that do not move have no tangents. Explicit zeros would make JAX
        # differentiate with respect to time, which Brownian motions do not allow.
        struct = replace(struct, ends=None, starts=None)
    _, shared_perturbed = _split(perturbed)
    owners = [i for i, p in enumerate(jax.tree.leaves(shared_perturbed)) if p]
    leaves = jax.tree.leaves(tangents)
    if not leaves:
        return jax.tree.map(lambda _: None, struct)
    # The tangents of `own` operands come first, as the operands themselves do.
    num_own = len(leaves) - len(owners)
    static = _Static(
        plan=plan,
        own=own,
        shared=shared_structure,
        perturbed=perturbed,
        tangent_owner=(*[None] * num_own, *owners),
        struct=struct,
    )
    operands = own_leaves + shared_leaves + leaves
    out = tangent_map_p.bind(*operands, static=static, levels=())
    return jax.tree.unflatten(jax.tree.structure(struct), out)


def _evaluate(
    *operands: Array, static: _Static, levels: tuple[Level, ...]
) -> list[Array]:
    """The rule for evaluation: pushes forward. The results are leaves of `Outputs`."""

    def one(*operands):
        operands = list(map(jnp.asarray, operands))
        inputs, trajectory = static.inputs(operands)
        tangents = static.tangents(operands[static.num_primals :])
        out = push_forward(static.plan, inputs, trajectory, tangents, static.struct)
        return jax.tree.leaves(out)

    # The innermost level is mapped first, and gets the last of the leading axes.
    for level in reversed(levels):
        axes = (level.solves,) * static.num_own + level.shared + level.tangents
        # The size is explicit for levels that no operand has an axis for.
        one = jax.vmap(
            one, in_axes=tuple(0 if a else None for a in axes), axis_size=level.size
        )
    return one(*operands)


def _transpose(
    cts: Sequence[Any], *operands: Any, static: _Static, levels: tuple[Level, ...]
) -> list[Array | None]:
    """The rule for transposition: pulls cotangents of the results back to the tangents.

    JAX passes `ad.Zero` for cotangents that are zero, and undefined primals for the
    tangents to transpose with respect to; hence `Any`.
    """
    is_linear = [ad.is_undefined_primal(t) for t in operands[static.num_primals :]]
    none = [None] * static.num_primals
    known = [type(ct) is not ad.Zero for ct in cts]
    if not any(known):
        return [*none, *(None for _ in is_linear)]
    # Literals of a traced function may be Python numbers.
    primals = [jnp.asarray(x) for x in operands[: static.num_primals]]
    # One sweep goes over all solves of a batch together (`Batch`). Levels that map over
    # tangents of one solve become `vmap`s of this sweep, so their axes come first.
    solves = [i for i, level in enumerate(levels) if level.solves]
    others = [i for i, level in enumerate(levels) if not level.solves]
    order = [*others, *solves]
    # Every cotangent has an axis for every level, in the order of the levels.
    reorder = lambda ct: jnp.moveaxis(ct, order, range(len(levels)))
    cts = [reorder(ct) for ct, k in zip(cts, known, strict=True) if k]

    def sweep(*cts: Array) -> list[Array | None]:
        # Put `None` back where a cotangent is known to be zero.
        padded = iter(cts)
        leaves = [next(padded) if k else None for k in known]
        ct = jax.tree.unflatten(jax.tree.structure(static.struct), leaves)
        solve_levels = [levels[i] for i in solves]
        return _sweep(static, solve_levels, primals, is_linear, ct)

    for i in reversed(others):
        sweep = jax.vmap(sweep, axis_size=levels[i].size)
    out = []
    for position, ct in enumerate(without_collectives(sweep)(*cts)):
        if ct is not None:
            flags = [level.tangents[position] for level in levels]
            # A tangent without an axis for a level was used by all of its elements:
            # its cotangent is the sum over them.
            away = tuple(j for j, i in enumerate(others) if not flags[i])
            ct = jnp.sum(ct, axis=away)
            # Bring the remaining axes back from `order` into the order of the levels.
            has = [i for i in order if flags[i]]
            ct = jnp.moveaxis(ct, range(len(has)), [sorted(has).index(i) for i in has])
            ct = nondifferentiable_backward(ct, msg=_REVERSE_AGAIN)
        out.append(ct)
    return [*none, *out]


def _sweep(
    static: _Static,
    levels: list[Level],
    primals: list[Array],
    is_linear: list[bool],
    ct: Outputs,
) -> list[Array | None]:
    """Returns the cotangents of the tangents, by one sweep over a batch of solves.

    `levels` are those that map over solves; the cotangents `ct` of the outputs have all
    of their axes. Those of the tangents have the axes of the tangents, and are `None`
    where not `is_linear`.
    """
    batch = Batch(tuple(level.size for level in levels))
    tangent_axes = [
        Axes(tuple(level.tangents[i] for level in levels))
        for i in range(len(static.tangent_owner))
    ]
    # A shared array may have a separate tangent for every solve. It then has a separate
    # cotangent for every solve as well, so the array itself needs the axis.
    axes = [
        Axes(tuple(level.shared[i] for level in levels))
        for i in range(static.shared.num_leaves)
    ]
    old_axes = list(axes)
    for owner, new in zip(static.tangent_owner, tangent_axes, strict=True):
        if owner is not None:
            pairs = zip(axes[owner].batched, new.batched, strict=True)
            axes[owner] = Axes(tuple(a or b for a, b in pairs))
    # Solves that took no step: their cotangents are zero, but the sweep still evaluates
    # pullbacks for them. With inputs of another solve these have no NaNs.
    own = primals[: static.num_own]
    _, trajectory = jax.tree.unflatten(static.own, own)
    invalid = trajectory.num_steps == 0
    shared = [
        batch.fill_shared_from_valid(invalid, batch.expand(x, old, new), new)
        for x, old, new in zip(primals[static.num_own :], old_axes, axes, strict=True)
    ]
    inputs, trajectory = static.inputs([*own, *shared])
    # The same structures, with `Axes` and with flags in place of the arrays.
    all_axes, _ = static.inputs([batch.all_axes] * static.num_own + axes)
    wanted = iter(is_linear)
    wrt = jax.tree.map(lambda p: p and next(wanted), static.perturbed)
    recording = Recording(static.plan, inputs, trajectory, batch, all_axes, wrt)
    cts = pull_back(recording, ct)
    # A cotangent has the axes of its array. Sum over those that its tangent lacks.
    used_axes = jax.tree.leaves(eqx.filter(all_axes, static.perturbed))
    out = _perturbed_leaves(static.perturbed, wrt, cts)
    return [
        None if ct is None else batch.total(ct, used, to)
        for ct, used, to in zip(out, used_axes, tangent_axes, strict=True)
    ]


def _perturbed_leaves(
    perturbed: Inputs, wrt: Inputs, cts: Inputs
) -> list[Array | None]:
    """Returns the cotangents of the perturbed arrays, with `None` where not wanted."""
    out = []

    def visit(is_perturbed: bool, is_wanted: bool, ct: Array | None) -> None:
        if is_perturbed:
            out.append(ct if is_wanted else None)

    jax.tree.map(visit, perturbed, wrt, cts)
    return out


def _jvp(
    primals: Sequence[Any],
    tangents: Sequence[Any],
    *,
    static: _Static,
    levels: tuple[Level, ...],
) -> tuple[list[Array], list[Any]]:
    """The rule for forward mode. `tangents` are those of the operands, or `ad.Zero`.

    The result is a sum of two parts. The primitive is linear in its tangent operands,
    so the first part is the primitive again. The second one is the derivative of the
    evaluation with respect to the other operands.
    """
    bind = lambda *args: tangent_map_p.bind(*args, static=static, levels=levels)
    n = static.num_primals
    out, parts = bind(*primals), []
    of_tangents = tangents[n:]
    if any(type(t) is not ad.Zero for t in of_tangents):
        parts.append(bind(*primals[:n], *map(ad.instantiate_zeros, of_tangents)))
    # This part is second order. It can be pushed forward, but not transposed.
    moving = [i for i in range(n) if type(tangents[i]) is not ad.Zero]
    if moving:

        def evaluate(*moved: Array) -> list[Array]:
            operands = list(primals)
            for i, x in zip(moving, moved, strict=True):
                operands[i] = x
            return _evaluate(*operands, static=static, levels=levels)

        at, by = [primals[i] for i in moving], [tangents[i] for i in moving]
        _, second = jax.jvp(evaluate, at, by)
        parts.append(nondifferentiable_backward(second, msg=_REVERSE_AGAIN))
    if not parts:
        return out, [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in out]
    return out, [sum(xs[1:], xs[0]) for xs in zip(*parts, strict=True)]


def _batch(
    axis: Any,
    operands: Sequence[Any],
    dims: Sequence[int | None],
    *,
    static: _Static,
    levels: tuple[Level, ...],
) -> tuple[list[Array], list[int | None]]:
    """The rule for `vmap`: the same primitive, with a new outermost level.

    `axis` is JAX's description of that `vmap`. `dims` are the positions of the batch
    axis in the operands; `None` for no axis.
    """
    check_no_collective_over(axis.name, static.plan.jaxprs)
    is_batched = [d is not None for d in dims]
    if not any(is_batched):
        out = tangent_map_p.bind(*operands, static=static, levels=levels)
        return out, [None for _ in out]
    num_own, num_primals = static.num_own, static.num_primals
    # If only tangents are batched, one solve has many tangents, e.g. in `jax.jacfwd`.
    solves = any(is_batched[:num_primals])
    level = Level(
        size=axis.size,
        solves=solves,
        shared=tuple(is_batched[num_own:num_primals]),
        tangents=tuple(is_batched[num_primals:]),
    )

    # All `own` operands have the axis; `shared` ones and tangents need no copies.
    operands = [
        x if d is None and not (solves and i < num_own) else in_front(x, d, axis.size)
        for i, (x, d) in enumerate(zip(operands, dims, strict=True))
    ]
    out = tangent_map_p.bind(*operands, static=static, levels=(level, *levels))
    return out, [0] * len(out)


def _abstract(
    *operands: Any, static: _Static, levels: tuple[Level, ...]
) -> list[ShapedArray]:
    """Returns the shapes and dtypes of the results: an axis for every level."""
    del operands
    sizes = tuple(level.size for level in levels)
    return [
        ShapedArray((*sizes, *x.shape), x.dtype) for x in jax.tree.leaves(static.struct)
    ]


def _evaluate_compiled(*operands: Array, **params: Any) -> list[Array]:
    """Evaluates outside of `jax.jit`, compiled all the same: the steps are a loop."""
    evaluate: Callable = lambda *operands: _evaluate(*operands, **params)
    return jax.jit(evaluate)(*operands)


tangent_map_p = Primitive("nodegrad_tangent_map")
tangent_map_p.multiple_results = True
tangent_map_p.def_impl(_evaluate_compiled)
tangent_map_p.def_abstract_eval(_abstract)
mlir.register_lowering(tangent_map_p, mlir.lower_fun(_evaluate, multiple_results=True))
ad.primitive_jvps[tangent_map_p] = _jvp
ad.primitive_transposes[tangent_map_p] = _transpose
batching.fancy_primitive_batchers[tangent_map_p] = _batch
