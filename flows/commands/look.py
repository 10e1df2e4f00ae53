"""`finetune status`, `plan` and `doctor`: they look, and change nothing."""

import argparse
from pathlib import Path

from rich.console import Console

from flows.asked.load_config import check_ready
from flows.commands.arguments import (
    Add,
    configuration,
    existing_workspace,
    find_run,
    has_workspace,
    run_name,
    takes_config,
    takes_overrides,
    takes_workspace,
)
from flows.commands.outcome import FAILED, Wrong
from stages.contracts import words
from stages.contracts.process import ExitCode

STATUS_HELP = """\
The runs of a workspace, newest first: state, where they are, their figure, and for one that failed how to go on.
With a run's name: every stage, its time, its result's folder, where the logs are."""

PLAN_HELP = """\
What `finetune run` would do with a configuration: model, data, layout and length, and for each stage whether its result is
there, and if not, why: which input will be new, which setting differs from the nearest earlier result, what is damaged.
Looks only; starts nothing."""

DOCTOR_HELP = """\
Whether stages can run in containers on this machine, with the command that mends what is missing: the Docker engine, its
socket, the image, NVIDIA's runtime, shared memory, and whether the engine sees the workspace.
With a configuration, for what that one asks for."""


def add_to(add: Add) -> None:
    """Add these commands to the parser."""
    status = add("status", _status, help="what runs did, or are doing", description=STATUS_HELP)
    status.add_argument("run", metavar="RUN", nargs="?", type=run_name, help="all about this run; default: a line per run")
    has_workspace(status)
    takes_config(add("plan", _plan, help="what a run would do, and why", description=PLAN_HELP))
    doctor = add("doctor", _doctor, help="whether this machine can run stages in containers", description=DOCTOR_HELP)
    doctor.add_argument("config", metavar="CONFIG.yaml", nargs="?", type=Path, help="for what this configuration asks for")
    takes_overrides(doctor)
    takes_workspace(doctor)


def _status(arguments: argparse.Namespace) -> int:
    from flows.show import status

    console = Console(markup=False, emoji=False)  # a path is what it is: /x/[draft], :smile:
    if arguments.run is None:
        status.print_runs(existing_workspace(arguments), console)
    else:
        folder, record = find_run(arguments)
        status.print_run(folder, record, console)
    return ExitCode.OK


def _plan(arguments: argparse.Namespace) -> int:
    from flows.asked import plan

    config = configuration(arguments)
    check_ready(config, str(arguments.config))
    print(words.lines(plan.report(config)))
    return ExitCode.OK


def _doctor(arguments: argparse.Namespace) -> int:
    from flows.launch import doctor

    if arguments.config is None and arguments.overrides:
        raise Wrong("--set overrides a configuration: name one")
    config = configuration(arguments) if arguments.config is not None else None
    return FAILED if doctor.main(config, arguments.workspace or "workspace") else 0
