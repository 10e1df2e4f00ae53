"""What a run leaves for people when it has ended, however: its report, and its pages in Prefect's UI."""

from prefect.logging import get_logger

from flows.records.run_record import RunFolder, RunRecord
from flows.records.story import Story, story_of, told_losses
from flows.show.pages.board import Board
from flows.show.pages.failed import failed_page
from flows.show.pages.markdown import code
from flows.show.pages.summary import summary_page
from flows.show.report.served import serve_report
from flows.show.report.write import write_report
from stages.contracts.words import brief

SUMMARY = "summary"  # key of the page


def tell_end(folder: RunFolder, board: Board, record: RunRecord | None = None) -> None:
    """Write the report of a run that has ended, and show its summary. A run never fails for either.

    Args:
        record: says how it ended; None: the one in its folder does.
    """
    logger = get_logger("finetune")
    try:
        record = record or folder.read()
        if record is None:
            return
        if record.state == "crashed":
            _tell_stopped(folder, record, board)
        story = story_of(folder, record)
        report = _report(story)
        losses = story.losses()
        words = f"{record.state} · {told_losses(*losses)}" if losses is not None else record.state
        board.put(SUMMARY, "markdown", summary_page(story, report), words, is_final=True)
    except Exception as error:  # whatever is wrong with a report, the run has ended as it has
        logger.warning("no summary in the UI: %s: %s", type(error).__name__, error)
    finally:
        board.end()


def _report(story: Story) -> str:
    """Write the report; what the summary says of it, as Markdown."""
    logger, file = get_logger("finetune"), story.folder.report
    try:
        write_report(story)
    except Exception as error:  # the summary tells most of what would be in it
        logger.warning("no report: %s: %s", type(error).__name__, error)
        return f"{code(file)} could not be written: {code(error)}"
    try:
        address = serve_report(file, story.folder.workspace, story.record.flow_run_id)
    except OSError as error:
        logger.warning("the report cannot be opened from the UI: %s", error)
        address = None
    return f"[open it]({address}), or {code(file)}" if address is not None else code(file)


def _tell_stopped(folder: RunFolder, record: RunRecord, board: Board) -> None:
    """The pages of the nodes that went down with the process of a run, which still say that the nodes are at work."""
    board.take_up()
    for node, state in record.nodes.items():
        if state.state == "stopped":
            page = failed_page(node, folder, record, None)
            board.put(node, "markdown", page, brief(state.error or record.state), is_final=True)
