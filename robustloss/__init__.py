"""Regression losses for JAX, from squared error to robust, with derivatives that hold."""

from robustloss.fitting import *
from robustloss.linear import *
from robustloss.losses import LOSSES as LOSSES
from robustloss.losses.adaptive import *
from robustloss.losses.asymmetric import *
from robustloss.losses.convex import *
from robustloss.losses.redescending import *
from robustloss.reduce import *
from robustloss.scale import *
from robustloss.tuning import *
from robustloss.views import *

__version__ = "0.1.0"
