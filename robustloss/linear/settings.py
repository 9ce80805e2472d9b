"""The method, tuning and scale that a loss gets, and the checks of the arguments of a fit."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial
from jax.typing import ArrayLike

from robustloss import scale as scales
from robustloss._arguments import constrained, with_leaves
from robustloss._description import Description, describe, function_name, parameters, takes
from robustloss._regression import Problem
from robustloss.losses.asymmetric import quantile
from robustloss.losses.convex import absolute_error
from robustloss.losses.redescending import tukey
from robustloss.tuning import tune
from robustloss.types import Loss

Scale = Callable[..., Array]

METHODS = ("irls", "interior_point", "mm")


def checked_loss(loss: Loss) -> Description:
    """The description of an elementwise loss, all of whose parameters but delta have a value."""
    described = describe(loss)
    name = described.name
    if takes(described.free, "scale") and not described.has_delta:
        raise ValueError(
            f"{name} has a scale of its own, which fit_linear does not estimate: fix "
            f"it, functools.partial({name}, scale=...), or take a loss that has a delta"
        )
    for parameter in described.required:
        if parameter != "delta":
            raise ValueError(
                f"{name} needs its {parameter}: functools.partial({name}, {parameter}=...)"
            )
    residuals = jax.ShapeDtypeStruct((2,), jnp.float32)
    shape = jax.eval_shape(described.at_unit_delta, residuals).shape
    if shape != (2,):
        raise ValueError(
            f"a loss must keep the residual's shape, got shape {shape} for residuals of shape (2,)"
        )
    return described


def checked_method(described: Description, method: str | None) -> str:
    """The method that was given, if it can use the loss, or else the method of the loss."""
    if method is None:
        if described.function in (absolute_error, quantile):
            return "interior_point"
        if described.redescends is None:
            raise ValueError(
                "whether a loss with traced parameters redescends is not known: name the method"
            )
        method = "mm" if described.redescends else "irls"
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if method == "irls" and described.weight_at_0 == np.inf:
        raise ValueError(
            'method="irls" cannot use a loss with a kink at 0, where its weight is infinite; '
            'absolute_error and quantile have method="interior_point"'
        )
    if method == "irls" and described.weight_at_0 == 0:
        raise ValueError(
            f'method="irls" cannot use {described.name}, whose influence is 0 around 0: '
            "rows next to the fit would have no weight in it; rl.fit minimises any loss"
        )
    return method


def level(described: Description) -> Array:
    """The quantile that a loss with a kink seeks, inside (0, 1)."""
    if described.function is absolute_error:
        return jnp.asarray(0.5)
    if described.function is not quantile:
        raise ValueError('method="interior_point" is for absolute_error and quantile')
    if "q" not in described.fixed:
        raise ValueError("quantile needs its q: functools.partial(rl.quantile, q=0.9)")
    law = "must be inside (0, 1), at whose ends there is no fit"
    q = constrained("q", law, lambda q: (q > 0) & (q < 1), described.fixed["q"])
    return one_number("q", q)


def one_number(name: str, x: Array) -> Array:
    """Refuses an array of several numbers."""
    if x.shape != ():
        raise ValueError(f"{name} must be one number, got shape {x.shape}")
    return x


def checked_key(key: Any) -> Array:
    """The key, or always the same where it is None."""
    if key is None:
        return jax.random.key(0)
    dtype = getattr(key, "dtype", None)
    if dtype is None or not (jnp.issubdtype(dtype, jax.dtypes.prng_key) or dtype == jnp.uint32):
        raise TypeError(f"key must be a jax.random.key, got {key!r}")
    return key


def s_loss(described: Description) -> Partial:
    """The loss of the S-estimate: the same if it has a bound, else Tukey's."""
    if described.has_delta and described.bound is not None and np.isfinite(described.bound):
        return with_leaves(partial(described.loss, delta=tuned(described, breakdown=0.5)))
    if described.redescends is False:
        raise ValueError('method="mm" is for losses whose influence returns to zero')
    return with_leaves(partial(tukey, delta=tuned(describe(tukey), breakdown=0.5)))


def tuned(described: Description, **request: float) -> float:
    """`tune` for 95 % efficiency, or as requested."""
    request = request or {"efficiency": 0.95}
    fixed = tuple(sorted(described.fixed.items()))
    try:
        hash(fixed)
    except TypeError:
        return tune(described.loss, **request)
    if isinstance(described.loss, partial) and described.loss.args:
        return tune(described.loss, **request)
    return _tuned_once(described.function, fixed, tuple(request.items()))


@lru_cache
def _tuned_once(function: Loss, fixed: Any, request: Any) -> float:
    return tune(partial(function, **dict(fixed)) if fixed else function, **dict(request))


def residual_scale(
    scale: str | Scale | ArrayLike, weighted: bool
) -> tuple[Partial | None, ArrayLike]:
    """A function as a pytree, or None and the number that is given instead."""
    if not isinstance(scale, str) and not callable(scale):
        return None, scale
    if isinstance(scale, str):
        named = [name for name in scales.__all__ if name.islower() and name != "location_scale"]
        if scale not in named:
            known = ", ".join(named)
            raise ValueError(f"scale must be a number, a function or one of {known}, got {scale!r}")
        scale = partial(scales.proposal2, k=1.345) if scale == "proposal2" else vars(scales)[scale]
    if scale is scales.mad:
        scale = scales._mad_from_guess
    if weighted and not takes(parameters(scale), "weights"):
        raise ValueError(f"weights were given, but the scale {function_name(scale)} takes none")
    return with_leaves(scale), 1.0


def scale_of(scale: Partial, r: Array, problem: Problem, s: Array, distance: Array) -> Array:
    """The scale of residuals about 0, most likely within `distance` of s."""
    known: dict[str, Any] = {
        "center": 0.0,
        "guess": (s, distance),
        "where": problem.where,
        "weights": problem.weights,
        "ddof": problem.rank,
    }
    taken = parameters(scale.func)
    found = scale(r, **{name: x for name, x in known.items() if takes(taken, name)})
    if jnp.shape(found) != ():
        raise ValueError(
            f"the scale {function_name(scale.func)} must give one number for residuals of shape "
            f"{r.shape}, got shape {jnp.shape(found)}"
        )
    return jnp.asarray(found, r.dtype)
