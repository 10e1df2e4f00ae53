"""What tests of several parts share."""

from collections.abc import Iterator

import pytest
from distributed import GlooPool


@pytest.fixture(scope="session")
def pool() -> Iterator[GlooPool]:
    """Processes that run a function together: `pool.run(fn, world_size, *args)`; see tests/distributed.py."""
    gloo = GlooPool()
    yield gloo
    gloo.close()
