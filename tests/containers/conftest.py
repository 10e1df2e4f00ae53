"""Tests with a real Docker engine, and images that `tests/containers/prepare.sh` makes: `make test-containers`. Without these
they fail."""

import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]
sys.path += [str(TESTS / "flows"), str(TESTS / "stages")]  # stand-ins and workspaces that theirs use, too

from scripted import containers_of  # noqa: E402

from flows.launch.docker_engine import connected, default_host  # noqa: E402
from flows.launch.docker_request import LABEL  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker("docker")


@pytest.fixture(scope="session")
def client() -> Iterator[Any]:
    """A client of the engine."""
    with connected(default_host()) as client:
        yield client


@pytest.fixture
def workspace(client: Any, tmp_path: Path) -> Iterator[Path]:
    """A workspace of one test, of which no container and no network may be left."""
    folder = tmp_path / f"workspace-{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    yield folder
    containers = containers_of(client, folder)
    networks = client.networks.list(filters={"label": f"{LABEL}workspace={folder}"})
    for container in containers:
        container.remove(force=True)
    for network in networks:
        network.remove()
    assert [left.name for left in (*containers, *networks)] == []
