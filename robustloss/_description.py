"""What can be known about a loss: its parameters, and its law relative to its own delta."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np

from robustloss._arguments import check_loss
from robustloss.types import Loss
from robustloss.views import influence, weight

_NAMED = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
# Residuals of all sizes, in units of delta.
_POSITIVE_RESIDUALS = 2.0 ** np.arange(-100, 101)
_RESIDUALS = np.concatenate([-_POSITIVE_RESIDUALS[::-1], _POSITIVE_RESIDUALS])
# An influence redescends if at both ends it is below this part of its largest value. The influence
# of `cauchy` and all other redescending losses is far below, that of `fair` near 1.
_REDESCENDED = 0.01


@dataclass(frozen=True)
class Description:
    """A loss, taken apart once. A property is computed when it is asked for."""

    loss: Loss
    function: Callable[..., Any]
    """without what `functools.partial` fixes"""
    fixed: Mapping[str, Any]
    """the keywords that `functools.partial` fixes"""
    free: Mapping[str, inspect.Parameter]
    """the other parameters; empty for a function that does not show them"""

    @property
    def name(self) -> str:
        """For messages."""
        return function_name(self.function)

    @property
    def label(self) -> str:
        """The name with the fixed keywords, for messages."""
        fixed = ", ".join(f"{name}={x}" for name, x in self.fixed.items())
        return f"{self.name}({fixed})" if fixed else self.name

    @property
    def has_delta(self) -> bool:
        """Whether the loss has a delta that is not fixed."""
        return takes(self.free, "delta")

    @property
    def is_traced(self) -> bool:
        """Whether a fixed parameter has no value yet."""
        return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(dict(self.fixed)))

    @property
    def at_unit_delta(self) -> Loss:
        """The loss of residuals in units of its delta."""
        return partial(self.loss, delta=1.0) if self.has_delta else self.loss

    @property
    def required(self) -> list[str]:
        """The parameters that have neither a value nor a default, without the residual."""
        return [
            name
            for name, x in list(self.free.items())[1:]
            if x.default is x.empty and x.kind in _NAMED
        ]

    @cached_property
    def influences(self) -> np.ndarray | None:
        """At residuals of all sizes, from below to above; None where the loss is traced."""
        with jax.ensure_compile_time_eval(), enable_x64():
            try:
                return np.asarray(influence(self.at_unit_delta, jnp.asarray(_RESIDUALS)))
            except jax.errors.TracerArrayConversionError:
                return None

    @property
    def redescends(self) -> bool | None:
        """Whether the influence returns to zero, whatever the units of delta; None where traced."""
        if self.influences is None:
            return None
        sizes = np.abs(self.influences)
        return bool(max(sizes[0], sizes[-1]) < _REDESCENDED * np.nanmax(sizes))

    @property
    def is_convex(self) -> bool:
        """Whether the influence is known never to fall, so that a fit has one minimum."""
        if self.influences is None:
            return False
        rounding = np.finfo(float).eps ** 0.75 * np.abs(self.influences[1:])
        return bool(np.all(np.diff(self.influences) >= -rounding))

    @cached_property
    def weight_at_0(self) -> float | None:
        """Infinite at a kink, 0 where the influence is 0 around 0; None where traced."""
        with jax.ensure_compile_time_eval():
            try:
                return float(weight(self.at_unit_delta, jnp.asarray(0.0)))
            except jax.errors.ConcretizationTypeError:
                return None

    @cached_property
    def bound(self) -> float | None:
        """What the loss is at infinity, in units of its delta; None where traced."""
        with jax.ensure_compile_time_eval():
            try:
                return float(self.at_unit_delta(jnp.asarray(jnp.inf)))
            except jax.errors.ConcretizationTypeError:
                return None


def describe(loss: Loss) -> Description:
    """The description of a loss; a TypeError for what is not a function."""
    check_loss(loss)
    fixed = dict(loss.keywords) if isinstance(loss, partial) else {}
    function = loss.func if isinstance(loss, partial) else loss
    free = {name: x for name, x in parameters(loss).items() if name not in fixed}
    return Description(loss, function, fixed, free)


def parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """The parameters of a function; none for one that does not show them."""
    try:
        return inspect.signature(function).parameters
    except ValueError:
        return {}


def takes(parameters: Mapping[str, inspect.Parameter], name: str) -> bool:
    """Whether one of the parameters can be given by this name."""
    return name in parameters and parameters[name].kind in _NAMED


def function_name(function: Callable[..., Any]) -> str:
    """The name of a function, or of the type of another callable."""
    function = function.func if isinstance(function, partial) else function
    return str(getattr(function, "__name__", type(function).__name__))


def enable_x64() -> Any:
    """A context in which JAX computes in float64."""
    module: Any = jax if hasattr(jax, "enable_x64") else jax.experimental  # as in jax 0.7
    return module.enable_x64(True)
