"""How to go on with a run that did not end well, as its pages and its report say it."""

from flows.records.go_on import damaged_sources, go_on, workspace_option
from flows.records.run_record import RunFolder, RunRecord


def ways_to_go_on(folder: RunFolder, record: RunRecord) -> tuple[str, str]:
    """What to do, in words that end before a command, and the command, wherever the reader is: what was written down is read in
    any folder, and on any machine.

    Retrying is a runner's, so nobody does it for a run of a terminal; and it meets a damaged input again.
    """
    retry = "retry this run, or " if record.has_deployment and not damaged_sources(record) else ""
    return f"To go on, {retry}type:", go_on(folder.workspace, record, workspace_option(folder.workspace, anywhere=True))
