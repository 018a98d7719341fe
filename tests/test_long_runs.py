"""Saves of a run: complete at every moment, and resumed bit by bit.

The functions that save and resume are those of the page "Long runs".
"""

import pathlib
import re
import signal
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

import nodegrad


_PAGE = pathlib.Path(__file__).parents[1] / "docs" / "long_runs.md"
if not _PAGE.exists():
    pytest.skip("the documentation is not here", allow_module_level=True)

(_PROGRAM,) = re.findall(r"```python\n(.*?)```", _PAGE.read_text(), re.S)
# The functions of the page, without what it does with them.
_FUNCTIONS = _PROGRAM[: _PROGRAM.index("with tempfile")]

# A process saves without a pause, and says which saves are done. It is killed at a
# random moment. Python starts once; processes are forked before JAX computes anything.
_KILLS = """
import random, signal, sys, time, warnings
import numpy as np

warnings.simplefilter("ignore")
path = pathlib.Path(sys.argv[1]) / "run"
random.seed(0)
size = 400_000

def state(i):
    return {"step": np.array(i), "first": np.full(size, i), "last": np.full(size, i)}

interrupted = 0
for _ in range(60):
    began = load(path, state(0))["step"].item() if path.exists() else 0
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        for i in range(began + 1, began + 10**6):
            save(path, state(i))
            os.write(writer, i.to_bytes(8, "little"))
    os.close(writer)
    done = int.from_bytes(os.read(reader, 8), "little")  # The first save is done.
    time.sleep(random.uniform(0, 0.02))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(reader, 8):
        done = int.from_bytes(more, "little")
    os.close(reader)
    found = load(path, state(0))
    assert found["step"] in (done, done + 1), (found["step"], done)
    assert np.all(found["first"] == found["step"])
    assert np.all(found["last"] == found["step"])
    interrupted += path.with_name("run.new").exists()
print(interrupted)
"""


@pytest.mark.slow
def test_a_killed_process_leaves_a_complete_save(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", _FUNCTIONS + _KILLS, str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    # It was killed in the middle of saving, too.
    assert int(run.stdout) > 5


# Trains, and kills itself while it writes the save after the fourth step.
_KILLED = """
import signal, sys

def killed(descriptor):
    if os.fstat(descriptor).st_size and killed.left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    killed.left -= 1

killed.left, os.fsync = 6, killed  # A save makes two calls.
train(pathlib.Path(sys.argv[1]) / "run", 6)
"""
_RESUMED = """
import sys

folder = pathlib.Path(sys.argv[1])
print(int(load(folder / "run", start())[2]))
train(folder / "run", 6)
train(folder / "at_once", 6)
"""


@pytest.mark.exhaustive
def test_a_resumed_run_has_the_bits_of_one_that_was_not_killed(tmp_path):
    def run(program):
        command = [sys.executable, "-c", _FUNCTIONS + program, str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True)

    killed = run(_KILLED)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    resumed = run(_RESUMED)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert resumed.stdout == "3\n"
    at_once = (tmp_path / "at_once").read_bytes()
    assert len(at_once) > 1000
    assert (tmp_path / "run").read_bytes() == at_once


# States.


def _everything(dtype):
    """What a run with all of nodegrad's states in it has to save."""
    net = eqx.nn.MLP(2, 2, 4, 1, jnp.tanh, key=jr.PRNGKey(0), dtype=dtype)
    params = eqx.filter(net, eqx.is_inexact_array)
    fn = nodegrad.value_grad_and_curvature(
        lambda net, x: jnp.sum(jax.vmap(net)(x) ** 2, axis=1), moments=True
    )
    schedule = lambda count: 0.1 * jnp.exp(-count.astype(float))
    optim = nodegrad.snopt(schedule, momentum=0.9)

    @eqx.filter_jit
    def update(net, state):
        _, grads, curvature = fn(net, jnp.ones((4, 2), dtype), key=jr.PRNGKey(1))
        return curvature, optim.update(grads, state, params, curvature=curvature)[1]

    curvature, state = update(net, optim.init(params))
    time = nodegrad.terminal_time(lambda params: params, penalty=0.1)
    return net, curvature, state, time.init(jnp.array(2.0)), 3, jr.PRNGKey(2)


def _blank(tree):
    return jax.tree.map(lambda x: jnp.zeros_like(x) if eqx.is_array(x) else x, tree)


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype", [jnp.float64, pytest.param(jnp.bfloat16, marks=pytest.mark.exhaustive)]
)
def test_states_are_saved_without_pickle(tmp_path, dtype):
    everything = _everything(dtype)
    path = tmp_path / "run.eqx"
    eqx.tree_serialise_leaves(path, everything)
    found = eqx.tree_deserialise_leaves(path, _blank(everything))
    assert eqx.tree_equal(found, everything)
    # Where NumPy pickles, the type of the array is that of objects.
    assert b"|O" not in path.read_bytes()
    # No leaf is a function of nodegrad, whose state would be lost.
    _, *states, _, _ = everything
    assert all(eqx.is_array(x) for x in jax.tree.leaves(states))


@pytest.mark.slow
def test_orbax_saves_the_same(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    everything = _everything(jnp.float64)
    arrays, functions = eqx.partition(everything, eqx.is_array)
    with ocp.CheckpointManager(tmp_path / "runs") as manager:
        manager.save(3, args=ocp.args.StandardSave(arrays))
        manager.wait_until_finished()
        like = ocp.args.StandardRestore(_blank(arrays))
        found = manager.restore(3, args=like)
    assert eqx.tree_equal(eqx.combine(found, functions), everything)
