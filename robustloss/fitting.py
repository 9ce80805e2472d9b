"""Fits of any model by any optax optimiser, compiled whole."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.tree_util import Partial
from jax.typing import ArrayLike

from robustloss.losses._elementwise import at_least_float32, check_loss, real_array, with_leaves
from robustloss.reduce import mask, mean, nonnegative, total

if TYPE_CHECKING:
    import optax

__all__ = ["Fit", "fit"]

Params = Any  # a pytree of floating arrays
Inputs = Any  # a pytree of arrays whose first axis counts the rows
Model = Callable[[Params, Inputs], Array]
Objective = Callable[[Params], Array]


class Fit(NamedTuple):
    """What `fit` found. A pytree: under vmap each field has the batch axis in front."""

    params: Params
    """The parameters after the last step, as the pytree that was given."""
    value: Array
    """The mean loss at `params`, over all rows kept."""
    steps: Array
    """How many steps were taken."""
    converged: Array
    """Whether the test that `fit` describes held: the value still, the gradient small."""
    history: Array
    """The objective before each step and after the last, `steps + 1` numbers, then NaN. In a
    mini-batch fit it is the objective of each step's batch."""


def fit(
    loss: Callable[..., Array],
    model: Model,
    params: Params,
    inputs: Inputs,
    targets: ArrayLike,
    *,
    optimizer: optax.GradientTransformation,
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

    It stops when two things hold at once: the value changed by at most `tolerance` of itself
    in the last step (in the last epoch, with mini-batches); and the largest entry of the
    gradient is at most `tolerance**(2/3)` of what it was at the start, or of what it would be
    there if the rows' pulls had random signs, which serves a start at the optimum. `converged`
    says that this happened. The gradient of `absolute_error` jumps at its minimum instead of
    getting small, so such a fit is not reported as converged unless the minimum is flat. A
    value that is not finite ends the fit, unconverged.

    Args:
        loss: an elementwise function of the residual, such as `rl.huber`.
        model: `model(params, inputs) -> predictions`, of the targets' shape.
        params: where to start, a pytree of floating arrays.
        inputs: what the model takes: a pytree of arrays whose first axis counts the rows.
        targets: real numbers; the first axis counts the rows.
        optimizer: any optax transformation, `optax.lbfgs` with its line search included.
        steps: the most steps to take.
        tolerance: see above; by default 1e-12 in float64 and 1e-6 in float32. 0 takes all
            steps, unless the gradient becomes 0.
        where: booleans that broadcast to the targets; rows of which nothing is kept may hold
            anything, in inputs and targets.
        weights: numbers >= 0 that broadcast to the targets.
        batch_size: rows per step, drawn without replacement in each epoch; None takes all.
            The gradient of a batch is, on average over batches, that of all rows.
        key: a `jax.random.key`, needed with `batch_size`.

    Returns:
        A `Fit`.

    Raises:
        ValueError: no steps, a negative tolerance, a batch size outside [1, rows], a missing
            key, rows that do not agree, or predictions of another shape than the targets.
        TypeError: parameters or data that are not real numbers, an optimizer that is none.

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
    if not all(callable(getattr(optimizer, part, None)) for part in ("init", "update")):
        kind = type(optimizer).__name__
        raise TypeError(f"optimizer must be an optax GradientTransformation, got {kind}")
    targets = real_array("targets", targets)
    params = jax.tree.map(_floating, params)
    leaves = jax.tree.leaves(params)
    if not sum(leaf.size for leaf in leaves):
        raise ValueError("params must hold at least one number, got none")
    inputs = jax.tree.map(partial(_rows, len(targets) if targets.ndim else None), inputs)
    if targets.size == 0:
        raise ValueError(f"targets must have at least one row, got shape {targets.shape}")
    try:
        steps = operator.index(steps)
    except TypeError:
        raise TypeError(f"steps must be an integer, got {steps!r}") from None
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps}")
    if tolerance is None:
        tolerance = 1e-12 if jnp.result_type(*leaves) == jnp.float64 else 1e-6
    if not isinstance(tolerance, jax.core.Tracer) and not tolerance >= 0:
        raise ValueError(f"tolerance must be >= 0, got {tolerance}")
    keep = None if where is None else mask(where, targets.shape)
    w = None if weights is None else nonnegative(weights, targets.shape, where)
    # Told here, where delta is still a number and the shapes can be named.
    jax.eval_shape(lambda: mean(loss, model(params, inputs), targets))
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
        # A dropped row becomes a copy of a kept one, lest a NaN in it reach the gradient.
        kept = jnp.any(keep.reshape(len(keep), -1), axis=1)
        index = jnp.where(kept, jnp.arange(len(kept)), jnp.argmax(kept))
        inputs = jax.tree.map(lambda x: jnp.where(jnp.any(kept), x[index], 0), inputs)

    wide = at_least_float32(jnp.result_type(*jax.tree.leaves(params)))
    size = jnp.asarray(targets.size, wide) if keep is None else jnp.sum(keep, dtype=wide)
    size = size if weights is None else jnp.sum(weights, dtype=wide)

    def objective(params: Params) -> Array:
        predictions, y = model(params, inputs).astype(wide), targets.astype(wide)
        return mean(loss, predictions, y, where=keep, weights=weights).astype(wide)

    def signed(params: Params, w: Array) -> Array:
        predictions, y = model(params, inputs).astype(wide), targets.astype(wide)
        w = w if weights is None else w * weights
        return total(loss, predictions, y, where=keep, weights=w) / jnp.where(size > 0, size, 1)

    def of_batch(params: Params, take: Array, real: Array) -> Array:
        x, y, k, w = jax.tree.map(lambda leaf: leaf[take], (inputs, targets, keep, weights))
        here = jnp.broadcast_to(jnp.expand_dims(real, range(1, y.ndim)), y.shape)
        k = here if k is None else here & k
        predictions, y = model(params, x).astype(wide), y.astype(wide)
        share = jnp.sum(real) / len(targets)
        summed = total(loss, predictions, y, where=k, weights=w).astype(wide)
        return summed / (share * jnp.where(size > 0, size, 1)).astype(wide)

    signs = jax.random.rademacher(jax.random.key(0), targets.shape, wide)
    value, gradient = jax.value_and_grad(objective)(params)
    largest = jnp.maximum(_largest(gradient), _largest(jax.grad(signed)(params, signs)))
    at_rest = _at_rest(tolerance, value, largest)
    history = jnp.full(steps + 1, jnp.nan, value.dtype)
    start = _State(params, value, gradient, optimizer.init(params), jnp.asarray(0), history)
    if batch_size is None or key is None:
        turn = _step(objective, optimizer)
    else:
        turn = _epoch(objective, of_batch, optimizer, steps, len(targets), batch_size, key)
    return _descend(turn, at_rest, start, steps)


class _State(NamedTuple):
    """Where a fit is after `k` steps."""

    params: Params
    value: Array
    gradient: Params
    optimizer: Any
    k: Array
    history: Array


Turn = Callable[[_State], _State]


def _descend(turn: Turn, at_rest: Callable[..., Array], start: _State, steps: int) -> Fit:
    """Takes turns until the fit is at rest, out of steps or no longer finite."""

    def goes_on(carry: tuple[_State, Array]) -> Array:
        state, rest = carry
        return (state.k < steps) & ~rest & jnp.isfinite(state.value)

    def take(carry: tuple[_State, Array]) -> tuple[_State, Array]:
        before, _ = carry
        after = turn(before)
        return after, at_rest(before.value, after.value, after.gradient)

    # A perfect start has nowhere to go.
    rest = (_largest(start.gradient) == 0) & jnp.isfinite(start.value)
    end, rest = lax.while_loop(goes_on, take, (start, rest))
    history = end.history.at[end.k].set(end.value)
    return Fit(end.params, end.value, end.k, rest, history)


def _step(objective: Objective, optimizer: Any) -> Turn:
    """One step on all rows."""

    def step(at: _State) -> _State:
        params, state = _update(
            optimizer, objective, at.params, at.value, at.gradient, at.optimizer
        )
        value, gradient = _value_and_grad(objective, params, state)
        history = at.history.at[at.k].set(at.value)
        return _State(params, value, gradient, state, at.k + 1, history)

    return step


def _epoch(
    objective: Objective, of_batch: Callable[..., Array], optimizer: Any, steps: int,
    rows: int, batch_size: int, key: Array,
) -> Turn:  # fmt: skip
    """Steps on batches that together are all rows, in an order of its own."""
    batches = -(-rows // batch_size)

    def epoch(at: _State) -> _State:
        order = jax.random.permutation(jax.random.fold_in(key, at.k), rows)
        order = jnp.resize(order, (batches * batch_size,))  # the last batch may be a short one

        def step(i: Array, carry: Any) -> Any:
            params, state, history = carry
            first = i * batch_size
            take = lax.dynamic_slice(order, (first,), (batch_size,))
            batch = partial(of_batch, take=take, real=first + jnp.arange(batch_size) < rows)
            value, gradient = jax.value_and_grad(batch)(params)
            params, state = _update(optimizer, batch, params, value, gradient, state)
            return params, state, history.at[at.k + i].set(value)

        taken = jnp.minimum(batches, steps - at.k)
        start = (at.params, at.optimizer, at.history)
        params, state, history = lax.fori_loop(0, taken, step, start)
        value, gradient = jax.value_and_grad(objective)(params)
        return _State(params, value, gradient, state, at.k + taken, history)

    return epoch


def _at_rest(tolerance: Array, first: Array, largest: Array) -> Callable[..., Array]:
    """The test of `fit`'s docstring, for the first value and the largest gradient there."""

    def at_rest(before: Array, value: Array, gradient: Params) -> Array:
        # Below tolerance * first, a fit is perfect to rounding and its value mere noise.
        size = jnp.maximum(jnp.abs(value), tolerance * jnp.abs(first))
        still = jnp.abs(value - before) <= tolerance * size
        flat = _largest(gradient) <= tolerance ** (2 / 3) * largest
        return still & flat & jnp.isfinite(value)

    return at_rest


def _update(
    optimizer: Any, objective: Objective, params: Params, value: Array, gradient: Params, state: Any
) -> tuple[Params, Any]:
    import optax  # noqa: PLC0415  (`import robustloss` stays as quick as `import jax`)

    updates, state = optax.with_extra_args_support(optimizer).update(
        gradient, state, params, value=value, grad=gradient, value_fn=objective
    )
    return optax.apply_updates(params, updates), state


def _value_and_grad(objective: Objective, params: Params, state: Any) -> tuple[Array, Params]:
    """At the new params; a line search that came last in the optimizer has them already."""
    import optax  # noqa: PLC0415

    searched = (optax.ScaleByZoomLinesearchState, optax.ScaleByBacktrackingLinesearchState)
    last = state[-1] if isinstance(state, tuple) and state else None
    if isinstance(last, searched) and last.grad is not None:
        return optax.value_and_grad_from_state(objective)(params, state=last)
    return jax.value_and_grad(objective)(params)


def _largest(tree: Params) -> Array:
    return jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(tree)]))


def _check_batches(
    batch_size: int, key: Array | None, targets: Array, parameters: list[Any]
) -> None:
    if not 1 <= batch_size <= len(targets):
        raise ValueError(f"batch_size must be in [1, {len(targets)}], got {batch_size}")
    if key is None:
        raise ValueError("a mini-batch fit needs key=jax.random.key(...)")
    if isinstance(key, int):
        raise TypeError(f"key must be a jax.random.key, got {key}; jax.random.key({key})?")
    for shape in map(np.shape, parameters):
        if len(shape) >= targets.ndim and shape[-targets.ndim] != 1:
            raise ValueError(
                "with batch_size, a parameter of the loss cannot differ by row, "
                f"got shape {shape} for targets of shape {targets.shape}"
            )


def _floating(x: ArrayLike) -> Array:
    array = real_array("params", x)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"params must be floating arrays, got dtype {array.dtype}")
    return lax.convert_element_type(array, array.dtype)


def _rows(rows: int | None, x: Any) -> Array:
    array = jnp.asarray(x)
    if rows is None or array.ndim == 0 or len(array) != rows:
        raise ValueError(
            f"the first axis of inputs and targets must count the same rows, "
            f"got shape {array.shape} for {'scalar' if rows is None else rows} targets"
        )
    return array
