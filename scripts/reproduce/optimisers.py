"""Training of one task by one optimiser, compiled once for all settings and seeds."""

import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.random as jr
import numpy as np
from benchmarks.measure import Clock
from benchmarks.training import (
    ADAM,
    averaged,
    DEFAULT,
    METHODS,
    PAPER,
    SGD,
    Trainer,
)

from . import training_sets


#: Short names of the methods, which are those of `scripts/benchmarks/training.py`.
NAMES = {"adam": ADAM, "sgd": SGD, "snopt-paper": PAPER, "snopt": DEFAULT}
#: What claims call the two forms of SNOpt: both are compared with Adam.
SNOPT = {"snopt-paper": "the published SNOpt", "snopt": "`snopt()`"}
_CLOCK = Clock(time.perf_counter, "wall clock")


class _Trainer(Trainer):
    """Also returns the trained model, and the compiled steps."""

    @property
    def steps(self) -> Any:
        """The ordinary step and, where there is one, that with a refresh."""
        return self._steps

    def fit(self, settings: dict[str, float], seed: int) -> tuple[Any, dict[str, Any]]:
        """The model, its losses, the seconds of the steps, and what a test says."""
        model, state = self.start(settings, seed)
        batches, key = self.task.batches(seed), jr.PRNGKey(seed)
        losses, seconds = [], []
        for index in range(self.task.iterations):
            batch, key = next(batches), jr.fold_in(key, index)
            refresh = self.method.refreshes(index)
            step = self._steps.refresh if refresh else self._steps.step
            start = self._clock.now()
            model, state, value = step(model, state, *batch, key=key)
            losses.append(float(value))
            seconds.append(self._clock.now() - start)
            if not np.isfinite(losses[-1]):
                break
        # The running mean of the parameters is part of `snopt()`.
        (loss, metric), (last_loss, last_metric) = self.test(model, state)
        # The first steps of both kinds are compiled when they are called.
        rest = seconds[len(seconds) // 3 :]
        return averaged(model, state), {
            "losses": losses,
            "test_loss": loss,
            "metric": metric,
            "last_test_loss": last_loss,
            "last_metric": last_metric,
            "seconds": float(np.mean(rest)),
        }


@lru_cache
def trainer(
    task: str, method: str, iterations: int, folder: Path | None, size: int = 128
) -> _Trainer:
    """Everything that seeds and settings have in common.

    `size` is that of the batches of MNIST, SVHN and CIFAR-10.
    """
    # The programs of other tasks and methods will not be called any more.
    jax.clear_caches()
    methods = {m.name: m for m in METHODS}
    made = training_sets.make(task, iterations, folder, size)
    return _Trainer(made, methods[NAMES[method]], _CLOCK)
