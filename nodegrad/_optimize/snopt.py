"""`snopt`: the optimiser, with steps from a quadratic model or with a learning rate."""

from collections.abc import Callable
from typing import Any

import numpy as np
import optax
from jaxtyping import PyTree

from .._internal.tree import check_numbers, is_traced
from .._layers.layers import chosen_layers
from .preconditioner import Scalar
from .quadratic_steps import QuadraticSteps
from .scale_by_snopt import rule_of, scale_by_snopt


# The greatest coefficient of the step before. On batches of the digits the loss ends
# higher without momentum, and higher still without a bound.
_MOMENTUM = 0.9
# The preset "robust" without a learning rate; docs/training.md has the measurements. A
# power of -1 makes the longest steps where the curvature is smallest, which is where a
# batch says least. With -1/2 densities are learned slowly.
_WITHOUT_RATE = {"power": -2 / 3, "damping": 1e-2}


def snopt(
    learning_rate: optax.ScalarOrSchedule | None = None,
    preset: str = "robust",
    *,
    momentum: Scalar | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: PyTree | Callable[[PyTree], Any] | None = None,
    moment: str | None = None,
    decay: Scalar | None = None,
    damping: Scalar | None = None,
    damping_mode: str | None = None,
    power: Scalar | None = None,
    factor_decay: Scalar | None = None,
    kl_clip: Scalar | None = None,
    layers: Callable[[str], bool] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The SNOpt optimiser: preconditioned gradients, and steps of the right length.

    *Without a learning rate* every step minimises a quadratic model of the loss of its
    batch. The step is a combination of the direction $\Delta W$ of
    `nodegrad.scale_by_snopt` and of the step before,

    $$\delta = -\alpha\, \Delta W + \mu\, \delta_{\mathrm{before}}, \qquad
      \min_{\alpha,\, 0 \le \mu \le \mu_{\max}} \langle g, \delta \rangle
      + \tfrac{1}{2} \langle \delta, (C + \lambda)\, \delta \rangle.$$

    $\Delta W$ is that of a running mean of gradients, over about three steps. $C$ is
    the curvature of the loss of the batch along these two directions, from its values
    at their ends. The damping $\lambda$ starts at a third of the curvature along
    $\Delta W$. It falls where the model predicts the loss well, and grows where it does
    not (Levenberg and Marquardt). The step that is best for a small batch is too long
    for all others, and the parameters scatter around their running mean. Where that
    costs more than 3 % of what the loss has fallen since the start, the slope
    $\langle g, \Delta W \rangle$ counts less, down to 15 %. A step that raises the loss
    of its batch by more than a hundredth, or makes it NaN, is not taken. With the
    preset `"robust"` nothing is left to tune. (If a solve in the loss may fail at other
    parameters, pass `throw=False` to it, and let the loss be NaN where `result` is not
    successful. Otherwise an evaluation at the end of a direction may raise.)

    The running mean of the parameters, over about ten steps, is
    `state.progress.average`. Evaluate and keep this one: its test loss is mostly lower.
    `eqx.combine(state.progress.average, model)` is the model with it.

    *With a learning rate* $\eta$ the optimiser is the chain
    `scale_by_snopt`, weight decay, momentum, learning rate:

    $$W \leftarrow W - \eta\, m, \qquad m \leftarrow \mu m + \Delta W + \gamma W.$$

    ```python
    import equinox as eqx
    import jax
    import nodegrad

    x = jax.numpy.linspace(-1, 1, 32)[:, None]
    y = jax.numpy.sin(3 * x)
    model = eqx.nn.MLP(1, 1, 16, 2, jax.numpy.tanh, key=jax.random.PRNGKey(0))
    loss = lambda model, x, y: ((jax.vmap(model)(x) - y) ** 2)[:, 0]
    optim = nodegrad.snopt()
    state = optim.init(eqx.filter(model, eqx.is_inexact_array))
    step, refresh = nodegrad.make_steps(optim, loss, moments=True)
    for i in range(60):
        run = refresh if i % 10 == 0 else step
        model, state, value = run(model, state, x, y, key=jax.random.PRNGKey(i))
    print(value < 1e-3)  # True
    ```

    **Arguments:**

    - `learning_rate`: `None`, or $\eta$, or a schedule.
    - `momentum`: $\mu$, and `None` for no momentum. Without a learning rate:
      $\mu_{\max}$, and `None` for 0.9; 0 saves one direction.
    - `weight_decay`: $\gamma$; `mask` selects the leaves, as in
      `optax.add_decayed_weights`. Without a learning rate it is a penalty
      $\frac{\gamma}{2} |W|^2$ of the loss, and part of the model.
    - `preset`, `moment`, `decay`, `damping`, `damping_mode`, `power`, `factor_decay`,
      `layers`: as in `nodegrad.scale_by_snopt`, but for two numbers: the preset
      `"robust"` has `power=-2/3` and `damping=0.01` without a learning rate.
    - `kl_clip`: as there, with a learning rate only.

    **Returns:** an `optax.GradientTransformationExtraArgs`; see
    `nodegrad.scale_by_snopt` for the argument `curvature` of its `update`. Without a
    learning rate `update` also needs `params`, and the extra arguments `value`, the
    loss of the batch at `params`, and `value_fn`, the loss of the batch as a function
    of parameters. If transformations before it change the gradient, it also needs
    `grad`, the gradient of that loss. `nodegrad.make_steps` passes all of these.

    **Raises:** as `nodegrad.scale_by_snopt`; `ValueError` for missing arguments of
    `update`, and for arguments that need a learning rate.

    **Cost:** with a learning rate that of `nodegrad.scale_by_snopt`, and of SGD.
    Without one also four evaluations of the loss, three of them at once: a step takes
    about twice as long as one of Adam. Its state has three more copies of the
    parameters, and a fourth of those outside of layers.

    **When not to use it:** as `nodegrad.scale_by_snopt`. Without a learning rate: with
    batches of a few dozen samples, whose noise may ask for steps shorter than 15 % of
    the best one for the batch (64 were tried); as a part of `optax.partition`, because
    the model is one of all parameters; in `optax.MultiSteps`, which would fit the model
    to the last of the small batches. What comes after it in a chain, such as a clip,
    changes the step, and not `progress.average`. With a learning rate: for
    parameters outside of layers, which get plain gradient steps; use a separate
    optimiser for them with `optax.partition`. (Without one each of their gradients is
    divided by a power of its second moment, as in a layer with identity eigenbases.)

    ??? cite "Reference"

        Liu, Chen, Theodorou: Second-order Neural ODE Optimizer, NeurIPS 2021. Martens,
        Grosse: Optimizing Neural Networks with Kronecker-factored Approximate
        Curvature, ICML 2015, sections 6 and 7 (step, momentum and damping).
    """
    given: dict[str, Any] = dict(
        moment=moment,
        decay=decay,
        damping=damping,
        power=power,
        factor_decay=factor_decay,
        kl_clip=kl_clip,
    )
    numbers: dict[str, Any] = dict(weight_decay=weight_decay)
    optional = dict(learning_rate=learning_rate, momentum=momentum)
    numbers |= {name: x for name, x in optional.items() if x is not None}
    for name, x in numbers.items():
        if name != "momentum" and callable(x):
            continue  # a schedule
        check_numbers(**{name: x})
        # JAX would trace a comparison of a known array, in a jitted function.
        if not is_traced(x) and not 0 <= np.asarray(x) < np.inf:
            msg = f"`{name}` must be finite and not negative; got {x}."
            raise ValueError(msg)
    if learning_rate is None:
        if kl_clip is not None:
            msg = (
                "`kl_clip`: without a `learning_rate` a damping that adapts itself "
                "bounds the step. Leave this argument out, or pass a `learning_rate`."
            )
            raise ValueError(msg)
        if preset == "robust":
            chosen = {name: x for name, x in given.items() if x is not None}
            given = {**_WITHOUT_RATE, **chosen}
        bound = _MOMENTUM if momentum is None else momentum
        steps = QuadraticSteps(
            rule_of(preset, damping_mode, **{**given, "kl_clip": float("inf")}),
            chosen_layers(layers),
            None if isinstance(bound, int | float) and bound == 0 else bound,
            _decay(weight_decay, mask),
        )
        return optax.GradientTransformationExtraArgs(steps.init, steps.update)
    return optax.chain(
        scale_by_snopt(preset, damping_mode=damping_mode, layers=layers, **given),
        optax.add_decayed_weights(weight_decay, mask),
        optax.identity() if momentum is None else optax.trace(momentum),
        optax.scale_by_learning_rate(learning_rate),
    )


def _decay(
    weight_decay: optax.ScalarOrSchedule, mask: PyTree | Callable[[PyTree], Any] | None
) -> optax.GradientTransformation | None:
    is_zero = isinstance(weight_decay, int | float) and weight_decay == 0
    return None if is_zero else optax.add_decayed_weights(weight_decay, mask)
