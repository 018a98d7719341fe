"""Second derivatives, with errors that say which derivative rule is missing."""

import contextlib
from collections.abc import Callable, Iterator

import jax.numpy as jnp
from jaxtyping import PyTree

from .._internal.closure_convert import closure_convert
from .._internal.compat import Jaxpr, jaxprs_in_params
from .._internal.tree import is_traced


_FOREIGN = (
    "A second derivative met something that JAX cannot differentiate by forward mode: "
    "a `jax.custom_vjp` inside the loss or a vector field (it has a rule for reverse "
    "mode only; give it a `jax.custom_jvp` instead), or a differential equation solve. "
    "If it is a solve, its adjoint allows first derivatives only, such as "
    "`diffrax.RecursiveCheckpointAdjoint` (Diffrax's default), "
    "`diffrax.BacksolveAdjoint`, or `diffrax.ForwardMode`. Pass "
    "`adjoint=nodegrad.ACAAdjoint()` (or `nodegrad.ReversibleAdjoint()`) to every "
    "`diffeqsolve` inside the loss, or solve by `nodegrad.odesolve`."
)

# Parts of the messages by which JAX and Equinox say that a rule for one mode of
# differentiation met another mode. There is no exception class for this. Checked on the
# versions that `compat.py` lists; a message that is not known passes unchanged.
_SYMPTOMS = (
    "can't apply forward-mode autodiff (jvp) to a custom_vjp function",
    "can't apply forward-mode differentiation (jvp) to a custom_vjp function",
    "Differentiation rule for 'custom_lin' not implemented",
    "`filter_custom_vjp` cannot be autodifferentiated",
    "Reverse-mode differentiation does not work for lax.while_loop",
)


def second_order(fn: Callable[..., PyTree], *args: PyTree) -> PyTree:
    """Returns `fn(*args)`, which differentiates a loss twice.

    Errors of JAX about missing derivative rules say what to do instead.
    """
    with _missing_rules_explained():
        # Constants are traced inside of `jax.jit` (or a loop), and nowhere else.
        if not is_traced(jnp.zeros(())):
            return fn(*args)
        # Inside of `jax.jit`, JAX raises its error during compilation, which is outside
        # of this function. So the traced function is searched here.
        consts, pure = closure_convert(fn, *args)
        if _has_unusable_rule(pure.jaxpr):
            raise TypeError(_FOREIGN)
        return pure(consts, *args)


def _has_unusable_rule(jaxpr: Jaxpr) -> bool:
    """Returns whether forward mode met a `jax.custom_vjp` anywhere in `jaxpr`."""
    for eqn in jaxpr.eqns:
        # JAX's forward mode turns the call of a `jax.custom_vjp` into this primitive.
        # Reverse mode would have transposed it, so it should not be left.
        if eqn.primitive.name == "custom_lin":
            return True
        for inner in jaxprs_in_params(eqn.params):
            if _has_unusable_rule(getattr(inner, "jaxpr", inner)):
                return True
    return False


@contextlib.contextmanager
def _missing_rules_explained() -> Iterator[None]:
    """Replaces JAX's errors about missing rules by one that says what to do."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        if any(symptom in str(error) for symptom in _SYMPTOMS):
            raise TypeError(_FOREIGN) from error
        raise
