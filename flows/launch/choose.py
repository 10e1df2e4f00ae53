"""Which launcher a run gets."""

from flows.launch.process import ProcessLauncher
from flows.launch.protocol import Launcher
from stages.contracts.config import PipelineConfig


def launcher_for(config: PipelineConfig) -> Launcher:
    """The launcher of a configuration: plain processes, until containers are the second way."""
    return ProcessLauncher()
