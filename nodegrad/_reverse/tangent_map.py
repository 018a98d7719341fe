"""The derivative of a recorded solve as one linear primitive.

The primitive maps tangents of what a solve depends on (`Inputs`) to tangents of what it
returned (`Outputs`):

- evaluated, it makes the accepted steps again and pushes the tangents forward
  (`pushforward.py`); no stored state is needed;
- transposed, it is the reverse sweep (`gradient.py`);
- batched, it keeps a stack of levels (`batch.py`). So `jax.grad` of a mean over
  `jax.vmap` of a solve sums the cotangents of shared parameters inside the sweep, and
  many tangents of one solve make its steps again once;
- differentiated by forward mode, it is ordinary code. What that gives, and the sweep,
  cannot be transposed again: reverse over reverse mode is refused by name.

The operands are arrays: first those that belong to one solve (`_Own`), then those that
solves may share, then the tangents of the perturbed ones among both.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._internal.batch import Axes, Batch
from .._internal.compat import (
    ad,
    batching,
    mlir,
    nondifferentiable_backward,
    Primitive,
    ShapedArray,
)
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


class Level(NamedTuple):
    """One `vmap` around the primitive.

    - `solves`: whether it maps over solves, and not over tangents of one solve alone.
    - `shared`, `tangents`: which of these operands have an axis for it.
    """

    size: int
    solves: bool
    shared: tuple[bool, ...]
    tangents: tuple[bool, ...]


@dataclass(frozen=True, eq=False)
class _Static:
    """What is static about a recorded solve and its tangents.

    - `own`, `shared`: structures of the two kinds of operands.
    - `perturbed`: for every array of `Inputs`, whether it has a tangent.
    - `tangent_owner`: for every tangent, the position of its array among the shared
      operands, or `None` if it belongs to one solve.
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
        """The inputs and the trajectory, from the operands without tangents."""
        first, trajectory = jax.tree.unflatten(self.own, operands[: self.num_own])
        shared = jax.tree.unflatten(
            self.shared, operands[self.num_own : self.num_primals]
        )
        return Inputs(*first, *shared), trajectory

    def tangents(self, leaves: list[Any]) -> Inputs:
        """Tangents (or their axes), with `None` where there is none."""
        structure = jax.tree.structure(eqx.filter(self.perturbed, self.perturbed))
        return jax.tree.unflatten(structure, leaves)


def _split(inputs: Inputs) -> tuple[tuple, tuple]:
    """The fields that belong to one solve, and those that solves may share."""
    fields = [getattr(inputs, name) for name in inputs.__dataclass_fields__]
    return tuple(fields[:4]), tuple(fields[4:])


def tangent_map(
    plan: Plan,
    inputs: Inputs,
    trajectory: Trajectory,
    tangents: Inputs,
    struct: Outputs,
) -> Outputs:
    """The tangents of what a solve returned, from those of what it depends on.

    `tangents` has `None` for what is not perturbed. The result is linear in it.
    """
    first, shared = _split(inputs)
    own_leaves, own = jax.tree.flatten((first, trajectory))
    shared_leaves, shared_structure = jax.tree.flatten(shared)
    perturbed = jax.tree.map(lambda _, t: t is not None, inputs, tangents)
    if not moving_times(perturbed):
        # A zero for a tangent would be differentiated by all that depends on times,
        # and noise refuses that.
        struct = replace(struct, ends=None, starts=None)
    _, shared_perturbed = _split(perturbed)
    owners = [i for i, p in enumerate(jax.tree.leaves(shared_perturbed)) if p]
    leaves = jax.tree.leaves(tangents)
    if not leaves:
        return jax.tree.map(lambda _: None, struct)
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


def _evaluate(*operands: Array, static: _Static, levels: tuple[Level, ...]):
    """Pushes the tangents forward."""

    def one(*operands):
        operands = list(map(jnp.asarray, operands))
        inputs, trajectory = static.inputs(operands)
        tangents = static.tangents(operands[static.num_primals :])
        out = push_forward(static.plan, inputs, trajectory, tangents, static.struct)
        return jax.tree.leaves(out)

    for level in reversed(levels):
        axes = (level.solves,) * static.num_own + level.shared + level.tangents
        # An axis that no operand has belongs to tangents that are zero.
        one = jax.vmap(
            one, in_axes=tuple(0 if a else None for a in axes), axis_size=level.size
        )
    return one(*operands)


def _transpose(cts, *operands: Any, static: _Static, levels: tuple[Level, ...]):
    """Pulls cotangents of the results back to the tangents."""
    is_linear = [ad.is_undefined_primal(t) for t in operands[static.num_primals :]]
    none = [None] * static.num_primals
    known = [type(ct) is not ad.Zero for ct in cts]
    if not any(known):
        return [*none, *(None for _ in is_linear)]
    # Literals of a traced function are no arrays.
    primals = [jnp.asarray(x) for x in operands[: static.num_primals]]
    # Solves are swept back over together. Of tangents of one solve every one has its
    # own sweep, which `vmap` makes of the code for one: these axes come first.
    solves = [i for i, level in enumerate(levels) if level.solves]
    others = [i for i, level in enumerate(levels) if not level.solves]
    order = [*others, *solves]
    in_front = lambda ct: jnp.moveaxis(ct, order, range(len(levels)))
    cts = [in_front(ct) for ct, k in zip(cts, known, strict=True) if k]

    def sweep(*cts):
        padded = iter(cts)
        leaves = [next(padded) if k else None for k in known]
        ct = jax.tree.unflatten(jax.tree.structure(static.struct), leaves)
        solve_levels = [levels[i] for i in solves]
        return _sweep(static, solve_levels, primals, is_linear, ct)

    for i in reversed(others):
        sweep = jax.vmap(sweep, axis_size=levels[i].size)
    out = []
    for position, ct in enumerate(sweep(*cts)):
        if ct is not None:
            flags = [level.tangents[position] for level in levels]
            # Sum over tangents that this one was shared by.
            away = tuple(j for j, i in enumerate(others) if not flags[i])
            ct = jnp.sum(ct, axis=away)
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
    """The cotangents of the tangents of a batch of solves.

    Each has axes for the levels in which its tangent has one.
    """
    batch = Batch(tuple(level.size for level in levels))
    tangent_axes = [
        Axes(tuple(level.tangents[i] for level in levels))
        for i in range(len(static.tangent_owner))
    ]
    # A shared array with a tangent for every solve has a cotangent for every solve, so
    # it needs the axis as well.
    axes = [
        Axes(tuple(level.shared[i] for level in levels))
        for i in range(static.shared.num_leaves)
    ]
    old_axes = list(axes)
    for owner, new in zip(static.tangent_owner, tangent_axes, strict=True):
        if owner is not None:
            pairs = zip(axes[owner].batched, new.batched, strict=True)
            axes[owner] = Axes(tuple(a or b for a, b in pairs))
    own = primals[: static.num_own]
    _, trajectory = jax.tree.unflatten(static.own, own)
    invalid = trajectory.num_steps == 0
    shared = [
        batch.fill_shared_from_valid(invalid, batch.expand(x, old, new), new)
        for x, old, new in zip(primals[static.num_own :], old_axes, axes, strict=True)
    ]
    inputs, trajectory = static.inputs([*own, *shared])
    all_axes, _ = static.inputs([batch.all_axes] * static.num_own + axes)
    wanted = iter(is_linear)
    wrt = jax.tree.map(lambda p: p and next(wanted), static.perturbed)
    recording = Recording(static.plan, inputs, trajectory, batch, all_axes, wrt)
    cts = pull_back(recording, ct)
    used_axes = jax.tree.leaves(eqx.filter(all_axes, static.perturbed))
    out = _perturbed_leaves(static.perturbed, wrt, cts)
    return [
        None if ct is None else batch.total(ct, used, to)
        for ct, used, to in zip(out, used_axes, tangent_axes, strict=True)
    ]


def _perturbed_leaves(perturbed: Inputs, wrt: Inputs, cts: Inputs) -> list[Any]:
    """The cotangents of the perturbed arrays, in order, `None` where not wanted."""
    out = []

    def visit(is_perturbed, is_wanted, ct):
        if is_perturbed:
            out.append(ct if is_wanted else None)

    jax.tree.map(visit, perturbed, wrt, cts)
    return out


def _jvp(primals, tangents, *, static: _Static, levels: tuple[Level, ...]):
    bind = lambda *args: tangent_map_p.bind(*args, static=static, levels=levels)
    n = static.num_primals
    out, parts = bind(*primals), []
    of_tangents = tangents[n:]
    if any(type(t) is not ad.Zero for t in of_tangents):
        parts.append(bind(*primals[:n], *map(ad.instantiate_zeros, of_tangents)))
    moving = [i for i in range(n) if type(tangents[i]) is not ad.Zero]
    if moving:

        def evaluate(*moved):
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


def _batch(operands, dims, *, static: _Static, levels: tuple[Level, ...]):
    size = next(
        x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None
    )
    num_own, num_primals = static.num_own, static.num_primals
    is_batched = [d is not None for d in dims]
    solves = any(is_batched[:num_primals])
    level = Level(
        size=size,
        solves=solves,
        shared=tuple(is_batched[num_own:num_primals]),
        tangents=tuple(is_batched[num_primals:]),
    )

    def in_front(i, x, d):
        if d is not None:
            return jnp.moveaxis(x, d, 0)
        if solves and i < num_own:
            return jnp.broadcast_to(x, (size, *jnp.shape(x)))
        return x

    operands = [
        in_front(i, x, d) for i, (x, d) in enumerate(zip(operands, dims, strict=True))
    ]
    out = tangent_map_p.bind(*operands, static=static, levels=(level, *levels))
    return out, [0] * len(out)


def _abstract(*operands, static: _Static, levels: tuple[Level, ...]):
    del operands
    sizes = tuple(level.size for level in levels)
    return [
        ShapedArray((*sizes, *x.shape), x.dtype) for x in jax.tree.leaves(static.struct)
    ]


def _evaluate_compiled(*operands, **params):
    evaluate: Callable = lambda *operands: _evaluate(*operands, **params)
    return jax.jit(evaluate)(*operands)


tangent_map_p = Primitive("nodegrad_tangent_map")
tangent_map_p.multiple_results = True
tangent_map_p.def_impl(_evaluate_compiled)
tangent_map_p.def_abstract_eval(_abstract)
mlir.register_lowering(tangent_map_p, mlir.lower_fun(_evaluate, multiple_results=True))
ad.primitive_jvps[tangent_map_p] = _jvp
ad.primitive_transposes[tangent_map_p] = _transpose
batching.primitive_batchers[tangent_map_p] = _batch
