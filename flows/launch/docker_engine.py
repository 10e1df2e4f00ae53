"""Connections to Docker engines: of this machine, of others over ssh or TLS. And what to do where one does not answer.

Over ssh the engine's socket is forwarded by the person's own `ssh`: their keys, their known hosts, their jump hosts. It stands
behind the shim, so it ends with us, and what runs over there notices.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flows.launch.problems import NotReady, Problem
from flows.launch.process import shim_command
from stages.contracts.launch_settings import HOST, HOST_FORMS

HERE = "unix:///var/run/docker.sock"
TIMEOUT = 60  # seconds for one answer of an engine
SSH_SECONDS = 30.0
LEAST_API = "1.40"  # the first with GPUs
INSPECT_CONTEXT = "docker context inspect -f '{{.Endpoints.docker.Host}}'"


def default_host() -> str:
    """The engine of this machine, where DOCKER_HOST names no other. A context of the docker command is not heeded."""
    return os.environ.get("DOCKER_HOST") or HERE


@contextlib.contextmanager
def connected(host: str) -> Iterator[Any]:
    """A client of the engine at an address, as of `launch.hosts`.

    Raises:
        NotReady: none answers there, or it refuses us, or it is too old.
    """
    if not HOST.fullmatch(host):  # launch.hosts has none of that kind
        raise NotReady(
            Problem(f"DOCKER_HOST={host} is no address of an engine", f"unset DOCKER_HOST for {HERE}, or set it: {HOST_FORMS}")
        )
    with contextlib.ExitStack() as stack:
        if host.startswith("ssh://"):
            client = _client(host, f"unix://{stack.enter_context(_forwarded(host))}")
        elif host.startswith("tcp://"):
            client = _client(host, host, tls=_certificates(host))
        else:
            _knock(host)
            client = _client(host, host)
        stack.callback(client.close)
        yield client


def _client(host: str, address: str, tls: Any = False) -> Any:
    import docker
    import requests

    def client(api: str) -> Any:
        made = docker.DockerClient(base_url=address, version=api, timeout=TIMEOUT, tls=tls)
        made.api.trust_env = False  # else REQUESTS_CA_BUNDLE would replace the engine's own CA, and a proxy come in between
        return made

    try:
        with contextlib.closing(client(LEAST_API)) as first:
            newest = str(first.version(api_version=False)["ApiVersion"])
    except (docker.errors.DockerException, requests.RequestException) as error:
        raise NotReady(Problem(f"the Docker engine at {host} does not answer: {error}", f"docker -H {host} version")) from None
    if _numbers(newest) < _numbers(LEAST_API):
        raise NotReady(
            Problem(f"the Docker engine at {host} is older than 19.03", "install a newer one: docs.docker.com/engine")
        )
    return client(newest)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def _knock(host: str) -> None:
    """Try the socket itself, whose refusals say more than a client's."""
    path = host.removeprefix("unix://")
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(TIMEOUT)
            probe.connect(path)
    except PermissionError:
        raise NotReady(
            Problem(
                f"the Docker socket {path} refuses this user",
                "sudo usermod -aG docker $USER && newgrp docker (whoever may use that socket is root on this machine)"
                + _context_mend(host),
            )
        ) from None
    except OSError as error:
        is_there = Path(path).exists()
        if host != HERE and not is_there:
            mend = f"start the engine of that socket, or name another's in launch.hosts or DOCKER_HOST (usually {HERE})"
        elif is_there or shutil.which("dockerd") is not None:
            mend = "sudo systemctl start docker (or sudo service docker start)"
        else:
            mend = (
                "install Docker (docs.docker.com/engine/install, or: sudo apt-get install docker.io); or set launch.by: process"
            )
        raise NotReady(Problem(f"no Docker engine answers at {path} ({error.strerror})", mend + _context_mend(host))) from None


def _context_mend(host: str) -> str:
    """How to get to the engine of a context that the docker command uses: rootless Docker, Docker Desktop, colima."""
    context = "default"
    with contextlib.suppress(OSError, ValueError, AttributeError, RuntimeError):  # no file, or no home
        file = Path(os.environ.get("DOCKER_CONFIG") or "~/.docker").expanduser() / "config.json"
        context = json.loads(file.read_text()).get("currentContext") or context
    if host != HERE or context == "default":
        return ""
    return f"; or, for that of docker's context {context}: export DOCKER_HOST=$({INSPECT_CONTEXT})"


def _certificates(host: str) -> Any:
    """What the docker command takes for TLS: ca.pem, cert.pem and key.pem in DOCKER_CERT_PATH, or in ~/.docker."""
    from docker.tls import TLSConfig

    folder = Path(os.environ.get("DOCKER_CERT_PATH") or "~/.docker").expanduser()
    ca, cert, key = (str(folder / name) for name in ("ca.pem", "cert.pem", "key.pem"))
    if missing := [name for name in (ca, cert, key) if not Path(name).is_file()]:
        raise NotReady(
            Problem(
                f"{host} needs TLS, else everybody who reaches that port is root there; {', '.join(missing)} not found",
                "put the certificates of that engine there, or name their folder: export DOCKER_CERT_PATH=FOLDER",
            )
        )
    return TLSConfig(client_cert=(cert, key), ca_cert=ca, verify=True)


def ssh_machine(host: str) -> list[str]:
    """What the ssh command is told of the machine of an engine."""
    parts = urllib.parse.urlsplit(host)
    machine = f"{parts.username}@{parts.hostname}" if parts.username else str(parts.hostname)
    return [*(["-p", str(parts.port)] if parts.port else []), machine]


@contextlib.contextmanager
def _forwarded(host: str) -> Iterator[Path]:
    """A socket of this machine that leads to the engine's on another one, for as long as this lasts."""
    machine, path = ssh_machine(host), urllib.parse.urlsplit(host).path
    remote = path if len(path) > 1 else HERE.removeprefix("unix://")
    with tempfile.TemporaryDirectory(prefix="finetune-ssh-") as folder:
        here, said = Path(folder) / "docker.sock", Path(folder) / "said"
        command = [
            "ssh", "-N", "-T", "-o", "BatchMode=yes", "-o", "ExitOnForwardFailure=yes", "-o", "ServerAliveInterval=15",
            "-o", "ServerAliveCountMax=4", "-L", f"{here}:{remote}", *machine,
        ]  # fmt: skip
        with said.open("wb") as errors:
            process = subprocess.Popen(
                shim_command(command, grace=2), stdin=subprocess.PIPE, stdout=errors, stderr=errors, start_new_session=True
            )
        try:
            give_up = time.monotonic() + SSH_SECONDS
            while not here.exists():
                if process.poll() is not None or time.monotonic() > give_up:
                    words = said.read_text(errors="replace").strip().splitlines() or ["ssh does not get there"]
                    raise NotReady(
                        Problem(
                            f"{host}: {words[-1]}",
                            f"ssh {' '.join(machine)} docker version must work without asking for a password",
                        )
                    )
                time.sleep(0.05)  # ssh gives no sign when it forwards: its socket is there
            yield here
        finally:
            assert process.stdin is not None
            process.stdin.close()  # the shim's sign
            process.wait()
