"""Prefect: one version of it wherever it is named, and never its ephemeral server."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from ruamel.yaml import YAML

from flows.server.local import Server, client_environment, server_environment

ROOT = Path(__file__).parents[1]
PINS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")
)


def test_one_version_everywhere() -> None:
    """A server of another version than its clients may not understand them."""
    image = YAML(typ="safe").load(ROOT / "docker-compose.yml")["services"]["server"]["image"]
    assert image == f"prefecthq/prefect:{PINS['prefect']}-python3.11"
    assert YAML(typ="safe").load(ROOT / "prefect.yaml")["prefect-version"] == PINS["prefect"]
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["flows"]
    wanted = {requirement.name: requirement.specifier for requirement in map(Requirement, asked)}
    assert wanted["prefect"] == Requirement(f"prefect=={PINS['prefect']}").specifier
    assert PINS["fastapi"] in wanted["fastapi"]
    assert "0.151" not in wanted["fastapi"], "prefect 3.8.8's server does not start with it"


@pytest.mark.parametrize("server", [Server("http://127.0.0.1:4200/api", pid=1), Server("https://prefect.corp/api")])
def test_no_process_starts_a_server_of_its_own(server: Server, tmp_path: Path) -> None:
    ours = {"PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true"}
    for environment in (ours | client_environment(tmp_path, server, ours), server_environment(tmp_path, 4200, ours)):
        assert environment["PREFECT_SERVER_ALLOW_EPHEMERAL_MODE"] == "false"
    assert tomllib.loads((ROOT / "prefect.toml").read_text())["server"]["ephemeral"] == {"enabled": False}
    for service in ("server", "runner"):
        composed = YAML(typ="safe").load(ROOT / "docker-compose.yml")["services"][service]["environment"]
        assert composed["PREFECT_SERVER_ALLOW_EPHEMERAL_MODE"] == "false"
