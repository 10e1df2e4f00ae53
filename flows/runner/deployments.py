"""What `finetune serve` deploys, and `prefect.yaml` to a work pool: configurations, and single stages.

A deployment of a configuration has it as the default of its parameter `config`, so the form in the browser shows it, filled in.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import Flow
from prefect.types import BANNED_CHARACTERS

from flows.asked.load_config import BadConfig, load_config
from flows.finetune import finetune
from flows.stage_flows import STAGES
from stages.contracts.config import workspace_folder

CONFIGS = Path(__file__).parents[2] / "configs"
# Name -> configuration, and how it is launched. Without GPUs `auto` would download for hours before anything is wrong.
USUAL = {
    "demo": ("demo.yaml", ["launch.by=process"]),
    "gpu": ("llama2-7b.yaml", ["launch.by=docker", "launch.gpus=all"]),
}


@dataclass(frozen=True)
class Deployment:
    """A flow under a name, with defaults of its own."""

    flow: Flow[..., Any]
    name: str
    parameters: dict[str, Any]
    about: str

    @property
    def full_name(self) -> str:
        """As `prefect deployment run` takes it."""
        return f"{self.flow.name}/{self.name}"


def deployments(files: Sequence[Path], workspace: str | None) -> list[Deployment]:
    """The usual deployments, or those of these configurations, and one of each stage.

    Args:
        workspace: of all of them; None: each configuration's own.

    Raises:
        BadConfig: a configuration that cannot be read, two of one name, or a name that Prefect does not take.
    """
    change = [] if workspace is None else [f"workspace={workspace}"]
    if files:
        asked = [(file.stem, file, change) for file in files]
    else:
        asked = [(name, CONFIGS / file, [*launch, *change]) for name, (file, launch) in USUAL.items()]
    found: dict[str, Deployment] = {}
    for name, file, overrides in asked:
        if banned := [each for each in BANNED_CHARACTERS if each in name]:
            told = f"its deployment would be called {name}, and Prefect takes no {' '.join(banned)} in a name: rename the file"
            raise BadConfig([f"{file}: {told}"])
        if name in found:
            raise BadConfig([f"{file}: its deployment would be called {name}, as another is: rename the file"])
        found[name] = Deployment(finetune, name, _absolute(parameters_of(str(file), overrides)), file.name)
    place = {"workspace": workspace} if workspace is not None else {}  # else that of the runner which does it
    stages = [Deployment(stage, stage.fn.__name__, place, _first_line(stage)) for stage in STAGES]
    return [*found.values(), *stages]


def parameters_of(file: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The parameters of the flow for a configuration; a step of `prefect.yaml`, too.

    Raises:
        BadConfig: it cannot be read.
    """
    return {"config": load_config(Path(file), overrides).model_dump(mode="json")}


def _absolute(parameters: dict[str, Any]) -> dict[str, Any]:
    """With the workspace as it is here: who else reads a deployment, another runner say, is in another folder."""
    config = parameters["config"]
    return {"config": {**config, "workspace": str(workspace_folder(config["workspace"]))}}


def _first_line(stage: Flow[..., Any]) -> str:
    return (stage.fn.__doc__ or "").partition("\n")[0]
