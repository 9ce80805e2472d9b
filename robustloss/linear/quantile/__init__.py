"""Exact quantile regression: an interior point, then the simplex method, for any number of rows."""

from robustloss.linear.quantile.fit import QuantileFit, quantile_fit

__all__ = ["QuantileFit", "quantile_fit"]
