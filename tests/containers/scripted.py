"""The Docker launcher with a piece of Python instead of a stage, and what is heard of it."""

from pathlib import Path
from typing import Any

from fake_stages import changed
from watched import Watched, doing

from flows.launch.docker import DockerLauncher
from flows.launch.docker_request import LABEL
from flows.launch.protocol import StageJob
from stages.contracts.config import PipelineConfig
from stages.contracts.specs import SPECS

IN_CONTAINERS = {"by": "docker", "gpus": "none", "shm_size": "64MB"}


def config_of(workspace: Path, **launch: Any) -> PipelineConfig:
    """A small configuration, in containers."""
    return changed(workspace, launch=IN_CONTAINERS | launch)


def containers_of(client: Any, workspace: Path) -> list[Any]:
    """The containers of a workspace's runs, those that have ended, too."""
    found: list[Any] = client.containers.list(all=True, filters={"label": f"{LABEL}workspace={workspace}"}, ignore_removed=True)
    return found


def job_of(workspace: Path, node: str) -> StageJob:
    """A job whose spec is that of a node, without inputs."""
    folder = workspace / "runs" / "brisk-otter"
    file = folder / "specs" / f"{node}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    settings = {
        "train": {"settings": {"steps": 1}}, "push": {"settings": {"to": "hub", "repo": "me/mine"}},
        "download-model": {"model": {"source": "me/model"}},
    }  # fmt: skip
    spec = SPECS[node].model_validate({"workspace": str(workspace), **settings.get(node, {})})
    file.write_text(spec.model_dump_json())
    return StageJob(node, spec.STAGE, file, folder / "logs" / f"{node}.log", "brisk-otter", talks_to_hub=spec.talks_to_hub)


def scripted(workspace: Path, code: str, *, node: str = "train", grace: float = 5.0, **launch: Any) -> Watched:
    """A launch of a piece of Python in a container."""
    launcher = DockerLauncher(config_of(workspace, **launch), grace=grace)
    return Watched(doing(["python", "-c", code], launcher), job_of(workspace, node))
