"""Which launcher a run gets. Docker's client is loaded only where it may be needed: it takes a while."""

import contextlib
import os
from pathlib import Path

from flows.asked.plan import plan
from flows.launch.process import ProcessLauncher
from flows.launch.protocol import Launcher
from stages.contracts.config import PipelineConfig
from stages.contracts.launch_settings import LaunchSettings, machine_has_gpus


def launcher_for(config: PipelineConfig) -> Launcher:
    """The launcher of a configuration."""
    if not in_containers(config.launch):
        return ProcessLauncher()
    from flows.launch.docker import DockerLauncher

    return DockerLauncher(config)


def in_the_way(config: PipelineConfig) -> str | None:
    """Why stages that are still to run could not, as far as it is seen without starting one. None: nothing is known."""
    if not in_containers(config.launch) or all(node.state == "cached" for node in plan(config)):
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


def remove_left(config: PipelineConfig, workspace: Path) -> None:
    """Remove containers of runs of a workspace that nobody does any more; one that still saves its work is waited for."""
    if not in_containers(config.launch):
        return
    from flows.launch.docker_engine import NotReady, connected, default_host
    from flows.launch.docker_leftovers import remove_leftovers

    for host in dict.fromkeys(config.launch.hosts or (default_host(),)):
        with contextlib.suppress(NotReady), connected(host) as client:  # the next start of a stage there removes them
            remove_leftovers(client, workspace, attempt="", run="", say=print)
