"""The `finetune` command: run, rerun, status, plan. Prefect is imported only by what needs it, so that --help is instant.

Exit codes: 0 done, 1 failed, 2 the configuration or an input is wrong, 3 a gate refused the result, 130 Ctrl-C, 143 SIGTERM.
"""

import argparse
import os
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import NoReturn

from rich.console import Console

from flows.go_on import go_on, other_failures, workspace_option
from flows.graph import nodes_of, with_dependents
from flows.launch.protocol import StageFailed
from flows.load_config import BadConfig, check_ready, load_config
from flows.run_record import RunFolder, RunRecord, new_name
from stages.contracts.config import PipelineConfig
from stages.contracts.process import ExitCode
from stages.contracts.words import size

FAILED, BAD, GATE, INTERRUPTED, TERMINATED = 1, 2, 3, 130, 143
NO_SPACE = 10_000_000  # bytes: a disk with less has probably just run full

EPILOG = """\
examples:
  finetune plan configs/demo.yaml                        what would run, what is cached, and why
  finetune run configs/demo.yaml --set train.lr=1e-4     everything the new learning rate does not touch is reused
  finetune status                                        all runs; with a run's name, all about it
  finetune rerun brisk-otter                             go on where a run stopped
  finetune rerun brisk-otter --stage train               do a stage again, and what depends on it
  finetune dataset inspect runs/brisk-otter/preprocess   what is in the data
  finetune checkpoint inspect runs/brisk-otter/merge     what is in stored weights

exit codes: 0 done, 1 failed, 2 the configuration or an input is wrong, 3 a gate refused the result, 130 Ctrl-C, 143 SIGTERM"""


class Wrong(Exception):
    """A command that cannot be done; the message is the line that a person reads."""


class Terminated(BaseException):
    """SIGTERM."""


def main(argv: list[str] | None = None) -> int:
    """Entry point of `finetune`; returns the exit code."""
    arguments = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        with _signals():
            return command(arguments)
    except BadConfig as error:
        _say_errors(error.problems)
        return BAD
    except Wrong as error:
        _say_errors([str(error)])
        return BAD
    except KeyboardInterrupt:
        _say("stopped")
        return INTERRUPTED
    except Terminated:
        _say("stopped (SIGTERM)")
        return TERMINATED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="finetune",
        description="Fine-tune a language model, from text and a base model to a published model, as one checked, cached "
        "and resumable workflow.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, command: Callable[[argparse.Namespace], int], help: str, description: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=help, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        sub.set_defaults(command=command)
        return sub

    run = add("run", _run, "do the whole job of a configuration", RUN_HELP)
    _takes_config(run)
    run.add_argument(
        "--name",
        type=_run_name,
        metavar="NAME",
        help="name of the run, a new one or one to do over; default: one like brisk-otter",
    )
    _keeps_server(run)
    rerun = add("rerun", _rerun, "go on with a run, or do a stage of it again", RERUN_HELP)
    rerun.add_argument("run", metavar="RUN", type=_run_name, help="name of the run, as `finetune status` shows it")
    rerun.add_argument("--stage", metavar="STAGE", action="append", default=[], help="do it again, and what depends on it")
    _has_workspace(rerun)
    _keeps_server(rerun)
    status = add("status", _status, "what runs did, or are doing", STATUS_HELP)
    status.add_argument("run", metavar="RUN", nargs="?", type=_run_name, help="all about this run; default: a line per run")
    _has_workspace(status)
    _takes_config(add("plan", _plan, "what a run would do, and why", PLAN_HELP))
    dataset = add("dataset", _dataset, "look into tokenized datasets, or merge them", DATASET_HELP)
    dataset.add_argument(
        "rest", nargs=argparse.REMAINDER, metavar="inspect|merge …", help="see: finetune dataset inspect --help"
    )
    checkpoint = add("checkpoint", _checkpoint, "look into stored weights, check them, or cut them anew", CHECKPOINT_HELP)
    checkpoint.add_argument(
        "rest", nargs=argparse.REMAINDER, metavar="inspect|verify|reshard …", help="see: finetune checkpoint inspect --help"
    )
    return parser


RUN_HELP = """\
Check a configuration, then do the whole job: download, preprocess, convert, verify, shard, train, merge, export, push.

Stages whose results are in the workspace and intact are not run again, so the same command after a failure, a Ctrl-C or
a kill goes on where it stopped; training goes on from its last checkpoint.

The run shows in Prefect's web UI, at the address printed first: of the server that PREFECT_API_URL names, else of a local
one that starts with the run and ends with it. The Hub's token is read from HF_TOKEN, and given to download and push only."""

RERUN_HELP = """\
Do a run again with its own configuration. Without --stage it goes on where it stopped. With --stage, that stage runs even
if its result is there, and so does every stage that uses its result; training that had not finished goes on from its last
checkpoint, training that had finished starts anew. An old result is kept until the new one is there."""

STATUS_HELP = """\
The runs of a workspace, newest first: state, where they are, their figure, and for one that failed how to go on.
With a run's name: every stage, its time, its result's folder, where the logs are."""

PLAN_HELP = """\
What `finetune run` would do with a configuration: model, data, layout and length, and for each stage whether its result is
there, and if not, why: which input will be new, which setting differs from the nearest earlier result, what is damaged.
Looks only; starts nothing."""


DATASET_HELP = """\
finetune dataset inspect RESULT|PREFIX [--document N]     its documents, tokens and lengths; or the text of a document
finetune dataset merge --output PREFIX RESULT|PREFIX …    datasets one after the other, in one"""


CHECKPOINT_HELP = """\
finetune checkpoint inspect RESULT|FOLDER [--all]     tensors, slices, layout, digests of weights in any form
finetune checkpoint verify  RESULT|FOLDER             every file against the digest that is recorded of it
finetune checkpoint reshard RESULT|FOLDER --tp N …    a training checkpoint under another layout"""


def _takes_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", type=Path, help="the configuration; see configs/")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], dest="overrides", help="override, e.g. train.lr=1e-4"
    )
    parser.add_argument("--workspace", metavar="FOLDER", help="where everything is kept; default: the configuration's")


def _has_workspace(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workspace", metavar="FOLDER", default="workspace", help="the workspace of the run (default: %(default)s)"
    )


def _keeps_server(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--keep-server", action="store_true", help="leave the local Prefect server running afterwards")


def _run_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a run: letters, digits, - _ . only")
    return text


def _run(arguments: argparse.Namespace) -> int:
    config = _load(arguments)
    name = arguments.name or new_name(config.workspace_path)
    option = workspace_option(config.workspace_path)
    return _do(config, name, option, refresh=[], keep_server=arguments.keep_server)


def _rerun(arguments: argparse.Namespace) -> int:
    folder, record = _find(arguments)
    try:
        refresh = with_dependents([node for name in arguments.stage for node in nodes_of(name)])
    except ValueError as error:
        raise Wrong(str(error)) from None
    if not Path(record.cwd).is_dir():
        raise Wrong(f"{record.cwd}: the folder the run was started in is gone; relative paths of its configuration need it")
    workspace, option = str(folder.workspace), workspace_option(folder.workspace)  # where the person is
    os.chdir(record.cwd)  # relative paths of its configuration start there
    config = PipelineConfig.model_validate({**record.config, "workspace": workspace})
    check_ready(config, f"run {record.name}")
    return _do(config, record.name, option, refresh=refresh, keep_server=arguments.keep_server)


def _status(arguments: argparse.Namespace) -> int:
    from flows import status

    console = Console()
    if arguments.run is None:
        status.print_runs(_existing_workspace(arguments), console)
    else:
        folder, record = _find(arguments)
        status.print_run(folder, record, console)
    return ExitCode.OK


def _plan(arguments: argparse.Namespace) -> int:
    from flows import plan

    config = _load(arguments)
    print(plan.report(config))
    return ExitCode.OK


def _dataset(arguments: argparse.Namespace) -> int:
    return _become("stages.dataset", arguments.rest)


def _checkpoint(arguments: argparse.Namespace) -> int:
    return _become("stages.checkpoint", arguments.rest)


def _become(module: str, rest: list[str]) -> NoReturn:
    """Go on as another program, which may import what flows must not."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, *(rest or ["--help"])])


def _load(arguments: argparse.Namespace) -> PipelineConfig:
    config = load_config(arguments.config, arguments.overrides)
    if arguments.workspace is not None:
        config = config.model_copy(update={"workspace": arguments.workspace})
    check_ready(config, str(arguments.config))
    return config


def _find(arguments: argparse.Namespace) -> tuple[RunFolder, RunRecord]:
    workspace = _existing_workspace(arguments)
    folder = RunFolder(workspace, arguments.run)
    record = folder.read()
    if record is None:
        raise Wrong(f"there is no run {arguments.run} in {workspace}; see: finetune status{workspace_option(workspace)}")
    return folder, record


def _existing_workspace(arguments: argparse.Namespace) -> Path:
    workspace = Path(arguments.workspace).expanduser().resolve()
    if not workspace.is_dir():
        raise Wrong(f"there is no workspace {workspace}; name the one of the configuration: --workspace FOLDER")
    return workspace


def _do(config: PipelineConfig, name: str, option: str, *, refresh: list[str], keep_server: bool) -> int:
    """Run the flow in this process, show it, say how it ended. `option` is the `--workspace` that later commands need."""
    from flows.display import server_is_off
    from flows.server import NoServer, Server, client_environment, serving, stays

    workspace = config.workspace_path
    folder = RunFolder(workspace, name)
    if folder.is_live():
        raise Wrong(f"run {name} is going on in another process; see: finetune status {name}{option}")

    def prepare(server: Server) -> None:
        os.environ.update(client_environment(workspace, server))
        import_module("flows.finetune")  # and with it Prefect, while the server starts
        import_module("prefect.context").refresh_global_settings_context()  # the second time, the address is another

    try:
        (folder.path / "logs").mkdir(parents=True, exist_ok=True)
        with serving(workspace, keep=keep_server, say=_say, meanwhile=prepare) as server:
            code = _run_flow(config, folder, option, refresh)
            if server.pid is not None and stays(workspace):
                _say(f"the Prefect server stays at {server.page}; to stop it: kill {server.pid}")
            elif server.pid is not None:
                _say(server_is_off(name, option))
            return code
    except NoServer as error:
        raise Wrong(_no_space(workspace) or str(error)) from None
    except OSError as error:
        if folder.read() is not None:
            raise
        raise Wrong(f"workspace: {workspace} cannot be used: {error}") from None


def _run_flow(config: PipelineConfig, folder: RunFolder, option: str, refresh: list[str]) -> int:
    from flows.display import Display
    from flows.finetune import finetune
    from flows.quiet import logs_to_file
    from flows.settle import reconcile
    from flows.summary import print_summary, shown_path

    console = Console()
    logs_to_file(folder.log("prefect"))
    reconcile(folder.workspace)

    def how_to_go_on() -> str:
        record = folder.read()
        return f"Go on: {go_on(folder.workspace, record, option)}" if record is not None else ""

    try:
        with Display(folder, console):
            finetune(config=config, run_name=folder.name, refresh=refresh)  # type: ignore[arg-type]
    except StageFailed as error:
        record = folder.read()
        _say_errors([str(error), *(other_failures(record) if record is not None else [])])
        _say(f"       Log: {shown_path(error.log_file)}\n       {how_to_go_on()}")
        return exit_code(error)
    except Exception as error:
        if told := _no_space(folder.workspace):  # whatever broke first: ours, or the server, whose database is there, too
            raise Wrong(f"{told}. {how_to_go_on()}".removesuffix(". ")) from None
        traceback.print_exc()
        _say_errors([f"{type(error).__name__}: {error}. This is a defect of ours; Prefect's log: {folder.log('prefect')}"])
        return FAILED
    except BaseException:
        if told := how_to_go_on():
            _say(told)
        raise
    record = folder.read()
    if record is not None:
        print_summary(record, folder, console)
    return ExitCode.OK


def _no_space(folder: Path) -> str | None:
    """What to say when there is no room left to work in, else None."""
    free = shutil.disk_usage(folder).free
    return f"{folder}: no space left ({size(free)} free): make room" if free < NO_SPACE else None


def exit_code(error: StageFailed) -> int:
    """Our exit code for a stage's failure."""
    return {"bad input": BAD, "gate failed": GATE}.get(error.reason, FAILED)


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


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _say_errors(problems: list[str]) -> None:
    red, reset = ("\033[31m", "\033[0m") if sys.stderr.isatty() and "NO_COLOR" not in os.environ else ("", "")
    for problem in problems:
        _say(f"{red}error:{reset} {problem}")


if __name__ == "__main__":
    sys.exit(main())
