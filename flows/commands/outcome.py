"""How a command ends: its exit codes, what it raises when it cannot be done, and how errors are said."""

import os
import sys

from stages.contracts import words

FAILED, BAD, GATE, INTERRUPTED, TERMINATED = 1, 2, 3, 130, 143


class Wrong(Exception):
    """A command that cannot be done; the message is the line that a person reads."""


class Terminated(BaseException):
    """SIGTERM."""


def say(text: str) -> None:
    """Tell the person something that is not the command's output."""
    print(text, file=sys.stderr, flush=True)


def say_errors(problems: list[str]) -> None:
    """A line per problem. What a file of others has put into one (its name, a token) cannot steer the terminal."""
    red, reset = ("\033[31m", "\033[0m") if sys.stderr.isatty() and "NO_COLOR" not in os.environ else ("", "")
    for problem in problems:
        say(f"{red}error:{reset} {words.lines(problem)}")
