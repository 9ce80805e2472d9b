"""The families of losses. A loss is a name in a family's `__all__`; there is no other list."""

from types import MappingProxyType

from robustloss.losses import adaptive, asymmetric, convex, redescending
from robustloss.losses.adaptive import *
from robustloss.losses.asymmetric import *
from robustloss.losses.convex import *
from robustloss.losses.redescending import *
from robustloss.types import Loss

__all__ = ["LOSSES"]
__all__ += convex.__all__
__all__ += redescending.__all__
__all__ += asymmetric.__all__
__all__ += adaptive.__all__

FAMILIES = (convex, redescending, asymmetric, adaptive)

LOSSES: MappingProxyType[str, Loss] = MappingProxyType(
    {name: getattr(family, name) for family in FAMILIES for name in family.__all__}
)
"""Every loss of the library by its name."""
