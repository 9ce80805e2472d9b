"""The result of a linear fit, with its tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.special import ndtr
from jax.typing import ArrayLike

from robustloss._arguments import real_array
from robustloss._numerics import normal


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "coefficients", "intercept", "scale", "weights", "residuals", "covariance", "converged",
        "steps", "unique", "_standard_errors",
    ],
    meta_fields=["several"],
)  # fmt: skip
@dataclass(frozen=True)
class LinearFit:
    """The result of `fit_linear`, a pytree.

    Where y has several columns, the targets are the last axis of every field, as they are of y.
    Under vmap each field has one more axis in front.
    """

    coefficients: Array
    """One for each column of X."""
    intercept: Array
    """0 in a fit without an intercept."""
    scale: Array
    """The robust scale of the residuals; 0 where at least half of the rows are fitted exactly."""
    weights: Array
    """`psi(r) / r` of each row; 0 where dropped, inf where MAE meets a row exactly."""
    residuals: Array
    """`y - predict(X)`, as in statistics; NaN where dropped. The residual that a loss takes has the
    opposite sign: `prediction_errors`."""
    covariance: Array
    """Of the intercept, if there is one, and the coefficients, in this order. NaN where the data do
    not identify a coefficient, and where a scale of 0 does not measure the errors."""
    converged: Array
    """Whether the equations that define the fit hold to rounding at the values returned."""
    steps: Array
    """The number of steps taken."""
    unique: Array
    """False where other coefficients are known to be as good: where columns depend on others (the
    fit is then the smallest solution), or where the objective has a level edge."""
    _standard_errors: Array | None = None
    """Kept because the entries of the covariance are squares and can leave the range of floats."""
    several: bool = False
    """Whether y had several columns."""

    @property
    def prediction_errors(self) -> Array:
        """`predict(X) - y`, the residual that a loss takes.

        So `rl.influence(loss, prediction_errors)` is the influence of each row.
        """
        return -self.residuals

    def predict(self, X: ArrayLike) -> Array:
        """`X @ coefficients + intercept`; a column for each target if there are several.

        Args:
            X: real numbers of the shape (rows, columns), or (columns,) for one row.

        Returns:
            (rows,), or (rows, targets); one axis less for one row. In a batch of fits each fit
            predicts the same rows, and the axis of the batch is in front.

        Raises:
            ValueError: X has another shape.

        >>> x = jnp.arange(8.0)[:, None]
        >>> rows = rl.fit_linear(x, 2 * x[:, 0] + 1).predict(jnp.array([[10.0], [20.0]]))
        >>> [f"{row:.3f}" for row in rows]
        ['21.000', '41.000']
        """
        if self._batched:
            return jax.vmap(lambda fit: fit.predict(X))(self)
        rows, columns = real_array("X", X), len(self.coefficients)
        if rows.ndim not in (1, 2) or rows.shape[-1] != columns:
            raise ValueError(
                f"X must have {columns} columns, in the shape (rows, {columns}), "
                f"got the shape {rows.shape}"
            )
        dtype = jnp.promote_types(rows.dtype, self.coefficients.dtype)
        coefficients = self.coefficients.astype(dtype)
        predicted = jnp.matmul(rows.astype(dtype), coefficients, precision="highest")
        intercept = self.intercept.astype(dtype)
        return predicted + jnp.broadcast_to(intercept, predicted.shape)

    def flagged(self, cutoff: float = 2.5) -> Array:
        """The rows whose residual is larger than `cutoff` scales, in the shape of `residuals`."""
        axis = -2 if self.several else -1
        scale = jnp.expand_dims(self.scale, axis)
        return jnp.abs(self.residuals) > cutoff * jnp.broadcast_to(scale, self.residuals.shape)

    def standard_errors(self) -> Array:
        """Of the intercept, if there is one, and the coefficients, in this order."""
        if self._standard_errors is not None:
            return self._standard_errors
        return jnp.sqrt(jnp.diagonal(self.covariance, axis1=-2, axis2=-1))

    def summary(self, names: Sequence[str] | None = None) -> str:
        """A table to print: coefficients, standard errors, z, p-values, 95 % intervals.

        Args:
            names: of the columns of X.

        Raises:
            ValueError: a batch of fits, several targets, or not one name for each column.
        """
        if self.coefficients.ndim != 1:
            raise ValueError(
                "summary takes one fit, got a batch or several targets: "
                "select one with jax.tree.map(lambda x: x[..., i], fit)"
            )
        columns = len(self.coefficients)
        named = [f"x{i + 1}" for i in range(columns)] if names is None else [str(x) for x in names]
        if len(named) != columns:
            raise ValueError(f"names must be {columns}, one for each column, got {len(named)}")
        values = np.asarray(self.coefficients)
        errors = np.asarray(self.standard_errors())
        if len(errors) > columns:
            named, values = ["intercept", *named], np.append(self.intercept, values)
        with np.errstate(all="ignore"):
            z = values / errors
        p = 2 * np.asarray(ndtr(-np.abs(z)))
        half = normal.TWO_SIDED_95 * errors
        low, high = values - half, values + half
        head = ["", "coef", "std err", "z", "P>|z|", "[0.025", "0.975]"]
        rows = [
            [name, *(f"{x:.4f}" for x in row[:2]), f"{row[2]:.3f}", f"{row[3]:.3f}",
             *(f"{x:.3f}" for x in row[4:])]
            for name, *row in zip(named, values, errors, z, p, low, high, strict=True)
        ]  # fmt: skip
        widths = [max(len(row[i]) for row in [head, *rows]) + 2 for i in range(len(head))]
        lines = [
            row[0].ljust(widths[0]) + "".join(
                cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)
            )
            for row in [head, *rows]
        ]  # fmt: skip
        rule = "-" * len(lines[0])
        return "\n".join([lines[0], rule, *lines[1:], rule, *self._notes(errors)])

    @property
    def _batched(self) -> bool:
        return self.coefficients.ndim > 1 + self.several

    def _notes(self, errors: np.ndarray) -> list[str]:
        """The state of the fit in words, one line for each fact."""
        residuals, weights = np.asarray(self.residuals), np.asarray(self.weights)
        kept = ~(np.isnan(residuals) & (weights == 0))
        rows = "1 row" if kept.sum() == 1 else f"{kept.sum()} rows"
        end = "converged" if bool(self.converged) else "NOT CONVERGED"
        steps = "1 step" if self.steps == 1 else f"{self.steps} steps"
        notes = [f"{rows}, scale {float(self.scale):.5g}, {end} in {steps}"]
        if not kept.any():
            notes.append("nothing to fit: every row is dropped or has the weight 0")
        elif np.isnan(residuals[kept]).any():
            notes.append("nothing is fitted: the data hold a NaN or an infinity, or the fit failed")
        elif self.scale == 0:
            met = int(np.sum(residuals[kept] == 0))
            notes.append(f"{met} of {rows} are fitted exactly, so the scale is 0")
            if np.isnan(errors).all():
                notes.append("the scale says nothing about the errors: no standard errors")
        if not bool(self.unique) and kept.any():
            notes.append("not unique: other coefficients serve as well")
        flagged = np.flatnonzero(np.asarray(self.flagged())) + 1
        if flagged.size:
            shown = ", ".join(map(str, flagged[:12])) + (", ..." if flagged.size > 12 else "")
            notes.append(f"rows beyond 2.5 scales: {shown}")
        return notes
