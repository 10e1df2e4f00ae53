"""What all stages share, tried with a stage of the test's own: publishing, reuse, damage, errors, exit codes, signals."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from stages import context, runtime
from stages.context import Context
from stages.contracts import artifacts as a
from stages.contracts import intact
from stages.contracts.data_settings import DataSettings
from stages.contracts.process import EVENT_PREFIX
from stages.contracts.specs import DownloadDataSpec, PreprocessSpec, Ref, refused_of
from stages.outcomes import BadInput
from stages.spec_file import read_spec

STAGE = '''
import errno, os, sys, time
from stages import runtime
from stages.contracts import artifacts as a
from stages.outcomes import BadInput, GateFailed

def run(spec, ctx):
    """A stage of one file."""
    (ctx.scratch / "data.jsonl").write_text("one\\n")
    print("working", flush=True)
    match os.environ.get("DO"):
        case "bad": raise BadInput("data.source: is wrong; change it")
        case "gate": raise GateFailed("layer 14 differs")
        case "crash": raise RuntimeError("boom")
        case "full": raise OSError(errno.ENOSPC, "No space left on device", "data.jsonl")
        case "full copy": raise OSError(errno.ENOSPC, "No space left on device", "source.jsonl", None, "data.jsonl")
        case "read-only": raise OSError(errno.EROFS, "Read-only file system", "data.jsonl")
        case "not allowed": raise OSError(errno.EACCES, "Permission denied", "data.jsonl")
        case "hang": sys.stdin.read()
    return ctx.artifact(a.RawDataArtifact, figure="1 document", documents=1, source="s", revision=None, text_bytes=3, sets=())

if __name__ == "__main__":
    runtime.main({"data": "download-data"}, run, __doc__)
'''


@pytest.fixture
def spec(tmp_path: Path) -> DownloadDataSpec:
    return DownloadDataSpec(workspace=str(tmp_path / "ws"), data=DataSettings(source="s"))


@pytest.fixture
def start(tmp_path: Path, spec: DownloadDataSpec) -> Callable[..., subprocess.Popen[str]]:
    """Starts the stage as a process."""
    (tmp_path / "stage.py").write_text(STAGE)
    (tmp_path / "spec.json").write_text(spec.model_dump_json())

    def start(**environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(tmp_path / "stage.py"), str(tmp_path / "spec.json")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **environment},
        )  # fmt: skip

    return start


def made(spec: DownloadDataSpec, text: str = "one\n") -> a.Artifact:
    """Run the work in this process."""

    def run(spec: DownloadDataSpec, ctx: Context) -> a.Artifact:
        (ctx.scratch / "data.jsonl").write_text(text)
        (ctx.scratch / "log.txt").write_text(os.urandom(4).hex())
        return ctx.artifact(
            a.RawDataArtifact, figure="f", volatile=("log.txt",), documents=1, source="s", revision=None, text_bytes=3, sets=()
        )

    return runtime.execute(spec, run)


def test_publishes_a_complete_artifact(spec: DownloadDataSpec) -> None:
    artifact = made(spec)
    assert a.load_artifact(spec.folder) == artifact
    assert artifact.path == f"download/{spec.key}"
    assert set(artifact.files) == {"data.jsonl", "log.txt"}
    assert artifact.files["data.jsonl"].size == 4
    assert artifact.spec["data"]["source"] == "s"
    assert "workspace" not in artifact.spec, "an artifact holds no absolute path"
    assert [p.name for p in spec.folder.parent.iterdir() if "partial" in p.name] == []


def test_fingerprint_is_of_content(spec: DownloadDataSpec, tmp_path: Path) -> None:
    elsewhere = spec.model_copy(update={"workspace": str(tmp_path / "other")})
    assert made(spec).fingerprint == made(elsewhere).fingerprint, "volatile files do not count"
    third = spec.model_copy(update={"workspace": str(tmp_path / "third")})
    assert made(third, "two\n").fingerprint != made(spec).fingerprint


def test_reuses_what_is_there_and_remakes_what_is_damaged(spec: DownloadDataSpec) -> None:
    assert made(spec).files == made(spec, "other").files, "the first result was taken"
    (spec.folder / "data.jsonl").write_text("onf\n")
    assert made(spec).files["data.jsonl"].size == 4
    assert (spec.folder / "data.jsonl").read_text() == "one\n"
    assert sorted(p.name for p in spec.folder.parent.iterdir()) == [f".{spec.key}.lock", spec.key]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "data.jsonl").unlink(), "data.jsonl: missing"),
        (lambda f: (f / "data.jsonl").write_text("longer\n"), "has 7 bytes, its artifact says 4"),
        (lambda f: (f / "data.jsonl").write_text("onf\n"), "its digest is not the one its artifact records"),
        (lambda f: (f / "artifact.json").write_text("{"), "artifact.json: not a readable artifact"),
    ],
)
def test_damage_is_named(spec: DownloadDataSpec, damage: Callable[[Path], object], message: str) -> None:
    made(spec)
    damage(spec.folder)
    assert intact.find_intact(spec.folder) is None
    with pytest.raises(a.DamagedArtifact, match=message):
        intact.check_files(spec.folder, a.load_artifact(spec.folder), thorough=True)


def test_a_change_within_the_tick_of_the_artifact_is_found(spec: DownloadDataSpec) -> None:
    made(spec)
    (spec.folder / "data.jsonl").write_text("onf\n")
    tick = (spec.folder / "artifact.json").stat().st_mtime_ns
    os.utime(spec.folder / "data.jsonl", ns=(tick, tick))
    assert intact.find_intact(spec.folder) is None


@pytest.mark.parametrize("target", ["../elsewhere", "/dev/zero"])
def test_a_link_in_a_result_is_not_followed(spec: DownloadDataSpec, tmp_path: Path, target: str) -> None:
    artifact = made(spec)
    (spec.folder.parent / "elsewhere").write_text("one\n")
    (spec.folder / "data.jsonl").unlink()
    (spec.folder / "data.jsonl").symlink_to(target)
    with pytest.raises(a.DamagedArtifact, match=r"data\.jsonl: is a link or the like, which no stage makes\. Remove "):
        intact.check_files(spec.folder, artifact, thorough=True)


@pytest.mark.parametrize("name", ["../../data.jsonl", "/etc/passwd", "a/../../b"])
def test_files_of_an_artifact_are_in_its_folder(spec: DownloadDataSpec, name: str) -> None:
    made(spec)
    file = spec.folder / "artifact.json"
    file.write_text(file.read_text().replace('"data.jsonl"', json.dumps(name)))
    with pytest.raises(a.DamagedArtifact, match=f"{name} leads out of the folder"):
        a.load_artifact(spec.folder)


def test_a_changed_fact_is_damage(spec: DownloadDataSpec) -> None:
    made(spec)
    file = spec.folder / "artifact.json"
    file.write_text(file.read_text().replace('"documents": 1', '"documents": 2'))
    assert intact.find_intact(spec.folder) is None
    with pytest.raises(a.DamagedArtifact, match="its facts do not give its fingerprint: it was changed"):
        a.load_artifact(spec.folder)


def test_damage_with_an_old_time_is_found_by_a_thorough_check(spec: DownloadDataSpec) -> None:
    artifact = made(spec)
    (spec.folder / "data.jsonl").write_text("onf\n")
    os.utime(spec.folder / "data.jsonl", ns=(0, 0))
    with pytest.raises(a.DamagedArtifact, match="digest"):
        intact.check_files(spec.folder, artifact, thorough=True)


@pytest.mark.parametrize(
    ("do", "code", "error"),
    [
        ("", 0, ""),
        ("bad", 2, "error: download: data.source: is wrong; change it"),
        ("gate", 3, "error: download: layer 14 differs"),
        ("crash", 1, "error: download: RuntimeError: boom. This is a defect of ours; its log has the traceback"),
        ("full", 2, "error: download: no space left at data.jsonl: make room or choose another workspace, then run again"),
        ("full copy", 2, "error: download: no space left at data.jsonl: make room or choose another workspace, then run again"),
        ("read-only", 2, "error: download: read-only file system at data.jsonl: choose another workspace, then run again"),
        (
            "not allowed",
            2,
            "error: download: permission denied at data.jsonl: allow it or choose another workspace, then run again",
        ),
    ],
)
def test_outcomes(start: Callable[..., subprocess.Popen[str]], spec: DownloadDataSpec, do: str, code: int, error: str) -> None:
    process = start(DO=do)
    _, stderr = process.communicate()
    assert process.returncode == code
    assert (stderr.splitlines() or [""])[-1] == error
    assert ("Traceback" in stderr) == (do == "crash")
    assert spec.folder.exists() == (do == "")
    assert not list(spec.folder.parent.glob(".*.partial")), "a failed stage leaves nothing"


def test_errors_are_events_for_a_launcher(start: Callable[..., subprocess.Popen[str]]) -> None:
    stdout, _ = start(DO="gate", STAGE_EVENTS="1").communicate()
    events = [json.loads(line.removeprefix(EVENT_PREFIX)) for line in stdout.splitlines() if line.startswith("@@")]
    assert events == [{"event": "error", "message": "layer 14 differs", "code": 3}]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 4), (signal.SIGKILL, -9)])
def test_a_killed_stage_leaves_no_result_and_runs_again(
    start: Callable[..., subprocess.Popen[str]], spec: DownloadDataSpec, number: signal.Signals, code: int
) -> None:
    process = start(DO="hang")
    assert process.stdout is not None
    assert process.stdout.readline() == "working\n"
    process.send_signal(number)
    _, stderr = process.communicate()
    assert process.returncode == code
    assert not spec.folder.exists()
    if code == 4:
        assert stderr == "error: download: stopped by SIGTERM; run it again to go on\n"
    again = start()
    again.communicate()
    assert again.returncode == 0
    assert not list(spec.folder.parent.glob(".*.partial"))


def test_two_processes_make_a_result_once(start: Callable[..., subprocess.Popen[str]], spec: DownloadDataSpec) -> None:
    first = start(DO="hang")
    assert first.stdout is not None
    assert first.stdout.readline() == "working\n"
    second = start()
    assert second.stdout is not None
    assert second.stdout.readline() == "waiting: another process is making this result\n"
    first.communicate(input="")
    stdout, _ = second.communicate()
    assert (first.returncode, second.returncode) == (0, 0)
    assert "working" not in stdout


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("{", "not JSON"),
        ("{}", "must have exactly one of the keys data"),
        ('{"data": {"source": "s"}}', "workspace: Field required"),
        ('{"workspace": "/w", "data": {"source": "s", "sauce": 1}}', "data.sauce: Extra inputs are not permitted (got 1)"),
    ],
)
def test_a_bad_spec_is_one_clear_line(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "spec.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(BadInput) as caught:
        read_spec(path, {"data": "download-data"})
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_inputs_are_checked(tmp_path: Path, spec: DownloadDataSpec) -> None:
    artifact = made(spec)

    def context(**refs: Ref) -> Context:
        return Context(PreprocessSpec(workspace=spec.workspace, inputs=refs), tmp_path)

    good = Ref(path=artifact.path, fingerprint=artifact.fingerprint)
    assert context(data=good).input("data", a.RawDataArtifact) == (artifact, spec.folder)
    with pytest.raises(BadInput, match=r"inputs\.data: missing from the spec"):
        context().input("data", a.RawDataArtifact)
    with pytest.raises(BadInput, match="holds a raw-data artifact, this needs a ModelArtifact"):
        context(data=good).input("data", a.ModelArtifact)
    with pytest.raises(BadInput, match="the spec asks for 123"):
        context(data=Ref(path=artifact.path, fingerprint="123")).input("data", a.RawDataArtifact)
    with pytest.raises(BadInput, match=r"no artifact\.json in it"):
        context(data=Ref(path="download/none")).input("data", a.RawDataArtifact)
    (spec.folder / "data.jsonl").write_text("onf\n")
    with pytest.raises(BadInput, match=r"data\.jsonl: its digest is not the one"):
        context(data=good).input("data", a.RawDataArtifact)


# ── Inputs that are hashed while the stage goes on ────────────────────────────────────────────────────────────────────────


class Altered(NamedTuple):
    """A spec whose input was altered after it was made, its size unchanged."""

    spec: PreprocessSpec
    file: Path


@pytest.fixture
def altered(spec: DownloadDataSpec) -> Altered:
    artifact = made(spec)
    file = spec.folder / "data.jsonl"
    file.write_text("two\n")
    return Altered(PreprocessSpec(workspace=spec.workspace, inputs={"data": Ref(path=artifact.path)}), file)


def finish(ctx: Context) -> a.RawDataArtifact:
    return ctx.artifact(a.RawDataArtifact, figure="", documents=1, source="s", revision=None, text_bytes=3, sets=())


def test_nothing_is_published_of_an_altered_input(altered: Altered) -> None:
    read: list[str] = []

    def run(spec: PreprocessSpec, ctx: Context) -> a.Artifact:
        _, folder = ctx.input("data", a.RawDataArtifact, is_checked_meanwhile=True)
        read.append((folder / "data.jsonl").read_text())
        return finish(ctx)

    with pytest.raises(BadInput, match=r"^inputs\.data: \S+data\.jsonl: its digest is not the one"):
        runtime.execute(altered.spec, run)
    assert read == ["two\n"]  # the stage went on meanwhile
    assert not altered.spec.folder.exists()


def test_damage_is_told_and_not_what_followed_from_it(altered: Altered) -> None:
    def run(spec: PreprocessSpec, ctx: Context) -> a.Artifact:
        ctx.input("data", a.RawDataArtifact, is_checked_meanwhile=True)
        raise ValueError("what is this?")

    with pytest.raises(BadInput, match=r"data\.jsonl: its digest is not the one"):
        runtime.execute(altered.spec, run)


def test_other_faults_are_told_where_the_input_is_right(altered: Altered) -> None:
    def run(spec: PreprocessSpec, ctx: Context) -> a.Artifact:
        ctx.input("data", a.RawDataArtifact, is_checked_meanwhile=True)
        raise ValueError("what is this?")

    altered.file.write_text("one\n")
    with pytest.raises(ValueError, match="what is this"):
        runtime.execute(altered.spec, run)


def test_a_missing_file_is_told_at_once(altered: Altered) -> None:
    altered.file.write_text("longer")
    ctx = Context(altered.spec, altered.spec.folder)
    with pytest.raises(BadInput, match=r"inputs\.data: \S+data\.jsonl: has 6 bytes, its artifact says 4"):
        ctx.input("data", a.RawDataArtifact, is_checked_meanwhile=True)


def test_facts_of_an_input_of_which_no_file_is_read(altered: Altered) -> None:
    altered.file.unlink()

    def run(spec: PreprocessSpec, ctx: Context) -> a.Artifact:
        assert ctx.facts("data", a.RawDataArtifact).documents == 1
        with pytest.raises(BadInput, match="holds a raw-data artifact, this needs a ModelArtifact"):
            ctx.facts("data", a.ModelArtifact)
        return finish(ctx)

    artifact = runtime.execute(altered.spec, run)
    assert set(artifact.inputs) == {"data"}


def test_the_report_of_a_gate_that_refused_before_goes(spec: DownloadDataSpec) -> None:
    """The next attempt may fail for another reason, and the report would be shown beside that."""
    left = [refused_of(spec.folder), refused_of(spec.folder).with_suffix(".md")]
    spec.folder.parent.mkdir(parents=True)
    for file in left:
        file.write_text("of an attempt before")

    def refuse(spec: DownloadDataSpec, ctx: Context) -> a.Artifact:
        raise BadInput("data.source: is wrong")

    with pytest.raises(BadInput):
        runtime.execute(spec, refuse)
    assert [file.exists() for file in left] == [False, False]


def test_a_digest_that_is_known_is_not_taken_again(spec: DownloadDataSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []

    def digest(path: Path) -> str:
        taken.append(path.name)
        return "0" * 64

    monkeypatch.setattr(context, "file_blake3", digest)

    def run(spec: DownloadDataSpec, ctx: Context) -> a.Artifact:
        for name in ("a", "b"):
            (ctx.scratch / name).write_text(name)
        return ctx.artifact(
            a.RawDataArtifact, figure="", digests={"a": "1" * 64}, documents=1, source="s", revision=None, text_bytes=3,
            sets=(),
        )  # fmt: skip

    files = runtime.execute(spec, run).files
    assert taken == ["b"]
    assert {name: record.blake3[0] for name, record in files.items()} == {"a": "1", "b": "0"}
