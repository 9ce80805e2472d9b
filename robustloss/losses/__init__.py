"""The families of losses. A loss is a name in a family's `__all__`; there is no other list."""

from collections.abc import Callable
from types import MappingProxyType

from jax import Array

from robustloss.losses import adaptive, asymmetric, convex, redescending
from robustloss.losses.adaptive import *
from robustloss.losses.asymmetric import *
from robustloss.losses.convex import *
from robustloss.losses.redescending import *

FAMILIES = (convex, redescending, asymmetric, adaptive)

LOSSES: MappingProxyType[str, Callable[..., Array]] = MappingProxyType(
    {name: getattr(family, name) for family in FAMILIES for name in family.__all__}
)
"""Every loss of the library by its name."""
