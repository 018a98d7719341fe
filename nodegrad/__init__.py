from ._adjoint import ACAAdjoint as ACAAdjoint, ReversibleAdjoint as ReversibleAdjoint
from ._alf import ALF as ALF
from ._curvature import value_grad_and_curvature as value_grad_and_curvature
from ._gauss_newton import scale_by_gauss_newton as scale_by_gauss_newton
from ._kronecker import KroneckerFactors as KroneckerFactors
from ._odesolve import odesolve as odesolve
from ._results import RESULTS as RESULTS
from ._reversible import Reversible as Reversible
from ._rk4 import RK4 as RK4
from ._snopt import (
    scale_by_snopt as scale_by_snopt,
    snopt as snopt,
    SNOptState as SNOptState,
)
from ._stability import (
    is_stable as is_stable,
    stability_polynomial as stability_polynomial,
)
from ._terminal_time import (
    terminal_time as terminal_time,
    terminal_time_derivatives as terminal_time_derivatives,
)
from ._training import make_steps as make_steps
