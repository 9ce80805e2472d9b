"""Regression losses for JAX, from squared error to robust, with derivatives that hold."""

from robustloss import fitting, linear, losses, reduce, tuning, types, views
from robustloss import scale as _scale
from robustloss.fitting import *
from robustloss.linear import *
from robustloss.losses import *
from robustloss.reduce import *
from robustloss.scale import *
from robustloss.tuning import *
from robustloss.types import *
from robustloss.views import *

__all__ = ["__version__"]
__all__ += losses.__all__
__all__ += reduce.__all__
__all__ += views.__all__
__all__ += _scale.__all__
__all__ += tuning.__all__
__all__ += fitting.__all__
__all__ += linear.__all__
__all__ += types.__all__

__version__ = "0.1.0"
