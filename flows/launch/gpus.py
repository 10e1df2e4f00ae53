"""The GPUs that stages get, and how many they need."""

from collections.abc import Collection, Mapping

from flows.launch.problems import NotReady, Problem
from stages.contracts.config import PipelineConfig
from stages.contracts.launch_settings import GPU_STAGES, Gpus, LaunchSettings, machine_has_gpus
from stages.contracts.words import counted


def gpus_of(settings: LaunchSettings, ours: Mapping[str, str]) -> Gpus:
    """The GPUs of each machine that stages get which compute.

    Args:
        ours: our environment.
    """
    return settings.wanted_gpus(visible=ours.get("CUDA_VISIBLE_DEVICES"), has_gpus=machine_has_gpus())


def processes_on(config: PipelineConfig, stages: Collection[str] = GPU_STAGES, host: str | None = None) -> int:
    """The most processes that compute at the same time on an engine's machine.

    Args:
        stages: those that are to be done.
        host: the engine's address, as of `launch.hosts`; None: the first's, which has all of verify's.
    """
    counts = {"train": config.processes_per_machine}
    if host is None or host in (config.launch.hosts or (host,))[:1]:
        counts |= {"verify": config.layout.tp * config.layout.pp, "export": 1}
    return max((counts.get(stage, 0) for stage in stages), default=0)


def check_number(gpus: int, processes: int, why: str, mend: str) -> None:
    """Each of the processes of a machine needs a GPU of its own.

    Args:
        why: there are so few: comes before their number.

    Raises:
        NotReady: there are too few.
    """
    if gpus < processes:
        raise NotReady(
            Problem(
                f"layout has {processes} process{'es' * (processes != 1)} on one machine (dp × tp × pp of train, or tp × pp of "
                f"verify, all on the first), each of which needs a GPU of its own, and {why} {counted(gpus, 'GPU')}",
                mend,
            )
        )
