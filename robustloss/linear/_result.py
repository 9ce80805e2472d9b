"""What a linear fit found, and how it prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.special import ndtr
from jax.typing import ArrayLike

from robustloss.losses._elementwise import real_array


class LinearFit(NamedTuple):
    """What `fit_linear` found.

    A pytree: under vmap, and where y has several columns, each field has one more axis in front.
    """

    coefficients: Array
    """One for each column of X."""
    intercept: Array
    """0 in a fit without."""
    scale: Array
    """Of the residuals, robust; 0 where at least half of the rows are fitted exactly."""
    weights: Array
    """What each row counted, `psi(r) / r`; 0 where dropped, inf where MAE meets a row exactly."""
    residuals: Array
    """`y - predict(X)`; NaN where dropped."""
    covariance: Array
    """Of the intercept, where there is one, and the coefficients, in this order. NaN for those
    that the data cannot tell from others."""
    converged: Array
    """Whether what defines the fit holds, to rounding."""
    steps: Array
    """How many it took."""
    unique: Array
    """False where other coefficients are known to serve as well: columns that depend on
    others, of which the smallest solution was taken, or a MAE with a level edge."""

    def predict(self, X: ArrayLike) -> Array:
        """`X @ coefficients + intercept`; a row for each target if there are several."""
        rows = real_array("X", X)
        if rows.ndim == 0 or rows.shape[-1] != self.coefficients.shape[-1]:
            columns = self.coefficients.shape[-1]
            raise ValueError(f"X must have {columns} columns, got the shape {rows.shape}")
        return self.coefficients @ rows.T + self.intercept[..., None]

    def flagged(self, cutoff: float = 2.5) -> Array:
        """The rows whose residual is larger than `cutoff` scales."""
        return jnp.abs(self.residuals) > cutoff * self.scale[..., None]

    def standard_errors(self) -> Array:
        """The roots of the covariance's diagonal."""
        return jnp.sqrt(jnp.diagonal(self.covariance, axis1=-2, axis2=-1))

    def summary(self, names: Sequence[str] | None = None) -> str:
        """A table to print: coefficients, standard errors, z, p-values, 95 % intervals.

        Args:
            names: of the columns of X.

        Raises:
            ValueError: a batch of fits, or not one name for each column.
        """
        if self.coefficients.ndim != 1:
            raise ValueError("summary takes one fit; take one of a batch with jax.tree.map")
        columns = len(self.coefficients)
        names = [f"x{i + 1}" for i in range(columns)] if names is None else list(names)
        if len(names) != columns:
            raise ValueError(f"names must be {columns}, one for each column, got {len(names)}")
        values = np.asarray(self.coefficients)
        if len(self.covariance) > columns:
            names, values = ["intercept", *names], np.append(self.intercept, values)
        errors = np.asarray(self.standard_errors())
        with np.errstate(all="ignore"):
            z = values / errors
        p = 2 * np.asarray(ndtr(-np.abs(z)))
        low, high = values - 1.959963985 * errors, values + 1.959963985 * errors
        head = ["", "coef", "std err", "z", "P>|z|", "[0.025", "0.975]"]
        rows = [
            [name, *(f"{x:.4f}" for x in row[:2]), f"{row[2]:.3f}", f"{row[3]:.3f}",
             *(f"{x:.3f}" for x in row[4:])]
            for name, *row in zip(names, values, errors, z, p, low, high, strict=True)
        ]  # fmt: skip
        widths = [max(len(row[i]) for row in [head, *rows]) + 2 for i in range(len(head))]
        lines = [
            row[0].ljust(widths[0]) + "".join(
                cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)
            )
            for row in [head, *rows]
        ]  # fmt: skip
        rule = "-" * len(lines[0])
        flagged = np.flatnonzero(np.asarray(self.flagged())) + 1
        kept = int(np.sum(~np.isnan(np.asarray(self.residuals))))
        end = "converged" if bool(self.converged) else "NOT CONVERGED"
        steps = "1 step" if self.steps == 1 else f"{self.steps} steps"
        notes = [f"{kept} rows, scale {float(self.scale):.5g}, {end} in {steps}"]
        if not bool(self.unique):
            notes.append("not unique: other coefficients serve as well")
        if flagged.size:
            shown = ", ".join(map(str, flagged[:12])) + (", ..." if flagged.size > 12 else "")
            notes.append(f"rows beyond 2.5 scales: {shown}")
        return "\n".join([lines[0], rule, *lines[1:], rule, *notes])
