"""Which launcher a run gets, and which GPUs. Docker's client is loaded only where it may be needed: it takes a while."""

import contextlib
import os
import threading
from collections.abc import Mapping
from pathlib import Path

from flows.launch.process import ProcessLauncher
from flows.launch.protocol import Launcher
from stages.contracts.config import PipelineConfig
from stages.contracts.launch_settings import Gpus, LaunchSettings, gpus_of_machine, machine_has_gpus


def launcher_for(config: PipelineConfig) -> Launcher:
    """The launcher of a configuration."""
    if not in_containers(config.launch):
        return ProcessLauncher(visible_gpus=config.launch.visible_to_processes(os.environ.get("CUDA_VISIBLE_DEVICES")))
    from flows.launch.docker import DockerLauncher

    return DockerLauncher(config)


def in_the_way(config: PipelineConfig) -> str | None:
    """Why stages could not run, as far as it is seen without starting one. None: nothing is known."""
    if not in_containers(config.launch):
        return _too_few_gpus(config)
    from flows.launch.docker_checks import check_engines
    from flows.launch.docker_engine import NotReady

    try:
        check_engines(config, os.environ)
    except NotReady as error:
        return str(error)
    return None


def _too_few_gpus(config: PipelineConfig) -> str | None:
    """Whether this machine has no GPU for each of its processes, where they compute on GPUs."""
    counts = (gpus_of_machine(), gpus_in_use(config.launch, os.environ).known)
    gpus = min((count for count in counts if count is not None), default=None)
    processes = processes_on(config)
    if not gpus or gpus >= processes:
        return None
    return (
        f"layout has {processes} processes (at once: dp × tp × pp of train, or tp × pp of verify), each on a GPU of its own, "
        f"and they see {gpus}. Lower layout.dp, tp or pp, or compute on the CPU: launch.gpus: none"
    )


def processes_on(config: PipelineConfig, host: str | None = None) -> int:
    """The most processes that compute at the same time on an engine's machine, by default the first: it has all of verify's."""
    is_first = host is None or host in (config.launch.hosts or (host,))[:1]
    return max(config.processes_per_machine, config.layout.tp * config.layout.pp if is_first else 0)


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
    from flows.launch.docker_engine import NotReady, connected, default_host

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


def gpus_of(settings: LaunchSettings, ours: Mapping[str, str]) -> Gpus:
    """The GPUs of each machine that stages get which compute.

    Args:
        ours: our environment.
    """
    return settings.wanted_gpus(visible=ours.get("CUDA_VISIBLE_DEVICES"), has_gpus=machine_has_gpus())


def gpus_in_use(settings: LaunchSettings, ours: Mapping[str, str]) -> Gpus:
    """The same, whether stages are containers or processes, which see those that CUDA_VISIBLE_DEVICES names."""
    if in_containers(settings):
        return gpus_of(settings, ours)
    visible = settings.visible_to_processes(ours.get("CUDA_VISIBLE_DEVICES"))
    return gpus_of(LaunchSettings(), {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})


def remove_left(config: PipelineConfig, workspace: Path) -> None:
    """Remove containers of runs of a workspace that nobody does any more; one that still saves its work is waited for."""
    if not in_containers(config.launch):
        return
    from flows.launch.docker_engine import NotReady, connected
    from flows.launch.docker_leftovers import remove_leftovers

    for host in dict.fromkeys(engines_of("train", config.launch)):
        with contextlib.suppress(NotReady), connected(host) as client:  # the next start of a stage there removes them
            remove_leftovers(client, host, workspace, attempt="", run="", stop=threading.Event(), say=print)
