"""Second derivatives along a solve, against oracles that share no code with them.

`hessian_blocks`: plain automatic differentiation of a scan over the accepted grid.
`theorem1_blocks`: Diffrax's `DirectAdjoint`, forward sensitivities, and matrix
exponentials.
"""

import inspect
import re
import textwrap

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.scipy as jsp
import numpy as np
import optimistix as optx
import pytest
from jax.flatten_util import ravel_pytree

import nodegrad

from ..problems import accepted_grid, explicit_step, relative_error


PID = diffrax.PIDController(1e-4, 1e-5)
TIGHT = diffrax.PIDController(1e-11, 1e-11)
CONSTANT = diffrax.ConstantStepSize()
RK4 = nodegrad.RK4()
ACA, REVERSIBLE = nodegrad.ACAAdjoint(), nodegrad.ReversibleAdjoint()
Y0 = jnp.array([0.6, -0.4])
NETWORK = {
    "first": jr.normal(jr.PRNGKey(1), (3, 2)),
    "bias": jr.normal(jr.PRNGKey(2), (3,)),
    "second": jr.normal(jr.PRNGKey(3), (2, 3)),
}


def network(t, y, args):
    """A perceptron of 15 parameters."""
    del t
    return args["second"] @ jnp.tanh(args["first"] @ y + args["bias"])


def terminal_cost(y):
    return jnp.sum(y**4) + y[0] * y[1]


def running_cost(t, y, args):
    size = jnp.sum(args["bias"] ** 2)
    return jnp.cos(t) * jnp.sum(y**2) * (1 + 0.1 * size) + 0.05 * y[0] ** 2 * size


def with_cost(t, y__cost, args):
    """The same, as one vector field of three states."""
    y = y__cost[:2]
    cost = running_cost(t, y, args)
    return jnp.concatenate([network(t, y, args), cost[None]])


def _blocks(
    solver=None,
    t0=0.0,
    t1=1.0,
    dt0=None,
    y0=Y0,
    args=NETWORK,
    blocks_of=nodegrad.hessian_blocks,
    **kwargs,
):
    kwargs = dict(terminal_cost=terminal_cost, stepsize_controller=PID) | kwargs
    solver = diffrax.Tsit5() if solver is None else solver
    kwargs = dict(max_steps=128) | kwargs
    return blocks_of(network, solver, t0, t1, dt0, y0, args, **kwargs)


def _backsolve_blocks(*args, **kwargs):
    return nodegrad.theorem1_blocks(*args, backsolve=True, **kwargs)


BOTH = [nodegrad.theorem1_blocks, nodegrad.hessian_blocks]
BOTH_WITH_BACKSOLVE = [_backsolve_blocks, nodegrad.hessian_blocks]


def _derivatives(loss, y0=Y0, args=NETWORK):
    """`(value, gradient, Hessian)` of `loss(y0, args)`, the latter as plain arrays."""
    flat, unravel = ravel_pytree((y0, args))
    loss_of = lambda z: loss(*unravel(z))
    return jax.jit(
        lambda z: (loss_of(z), jax.grad(loss_of)(z), jax.hessian(loss_of)(z))
    )(flat)


def _assembled(blocks):
    """The same of blocks, with whatever axis they have in front."""
    if blocks.value.ndim:
        return jax.vmap(_assembled)(blocks)

    def matrix(tree, rows):
        leaves = jax.tree.leaves(tree)
        return jnp.concatenate([jnp.reshape(x, (rows, -1)) for x in leaves], axis=1)

    yu = matrix(blocks.hess_yargs, len(Y0))
    of_leaf = sorted(blocks.hess_argsargs.items())
    uu = jnp.concatenate([matrix(tree, NETWORK[name].size) for name, tree in of_leaf])
    gradient, _ = ravel_pytree((blocks.grad_y, blocks.grad_args))
    hessian = jnp.block([[blocks.hess_yy, yu], [yu.T, uu]])
    return blocks.value, gradient, hessian


# Oracles on a fixed grid.


def _scanned(step, grid, state):
    return jax.lax.scan(lambda s, ends: (step(*ends, s), None), state, grid)[0]


def _unrolled_loss(solver, grid, running):
    """The loss of an explicit Runge-Kutta method on `grid`, written down."""
    intervals = grid[:-1], grid[1:]

    def loss(y0, args):
        step = lambda t0, t1, y: explicit_step(
            solver.tableau, with_cost, t0, t1, y, args
        )
        y1 = _scanned(step, intervals, jnp.append(y0, 0.0))
        return terminal_cost(y1[:2]) + (y1[2] if running else 0.0)

    return loss


def _unrolled_coupled_loss(solver, grid):
    """The loss of the Y/Z coupling of a Runge-Kutta method, from its equations."""
    tableau, coupling = solver.solver.tableau, solver.coupling_parameter

    def loss(y0, args):
        increment = lambda t0, t1, y: (
            explicit_step(tableau, with_cost, t0, t1, y, args) - y
        )

        def step(t0, t1, y__z):
            y, z = y__z
            y = coupling * y + (1 - coupling) * z + increment(t0, t1, z)
            return y, z - increment(t1, t0, y)

        start = jnp.append(y0, 0.0)
        y1, _ = _scanned(step, (grid[:-1], grid[1:]), (start, start))
        return terminal_cost(y1[:2]) + y1[2]

    return loss


def _grid(field, solver, y0, controller, dt0=None):
    return accepted_grid(field, solver, 0.0, 1.0, y0, NETWORK, controller, dt0)


@pytest.mark.rows(test=0, ci=1)
@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("name", ["Tsit5", "RK4"])
def test_discrete_is_the_hessian_of_the_accepted_grid(name, running):
    solver, controller, dt0 = {
        "Tsit5": (diffrax.Tsit5(), PID, None),
        "RK4": (RK4, CONSTANT, 0.1),
    }[name]
    y0 = jnp.append(Y0, 0.0) if running else Y0
    field = with_cost if running else network
    grid = _grid(field, solver, y0, controller, dt0)
    expected = _derivatives(_unrolled_loss(solver, grid, running))
    blocks = _blocks(
        solver,
        dt0=dt0,
        stepsize_controller=controller,
        exact=True,
        running_cost=running_cost if running else None,
    )
    assert relative_error(_assembled(blocks), expected) < 1e-11


@pytest.mark.exhaustive
def test_discrete_is_exact_for_a_reversible_solver():
    # The recursion that is differentiated here has no resyncs.
    solver = nodegrad.Reversible(diffrax.Tsit5(), resync_every=None)
    grid = _grid(with_cost, solver, jnp.append(Y0, 0.0), PID)
    expected = _derivatives(_unrolled_coupled_loss(solver, grid))
    blocks = _blocks(solver, exact=True, running_cost=running_cost, adjoint=REVERSIBLE)
    assert relative_error(_assembled(blocks), expected) < 1e-11


def _gauss_newton(grid, tableau):
    """The Gauss-Newton matrix, with the stages for the outputs of a network."""
    flat, unravel = ravel_pytree((Y0, NETWORK))

    def outputs(z):
        y, args = unravel(z)
        stages = []
        for t0, t1 in zip(grid[:-1], grid[1:], strict=True):
            advance = lambda weights, y, ks, h: (
                y + h * jnp.tensordot(jnp.asarray(weights), jnp.stack(ks), 1)
            )
            ys, ks = [y], [network(t0, y, args)]
            for a, c in zip(tableau.a_lower, tableau.c, strict=True):
                ys.append(advance(a, y, ks, t1 - t0))
                ks.append(network(t0 + c.item() * (t1 - t0), ys[-1], args))
            y = advance(tableau.b_sol, y, ks, t1 - t0)
            stages.append(jnp.stack(ys))
        return jnp.stack(stages), y, z

    def loss(out):
        stages, y1, z = out
        _, args = unravel(z)
        nodes = [0.0, *tableau.c.tolist()]
        total = terminal_cost(y1)
        for ys, t0, t1 in zip(stages, grid[:-1], grid[1:], strict=True):
            for y, b, c in zip(ys, tableau.b_sol.tolist(), nodes, strict=True):
                h = t1 - t0
                total += b * h * running_cost(t0 + c * h, y, args)
        return total

    out, unravel_out = ravel_pytree(outputs(flat))
    jacobian = jax.jit(jax.jacfwd(lambda z: ravel_pytree(outputs(z))[0]))(flat)
    curvature = jax.jit(jax.hessian(lambda x: loss(unravel_out(x))))(out)
    return jacobian.T @ curvature @ jacobian


@pytest.mark.exhaustive
def test_discrete_gauss_newton_drops_the_curvature_of_the_field_alone():
    solver = RK4
    grid = jnp.linspace(0.0, 1.0, 6)
    expected = _gauss_newton(grid, solver.tableau)
    blocks = _blocks(
        solver, dt0=0.2, stepsize_controller=CONSTANT, running_cost=running_cost
    )
    _, gradient, hessian = _assembled(blocks)
    assert relative_error(hessian, expected) < 1e-12
    _, exact, curved = _derivatives(_unrolled_loss(solver, grid, True))
    assert relative_error(gradient, exact) < 1e-12
    assert relative_error(hessian, curved) > 1e-2
    # Without a running cost another code does it.
    zero = lambda t, y, args: 0.0 * y[0]
    kwargs = dict(dt0=0.2, stepsize_controller=CONSTANT)
    without, with_zero = (
        _blocks(solver, running_cost=c, **kwargs) for c in (None, zero)
    )
    assert relative_error(without, with_zero) < 1e-12


@pytest.mark.slow
def test_gauss_newton_of_implicit_steps_takes_their_own_pullbacks():
    # With more parameters than states. JAX cannot pull the iteration back.
    solver = diffrax.Kvaerno3(root_finder=optx.Newton(1e-10, 1e-10))
    flat, unravel = ravel_pytree((Y0, NETWORK))

    def final(z):
        y0, args = unravel(z)
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(network), solver, 0.0, 1.0, 0.2, y0, args,
            adjoint=diffrax.DirectAdjoint(), max_steps=5,
        )  # fmt: skip
        return sol.ys[0]

    jacobian = jax.jit(jax.jacfwd(final))(flat)
    expected = jacobian.T @ jax.hessian(terminal_cost)(final(flat)) @ jacobian
    blocks = _blocks(solver, dt0=0.2, stepsize_controller=CONSTANT)
    assert relative_error(_assembled(blocks)[2], expected) < 1e-13


# The backward differential equations.


@pytest.mark.rows(test=0, ci=1)
@pytest.mark.parametrize("backsolve", [False, True])
def test_theorem1_is_the_hessian_of_direct_adjoint(backsolve):
    def loss(y0, args):
        y1 = diffrax.diffeqsolve(
            diffrax.ODETerm(with_cost),
            diffrax.Dopri8(),
            0.0,
            1.0,
            None,
            jnp.append(y0, 0.0),
            args,
            stepsize_controller=TIGHT,
            adjoint=diffrax.DirectAdjoint(),
            max_steps=32,
        ).ys[0]
        return terminal_cost(y1[:2]) + y1[2]

    blocks = _blocks(
        diffrax.Dopri8() if backsolve else diffrax.Tsit5(),
        stepsize_controller=TIGHT,
        running_cost=running_cost,
        exact=True,
        blocks_of=nodegrad.theorem1_blocks,
        backsolve=backsolve,
        max_steps=512,
    )
    assert relative_error(_assembled(blocks), _derivatives(loss)) < 1e-8


def _by_forward_sensitivities(t0=0.0):
    r"""$S^\top \Phi_{yy} S + \int (S, 1)^\top \ell_{zz} (S, 1) dt$, with $S' = F_z$."""
    u, unravel = ravel_pytree(NETWORK)
    n = 2 + len(u)

    def field(t, state, _):
        y, sensitivity, _ = state
        flat_field = lambda y, u: network(t, y, unravel(u))
        flat_cost = lambda z: running_cost(t, z[:2], unravel(z[2:]))
        by_y, by_u = jax.jacfwd(flat_field, (0, 1))(y, u)
        full = jnp.concatenate([sensitivity, jnp.eye(n)[2:]])
        curvature = jax.hessian(flat_cost)(jnp.concatenate([y, u]))
        direct = jnp.concatenate([jnp.zeros((2, 2)), by_u], 1)
        return flat_field(y, u), by_y @ sensitivity + direct, full.T @ curvature @ full

    y1, sensitivity, integral = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        diffrax.Dopri8(),
        t0,
        1.0,
        None,
        (Y0, jnp.eye(2, n), jnp.zeros((n, n))),
        stepsize_controller=TIGHT,
    ).ys
    curvature = jax.hessian(terminal_cost)(y1[0])
    return sensitivity[0].T @ curvature @ sensitivity[0] + integral[0]


@pytest.mark.slow
@pytest.mark.parametrize("blocks_of", BOTH)
def test_gauss_newton_is_what_forward_sensitivities_say(blocks_of):
    blocks = _blocks(
        stepsize_controller=TIGHT,
        running_cost=running_cost,
        blocks_of=blocks_of,
        max_steps=512,
    )
    _, _, hessian = _assembled(blocks)
    assert relative_error(hessian, _by_forward_sensitivities()) < 1e-8


@pytest.mark.rows(test=1, ci=3)
@pytest.mark.parametrize("blocks_of", BOTH_WITH_BACKSOLVE)
def test_affine_fields_have_the_closed_form_whether_exact_or_not(blocks_of):
    """`y' = M y + N u + c`, by the exponential of a block matrix."""
    m, n, c = jr.normal(jr.PRNGKey(4), (2, 2)), jr.normal(jr.PRNGKey(5), (2, 3)), 0.3
    weight = jnp.array([[2.0, 0.5], [0.5, 1.0]])
    cost = lambda y: 0.5 * y @ weight @ y
    u = jnp.array([0.2, -0.5, 1.0])

    generator = jnp.zeros((6, 6)).at[:2, :2].set(m).at[:2, 2:5].set(n)
    flow = jsp.linalg.expm(generator.at[:2, 5].set(c))
    sensitivity = flow[:2, :5]
    y1 = sensitivity @ jnp.concatenate([Y0, u]) + flow[:2, 5]
    expected = (
        cost(y1),
        sensitivity.T @ weight @ y1,
        sensitivity.T @ weight @ sensitivity,
    )
    for exact in (True, False):
        blocks = blocks_of(
            lambda t, y, u: m @ y + n @ u + c,
            diffrax.Dopri8(),
            0.0,
            1.0,
            None,
            Y0,
            u,
            terminal_cost=cost,
            exact=exact,
            stepsize_controller=diffrax.PIDController(1e-12, 1e-12),
            max_steps=256,
        )
        found = (
            blocks.value,
            jnp.concatenate([blocks.grad_y, blocks.grad_args]),
            jnp.block(
                [
                    [blocks.hess_yy, blocks.hess_yargs],
                    [blocks.hess_yargs.T, blocks.hess_argsargs],
                ]
            ),
        )
        assert relative_error(found, expected) < 1e-10


@pytest.mark.slow
@pytest.mark.rows(test=1, ci=2)
@pytest.mark.parametrize("blocks_of", BOTH)
def test_a_bilinear_field_is_not_affine(blocks_of):
    """`y' = W y` with `W` for a parameter: Gauss-Newton is not the Hessian."""
    w = jr.normal(jr.PRNGKey(6), (2, 2))
    exact, flat = (
        blocks_of(
            lambda t, y, w: w @ y,
            RK4,
            0.0,
            1.0,
            0.1,
            Y0,
            w,
            terminal_cost=lambda y: jnp.sum(y**2),
            exact=exact,
        )
        for exact in (True, False)
    )
    assert relative_error(flat.grad_args, exact.grad_args) < 1e-12
    assert relative_error(flat.hess_yy, exact.hess_yy) < 1e-12
    difference = jnp.abs(flat.hess_argsargs - exact.hess_argsargs)
    assert jnp.max(difference) > 1e-2
    assert jnp.max(jnp.abs(flat.hess_yargs - exact.hess_yargs)) > 1e-2


@pytest.mark.slow
def test_hessian_blocks_converge_to_theorem1_at_the_order_of_the_solver():
    kwargs = dict(running_cost=running_cost, exact=True)
    limit = _blocks(
        diffrax.Dopri8(),
        blocks_of=_backsolve_blocks,
        stepsize_controller=diffrax.PIDController(1e-12, 1e-12),
        max_steps=512,
        **kwargs,
    )
    errors = [
        relative_error(
            _blocks(RK4, dt0=dt, stepsize_controller=CONSTANT, **kwargs),
            limit,
        )
        for dt in (0.1, 0.05, 0.025)
    ]
    orders = -np.diff(np.log2(errors))
    assert np.all(abs(orders - 4) < 0.3)


# Properties.


@pytest.mark.rows(test=0, ci=2)
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("blocks_of", BOTH_WITH_BACKSOLVE)
def test_blocks_are_symmetric_and_gauss_newton_is_semidefinite(exact, blocks_of):
    convex = lambda t, y, args: jnp.sum(y**2) + 1e-3 * jnp.sum(args["bias"] ** 2)
    # Not Tsit5 for the running cost: some of its weights are negative.
    for cost, solver in [(None, diffrax.Tsit5()), (convex, RK4)]:
        blocks = _blocks(
            solver,
            dt0=0.1 if blocks_of is nodegrad.hessian_blocks else 0.01,
            terminal_cost=lambda y: jnp.sum(y**4),
            running_cost=cost,
            exact=exact,
            blocks_of=blocks_of,
            stepsize_controller=CONSTANT,
        )
        _, _, hessian = _assembled(blocks)
        assert relative_error(hessian, hessian.T) < 1e-12
        if not exact:
            assert jnp.linalg.eigvalsh(hessian)[0] > -1e-10


@pytest.mark.rows(test=0, ci=2)
@pytest.mark.parametrize(
    "exact, blocks_of",
    [(True, nodegrad.hessian_blocks), (False, nodegrad.theorem1_blocks)],
)
def test_weight_decay_adds_its_multiple_of_the_identity(exact, blocks_of):
    gamma = 0.7
    decay = lambda t, y, args: 0.5 * gamma / 2.0 * jnp.sum(ravel_pytree(args)[0] ** 2)
    ts = jnp.array([0.0, 0.5, 2.0])
    plain, decayed = (
        _blocks(
            RK4,
            t1=2.0,
            dt0=0.25,
            running_cost=cost,
            exact=exact,
            blocks_of=blocks_of,
            stepsize_controller=CONSTANT,
            ts=ts,
        )
        for cost in (None, decay)
    )
    (_, _, plain), (_, _, decayed) = _assembled(plain), _assembled(decayed)
    identity = jnp.diag(jnp.append(jnp.zeros(2), jnp.ones(15)))
    for i, left in enumerate([1.0, 0.75, 0.0]):
        difference = decayed[i] - plain[i] - gamma * left * identity
        assert jnp.max(jnp.abs(difference)) < 1e-12


@pytest.mark.exhaustive
def test_blocks_along_the_solve_are_those_of_the_solves_from_there():
    """A solve from the state at a time `t`, over the same steps."""
    grid = jnp.linspace(0.0, 1.0, 9)
    controller = diffrax.StepTo(grid)
    kwargs = dict(exact=True, running_cost=running_cost)
    ts = grid[jnp.array([0, 3, 6])]
    along = _blocks(ts=ts, stepsize_controller=controller, **kwargs)
    states = nodegrad.odesolve(
        network,
        diffrax.Tsit5(),
        0.0,
        1.0,
        None,
        Y0,
        NETWORK,
        saveat=diffrax.SaveAt(ts=ts),
        stepsize_controller=controller,
    ).ys
    for i, start in enumerate([0, 3, 6]):
        rest = _blocks(
            t0=grid[start],
            y0=states[i],
            stepsize_controller=diffrax.StepTo(grid[start:]),
            **kwargs,
        )
        assert relative_error(jax.tree.map(lambda x, i=i: x[i], along), rest) < 1e-12


@pytest.mark.rows(test=0, ci=1)
@pytest.mark.parametrize("t0, t1", [(0.0, 1.0), (1.0, 0.0)])
def test_adaptive_steps_are_made_to_end_at_the_times_asked_for(t0, t1):
    ts = jnp.linspace(t0, t1, 4)
    kwargs = dict(t0=t0, t1=t1, ts=ts, stepsize_controller=TIGHT, max_steps=512)
    discrete, continuous = (
        _assembled(
            _blocks(
                exact=True, running_cost=running_cost, blocks_of=blocks_of, **kwargs
            )
        )
        for blocks_of in (nodegrad.hessian_blocks, nodegrad.theorem1_blocks)
    )
    assert relative_error(discrete, continuous) < 1e-7


@pytest.mark.exhaustive
def test_theorem1_goes_along_prescribed_steps():
    """The backward solve takes the times of `StepTo` in the reverse order."""
    kwargs = dict(exact=True, running_cost=running_cost)
    fine = diffrax.StepTo(jnp.linspace(0.0, 1.0, 65) ** 1.5)
    blocks = _blocks(
        RK4, stepsize_controller=fine, blocks_of=nodegrad.theorem1_blocks, **kwargs
    )
    expected = _blocks(RK4, stepsize_controller=fine, **kwargs)
    assert relative_error(_assembled(blocks), _assembled(expected)) < 1e-6


def test_times_may_be_close_together_and_the_same():
    # Closer than rounding of the last one, and one of them twice.
    ts = jnp.array([0, 1e-3, 1e-3, 1e-2, 0.1, 1, 10, 1000], jnp.float32)
    blocks = nodegrad.hessian_blocks(
        lambda t, y, rate: -rate * y,
        diffrax.Bosh3(),
        0.0,
        ts[-1],
        None,
        jnp.ones((), jnp.float32),
        jnp.float32(0.005),
        terminal_cost=lambda y: y,
        stepsize_controller=diffrax.PIDController(1e-5, 1e-7),
        ts=ts,
    )
    expected = jnp.exp(-0.005 * (1000 - ts))
    assert jnp.allclose(blocks.grad_y, expected, rtol=1e-3, atol=0)


@pytest.mark.exhaustive
def test_blocks_are_structured_like_those_of_jax():
    args = {"rate": jnp.array(0.4), "matrix": jnp.eye(2), "power": 2, "name": "cubic"}
    y0 = {"a": jnp.array([0.3, 0.1]), "b": jnp.array(0.5)}

    def field(t, y, args):
        assert args["name"] == "cubic"
        return {
            "a": args["matrix"] @ y["a"] ** args["power"] * y["b"],
            "b": -args["rate"] * y["b"] * y["a"][0],
        }

    cost = lambda y: jnp.sum(y["a"] ** 2) * y["b"]
    inexact, static = eqx.partition(args, eqx.is_inexact_array)

    def loss(y0, inexact):
        args = eqx.combine(inexact, static)
        sol = nodegrad.odesolve(field, diffrax.Bosh3(), 0.0, 1.0, 0.5, y0, args)
        return cost(jax.tree.map(lambda x: x[0], sol.ys))

    blocks = nodegrad.hessian_blocks(
        field, diffrax.Bosh3(), 0.0, 1.0, 0.5, y0, args, terminal_cost=cost, exact=True
    )
    gradient = jax.grad(loss, (0, 1))(y0, inexact)
    assert eqx.tree_equal(
        (blocks.grad_y, blocks.grad_args), gradient, rtol=1e-10, atol=1e-12
    )
    for i, j, found in [
        (0, 0, blocks.hess_yy),
        (0, 1, blocks.hess_yargs),
        (1, 1, blocks.hess_argsargs),
    ]:
        expected = jax.jit(jax.jacfwd(jax.grad(loss, i), j))(y0, inexact)
        assert eqx.tree_equal(found, expected, rtol=1e-10, atol=1e-12)


SOLVERS = {
    "several stages at once": (diffrax.Kvaerno3(), ACA, None, PID),
    "few checkpoints": (
        nodegrad.Reversible(diffrax.Bosh3()),
        nodegrad.ACAAdjoint(2),
        None,
        PID,
    ),
    "many stages": (diffrax.Dopri8(), ACA, None, PID),
    "multistep": (diffrax.LeapfrogMidpoint(), REVERSIBLE, 0.05, CONSTANT),
    "starts with an evaluation": (diffrax.ReversibleHeun(), REVERSIBLE, None, PID),
    "restarts": (
        nodegrad.Reversible(diffrax.Bosh3(), resync_every=3),
        REVERSIBLE,
        None,
        PID,
    ),
    "leapfrog": (nodegrad.ALF(), REVERSIBLE, 0.1, CONSTANT),
    "jumps": (
        diffrax.Bosh3(),
        ACA,
        None,
        diffrax.ClipStepSizeController(PID, jump_ts=jnp.array([0.3])),
    ),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", SOLVERS)
def test_every_kind_of_solver_and_memory(name):
    """Against `jax.hessian` through nodegrad's own gradient, which others check."""
    solver, adjoint, dt0, controller = SOLVERS[name]
    late = 2.0 if name == "jumps" else 1.0
    field = lambda t, y, a: (
        jnp.sin(a[0] * y[::-1]) * a[1] * jnp.where(t < 0.3, 1.0, late)
    )
    a = jnp.array([0.8, 1.2])
    kwargs = dict(stepsize_controller=controller, adjoint=adjoint, max_steps=512)

    def loss(z):
        solve = nodegrad.odesolve
        return terminal_cost(
            solve(field, solver, 0.0, 1.0, dt0, z[:2], z[2:], **kwargs).ys[0]
        )

    blocks = nodegrad.hessian_blocks(
        field,
        solver,
        0.0,
        1.0,
        dt0,
        Y0,
        a,
        terminal_cost=terminal_cost,
        exact=True,
        **kwargs,
    )
    upper = jnp.concatenate([blocks.hess_yy, blocks.hess_yargs], 1)
    lower = jnp.concatenate([blocks.hess_yargs.T, blocks.hess_argsargs], 1)
    expected = jax.jit(jax.hessian(loss))(jnp.concatenate([Y0, a]))
    assert relative_error(jnp.concatenate([upper, lower]), expected) < 1e-11


@pytest.mark.exhaustive
def test_noise_is_as_good_as_a_vector_field():
    """Plain terms, and a batch by `vmap`."""
    noise = diffrax.VirtualBrownianTree(0.0, 1.0, 1e-3, (2,), jr.PRNGKey(0))
    terms = diffrax.MultiTerm(
        diffrax.ODETerm(lambda t, y, a: -a[0] * jnp.sin(y)),
        diffrax.ControlTerm(lambda t, y, a: a[1] * jnp.diag(jnp.cos(y)), noise),
    )
    a = jnp.array([0.8, 0.3])
    times = 0.0, 1.0, 0.125

    def loss(y0, a):
        return terminal_cost(
            nodegrad.odesolve(terms, diffrax.Heun(), *times, y0, a).ys[0]
        )

    blocks_of = lambda y0: nodegrad.hessian_blocks(
        terms, diffrax.Heun(), *times, y0, a, terminal_cost=terminal_cost, exact=True
    )
    y0s = jnp.stack([Y0, -2 * Y0])
    blocks = jax.jit(jax.vmap(blocks_of))(y0s)
    expected = jax.jit(jax.vmap(lambda y0: jax.hessian(loss, 1)(y0, a)))(y0s)
    assert relative_error(blocks.hess_argsargs, expected) < 1e-11


@pytest.mark.slow
def test_third_derivatives_by_forward_mode():
    solver, grid = RK4, jnp.linspace(0.0, 1.0, 5)
    v = jnp.array([0.3, -0.7])

    def blocks_of(y0):
        kwargs = dict(y0=y0, dt0=0.25, exact=True, stepsize_controller=CONSTANT)
        return _blocks(solver, **kwargs).hess_yy

    _, third = jax.jvp(blocks_of, (Y0,), (v,))
    loss = _unrolled_loss(solver, grid, False)
    hessian = jax.hessian(lambda y0: loss(y0, NETWORK))
    assert relative_error(third, jax.jvp(hessian, (Y0,), (v,))[1]) < 1e-11


@pytest.mark.exhaustive
@pytest.mark.parametrize("backsolve", [False, True])
def test_reverse_mode_passes_through_theorem1(backsolve):
    """Value and gradient have the blocks for derivatives, up to discretisation."""

    def blocks_of(y0, rate):
        return nodegrad.theorem1_blocks(
            lambda t, y, rate: -rate * jnp.sin(y),
            RK4,
            0.0,
            1.0,
            0.02,
            y0,
            rate,
            terminal_cost=terminal_cost,
            running_cost=lambda t, y, rate: rate * jnp.sum(y**2),
            exact=True,
            backsolve=backsolve,
            max_steps=64,
        )

    def combined(y0, rate):
        blocks = blocks_of(y0, rate)
        return blocks.value + 0.3 * blocks.grad_args

    rate = jnp.array(0.7)
    blocks = blocks_of(Y0, rate)
    found = jax.jit(jax.grad(combined, (0, 1)))(Y0, rate)
    expected = (
        blocks.grad_y + 0.3 * blocks.hess_yargs,
        blocks.grad_args + 0.3 * blocks.hess_argsargs,
    )
    assert relative_error(found, expected) < 1e-7


@pytest.mark.parametrize("blocks_of", BOTH)
def test_the_same_functions_are_compiled_once(blocks_of):
    num_traces = 0

    def field(t, y, args):
        nonlocal num_traces
        num_traces += 1
        return -args * y

    terminal = lambda y: jnp.sum(y**2)
    running = lambda t, y, args: jnp.sum(y**2) * args

    def run(rate):
        nonlocal num_traces
        num_traces = 0
        blocks_of(
            field,
            diffrax.Heun(),
            0.0,
            1.0,
            0.25,
            Y0,
            jnp.array(rate),
            terminal_cost=terminal,
            running_cost=running,
            max_steps=8,
        )
        return num_traces

    assert run(0.5) > 0
    assert run(0.7) == 0


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_steps():
    def temporary_bytes(num_steps):
        def blocks_of(y0, args):
            return _blocks(
                # Where it decides itself about resyncs, it logs a byte for every step.
                nodegrad.Reversible(diffrax.Bosh3(), resync_every=None),
                y0=y0,
                args=args,
                dt0=1 / num_steps,
                stepsize_controller=CONSTANT,
                exact=True,
                running_cost=running_cost,
                adjoint=REVERSIBLE,
                max_steps=num_steps,
            )

        compiled = jax.jit(blocks_of).lower(Y0, NETWORK).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(10000) <= 1.05 * temporary_bytes(100)


# Low rank.


def _low_rank(columns, dt0=None, **kwargs):
    kwargs = dict(stepsize_controller=PID, max_steps=128) | kwargs
    return nodegrad.low_rank_blocks(
        network, diffrax.Tsit5(), 0.0, 1.0, dt0, Y0, NETWORK, columns=columns, **kwargs
    )


@pytest.mark.slow
def test_low_rank_blocks_sum_up_to_gauss_newton():
    # Of a terminal cost with signs: s = +1, -1.
    columns = jnp.array([[1.0, 0.5], [-0.3, 0.8]])
    signs = jnp.array([1.0, -1.0])
    cost = lambda y: 0.5 * jnp.sum(signs * (columns @ y) ** 2)
    low_rank = _low_rank(columns)
    flat = jax.vmap(lambda x: ravel_pytree(x)[0])
    factors = jnp.concatenate([low_rank.q, flat(low_rank.p)], axis=1)
    _, _, expected = _assembled(_blocks(terminal_cost=cost))
    assert relative_error(factors.T @ (signs[:, None] * factors), expected) < 1e-9


@pytest.mark.slow
def test_one_column_of_the_gradient_gives_the_gradient():
    # Two programs round an error estimate differently, which would move adaptive steps.
    constant = dict(dt0=1 / 16, stepsize_controller=CONSTANT)
    low_rank = _low_rank(lambda y: jax.grad(terminal_cost)(y)[None], **constant)
    blocks = _blocks(terminal_cost=terminal_cost, **constant)
    first = jax.tree.map(lambda x: x[0], (low_rank.q, low_rank.p))
    assert relative_error(first, (blocks.grad_y, blocks.grad_args)) < 1e-13
    assert relative_error(terminal_cost(low_rank.y1), blocks.value) < 1e-13


# Misuse.


@pytest.mark.parametrize("blocks_of", BOTH)
def test_misuse_of_either_function_is_refused(blocks_of):
    blocks = lambda **kwargs: _blocks(blocks_of=blocks_of, **kwargs)
    with pytest.raises(ValueError, match="must return a real scalar"):
        blocks(terminal_cost=lambda y: y)
    with pytest.raises(ValueError, match="running_cost.*must return a real scalar"):
        blocks(running_cost=lambda t, y, args: y)
    with pytest.raises(TypeError, match="`exact` must be `True` or `False`; got 1"):
        blocks(exact=1)
    with pytest.raises(ValueError, match="bound on the number.*pass `max_steps="):
        blocks(max_steps=None)
    with pytest.raises(TypeError, match="takes a `nodegrad.ACAAdjoint`"):
        blocks(adjoint=diffrax.DirectAdjoint())
    with pytest.raises(TypeError, match="real state.*Split complex ones"):
        blocks(y0=Y0.astype(complex))
    with pytest.raises(TypeError, match="real state.*Split complex ones"):
        blocks(args=jax.tree.map(lambda x: x.astype(complex), NETWORK))
    with pytest.raises(ValueError, match="ordered from `t0` to `t1`"):
        blocks(ts=[0.5, 0.2])
    with pytest.raises(ValueError, match="sequence of one or more"):
        blocks(ts=0.5)
    with pytest.raises(RuntimeError, match="max_steps"):
        blocks(max_steps=2)


def test_misuse_of_theorem1_is_refused():
    blocks = lambda **kwargs: _blocks(blocks_of=nodegrad.theorem1_blocks, **kwargs)
    for backsolve in (1, "backsolve", None, np.bool_(True), jnp.array(True)):
        with pytest.raises(TypeError, match="`backsolve` must be `True` or `False`"):
            blocks(backsolve=backsolve)
    terms = diffrax.MultiTerm(diffrax.ODETerm(network), diffrax.ODETerm(network))
    with pytest.raises(
        TypeError, match=r"plain vector field[\s\S]*`nodegrad.hessian_blocks`"
    ):
        nodegrad.theorem1_blocks(
            terms,
            diffrax.Heun(),
            0.0,
            1.0,
            0.1,
            Y0,
            NETWORK,
            terminal_cost=terminal_cost,
        )


def test_misuse_is_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'continuous'"):
        _blocks(continuous=True)
    with pytest.raises(ValueError, match="whose steps depend on nothing but"):
        _blocks(nodegrad.Reversible(diffrax.Bosh3()), ts=[0.5])
    off_grid = dict(ts=[0.33], dt0=0.1, stepsize_controller=CONSTANT)
    kwargs = dict(running_cost=running_cost, **off_grid)
    with pytest.raises(RuntimeError, match="must be ends of steps"):
        jax.block_until_ready(jax.jit(lambda y0: _blocks(y0=y0, **kwargs).value)(Y0))
    with pytest.raises(RuntimeError, match="max_steps"):
        jax.block_until_ready(_blocks(max_steps=2, ts=[0.5]))
    terms = diffrax.MultiTerm(diffrax.ODETerm(network), diffrax.ODETerm(network))
    with pytest.raises(TypeError, match="needs a plain vector field"):
        nodegrad.hessian_blocks(
            terms,
            diffrax.Heun(),
            0.0,
            1.0,
            0.1,
            Y0,
            NETWORK,
            terminal_cost=terminal_cost,
            running_cost=running_cost,
        )
    with pytest.raises(ValueError, match="must be a pytree like `y0`"):
        _low_rank({"y": jnp.ones((1, 2))})
    with pytest.raises(ValueError, match="one more, leading axis"):
        _low_rank(jnp.ones(2))


@pytest.mark.slow
@pytest.mark.parametrize("solver", [nodegrad.Rosenbrock23(), nodegrad.Rodas5P()])
def test_steps_with_derivatives_inside_have_no_linearised_field(solver):
    # Their first derivatives contain second ones of the vector field.
    problem = lambda t, y, u: -u * y**2, solver, 0.0, 1.0, 0.25, jnp.array(1.0)
    costs = dict(terminal_cost=lambda y: y**2, running_cost=lambda t, y, u: u * y)
    rate = jnp.array(1.3)
    with pytest.raises(ValueError, match="Pass `exact=True`"):
        nodegrad.hessian_blocks(*problem, rate, max_steps=4, **costs)

    def loss(rate):
        field = lambda t, y, u: (-u * y[0] ** 2, u * y[0])
        y0 = jnp.array(1.0), jnp.array(0.0)
        sol = nodegrad.odesolve(field, solver, 0.0, 1.0, 0.25, y0, rate, max_steps=4)
        return sol.ys[0][0] ** 2 + sol.ys[1][0]

    blocks = nodegrad.hessian_blocks(*problem, rate, max_steps=4, exact=True, **costs)
    assert relative_error(blocks.grad_args, jax.grad(loss)(rate)) < 1e-12


@pytest.mark.slow
def test_what_cannot_be_differentiated_says_so():
    kwargs = dict(dt0=0.25, stepsize_controller=CONSTANT)
    total = lambda y0, **more: jnp.sum(_blocks(RK4, y0=y0, **kwargs, **more).hess_yy)
    with pytest.raises(RuntimeError, match="among its fields"):
        jax.grad(lambda y0: total(y0, exact=True))(Y0)
    with pytest.raises(RuntimeError, match="with `exact=True` can"):
        jax.jvp(lambda y0: total(y0, running_cost=running_cost), (Y0,), (Y0,))


@jax.custom_vjp
def _sine(x):
    return jnp.sin(x)


_sine.defvjp(lambda x: (jnp.sin(x), x), lambda x, ct: (ct * jnp.cos(x),))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("running", [None, lambda t, y, u: jnp.sum(y**2)])
def test_rules_for_reverse_mode_alone_are_refused_as_by_products(exact, running):
    problem = lambda t, y, u: u * _sine(y), RK4, 0.0, 1.0, 0.25
    square = lambda y: jnp.sum(y**2)

    def blocks(rate):
        return nodegrad.hessian_blocks(
            *problem, Y0, rate, terminal_cost=square, running_cost=running, exact=exact
        )

    loss = lambda rate: square(nodegrad.odesolve(*problem, Y0, rate).ys)
    rate = jnp.array(0.7)
    with pytest.raises(TypeError, match="give it a `jax.custom_jvp` instead") as ours:
        blocks(rate)
    with pytest.raises(TypeError) as traced:
        jax.jit(blocks)(rate)
    with pytest.raises(TypeError) as of_product:
        nodegrad.hvp(loss, rate, rate)
    assert str(ours.value) == str(traced.value) == str(of_product.value)


def test_rules_for_reverse_mode_alone_do_where_it_is_all_that_is_needed():
    # More parameters than states: Gauss-Newton takes pullbacks alone.
    def blocks(sine):
        field = lambda t, y, u: u[0] * sine(y) + u[1] * y + u[2]
        u = jnp.array([0.7, -0.2, 0.1])
        return nodegrad.hessian_blocks(
            field, RK4, 0.0, 1.0, 0.25, Y0, u, terminal_cost=lambda y: jnp.sum(y**2)
        )

    assert relative_error(blocks(_sine), blocks(jnp.sin)) < 1e-12


def test_the_example_of_theorem1_prints_what_it_says(capsys):
    doc = inspect.getdoc(nodegrad.theorem1_blocks)
    (code,) = re.findall(r"```python\n(.*?)```", doc, re.DOTALL)
    (promised,) = re.findall(r"print\(.*\)  # (.*)", code)
    exec(compile(textwrap.dedent(code), "theorem1_blocks", "exec"), {})
    assert abs(float(capsys.readouterr().out) - float(promised)) < 1e-4
