"""docker-compose.yml as it stands, with its images under their official names: what comes up, who gets in, what survives."""

import json
import os
import secrets
import subprocess
import urllib.error
import urllib.request
import uuid
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import free_port, wait_until
from runners import Serving
from workspaces import write_model

ROOT = Path(__file__).parents[2]


class Compose:
    """The services, as a project of this test's own."""

    def __init__(self) -> None:
        self.project = f"test-{uuid.uuid4().hex[:8]}"
        self.port, self.curves = free_port(), free_port()
        self.password = f"admin:{secrets.token_hex(8)}"
        self.environment = {
            **os.environ,
            "POSTGRES_PASSWORD": secrets.token_hex(8),
            "PREFECT_API_AUTH_STRING": self.password,
            "PREFECT_PORT": str(self.port),
            "TENSORBOARD_PORT": str(self.curves),
        }

    def __call__(self, *arguments: str) -> str:
        command = ["docker", "compose", "-p", self.project, *arguments]
        done = subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr + self.logs()
        return done.stdout

    def logs(self) -> str:
        command = ["docker", "compose", "-p", self.project, "--profile", "*", "logs", "--tail", "40"]
        return subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True).stdout

    def up(self, *profiles: str) -> None:
        options = [part for profile in profiles for part in ("--profile", profile)]
        self(*options, "up", "-d", "--wait", "--wait-timeout", "240", "--pull", "never", "--no-build")

    def ask(self, path: str, body: dict[str, Any] | None = None, *, auth: str | None = "") -> Any:
        headers = {"content-type": "application/json"}
        if auth is not None:
            headers["authorization"] = "Basic " + b64encode((auth or self.password).encode()).decode()
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/api/{path}", data, headers)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=30) as answer:
            return json.loads(answer.read())

    def start(self, deployment: str, **parameters: Any) -> dict[str, Any]:
        """A flow run."""
        [deployed] = [each for each in self.ask("deployments/filter", {}) if each["name"] == deployment]
        body = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
        made: dict[str, Any] = self.ask(f"deployments/{deployed['id']}/create_flow_run", body)
        return made

    def state(self, run: dict[str, Any]) -> str:
        """Of a flow run; empty while nobody answers."""
        try:
            return str(self.ask(f"flow_runs/{run['id']}")["state"]["name"])
        except (urllib.error.URLError, OSError):
            return ""


@pytest.fixture(scope="module")
def compose() -> Iterator[Compose]:
    services = Compose()
    try:
        services.up("runner", "tensorboard")
        yield services
    finally:
        command = ["docker", "compose", "-p", services.project, "--profile", "*", "down", "--volumes", "-t", "5"]
        subprocess.run(command, cwd=ROOT, env=services.environment, capture_output=True)


def test_nobody_gets_in_without_the_password(compose: Compose) -> None:
    for auth in (None, "admin:wrong"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            compose.ask("flows/filter", {}, auth=auth)
        assert refused.value.code == 401
    assert compose.ask("health", auth=None) is True
    shown = compose("--profile", "*", "ps", "--format", "json")
    ports = [port for line in shown.splitlines() for port in json.loads(line).get("Publishers") or [] if port["PublishedPort"]]
    assert {port["URL"] for port in ports} == {"127.0.0.1"}
    assert {port["PublishedPort"] for port in ports} == {compose.port, compose.curves}


@pytest.mark.parametrize("service", ["postgres", "server"])
def test_a_restart_in_the_middle_of_a_run(
    service: str, compose: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runner on the host, with the password; the database, or the server, is away for a while."""
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", compose.password)
    runner = Serving(tmp_path, f"http://127.0.0.1:{compose.port}/api", f"mine-{service}")
    try:
        runner.make(until="verify")
        runner.wish("train", "hang")
        runner.wait_until_said("stop         Ctrl-C")
        run = compose.start(f"mine-{service}", run_name="through")
        runner.wait_until_hangs("train")
        compose("restart", "-t", "30", service)
        runner.wish("train", "")
        wait_until(lambda: compose.state(run) == "Completed", 150)
        assert runner.record("through").state == "done"
    finally:
        runner.end()


def test_the_runner_works_and_what_is_stored_survives(compose: Compose, tmp_path: Path) -> None:
    """Stages in the container's runner, whose root is read-only, then down and up."""
    deployed = {each["name"] for each in compose.ask("deployments/filter", {})}
    assert {"demo", "gpu", "convert", "train", "export"} <= deployed
    write_model(tmp_path / "base", num_hidden_layers=2)
    for path in (tmp_path / "base").iterdir():
        path.chmod(0o644)  # for the user of the container
    (tmp_path / "text.jsonl").write_text("no JSON\n")  # so that the run ends early
    for name in ("base", "text.jsonl"):
        compose("cp", str(tmp_path / name), f"runner:/workspace/{name}")
    inputs = ["model.source=/workspace/base", "data.source=/workspace/text.jsonl", "layout.tp=1"]
    run = compose.start("demo", run_name="first", overrides=[*inputs, "verify.sequence_length=32", "train.sequence_length=32"])
    wait_until(lambda: compose.state(run) == "Failed", 150)
    one = compose.start("convert", run_name="second", start_from=["first/download-model"], again=True)
    wait_until(lambda: compose.state(one) in ("Completed", "Failed"), 150)
    assert compose.state(one) == "Completed", compose.ask(f"flow_runs/{one['id']}")["state"]["message"]

    compose("--profile", "*", "down", "-t", "30")
    compose.up()
    assert (compose.state(run), compose.state(one)) == ("Failed", "Completed")
    assert {each["name"] for each in compose.ask("deployments/filter", {})} == deployed


def test_what_a_person_has_to_set_is_said() -> None:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("POSTGRES_PASSWORD", "PREFECT_API_AUTH_STRING")
    }
    done = subprocess.run(
        ["docker", "compose", "--env-file", "/dev/null", "config", "-q"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "see the first lines of docker-compose.yml" in done.stderr
