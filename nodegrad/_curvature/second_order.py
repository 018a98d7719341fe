"""Second-order products, with errors that say which derivative rule is missing."""

import contextlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .._internal.compat import eval_jaxpr, Jaxpr, jaxprs_in_params
from .._internal.tree import is_traced


_FOREIGN = (
    "A second-order product met something that JAX cannot differentiate by forward "
    "mode over reverse mode: a `jax.custom_vjp` inside the loss or a vector field (it "
    "has first derivatives only; give it a `jax.custom_jvp` instead), or a "
    "differential equation solve. If it is a solve, its adjoint allows first "
    "derivatives only, such as "
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
    "`filter_custom_vjp` cannot be autodifferentiated",
    "Reverse-mode differentiation does not work for lax.while_loop",
)


def second_order(product: Callable, params: PyTree, v: PyTree) -> PyTree[Array]:
    """Returns `product(params, v)`; errors of JAX explain which adjoints to use."""
    with _first_order_adjoints_explained():
        # Constants are traced inside of `jax.jit` (or a loop), and nowhere else.
        if not is_traced(jnp.zeros(())):
            return product(params, v)
        # Inside of `jax.jit`, JAX raises its error during compilation, which is outside
        # of this function. So the traced product is searched here.
        closed, struct = jax.make_jaxpr(product, return_shape=True)(params, v)
        if _has_unusable_rule(closed.jaxpr):
            raise TypeError(_FOREIGN)
        inputs = jax.tree.leaves((params, v))
        out = eval_jaxpr(closed.jaxpr, closed.consts, *inputs)
        return jax.tree.unflatten(jax.tree.structure(struct), out)


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
def _first_order_adjoints_explained() -> Iterator[None]:
    """Replaces JAX's errors about missing rules by one that says what to do."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError) as error:
        if any(symptom in str(error) for symptom in _SYMPTOMS):
            raise TypeError(_FOREIGN) from error
        raise
