"""What Prefect keeps of our results, and when it counts."""

from pathlib import Path

import pytest
from fake_stages import config, fake_run
from pydantic import ValidationError

from flows.running.results import ArtifactSerializer
from stages import runtime
from stages.contracts import artifacts as a
from stages.contracts.specs import DownloadModelSpec


@pytest.fixture
def artifact(tmp_path: Path) -> a.Artifact:
    return runtime.execute(DownloadModelSpec.of(config(tmp_path)), fake_run)


def test_round_trip(tmp_path: Path, artifact: a.Artifact) -> None:
    serializer = ArtifactSerializer(workspace=str(tmp_path))
    again = serializer.loads(serializer.dumps(artifact))
    assert isinstance(again, a.ModelArtifact)
    assert again == artifact


def test_a_record_counts_only_while_its_files_are_intact(tmp_path: Path, artifact: a.Artifact) -> None:
    serializer = ArtifactSerializer(workspace=str(tmp_path))
    blob = serializer.dumps(artifact)
    other = artifact.model_copy(update={"fingerprint": "0" * 64})
    with pytest.raises(a.DamagedArtifact, match="no longer what this record says"):
        serializer.loads(serializer.dumps(other))
    with pytest.raises(a.DamagedArtifact):
        ArtifactSerializer().loads(blob)
    (artifact.folder(tmp_path) / "content.txt").unlink()
    with pytest.raises(a.DamagedArtifact):
        serializer.loads(blob)
    with pytest.raises(ValidationError):
        serializer.loads(blob.replace(b'"documents"', b'"x"').replace(b'"kind":"model"', b'"kind":"no"'))


def test_errors_are_kept_as_text_and_nothing_else_is(tmp_path: Path) -> None:
    serializer = ArtifactSerializer(workspace=str(tmp_path))
    error = serializer.loads(serializer.dumps(ValueError("too big")))
    assert (type(error), str(error)) == (RuntimeError, "too big")
    with pytest.raises(TypeError, match="results are artifacts, not dict"):
        serializer.dumps({"a": 1})
