"""A sweep over all devices that are there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

FEW = 16  # data sets, few enough for a cache


def over_devices(function: Callable[..., Any], at_once: int | None = FEW) -> Callable[..., Any]:
    """The function of one item for a batch of them, compiled, the batch split over all devices.

    Each device has its own share and knows of no other. It takes a few items at a time, since all
    of these wait for the one whose line search takes longest; None takes the whole share.
    """
    split = PartitionSpec("items")

    def share(batch: Any) -> Any:
        if at_once is None:
            return jax.vmap(function)(batch)
        return lax.map(function, batch, batch_size=at_once)

    each = jax.jit(
        jax.shard_map(
            share, mesh=Mesh(np.array(jax.devices()), ("items",)), in_specs=split,
            out_specs=split, check_vma=False,
        )
    )  # fmt: skip

    def whole(batch: Any) -> Any:
        """Filled up, so that all devices and all turns have the same number."""
        n = len(jax.tree.leaves(batch)[0])
        unit = jax.device_count() * (at_once or 1)
        return jax.tree.map(lambda x: x[np.arange(n + -n % unit) % n], batch)

    def run(batch: Any) -> Any:
        n = len(jax.tree.leaves(batch)[0])
        return jax.tree.map(lambda x: x[:n], each(whole(batch)))

    run.lower = lambda batch: each.lower(whole(batch))  # type: ignore[attr-defined]
    return run
