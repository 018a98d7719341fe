from ._adjoint import ACAAdjoint as ACAAdjoint
from ._odesolve import odesolve as odesolve
from ._results import RESULTS as RESULTS
from ._rk4 import RK4 as RK4
