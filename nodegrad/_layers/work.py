"""Estimates how much work a traced function does, and what kind of work."""

import math
from typing import Any

from .._internal.compat import Jaxpr, jaxprs_in_params


# Linear algebra and Fourier transforms. Like products they are not fused with
# elementwise operations, and for each number they compute a sum over about one axis.
_EXPENSIVE = frozenset(
    "cholesky eig eigh fft householder_product lu qr schur svd triangular_solve "
    "tridiagonal_solve".split()
)


def products_dominate(jaxpr: Jaxpr) -> bool:
    """Whether most of the work is in matrix products and decompositions."""
    in_products, others = _work(jaxpr)
    return in_products > others


def _work(jaxpr: Jaxpr) -> tuple[float, float]:
    """Counts multiplications inside products, and numbers computed otherwise.

    Decompositions and transforms count as products.
    """
    in_products, others = 0.0, 0.0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        size = sum(math.prod(_shape(v.aval)) for v in eqn.outvars)
        # Parameters hold jaxprs either open or closed.
        inner = [getattr(x, "jaxpr", x) for x in jaxprs_in_params(eqn.params)]
        if name in _EXPENSIVE:
            # Axes before these are those of a batch.
            axes = len(eqn.params["fft_lengths"]) if name == "fft" else 2
            in_products += size * max(_shape(eqn.invars[0].aval)[-axes:])
        elif name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            # Every number of the result is a sum over the contracted axes.
            shape = _shape(eqn.invars[0].aval)
            in_products += size * math.prod(shape[i] for i in contracted)
        elif name == "conv_general_dilated":
            kernel = _shape(eqn.invars[1].aval)
            # Every number of the result is a sum over the kernel of its output channel.
            outputs = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
            in_products += size * math.prod(kernel) / outputs
        elif inner:
            for part in inner:
                more_in_products, more_others = _work(part)
                # A `scan` runs `length` times. A `while` loop counts once, as its
                # number of iterations is not known. All branches of a `cond` count.
                times = eqn.params.get("length", 1)
                in_products += times * more_in_products
                others += times * more_others
        else:
            others += size
    return in_products, others


def _shape(aval: Any) -> tuple[int, ...]:
    return getattr(aval, "shape", ())
