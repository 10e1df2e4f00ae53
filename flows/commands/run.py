"""`finetune run` and `rerun`: the flow in this process, shown in the terminal."""

import argparse
import errno
import os
import shutil
import traceback
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from flows.asked.graph import nodes_of
from flows.asked.lineage import NoResult, find_result
from flows.asked.load_config import BadConfig, given_config
from flows.asked.parameters import what_is_asked
from flows.commands.arguments import Add, configuration, find_run, has_workspace, keeps_server, run_name, takes_config
from flows.commands.outcome import BAD, FAILED, GATE, Wrong, say, say_errors
from flows.launch.protocol import StageFailed
from flows.records.go_on import go_on, other_failures, workspace_option
from flows.records.run_record import CANCELLED, RunFolder, RunIsLive, new_name, now
from flows.running.ready import refuse_what_cannot_run
from stages.contracts.config import PipelineConfig
from stages.contracts.process import ExitCode
from stages.contracts.words import lines, shown_path, size

NO_SPACE = 10_000_000  # bytes: a disk with less has probably just run full

RUN_HELP = """\
Check a configuration, then do the whole job: download, preprocess, convert, shard, verify, train, merge, export, push.

Stages whose results are in the workspace and intact are not run again, so the same command after a failure, a Ctrl-C or
a kill goes on where it stopped; training goes on from its last checkpoint.

The run shows in Prefect's web UI, at the address printed first: of the server that PREFECT_API_URL names, else of a local
one that starts with the run and ends with it. The Hub's token is read from HF_TOKEN, and given to download and push only."""

RERUN_HELP = """\
Do a run again with its own configuration. Without --stage it goes on where it stopped. With --stage, that stage runs even
if its result is there, and so does every stage that uses its result; training that had not finished goes on from its last
checkpoint, or with --fresh begins anew; training that had finished begins anew. An old result is kept until the new one is
there."""


def add_to(add: Add) -> None:
    """Add these commands to the parser."""
    run = add("run", _run, help="do the whole job of a configuration", description=RUN_HELP)
    takes_config(run)
    run.add_argument(
        "--name",
        type=run_name,
        metavar="NAME",
        help="name of the run, a new one or one to do over; default: one like brisk-otter",
    )
    run.add_argument(
        "--from",
        metavar="RESULT",
        action="append",
        default=[],
        dest="start_from",
        help="start from a result: its folder, or a stage of a run such as brisk-otter/train. It and what it was made from are "
        "taken as they are; may be repeated",
    )
    keeps_server(run)
    rerun = add("rerun", _rerun, help="go on with a run, or do a stage of it again", description=RERUN_HELP)
    rerun.add_argument("run", metavar="RUN", type=run_name, help="name of the run, as `finetune status` shows it")
    rerun.add_argument("--stage", metavar="STAGE", action="append", default=[], help="do it again, and what depends on it")
    rerun.add_argument(
        "--fresh", action="store_true", help="with --stage: begin it anew, whatever an interrupted attempt left to go on from"
    )
    has_workspace(rerun)
    keeps_server(rerun)


def _run(arguments: argparse.Namespace) -> int:
    config = configuration(arguments)
    try:
        for result in arguments.start_from:
            find_result(config.workspace_path, result)
    except NoResult as error:
        raise Wrong(f"--from {error}") from None
    refuse_what_cannot_run(what_is_asked(config, start_from=arguments.start_from), str(arguments.config))
    name = arguments.name or new_name(config.workspace_path)
    option = workspace_option(config.workspace_path)
    return _do(config, name, option, keep_server=arguments.keep_server, start_from=arguments.start_from)


def _rerun(arguments: argparse.Namespace) -> int:
    folder, record = find_run(arguments)
    try:
        refresh = [node for name in arguments.stage for node in nodes_of(name)]
    except ValueError as error:
        raise Wrong(str(error)) from None
    if arguments.fresh and not refresh:
        raise Wrong("--fresh says how to do a stage again: name it, e.g. --stage train --fresh")
    if record.stage is not None:
        again = go_on(folder.workspace, record, workspace_option(folder.workspace))
        raise Wrong(f"run {record.name} did one stage, for a deployment. To do it again: {again}")
    if not Path(record.cwd).is_dir():
        raise Wrong(f"{record.cwd}: the folder the run was started in is gone; relative paths of its configuration need it")
    workspace, option = str(folder.workspace), workspace_option(folder.workspace)  # where the person is
    os.chdir(record.cwd)  # relative paths of its configuration start there
    config = given_config({**record.config, "workspace": workspace}, where=f"run {record.name}")
    asked = {"refresh": refresh, "fresh": arguments.fresh, "start_from": record.start_from}
    refuse_what_cannot_run(what_is_asked(config, **asked), f"run {record.name}")
    return _do(config, record.name, option, keep_server=arguments.keep_server, **asked)


def _do(config: PipelineConfig, name: str, option: str, *, keep_server: bool, **asked: Any) -> int:
    """Run the flow in this process, show it, say how it ended.

    Args:
        option: the `--workspace` that later commands need.
        asked: further parameters of the flow.
    """
    from flows.launch.choose import decided
    from flows.server.local import NoServer, connect, serving

    workspace = config.workspace_path
    folder = RunFolder(workspace, name)
    if folder.is_live():
        raise _is_live(name, option)

    if told := decided(config.launch)[1]:  # the run logs it, and a terminal does not show logs
        say(told)
    prepare = partial(connect, workspace, module="flows.finetune")
    with ExitStack() as stack:
        try:
            server = stack.enter_context(serving(workspace, keep=keep_server, say=say, meanwhile=prepare))
            (folder.path / "logs").mkdir(parents=True, exist_ok=True)
        except NoServer as error:
            raise Wrong(_no_space(workspace, error) or str(error)) from None
        except OSError as error:
            raise Wrong(_no_space(workspace, error) or f"workspace: {workspace} cannot be used: {error}") from None
        code = _run_flow(config, folder, option, asked)
    if server.pid is not None:  # it is ours
        _say_whether_it_ends(folder, option)
    return code


def _is_live(name: str, option: str) -> Wrong:
    return Wrong(f"run {name} is going on in another process; see: finetune status {name}{option}")


def _say_whether_it_ends(folder: RunFolder, option: str) -> None:
    """What becomes of the workspace's server, which this process has left."""
    from flows.server.local import is_kept, still_used
    from flows.show.display import server_is_off

    server, record = still_used(folder.workspace), folder.read()
    if server is None:
        say(server_is_off(folder.name, option))
    elif is_kept(folder.workspace):
        say(f"the Prefect server stays at {server.page}; to stop it: kill {server.pid}")
    else:
        say(f"UI:         {(record.page if record is not None else None) or server.page}")


def _run_flow(config: PipelineConfig, folder: RunFolder, option: str, asked: dict[str, Any]) -> int:
    from flows.finetune import finetune
    from flows.running.quiet import logs_to_file
    from flows.running.settle import reconcile
    from flows.server.client import AWAY
    from flows.show.display import Display
    from flows.show.summary import print_summary

    console = Console(markup=False, emoji=False)  # a path may have [] and : in it
    logs_to_file(folder.log("prefect"))
    with suppress(*AWAY):  # it is about other runs
        reconcile([folder.workspace])

    def how_to_go_on() -> str:
        record = folder.read()
        return f"Go on: {go_on(folder.workspace, record, option)}" if record is not None else ""

    begun = now()
    try:
        with Display(folder, console):
            # Where its parameters are read, by a runner say, relative paths begin elsewhere.
            finetune(config=config.model_copy(update={"workspace": str(folder.workspace)}), run_name=folder.name, **asked)
    except StageFailed as error:
        record = folder.read()
        say_errors([str(error), *(other_failures(record) if record is not None else [])])
        say(f"       Log: {shown_path(error.log_file)}\n       Report: {shown_path(folder.report)}\n       {how_to_go_on()}")
        return exit_code(error)
    except BadConfig:
        raise
    except RunIsLive:  # since we looked, or it is being settled
        raise _is_live(folder.name, option) from None
    except Exception as error:
        record = folder.read()
        if record is not None and record.started >= begun and record.state == "done":
            say(f"the Prefect server was away when the run ended ({type(error).__name__}); the next run tells its page")
            print_summary(record, folder, console)
            return ExitCode.OK
        # Whatever broke first: ours, or the server, whose database is there, too.
        if told := _no_space(folder.workspace, error):
            raise Wrong(f"{told}. {how_to_go_on()}".removesuffix(". ")) from None
        say(lines(traceback.format_exc()))
        say_errors([f"{type(error).__name__}: {error}. This is a defect of ours; Prefect's log: {folder.log('prefect')}"])
        return FAILED
    except BaseException:
        if (record := folder.read()) is not None and record.error == CANCELLED:
            say(f"the run was {CANCELLED}")
        if told := how_to_go_on():
            say(f"Report: {shown_path(folder.report)}\n{told}" if folder.report.exists() else told)
        raise
    record = folder.read()
    if record is not None:
        print_summary(record, folder, console)
    return ExitCode.OK


def _no_space(folder: Path, error: Exception) -> str | None:
    """What to say when there is no room left to work in, and the error tells nothing else of the disk; else None."""
    says_why = isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM)
    if says_why or not folder.is_dir():
        return None
    free = shutil.disk_usage(folder).free
    return f"{folder}: no space left ({size(free)} free): make room" if free < NO_SPACE else None


def exit_code(error: StageFailed) -> int:
    """Our exit code for a stage's failure."""
    return {"bad input": BAD, "gate failed": GATE}.get(error.reason, FAILED)
