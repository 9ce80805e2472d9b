"""Linear regression that outliers do not spoil: to the last digit, with standard errors."""

from robustloss.linear.fit import fit_linear
from robustloss.linear.result import LinearFit

__all__ = ["LinearFit", "fit_linear"]
