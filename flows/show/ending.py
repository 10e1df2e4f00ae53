"""What a run leaves for people when it has ended, however: its report, and its pages in Prefect's UI."""

from prefect.logging import get_logger

from flows.records.run_record import RunFolder, RunRecord
from flows.records.story import story_of, told_losses
from flows.show.pages.board import Board
from flows.show.pages.failed import failed_page
from flows.show.pages.markdown import code
from flows.show.pages.summary import summary_page
from flows.show.report.served import serve_report
from flows.show.report.write import write_report
from stages.contracts.words import brief

SUMMARY = "summary"  # key of the page


def tell_end(folder: RunFolder, board: Board) -> None:
    """Write the report of a run whose record says how it ended, and show its summary. A run never fails for either."""
    logger = get_logger("finetune")
    try:
        record = folder.read()
        if record is None:
            return
        if record.state == "crashed":
            _tell_stopped(folder, record, board)
        story = story_of(folder, record)
        report = write_report(story)
        losses = story.losses()
        words = f"{record.state} · {told_losses(*losses)}" if losses is not None else record.state
        address = serve_report(report, folder.workspace, record.flow_run_id)
        link = f"[open it]({address}), or {code(report)}" if address is not None else code(report)
        board.put(SUMMARY, "markdown", summary_page(story, link), words, is_final=True)
    except Exception as error:  # whatever is wrong with a report, the run has ended as it has
        logger.warning("no report, or no summary in the UI: %s: %s", type(error).__name__, error)
    finally:
        board.end()


def _tell_stopped(folder: RunFolder, record: RunRecord, board: Board) -> None:
    """The pages of the nodes that went down with the process of a run, which still say that the nodes are at work."""
    board.take_up()
    for node, state in record.nodes.items():
        if state.state == "stopped":
            page = failed_page(node, folder, record, None)
            board.put(node, "markdown", page, brief(state.error or record.state), is_final=True)
