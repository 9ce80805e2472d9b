"""Exact quantile regression: an interior point, then the simplex method, for any number of rows."""

from robustloss.linear.quantile.vertex import Vertex, quantile_fit

__all__ = ["Vertex", "quantile_fit"]
