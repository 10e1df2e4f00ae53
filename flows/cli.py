"""The `finetune` command: its parser, its signals, its end. What a command does is in `commands/`; Prefect is imported only
by those that need it, so that --help is instant.

Exit codes: 0 done, 1 failed, 2 the configuration or an input is wrong, 3 a gate refused the result, 130 Ctrl-C, 143 SIGTERM.
"""

import argparse
import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from flows.asked.load_config import BadConfig
from flows.commands import look, programs, run, serve
from flows.commands.arguments import Command
from flows.commands.outcome import BAD, INTERRUPTED, TERMINATED, Terminated, Wrong, say, say_errors

EPILOG = """\
examples:
  finetune plan configs/demo.yaml                        what would run, what is cached, and why
  finetune run configs/demo.yaml --set train.lr=1e-4     everything the new learning rate does not touch is reused
  finetune status                                        all runs; with a run's name, all about it
  finetune rerun brisk-otter                             go on where a run stopped
  finetune rerun brisk-otter --stage train               do a stage again, and what depends on it
  finetune rerun brisk-otter --stage train --fresh       begin an interrupted training anew
  finetune run mine.yaml --from brisk-otter/train        start from what another run made
  finetune ui                                            runs are started and watched in the browser
  finetune dataset inspect runs/brisk-otter/preprocess   what is in the data
  finetune checkpoint inspect runs/brisk-otter/merge     what is in stored weights

exit codes: 0 done, 1 failed, 2 the configuration or an input is wrong, 3 a gate refused the result, 130 Ctrl-C, 143 SIGTERM"""


def main(argv: list[str] | None = None) -> int:
    """Entry point of `finetune`; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):  # one of a narrower encoding shows ? for what it lacks
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    arguments = parser().parse_args(argv)
    command: Command = arguments.command
    try:
        with _signals():
            return command(arguments)
    except BadConfig as error:
        say_errors(error.problems)
        return BAD
    except Wrong as error:
        say_errors([str(error)])
        return BAD
    except KeyboardInterrupt:
        say("stopped")
        return INTERRUPTED
    except Terminated:
        say("stopped (SIGTERM)")
        return TERMINATED


def parser() -> argparse.ArgumentParser:
    """The command line, in the order in which its help shows it."""
    top = argparse.ArgumentParser(
        prog="finetune",
        description="Fine-tune a language model, from text and a base model to a published model, as one checked, cached "
        "and resumable workflow.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, command: Command, *, help: str, description: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=help, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        sub.set_defaults(command=command)
        return sub

    for part in (run, serve, look, programs):
        part.add_to(add)
    return top


@contextmanager
def _signals() -> Iterator[None]:
    """The first Ctrl-C stops gracefully, the second at once: what runs is then ended by its shim."""

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(INTERRUPTED))
        print("\nstopping; stages may save their work first (Ctrl-C again leaves at once) …", file=sys.stderr, flush=True)
        raise KeyboardInterrupt

    def terminate(number: int, frame: FrameType | None) -> NoReturn:
        raise Terminated

    before = signal.signal(signal.SIGINT, interrupt), signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])


if __name__ == "__main__":
    sys.exit(main())
