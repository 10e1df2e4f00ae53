"""Whether the files of a result are still those that its artifact records, and so whether it can be taken instead of made."""

import stat
from pathlib import Path

from megatron_core_impl.checkpoint.digests import file_blake3, file_sha256
from stages.contracts.artifacts import (
    ARTIFACT_FILE,
    AnyArtifact,
    Artifact,
    DamagedArtifact,
    PushArtifact,
    load_artifact,
)


def check_files(folder: Path, artifact: Artifact, *, thorough: bool) -> None:
    """Compare the files of an artifact with its records.

    Sizes are always compared. Contents are hashed when `thorough`, and otherwise only for files that may have been changed
    since the artifact was written: a change within the same tick of the file system's clock shows as the same time.

    Raises:
        DamagedArtifact: naming the first file that is missing or differs.
    """
    written = (folder / ARTIFACT_FILE).stat().st_mtime_ns
    for name in artifact.files:
        check_size(folder, artifact, name)
        if thorough or (folder / name).stat().st_mtime_ns >= written:
            check_content(folder, artifact, name)


def check_size(folder: Path, artifact: Artifact, name: str) -> None:
    """Raise DamagedArtifact if a file of an artifact is missing or has another size than its record."""
    path, record = folder / name, artifact.files[name]
    try:
        found = path.lstat()
    except FileNotFoundError:
        raise DamagedArtifact(f"{path}: missing. {_mend(folder, artifact)}") from None
    if not stat.S_ISREG(found.st_mode):  # a link may lead anywhere, and a device has no end
        raise DamagedArtifact(f"{path}: is a link or the like, which no stage makes. {_mend(folder, artifact)}")
    if found.st_size != record.size:
        sizes = f"has {found.st_size:,} bytes, its artifact says {record.size:,}"
        raise DamagedArtifact(f"{path}: {sizes}. {_mend(folder, artifact)}")


def check_content(folder: Path, artifact: Artifact, name: str) -> None:
    """Raise DamagedArtifact if the bytes of a file of an artifact are not those of its record."""
    path = folder / name
    if file_blake3(path) != artifact.files[name].blake3:
        mend = _mend(folder, artifact)
        raise DamagedArtifact(f"{path}: its digest is not the one its artifact records: it was changed. {mend}")


def _mend(folder: Path, artifact: Artifact) -> str:
    return f"Remove {folder} and run again, or: finetune rerun RUN --stage {artifact.stage}"


def find_intact(folder: Path) -> AnyArtifact | None:
    """The artifact of a folder, if there is one and its files are as recorded, else None."""
    try:
        artifact = load_artifact(folder)
        check_files(folder, artifact, thorough=False)
    except (DamagedArtifact, OSError):
        return None
    return artifact


def find_reusable(folder: Path) -> AnyArtifact | None:
    """The artifact of a folder, if making it again would change nothing: it is intact, and so is what it put elsewhere.

    A published folder is compared file by file. What is on the Hub may have been changed by anybody: a push to it is always
    done again, which uploads nothing that is there already.
    """
    artifact = find_intact(folder)
    if isinstance(artifact, PushArtifact) and artifact.to != "dry-run":
        target = Path(artifact.target)
        try:
            is_there = all(file_sha256(target / name) == record.sha256 for name, record in artifact.published.items())
        except OSError:
            is_there = False
        return artifact if is_there and artifact.to == "folder" else None
    return artifact
