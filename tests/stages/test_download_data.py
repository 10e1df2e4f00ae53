"""Stage download of text and conversations: from a Hub on loopback, files, folders, saved datasets."""

import json
from pathlib import Path
from typing import Any

import pytest
from download_runs import TOKEN, data_spec, documents, done, done_here, refused, refused_here, refused_together
from hub_server import HubServer

from stages.contracts import artifacts as a
from stages.contracts.data_settings import DataSettings
from stages.contracts.specs import DownloadDataSpec


def parquet(columns: dict[str, list[Any]]) -> bytes:
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def test_dataset_from_the_hub(hub: HubServer, tmp_path: Path) -> None:
    julia = {"content": ["f(x) = x", "g(x) = 2x ∘ f"], "id": ["a", "b"], "stars": [1, 2]}
    files = {
        "README.md": "---\nlicense: mit\n---\n", "julia/train-0.parquet": parquet(julia),
        "julia/test-0.parquet": parquet({"content": ["h"], "id": ["c"], "stars": [0]}),
        "python/train-0.parquet": parquet({"content": ["pass"], "id": ["d"], "stars": [0]}),
    }  # fmt: skip
    repo = hub.add("big/code", files, kind="datasets", gated=True)
    wanted = {"data_dir": "julia", "text_column": "content"}
    spec = data_spec(tmp_path / "ws", "big/code", **wanted)
    assert f"Accept its licence at {hub.url}/datasets/big/code with" in refused(spec, hub, TOKEN)
    repo.admitted.add("ada")
    artifact = done(spec, hub, TOKEN)
    assert isinstance(artifact, a.RawDataArtifact)
    assert documents(spec) == [{"id": "a", "content": "f(x) = x"}, {"id": "b", "content": "g(x) = 2x ∘ f"}]
    assert "∘" in (spec.folder / "data.jsonl").read_text(), "text is written as it is"
    assert (artifact.documents, artifact.text_bytes) == (2, 8 + 15)
    assert artifact.revision == repo.branches["main"]
    assert artifact.figure == "2 documents, 23 B of text"
    repo.gated = False
    column, split, folder = refused_together(
        data_spec(tmp_path / "ws", "big/code", data_dir="julia"),
        data_spec(tmp_path / "ws", "big/code", split="valid", **wanted),
        data_spec(tmp_path / "ws", "big/code", **(wanted | {"data_dir": "ruby"})),
        hub=hub,
    )
    assert "data.text_column: big/code has no column 'text'. It has: content, id, stars" in column
    assert "data.split: big/code has no split 'valid'. It has: train, test" in split
    assert "data.data_dir: datasets cannot open big/code" in folder


def test_subset_of_a_dataset(hub: HubServer, tmp_path: Path) -> None:
    card = "---\nconfigs:\n- config_name: en\n  data_files: en/*.jsonl\n- config_name: fr\n  data_files: fr/*.jsonl\n---\n"
    lines = ["".join(json.dumps({"text": f"{word} {n}"}) + "\n" for n in range(3)) for word in ("hello", "bonjour")]
    hub.add("ada/words", {"README.md": card, "en/a.jsonl": lines[0], "fr/a.jsonl": lines[1]}, kind="datasets")
    hub.add("ada/damaged", {"a.jsonl": '{"text": "good"}\n' + "x" * 30}, kind="datasets")
    spec = data_spec(tmp_path / "ws", "ada/words", subset="fr")
    done(spec, hub)
    assert documents(spec) == [{"id": n + 1, "text": f"bonjour {n}"} for n in range(3)]
    none, wrong, revision, repo, damaged = refused_together(
        data_spec(tmp_path / "ws", "ada/words"),
        data_spec(tmp_path / "ws", "ada/words", subset="de"),
        data_spec(tmp_path / "ws", "ada/words", revision="v9"),
        data_spec(tmp_path / "ws", "ada/verbs"),
        data_spec(tmp_path / "ws", "ada/damaged"),
        hub=hub,
        token=TOKEN,
    )
    for error in (none, wrong):
        assert "data.subset: datasets cannot open ada/words" in error
        assert "en" in error.split("ada/words")[1]
        assert "fr" in error.split("ada/words")[1]
    assert "ada/words has no revision 'v9' (404). Check data.revision; there are: main" in revision
    assert "the Hub shows no dataset ada/verbs (404)" in repo
    assert "data.source: datasets cannot read row 1 of ada/damaged" in damaged


def test_files_of_records_are_copied_as_they_are(tmp_path: Path) -> None:
    files = {
        "corpus/b.jsonl": b'{"body": "two"}\n\n{not json\n', "corpus/sub/a.jsonl.gz": b"\x1f\x8bwhatever",
        "corpus/.hidden.jsonl": b"{}", "one.parquet": b"PAR1",
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    for source, names, figure in (
        ("corpus", ["b.jsonl", "sub/a.jsonl.gz"], "2 files, 37 B of text"),
        ("corpus/*.jsonl", ["b.jsonl"], "1 file, 27 B of text"),
        ("corpus/**/*.gz", ["sub/a.jsonl.gz"], "1 file, 10 B of text"),
        ("one.parquet", ["one.parquet"], "1 file, 4 B of text"),
    ):
        spec = data_spec(tmp_path / "ws", tmp_path / source, text_column="body")
        artifact = done_here(spec)
        assert isinstance(artifact, a.RawDataArtifact)
        (made,) = artifact.sets
        assert (made.name, made.key, made.role, made.text_columns, made.documents) == ("data", "data", "all", ("body",), None)
        assert made.files == tuple(f"data/{name}" for name in names)
        assert made.origins == tuple(name if source == name else f"corpus/{name}" for name in names)
        where = tmp_path if source == "one.parquet" else tmp_path / "corpus"
        for name in names:
            assert (spec.folder / "data" / name).read_bytes() == (where / name).read_bytes()
        assert artifact.figure == figure
    (tmp_path / "empty.jsonl").write_text("")
    error = refused_here(data_spec(tmp_path / "ws", tmp_path / "empty.jsonl"))
    assert f"data.source: {tmp_path}/empty.jsonl is empty" in error
    (tmp_path / "corpus.csv").write_text("a,b")
    error = refused_here(data_spec(tmp_path / "ws", tmp_path / "corpus.csv"))
    assert f"data.source: {tmp_path}/corpus.csv is no file of records. Those are: .jsonl, .ndjson, .json, .jsonl.gz, " in error
    error = refused_here(data_spec(tmp_path / "ws", tmp_path / "corpus/*.txt"))
    assert (
        f"data.source: no file matches {tmp_path}/corpus/*.txt; {tmp_path}/corpus holds: .hidden.jsonl, b.jsonl, sub" in error
    )


def test_several_sources(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl", "held_out.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    blend = ({"source": str(tmp_path / "a.jsonl"), "weight": 3.0}, {"source": str(tmp_path / "b.jsonl")})
    settings = DataSettings.model_validate({"blend": blend, "valid": [{"source": str(tmp_path / "held_out.jsonl")}]})
    spec = DownloadDataSpec(workspace=str(tmp_path / "ws"), data=settings)
    artifact = done_here(spec)
    assert isinstance(artifact, a.RawDataArtifact)
    assert [(each.name, each.key, each.role, each.files) for each in artifact.sets] == [
        ("data-0", "data.blend[0]", "train", ("data-0/a.jsonl",)), ("data-1", "data.blend[1]", "train", ("data-1/b.jsonl",)),
        ("valid-0", "data.valid[0]", "valid", ("valid-0/held_out.jsonl",)),
    ]  # fmt: skip
    assert artifact.source == "a.jsonl + b.jsonl"
    assert str(tmp_path) not in (spec.folder / "artifact.json").read_text(), "no path of this machine in an artifact"
    other = settings.model_copy(update={"blend": tuple(each.model_copy(update={"weight": 5.0}) for each in settings.blend)})
    assert spec.model_copy(update={"data": other}).key == spec.key, "weights are training's business"
    wrong = DataSettings.model_validate({"source": "ada/x", "valid": [{"source": str(tmp_path / "none.jsonl")}]})
    (tmp_path / "elsewhere").mkdir()
    error = refused_here(spec.model_copy(update={"data": wrong.model_copy(update={"source": str(tmp_path / "a.jsonl")})}))
    assert f"data.valid[0].source: there is no {tmp_path}/none.jsonl" in error


def test_dataset_that_was_saved_to_disk_and_conversations(tmp_path: Path) -> None:
    import datasets

    talks = [{"from": "human", "value": "2+2"}, {"from": "gpt", "value": "4"}]
    train = datasets.Dataset.from_list([{"body": "one", "talk": talks, "n": 1}, {"body": "two", "talk": talks, "n": 2}])
    datasets.DatasetDict({"train": train, "held": train.select([1])}).save_to_disk(str(tmp_path / "saved"))
    spec = data_spec(tmp_path / "ws", tmp_path / "saved", text_column="body", split="held")
    assert isinstance(artifact := done_here(spec), a.RawDataArtifact)
    assert (documents(spec), artifact.sets[0].text_columns) == ([{"id": 1, "body": "two"}], ("body",))
    assert artifact.sets[0].origins == ("saved (held)",)
    spec = data_spec(tmp_path / "ws", tmp_path / "saved", format="sharegpt", columns={"conversations": "talk"})
    done_here(spec)
    assert documents(spec) == [{"id": 1, "talk": talks}, {"id": 2, "talk": talks}]
    train.save_to_disk(str(tmp_path / "one"))
    wrong = (
        data_spec(tmp_path / "ws", tmp_path / "saved", split="valid"),
        data_spec(tmp_path / "ws", tmp_path / "saved", format="messages"),
        data_spec(tmp_path / "ws", tmp_path / "saved", text_column="n"),
        data_spec(tmp_path / "ws", tmp_path / "one", text_column="body", split="tset"),
    )
    split, columns, number, typo = map(refused_here, wrong)
    assert f"data.text_column: column 'n' of {tmp_path}/saved holds int64, no text. Name another one" in number
    assert f"data.split: {tmp_path}/one has no split 'tset'. It has: train" in typo
    assert f"data.split: {tmp_path}/saved has no split 'valid'. It has: train, held" in split
    assert "data.columns: " in columns
    assert "lacks messages, which format messages needs. It has: body, talk, n" in columns


def test_files_beside_the_data_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "corpus"
    beside = ("README.md", "LICENSE", "_SUCCESS", "sub/_committed_1", "dataset_infos.json", "SHA256SUMS", "a.jsonl.md5")
    for name in ("a.jsonl", "sub/b.json.gz", *beside):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"" if name == "_SUCCESS" else b"{}")
    spec = data_spec(tmp_path / "ws", folder)
    artifact = done_here(spec)
    told = "data.source: left out, as they lie beside the data: LICENSE, README.md, SHA256SUMS, _SUCCESS, a.jsonl.md5, "
    assert told in capsys.readouterr().out
    assert isinstance(artifact, a.RawDataArtifact)
    assert artifact.sets[0].files == ("data/a.jsonl", "data/sub/b.json.gz")
    assert artifact.figure == "2 files, 4 B of text (left out: 7 beside the data)"


def test_folders_that_cannot_be_meant(tmp_path: Path) -> None:
    def folder(name: str, *files: str) -> Path:
        for file in files:
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text("{}")
        return tmp_path / name

    mixed = folder("mixed", "a.jsonl", "b.jsonl.gz", "notes/c.txt", "README.md")
    tokens, result = folder("tokens", "x/data.bin", "x/data.idx"), folder("result", "artifact.json", "data.jsonl")
    broken = folder("broken", "a.jsonl")
    (broken / "b.jsonl").symlink_to("gone.jsonl")
    sources = (mixed, tokens, result, broken, broken / "*.jsonl")
    errors = [refused_here(data_spec(tmp_path / "ws", source)) for source in sources]
    assert (
        f"data.include: {mixed} holds 2 files of records, say a.jsonl, and 1 others, say notes/c.txt. Name what to read, e.g. "
        'data.include: ["**/*.jsonl"], or what to leave out, e.g. data.exclude: ["**/*.txt"]'
    ) in errors[0]
    assert f"data.include: {tokens} holds tokens (x/data.bin and x/data.idx), not text. Name the text that they" in errors[1]
    assert f"data.include: {result} is the result of a stage, as it holds artifact.json. To read files of records" in errors[2]
    for error, key in ((errors[3], "include"), (errors[4], "source")):
        assert f"data.{key}: {broken}/b.jsonl is a link to gone.jsonl, which is not there. Mend it, or leave it out" in error
    (broken / "b.jsonl").unlink()
    (broken / "b.jsonl").symlink_to(mixed / "a.jsonl")  # as in a snapshot of the Hub's cache
    (broken / "loop").symlink_to(broken, target_is_directory=True)
    spec = data_spec(tmp_path / "ws", broken)
    artifact = done_here(spec)
    assert isinstance(artifact, a.RawDataArtifact)
    assert artifact.sets[0].files == ("data/a.jsonl", "data/b.jsonl")
    assert artifact.figure.endswith("(left out: 1 links to folders)")
    settings = folder("program", "package.json", "main.js")
    done_here(spec := data_spec(tmp_path / "ws", settings))
    assert [document["id"] for document in documents(spec)] == ["main.js", "package.json"]


def test_rows_that_are_no_text_are_for_preprocess_to_count(tmp_path: Path) -> None:
    import datasets

    rows = [{"title": "one", "body": "1", "day": 1}, {"title": None, "body": "2", "day": 2}]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    spec = data_spec(tmp_path / "ws", tmp_path / "saved", text_column=["title", "body"])
    artifact = done_here(spec)
    assert isinstance(artifact, a.RawDataArtifact)
    assert documents(spec) == [{"id": 1, "title": "one", "body": "1"}, {"id": 2, "title": None, "body": "2"}]
    assert artifact.sets[0].text_columns == ("title", "body")


def test_folder_of_source_files(tmp_path: Path) -> None:
    root = tmp_path / "src"
    files = {
        "b.py": "b = 2\r\n", "a/x.py": "x = 'é'\n", "a/tests/t.py": "t", "c.txt": "c", ".git/hook.py": "no", "a/.x.py": "no",
        "empty.py": "", "a-b.py": "\ufeffc = 3",
    }  # fmt: skip
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content.encode())
    (root / "latin.py").write_bytes("é".encode("latin-1"))
    (tmp_path / "outside.py").write_text("linked")
    (root / "link.py").symlink_to(tmp_path / "outside.py")
    (root / "out").symlink_to(tmp_path, target_is_directory=True)
    (root / "a/loop").symlink_to(root, target_is_directory=True)
    workspace = root / "workspace"
    workspace.mkdir()
    (workspace / "made.py").write_text("by another stage")
    spec = data_spec(workspace, root, include=("**/*.py",), exclude=("**/tests/**",))
    artifact = done_here(spec)
    assert isinstance(artifact, a.RawDataArtifact)
    assert documents(spec) == [
        {"id": "a-b.py", "text": "c = 3"}, {"id": "a/x.py", "text": "x = 'é'\n"}, {"id": "b.py", "text": "b = 2\r\n"},
        {"id": "link.py", "text": "linked"},
    ]  # fmt: skip
    assert artifact.figure == "4 documents, 27 B of text (left out: 2 links to folders, 1 empty, 1 not UTF-8)"
    assert artifact.source == "src"
    hidden = data_spec(workspace, root, include=(".git/*",))
    done_here(hidden)
    assert [document["id"] for document in documents(hidden)] == [".git/hook.py"], "left out unless named"
    within = data_spec(root, root / "a", include=("*.py",))
    done_here(within)
    assert [document["id"] for document in documents(within)] == ["tests/t.py", "x.py"], "a folder of the workspace is fine"
    error = refused_here(data_spec(workspace, root, include=("*.jl", "lib/**"), exclude=("c*",)))
    assert f"data.include: no file of {root} matches *.jl, lib/** without c*; it holds" in error
    assert "is text: 1 not UTF-8" in refused_here(data_spec(workspace, root, include=("latin*",)))
