"""Fits of any model by any optax optimiser, compiled whole."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.tree_util import Partial
from jax.typing import ArrayLike

from robustloss._arguments import (
    at_least_float32,
    check_loss,
    mask,
    ratios,
    real_array,
    relative,
    with_leaves,
)
from robustloss._convergence import Criteria, Objective, Params, ravelled
from robustloss.reduce import mean, total
from robustloss.types import Loss

__all__ = ["Fit", "fit"]

Inputs = Any  # a pytree of arrays whose first axis counts the rows
Model = Callable[[Params, Inputs], Array]

# Draws of random signs for the rows. The gradient's scale is the largest of the draws, so that an
# entry whose terms cancel in one draw still has a scale.
_SIGN_DRAWS = 3


class Optimizer(Protocol):
    """The two functions of an `optax.GradientTransformation`.

    A protocol, so that optax is imported only when a fit runs.
    """

    @property
    def init(self) -> Callable[..., Any]: ...

    @property
    def update(self) -> Callable[..., Any]: ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Fit:
    """The result of `fit`, a pytree. Under vmap each field has the batch axis in front."""

    params: Params
    """The parameters after the last step, as the pytree that was given."""
    value: Array
    """The mean loss at `params`, over all rows kept."""
    steps: Array
    """The number of steps taken."""
    converged: Array
    """Whether the four conditions that `fit` describes hold at `params`."""
    history: Array
    """The objective before each step and after the last one, `history[: steps + 1]`. The last
    value is repeated to the end of the array. In a mini-batch fit, the objective before a step is
    that of the step's batch."""


def fit(
    loss: Loss,
    model: Model,
    params: Params,
    inputs: Inputs,
    targets: ArrayLike,
    *,
    optimizer: Optimizer,
    steps: int,
    tolerance: float | None = None,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    batch_size: int | None = None,
    key: Array | None = None,
) -> Fit:
    """Minimises the mean loss of `model(params, inputs) - targets` over `params`.

    The loop is one compiled program; it is compiled again only for another shape, model,
    optimizer object, number of steps or loss function, not for another `delta` in a
    `functools.partial`. It can be vmapped over data sets, starts and loss parameters, runs on
    sharded arrays as it is, and can be differentiated in forward mode (a loop of unknown
    length has no reverse mode in JAX).

    The fit stops when four conditions hold at the returned parameters; `converged` says whether
    they did:

    - the value changed by at most `tolerance` times itself in the last step (in the last epoch,
      with mini-batches). If the value is below `tolerance` times the value at the start, that
      product takes its place;
    - each entry of the gradient is at most `tolerance**(2/3)` times the entry's scale. The scale is
      the largest magnitude that the entry has had, or would have had at the start if the influences
      of the rows had random signs. So the units of a parameter do not matter;
    - the quadratic model made of the gradient and the Hessian matrix has no step that lowers the
      value by more than `tolerance` times itself. Conjugate gradients search for such a step, with
      at most 100 products with the Hessian matrix;
    - the same search from a random direction, with as many products, finds no negative curvature.
      If the gradient at the start is exactly 0 and stays 0, the curvature must also differ from 0,
      or the value be 0: a plateau of a redescending loss, or a network whose weights are all 0, is
      a stationary point but no minimum.

    The fit also stops, unconverged, where a value is not finite. The gradient of `absolute_error`
    jumps at its minimum instead of getting small, so such a fit is not reported as converged
    unless the minimum is flat. A fit under weight decay, such as `optax.adamw`, is not reported as
    converged either: it comes to rest at the minimum of the loss plus a penalty, where the gradient
    of the mean loss is not 0. Where a model cannot be differentiated twice, the last two conditions
    are left out.

    Args:
        loss: an elementwise function of the residual, such as `rl.huber`.
        model: `model(params, inputs) -> predictions`, of the targets' shape.
        params: the start, a pytree of floating arrays.
        inputs: the second argument of the model, a pytree of arrays whose first axis counts the
            rows.
        targets: real numbers; the first axis counts the rows.
        optimizer: any optax transformation, `optax.lbfgs` with its line search included.
        steps: the largest number of steps.
        tolerance: a number >= 0, used as described above; by default 1e-12 in float64 and 1e-6 in
            float32. With 0, all steps are taken unless the gradient becomes 0.
        where: booleans that broadcast to the targets; True keeps an entry. Rows of which nothing is
            kept may hold anything in inputs and targets, NaN included.
        weights: finite numbers >= 0 that broadcast to the targets; only their ratios count.
        batch_size: rows per step, drawn without replacement in each epoch; None takes all rows
            in every step. The mean of the batches' gradients is the gradient of all rows.
        key: a `jax.random.key`, needed with `batch_size`.

    Returns:
        A `Fit`.

    Raises:
        ValueError: no steps, a negative tolerance, a batch size outside [1, rows], a missing
            key, inputs and targets with different numbers of rows, or predictions of another shape
            than the targets.
        TypeError: parameters or data that are not real numbers, or an optimizer that is not an
            optax transformation.

    >>> x = jnp.arange(8.0)
    >>> y = (2 * x + 1).at[3].set(99.0)
    >>> def line(params, x):
    ...     return params["slope"] * x + params["intercept"]
    >>> start = {"slope": 0.0, "intercept": 0.0}
    >>> found = fit(rl.huber, line, start, x, y, optimizer=optax.lbfgs(), steps=100)
    >>> print(f"{found.params['slope']:.2f} x + {found.params['intercept']:.2f}, {found.converged}")
    1.99 x + 1.19, True
    """
    check_loss(loss)
    _check_optimizer(optimizer)
    targets = real_array("targets", targets)
    params = _checked_params(params)
    inputs = jax.tree.map(partial(_input_array, len(targets) if targets.ndim else None), inputs)
    if targets.size == 0:
        raise ValueError(f"targets must have at least one row, got shape {targets.shape}")
    steps = _checked_steps(steps)
    tolerance = _checked_tolerance(tolerance, _working_dtype(params))
    keep = None if where is None else mask(where, targets.shape)
    w = None if weights is None else _normalised_weights(weights, targets.shape, where)
    # The loss and the model are traced once before `jit`, because an error can name the value of
    # delta and the shapes only here.
    jax.eval_shape(lambda: mean(loss, _predictions(model, params, inputs, targets.shape), targets))
    loss = with_leaves(loss)
    model = with_leaves(model, jax.Array, np.ndarray)
    if batch_size is not None:
        _check_batches(batch_size, key, targets, jax.tree.leaves(loss))
    return _fit(
        optimizer, steps, batch_size,
        loss, model, params, inputs, targets, keep, w, tolerance, key,
    )  # fmt: skip


@partial(jax.jit, static_argnums=range(3))
def _fit(
    optimizer: Any, steps: int, batch_size: int | None,
    loss: Partial, model: Partial, params: Params, inputs: Inputs, targets: Array,
    keep: Array | None, weights: Array | None, tolerance: Array, key: Array | None,
) -> Fit:  # fmt: skip
    if keep is not None:
        # A dropped row becomes a copy of a kept one, so that a NaN in a dropped row cannot reach
        # the gradient.
        row_kept = jnp.any(keep.reshape(len(keep), -1), axis=1)
        index = jnp.where(row_kept, jnp.arange(len(row_kept)), jnp.argmax(row_kept))
        inputs = jax.tree.map(lambda x: jnp.where(jnp.any(row_kept), x[index], 0), inputs)

    dtype = _working_dtype(params)
    weights = None if weights is None else weights.astype(dtype)
    size = jnp.asarray(targets.size, dtype) if keep is None else jnp.sum(keep, dtype=dtype)
    size = size if weights is None else jnp.sum(weights, dtype=dtype)

    def objective(params: Params, loss: Callable[..., Array] = loss) -> Array:
        predictions, y = model(params, inputs).astype(dtype), targets.astype(dtype)
        return mean(loss, predictions, y, where=keep, weights=weights).astype(dtype)

    def random_sign_gradient(key: Array) -> Array:
        signs = jax.random.rademacher(key, targets.shape, dtype)
        gradient = jax.grad(objective)(params, lambda r: signs.astype(r.dtype) * loss(r))
        return jnp.abs(ravelled(gradient, dtype))

    def batch_objective(params: Params, rows: Array, in_batch: Array) -> Array:
        x, y, k, w = jax.tree.map(lambda leaf: leaf[rows], (inputs, targets, keep, weights))
        present = jnp.broadcast_to(jnp.expand_dims(in_batch, range(1, y.ndim)), y.shape)
        k = present if k is None else present & k
        predictions, y = model(params, x).astype(dtype), y.astype(dtype)
        fraction = jnp.sum(in_batch) / len(targets)
        batch_total = total(loss, predictions, y, where=k, weights=w).astype(dtype)
        return batch_total / (fraction * jnp.where(size > 0, size, 1)).astype(dtype)

    value, gradient = jax.value_and_grad(objective)(params)
    keys = jax.random.split(jax.random.key(0), _SIGN_DRAWS)
    typical_gradient = jnp.max(lax.map(random_sign_gradient, keys), axis=0)
    criteria = Criteria(objective, jnp.asarray(tolerance, dtype), value, typical_gradient)
    history = jnp.full(steps + 1, value)
    start = _State(
        params, value, gradient, optimizer.init(params), jnp.asarray(0, jnp.int32), history
    )
    if batch_size is None or key is None:
        iteration = _full_step(objective, optimizer)
    else:
        iteration = _epoch(
            objective, batch_objective, optimizer, steps, len(targets), batch_size, key
        )
    return _minimise(iteration, criteria, start, steps)


class _State(NamedTuple):
    """A fit after some steps."""

    params: Params
    value: Array
    """The objective over all rows at `params`, a scalar."""
    gradient: Params
    """The gradient of the objective over all rows at `params`, a pytree like `params`."""
    optimizer_state: Any
    steps: Array
    """The number of steps taken, a scalar int32."""
    history: Array
    """The objective before each step taken, (the largest number of steps + 1,)."""


Iteration = Callable[[_State], _State]
"""One step on all rows, or one epoch of mini-batch steps."""


class _Progress(NamedTuple):
    """The variables of the loop over iterations.

    All but `state` and `gradient_scale` are scalars.
    """

    state: _State
    gradient_scale: Array
    """The largest magnitude that each entry of the gradient has had, (parameters,)."""
    stationary: Array
    """Whether the value and the gradient have settled, so that the curvature is to be tested."""
    next_test: Array
    """The number of steps before which the curvature is not tested again."""
    converged: Array
    ended: Array


def _minimise(iteration: Iteration, criteria: Criteria, start: _State, steps: int) -> Fit:
    """Iterates until the fit has converged, is out of steps or has a value that is not finite."""

    def iterate(progress: _Progress) -> _Progress:
        before = progress.state
        after = iteration(before)
        scale = jnp.maximum(progress.gradient_scale, criteria.magnitudes(after.gradient))
        out_of_steps = after.steps >= steps
        stationary = criteria.is_stationary(before.value, after.value, after.gradient, scale)
        stationary &= (after.steps >= progress.next_test) | out_of_steps
        ended = out_of_steps | ~jnp.isfinite(after.value)
        return progress._replace(
            state=after, gradient_scale=scale, stationary=stationary, ended=ended
        )

    def test_and_iterate(progress: _Progress) -> _Progress:
        at = progress.state
        converged = criteria.is_minimum(
            progress.stationary, at.params, at.value, at.gradient, progress.gradient_scale
        )
        # The test of the curvature costs as much as many steps, and a point that is no minimum is
        # rarely followed by one soon. So the next test comes after a quarter more steps.
        next_test = jnp.where(progress.stationary, at.steps + at.steps // 4 + 1, progress.next_test)
        tested = progress._replace(
            stationary=jnp.zeros_like(progress.stationary),
            next_test=next_test,
            converged=converged,
            ended=progress.ended | converged,
        )
        return lax.while_loop(lambda p: ~(p.stationary | p.ended), iterate, tested)

    scale, finite = criteria.magnitudes(start.gradient), jnp.isfinite(start.value)
    stationary = (jnp.max(scale) == 0) & finite
    first = _Progress(
        start, scale, stationary, jnp.zeros_like(start.steps), jnp.zeros_like(stationary), ~finite
    )
    last = lax.while_loop(lambda p: p.stationary | ~p.ended, test_and_iterate, first)
    end = last.state
    history = jnp.where(jnp.arange(steps + 1) < end.steps, end.history, end.value)
    return Fit(end.params, end.value, end.steps, last.converged, history)


def _full_step(objective: Objective, optimizer: Any) -> Iteration:
    """One step on all rows."""

    def step(at: _State) -> _State:
        params, optimizer_state = _updated(
            optimizer, objective, at.params, at.value, at.gradient, at.optimizer_state
        )
        value, gradient = _value_and_grad(objective, params, optimizer_state)
        history = at.history.at[at.steps].set(at.value)
        return _State(params, value, gradient, optimizer_state, at.steps + 1, history)

    return step


def _epoch(
    objective: Objective, batch_objective: Callable[..., Array], optimizer: Any, steps: int,
    rows: int, batch_size: int, key: Array,
) -> Iteration:  # fmt: skip
    """One step on each of the batches that the rows fall into, in a new random order."""
    batches = -(-rows // batch_size)

    def epoch(at: _State) -> _State:
        order = jax.random.permutation(jax.random.fold_in(key, at.steps), rows)
        order = jnp.resize(order, (batches * batch_size,))  # the last batch may be a short one

        def step(i: Array, carry: Any) -> Any:
            params, optimizer_state, history = carry
            first = i * batch_size
            batch_rows = lax.dynamic_slice(order, (first,), (batch_size,))
            in_batch = first + jnp.arange(batch_size) < rows
            batch = partial(batch_objective, rows=batch_rows, in_batch=in_batch)
            value, gradient = jax.value_and_grad(batch)(params)
            params, optimizer_state = _updated(
                optimizer, batch, params, value, gradient, optimizer_state
            )
            return params, optimizer_state, history.at[at.steps + i].set(value)

        taken = jnp.minimum(batches, steps - at.steps)
        start = (at.params, at.optimizer_state, at.history)
        params, optimizer_state, history = lax.fori_loop(0, taken, step, start)
        value, gradient = jax.value_and_grad(objective)(params)
        return _State(params, value, gradient, optimizer_state, at.steps + taken, history)

    return epoch


def _updated(
    optimizer: Any, objective: Objective, params: Params, value: Array, gradient: Params,
    optimizer_state: Any,
) -> tuple[Params, Any]:  # fmt: skip
    """The parameters and the optimizer's state after one step."""
    import optax  # noqa: PLC0415  (so that `import robustloss` takes no longer than `import jax`)

    updates, optimizer_state = optax.with_extra_args_support(optimizer).update(
        gradient, optimizer_state, params, value=value, grad=gradient, value_fn=objective
    )
    return optax.apply_updates(params, updates), optimizer_state


def _value_and_grad(
    objective: Objective, params: Params, optimizer_state: Any
) -> tuple[Array, Params]:
    """The value and the gradient at the new parameters.

    If the last transformation of the optimizer is a line search, its state already holds both.
    """
    import optax  # noqa: PLC0415

    line_searches = (optax.ScaleByZoomLinesearchState, optax.ScaleByBacktrackingLinesearchState)
    chained = isinstance(optimizer_state, tuple) and optimizer_state
    last = optimizer_state[-1] if chained else None
    if isinstance(last, line_searches) and last.grad is not None:
        return optax.value_and_grad_from_state(objective)(params, state=last)
    return jax.value_and_grad(objective)(params)


def _working_dtype(params: Params) -> jnp.dtype:
    """The type to compute in: the widest type of the parameters, at least float32."""
    dtypes = (at_least_float32(leaf.dtype) for leaf in jax.tree.leaves(params))
    return max(dtypes, key=lambda dtype: dtype.itemsize)


# Arguments.


def _check_optimizer(optimizer: Any) -> None:
    if not all(callable(getattr(optimizer, name, None)) for name in ("init", "update")):
        kind = type(optimizer).__name__
        raise TypeError(f"optimizer must be an optax GradientTransformation, got {kind}")


def _checked_params(params: Params) -> Params:
    params = jax.tree_util.tree_map_with_path(_floating_array, params)
    if not sum(leaf.size for leaf in jax.tree.leaves(params)):
        raise ValueError("params must hold at least one number, got none")
    return params


def _checked_steps(steps: int) -> int:
    try:
        steps = operator.index(steps)
    except TypeError:
        raise TypeError(f"steps must be an integer, got {steps!r}") from None
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps}")
    return steps


def _checked_tolerance(tolerance: float | None, dtype: jnp.dtype) -> float:
    if tolerance is None:
        # Above the rounding error of the mean loss: 4500 eps in float64, 8 eps in float32.
        return 1e-12 if dtype == jnp.float64 else 1e-6
    if not isinstance(tolerance, jax.core.Tracer) and not tolerance >= 0:
        raise ValueError(f"tolerance must be >= 0, got {tolerance}")
    return tolerance


def _normalised_weights(
    weights: ArrayLike, shape: tuple[int, ...], where: ArrayLike | None
) -> Array:
    """The weights times a power of 2 that brings the largest of them between 1 and 4."""
    axes = tuple(range(len(shape)))
    return relative(ratios(weights, shape, where, axes)[0], axes)[0]


def _predictions(model: Model, params: Params, inputs: Inputs, shape: tuple[int, ...]) -> Array:
    predictions = model(params, inputs)
    if not isinstance(predictions, jax.Array):
        kind = type(predictions).__name__
        raise TypeError(f"model must return one array, the predictions, got {kind}")
    if predictions.shape != shape:
        raise ValueError(
            "model must return predictions of the targets' shape: predictions and targets must "
            f"have equal shapes, got {predictions.shape} and {shape}"
        )
    return predictions


def _check_batches(
    batch_size: int, key: Array | None, targets: Array, parameters: list[Any]
) -> None:
    if not 1 <= batch_size <= len(targets):
        raise ValueError(f"batch_size must be in [1, {len(targets)}], got {batch_size}")
    if key is None:
        raise ValueError("a mini-batch fit needs key=jax.random.key(...)")
    if isinstance(key, int | np.integer):
        raise TypeError(f"key must be a jax.random.key, got {key}; jax.random.key({key})?")
    if not isinstance(key, jax.Array) or not (
        jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.dtype == jnp.uint32
    ):
        kind = f"dtype {key.dtype}" if hasattr(key, "dtype") else type(key).__name__
        raise TypeError(f"key must be a jax.random.key, got {kind}")
    for shape in map(np.shape, parameters):
        if len(shape) >= targets.ndim and shape[-targets.ndim] != 1:
            raise ValueError(
                "with batch_size, a parameter of the loss cannot differ by row, "
                f"got shape {shape} for targets of shape {targets.shape}"
            )


def _floating_array(path: Any, x: ArrayLike) -> Array:
    """A leaf of the parameters, with JAX's own type."""
    name = "params" + jax.tree_util.keystr(path)
    if not isinstance(x, float | jax.Array | np.ndarray | np.generic) and not hasattr(x, "dtype"):
        hint = ""
        if callable(x) or isinstance(x, bool | int | str):
            hint = (
                "; constants that are not trained belong in the model. For an Equinox module, use "
                "params, static = eqx.partition(module, eqx.is_inexact_array) and a model that "
                "calls eqx.combine(params, static)"
            )
        raise TypeError(f"params must be floating arrays, got {type(x).__name__} at {name}{hint}")
    array = real_array(name, x)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        place = f" at {name}" if path else ""
        raise TypeError(f"params must be floating arrays, got dtype {array.dtype}{place}")
    return lax.convert_element_type(array, array.dtype)


def _input_array(rows: int | None, x: Any) -> Array:
    """A leaf of the inputs, whose first axis must count the rows (None: the targets are scalar)."""
    if isinstance(x, jax.Array):
        array = x
    else:
        host = np.asarray(x)
        numbers = jnp.issubdtype(host.dtype, np.number) or host.dtype == np.bool_
        array = jnp.asarray(x) if numbers else real_array("inputs", x)
    if rows is None or array.ndim == 0 or len(array) != rows:
        raise ValueError(
            f"the first axis of inputs and targets must count the same rows, "
            f"got shape {array.shape} for {'scalar' if rows is None else rows} targets"
        )
    return array
