"""A run that is cancelled in Prefect and that no runner looks after: `finetune run`, or one whose runner was killed."""

import signal
import subprocess
import threading
from pathlib import Path
from uuid import UUID

import httpx
import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelling
from processes import lives
from runners import Place, Seen

from flows.running import cancelled
from flows.server.local import Server


def test_a_run_in_a_terminal(tmp_path: Path, server: Server) -> None:
    place = Place(tmp_path, "mine", server.api)
    place.make(until="download-model")
    place.wish("download-data", "hang")
    process = place.finetune("run", "mine.yaml", "--name", "calm-heron", text=True, stderr=subprocess.PIPE)
    try:
        stage = place.wait_until_hangs("download-data")
        flow_run = UUID(place.record("calm-heron").flow_run_id)
        with temporary_settings({PREFECT_API_URL: server.api}), get_client(sync_client=True) as client:
            client.set_flow_run_state(flow_run, Cancelling())
            _, err = process.communicate(timeout=60)
            assert Seen(client).state(flow_run) == "Cancelled"
            assert Seen(client).unfinished(flow_run) == []
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 143, err
    assert "the run was cancelled in Prefect\n" in err
    assert "Traceback" not in err
    assert not lives(stage)
    record = place.record("calm-heron")
    assert (record.state, record.error) == ("stopped", "cancelled in Prefect")


def test_a_server_that_is_away_cancels_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    looked, got = threading.Event(), threading.Event()
    monkeypatch.setattr(cancelled, "LOOK_SECONDS", 0.0)

    def was_cancelled(flow_run: UUID) -> bool:
        if looked.is_set():
            return True
        looked.set()
        raise httpx.ConnectError("nobody is there")

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
