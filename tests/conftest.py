"""What tests of several parts share."""

from collections.abc import Iterator

import pytest
from distributed import GlooPool

# Files of a minute and more. They begin first, so that none is left alone at the end when files run side by side.
LONG = ("test_end_to_end", "test_parallel", "test_trainer_golden", "test_train", "test_command")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture(scope="session")
def pool() -> Iterator[GlooPool]:
    """Processes that run a function together: `pool.run(fn, world_size, *args)`; see tests/distributed.py."""
    gloo = GlooPool()
    yield gloo
    gloo.close()
