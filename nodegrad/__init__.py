from ._adjoint import ACAAdjoint as ACAAdjoint, ReversibleAdjoint as ReversibleAdjoint
from ._alf import ALF as ALF
from ._blocks import HessianBlocks as HessianBlocks
from ._curvature import value_grad_and_curvature as value_grad_and_curvature
from ._gauss_newton import scale_by_gauss_newton as scale_by_gauss_newton
from ._hessian_blocks import hessian_blocks as hessian_blocks
from ._kronecker import KroneckerFactors as KroneckerFactors
from ._low_rank import (
    low_rank_blocks as low_rank_blocks,
    LowRankBlocks as LowRankBlocks,
)
from ._odesolve import odesolve as odesolve
from ._products import (
    ggn_operator as ggn_operator,
    ggn_vp as ggn_vp,
    hessian_operator as hessian_operator,
    hvp as hvp,
)
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
from ._theorem1_blocks import theorem1_blocks as theorem1_blocks
from ._training import make_steps as make_steps
