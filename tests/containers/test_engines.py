"""Engines and images that cannot be used, and one that is reached in another way: what is told, and that it works."""

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_ssh
import pytest
from processes import children, lives, wait_until
from scripted import config_of, containers_of, scripted
from tls_engine import engine_behind_tls, write_certificates
from watched import Watched

from flows.launch import docker, docker_checks, docker_container, doctor
from flows.launch.docker_container import Container
from flows.launch.docker_engine import connected, default_host
from flows.launch.problems import NotReady
from flows.launch.protocol import StageFailed

BASE = f"python:{sys.version_info[0]}.{sys.version_info[1]}-slim"


def refusal(watched: Watched) -> str:
    with pytest.raises(StageFailed) as caught:
        watched.run()
    assert caught.value.reason == "bad input"
    return str(caught.value)


def test_doctor_says_that_all_is_well(client: Any, workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(config_of(workspace)) == 0, capsys.readouterr().out
    out = capsys.readouterr().out
    assert f"✓ engine      {default_host()}: Docker {client.version()['Version']}" in out
    assert "✓ containers  work: image sha256:" in out
    assert list(workspace.iterdir()) == []  # it left nothing
    assert doctor.main(config_of(workspace / "not" / "yet")) == 0
    assert list(workspace.iterdir()) == []


@pytest.mark.parametrize(
    ("launch", "what", "mend"),
    [
        ({"image": "megatron-flows:none"}, "has no image megatron-flows:none", "docker pull megatron-flows:none"),
        ({"image": BASE}, f"image {BASE} (at {default_host()}) holds no megatron-flows", "leave launch.image out"),
        ({"gpus": "all", "image": "megatron-flows:cpu"}, "NVIDIA's runtime is missing", "nvidia-container-toolkit"),
        ({"ulimits": {"nofile": 1 << 40}}, "may not set launch.ulimits", "set launch.ulimits: {}"),
        ({"hosts": ["unix:///nowhere.sock"]}, "no Docker engine answers at /nowhere.sock", "start the engine of that"),
    ],
)
def test_what_is_in_the_way_is_told_by_doctor_and_before_a_run(
    workspace: Path, capsys: pytest.CaptureFixture[str], launch: dict[str, Any], what: str, mend: str
) -> None:
    assert doctor.main(config_of(workspace, **launch)) == 1
    problem, _, command = capsys.readouterr().out.rpartition("→")
    assert what in problem
    assert mend in command
    told = refusal(scripted(workspace, "print('runs')", **launch))
    assert what in told
    assert mend in told


def test_an_image_with_other_code(client: Any, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docker_checks, "code_digest", lambda: "another")
    told = refusal(scripted(workspace, "print('runs')"))
    assert told == (
        f"train: image megatron-flows:cpu (at {default_host()}) holds another version of megatron-flows than this one. "
        "To mend it: make image-cpu"
    )
    assert containers_of(client, workspace) == []


def test_a_workspace_that_the_engine_does_not_see(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the runner is in a container itself: the engine mounts the folder of its own machine."""
    original = docker_checks._marker

    def elsewhere(folder: Path) -> Any:
        (folder / "elsewhere").mkdir()
        return original(folder / "elsewhere")

    monkeypatch.setattr(docker_checks, "_marker", elsewhere)
    assert f"shows containers another folder as {workspace} than the one of this machine" in refusal(scripted(workspace, ""))


@pytest.mark.skipif(os.getuid() != 0, reason="only root can act as another user")
def test_a_workspace_that_cannot_be_written_to(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    monkeypatch.setattr(os, "getgid", lambda: 12345)
    monkeypatch.setattr(os, "getgroups", list)
    workspace.chmod(0o755)
    told = refusal(scripted(workspace, ""))
    assert f"a container of user 12345:12345 may not write to {workspace}" in told
    assert f"To mend it: sudo chown -R 12345:12345 {workspace}" in told


def ssh_of_ours() -> list[int]:
    """The stand-ins for ssh that run for us, each behind its shim."""
    found = [pid for shim in children(os.getpid()) for pid in children(shim)]
    return [pid for pid in found if b"fake_ssh.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.fixture
def ssh_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of this machine's engine over a stand-in for ssh."""
    fake_ssh.install(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return f"ssh://me@there{default_host().removeprefix('unix://')}"


@pytest.fixture(params=["tls", "ssh"])
def breakable(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, Callable[[], object]]]:
    """The address of an engine, and what breaks the connection to it."""
    if request.param == "ssh":
        yield request.getfixturevalue("ssh_host"), lambda: [os.kill(pid, signal.SIGKILL) for pid in ssh_of_ours()]
        return
    write_certificates(tmp_path / "ours")
    monkeypatch.setenv("DOCKER_CERT_PATH", str(tmp_path / "ours"))
    with contextlib.ExitStack() as network:
        engine = default_host().removeprefix("unix://")
        yield network.enter_context(engine_behind_tls(tmp_path / "ours", engine)), network.close


def test_a_connection_that_breaks(client: Any, workspace: Path, breakable: tuple[str, Callable[[], object]]) -> None:
    """The run fails and says so. The stage, over there, saves its work and ends; what remains goes at the next start."""
    host, break_it = breakable
    code = (
        "import os, signal, sys, time\ndef save(*_):\n"
        f"    open({str(workspace / 'saved')!r}, 'w').close()\n    sys.exit(4)\n"
        "signal.signal(15, save); print('ready', flush=True); time.sleep(600)"
    )
    watched = scripted(workspace, code, hosts=[host], grace=60)
    watched.on_line = lambda line: break_it()
    with pytest.raises(StageFailed, match="the Docker engine is gone: ") as caught:
        watched.run()
    assert caught.value.reason == "killed"
    wait_until(lambda: [container.status for container in containers_of(client, workspace)] == ["exited"])
    assert (workspace / "saved").exists()
    scripted(workspace, "").run()
    assert containers_of(client, workspace) == []


def test_a_connection_to_a_container_that_breaks(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its engine still answers, and tells that it runs: it is given the time to save its work, and only then killed."""
    made: list[Container] = []

    class Cut(Container):
        def __init__(self, *asked: Any) -> None:
            made.append(self)
            super().__init__(*asked)

        def _state_after(self, seconds: float) -> dict[str, Any]:
            if seconds > 10:
                (workspace / "go").touch()
            return super()._state_after(seconds)

    monkeypatch.setattr(docker, "Container", Cut)
    monkeypatch.setattr(docker_container, "END_SECONDS", 0.0)
    code = (
        "import os, signal, sys, time\ndef save(*_):\n"
        f"    while not os.path.exists({str(workspace / 'go')!r}): time.sleep(0.01)\n"
        f"    open({str(workspace / 'saved')!r}, 'w').close()\n    sys.exit(4)\n"
        "signal.signal(15, save); print('ready', flush=True); time.sleep(600)"
    )
    watched = scripted(workspace, code, grace=60)
    watched.on_line = lambda line: made[-1]._socket.shutdown(socket.SHUT_RDWR)
    with pytest.raises(StageFailed) as caught:
        watched.run()
    assert str(caught.value) == "train: the connection to its container broke. Its last lines: ready"
    assert (caught.value.reason, caught.value.code) == ("killed", 4)
    assert (workspace / "saved").exists()


# Tells that it has the token, and that it was asked to end: a stage that would take longer than any test, unless it is.
ASKED = """
import os, signal, sys, time
signal.signal(15, lambda *_: (print("asked", flush=True), sys.exit(4)))
print(len(os.environ["HF_TOKEN"]), flush=True)
time.sleep(600)
"""


def keeps_alive(port: int) -> bool:
    """Whether the kernel looks after a connection of ours to a port of loopback that is silent: it has a timer for it."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(row[2] == f"0100007F:{port:04X}" and row[5].startswith("02:") for row in rows)


def test_an_engine_behind_tls(client: Any, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output, stop and the environment of the Hub go the same way as through a socket. Without our certificate nothing does."""
    write_certificates(tmp_path / "ours")
    write_certificates(tmp_path / "others")
    monkeypatch.setenv("HF_TOKEN", "hf_averysecrettokenofsomebody")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "others" / "ca.pem"))  # of the company: not for the engine
    engine = default_host().removeprefix("unix://")
    with engine_behind_tls(tmp_path / "ours", engine) as host:
        monkeypatch.setenv("DOCKER_CERT_PATH", str(tmp_path / "others"))
        with pytest.raises(NotReady, match=f"the Docker engine at {host} does not answer: .*certificate"), connected(host):
            pass
        monkeypatch.setenv("DOCKER_CERT_PATH", str(tmp_path / "ours"))
        watched = scripted(workspace, ASKED, node="push", hosts=[host])

        def on_line(line: str) -> None:
            watched.lines.append(line)
            if line == "29":
                assert keeps_alive(int(host.rpartition(":")[2]))
            watched.stop.set()

        watched.on_line = on_line
        with pytest.raises(StageFailed, match="stopped"):
            watched.run()
        assert watched.lines == ["29", "asked"]
        assert containers_of(client, workspace) == []


def test_an_engine_over_ssh(client: Any, workspace: Path, ssh_host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output, stop and the environment of the Hub go through the socket that ssh forwards, and ssh ends with the run."""
    monkeypatch.setenv("HF_TOKEN", "hf_averysecrettokenofsomebody")
    watched = scripted(workspace, ASKED, node="push", hosts=[ssh_host])
    programs: list[int] = []

    def on_line(line: str) -> None:
        watched.lines.append(line)
        programs.extend(ssh_of_ours())
        watched.stop.set()

    watched.on_line = on_line
    with pytest.raises(StageFailed, match="stopped"):
        watched.run()
    assert watched.lines == ["29", "asked"]
    assert programs
    assert not any(map(lives, programs))
    assert containers_of(client, workspace) == []
