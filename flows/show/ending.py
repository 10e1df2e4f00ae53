"""What a run leaves for people when it has ended, however: its report, and its page in Prefect's UI."""

from prefect.logging import get_logger

from flows.records.run_record import RunFolder
from flows.records.story import story_of, told_losses
from flows.show.pages.board import Board
from flows.show.pages.markdown import code
from flows.show.pages.summary import summary_page
from flows.show.report.served import serve_report
from flows.show.report.write import write_report

SUMMARY = "summary"  # key of the page


def tell_end(folder: RunFolder, board: Board | None = None) -> None:
    """Write the report of a run whose record says how it ended, and show its summary. A run never fails for either."""
    logger = get_logger("finetune")
    try:
        record = folder.read()
        if record is None:
            return
        story = story_of(folder, record)
        report = write_report(story)
        if board is not None:
            losses = story.losses()
            words = f"{record.state} · {told_losses(*losses)}" if losses is not None else record.state
            address = serve_report(report, folder.workspace, record.flow_run_id)
            link = f"[open it]({address}), or {code(report)}" if address is not None else code(report)
            board.put(SUMMARY, "markdown", summary_page(story, link), words)
    except Exception as error:
        logger.warning("no report, or no summary in the UI: %s: %s", type(error).__name__, error)
