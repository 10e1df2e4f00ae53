"""Arguments that several commands have, and what they name: a configuration, a workspace, a run in it."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from flows.asked.load_config import load_config
from flows.commands.outcome import Wrong
from flows.records.go_on import workspace_option
from flows.records.run_record import RunFolder, RunRecord
from stages.contracts.config import PipelineConfig, workspace_folder

Command = Callable[[argparse.Namespace], int]  # returns the exit code


class Add(Protocol):
    """Makes the parser of a command."""

    def __call__(self, name: str, command: Command, *, help: str, description: str) -> argparse.ArgumentParser: ...


def takes_config(parser: argparse.ArgumentParser) -> None:
    """CONFIG.yaml, what overrides it, and where to work."""
    parser.add_argument("config", metavar="CONFIG.yaml", type=Path, help="the configuration; see configs/")
    takes_overrides(parser)
    takes_workspace(parser)


def takes_workspace(parser: argparse.ArgumentParser) -> None:
    """Where to work, instead of where a configuration says."""
    parser.add_argument(
        "--workspace", metavar="FOLDER", type=workspace, help="where everything is kept; default: the configuration's"
    )


def takes_overrides(parser: argparse.ArgumentParser) -> None:
    """What overrides a configuration."""
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], dest="overrides", help="override, e.g. train.lr=1e-4"
    )


def has_workspace(parser: argparse.ArgumentParser) -> None:
    """The workspace of a run that is there."""
    parser.add_argument(
        "--workspace",
        metavar="FOLDER",
        type=workspace,
        default="workspace",
        help="the workspace of the run (default: %(default)s)",
    )


def keeps_server(parser: argparse.ArgumentParser) -> None:
    """Whether the local server stays."""
    parser.add_argument("--keep-server", action="store_true", help="leave the local Prefect server running afterwards")


def run_name(text: str) -> str:
    """The name of a run, as an argument."""
    try:
        return RunFolder(Path(), text).name
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def workspace(text: str) -> str:
    """A workspace, as an argument: the text itself, which a configuration keeps."""
    try:
        workspace_folder(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def configuration(arguments: argparse.Namespace) -> PipelineConfig:
    """What `takes_config` named.

    Raises:
        BadConfig: it is none.
    """
    config = load_config(arguments.config, arguments.overrides)
    return config if arguments.workspace is None else config.model_copy(update={"workspace": arguments.workspace})


def find_run(arguments: argparse.Namespace) -> tuple[RunFolder, RunRecord]:
    """The run that `run` and `--workspace` name.

    Raises:
        Wrong: it is not there.
    """
    place = existing_workspace(arguments)
    folder = RunFolder(place, arguments.run)
    record = folder.read()
    if record is None and (folder.path / "run.json").exists():
        raise Wrong(f"{folder.path / 'run.json'} cannot be read: it is of another version of megatron-flows, or damaged")
    if record is None:
        raise Wrong(f"there is no run {arguments.run} in {place}; see: finetune status{workspace_option(place)}")
    return folder, record


def existing_workspace(arguments: argparse.Namespace) -> Path:
    """The workspace that `has_workspace` named.

    Raises:
        Wrong: it is not there.
    """
    place = workspace_folder(arguments.workspace)
    if not place.is_dir():
        raise Wrong(f"there is no workspace {place}; name the one of the configuration: --workspace FOLDER")
    return place
