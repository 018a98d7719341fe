"""Compositions with JAX's transformations, exact against the unrolled grid."""

import diffrax
import jax
import jax.numpy as jnp
import pytest

import nodegrad

from ..problems import accepted_grid, relative_error, unrolled, van_der_pol


DOORS = {"native": nodegrad.odesolve, "diffrax": diffrax.diffeqsolve}
PID = diffrax.PIDController(1e-6, 1e-6)
# Rows are (y0, mu); they take different numbers of steps.
POINTS = jnp.array([[2.0, 0.0, 5.0], [1.0, 1.0, 1.0], [0.1, 0.0, 3.0]])


def _loss(solve, t1=2.0, **kwargs):
    def loss(y0__mu):
        sol = solve(
            diffrax.ODETerm(van_der_pol),
            diffrax.Tsit5(),
            0.0,
            t1,
            None,
            y0__mu[:2],
            y0__mu[2],
            stepsize_controller=PID,
            adjoint=nodegrad.ACAAdjoint(),
            **kwargs,
        )
        return jnp.sum(sol.ys)

    return loss


def _frozen(point):
    """The loss on the accepted grid of `point`."""
    solver = diffrax.Tsit5()
    grid = accepted_grid(van_der_pol, solver, 0.0, 2.0, point[:2], point[2], PID)
    return lambda p: jnp.sum(unrolled(solver, van_der_pol, grid, p[:2], p[2]))


@pytest.mark.rows(test=0, ci=1)
@pytest.mark.parametrize("door", DOORS)
def test_second_derivatives_are_exact(door):
    loss, frozen, point = _loss(DOORS[door]), _frozen(POINTS[0]), POINTS[0]
    hessian = jax.jit(jax.hessian(loss))(point)
    expected = jax.hessian(frozen)(point)
    assert relative_error(hessian, expected) < 1e-10
    assert jnp.allclose(hessian[2, 2], -0.05206369099, rtol=1e-9)
    v = jnp.array([0.3, 0.2, 0.1])
    hvp = jax.jit(lambda p: jax.jvp(jax.grad(loss), (p,), (v,))[1])(point)
    assert relative_error(hvp, expected @ v) < 1e-10


@pytest.mark.exhaustive
def test_batches_of_derivatives_with_different_step_counts_are_exact():
    grads = jnp.stack([jax.grad(_frozen(p))(p) for p in POINTS])
    hessians = jnp.stack([jax.hessian(_frozen(p))(p) for p in POINTS])
    for door in DOORS.values():
        loss = _loss(door)
        vmap_grad = jax.jit(jax.vmap(jax.grad(loss)))(POINTS)
        assert relative_error(vmap_grad, grads) < 1e-10
        total = lambda p, loss=loss: jnp.sum(jax.vmap(loss)(p))
        grad_vmap = jax.jit(jax.grad(total))(POINTS)
        assert relative_error(grad_vmap, grads) < 1e-10
        vmap_hessian = jax.jit(jax.vmap(jax.hessian(loss)))(POINTS)
        assert relative_error(vmap_hessian, hessians) < 1e-10


@pytest.mark.exhaustive
def test_second_derivatives_with_re_swept_segments_are_exact():
    def loss(a, checkpoints):
        sol = nodegrad.odesolve(
            lambda t, y, a: jnp.sin(a * y) * jnp.cos(t),
            diffrax.Tsit5(),
            0.0,
            1.0,
            0.1,
            jnp.array(1.0),
            a,
            saveat=diffrax.SaveAt(ts=[0.33, 0.72, 1.0]),
            adjoint=nodegrad.ACAAdjoint(checkpoints),
            max_steps=32,
        )
        return jnp.sum(sol.ys**2)

    second = jax.jit(jax.hessian(loss), static_argnums=1)
    assert relative_error(second(1.2, 2), second(1.2, "all")) < 1e-12
    eps = 1e-5
    difference = jax.grad(loss)(1.2 + eps, "all") - jax.grad(loss)(1.2 - eps, "all")
    assert jnp.allclose(second(1.2, 2), difference / (2 * eps), rtol=1e-8)


@pytest.mark.slow
def test_second_derivative_with_respect_to_the_end_time():
    def loss(t1):
        sol = nodegrad.odesolve(
            lambda t, y, args: y,
            diffrax.Tsit5(),
            0.0,
            t1,
            None,
            jnp.array(1.0),
            stepsize_controller=diffrax.PIDController(1e-10, 1e-10),
        )
        return sol.ys[0] ** 2

    # L = exp(2 T)
    assert jnp.allclose(jax.grad(loss)(1.0), 2 * jnp.exp(2.0), rtol=1e-8)
    assert jnp.allclose(jax.hessian(loss)(1.0), 4 * jnp.exp(2.0), rtol=1e-6)


@pytest.mark.parametrize("door", DOORS)
def test_forward_mode_is_exact(door):
    loss, frozen, point = _loss(DOORS[door]), _frozen(POINTS[0]), POINTS[0]
    v = jnp.array([0.3, 0.2, 0.1])
    _, expected = jax.jvp(frozen, (point,), (v,))
    _, tangent = jax.jit(lambda p: jax.jvp(loss, (p,), (v,)))(point)
    assert relative_error(tangent, expected) < 1e-11
    _, push = jax.linearize(loss, point)
    assert relative_error(push(v), expected) < 1e-11


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "solver", [diffrax.Tsit5(), nodegrad.Reversible(diffrax.Bosh3())]
)
def test_second_derivatives_with_respect_to_all_times_of_fixed_steps(solver):
    def loss(x, solve, adjoint):
        sol = solve(
            diffrax.ODETerm(van_der_pol),
            solver,
            x[0],
            x[1],
            x[2],
            x[3:5],
            x[5],
            adjoint=adjoint,
            max_steps=64,
        )
        return jnp.sum(sol.ys**2)

    x = jnp.array([0.0, 1.0, 0.13, 2.0, 0.0, 1.5])
    theirs = lambda x: loss(x, diffrax.diffeqsolve, diffrax.ForwardMode())
    expected = jax.jit(jax.jacfwd(jax.jacfwd(theirs)))(x)
    ours = lambda x: loss(x, nodegrad.odesolve, nodegrad.ACAAdjoint())
    for second in (jax.hessian, lambda fn: jax.jacfwd(jax.jacfwd(fn))):
        assert relative_error(jax.jit(second(ours))(x), expected) < 1e-11


@pytest.mark.rows(test=1, ci=2)
@pytest.mark.parametrize("door", DOORS)
def test_reverse_mode_over_a_derivative_says_what_to_do(door):
    loss, point = _loss(DOORS[door]), POINTS[0]
    with pytest.raises(RuntimeError, match=r"jax.jvp\(jax.grad\(f\)"):
        jax.grad(lambda p: jnp.sum(jax.grad(loss)(p)))(point)
    with pytest.raises(RuntimeError, match=r"jax.jvp\(jax.grad\(f\)"):
        jax.jit(jax.jacrev(jax.jacfwd(loss)))(point)


@pytest.mark.slow
def test_works_inside_checkpoint_and_scan():
    loss, point = _loss(nodegrad.odesolve, t1=0.5), POINTS[0]

    def twice(p):
        step = lambda p, _: (p + 0.01 * jax.checkpoint(loss)(p), None)
        return jnp.sum(jax.lax.scan(step, p, None, length=2)[0])

    def by_hand(p):
        for _ in range(2):
            p = p + 0.01 * loss(p)
        return jnp.sum(p)

    expected = jax.jit(jax.grad(by_hand))(point)
    assert relative_error(jax.jit(jax.grad(twice))(point), expected) < 1e-12


def test_one_compilation_serves_changing_times_tolerances_and_parameters():
    traces = []

    def field(t, y, mu):
        traces.append(1)
        return van_der_pol(t, y, mu)

    @jax.jit
    def train_step(mu, t1, tol):
        def loss(mu):
            sol = nodegrad.odesolve(
                field,
                diffrax.Tsit5(),
                0.0,
                t1,
                None,
                jnp.array([2.0, 0.0]),
                mu,
                stepsize_controller=diffrax.PIDController(tol, tol),
            )
            return jnp.sum(sol.ys)

        return mu - 1e-3 * jax.grad(loss)(mu)

    number = lambda x: jnp.asarray(x, jnp.float64)
    mu, counts = number(1.0), []
    for i in range(5):
        mu = train_step(mu, number(0.5 + 0.1 * i), number(1e-3 / (i + 1)))
        counts.append(len(traces))
    assert len(set(counts)) == 1
    # A small constant, whatever the number of stages and passes.
    assert counts[0] <= 8


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "door, what",
    [
        ("diffrax", "y0"),
        *(
            pytest.param(door, what)
            for door in DOORS
            for what in ("y0", "ts", "args")
            if (door, what) != ("diffrax", "y0")
        ),
    ],
)
def test_results_that_vmap_leaves_alone_may_have_tangents(door, what):
    # With constant steps the times saved are the same for all samples.
    ts = jnp.array([0.1, 0.25, 0.5])
    ys = jnp.array([[1.0, -0.5], [0.3, 0.8], [-0.2, 0.4]])
    axes = {"y0": (0, None, None), "ts": (None, 0, None), "args": (None, None, 0)}[what]
    start, args = (ys, 0.7) if what == "y0" else (ys[0], 0.7)
    times = jnp.add.outer(0.01 * jnp.arange(3.0), ts) if what == "ts" else ts
    args = jnp.array([0.5, 0.7, 0.9]) if what == "args" else args

    def loss(y0, ts, args, t1, solve, adjoint):
        def one(y0, ts, args):
            sol = solve(
                diffrax.ODETerm(lambda t, y, a: -a * y * jnp.roll(y, 1)),
                diffrax.Heun(),
                0.0,
                t1,
                0.05,
                y0,
                args,
                saveat=diffrax.SaveAt(ts=ts, t1=True, dense=True),
                adjoint=adjoint,
            )
            return jnp.sum(sol.ys**2) + jnp.sum(sol.evaluate(0.33)) + jnp.sum(sol.ts)

        return jnp.mean(jax.vmap(one, in_axes=axes)(y0, ts, args))

    point = start, times, args, 0.6
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)), static_argnums=(4, 5))
    found = gradient(*point, DOORS[door], nodegrad.ACAAdjoint())
    expected = gradient(*point, diffrax.diffeqsolve, diffrax.DirectAdjoint())
    assert relative_error(found, expected) < 1e-12
