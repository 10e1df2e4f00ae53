"""Why stages could not be launched, each with what mends it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """What is in the way, and the command, or the setting, that mends it."""

    what: str
    mend: str

    def __str__(self) -> str:
        return f"{self.what}. To mend it: {self.mend}"


class NotReady(Exception):
    """Stages cannot run. `problems` says why."""

    def __init__(self, *problems: Problem) -> None:
        super().__init__("; ".join(map(str, problems)))
        self.problems = problems
