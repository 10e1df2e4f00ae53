"""What engines refuse, or break off, in a person's words: with what mends it, and never as a defect of ours."""

import contextlib
import re
import shlex
from collections.abc import Iterator

from docker.errors import DockerException
from requests import RequestException

from flows.launch.docker_engine import ssh_machine
from flows.launch.problems import NotReady, Problem

ENGINE_ERRORS = (DockerException, RequestException, OSError)
TOOLKIT = (
    "sudo apt-get install nvidia-container-toolkit && sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl "
    "restart docker (docs.nvidia.com/datacenter/cloud-native/container-toolkit)"
)


@contextlib.contextmanager
def refusals_told(host: str) -> Iterator[None]:
    """For calls of an engine, and nothing else: what goes wrong is the engine's.

    Raises:
        NotReady: it did.
    """
    try:
        yield
    except ENGINE_ERRORS as error:
        raise NotReady(problem_of(error, host)) from None


def problem_of(error: Exception, host: str) -> Problem:
    """Why an engine did not do what it was asked for."""
    told = str(getattr(error, "explanation", None) or error)
    if "could not select device driver" in told or "nvidia-container-cli" in told:
        return Problem(f"the Docker engine at {host} cannot give containers the GPUs of launch.gpus: {told}", TOOLKIT)
    if "rlimit" in told:
        return Problem(
            f"the Docker engine at {host} may not set launch.ulimits: {told}",
            "set launch.ulimits: {} for the engine's own, or to lower ones",
        )
    if missing := re.search(r"bind source path does not exist: (.+)", told):
        there = f"ssh {' '.join(ssh_machine(host))} " if host.startswith("ssh://") else "there: "
        return Problem(
            f"the machine of the Docker engine at {host} lacks the folder {missing[1]}",
            f"{there}mkdir -p {shlex.quote(missing[1])}; or, where it has content, have that there at the same path, too",
        )
    if "executable file not found" in told:
        return Problem(f"the image is none of ours: {told}", "set launch.image to one that make image-cpu or image-gpu built")
    if "address pool" in told:
        return Problem(
            f"the Docker engine at {host} has no addresses left for a network: {told}", f"docker -H {host} network prune"
        )
    if isinstance(error, OSError) and not isinstance(error, DockerException):  # requests' errors are OSErrors, too
        return Problem(f"the Docker engine at {host} does not answer any more: {told}", f"docker -H {host} version")
    return Problem(f"the Docker engine at {host} refuses: {told}", "docker info, and the engine's log")
