"""How a stage ends badly: the errors that a person can read."""

from stages.contracts.process import ExitCode


class StageError(Exception):
    """An end of the stage that the person can read: no traceback."""

    code = ExitCode.BAD_INPUT


class BadInput(StageError):
    """Something given to the stage is wrong; the message says what to change."""


class GateFailed(StageError):
    """The stage's own check refuses the result."""

    code = ExitCode.GATE_FAILED


class Interrupted(BaseException):
    """The stage was asked to stop. No Exception: what a library catches and forgets must not include it."""

    code = ExitCode.INTERRUPTED
