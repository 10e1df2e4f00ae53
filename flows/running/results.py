"""How Prefect keeps our tasks' results: as the artifacts' own JSON, read strictly, and only while their files are there.

Prefect's default is pickle, and its JSON turns what it cannot import into plain dicts without a word. A record that does
not load here is, to Prefect, no record: the task runs (and finds the stage's folder, if that is intact).
"""

import json
from pathlib import Path
from typing import Any, Literal

from prefect.serializers import Serializer

from stages.contracts import artifacts as a
from stages.contracts import intact


class ArtifactSerializer(Serializer):  # not Serializer[Any]: Prefect registers every class, and that one has no name
    """Artifacts, and the exceptions of failed tasks, as JSON. Anything else is refused."""

    type: Literal["artifact"] = "artifact"
    workspace: str | None = None  # absolute: where the artifacts' paths start. Prefect's API forgets it, its files do not

    def dumps(self, obj: Any) -> bytes:
        """JSON of an artifact or an exception, which is all that our tasks end with. Raises TypeError for others."""
        if isinstance(obj, a.Artifact):
            return obj.model_dump_json().encode()
        if isinstance(obj, BaseException):
            return json.dumps({"error": str(obj) or type(obj).__name__}).encode()
        raise TypeError(f"results are artifacts, not {type(obj).__name__}")

    def loads(self, blob: bytes) -> Any:
        """The artifact, if it is still the one in its folder and its files are intact.

        Raises:
            DamagedArtifact: they are not.
            pydantic.ValidationError: the record is no artifact.
        """
        if blob.startswith(b'{"error"'):
            return RuntimeError(json.loads(blob)["error"])
        artifact = a.parse_artifact(blob)
        found = intact.find_reusable(artifact.folder(Path(self.workspace))) if self.workspace is not None else None
        if found is None or found.fingerprint != artifact.fingerprint:
            raise a.DamagedArtifact(f"{artifact.path}: no longer what this record says")
        return found
