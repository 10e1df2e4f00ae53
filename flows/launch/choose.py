"""Which launcher a run gets, and which GPUs. Docker's client is loaded only where it may be needed: it takes a while."""

import contextlib
import os
import threading
from collections.abc import Mapping
from pathlib import Path

from flows.launch.process import ProcessLauncher
from flows.launch.protocol import Launcher
from stages.contracts.config import PipelineConfig
from stages.contracts.launch_settings import Gpus, LaunchSettings, machine_has_gpus


def launcher_for(config: PipelineConfig) -> Launcher:
    """The launcher of a configuration."""
    if not in_containers(config.launch):
        return ProcessLauncher(visible_gpus=config.launch.visible_to_processes(os.environ.get("CUDA_VISIBLE_DEVICES")))
    from flows.launch.docker import DockerLauncher

    return DockerLauncher(config)


def in_the_way(config: PipelineConfig) -> str | None:
    """Why stages could not run, as far as it is seen without starting one. None: nothing is known."""
    if not in_containers(config.launch):
        return None
    from flows.launch.docker_checks import check_engines
    from flows.launch.docker_engine import NotReady

    try:
        check_engines(config, os.environ)
    except NotReady as error:
        return str(error)
    return None


def in_containers(settings: LaunchSettings) -> bool:
    """Whether stages run in containers: as `launch.by` says, or where there are GPUs and an engine to give them."""
    if settings.by != "auto" or settings.hosts:
        return settings.by != "process"
    if not machine_has_gpus():
        return False
    from flows.launch.docker_engine import answers, default_host

    return answers(default_host())


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
    from flows.launch.docker_engine import NotReady, connected, default_host
    from flows.launch.docker_leftovers import remove_leftovers

    for host in dict.fromkeys(config.launch.hosts or (default_host(),)):
        with contextlib.suppress(NotReady), connected(host) as client:  # the next start of a stage there removes them
            remove_leftovers(client, host, workspace, attempt="", run="", stop=threading.Event(), say=print)
