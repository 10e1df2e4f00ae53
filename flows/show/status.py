"""The runs of a workspace, or one of them: states, results, figures, where the logs are.

finetune status [RUN]
"""

from pathlib import Path

from rich.console import Console
from rich.text import Text

from flows.records.go_on import go_on, other_failures, workspace_option
from flows.records.run_record import FINISHED, RunFolder, RunRecord, all_runs, now
from flows.server.asking import page_is_lost
from flows.show.display import header, node_text, server_is_off
from flows.show.summary import print_summary
from stages.contracts.specs import SPECS
from stages.contracts.words import ago, brief, plain, seconds, shown_path

STYLES = {"done": "green", "running": "bold", "failed": "red", "stopped": "yellow", "crashed": "red"}


def print_runs(workspace: Path, console: Console) -> None:
    """One line per run, newest first."""
    runs = all_runs(workspace)
    if not runs:
        console.print(f"no runs in {workspace}; start one: finetune run CONFIG.yaml", soft_wrap=True, highlight=False)
        return
    width = max(len("RUN"), *(len(run.name) for run in runs))
    at = max(map(len, SPECS))
    console.print(Text(f"{'RUN':<{width}}  {'STARTED':<9}  {'STATE':<8}  {'AT':<{at}}", style="bold"), soft_wrap=True)
    for run in runs:
        node = current_node(run)
        line = Text(f"{run.name:<{width}}  {ago(run.started, now()):<9}  ")
        line.append(f"{run.state:<8}", style=STYLES[run.state]).append(
            f"  {node:<{at}}  {plain(_remark(workspace, run, node))}"
        )
        console.print(line, soft_wrap=True, highlight=False)


def current_node(run: RunRecord) -> str:
    """Where a run is, or where it ended."""
    for wanted in ("failed", "running", "stopped"):
        for node, state in run.nodes.items():
            if state.state == wanted:
                return node
    finished = [node for node, state in run.nodes.items() if state.state in FINISHED]
    return finished[-1] if finished else ""


def _remark(workspace: Path, run: RunRecord, node: str) -> str:
    if run.state == "done":
        return run.nodes["train"].figure or run.nodes[node].figure or ""
    if run.state == "running":
        return (run.nodes[node].doing or "") if node else "starting"
    told = (run.nodes[node].error if node else None) or run.error or ""
    return f"{brief(told)} · {go_on(workspace, run, workspace_option(workspace))}".removeprefix(" · ")


def print_run(folder: RunFolder, record: RunRecord, console: Console) -> None:
    """All about one run."""

    def say(text: Text | str) -> None:
        console.print(text, soft_wrap=True, highlight=False)

    option = workspace_option(folder.workspace)
    took = ((record.finished or now()) - record.started).total_seconds()
    is_lost = page_is_lost(record.page, record.flow_run_id)
    say(header(record.model_copy(update={"page": None}) if is_lost else record))
    say(
        Text(record.state, style=STYLES[record.state]).append(
            f" · started {ago(record.started, now())} · {seconds(took)}", style="default not bold"
        )
    )
    for error in [*filter(None, [record.error]), *other_failures(record)]:
        say(Text(f"error: {plain(error)}", style="red"))
    say("")
    for node, state in record.nodes.items():
        say(node_text(node, state))
    say("")
    for node, state in record.nodes.items():
        if state.path is not None and state.state in FINISHED:
            say(f"  {node:<14}  {shown_path(folder.workspace / state.path)}")
    if record.state == "done":
        print_summary(record, folder, console)
    else:
        if folder.report.exists():
            say(f"Report:     {shown_path(folder.report)}")
        say(f"Logs:       {shown_path(folder.path / 'logs')}")
        if record.state != "running":
            say(f"Go on:      {go_on(folder.workspace, record, option)}")
    if is_lost:
        say(server_is_off(record.name, option))
