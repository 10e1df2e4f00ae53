"""What a stage, as a process, tells whoever started it: by its exit code, and by lines among its output."""

from enum import IntEnum

EVENT_PREFIX = "@@stage "  # of a line of JSON: progress, an error, or JOIN
JOIN = "join"  # event of a stage that several machines share: its workers begin, those of the other machines may come


class ExitCode(IntEnum):
    """What became of a stage."""

    OK = 0
    CRASH = 1  # our fault: a traceback stands above
    BAD_INPUT = 2  # the person's to mend: the message says what to change
    GATE_FAILED = 3  # the stage did its work and its check refused the result
    INTERRUPTED = 4  # stopped from outside; running it again goes on or starts anew
