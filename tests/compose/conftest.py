"""Tests of docker-compose.yml with a real engine and what tests/compose/prepare.sh makes. Without it they fail, not skip."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "flows"))  # runners, with stand-in stages


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker("docker")
