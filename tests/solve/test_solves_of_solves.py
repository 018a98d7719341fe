"""Programs that make one solve depend on others: exact first and second derivatives.

The references are closed forms. For a linear equation and the method of Heun they hold
for the discrete solution: a step of size `h` multiplies the state by
`1 - r h + (r h)^2 / 2`. The solution of a reversible solver is another one; its
reference is the program with Diffrax's `DirectAdjoint`.
"""

import gc

import diffrax
import jax
import jax.numpy as jnp
import optimistix as optx
import pytest
from jax.core import Tracer

import nodegrad

from ..problems import relative_error


DOORS = {"native": nodegrad.odesolve, "diffrax": diffrax.diffeqsolve}
METHODS = {
    "aca": (nodegrad.ACAAdjoint(), lambda solver: solver),
    "reversible": (nodegrad.ReversibleAdjoint(), nodegrad.Reversible),
    "direct": (diffrax.DirectAdjoint(), nodegrad.Reversible),
}
_STEPS = 4


def _solve(door, method, field, y0, args, *, t0=0.0, t1=1.0, **settings):
    """Solves with `_STEPS` steps of Heun's method, unless `settings` say otherwise."""
    adjoint, wrapped = METHODS[method]
    solver = wrapped(settings.pop("solver", diffrax.Heun()))
    if "dt0" not in settings:
        settings |= dict(dt0=(t1 - t0) / _STEPS, max_steps=_STEPS)
    terms = diffrax.ODETerm(field)
    return DOORS[door](
        terms, solver, t0, t1, y0=y0, args=args, adjoint=adjoint, **settings
    )


def _decay(t, y, rate):
    return -rate * y


def _propagator(rate):
    """The factor by which `_STEPS` steps of Heun's method multiply a decaying state."""
    z = -rate / _STEPS
    return (1 + z + z**2 / 2) ** _STEPS


def _inner_solve(door, method):
    """The vector field of a solve is the solution of another solve."""

    def field(t, y, p):
        inner = _solve(
            door, method, lambda t, z, r: jnp.sin(y) - r * z, y, p[0], t1=0.5
        )
        return p[1] * inner.ys[-1] - y**2

    def found(p):
        y0 = jnp.array([0.5, 0.3])
        return jnp.sum(_solve(door, method, field, y0, p).ys ** 2)

    def heun(field, y, h):
        for _ in range(_STEPS):
            slope = field(y)
            y = y + h / 2 * (slope + field(y + h * slope))
        return y

    def expected(p):
        inner = lambda y: heun(lambda z: jnp.sin(y) - p[0] * z, y, 0.5 / _STEPS)
        outer = heun(
            lambda y: p[1] * inner(y) - y**2, jnp.array([0.5, 0.3]), 1 / _STEPS
        )
        return jnp.sum(outer**2)

    return found, expected


def _root_find(door, method):
    """A root finder chooses the first state, such that the last one is given."""

    def found(p):
        rate, last = p
        miss = lambda y0, rate: _solve(door, method, _decay, y0, rate).ys[-1] - last
        newton = optx.Newton(rtol=1e-12, atol=1e-12)
        return optx.root_find(miss, newton, jnp.array(1.0), rate).value

    return found, lambda p: p[1] / _propagator(p[0])


def _doses(door, method):
    """A `lax.scan` of solves, with a jump of the state before each."""
    doses = jnp.array([1.0, 0.5, 0.25])

    def found(p):
        def interval(y, dose):
            y = _solve(door, method, _decay, y + p[1] * dose, p[0]).ys[-1]
            return y, y

        return jnp.sum(jax.lax.scan(interval, jnp.array(0.0), doses)[1])

    def expected(p):
        y, total = 0.0, 0.0
        for dose in doses:
            y = (y + p[1] * dose) * _propagator(p[0])
            total += y
        return total

    return found, expected


def _delay(door, method):
    """The method of steps for the delay equation `y'(t) = -r y(t - 1)`.

    Its solution is a polynomial of degree three for t <= 3, which `Tsit5` and its dense
    output compute without an error. It is 1 for t <= 0.
    """

    def found(p):
        past = lambda t: p[1]
        for start in range(3):
            field = lambda t, y, r, past=past: -r * past(t - 1)
            solution = _solve(
                door,
                method,
                field,
                past(jnp.array(float(start))),
                p[0],
                t0=float(start),
                t1=float(start + 1),
                solver=diffrax.Tsit5(),
                saveat=diffrax.SaveAt(dense=True),
            )
            past = solution.evaluate
        return past(jnp.array(2.5))

    def expected(p):
        r, t = p[0], 2.5
        terms = 1 - r * t + (r * (t - 1)) ** 2 / 2 - (r * (t - 2)) ** 3 / 6
        return p[1] * terms

    return found, expected


_PROGRAMS = [_doses, _root_find, _delay, _inner_solve]


@pytest.mark.rows(test=1, ci=1)
@pytest.mark.parametrize("method", ["aca", "reversible"])
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("program", _PROGRAMS, ids=lambda f: f.__name__[1:])
def test_derivatives_are_exact(program, door, method):
    found, expected = program(door, method)
    if method == "reversible":
        expected, _ = program("diffrax", "direct")
    p, v = jnp.array([0.7, 1.3]), jnp.array([1.0, 2.0])
    first = lambda f: jax.jit(jax.value_and_grad(f))(p)
    assert relative_error(first(found), first(expected)) < 1e-12
    reference = jax.jit(jax.jacfwd(jax.grad(expected)))(p)
    assert relative_error(jax.jit(jax.hessian(found))(p), reference) < 1e-11
    hvp = jax.jit(nodegrad.hvp, static_argnums=0)(found, p, v)
    assert relative_error(hvp, reference @ v) < 1e-11


@pytest.mark.rows(test=0, ci=1)
@pytest.mark.parametrize("door", DOORS)
def test_a_scan_of_adaptive_solves_has_the_derivatives_of_a_loop(door):
    # JAX drops the rules of custom functions where it differentiates a scan twice: what
    # the recorded loop consists of must have the right derivatives by itself, also with
    # respect to the times, on which the steps depend.
    pid = diffrax.PIDController(1e-4, 1e-4)
    doses = jnp.array([1.0, 0.5, 0.25])

    def interval(y, dose, p):
        field = lambda t, y, r: jnp.sin(3 * y * t) - r * y
        settings = dict(t0=p[2], t1=p[3], dt0=None, solver=diffrax.Tsit5())
        settings |= dict(stepsize_controller=pid, max_steps=64)
        y = _solve(door, "aca", field, y + p[1] * dose, p[0], **settings).ys[-1]
        return y, y

    def scan(p):
        each = lambda y, dose: interval(y, dose, p)
        return jnp.sum(jax.lax.scan(each, jnp.array(0.0), doses)[1])

    def loop(p):
        y, total = jnp.array(0.0), 0.0
        for dose in doses:
            y, _ = interval(y, dose, p)
            total += y
        return total

    p = jnp.array([0.7, 1.3, 0.1, 2.0])
    found, expected = (jax.jit(jax.hessian(f))(p) for f in (scan, loop))
    assert relative_error(found, expected) < 1e-10


def test_no_tracer_outlives_its_trace():
    # What JAX keeps of a solve must not hold the user's arrays.
    def loss(rate):
        field = lambda t, y, rate: -rate * jnp.sin(y)
        sol = nodegrad.odesolve(field, diffrax.Heun(), 0.0, 1.0, 0.1, 2.0, rate)
        return sol.ys[0]

    def num_alive():
        gc.collect()
        return sum(isinstance(x, Tracer) for x in gc.get_objects())

    before = num_alive()
    assert jnp.isfinite(jax.jit(jax.grad(loss))(0.5))
    assert num_alive() == before


@pytest.mark.slow
def test_a_collective_is_no_part_of_a_derivative_outside_of_its_axis():
    field = lambda t, y, rate: -rate * y + 0.5 * jax.lax.pmean(y, "b")
    rates, y0 = jnp.array([0.7, 1.5]), jnp.array([1.0, 2.0])

    def last(rate, y0, adjoint=None):
        adjoint = nodegrad.ACAAdjoint() if adjoint is None else adjoint
        return diffrax.diffeqsolve(
            diffrax.ODETerm(field), diffrax.Heun(), 0.0, 1.0, 0.25, y0, rate,
            adjoint=adjoint, max_steps=4,
        ).ys[0]  # fmt: skip

    inside = lambda adjoint: jax.vmap(
        jax.grad(lambda rate, y0: last(rate, y0, adjoint)), axis_name="b"
    )(rates, y0)
    found = inside(nodegrad.ACAAdjoint())
    assert relative_error(found, inside(diffrax.DirectAdjoint())) < 1e-13
    mean = lambda rate: jnp.mean(jax.vmap(last, (None, 0), axis_name="b")(rate, y0))
    # The axis outside has the same name: without the check it would be summed over.
    outside = jax.vmap(jax.grad(mean), axis_name="b")
    for derivative in (outside, lambda rates: jax.jvp(mean, (rates[0],), (1.0,))):
        with pytest.raises(ValueError, match="collective .* over the axis 'b'"):
            derivative(rates)
