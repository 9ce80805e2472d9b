"""Which method, tuning and scale a loss gets."""

from __future__ import annotations

import inspect
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
from robustloss._arguments import check_loss, constrained, with_leaves
from robustloss._regression import Problem
from robustloss.losses.asymmetric import quantile
from robustloss.losses.convex import absolute_error
from robustloss.losses.redescending import tukey
from robustloss.tuning import enable_x64, tune
from robustloss.views import influence, weight

Loss = Callable[..., Array]
Scale = Callable[..., Array]

METHODS = ("irls", "interior_point", "mm")


def checked_loss(loss: Loss) -> None:
    """Refuses what is no elementwise loss of a residual, or leaves a scale of its own open."""
    check_loss(loss)
    for name, parameter in _parameters(loss).items():
        if name == "scale" and not takes(loss, "delta"):
            raise ValueError(
                f"{_name(loss)} has a scale of its own, which fit_linear does not estimate: fix "
                f"it, functools.partial({_name(loss)}, scale=...), or take a loss that has a delta"
            )
        required = parameter.default is parameter.empty and parameter.kind in _NAMED
        if required and name not in ("delta", next(iter(_parameters(loss)))):
            raise ValueError(
                f"{_name(loss)} needs its {name}: functools.partial({_name(loss)}, {name}=...)"
            )
    residuals = jax.ShapeDtypeStruct((2,), jnp.float32)
    shape = jax.eval_shape(_at_unit_delta(loss), residuals).shape
    if shape != (2,):
        raise ValueError(
            f"a loss must keep the residual's shape, got shape {shape} for residuals of shape (2,)"
        )


def checked_method(loss: Loss, method: str | None) -> str:
    """The method asked for, if it is made for the loss, or else the one that is."""
    if method is None:
        if _base(loss) in (absolute_error, quantile):
            return "interior_point"
        law = redescends(loss)
        if law is None:
            raise ValueError("a loss with traced parameters does not tell its law: name the method")
        method = "mm" if law else "irls"
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if method == "irls" and np.isinf(_weight_at_0(loss)):
        raise ValueError(
            'method="irls" cannot use a loss with a kink at 0, where its weight is infinite; '
            'absolute_error and quantile have method="interior_point"'
        )
    if method == "irls" and _weight_at_0(loss) == 0:
        raise ValueError(
            f'method="irls" cannot use {_name(loss)}, whose influence is 0 around 0: '
            "rows next to the fit would have no weight in it; rl.fit minimises any loss"
        )
    return method


_NAMED = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _base(loss: Loss) -> Loss:
    return loss.func if isinstance(loss, partial) else loss


def _name(loss: Loss) -> str:
    base = _base(loss)
    return getattr(base, "__name__", type(base).__name__)


def _parameters(loss: Loss) -> dict[str, inspect.Parameter]:
    """The parameters that are not fixed yet; none for a function that does not show them."""
    try:
        parameters = inspect.signature(loss).parameters
    except ValueError:
        return {}
    fixed = loss.keywords if isinstance(loss, partial) else {}
    return {name: parameter for name, parameter in parameters.items() if name not in fixed}


def takes(loss: Loss, name: str) -> bool:
    """Whether a function has a parameter that is not fixed yet."""
    return name in _parameters(loss)


def _at_unit_delta(loss: Loss) -> Loss:
    return partial(loss, delta=1.0) if takes(loss, "delta") else loss


def redescends(loss: Loss) -> bool | None:
    """Whether the influence returns to zero, whatever the units of delta; None where traced."""
    pulls = _influences(loss)
    if pulls is None:
        return None
    sizes = np.abs(pulls)
    return bool(max(sizes[0], sizes[-1]) < 0.01 * np.nanmax(sizes))


def is_convex(loss: Loss) -> bool:
    """Whether the influence is known never to fall, so that a fit has one minimum."""
    pulls = _influences(loss)
    if pulls is None:
        return False
    rounding = np.finfo(float).eps ** 0.75 * np.abs(pulls[1:])
    return bool(np.all(np.diff(pulls) >= -rounding))


def _influences(loss: Loss) -> np.ndarray | None:
    """At residuals of all sizes, from below to above; None where parameters are traced."""
    residuals = 2.0 ** np.arange(-100, 101)
    with jax.ensure_compile_time_eval(), enable_x64():
        both = jnp.asarray(np.concatenate([-residuals[::-1], residuals]))
        try:
            return np.asarray(influence(_at_unit_delta(loss), both))
        except jax.errors.TracerArrayConversionError:
            return None


def _weight_at_0(loss: Loss) -> float:
    with jax.ensure_compile_time_eval():
        try:
            return float(weight(_at_unit_delta(loss), jnp.asarray(0.0)))
        except jax.errors.ConcretizationTypeError:
            return 1.0


def level(loss: Loss) -> Array:
    """The quantile that a loss with a kink seeks, inside (0, 1)."""
    if _base(loss) is absolute_error:
        return jnp.asarray(0.5)
    if _base(loss) is not quantile:
        raise ValueError('method="interior_point" is for absolute_error and quantile')
    fixed = loss.keywords if isinstance(loss, partial) else {}
    if "q" not in fixed:
        raise ValueError("quantile needs its q: functools.partial(rl.quantile, q=0.9)")
    law = "must be inside (0, 1), at whose ends there is no fit"
    return one_number("q", constrained("q", law, lambda q: (q > 0) & (q < 1), fixed["q"]))


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


def s_loss(loss: Loss) -> Partial:
    """The loss of the S-estimate: the same if it has a bound, else Tukey's."""
    if takes(loss, "delta"):
        with jax.ensure_compile_time_eval():
            bound = _at_unit_delta(loss)(jnp.asarray(jnp.inf))
        if not isinstance(bound, jax.core.Tracer) and np.isfinite(bound):
            return with_leaves(partial(loss, delta=tuned(loss, breakdown=0.5)))
    if redescends(loss) is False:
        raise ValueError('method="mm" is for losses whose influence returns to zero')
    return with_leaves(partial(tukey, delta=tuned(tukey, breakdown=0.5)))


def tuned(loss: Loss, **request: float) -> float:
    """`tune` for 95 % efficiency, or as requested."""
    request = request or {"efficiency": 0.95}
    fixed = loss.keywords if isinstance(loss, partial) and not loss.args else {}
    try:
        hash(tuple(fixed.values()))
    except TypeError:
        return tune(loss, **request)
    if isinstance(loss, partial) and loss.args:
        return tune(loss, **request)
    return _tuned_once(_base(loss), tuple(sorted(fixed.items())), tuple(request.items()))


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
    if weighted and not takes(scale, "weights"):
        raise ValueError(f"weights were given, but the scale {_base(scale).__name__} takes none")
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
    found = scale(r, **{name: x for name, x in known.items() if takes(scale.func, name)})
    if jnp.shape(found) != ():
        raise ValueError(
            f"the scale {_name(scale.func)} must give one number for residuals of shape {r.shape}, "
            f"got shape {jnp.shape(found)}"
        )
    return jnp.asarray(found, r.dtype)
