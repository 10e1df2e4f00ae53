"""A stage whose launcher was killed: what it does before it ends is done in order, whatever it says meanwhile."""

import os
import subprocess
import sys
from pathlib import Path

from stages.contracts import artifacts as a
from stages.contracts.data_settings import DataSettings
from stages.contracts.specs import DownloadDataSpec

STAGE = """
import os, sys
from stages import runtime
from stages.contracts import artifacts as a

def run(spec, ctx):
    print("working", flush=True)
    sys.stdin.read()  # until nobody listens any more
    ctx.progress(1, 2, "half of it")
    os.system("echo so does a child")
    print("and this", file=sys.stderr, flush=True)
    print("more than a pipe holds" * 10_000, flush=True)
    return ctx.artifact(a.RawDataArtifact, figure="1 document", documents=1, source="s", revision=None, text_bytes=3, sets=())

runtime.main({"data": "download-data"}, run, None)
"""


def test_work_goes_on(tmp_path: Path) -> None:
    spec = DownloadDataSpec(workspace=str(tmp_path / "ws"), data=DataSettings(source="s"))
    (tmp_path / "stage.py").write_text(STAGE)
    (tmp_path / "spec.json").write_text(spec.model_dump_json())
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "stage.py"), str(tmp_path / "spec.json")], text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "STAGE_EVENTS": "1"},
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "working\n"
    process.stdout.close()
    process.stdin.close()
    assert process.wait(timeout=60) == 0
    assert a.load_artifact(spec.folder).figure == "1 document"
