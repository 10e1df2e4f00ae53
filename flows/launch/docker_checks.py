"""What is looked at before the first container of a run, and by `finetune doctor`: each problem with what mends it."""

import contextlib
import json
import os
import shlex
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from docker.errors import APIError, ImageNotFound
from requests import RequestException

from flows.launch.docker_container import Container
from flows.launch.docker_engine import HERE, NotReady, Problem, connected, default_host
from flows.launch.docker_mounts import check_places
from flows.launch.docker_request import Ask, container_name, request
from flows.launch.probe import code_digest
from stages.contracts import words
from stages.contracts.config import PipelineConfig
from stages.contracts.launch_settings import CPU_IMAGE, GPU_IMAGE, Gpus, LaunchSettings, machine_has_gpus

NCCL_SHM = 1_000_000_000  # bytes: less has failed trainings of several GPUs
OURS = {CPU_IMAGE: "make image-cpu", GPU_IMAGE: "make image-gpu"}
TOOLKIT = (
    "sudo apt-get install nvidia-container-toolkit && sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl "
    "restart docker (docs.nvidia.com/datacenter/cloud-native/container-toolkit)"
)


@dataclass(frozen=True)
class Image:
    """An image that the engine has."""

    id: str
    digest: str  # what artifacts record: of the registry it came from, else its id


def gpus_of(settings: LaunchSettings, ours: Mapping[str, str]) -> Gpus:
    """The GPUs of each machine that containers get."""
    return settings.wanted_gpus(visible=ours.get("CUDA_VISIBLE_DEVICES"), has_gpus=machine_has_gpus())


def find_image(client: Any, host: str, settings: LaunchSettings, gpus: Gpus) -> Image:
    """The image of the stages.

    Raises:
        NotReady: the engine does not have it.
    """
    name = settings.image or (GPU_IMAGE if gpus.known != 0 else CPU_IMAGE)
    try:
        image = client.images.get(name)
    except ImageNotFound:
        at = "" if host in (HERE, default_host()) else f" -H {shlex.quote(host)}"
        mend = OURS.get(name, f"docker{at} pull {shlex.quote(name)}")
        if at and name in OURS:
            mend = f"docker save {name} | docker{at} load (after {OURS[name]} here)"
        raise NotReady(Problem(f"the Docker engine at {host} has no image {name}", mend)) from None
    digests = image.attrs.get("RepoDigests") or [image.id]
    return Image(image.id, str(digests[0]))


def check_settings(config: PipelineConfig, ours: Mapping[str, str]) -> None:
    """What can be said without an engine.

    Raises:
        NotReady: a path that no container can have, too few GPUs, too little shared memory for them.
    """
    check_places(config)
    settings, gpus = config.launch, gpus_of(config.launch, ours)
    processes = config.layout.world_size // (len(settings.hosts) or 1)
    if gpus.known and gpus.known < processes:
        raise NotReady(
            Problem(
                f"layout has {processes} processes a machine, and launch.gpus={settings.gpus} gives them {gpus.known} GPUs",
                "set launch.gpus to all or to a larger number, or lower layout.dp, tp or pp",
            )
        )
    if gpus.known != 0 and processes > 1 and settings.ipc == "private" and settings.shm_size < NCCL_SHM:
        raise NotReady(_too_little_shm(f"launch.shm_size={words.size(settings.shm_size)}"))


def _too_little_shm(what: str) -> Problem:
    return Problem(
        f"{what} is too little shared memory for NCCL, which several GPUs talk through",
        "set launch.shm_size: 8GB, or leave it out",
    )


def check_gpus(client: Any, host: str, gpus: Gpus) -> None:
    """Whether the engine can give GPUs to containers. Where that is not sure, the first container tells.

    Raises:
        NotReady: NVIDIA's part of it is not there.
    """
    if gpus.known == 0:
        return
    info = client.info()
    may_have = "nvidia" in (info.get("Runtimes") or {}) or bool(info.get("CDISpecDirs"))
    if not may_have and host.startswith("unix://") and shutil.which("nvidia-container-runtime-hook") is None:
        raise NotReady(
            Problem(f"the Docker engine at {host} cannot give GPUs to containers: NVIDIA's runtime is missing", TOOLKIT)
        )


def check_engines(config: PipelineConfig, ours: Mapping[str, str]) -> None:
    """All that can be seen without starting a container.

    Raises:
        NotReady: what is in the way first.
    """
    check_settings(config, ours)
    gpus = gpus_of(config.launch, ours)
    for host in dict.fromkeys(config.launch.hosts or (default_host(),)):
        with connected(host) as client:
            check_gpus(client, host, gpus)
            find_image(client, host, config.launch, gpus)


def look_around(client: Any, host: str, ask: Ask, settings: LaunchSettings, *, workspace: Path, processes: int) -> None:
    """Run a container as a stage's would be, and compare what it sees with what is here.

    Raises:
        NotReady: it does not start, does not see the workspace, may not write to it, or holds other code than ours.
    """
    with _marker(workspace) as marker:
        seen = _probe(client, host, ask, settings, workspace, marker)
    if not seen["is_visible"]:
        raise NotReady(
            Problem(
                f"workspace: the engine at {host} shows containers another folder as {workspace} than the one of this machine",
                "keep the workspace on a disk that the engine's machine has at the same path (a network share, for several "
                "machines; not a path of a container that has the engine's socket): set workspace",
            )
        )
    if not seen["is_writable"]:
        raise NotReady(
            Problem(
                f"workspace: a container of user {os.getuid()}:{os.getgid()} may not write to {workspace} (at {host})",
                f"sudo chown -R {os.getuid()}:{os.getgid()} {shlex.quote(str(workspace))}",
            )
        )
    if seen["code"] != code_digest():
        raise NotReady(_other_code(host, settings, ask))
    if ask.gpus.known != 0 and processes > 1 and seen["shm_size"] < NCCL_SHM:
        raise NotReady(_too_little_shm(f"{words.size(seen['shm_size'])} at {host}"))


def _other_code(host: str, settings: LaunchSettings, ask: Ask) -> Problem:
    name = settings.image or (GPU_IMAGE if ask.gpus.known != 0 else CPU_IMAGE)
    mend = OURS.get(name, f"build it anew from this version of megatron-flows: docker build -t {shlex.quote(name)} …")
    return Problem(f"image {name} (at {host}) holds another version of megatron-flows than this one", mend)


@contextlib.contextmanager
def _marker(workspace: Path) -> Iterator[str]:
    """A file in the workspace that no other folder has. A workspace that is not there yet is made, and not left."""
    missing = [folder for folder in (workspace, *workspace.parents) if not folder.exists()]
    workspace.mkdir(parents=True, exist_ok=True)
    file = workspace / f".seen-{uuid.uuid4().hex}"
    file.touch()
    try:
        yield file.name
    finally:
        file.unlink()
        for folder in missing:
            with contextlib.suppress(OSError):  # somebody uses it by now
                folder.rmdir()


def _probe(client: Any, host: str, ask: Ask, settings: LaunchSettings, workspace: Path, marker: str) -> dict[str, Any]:
    ask = replace(
        ask, name=container_name("finetune", "probe", marker.removeprefix(".seen-")),
        command=["flows.launch.probe", str(workspace), marker],
    )  # fmt: skip
    try:
        container = Container(client, request(ask, settings, os.environ), {})
    except (APIError, RequestException) as error:
        raise NotReady(start_problem(error, host, settings)) from None
    try:
        said = list(container.lines())
        ending = container.ended(30)
    finally:
        container.remove()
    if ending.code or not said:
        if any("No module named" in line for line in said):
            raise NotReady(_other_code(host, settings, ask))
        raise NotReady(Problem(f"a container of {ask.image} at {host} fails: {' '.join(said[-1:])}", "look at launch.image"))
    seen: dict[str, Any] = json.loads(said[-1])
    return seen


def start_problem(error: Exception, host: str, settings: LaunchSettings) -> Problem:
    """Why an engine did not start a container, in a person's words."""
    told = str(getattr(error, "explanation", None) or error)
    if "could not select device driver" in told or "nvidia-container-cli" in told:
        return Problem(
            f"the Docker engine at {host} cannot give containers these GPUs (launch.gpus={settings.gpus}): {told}", TOOLKIT
        )
    if "rlimit" in told:
        return Problem(
            f"the Docker engine at {host} may not set launch.ulimits: {told}",
            "set launch.ulimits: {} for the engine's own, or to lower ones",
        )
    if "bind source path does not exist" in told:
        return Problem(
            f"the machine of the Docker engine at {host} lacks a folder: {told}", "make it available there at the same path"
        )
    if "executable file not found" in told:
        return Problem(f"the image is none of ours: {told}", "set launch.image to one that make image-cpu or image-gpu built")
    return Problem(f"the Docker engine at {host} does not start a container: {told}", "docker info, and the engine's log")
