"""`finetune doctor`: whether this machine, and the Docker engines that a configuration names, can do its job. What is in the
way is told with the command, or the setting, that mends it."""

import os
import platform
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from flows.launch.choose import decided, engines_of, gpus_in_use, in_the_way
from flows.launch.docker_mounts import Bind, binds_of, check_place, workspace_bind
from flows.launch.gpus import gpus_of, processes_on
from flows.launch.problems import NotReady
from stages.contracts.config import PipelineConfig, workspace_folder
from stages.contracts.launch_settings import LaunchSettings, machine_has_gpus
from stages.contracts.specs import DownloadDataSpec, DownloadModelSpec
from stages.contracts.words import count, size

LITTLE_SPACE = 10_000_000_000  # bytes: less is hardly enough for a model of any use


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    subject: str
    text: str
    mend: str | None = None  # of a problem

    def lines(self, width: int) -> str:
        mark = "✓" if self.mend is None else "✗"
        line = f"{mark} {self.subject:<{width}}  {self.text}"
        return line if self.mend is None else f"{line}\n  {'':<{width}}  → {self.mend}"


def main(config: PipelineConfig | None, workspace: str = "workspace") -> int:
    """Look at everything, print what was found; returns the number of problems.

    Args:
        config: the job; without one, this machine alone is looked at.
        workspace: what is looked at where no job names its own.
    """
    problems = 0
    for finding in examine(config, os.environ, workspace):
        print(finding.lines(width=10), flush=True)
        problems += finding.mend is not None
    if problems:
        print(f"\n{problems} {'problem' if problems == 1 else 'problems'}", file=sys.stderr)
    return problems


def examine(config: PipelineConfig | None, ours: Mapping[str, str], named: str = "workspace") -> Iterator[Finding]:
    """Everything that is looked at, one after the other."""
    yield Finding("version", ", ".join(_versions()))
    workspace = config.workspace_path if config is not None else workspace_folder(named)
    yield _space(workspace)
    if config is not None and config.push.to == "hub":
        is_set = bool(ours.get("HF_TOKEN"))
        mend = None if is_set else f"export HF_TOKEN=… (one that may write to {config.push.repo})"
        yield Finding("token", f"HF_TOKEN is {'set' if is_set else 'not set, and push.to=hub needs it'}", mend)
    asked = config.launch if config is not None else LaunchSettings()
    settings, _ = decided(asked)
    config = config and config.model_copy(update={"launch": settings})
    if settings.by == "docker":
        yield from _engines(config, settings, workspace)
    else:
        yield from _processes(asked)
        yield from _gpus(config, settings, ours)


def _versions() -> Iterator[str]:
    yield f"Python {platform.python_version()}"
    for name in ("megatron-flows", "prefect"):
        try:
            yield f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            yield f"{name}, not installed as a package"


def _space(workspace: Path) -> Finding:
    there = next(folder for folder in (workspace, *workspace.parents) if os.access(folder, os.F_OK))  # exists() may raise
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return Finding(
            "workspace", f"{workspace}: {there} cannot be written to", "choose another (workspace), or change its owner"
        )
    free = shutil.disk_usage(there).free
    mend = "make room, or set workspace to a larger disk" if free < LITTLE_SPACE else None
    return Finding("workspace", f"{workspace}: {size(free)} free", mend)


def _processes(settings: LaunchSettings) -> Iterator[Finding]:
    from flows.launch.docker_engine import connected, default_host

    yield Finding("stages", "run as plain processes of this machine")
    if settings.by == "process":
        return
    try:
        with connected(default_host()):
            pass
    except NotReady as error:
        if machine_has_gpus():
            yield from (Finding("containers", f"this machine has GPUs, but {p.what}", p.mend) for p in error.problems)
        else:
            yield Finding("containers", f"not used here, and could not be: {error.problems[0].what}")
    else:
        yield Finding("containers", "not used here; launch.by: docker would")


def _gpus(config: PipelineConfig | None, settings: LaunchSettings, ours: Mapping[str, str]) -> Iterator[Finding]:
    """What stages that are processes compute on."""
    if config is not None and (problems := in_the_way(config)):
        yield from (Finding("gpus", problem.what, problem.mend) for problem in problems)
    elif not machine_has_gpus() or gpus_in_use(settings, ours).known == 0:
        at_once = f", {count(processes_on(config))} at once" if config is not None and processes_on(config) > 1 else ""
        yield Finding("gpus", f"{'not used' if machine_has_gpus() else 'none here'}: stages compute on the CPU{at_once}")


def _engines(config: PipelineConfig | None, settings: LaunchSettings, workspace: Path) -> Iterator[Finding]:
    """The engines, one after the other; where one has a problem, the next is looked at."""
    from flows.launch.docker_checks import check_engine, check_settings, look_around
    from flows.launch.docker_engine import connected
    from flows.launch.docker_leftovers import labels
    from flows.launch.docker_refusals import refusals_told

    try:
        if config is not None:
            check_settings(config, os.environ)
        else:
            workspace = workspace if workspace.is_dir() else Path.cwd()
            check_place(workspace, "the current folder")
    except NotReady as error:
        yield from (Finding("launch", problem.what, problem.mend) for problem in error.problems)
        return
    for host in dict.fromkeys(engines_of("train", settings)):
        try:
            with connected(host) as client:
                with refusals_told(host):
                    version = client.version()["Version"]
                yield Finding("engine", f"{host}: Docker {version}")
                image = check_engine(client, host, settings, os.environ)
                look_around(
                    client, host, settings, image, _binds(config, workspace, host),
                    labels(workspace=workspace, run="", node="probe", attempt=uuid.uuid4().hex, grace=0.0),
                    workspace=workspace, processes=processes_on(config, host=host) if config is not None else 1,
                )  # fmt: skip
                gpus = gpus_of(settings, os.environ).known
                yield Finding("containers", f"work: image {image.digest[:26]}…, GPUs: {settings.gpus if gpus != 0 else 'none'}")
        except NotReady as error:
            yield from (Finding("containers", problem.what, problem.mend) for problem in error.problems)


def _binds(config: PipelineConfig | None, workspace: Path, host: str) -> list[Bind]:
    """The workspace, and on the first machine, where it is another one, what the downloads see: it has to be there, too."""
    if config is None or host.startswith("unix://") or host not in (config.launch.hosts or (host,))[:1]:
        return [workspace_bind(workspace)]
    specs = (DownloadModelSpec.of(config), DownloadDataSpec.of(config))
    return list(dict.fromkeys(bind for spec in specs for bind in binds_of(spec, os.environ)))
