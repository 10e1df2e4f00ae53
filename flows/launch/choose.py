"""Which launcher a run gets. Docker's client is loaded only where it may be needed: it takes a while."""

import contextlib
import os
import threading
from collections.abc import Collection, Mapping
from pathlib import Path

from flows.launch.gpus import check_number, gpus_of, processes_on
from flows.launch.problems import NotReady, Problem
from flows.launch.process import ProcessLauncher
from flows.launch.protocol import Launcher
from stages.contracts import launch_settings
from stages.contracts.config import PipelineConfig
from stages.contracts.launch_settings import GPU_STAGES, Gpus, LaunchSettings, machine_has_gpus


def launcher_for(config: PipelineConfig, stages: Collection[str] = GPU_STAGES) -> Launcher:
    """The launcher of a configuration, for some stages."""
    if not in_containers(config.launch):
        return ProcessLauncher(visible_gpus=config.launch.visible_to_processes(os.environ.get("CUDA_VISIBLE_DEVICES")))
    from flows.launch.docker import DockerLauncher

    return DockerLauncher(config, stages)


def in_the_way(config: PipelineConfig, stages: Collection[str] = GPU_STAGES) -> tuple[Problem, ...]:
    """Why some stages could not run, as far as it is seen without starting one."""
    config = config.model_copy(update={"launch": decided(config.launch)[0]})
    try:
        if config.launch.by == "process":
            _check_gpus(config, stages)
        else:
            from flows.launch.docker_checks import check_engines

            check_engines(config, os.environ, stages)
    except NotReady as error:
        return error.problems
    return ()


def _check_gpus(config: PipelineConfig, stages: Collection[str]) -> None:
    """Whether this machine has a GPU for each of its processes, where they compute on GPUs.

    Raises:
        NotReady: it has not.
    """
    counts = (launch_settings.gpus_of_machine(), gpus_in_use(config.launch, os.environ).known)
    if gpus := min((count for count in counts if count is not None), default=None):
        mend = "lower layout.dp, tp or pp, or compute on the CPU: launch.gpus: none"
        check_number(gpus, processes_on(config, stages), "they see", mend)


def in_containers(settings: LaunchSettings) -> bool:
    """Whether stages run in containers: as `launch.by` says, or where there are GPUs and an engine to give them."""
    return decided(settings)[0].by == "docker"


def decided(settings: LaunchSettings) -> tuple[LaunchSettings, str | None]:
    """`auto` decided, once for a whole run, for an engine may come and go; and what a person should know of that."""
    if settings.by != "auto":
        return settings, None
    if settings.hosts:
        return settings.model_copy(update={"by": "docker"}), None
    has_gpus = machine_has_gpus()
    problem = _no_engine() if has_gpus else None
    by = "docker" if has_gpus and problem is None else "process"
    return settings.model_copy(update={"by": by}), problem and f"stages run as plain processes of this machine: {problem}"


def _no_engine() -> str | None:
    """Why this machine's engine cannot be used; None: it answers."""
    from flows.launch.docker_engine import connected, default_host

    try:
        with connected(default_host()):
            return None
    except NotReady as error:
        return str(error)


def engines_of(stage: str, settings: LaunchSettings) -> tuple[str, ...]:
    """Addresses of the engines that a stage in containers runs on: training on all, the others on the first."""
    from flows.launch.docker_engine import default_host

    hosts = settings.hosts or (default_host(),)
    return hosts if stage == "train" else hosts[:1]


def gpus_in_use(settings: LaunchSettings, ours: Mapping[str, str]) -> Gpus:
    """The GPUs that stages get which compute, in containers or as processes, which see those that CUDA_VISIBLE_DEVICES names.

    Args:
        ours: our environment.
    """
    if in_containers(settings):
        return gpus_of(settings, ours)
    visible = settings.visible_to_processes(ours.get("CUDA_VISIBLE_DEVICES"))
    return gpus_of(LaunchSettings(), {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})


def remove_left(config: PipelineConfig, workspace: Path) -> None:
    """Remove containers of runs of a workspace that nobody does any more; one that still saves its work is waited for."""
    if not in_containers(config.launch):
        return
    from flows.launch.docker_engine import connected
    from flows.launch.docker_leftovers import remove_leftovers

    for host in dict.fromkeys(engines_of("train", config.launch)):
        with contextlib.suppress(NotReady), connected(host) as client:  # the next start of a stage there removes them
            remove_leftovers(client, host, workspace, attempt="", run="", stop=threading.Event(), say=print)
