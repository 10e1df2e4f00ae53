"""What is looked at before the first container of a run, and by `finetune doctor`: each problem with what mends it."""

import contextlib
import json
import os
import shlex
import shutil
import threading
import uuid
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from docker.errors import ImageNotFound

from flows.launch.choose import engines_of
from flows.launch.docker_container import Container
from flows.launch.docker_engine import HERE, connected, default_host
from flows.launch.docker_leftovers import PROBE_SECONDS
from flows.launch.docker_mounts import Bind, check_places, told_as
from flows.launch.docker_refusals import TOOLKIT, refusals_told
from flows.launch.docker_request import Ask, container_name, request
from flows.launch.gpus import check_number, gpus_of, processes_on
from flows.launch.probe import code_digest
from flows.launch.problems import NotReady, Problem
from stages.contracts import words
from stages.contracts.config import PipelineConfig
from stages.contracts.launch_settings import CPU_IMAGE, GPU_IMAGE, GPU_STAGES, LaunchSettings

MORE_GPUS = "set launch.gpus to all or to a larger number, or lower layout.dp, tp or pp"
NCCL_SHM = 1_000_000_000  # bytes: less has failed trainings of several GPUs
OURS = {CPU_IMAGE: "make image-cpu", GPU_IMAGE: "make image-gpu"}


@dataclass(frozen=True)
class Image:
    """An image that the engine has."""

    name: str
    id: str
    digest: str  # what artifacts record: of the registry it came from, else its id


def check_settings(config: PipelineConfig, ours: Mapping[str, str], stages: Collection[str] = GPU_STAGES) -> None:
    """What can be said of some stages without an engine.

    Raises:
        NotReady: a path that no container can have, too few GPUs, too little shared memory for them.
    """
    check_places(config)
    settings, gpus = config.launch, gpus_of(config.launch, ours)
    processes = processes_on(config, stages)
    if gpus.known:
        check_number(gpus.known, processes, f"launch.gpus={settings.gpus} gives them", MORE_GPUS)
    if gpus.known != 0 and processes > 1 and settings.ipc == "private" and settings.shm_size < NCCL_SHM:
        raise NotReady(_too_little_shm(f"launch.shm_size={words.size(settings.shm_size)}"))


def _too_little_shm(what: str) -> Problem:
    return Problem(
        f"{what} is too little shared memory for NCCL, which several GPUs talk through",
        "set launch.shm_size: 8GB, or leave it out",
    )


def check_engines(config: PipelineConfig, ours: Mapping[str, str], stages: Collection[str]) -> None:
    """All that can be seen of some stages without starting a container.

    Raises:
        NotReady: what is in the way first.
    """
    check_settings(config, ours, stages)
    for host in dict.fromkeys(engines_of("train", config.launch)):
        with connected(host) as client:
            check_engine(client, host, config.launch, ours)


def check_engine(client: Any, host: str, settings: LaunchSettings, ours: Mapping[str, str]) -> Image:
    """What an engine has: GPUs, if containers are to get some, and the image of the stages.

    Raises:
        NotReady: NVIDIA's part of it is not there, or it does not have the image.
    """
    wants_gpus = gpus_of(settings, ours).known != 0
    name = settings.image or (GPU_IMAGE if wants_gpus else CPU_IMAGE)
    with refusals_told(host):
        if wants_gpus:
            _check_nvidia(client.info(), host)
        try:
            image = client.images.get(name)
        except ImageNotFound:
            mend = _build(name, host) or f"docker{_at(host)} pull {shlex.quote(name)}"
            raise NotReady(Problem(f"the Docker engine at {host} has no image {name}", mend)) from None
    return Image(name, image.id, str((image.attrs.get("RepoDigests") or [image.id])[0]))


def _check_nvidia(info: dict[str, Any], host: str) -> None:
    """Where it is not sure, the first container tells."""
    may_have = "nvidia" in (info.get("Runtimes") or {}) or bool(info.get("CDISpecDirs"))
    if not may_have and host.startswith("unix://") and shutil.which("nvidia-container-runtime-hook") is None:
        raise NotReady(
            Problem(f"the Docker engine at {host} cannot give GPUs to containers: NVIDIA's runtime is missing", TOOLKIT)
        )


def _at(host: str) -> str:
    """The option of the docker command that leads to an engine."""
    return "" if host in (HERE, default_host()) else f" -H {shlex.quote(host)}"


def _build(name: str, host: str) -> str | None:
    """How to get an image of ours to an engine."""
    if name in OURS and _at(host):
        return f"docker save {name} | docker{_at(host)} load (after {OURS[name]} here)"
    return OURS.get(name)


def look_around(
    client: Any, host: str, settings: LaunchSettings, image: Image, binds: list[Bind], labels: dict[str, str], *,
    workspace: Path, processes: int,
) -> None:  # fmt: skip
    """Run a container as a stage's would be, and compare what it sees with what is here.

    Args:
        processes: that compute at the same time on that machine.

    Raises:
        NotReady: it does not start, does not see the workspace, may not write to it, has too little, or holds other code.
    """
    gpus = gpus_of(settings, os.environ)
    with _marker(workspace) as marker:
        ask = Ask(
            image=image.id, name=container_name("finetune", "probe", marker.removeprefix(".seen-")),
            command=["flows.launch.probe", str(workspace), marker], binds=binds, labels=labels, gpus=gpus,
        )  # fmt: skip
        try:
            seen = _seen(client, host, image, request(ask, settings, os.environ))
        except TimeoutError:
            slow = f"ls {shlex.quote(str(workspace))}"
            raise NotReady(
                Problem(
                    f"a container of {image.name} at {host} hangs: it said nothing within {PROBE_SECONDS} seconds",
                    f"see what does not answer on that machine: {slow}",
                )
            ) from None
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
        raise NotReady(_other_code(image, host, "another version of megatron-flows than this one"))
    if gpus.known != 0 and seen["gpus"] is not None:
        check_number(seen["gpus"], processes, f"that of {host} has", MORE_GPUS)
    if gpus.known != 0 and processes > 1 and seen["shm_size"] < NCCL_SHM:
        raise NotReady(_too_little_shm(f"{words.size(seen['shm_size'])} at {host}"))


def _other_code(image: Image, host: str, holds: str) -> Problem:
    own = "leave launch.image out for the usual one, or name one that was built from this version's containers/*.Dockerfile"
    return Problem(f"image {image.name} (at {host}) holds {holds}", _build(image.name, host) or own)


@contextlib.contextmanager
def _marker(workspace: Path) -> Iterator[str]:
    """A file in the workspace that no other folder has. A workspace that is not there yet is made, and not left."""
    file, missing = workspace / f".seen-{uuid.uuid4().hex}", list[Path]()
    try:
        with told_as(f"workspace: {workspace} cannot be written to"):
            missing = [folder for folder in (workspace, *workspace.parents) if not folder.exists()]
            workspace.mkdir(parents=True, exist_ok=True)
            file.touch()
        yield file.name
    finally:
        with contextlib.suppress(OSError):  # it was not made; or somebody else removes the workspace
            file.unlink()
        for folder in missing:
            with contextlib.suppress(OSError):  # somebody uses it by now
                folder.rmdir()


def _seen(client: Any, host: str, image: Image, asked: dict[str, Any]) -> dict[str, Any]:
    """What a probe says.

    Raises:
        TimeoutError: it said nothing, as where a disk or a GPU does not answer.
    """
    with refusals_told(host):
        container = Container(client, asked, {})
    timer = threading.Timer(PROBE_SECONDS, container.give_up)
    timer.daemon = True
    timer.start()
    try:
        said = list(container.lines())
        if container.is_given_up:
            raise TimeoutError
        ending = container.ended(PROBE_SECONDS)
    finally:
        timer.cancel()
        container.remove()
    if ending.code or not said:
        if any("No module named" in line for line in said):
            raise NotReady(_other_code(image, host, "no megatron-flows"))
        told = ending.lost or " ".join(said[-1:]) or f"it printed nothing, and its exit code is {ending.code}"
        raise NotReady(Problem(f"a container of {image.name} at {host} fails: {told}", "look at launch.image"))
    seen: dict[str, Any] = json.loads(said[-1])
    return seen
