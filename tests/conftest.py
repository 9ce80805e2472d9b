"""What tests share."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """A process can map only so many compiled programs; here, none is of use to another file."""
    yield
    jax.clear_caches()
