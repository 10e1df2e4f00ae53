"""A result that is there, and the results it was made from: what a run can start from instead of making them."""

from collections.abc import Sequence
from pathlib import Path

from stages.contracts import artifacts as a
from stages.contracts import intact
from stages.contracts.specs import SOURCES, SPECS


class NoResult(ValueError):
    """What should be a result of a workspace is none. The message is for people."""


def lineage(workspace: Path, named: Sequence[a.Artifact]) -> dict[str, a.Artifact]:
    """These results and all they were made from that is still there, by node, in the pipeline's order.

    Where two results of one node are found, the one nearest to what was named counts.

    Raises:
        NoResult: two were named that cannot both be used.
    """
    found: dict[str, a.Artifact] = {}
    for artifact in named:
        if found.setdefault(node_of(artifact), artifact).fingerprint != artifact.fingerprint:
            other = found[node_of(artifact)]
            raise NoResult(f"{other.path} and {artifact.path} are both results of {node_of(artifact)}: name one of them")
    nearest = list(named)
    while nearest:
        sources = [source for artifact in nearest for source in _sources(workspace, artifact)]
        nearest = [source for source in sources if found.setdefault(node_of(source), source) is source]
    return {node: found[node] for node in SPECS if node in found}


def find_result(workspace: Path, name: str) -> a.Artifact:
    """The intact result that a person names, by what is at hand: its folder, its path in the workspace such as
    `train/0123456789abcdef`, or a node of a run such as `brisk-otter/train`.

    Raises:
        NoResult: there is none, it is damaged, or it is not of this workspace.
    """
    places = (Path(name).expanduser(), workspace / name, workspace / "runs" / name)
    folder = next((place.resolve() for place in places if (place / a.ARTIFACT_FILE).is_file()), None)
    if folder is None:
        raise NoResult(
            f"{name}: no result is there. Name the folder of one, such as {workspace}/train/…, or a stage of a run, such as "
            "brisk-otter/train"
        )
    try:
        artifact = a.load_artifact(folder)
        intact.check_files(folder, artifact, thorough=False)
    except a.DamagedArtifact as error:
        raise NoResult(f"{name}: {error}") from None
    if artifact.folder(workspace).resolve() != folder:
        raise NoResult(
            f"{name}: {folder} is not of the workspace {workspace}. Use the workspace it is in, or copy it to "
            f"{artifact.folder(workspace)}"
        )
    return artifact


def node_of(artifact: a.Artifact) -> str:
    """The node that makes such a result."""
    if artifact.stage in SPECS:
        return artifact.stage
    return "download-model" if isinstance(artifact, a.ModelArtifact) else "download-data"


def _sources(workspace: Path, artifact: a.Artifact) -> list[a.Artifact]:
    """What a result was made from, as far as it is there, intact and still the same."""
    found: list[a.Artifact] = []
    refs = artifact.spec.get("inputs", {})
    for name in SOURCES[node_of(artifact)]:
        path = refs.get(name, {}).get("path")
        source = intact.find_reusable(workspace / path) if path else None
        if source is not None and source.fingerprint == artifact.inputs.get(name):
            found.append(source)
    return found
