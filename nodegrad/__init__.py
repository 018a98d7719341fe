"""Exact, memory-lean first and second derivatives through ODE, CDE and SDE solves.

nodegrad differentiates the accepted steps of a solve, each of them once. It works with
released Diffrax, Equinox and Optax. There are three ways in:

- Functions: `odesolve` solves an equation; `hessian_blocks`, `hvp` and `ggn_vp` return
  its second derivatives.
- Diffrax classes: pass `ACAAdjoint()` or `ReversibleAdjoint()` as the `adjoint` of
  `diffrax.diffeqsolve`, and `Reversible(...)`, `ALF(...)` or `RK4()` as its `solver`.
- An Optax transformation: `scale_by_snopt` divides gradients by the curvature that
  `value_grad_and_curvature` returns for the layers of a model.
"""

from ._check.check_gradient import check_gradient as check_gradient
from ._check.stability import (
    is_stable as is_stable,
    stability_polynomial as stability_polynomial,
)
from ._curvature.curvature import value_grad_and_curvature as value_grad_and_curvature
from ._curvature.make_steps import make_steps as make_steps
from ._curvature.operators import (
    ggn_operator as ggn_operator,
    hessian_operator as hessian_operator,
)
from ._curvature.products import ggn_vp as ggn_vp, hvp as hvp
from ._internal.results import RESULTS as RESULTS
from ._layers.factors import KroneckerFactors as KroneckerFactors
from ._optimize.gauss_newton import (
    GaussNewtonState as GaussNewtonState,
    scale_by_gauss_newton as scale_by_gauss_newton,
)
from ._optimize.quadratic_steps import SNOptModelState as SNOptModelState
from ._optimize.scale_by_snopt import (
    scale_by_snopt as scale_by_snopt,
    SNOptState as SNOptState,
)
from ._optimize.snopt import snopt as snopt
from ._optimize.terminal_time import (
    terminal_time as terminal_time,
    terminal_time_derivatives as terminal_time_derivatives,
)
from ._reversible.alf import ALF as ALF
from ._reversible.reversible import Reversible as Reversible
from ._second_order.hessian_blocks import (
    hessian_blocks as hessian_blocks,
    HessianBlocks as HessianBlocks,
)
from ._second_order.low_rank import (
    low_rank_blocks as low_rank_blocks,
    LowRankBlocks as LowRankBlocks,
)
from ._second_order.theorem1_blocks import theorem1_blocks as theorem1_blocks
from ._solve.aca_adjoint import ACAAdjoint as ACAAdjoint
from ._solve.odesolve import odesolve as odesolve
from ._solve.reversible_adjoint import ReversibleAdjoint as ReversibleAdjoint
from ._steps.explicit_methods import (
    EES25 as EES25,
    EES27 as EES27,
    RK4 as RK4,
)
from ._steps.rosenbrock import Rodas5P as Rodas5P, Rosenbrock23 as Rosenbrock23
from ._steps.solvers import (
    AbstractReversibleSolver as AbstractReversibleSolver,
)


# The version in `pyproject.toml`; `tests/test_house.py` compares them.
__version__ = "0.1.0"
