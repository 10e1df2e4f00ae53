"""A run that is cancelled in Prefect and that no runner looks after: `finetune run`, or one whose runner was killed."""

import signal
import subprocess
import threading
from pathlib import Path
from uuid import UUID

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelling
from processes import lives, wait_until
from runners import Place

from flows.records.run_record import RunFolder
from flows.running import cancelled
from flows.server.local import Server


def test_a_run_in_a_terminal(tmp_path: Path, server: Server) -> None:
    place = Place(tmp_path, "mine", server.api)
    place.wish("download-data", "hang")
    with place.finetune("run", "mine.yaml", "--name", "calm-heron", text=True, stderr=subprocess.PIPE) as process:
        wait_until((place.workspace / "download-data.hangs").exists)
        record = RunFolder(place.workspace, "calm-heron").read()
        assert record is not None
        with temporary_settings({PREFECT_API_URL: server.api}), get_client(sync_client=True) as client:
            flow_run = UUID(record.flow_run_id)
            client.set_flow_run_state(flow_run, Cancelling())
            _, err = process.communicate(timeout=60)
            assert client.read_flow_run(flow_run).state_name == "Cancelled"
            ours = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run]))
            assert all(task.state is not None and task.state.is_final() for task in client.read_task_runs(flow_run_filter=ours))
    assert process.returncode == 143, err
    assert "the run was cancelled in Prefect\n" in err
    assert "Traceback" not in err
    assert not lives(int((place.workspace / "download-data.pid").read_text()))
    record = RunFolder(place.workspace, "calm-heron").read()
    assert record is not None
    assert (record.state, record.error) == ("stopped", "cancelled in Prefect")


def test_a_server_that_is_away_cancels_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    looked, got = threading.Event(), threading.Event()
    monkeypatch.setattr(cancelled, "LOOK_SECONDS", 0.0)

    def was_cancelled(flow_run: UUID) -> bool:
        if looked.is_set():
            return True
        looked.set()
        raise cancelled.httpx.ConnectError("nobody is there")

    monkeypatch.setattr(cancelled, "_was_cancelled", was_cancelled)
    before = signal.signal(signal.SIGTERM, lambda number, frame: got.set())
    try:
        with cancelled.heeded(str(UUID(int=1))) as is_cancelled:
            assert got.wait(30)
            assert is_cancelled.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
    with cancelled.heeded(None) as is_cancelled:
        assert not is_cancelled.is_set()
