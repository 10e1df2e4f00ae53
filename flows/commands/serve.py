"""`finetune serve` and `ui`: the runner of this machine, and with it, if need be, a server."""

import argparse
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from flows.asked.load_config import load_config
from flows.commands.arguments import Add, workspace
from flows.commands.outcome import Wrong, say
from flows.records.flock import locked
from flows.records.locks import Lock, Stopped, held
from flows.records.server_home import server_home
from flows.server.local import NoServer, Server, connect, serving
from stages.contracts.config import workspace_folder
from stages.contracts.process import ExitCode

SERVE_HELP = """\
Do the runs that are started in Prefect's web UI, or with `prefect deployment run`, on this machine: where the GPUs, Docker and
the data are. Deploys finetune-llama2/demo (configs/demo.yaml, in processes), finetune-llama2/gpu (configs/llama2-7b.yaml, in
containers), or instead finetune-llama2/NAME for each NAME.yaml that is given; and stage/NAME, one stage from results that are
there.

The server is the one that PREFECT_API_URL names, else one of the workspace, which starts and ends with this.
Ctrl-C or SIGTERM: takes no more runs, waits for those that go on. Once more: stops them; trainings save a checkpoint first."""

UI_HELP = """\
Start a Prefect server on this machine and a runner for it, print the page's address, and stop both at Ctrl-C: the same as
`finetune serve` without PREFECT_API_URL. Everything is kept in the workspace; nothing is asked of any other machine."""


def add_to(add: Add) -> None:
    """Add these commands to the parser."""
    for name, command, about, help_text in (
        ("ui", _ui, "Prefect's web UI and a runner, on this machine", UI_HELP),
        ("serve", _serve, "a runner for the runs that are started in the web UI", SERVE_HELP),
    ):
        parser = add(name, command, help=about, description=help_text)
        parser.add_argument(
            "configs", metavar="CONFIG.yaml", nargs="*", type=Path, help="deploy these configurations instead of the usual two"
        )
        parser.add_argument(
            "--workspace", metavar="FOLDER", type=workspace,
            help="where everything is kept; default: each configuration's, and ./workspace for the server",
        )  # fmt: skip


def _ui(arguments: argparse.Namespace) -> int:
    if named := os.environ.get("PREFECT_API_URL"):
        raise Wrong(
            f"PREFECT_API_URL={named} names a server already. For a runner of that one: finetune serve; for a server of this "
            "machine: unset PREFECT_API_URL"
        )
    return _serve(arguments)


def _serve(arguments: argparse.Namespace) -> int:
    for file in arguments.configs:
        load_config(file)  # what is wrong with one is said before a server is started
    home = workspace_folder(arguments.workspace or "workspace")
    asked_for = str(home) if arguments.workspace is not None else None
    os.environ["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = "CRITICAL"  # of the runs' processes: their logs are in files
    prepare = partial(connect, home, module="flows.runner.serve")
    with ExitStack() as stack:
        try:
            server_home(home).mkdir(parents=True, exist_ok=True)
            stack.enter_context(_only_one(home))
            server = stack.enter_context(serving(home, say=say, meanwhile=prepare))
        except NoServer as error:
            raise Wrong(str(error)) from None
        except OSError as error:
            raise Wrong(f"workspace: {home} cannot be used: {error}") from None
        return _run(arguments.configs, asked_for, server, home)


@contextmanager
def _only_one(home: Path) -> Iterator[None]:
    """One runner per workspace: two would share out the runs between them, and settle each other's."""
    impatient = threading.Event()
    impatient.set()
    lock = Lock(server_home(home) / "runner.lock", "the runner's")
    with ExitStack() as stack:
        try:
            who = f"finetune serve (process {os.getpid()})"
            stack.enter_context(held([lock], who, stop=impatient, on_wait=lambda told: None))
        except Stopped:
            raise Wrong(f"{lock.file.read_text() or 'another runner'} serves the workspace {home} already") from None
        yield


def _run(configs: list[Path], asked_for: str | None, server: Server, home: Path) -> int:
    from flows.runner.deployments import deployments
    from flows.runner.serve import serve
    from flows.running.quiet import logs_to_file

    asked = deployments(configs, asked_for)
    places = {workspace_folder(each.parameters["config"]["workspace"]) for each in asked if "config" in each.parameters}
    workspaces = sorted({home, *places})
    logs_to_file(server_home(home) / "runner.log")

    def on_ready() -> None:
        stack.enter_context(locked(server_home(home) / "runner.ready"))  # who wants to know whether we serve tries it
        width = max(len(each.full_name) for each in asked)
        print(f"Prefect UI   {server.page}")
        print(f"workspace    {home}\n")
        for each in asked:
            print(f"  {each.full_name:<{width}}  {each.about}")
        print(f"\nstart one    in the browser; or  export PREFECT_API_URL={server.api}")
        print(f"             prefect deployment run '{asked[0].full_name}' --watch")
        print("stop         Ctrl-C", flush=True)

    with ExitStack() as stack:
        serve(asked, workspaces, say=say, on_ready=on_ready)
    say("stopped")
    return ExitCode.OK
