"""Training with AdamW on distorted digits, through `nodegrad.odesolve`."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import equinox as eqx
import jax.random as jr
import numpy as np
import optax
from benchmarks.training_tasks import accuracy, cross_entropy, shuffled

import nodegrad

from .data import BATCH_SIZE, Digits, distort
from .model import Classifier, Solve


@dataclass(frozen=True)
class Epoch:
    """Means over the batches of an epoch, and the test accuracy after the epoch."""

    loss: float
    accuracy: float
    steps: float
    evaluations: float
    seconds: float

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.4f}, test accuracy {self.accuracy:.2%}, a solve takes "
            f"{self.steps:.1f} steps and {self.evaluations:.1f} evaluations, "
            f"{self.seconds:.1f} s"
        )


def _losses(model: Classifier, images: Any, labels: Any, key: Any) -> tuple[Any, Any]:
    logits, stats = model(distort(images, key), Solve())
    return cross_entropy(logits, images, labels), stats


@eqx.filter_jit
def evaluate(
    model: Classifier, images: Any, labels: Any, solve: Solve
) -> tuple[Any, Any]:
    """The accuracy, and the statistics of the solve."""
    logits, stats = model(images, solve)
    return accuracy(logits, images, labels), stats


def train(
    digits: Digits, epochs: int, batches: int, seed: int
) -> tuple[Classifier, list[Epoch]]:
    """The model after some epochs of so many batches. Prints a line for each epoch."""
    model_key, key = jr.split(jr.key(seed))
    model = eqx.filter_jit(Classifier)(key=model_key)
    count = epochs * batches
    schedule = optax.warmup_cosine_decay_schedule(5e-4, 5e-3, count // 10, count)
    optim = optax.adamw(schedule, weight_decay=1e-2)
    opt_state = optim.init(eqx.filter(model, eqx.is_inexact_array))
    step = nodegrad.make_steps(optim, _losses, has_aux=True).step
    stream = enumerate(shuffled(digits.train, BATCH_SIZE)(seed))
    history: list[Epoch] = []
    for number in range(1, epochs + 1):
        start = time.perf_counter()
        records = []
        for index, batch in islice(stream, batches):
            step_key = jr.fold_in(key, index)
            model, opt_state, record = step(model, opt_state, *batch, step_key)
            records.append(record)
        test_accuracy, _ = evaluate(model, *digits.test, Solve())
        history.append(_summarise(records, float(test_accuracy), start))
        print(f"epoch {number}: {history[-1]}", flush=True)
    return model, history


def _summarise(records: Sequence[Any], test_accuracy: float, start: float) -> Epoch:
    losses, stats = zip(*records, strict=True)
    mean = lambda name: float(np.mean([s[name] for s in stats]))
    return Epoch(
        loss=float(np.mean(losses)),
        accuracy=test_accuracy,
        steps=mean("num_steps"),
        evaluations=mean("num_vector_field_evaluations"),
        seconds=time.perf_counter() - start,
    )
