"""Distributes a batch of items over all devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

GROUP = 16  # items whose data fit into a cache


def distribute(function: Callable[..., Any], group: int | None = GROUP) -> Callable[..., Any]:
    """Compiles the function of one item for a batch that is split over all devices.

    The devices do not communicate. Each device computes its share in groups of items, because all
    items of a group wait for the longest line search; with None the share is one group.
    """
    split = PartitionSpec("items")

    def share(batch: Any) -> Any:
        if group is None:
            return jax.vmap(function)(batch)
        return lax.map(function, batch, batch_size=group)

    compiled = jax.jit(
        jax.shard_map(
            share, mesh=Mesh(np.array(jax.devices()), ("items",)), in_specs=split,
            out_specs=split, check_vma=False,
        )
    )  # fmt: skip

    def fill(batch: Any) -> Any:
        """The batch with repeated items, so that all groups on all devices are of one size."""
        n = len(jax.tree.leaves(batch)[0])
        unit = jax.device_count() * (group or 1)
        return jax.tree.map(lambda x: x[np.arange(n + -n % unit) % n], batch)

    def run(batch: Any) -> Any:
        n = len(jax.tree.leaves(batch)[0])
        return jax.tree.map(lambda x: x[:n], compiled(fill(batch)))

    run.lower = lambda batch: compiled.lower(fill(batch))  # type: ignore[attr-defined]
    return run
