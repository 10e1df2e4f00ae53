"""How to go on with a run that did not end well: the command a person can type, where they are."""

import re
import shlex
from pathlib import Path

from flows.asked.graph import with_dependents
from flows.records.run_record import RunFolder, RunRecord
from stages.contracts.artifacts import ARTIFACT_FILE
from stages.contracts.specs import SOURCES

# As stages.runtime and stages.contracts.artifacts word it: the name of an input, and that its files are not what they were.
DAMAGED = re.compile(r"inputs\.(\w+): .*\bRemove .* and run again", re.DOTALL)


def workspace_option(workspace: Path, *, anywhere: bool = False) -> str:
    """The `--workspace` that a command needs, with its space before it, or nothing.

    Args:
        anywhere: the command is typed in any folder, not in the current one.
    """
    is_default = not anywhere and workspace == Path("workspace").resolve()
    return "" if is_default else f" --workspace {shlex.quote(str(workspace))}"


def go_on(workspace: Path, record: RunRecord, option: str) -> str:
    """The command that goes on with a run. `option` is what `workspace_option` said.

    A stage that refuses a damaged input refuses it again, as long as the result is taken for intact: then the node that made
    it has to run. `--stage` does what depends on it again, too. Where that would throw away a finished training, the
    damaged folder is removed instead: the same bits, made again, leave everything after them as it is.
    """
    if record.stage is not None:  # of a deployment of one stage: a runner does it
        api = f"PREFECT_API_URL={record.page.partition('/runs/')[0]}/api " if record.page else ""
        return f"{api}prefect flow-run retry {record.flow_run_id}"
    command = f"finetune rerun {record.name}{option}"
    damaged = damaged_sources(record)
    trained = any((workspace / "train").glob(f"*/{ARTIFACT_FILE}"))
    folders = [workspace / path for node in damaged if (path := record.nodes[node].path) is not None]
    if folders and trained and "train" not in damaged and "train" in with_dependents(damaged):
        return f"rm -r {shlex.join(map(str, folders))} && {command}"
    return command + "".join(f" --stage {node}" for node in damaged)


def ways_to_go_on(folder: RunFolder, record: RunRecord) -> tuple[str, str]:
    """What to do, in words that end before a command, and the command, wherever the reader is: what was written down is read in
    any folder, and on any machine.

    Retrying is a runner's, so nobody does it for a run of a terminal; and it meets a damaged input again.
    """
    can_retry = record.has_deployment and record.stage is None and not damaged_sources(record)
    command = go_on(folder.workspace, record, workspace_option(folder.workspace, anywhere=True))
    return f"To go on, {'retry this run, or ' * can_retry}type:", command


def damaged_sources(record: RunRecord) -> list[str]:
    """The nodes whose results the failed nodes of a run refused as damaged."""
    found = set()
    for node, state in record.nodes.items():
        refused = DAMAGED.match(state.error or "") if state.state == "failed" else None
        if refused is not None and refused[1] in SOURCES[node]:
            found.add(SOURCES[node][refused[1]])
    return [node for node in SOURCES if node in found]


def other_failures(record: RunRecord) -> list[str]:
    """What failed besides the failure that the run's own error names."""
    told = [f"{node}: {state.error}" for node, state in record.nodes.items() if state.state == "failed"]
    return [line for line in told if line != record.error]
