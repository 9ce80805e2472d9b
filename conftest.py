"""Doctest examples see what a user imports."""

import jax
import jax.numpy as jnp
import optax
import pytest

import robustloss as rl


@pytest.fixture(autouse=True)
def _names(doctest_namespace):
    doctest_namespace.update(jax=jax, jnp=jnp, optax=optax, rl=rl)
